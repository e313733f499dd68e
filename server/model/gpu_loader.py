"""safetensors to a GPU decoder, layer by layer."""

import torch

from server.kernels.fused import rotary_tables
from server.kernels.fused_gpu import rotary_rows
from server.model.gpu_decoder import GpuDecoder, NF4Layer
from server.model.linear import make_nf4_linear
from server.model.loader import Checkpoint, OnProgress
from server.model.spec import FUSED, ModelSpec

DTYPE = torch.bfloat16  # of activations, keys and values; the kernels know no other


def load_gpu_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    device: torch.device,
    max_positions: int,
    on_progress: OnProgress,
) -> GpuDecoder:
    """Load, quantize and pack the base on the device; the host never holds more than a matrix."""
    layers = []
    for index in range(spec.num_layers):
        layers.append(_load_layer(checkpoint, index, device))
        on_progress("loading the base", (index + 1) / spec.num_layers)

    def tensor(name: str) -> torch.Tensor:
        return checkpoint.tensor(name).to(device, DTYPE)

    embedding = tensor("model.embed_tokens.weight")
    is_tied = spec.tie_word_embeddings or "lm_head.weight" not in checkpoint
    cos, sin = rotary_tables(spec.head_dim, spec.rope_theta, max_positions, torch.float32)
    return GpuDecoder(
        spec,
        embedding,
        layers,
        tensor("model.norm.weight"),
        embedding if is_tied else tensor("lm_head.weight"),
        rotary_rows(cos, sin).unsqueeze(0).to(device),
    )


def _load_layer(checkpoint: Checkpoint, index: int, device: torch.device) -> NF4Layer:
    prefix = f"model.layers.{index}."

    def norm(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"{prefix}{name}.weight").to(device, DTYPE)

    linears = {
        group: make_nf4_linear(
            [checkpoint.tensor(f"{prefix}{name}.weight") for name in names], device
        )
        for group, names in FUSED.items()
    }
    return NF4Layer(norm("input_layernorm"), norm("post_attention_layernorm"), linears)
