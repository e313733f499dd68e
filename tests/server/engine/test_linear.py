"""The reference's linears: what goes in, and in which dtype it comes out."""

import pytest
import torch

from server.kernels.dense_linear import pack
from server.model.linear import Linear, activation_dtype, make_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_activations_are_fp32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    linear = make_linear([torch.randn(8, 64), torch.randn(4, 64)], "none", dtype, CPU)
    y = linear(torch.randn(3, 64))
    assert (y.shape, y.dtype) == ((3, 12), torch.float32)
    assert linear.row_norms_squared.dtype == torch.float32


def test_on_a_gpu_activations_have_the_dtype_of_the_weights() -> None:
    assert activation_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    weight = torch.randn(8, 64).bfloat16()
    linear = Linear(pack(weight), torch.bfloat16, weight.float().square().sum(dim=1))
    assert linear(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16


def test_stacked_matrices_are_each_put_on_a_grid_of_their_own() -> None:
    small, large = torch.randn(64, 64) * 1e-3, torch.randn(64, 64)
    stacked = make_linear([small, large], "nf4", torch.float32, CPU)
    alone = make_linear([small], "nf4", torch.float32, CPU)
    x = torch.randn(5, 64)
    torch.testing.assert_close(stacked(x)[:, :64], alone(x))
