"""A quantizer without calibration: rounds to the nearest and packs, as GPTQ and AWQ files hold it.

It stands in for the real ones where a test is about what happens around them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from training.quantize_run import Event

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of an int32 holds


def round_to_grid(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, ...]:
    """Codes [in, out] 0 to 15, zeros [groups, out] and scales [groups, out] of a weight [out, in].

    The zero points differ from group to group, so that mixing them up would be seen.
    """
    groups = weight.T.reshape(-1, group_size, weight.shape[0])  # [groups, group_size, out]
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    scales = ((high - low) / 15).clamp_min(1e-6).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
    return codes.reshape(weight.shape[1], -1).int(), zeros.int(), scales


def pack(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes in an int32: [n, 8 m] -> [n, m]."""
    eights = codes.view(len(codes), -1, 8).long()[..., list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def gptq_tensors(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """A linear as GPTQ files hold it."""
    codes, zeros, scales = round_to_grid(weight.float(), group_size)
    return {
        "qweight": pack(codes.T.contiguous()).T.contiguous(),
        "qzeros": pack(zeros - 1),
        "scales": scales.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group_size,
    }


def awq_tensors(weight: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """A linear as AWQ files hold it."""
    codes, zeros, scales = round_to_grid(weight.float(), group_size)
    return {
        "qweight": pack(codes, AWQ_ORDER),
        "qzeros": pack(zeros, AWQ_ORDER),
        "scales": scales.half(),
    }


def quantize_folder(source: Path, out: Path, group_size: int) -> None:
    """What GPTQModel leaves for the checkpoint in `source`."""
    out.mkdir()
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            for part, tensor in gptq_tensors(weight, group_size).items():
                weights[f"{name.removesuffix('.weight')}.{part}"] = tensor
        elif not name.endswith("inv_freq"):  # a buffer, which no model loads or saves
            weights[name] = weight
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", out / "config.json")
    config = json.loads((out / "config.json").read_text())
    settings = {"bits": 4, "group_size": group_size, "quant_method": "gptq", "sym": False}
    settings |= {"meta": {"offload_to_disk_path": str(out), "damp_percent": 0.05}}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (out / "quant_log.csv").write_text("layer,module\n")


def worker(
    python: Path, job: dict[str, Any], folder: Path, on_event: Callable[[Event], None]
) -> list[Event]:
    """In place of training.quantize_run.run_worker."""
    quantize_folder(Path(job["model"]), Path(job["out"]), job["group_size"])
    rows = []
    for layer in range(job["num_layers"]):
        on_event({"event": "layer", "done": layer + 1, "of": job["num_layers"]})
        rows.append({"layer": layer, "linear": "mlp.up_proj", "error": 0.5, "seconds": 0.1})
    return [
        {"event": "started", "device": "cpu", "versions": {"gptqmodel": "by hand"}},
        {"event": "errors", "rows": rows},
        {"event": "done"},
    ]
