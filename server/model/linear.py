"""A linear of the resident base: stacked matrices in the format that runs fastest."""

from dataclasses import dataclass

import torch

from server.kernels import nf4_linear, nf4_pack
from server.kernels.dense_linear import DenseWeight, dense_linear, pack
from server.quant import nf4
from server.quant.int4 import Int4Tensor

Matrix = torch.Tensor | Int4Tensor  # as a checkpoint has it: [out, in], 16 bits or GPTQ's codes


def activation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What runs between the linears of weights in `dtype`: on a CPU fp32, as do adapters.

    A product in bf16 there has an overhead that LoRA's small ones cannot bear, and casts between
    each linear and its LoRA would cost as much again (docs/performance.md).
    """
    return torch.float32 if device.type == "cpu" else dtype


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T for a frozen weight [out, in].

    activations        dtype of the result
    row_norms_squared  [out] fp32: what DoRA needs to know of the weight, which may be packed away
    """

    weight: DenseWeight
    activations: torch.dtype
    row_norms_squared: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out], in the dtype of activations."""
        y = dense_linear(x.to(self.weight.weight.dtype), self.weight)
        return y.to(self.activations)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The same over 4-bit weights, in the layout of the GPU's kernel.

    out_splits         output features of each stacked matrix
    row_norms_squared  [out] fp32, as in Linear
    """

    weight: nf4_pack.PackedWeight
    out_splits: tuple[int, ...]
    row_norms_squared: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] bf16 -> [num_tokens, out] bf16."""
        return nf4_linear.nf4_linear(x, self.weight)


def make_packed_linear(matrices: list[Matrix], device: torch.device) -> PackedLinear:
    """Stack matrices [out_i, in], one by one on the device; those of 16 bits go on the NF4 grid.

    They are all of one kind.
    """
    codes, scales, norms = [], [], []
    format = nf4_pack.NF4
    for matrix in matrices:
        if isinstance(matrix, Int4Tensor):
            format = nf4_pack.INT4[matrix.group_size]
            codes.append(matrix.qweight.to(device))
            scales.append(matrix.scales.to(device))
            norms.append(matrix.row_norms_squared().to(device))
        else:
            quantized = nf4.quantize(matrix.to(device))
            codes.append(quantized.qweight)
            scales.append(quantized.absmax())
            norms.append(quantized.dequantize(torch.float32).square_().sum(dim=1))
    weight = nf4_pack.pack(torch.cat(codes), torch.cat(scales), format)
    return PackedLinear(weight, tuple(m.shape[0] for m in matrices), torch.cat(norms))


def make_linear(
    matrices: list[Matrix], quantization: str, dtype: torch.dtype, device: torch.device
) -> Linear:
    """Stack matrices [out_i, in] into one linear, each put on the NF4 grid first if asked to.

    Values of 4 bits are expanded once to `dtype`: same answers, and on a CPU the packed product is
    faster than bitsandbytes' 4-bit kernel at any number of rows (docs/performance.md).
    """
    stacked = torch.cat([_expanded(matrix, quantization, dtype) for matrix in matrices]).to(device)
    norms = stacked.float().square().sum(dim=1)
    return Linear(pack(stacked), activation_dtype(dtype, device), norms)


def _expanded(matrix: Matrix, quantization: str, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(matrix, Int4Tensor):
        return matrix.dequantize(dtype)
    return nf4.quantize(matrix).dequantize(dtype) if quantization == "nf4" else matrix.to(dtype)
