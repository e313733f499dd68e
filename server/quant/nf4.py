"""NF4, double quantized (QLoRA, arXiv:2305.14314): bitsandbytes makes it, we own the layout."""

import logging
from dataclasses import dataclass

import torch

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional hub kernel
from bitsandbytes.functional import quantize_4bit  # noqa: E402  # after its logger is quiet

GROUP_SIZE = 64  # weights that share one absmax


@dataclass(frozen=True, slots=True)
class NF4Tensor:
    """One matrix [out, in] on the NF4 grid, its absmax quantized to 8 bits in turn.

    qweight        [out, in / 2]        uint8: two codes a byte, the first weight in the high nibble
    absmax_codes   [out * in / 64]      uint8 index into absmax_levels
    absmax_scales  [ceil(len / 256)]    fp32, one for each 256 absmax_codes
    absmax_levels  [256]                fp32
    absmax_offset  []                   fp32
    levels         [16]                 fp32: the NF4 grid
    """

    qweight: torch.Tensor
    absmax_codes: torch.Tensor
    absmax_scales: torch.Tensor
    absmax_levels: torch.Tensor
    absmax_offset: torch.Tensor
    levels: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        return self.qweight.shape[0], 2 * self.qweight.shape[1]

    def absmax(self) -> torch.Tensor:
        """The scale of every 64 weights: [out, in / 64] fp32."""
        out_features, in_features = self.shape
        coarse = self.absmax_scales.repeat_interleave(256)[: self.absmax_codes.numel()]
        absmax = self.absmax_levels[self.absmax_codes.long()] * coarse + self.absmax_offset
        return absmax.view(out_features, in_features // GROUP_SIZE)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix as the adapters were trained on it: [out, in], rounded once to `dtype`."""
        out_features, in_features = self.shape
        codes = torch.stack((self.qweight >> 4, self.qweight & 15), dim=-1)
        values = self.levels[codes.view(out_features, -1, GROUP_SIZE).int()]
        values *= self.absmax().unsqueeze(-1)
        return values.view(out_features, in_features).to(dtype)


def quantize(weight: torch.Tensor) -> NF4Tensor:
    """Put one matrix [out, in] on the NF4 grid; ValueError where `in` is not a multiple of 64.

    Matrices that will be stacked (q, k, v) are quantized one by one: the nested absmax shares
    statistics across a whole matrix, so stacking first would change the values.
    """
    out_features, in_features = weight.shape
    if in_features % GROUP_SIZE:
        raise ValueError(
            f"NF4 needs input features in multiples of {GROUP_SIZE}, not {in_features}"
        )
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=GROUP_SIZE, compress_statistics=True, quant_type="nf4"
    )
    return NF4Tensor(
        qweight=packed.view(out_features, in_features // 2),
        absmax_codes=state.absmax,
        absmax_scales=state.state2.absmax,
        absmax_levels=state.state2.code,
        absmax_offset=state.offset,
        levels=state.code,
    )
