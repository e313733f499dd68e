"""Holds what a quantizer wrote against the model that it was given."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from training.merge_checkpoint import Checkpoint, is_buffer
from training.quantize_groups import linear_names
from training.quantize_packed import PackedCheckpoint

MAX_ERROR = 0.5  # of a linear's norm: 4 bits lose about 0.1, codes in a wrong order lose 1.4


def check_result(model: Path, quantized: Path, group_size: int) -> dict[str, Any]:
    """Return how far the packed weights are from the model's, as shares of each linear's norm.

    ValueError where a tensor is missing or is no quantization of the model's; what was not
    quantized must be the model's own.
    """
    packed = PackedCheckpoint(quantized)
    with contextlib.closing(Checkpoint(model)) as source:
        linears = linear_names(source)
        errors = {name: _error(source, packed, name, group_size) for name in linears}
        rest = set(source) - {f"{name}.weight" for name in linears}
        for name in sorted(rest):
            is_tied = name == "lm_head.weight" and name not in packed
            if is_tied or is_buffer(name):
                continue
            stored = packed.tensor(name)
            if not torch.equal(source.tensor(name).to(stored.dtype), stored):
                raise ValueError(f"{quantized}: {name} is not the model's")
    worst = max(errors, key=errors.__getitem__)
    return {
        "mean": float(f"{sum(errors.values()) / len(errors):.3g}"),
        "max": float(f"{errors[worst]:.3g}"),
        "worst": worst,
    }


def _error(source: Checkpoint, packed: PackedCheckpoint, name: str, group_size: int) -> float:
    if f"{name}.weight" in packed:
        raise ValueError(f"{packed.folder}: {name} was not quantized")
    weight, found = source.tensor(f"{name}.weight").float(), packed.weight(name)
    num_groups = len(packed.tensor(f"{name}.scales"))
    if found.shape != weight.shape or num_groups * group_size != weight.shape[1]:
        raise ValueError(f"{packed.folder}: {name} has another shape or group size")
    error = float(torch.linalg.norm(found - weight) / torch.linalg.norm(weight).clamp_min(1e-30))
    if not error < MAX_ERROR:  # NaN too
        raise ValueError(
            f"{packed.folder}: {name} is {error:.2f} of its norm away from the model's"
        )
    return error
