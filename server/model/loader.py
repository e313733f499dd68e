"""A checkpoint folder to a resident base: host memory holds one unquantized layer at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from server.kernels.dense_linear import pack
from server.kernels.fused import rotary_tables
from server.model.decoder import Decoder, Layer
from server.model.linear import activation_dtype, make_linear
from server.model.spec import FUSED, ModelSpec

OnProgress = Callable[[str, float], None]


class Checkpoint:
    """Tensors of a safetensors checkpoint, by name, wherever its shards hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._shard_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as shard:
                self._shard_of = dict.fromkeys(shard.keys(), "model.safetensors")
        self._open = {
            name: safe_open(folder / name, framework="pt") for name in set(self._shard_of.values())
        }

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor; ValueError if the checkpoint has none of this name."""
        if name not in self._shard_of:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        found: torch.Tensor = self._open[self._shard_of[name]].get_tensor(name)
        return found


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    max_positions: int,
    on_progress: OnProgress,
) -> Decoder:
    """Load, quantize and pack the base."""
    layers = []
    for index in range(spec.num_layers):
        layers.append(_load_layer(checkpoint, index, quantization, dtype, device))
        on_progress("loading the base", (index + 1) / spec.num_layers)
    embedding = checkpoint.tensor("model.embed_tokens.weight").to(device, dtype)
    is_tied = spec.tie_word_embeddings or "lm_head.weight" not in checkpoint
    head = embedding if is_tied else checkpoint.tensor("lm_head.weight").to(device, dtype)
    activations = activation_dtype(dtype, device)
    cos, sin = rotary_tables(spec.head_dim, spec.rope_theta, max_positions, activations)
    return Decoder(
        spec,
        embedding,
        layers,
        checkpoint.tensor("model.norm.weight").to(device, activations),
        pack(head),
        (cos.to(device), sin.to(device)),
    )


def _load_layer(
    checkpoint: Checkpoint, index: int, quantization: str, dtype: torch.dtype, device: torch.device
) -> Layer:
    prefix = f"model.layers.{index}."

    def norm(name: str) -> torch.Tensor:
        weight = checkpoint.tensor(f"{prefix}{name}.weight")
        return weight.to(device, activation_dtype(dtype, device))

    linears = {}
    for group, names in FUSED.items():
        matrices = [checkpoint.tensor(f"{prefix}{name}.weight") for name in names]
        linears[group] = make_linear(matrices, quantization, dtype, device)
    return Layer(norm("input_layernorm"), norm("post_attention_layernorm"), linears)
