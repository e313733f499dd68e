"""The Triton kernels against `ops`: on a GPU in bf16, or in fp32 in Triton's interpreter.

The interpreter is chosen before Triton is imported, for a whole process. So where there is no GPU
one test here runs the others in a process of their own.
"""

import importlib.util
from typing import Any

import pytest
import torch

from server.quant import nf4
from tests.interpreter import INTERPRETED, run_interpreted
from training.fast import ops

HAS_GPU = torch.cuda.is_available()
if INTERPRETED or HAS_GPU:
    from training.fast import kernels

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # interpreted bf16 arithmetic is wrong
TOLERANCE = 1e-5 if INTERPRETED else 2**-7  # a last place of the larger of two roundings
SENTINEL = 7.0
EPS = 1e-5

needs_device = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs an NVIDIA GPU")


def on_a_device(test: Any) -> Any:
    """For a GPU, or for the interpreter."""
    return needs_device(test if INTERPRETED else pytest.mark.gpu(test))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)


def wide(rows: int, columns: int, room: int = 5) -> torch.Tensor:
    """Memory with room beside each row, poisoned."""
    return torch.full((rows, columns + room), SENTINEL, dtype=DTYPE, device=DEVICE)


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@on_a_device
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (3, 576)])
def test_norm_and_its_gradient(num_tokens: int, hidden: int) -> None:
    x, weight = randn(num_tokens, hidden), randn(hidden, seed=1)
    dy, residual = randn(num_tokens, hidden, seed=2), randn(num_tokens, hidden, seed=3)
    ours, theirs = wide(num_tokens, hidden), wide(num_tokens, hidden)
    kernels.rms_norm(x, weight, EPS, ours[:, :hidden])
    ops.rms_norm(x, weight, EPS, theirs[:, :hidden])
    agree(ours, theirs)
    kernels.rms_norm_backward(dy, x, weight, EPS, residual, ours[:, :hidden])
    ops.rms_norm_backward(dy, x, weight, EPS, residual, theirs[:, :hidden])
    agree(ours, theirs)


@on_a_device
@pytest.mark.parametrize(("num_heads", "head_size"), [(9, 16), (3, 80)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotation_into_other_memory_and_in_place(
    num_heads: int, head_size: int, sign: float
) -> None:
    angles = torch.rand(4, head_size // 2, generator=torch.Generator().manual_seed(5)) * 6
    cos, sin = (f(angles).repeat(1, 2).to(DEVICE) for f in (torch.cos, torch.sin))
    size = num_heads * head_size
    x = randn(4, size)
    ours, theirs = wide(4, size), wide(4, size)
    kernels.rotate(x, cos, sin, sign, ours[:, :size])
    ops.rotate(x, cos, sin, sign, theirs[:, :size])
    agree(ours, theirs)
    assert not torch.equal(ours[:, :size], x)
    kernels.rotate(x, cos, sin, sign, x)
    assert torch.equal(x, ours[:, :size])


@on_a_device
@pytest.mark.parametrize("size", [64, 2112])
def test_gate_and_its_gradient(size: int) -> None:
    gate_up, out, expected = randn(3, 2 * size + 4), wide(3, size), wide(3, size)
    kernels.gate(gate_up[:, : 2 * size], out[:, :size])
    ops.gate(gate_up[:, : 2 * size], expected[:, :size])
    agree(out, expected)
    out[:, :size] = randn(3, size, seed=6)
    expected.copy_(out)
    theirs = gate_up.clone()
    kernels.gate_backward(gate_up[:, : 2 * size], out[:, :size])
    ops.gate_backward(theirs[:, : 2 * size], expected[:, :size])
    agree(out, expected)
    agree(gate_up, theirs)


@on_a_device
@pytest.mark.parametrize(
    ("out_features", "in_features", "rank"), [(3, 64, 16), (5, 576, 0), (2, 1088, 3), (13, 320, 16)]
)
def test_a_linear_and_its_lora_are_written_where_they_belong(
    out_features: int, in_features: int, rank: int
) -> None:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    quantized = nf4.quantize(weight.to(DEVICE))
    lora = None
    if rank:
        lora = (randn(rank, in_features).float(), randn(out_features, rank, seed=1).float(), 0.5)
    ours = wide(out_features + 24, in_features, 20)
    theirs = ours.clone()
    places = {"first_row": 2, "first_a_row": out_features + 3, "first_b_column": 1}
    kernels.fill(quantized, lora, ours, **places, num_a_rows=18)
    ops.fill(quantized, lora, theirs, **places, num_a_rows=18)
    assert torch.equal(ours[: out_features + 3], theirs[: out_features + 3])
    a_rows = slice(out_features + 3, out_features + 21)
    assert torch.equal(ours[a_rows, :in_features], theirs[a_rows, :in_features])
    assert (ours[out_features + 21 :] == SENTINEL).all()
    assert (ours[:2] == SENTINEL).all()


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests above run here")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    run_interpreted(__file__)
