"""A linear of the resident base: stacked matrices in the format that runs fastest."""

from dataclasses import dataclass

import torch

from server.kernels.dense_linear import DenseWeight, dense_linear, pack
from server.quant import nf4


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T for a frozen weight [out, in].

    row_norms_squared  [out] fp32: what DoRA needs to know of the weight, which may be packed away
    """

    weight: DenseWeight
    row_norms_squared: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] -> [num_tokens, out], in the dtype of activations."""
        y = dense_linear(x.to(self.weight.weight.dtype), self.weight)
        return y.to(self.row_norms_squared.dtype)


def make_linear(
    matrices: list[torch.Tensor], quantization: str, dtype: torch.dtype, device: torch.device
) -> Linear:
    """Stack matrices [out_i, in] into one linear, each put on the NF4 grid first if asked to.

    The NF4 values are expanded once to `dtype`: same answers, and on a CPU the packed product is
    faster than bitsandbytes' 4-bit kernel at any number of rows (docs/performance.md).
    """
    if quantization == "nf4":
        matrices = [nf4.quantize(matrix).dequantize(dtype) for matrix in matrices]
    stacked = torch.cat([matrix.to(dtype) for matrix in matrices]).to(device)
    return Linear(pack(stacked), stacked.float().square().sum(dim=1))
