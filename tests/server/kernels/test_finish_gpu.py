"""What `finish` folds into a linear: the norms around it, the rotary embedding, the KV cache.

The sums of a split-K linear are made up here, with NaN in slots that a tile of outputs has not.
`finish` itself, against its formula: test_lora_gpu.py.
"""

import struct
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from server.kernels import fused, lora_gpu, lora_launch, nf4_linear, nf4_pack
from server.kernels.lora_gpu import InputNorm, RotaryStep
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN, PAGE_ROWS, LoraGpuStep
from server.kernels.nf4_pack import TILE_OUT, SplitK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BF16_ROUNDING = 6e-3  # of the result, and of h between the two halves of LoRA
ONE_UNIT = 2**-7  # of a bf16, had it been a tie; rotated, of the larger of two values of about 1
FP32_SUMS = 1e-5  # of squares: no cancellation
SENTINEL = 7.0
EPS = 1e-5
IN_FEATURES = 256
MAX_POSITIONS = 512
PAGES = [[3, 0], [7], [5, 1, 9], [8, 2, 4, 10, 6], [6, 0, 9, 2, 10, 1, 8, 3]]
GAIN_ROWS = [NO_GAIN, 11 * PAGE_ROWS + 3, 11 * PAGE_ROWS, NO_GAIN, NO_GAIN]
NUM_PAGES = 12
SHAPES = [(32, 8, 128), (9, 3, 64), (4, 2, 16), (6, 2, 32), (3, 1, 256)]  # heads, KV heads, head
MIXES = {
    "one": [0] * 9,
    "interleaved": [0, 1, 2, -1, 3, 1, 0, 2, -1, 3, 2, 2] * 3,
    "none": [-1] * 5,
    "single": [2],
    "full": [i % 5 - 1 for i in range(64)],
    "many": [i % 5 - 1 for i in range(200)],
    "ranks": [4, 0, 1, 1, 1, 1, 1, 1] * 4,
    "heavy": [4],
}
NO_STEP = 7  # tokens, where the kernel is told of no step at all


def test_python_packs_what_the_kernels_read() -> None:
    size = struct.calcsize("@" + lora_launch.STEP_PARAMS + lora_launch.EXPAND_PARAMS)
    assert f"static_assert(sizeof(ExpandParams) == {size}," in lora_launch.kernel_source()
    fillers = (lora_launch.NO_INPUT_NORM, lora_launch.NO_OUTPUT_NORM, lora_launch.NO_ROTARY)
    assert [len(filler) for filler in fillers] == [4, 3, 8]


class TestRefusals:
    @pytest.mark.parametrize("head_dim", [8, 80, 512])
    def test_a_head_size_that_has_no_pairing_is_refused(self, head_dim: int) -> None:
        width = head_dim * 2
        cache = torch.empty(2, 4, 2, head_dim, dtype=torch.bfloat16)
        with pytest.raises(AssertionError, match="head size"):
            lora_gpu.finish_rotary(
                torch.empty(1, 3, 3 * width),
                SplitK(1, 3, 3),
                None,
                None,
                (width, width, width),
                None,
                rotary_step=make_rotary_step(3, head_dim, "cpu"),
                k_cache=cache,
                v_cache=cache,
            )

    def test_positions_in_64_bits_are_refused(self) -> None:
        cache = torch.empty(2, 4, 1, 16, dtype=torch.bfloat16)
        rotary_step = make_rotary_step(3, 16, "cpu")
        with pytest.raises(AssertionError, match="int32"):
            lora_gpu.finish_rotary(
                torch.empty(1, 3, 48),
                SplitK(1, 1, 1),
                None,
                None,
                (16, 16, 16),
                None,
                rotary_step=replace(rotary_step, positions=rotary_step.positions.long()),
                k_cache=cache,
                v_cache=cache,
            )

    def test_a_norm_of_another_width_is_refused(self) -> None:
        with pytest.raises(AssertionError, match="over the linear's outputs"):
            lora_gpu.finish_norm(
                torch.empty(1, 3, 64),
                SplitK(1, 1, 1),
                None,
                None,
                (64,),
                None,
                norm_weight=torch.empty(32, dtype=torch.bfloat16),
            )


def make_rotary_step(num_tokens: int, head_dim: int, device: str, seed: int = 0) -> RotaryStep:
    """Two tables; every fifth token is padding, whose position and table are out of range."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.arange(0, head_dim, 2) / head_dim
    rows = [
        fused.rotary_rows(theta**-exponents, MAX_POSITIONS, factor)
        for theta, factor in ((10000.0, 1.0), (300.0, 1.25))
    ]
    is_padding = torch.arange(num_tokens) % 5 == 4
    positions = torch.randint(MAX_POSITIONS, (num_tokens,), generator=generator)
    tables = torch.randint(2, (num_tokens,), generator=generator)
    slots = torch.randperm(_num_slots(num_tokens), generator=generator)[:num_tokens]
    return RotaryStep(
        torch.stack(rows).to(device),
        positions.masked_fill(is_padding, 10**9).int().to(device),
        tables.masked_fill(is_padding, 10**6).int().to(device),
        slots.masked_fill(is_padding, -1).int().to(device),
    )


def _num_slots(num_tokens: int) -> int:
    return (num_tokens // 4 + 3) * 4


def make_caches(num_tokens: int, num_kv_heads: int, head_dim: int) -> list[torch.Tensor]:
    shape = (_num_slots(num_tokens) // 4, 4, num_kv_heads, head_dim)
    return [torch.full(shape, SENTINEL, dtype=torch.bfloat16, device="cuda") for _ in range(2)]


@dataclass(frozen=True)
class Linear:
    """A linear whose sums are still apart, and LoRA over it."""

    workspace: torch.Tensor
    split: SplitK
    x: torch.Tensor  # of LoRA alone
    a_bank: torch.Tensor
    b_bank: torch.Tensor
    out_splits: tuple[int, ...]
    adapters: list[int] | None  # None: no step at all

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    def step(self) -> LoraGpuStep | None:
        if self.adapters is None:
            return None
        step = LoraGpuStep(
            max_tokens=self.num_tokens,
            max_adapters=len(PAGES),
            max_pages=8,
            device=torch.device("cuda"),
        )
        step.fill(self.adapters, PAGES, GAIN_ROWS)
        return step

    def args(self) -> tuple[Any, ...]:
        """What each finish begins with."""
        step = self.step()
        h = None if step is None else lora_gpu.shrink(self.x, self.a_bank, step)
        bank = None if step is None else self.b_bank
        return self.workspace, self.split, h, bank, self.out_splits, step

    def only(self, token: int) -> "Linear":
        """The same for one of the tokens."""
        one = slice(token, token + 1)
        return replace(
            self,
            workspace=self.workspace[:, one].contiguous(),
            x=self.x[one],
            adapters=self.adapters and self.adapters[one],
        )


def make_linear(
    adapters: list[int] | None, out_splits: tuple[int, ...], seed: int = 0, chunks: int = 8
) -> Linear:
    """`chunks` of inputs in each tile of outputs: the more, the more slots."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    num_tokens = NO_STEP if adapters is None else len(adapters)
    out_features = sum(out_splits)
    tiles = -(-out_features // TILE_OUT)
    split = SplitK(chunks, tiles * chunks, min(132, tiles * chunks))
    workspace = randn(split.num_slots, num_tokens, out_features) / split.num_slots**0.5
    for tile in range(tiles):
        first, last = (split._worker(chunk) for chunk in (tile * chunks, (tile + 1) * chunks - 1))
        workspace[last - first + 1 :, :, tile * TILE_OUT : (tile + 1) * TILE_OUT] = torch.nan
    rows = NUM_PAGES * PAGE_ROWS
    return Linear(
        workspace,
        split,
        randn(num_tokens, IN_FEATURES).bfloat16(),
        randn(rows, len(out_splits), IN_FEATURES).bfloat16() * 0.05,
        randn(rows, out_features).bfloat16() * 0.3,
        out_splits,
        adapters,
    )


def qkv_splits(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    heads, kv_heads, head_dim = shape
    return heads * head_dim, kv_heads * head_dim, kv_heads * head_dim


def make_input_norm(num_tokens: int, parts: int = 64, seed: int = 0) -> InputNorm:
    """Rows of very different size."""
    generator = torch.Generator("cuda").manual_seed(seed)
    squares = torch.rand(num_tokens, parts, generator=generator, device="cuda")
    sizes = torch.logspace(1, 4, num_tokens, device="cuda")[:, None]  # scales of 3.6 to 0.1
    return InputNorm(squares * sizes, 64 * parts, EPS)


def row_scales(norm: InputNorm) -> torch.Tensor:
    mean = norm.squares.double().sum(dim=1, keepdim=True) / norm.hidden
    return (mean + norm.eps).rsqrt().float()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def assert_heads_close(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """[rows, heads, head_dim], to one unit of bf16; says which heads and elements are wrong."""
    assert actual.shape == expected.shape
    is_close = torch.isclose(actual.float(), expected.float(), rtol=ONE_UNIT, atol=ONE_UNIT)
    wrong = (~is_close).nonzero()
    summary = {
        kind: sorted(set(wrong[:, axis].tolist()))[:40]
        for axis, kind in enumerate(("rows", "heads", "elements"))
    }
    examples = [
        (place, float(actual[tuple(place)]), float(expected[tuple(place)]))
        for place in wrong[:8].tolist()
    ]
    assert is_close.all(), f"{name}: {len(wrong)} of {actual.numel()} differ: {summary} {examples}"


def rotated_reference(
    qkv: torch.Tensor, rotary_step: RotaryStep, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of the tokens that are not padding, and both caches, SENTINEL where not written."""
    num_tokens = qkv.shape[0]
    slots = rotary_step.slot_mapping[:num_tokens]
    real = slots >= 0
    tables, positions = rotary_step.tables[:num_tokens], rotary_step.positions[:num_tokens]
    rows = rotary_step.rotary[tables[real].long(), positions[real].long()]  # [tokens, 2, half]
    cos = torch.cat((rows[:, :1], rows[:, :1]), dim=-1)
    sin = torch.cat((-rows[:, 1:], rows[:, 1:]), dim=-1)
    k_cache, v_cache = (cache.float() for cache in make_caches(num_tokens, *shape[1:]))
    q = fused.rotate_and_write(qkv[real].float(), cos, sin, k_cache, v_cache, slots[real].long())
    return q.bfloat16(), k_cache.bfloat16(), v_cache.bfloat16()


@pytest.mark.gpu
@needs_gpu
class TestFinishRotary:
    @pytest.mark.parametrize("mix", [*MIXES, None])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("with_norm", [False, True])
    def test_it_is_finish_then_rotate_then_write(
        self, with_norm: bool, shape: tuple[int, int, int], mix: str | None
    ) -> None:
        linear = make_linear(MIXES[mix] if mix else None, qkv_splits(shape))
        num_tokens, head_dim = linear.num_tokens, shape[2]
        norm = make_input_norm(num_tokens) if with_norm else None
        rotary_step = make_rotary_step(num_tokens + 3, head_dim, "cuda")  # buffers may be longer
        k_cache, v_cache = make_caches(num_tokens + 3, *shape[1:])
        q = lora_gpu.finish_rotary(
            *linear.args(),
            rotary_step=rotary_step,
            k_cache=k_cache,
            v_cache=v_cache,
            input_norm=norm,
        )
        qkv = lora_gpu.finish(*linear.args(), input_norm=norm)
        rotary_step.slot_mapping[num_tokens:] = -1
        padded = torch.cat((qkv, qkv.new_zeros(3, qkv.shape[1])))
        expected, k_expected, v_expected = rotated_reference(padded, rotary_step, shape)
        real = rotary_step.slot_mapping[:num_tokens] >= 0
        assert_heads_close("values", v_cache.flatten(0, 1), v_expected.flatten(0, 1))
        assert_heads_close("keys", k_cache.flatten(0, 1), k_expected.flatten(0, 1))
        assert_heads_close("queries", q[real], expected)

    @pytest.mark.parametrize("chunks", [1, 3, 32, 112])
    def test_it_adds_as_many_slots_as_there_are(self, chunks: int) -> None:
        shape = (9, 3, 64)
        linear = make_linear(MIXES["interleaved"], qkv_splits(shape), chunks=chunks)
        rotary_step = make_rotary_step(linear.num_tokens, 64, "cuda")
        caches = make_caches(linear.num_tokens, 3, 64)
        lora_gpu.finish_rotary(
            *linear.args(), rotary_step=rotary_step, k_cache=caches[0], v_cache=caches[1]
        )
        qkv = lora_gpu.finish(*linear.args())
        _, k_expected, v_expected = rotated_reference(qkv, rotary_step, shape)
        assert_heads_close("values", caches[1].flatten(0, 1), v_expected.flatten(0, 1))
        assert_heads_close("keys", caches[0].flatten(0, 1), k_expected.flatten(0, 1))

    def test_what_enters_the_cache_is_bounded(self) -> None:
        linear = make_linear(None, (64, 32, 32))
        wild = [torch.nan, torch.inf, -torch.inf, 1e30, -40000.0, 2.0**15, 3.0, 0.0]
        linear.workspace[1:] = 0
        linear.workspace[0, 0, 64:72] = linear.workspace[0, 0, 96:104] = torch.tensor(wild).cuda()
        linear.workspace[0, 0, 0] = 2.0**20
        rotary_step = make_rotary_step(NO_STEP, 16, "cuda")
        rotary_step.positions[0] = rotary_step.tables[0] = 0  # cosine 1, sine 0
        k_cache, v_cache = make_caches(NO_STEP, 2, 16)
        q = lora_gpu.finish_rotary(
            *linear.args(), rotary_step=rotary_step, k_cache=k_cache, v_cache=v_cache
        )
        bound = 2.0**15
        slot = int(rotary_step.slot_mapping[0])
        values = v_cache.flatten(0, 1)[slot, 0, :8].tolist()
        assert values == [0.0, bound, -bound, bound, -bound, bound, 3.0, 0.0]
        keys = k_cache.flatten(0, 1)[slot, 0, :8].tolist()
        assert keys == values
        assert k_cache.isfinite().all()
        assert v_cache.isfinite().all()
        assert q[0, 0, 0] == 2.0**20

    def test_a_token_has_the_same_bits_whatever_stands_beside_it(self) -> None:
        shape = (9, 3, 64)
        linear = make_linear(MIXES["full"], qkv_splits(shape))
        norm = make_input_norm(64)
        rotary_step = make_rotary_step(64, 64, "cuda")
        together, alone = make_caches(64, 3, 64), make_caches(64, 3, 64)
        q = lora_gpu.finish_rotary(
            *linear.args(),
            rotary_step=rotary_step,
            k_cache=together[0],
            v_cache=together[1],
            input_norm=norm,
        )
        for token in range(64):
            one = slice(token, token + 1)
            own = RotaryStep(
                rotary_step.rotary,
                rotary_step.positions[one],
                rotary_step.tables[one],
                rotary_step.slot_mapping[one],
            )
            own_q = lora_gpu.finish_rotary(
                *linear.only(token).args(),
                rotary_step=own,
                k_cache=alone[0],
                v_cache=alone[1],
                input_norm=replace(norm, squares=norm.squares[one]),
            )
            assert torch.equal(own_q[0], q[token]), f"token {token}"
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])

    def test_a_replayed_graph_follows_its_buffers(self) -> None:
        shape, mix = (9, 3, 64), MIXES["full"]
        linear = make_linear(mix, qkv_splits(shape))
        norm = make_input_norm(64)
        rotary_step = make_rotary_step(64, 64, "cuda")
        k_cache, v_cache = make_caches(64, 3, 64)
        step = linear.step()
        assert step is not None

        def launch(
            source: Linear, at: RotaryStep, before: InputNorm, caches: list[torch.Tensor]
        ) -> torch.Tensor:
            h = lora_gpu.shrink(source.x, linear.a_bank, step)
            return lora_gpu.finish_rotary(
                source.workspace,
                linear.split,
                h,
                linear.b_bank,
                qkv_splits(shape),
                step,
                rotary_step=at,
                k_cache=caches[0],
                v_cache=caches[1],
                input_norm=before,
            )

        launch(linear, rotary_step, norm, [k_cache, v_cache])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            q = launch(linear, rotary_step, norm, [k_cache, v_cache])
        shorter = [3, 1] + [NO_ADAPTER] * 62
        for seed, adapters in enumerate((shorter, mix[::-1], [2] * 64), start=1):
            other = make_linear(adapters, qkv_splits(shape), seed)
            other_norm = make_input_norm(64, seed=seed)
            other_step = make_rotary_step(64, 64, "cuda", seed)
            if adapters is shorter:
                other_step.slot_mapping[2:] = -1
            step.fill(adapters, PAGES, GAIN_ROWS)
            linear.workspace.copy_(other.workspace)
            linear.x.copy_(other.x)
            norm.squares.copy_(other_norm.squares)
            for name in ("positions", "tables", "slot_mapping"):
                getattr(rotary_step, name).copy_(getattr(other_step, name))
            k_cache.fill_(SENTINEL)
            v_cache.fill_(SENTINEL)
            graph.replay()
            expected = make_caches(64, 3, 64)
            assert torch.equal(q, launch(other, other_step, other_norm, expected))
            assert torch.equal(k_cache, expected[0])
            assert torch.equal(v_cache, expected[1])


@pytest.mark.gpu
@needs_gpu
class TestDealing:
    @pytest.mark.parametrize("hidden", [64, 576, 4096])
    @pytest.mark.parametrize("with_silu", [False, True])
    def test_a_token_has_the_same_bits_however_the_work_is_dealt(
        self, with_silu: bool, hidden: int
    ) -> None:
        adapters = [*MIXES["ranks"], -1, -1, 2, 3, 3]
        linear = make_linear(adapters, (hidden, hidden))
        together = lora_gpu.finish(*linear.args(), with_silu=with_silu)
        for tokens in (slice(1), slice(1, 2), slice(2, 9), slice(30, None), slice(8, 30, 3)):
            some = replace(
                linear,
                workspace=linear.workspace[:, tokens].contiguous(),
                x=linear.x[tokens],
                adapters=adapters[tokens],
            )
            result = lora_gpu.finish(*some.args(), with_silu=with_silu)
            assert torch.equal(result, together[tokens]), f"{tokens}"

    @pytest.mark.parametrize("num_multiprocessors", [1, 3, 50, 132])
    def test_any_number_of_warps_does_all_of_it(
        self, num_multiprocessors: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        linear = make_linear([*MIXES["ranks"], -1, 3], (320, 320))
        expected = lora_gpu.finish(*linear.args())
        kernels = lora_launch.kernels_of(linear.workspace.device)
        monkeypatch.setattr(kernels, "num_multiprocessors", num_multiprocessors)
        assert torch.equal(lora_gpu.finish(*linear.args()), expected)


@pytest.mark.gpu
@needs_gpu
class TestFinishNorm:
    @pytest.mark.parametrize("mix", [*MIXES, None])
    @pytest.mark.parametrize("hidden", [64, 576, 1000, 4096])
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_it_is_finish_and_the_next_norm_undivided(
        self, with_residual: bool, hidden: int, mix: str | None
    ) -> None:
        linear = make_linear(MIXES[mix] if mix else None, (hidden,))
        weight = torch.randn(hidden, device="cuda").bfloat16()
        residual = torch.randn(linear.num_tokens, hidden, device="cuda").bfloat16() * 3
        added = residual if with_residual else None
        y, scaled, squares = lora_gpu.finish_norm(
            *linear.args(), norm_weight=weight, residual=added
        )
        expected = lora_gpu.finish(*linear.args(), residual=added)
        torch.testing.assert_close(y, expected, rtol=ONE_UNIT, atol=1e-5)
        assert torch.equal(scaled, (y.float() * weight.float()).bfloat16())
        parts = torch.nn.functional.pad(y.float(), (0, -hidden % 64)).unflatten(1, (-1, 64))
        torch.testing.assert_close(squares, parts.square().sum(dim=2), rtol=FP32_SUMS, atol=0.0)

    def test_a_token_has_the_same_bits_whatever_stands_beside_it(self) -> None:
        linear = make_linear(MIXES["full"], (576,))
        weight = torch.randn(576, device="cuda").bfloat16()
        residual = torch.randn(64, 576, device="cuda").bfloat16()
        norm = make_input_norm(64)
        together = lora_gpu.finish_norm(
            *linear.args(), norm_weight=weight, residual=residual, input_norm=norm
        )
        for token in range(64):
            one = slice(token, token + 1)
            alone = lora_gpu.finish_norm(
                *linear.only(token).args(),
                norm_weight=weight,
                residual=residual[one],
                input_norm=replace(norm, squares=norm.squares[one]),
            )
            for name, mine, theirs in zip(("y", "scaled", "squares"), alone, together, strict=True):
                assert torch.equal(mine[0], theirs[token]), f"{name} of token {token}"


@pytest.mark.gpu
@needs_gpu
class TestInputNorm:
    @pytest.mark.parametrize("mix", [*MIXES, None])
    @pytest.mark.parametrize("with_silu", [False, True])
    @pytest.mark.parametrize("parts", [1, 9, 64, 70, 224])
    def test_it_divides_the_sums_and_lora(
        self, parts: int, with_silu: bool, mix: str | None
    ) -> None:
        linear = make_linear(MIXES[mix] if mix else None, (320, 320))
        norm = make_input_norm(linear.num_tokens, parts)
        residual = None
        if not with_silu:
            residual = torch.randn(linear.num_tokens, 640, device="cuda").bfloat16()
        y = lora_gpu.finish(*linear.args(), input_norm=norm, residual=residual, with_silu=with_silu)
        scales = row_scales(norm)
        workspace, split, h, *rest = linear.args()
        h = None if h is None else h * scales[:, :, None]
        expected = lora_gpu.finish(
            workspace * scales, split, h, *rest, residual=residual, with_silu=with_silu
        )
        assert relative_error(y, expected) < BF16_ROUNDING
        each = (y.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
        assert (each < 2 * BF16_ROUNDING).all(), f"by row: {each.tolist()}"

    def test_eps_counts_in_a_row_of_zeros(self) -> None:
        linear = make_linear(None, (320,))
        norm = InputNorm(torch.zeros(NO_STEP, 5, device="cuda"), 320, 0.25)
        doubled = lora_gpu.finish(*linear.args(), input_norm=norm)  # 1 / sqrt(0.25)
        expected = lora_gpu.finish(*linear.args()) * 2
        torch.testing.assert_close(doubled, expected, rtol=ONE_UNIT, atol=0.0)

    @pytest.mark.parametrize("mix", ["interleaved", "none", "full"])
    def test_two_linears_with_a_norm_between_them(self, mix: str) -> None:
        adapters = MIXES[mix]
        hidden, out = 1024, 768
        first = make_linear(adapters, (hidden,))
        norm_weight = (torch.rand(hidden, device="cuda") + 0.5).bfloat16()
        residual = torch.randn(len(adapters), hidden, device="cuda").bfloat16() * 20
        residual *= torch.logspace(-2, 2, len(adapters), device="cuda")[:, None].bfloat16()
        y, scaled, squares = lora_gpu.finish_norm(
            *first.args(), norm_weight=norm_weight, residual=residual
        )

        qweight = torch.randint(0, 256, (out, hidden // 2), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(out, hidden // 64, device="cuda") * 0.05
        weight = nf4_pack.pack(qweight, absmax)
        rows = NUM_PAGES * PAGE_ROWS
        a_bank = torch.randn(rows, 1, hidden, device="cuda").bfloat16() * 0.05
        b_bank = torch.randn(rows, out, device="cuda").bfloat16() * 0.3
        step = first.step()
        assert step is not None
        result = lora_gpu.finish(
            nf4_linear.partial_sums(scaled, weight),
            nf4_linear.split_of(weight),
            lora_gpu.shrink(scaled, a_bank, step),
            b_bank,
            (out,),
            step,
            input_norm=InputNorm(squares, hidden, EPS),
        )
        normed = fused.rms_norm(y.double(), norm_weight.double(), EPS)
        expected = lora_gpu.add_lora_reference(
            normed @ nf4_pack.dequantize_reference(weight).double().T,
            normed,
            a_bank,
            b_bank,
            (out,),
            adapters,
            PAGES,
            GAIN_ROWS,
        )
        assert relative_error(result, expected) < BF16_ROUNDING
