"""Dense linear without a GPU: weights packed once into the CPU's own matrix layout."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_TYPICAL_ROWS = 64  # what oneDNN packs for; the layout it picks serves every other number of rows


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight [out, in], in oneDNN's opaque layout where `is_packed`."""

    weight: torch.Tensor
    is_packed: bool


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing pays: bf16 on a CPU that multiplies bf16 (AVX512-BF16 or AMX)."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: torch.Tensor) -> DenseWeight:
    """Lay out a weight [out, in] for `dense_linear`; the original may be freed after."""
    if not can_pack(weight.dtype, weight.device):
        return DenseWeight(weight, is_packed=False)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
    return DenseWeight(packed, is_packed=True)


def dense_linear(x: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    """Multiply each row by the weight's transpose.

    x        [num_tokens, in]     the dtype of the weight
    returns  [num_tokens, out]
    """
    if not weight.is_packed:
        return F.linear(x, weight.weight)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, None, "none", [], "")
    return y
