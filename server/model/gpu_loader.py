"""safetensors to a GPU decoder, layer by layer."""

import torch

from server.model.gpu_decoder import GpuDecoder, GpuLayer
from server.model.linear import make_packed_linear
from server.model.loader import (
    Checkpoint,
    OnProgress,
    check_quantization,
    check_weight_set,
    shared,
)
from server.model.rotary import RotaryTables
from server.model.spec import FUSED, ModelSpec

DTYPE = torch.bfloat16  # of activations, keys and values; the kernels know no other


def load_gpu_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quantization: str,
    device: torch.device,
    rotary: RotaryTables,
    on_progress: OnProgress,
) -> GpuDecoder:
    """Load, quantize and pack the base on the device; the host never holds more than a matrix.

    ValueError says what is wrong with the checkpoint.
    """
    assert quantization in ("nf4", "gptq"), "the kernels read 4 bits"
    check_quantization(checkpoint.folder, quantization)
    layers = []
    for index in range(spec.num_layers):
        layers.append(_load_layer(checkpoint, index, device))
        on_progress("loading the base", (index + 1) / spec.num_layers)
    embedding = _tensor(checkpoint, "model.embed_tokens", device)
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else _tensor(checkpoint, "lm_head", device)
    return GpuDecoder(
        spec, embedding, layers, _tensor(checkpoint, "model.norm", device), head, rotary
    )


def load_gpu_weight_set(checkpoint: Checkpoint, spec: ModelSpec, base: GpuDecoder) -> GpuDecoder:
    """A GPTQ checkpoint as a decoder beside a running one; what equals the base's is the base's.

    Scratch memory and rotary tables are the base's too: the two take turns in one stream. Runs in
    any thread, on its current stream, and waits for that. ValueError says what is wrong with the
    checkpoint.
    """
    check_weight_set(checkpoint, spec, base.spec)
    device = base.device
    layers = []
    for index, known in enumerate(base.layers):
        layer = _load_layer(checkpoint, index, device)
        norms = (
            shared(layer.input_norm, known.input_norm),
            shared(layer.post_attention_norm, known.post_attention_norm),
        )
        layers.append(GpuLayer(*norms, layer.linears))
    embedding = shared(_tensor(checkpoint, "model.embed_tokens", device), base.embedding)
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else _tensor(checkpoint, "lm_head", device)
    decoder = GpuDecoder(
        spec,
        embedding,
        layers,
        shared(_tensor(checkpoint, "model.norm", device), base.final_norm),
        shared(head, base.lm_head),
        base.rotary,
        base.scratch,
    )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return decoder


def _tensor(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
    return checkpoint.tensor(f"{name}.weight").to(device, DTYPE)


def _load_layer(checkpoint: Checkpoint, index: int, device: torch.device) -> GpuLayer:
    prefix = f"model.layers.{index}."
    linears = {
        group: make_packed_linear(
            [checkpoint.matrix(prefix + name, device) for name in names], device
        )
        for group, names in FUSED.items()
    }
    return GpuLayer(
        _tensor(checkpoint, prefix + "input_layernorm", device),
        _tensor(checkpoint, prefix + "post_attention_layernorm", device),
        linears,
    )
