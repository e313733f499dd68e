"""The small Triton ops against `fused`: in bf16 on a GPU, or in fp32 in Triton's interpreter.

The interpreter is chosen before Triton is imported, for a whole process. So where there is no GPU
one test here runs the others in a process of their own.
"""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from server.kernels import fused
from tests.interpreter import INTERPRETED, run_interpreted

HAS_GPU = torch.cuda.is_available()
if INTERPRETED or HAS_GPU:
    from server.kernels import fused_gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # interpreted bf16 arithmetic is wrong
ROUNDING = 2e-6 if INTERPRETED else 2**-7  # one unit in the last place, had it been a tie
CANCELLATION = 1e-5  # of products of about 4, rounded to fp32
SENTINEL = 7.0
MAX_POSITIONS = 96

needs_device = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs an NVIDIA GPU")
SHAPES = [(4, 2, 16), (9, 3, 64), (32, 8, 128), (7, 1, 80)]  # heads, KV heads, head size


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests below run here")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    run_interpreted(__file__)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass
class Case:
    """A step's qkv, two kinds of rotary tables, and a cache that holds SENTINEL."""

    qkv: torch.Tensor
    tables: torch.Tensor  # [2, MAX_POSITIONS, 2, head_dim / 2]
    positions: torch.Tensor
    table_of_token: torch.Tensor
    slots: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def run(self) -> torch.Tensor:
        return fused_gpu.rotate_and_write_gpu(
            self.qkv,
            self.tables,
            self.positions,
            self.table_of_token,
            self.k_cache,
            self.v_cache,
            self.slots,
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of tokens that are not padding: queries; and both caches, from fp32 arithmetic."""
        real = self.slots >= 0
        at = self.table_of_token[real].long(), self.positions[real].long()
        cos, sin = fused.cos_and_sin(self.tables[at], torch.float32)
        k_cache = torch.full_like(self.k_cache, SENTINEL, dtype=torch.float32)
        v_cache = torch.full_like(self.v_cache, SENTINEL, dtype=torch.float32)
        qkv, slots = self.qkv[real].float(), self.slots[real].long()
        q = fused.rotate_and_write(qkv, cos, sin, k_cache, v_cache, slots)
        return q.to(DTYPE), k_cache.to(DTYPE), v_cache.to(DTYPE)


def make_case(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, seed: int = 0
) -> Case:
    """Every third token is padding, whose position and table are out of range."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.arange(0, head_dim, 2) / head_dim
    tables = torch.stack(
        [
            fused.rotary_rows(theta**-exponents, MAX_POSITIONS, factor)
            for theta, factor in ((10000.0, 1.0), (300.0, 1.25))
        ]
    )
    is_padding = torch.arange(num_tokens) % 3 == 2
    positions = torch.randint(MAX_POSITIONS, (num_tokens,), generator=generator)
    table_of_token = torch.randint(2, (num_tokens,), generator=generator)
    block_size = 4
    num_blocks = num_tokens // block_size + 3
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    cache = torch.full(
        (2, num_blocks, block_size, num_kv_heads, head_dim), SENTINEL, dtype=DTYPE, device=DEVICE
    )
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    wide = randn(num_tokens, columns + 16, seed=seed)
    return Case(
        wide[:, :columns],  # rows lie apart
        tables.to(DEVICE),
        positions.masked_fill(is_padding, 10**9).int().to(DEVICE),
        table_of_token.masked_fill(is_padding, 10**6).int().to(DEVICE),
        slots.masked_fill(is_padding, -1).int().to(DEVICE),
        *cache,
    )


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=CANCELLATION)


@pytest.mark.gpu
@needs_device
class TestRotateAndWrite:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("num_tokens", [1, 5, 12])
    def test_it_agrees_with_the_reference(
        self, num_tokens: int, shape: tuple[int, int, int]
    ) -> None:
        case = make_case(num_tokens, *shape)
        q = case.run()
        assert q.shape == (num_tokens, shape[0], shape[2])
        expected, k_cache, v_cache = case.expected()
        assert_rounded(q[case.slots >= 0], expected)
        assert_rounded(case.k_cache, k_cache)
        assert torch.equal(case.v_cache, v_cache)

    def test_padding_writes_nothing(self) -> None:
        case = make_case(3, 4, 2, 16)
        case.slots[:] = -1
        case.positions[:] = 10**9
        case.run()
        assert (case.k_cache == SENTINEL).all()
        assert (case.v_cache == SENTINEL).all()

    def test_each_token_has_its_own_table(self) -> None:
        case = make_case(2, 4, 2, 16)
        case.qkv = case.qkv[:1].expand(2, -1)
        case.positions[:] = 50
        case.table_of_token[:] = int32(0, 1)
        rows = case.run()
        case.table_of_token[:] = 1
        assert torch.equal(case.run()[1], rows[1])
        assert not torch.equal(rows[0], rows[1])

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreting
    def test_what_enters_the_cache_is_bounded(self) -> None:
        case = make_case(1, 4, 2, 16)
        wild = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -40000.0, 2.0**15, 3.0, 0.0])
        case.qkv = case.qkv.clone()
        case.qkv[0, -32:-24] = wild  # the first value head
        case.qkv[0, -64:-56] = wild  # the first key head
        case.positions[0] = 0  # cosine 1, sine 0
        case.run()
        _, k_cache, _ = case.expected()
        bound = 2.0**15
        expected = [0.0, bound, -bound, bound, -bound, bound, 3.0, 0.0]
        slot = int(case.slots[0])
        assert case.v_cache.view(-1, 2, 16)[slot, 0, :8].tolist() == expected
        assert torch.equal(case.k_cache, k_cache)

    def test_queries_are_not_bounded(self) -> None:
        case = make_case(1, 4, 2, 16)
        case.qkv = case.qkv.clone()
        case.qkv[0, 0], case.positions[0], case.table_of_token[0] = 2.0**20, 0, 0
        assert case.run()[0, 0, 0] == 2.0**20

    def test_no_tokens_are_no_work(self) -> None:
        case = make_case(3, 4, 2, 16)
        case.qkv = case.qkv[:0]
        assert case.run().shape == (0, 4, 16)


@pytest.mark.gpu
@needs_device
class TestRmsNorm:
    @pytest.mark.parametrize("hidden", [16, 576, 4096, 4100])
    @pytest.mark.parametrize("num_tokens", [0, 1, 7])
    def test_it_agrees_with_the_reference(self, num_tokens: int, hidden: int) -> None:
        x = randn(num_tokens, hidden + 8)[:, :hidden] * 30  # rows lie apart
        weight = randn(hidden, seed=1)
        y = fused_gpu.rms_norm_gpu(x, weight, 1e-5)
        expected = fused.rms_norm(x.float(), weight.float(), 1e-5).to(DTYPE)
        assert_rounded(y, expected)

    def test_eps_keeps_small_rows_small(self) -> None:
        x = torch.zeros(2, 64, dtype=DTYPE, device=DEVICE)
        x[1] = 1e-4
        y = fused_gpu.rms_norm_gpu(x, torch.ones(64, dtype=DTYPE, device=DEVICE), 1e-2)
        assert (y[0] == 0).all()
        torch.testing.assert_close(y[1], x[1] * 10, rtol=1e-2, atol=0.0)


@pytest.mark.gpu
@needs_device
class TestEmbed:
    @pytest.mark.parametrize("hidden", [64, 576, 4100])
    @pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
    def test_it_looks_up_and_begins_the_norm(self, hidden: int, id_dtype: torch.dtype) -> None:
        embedding, weight = randn(11, hidden), randn(hidden, seed=1)
        token_ids = torch.tensor([10, 0, 3, 3], dtype=id_dtype, device=DEVICE)
        x, scaled, squares = fused_gpu.embed_gpu(token_ids, embedding, weight)
        assert torch.equal(x, embedding[token_ids.long()])
        assert torch.equal(scaled, (x.float() * weight.float()).to(DTYPE))
        expected = x.float().square().sum(dim=1, keepdim=True)
        torch.testing.assert_close(squares, expected, rtol=1e-5, atol=0.0)

    def test_no_tokens_are_no_work(self) -> None:
        x, scaled, squares = fused_gpu.embed_gpu(int32(), randn(11, 64), randn(64))
        assert x.shape == scaled.shape == (0, 64)
        assert squares.shape == (0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="needs an NVIDIA GPU")
def test_a_replayed_graph_follows_its_buffers() -> None:
    case = make_case(9, 9, 3, 64)
    weight = randn(case.qkv.shape[1], seed=1)
    case.qkv = case.qkv.contiguous()
    case.run()
    fused_gpu.rms_norm_gpu(case.qkv, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = case.run()
        normed = fused_gpu.rms_norm_gpu(case.qkv, weight, 1e-5)
    for seed in range(1, 4):
        other = make_case(9, 9, 3, 64, seed)
        other.slots[9 - seed :] = -1  # a shorter step
        for name in ("qkv", "positions", "table_of_token", "slots"):
            getattr(case, name).copy_(getattr(other, name))
        case.k_cache.fill_(SENTINEL)
        case.v_cache.fill_(SENTINEL)
        graph.replay()
        assert torch.equal(q, other.run())
        assert torch.equal(case.k_cache, other.k_cache)
        assert torch.equal(case.v_cache, other.v_cache)
        assert torch.equal(normed, fused_gpu.rms_norm_gpu(case.qkv, weight, 1e-5))
