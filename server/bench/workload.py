"""Random adapters to measure with, in PEFT's own format."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.model.spec import FUSED, ModelSpec

ADAPTER_RANK = 16


def save_random_adapter(folder: Path, spec: ModelSpec, seed: int, rank: int = ADAPTER_RANK) -> Path:
    """Write a PEFT folder: random LoRA on every linear, small enough to leave the base sensible."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = [name for linears in FUSED.values() for name in linears]
    tensors = {}
    for layer in range(spec.num_layers):
        for name in names:
            out_features, in_features = spec.linear_shape(name)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, in_features, generator=generator) * 0.01
            b = torch.randn(out_features, rank, generator=generator) * 0.01
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[1] for name in names}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
