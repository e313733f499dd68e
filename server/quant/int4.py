"""GPTQ checkpoints of 4 bits: the layout that auto-gptq defined and GPTQModel writes, in PyTorch.

A quantized linear is `<name>.qweight` and its scales, zero points and group indices beside it. Read
are symmetric codes in groups of neighbouring inputs; whatever else the layout can say is refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GROUP_SIZES = (32, 64, 128)  # weights along the inputs that share a scale
ZERO_CODE = 8  # the code that stands for 0
_CODES_PER_WORD = 8
_ROWS_AT_A_TIME = 1024  # of a matrix in fp32
_LAYOUTS = {"gptq": 1, "gptq_v2": 0}  # what they take off a zero point before it is stored


@dataclass(frozen=True, slots=True)
class GPTQFormat:
    """How all quantized linears of a checkpoint are stored.

    zero_offset  what was taken off each zero point: 1, or 0 in gptq_v2
    """

    group_size: int
    zero_offset: int = 1


@dataclass(frozen=True, slots=True)
class Int4Tensor:
    """One matrix [out, in]: weight = (code - 8) * scale.

    qweight  [out, in / 2]           uint8: two codes a byte, the first weight in the high nibble
    scales   [out, in / group_size]  fp32
    """

    qweight: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        return self.qweight.shape[0], 2 * self.qweight.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [out, in], each weight rounded once to `dtype`."""
        matrix = torch.empty(self.shape, dtype=dtype, device=self.qweight.device)
        for first in range(0, len(matrix), _ROWS_AT_A_TIME):
            rows = slice(first, first + _ROWS_AT_A_TIME)
            matrix[rows] = self._values(rows).to(dtype)
        return matrix

    def row_norms_squared(self) -> torch.Tensor:
        """[out] fp32."""
        starts = range(0, self.shape[0], _ROWS_AT_A_TIME)
        parts = [
            self._values(slice(at, at + _ROWS_AT_A_TIME)).square_().sum(dim=1) for at in starts
        ]
        return torch.cat(parts)

    def _values(self, rows: slice) -> torch.Tensor:
        qweight, scales = self.qweight[rows], self.scales[rows]
        codes = torch.stack((qweight >> 4, qweight & 15), dim=-1)
        values = codes.view(*scales.shape, self.group_size).float().sub_(ZERO_CODE)
        return values.mul_(scales.unsqueeze(-1)).view(len(qweight), -1)


def read_format(folder: Path) -> GPTQFormat | None:
    """What a checkpoint folder says about itself; None: it is not quantized.

    ValueError names what of it we do not read.
    """
    settings = _settings(folder)
    if settings is None:
        return None

    def check(is_read: bool, found: str, wanted: str) -> None:
        if not is_read:
            raise ValueError(f"{folder}: the checkpoint is quantized {found}; we read {wanted}")

    method = settings.get("quant_method", "gptq")
    check(method == "gptq", f"with {method}", "GPTQ checkpoints")
    bits = settings.get("bits")
    check(bits == 4, f"to {bits} bits", "4 bits")
    group_size = settings.get("group_size")
    sizes = ", ".join(map(str, GROUP_SIZES))
    check(group_size in GROUP_SIZES, f"in groups of {group_size}", f"groups of {sizes}")
    check(settings.get("sym", True), "asymmetrically (sym false)", "sym true")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    check(layout in _LAYOUTS, f"in the layout {layout!r}", "gptq and gptq_v2")
    pack_dtype = settings.get("pack_dtype", "int32")
    check(pack_dtype == "int32", f"in words of {pack_dtype}", "int32")
    check(not settings.get("lm_head"), "with its lm_head", "a lm_head of 16 bits")
    check(not settings.get("dynamic"), "layer by layer (dynamic)", "the same for all layers")
    return GPTQFormat(int(settings["group_size"]), _LAYOUTS[layout])


def read_linear(
    name: str,
    format: GPTQFormat,
    read: Callable[[str], torch.Tensor | None],
    device: torch.device,
) -> Int4Tensor:
    """One linear, unpacked on the device.

    name  without `.qweight`
    read  looks up a tensor of the checkpoint by its full name; None: there is none
          .qweight  [in / 8, out] int32: eight inputs a word, the first in the lowest bits
          .scales   [groups, out]
          .qzeros   [groups, out / 8] int32
          .g_idx    [in] int32: each input's group; may be missing

    ValueError says what of it cannot be served exactly.
    """
    qweight, scales, qzeros = (_part(name, part, read, device) for part in _PARTS)
    words, out_features = qweight.shape
    in_features, group_size = words * _CODES_PER_WORD, format.group_size
    shapes = {
        "scales": (in_features // group_size, out_features),
        "qzeros": (in_features // group_size, out_features // _CODES_PER_WORD),
    }
    for part, tensor in (("scales", scales), ("qzeros", qzeros)):
        if in_features % group_size or tuple(tensor.shape) != shapes[part]:
            raise ValueError(
                f"{name}: {part} {list(tensor.shape)} do not fit codes of {in_features} inputs x "
                f"{out_features} outputs in groups of {group_size}"
            )
    if not scales.isfinite().all():
        raise ValueError(f"{name}: scales are not finite")
    stored_zero = ZERO_CODE - format.zero_offset
    if bool((qzeros.view(torch.uint8) != stored_zero * 0x11).any()):
        raise ValueError(f"{name}: zero points other than 8 (asymmetric codes) are not supported")
    group_of = read(f"{name}.g_idx")
    if group_of is not None and not torch.equal(
        group_of.long(), torch.arange(in_features) // group_size
    ):
        raise ValueError(
            f"{name}: groups of scattered inputs (desc_act) are not supported; quantize without it"
        )
    bias = read(f"{name}.bias")
    if bias is not None and bias.count_nonzero():
        raise ValueError(f"{name}: a bias is not supported")
    codes = qweight.T.contiguous().view(torch.uint8)  # [out, in / 2], the first one low
    return Int4Tensor(codes << 4 | codes >> 4, scales.T.float().contiguous())


_PARTS = ("qweight", "scales", "qzeros")


def _part(
    name: str, part: str, read: Callable[[str], torch.Tensor | None], device: torch.device
) -> torch.Tensor:
    found = read(f"{name}.{part}")
    if found is None:
        raise ValueError(f"tensor {name}.{part} is missing")
    if found.ndim != 2 or (part != "scales" and found.dtype != torch.int32):
        raise ValueError(f"{name}.{part} is {found.dtype} {list(found.shape)}, not what GPTQ has")
    return found.to(device)


def _settings(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of config.json, or what older tools wrote beside it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] | None = config.get("quantization_config")
    own = folder / "quantize_config.json"
    if not found and own.exists():
        found = json.loads(own.read_text(encoding="utf-8"))
    return found or None
