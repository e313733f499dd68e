"""A GPTQ checkpoint out of an unquantized one, packed here code by code: rounded to nearest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Codes = npt.NDArray[np.int64]


def quantize_folder(
    source: Path, out: Path, group_size: int = 32, layout: str = "gptq", **settings: Any
) -> tuple[Path, Path]:
    """Write `source` quantized, and what that amounts to unquantized; return both folders."""
    quantized, plain = out / "gptq", out / "plain"
    tensors = load_file(source / "model.safetensors")
    values, packed = dict(tensors), {}
    for name, tensor in tensors.items():
        if name.split(".")[-2] not in LINEARS:
            packed[name] = tensor
            continue
        codes, scales = round_to_nearest(tensor, group_size)
        exact = (codes.astype(np.float32) - 8) * np.repeat(scales, group_size, axis=1)
        values[name] = torch.from_numpy(exact).to(tensor.dtype)
        packed |= pack_linear(name.removesuffix(".weight"), codes, scales, group_size, layout)
    config = json.loads((source / "config.json").read_text())
    for folder, content in ((plain, values), (quantized, packed)):
        folder.mkdir(parents=True)
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = settings_of(group_size, layout, **settings)
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, plain


def settings_of(group_size: int, layout: str = "gptq", **others: Any) -> dict[str, Any]:
    """What config.json says of such a checkpoint."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        **others,
    }


def round_to_nearest(
    weight: torch.Tensor, group_size: int
) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Codes [out, in] 0 to 15, and scales [out, in / group_size] that fp16 holds exactly."""
    groups = weight.float().numpy().reshape(len(weight), -1, group_size)
    scales = (np.abs(groups).max(axis=2) / 7.5).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(groups / scales[..., None]) + 8, 0, 15)
    return codes.reshape(weight.shape).astype(np.int64), scales


def pack_linear(
    name: str,
    codes: Codes,
    scales: npt.NDArray[np.float32],
    group_size: int,
    layout: str = "gptq",
    zero: int = 8,
) -> dict[str, torch.Tensor]:
    """The tensors of one linear."""
    num_out, num_in = codes.shape
    zeros = np.full((num_in // group_size, num_out), zero - (layout == "gptq"))
    return {
        f"{name}.qweight": words_of(codes.T.reshape(num_in // 8, 8, num_out), 1),
        f"{name}.qzeros": words_of(zeros.reshape(len(zeros), num_out // 8, 8), 2),
        f"{name}.scales": torch.from_numpy(scales.T.copy()).half(),
        f"{name}.g_idx": torch.arange(num_in, dtype=torch.int32) // group_size,
    }


def words_of(codes: Codes, axis: int) -> torch.Tensor:
    """Eight codes along an axis to one int32, the first in the lowest bits."""
    shifts = np.arange(0, 32, 4).reshape([8 if i == axis else 1 for i in range(codes.ndim)])
    words = (codes.astype(np.uint64) << shifts.astype(np.uint64)).sum(axis=axis)
    return torch.from_numpy(np.ascontiguousarray(words.astype(np.uint32)).view(np.int32))
