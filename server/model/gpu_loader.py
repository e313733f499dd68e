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
    stacked,
    weight,
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
        layers.append(_load_layer(checkpoint, spec, index, device))
        on_progress("loading the base", (index + 1) / spec.num_layers)
    embedding = weight(checkpoint, spec, "model.embed_tokens", device, DTYPE)
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else weight(checkpoint, spec, "lm_head", device, DTYPE)
    return GpuDecoder(
        spec, embedding, layers, weight(checkpoint, spec, "model.norm", device, DTYPE), head, rotary
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
        layer = _load_layer(checkpoint, spec, index, device)
        norms = (
            shared(layer.input_norm, known.input_norm),
            shared(layer.post_attention_norm, known.post_attention_norm),
        )
        layers.append(GpuLayer(*norms, layer.linears))
    embedding = shared(
        weight(checkpoint, spec, "model.embed_tokens", device, DTYPE), base.embedding
    )
    is_tied = checkpoint.has_tied_head(spec)
    head = embedding if is_tied else weight(checkpoint, spec, "lm_head", device, DTYPE)
    decoder = GpuDecoder(
        spec,
        embedding,
        layers,
        shared(weight(checkpoint, spec, "model.norm", device, DTYPE), base.final_norm),
        shared(head, base.lm_head),
        base.rotary,
        base.scratch,
    )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return decoder


def _load_layer(
    checkpoint: Checkpoint, spec: ModelSpec, index: int, device: torch.device
) -> GpuLayer:
    prefix = f"model.layers.{index}."
    linears = {
        group: make_packed_linear(stacked(checkpoint, spec, index, group, device), device)
        for group in FUSED
    }
    return GpuLayer(
        weight(checkpoint, spec, prefix + "input_layernorm", device, DTYPE),
        weight(checkpoint, spec, prefix + "post_attention_layernorm", device, DTYPE),
        linears,
    )
