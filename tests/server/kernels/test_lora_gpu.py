"""LoRA of mixed batches on the GPU: what the host writes on any machine, the kernels on a GPU."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from server.kernels import lora_gpu, lora_launch, nf4_linear, nf4_pack, nvrtc
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN, PAGE_ROWS, LoraGpuStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

BF16_ROUNDING = 6e-3  # of the result, and of h and y between the two halves
MAX_ADAPTERS = 40
MAX_PAGES = 32


def make_step(max_tokens: int, device: str = "cpu") -> LoraGpuStep:
    return LoraGpuStep(
        max_tokens=max_tokens,
        max_adapters=MAX_ADAPTERS,
        max_pages=MAX_PAGES,
        device=torch.device(device),
    )


class TestStep:
    @pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 300, 600])
    def test_tiles_hold_each_token_once_and_one_adapter_each(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        adapters = torch.randint(-1, 5, (num_tokens,), generator=generator).tolist()
        pages = [[3], [0, 7], [9, 1, 4], [2], [5, 6]]
        gains = [NO_GAIN, 8, 16, NO_GAIN, 40]
        step = make_step(num_tokens)
        step.fill(adapters, pages, gains)
        header = step.view("header").tolist()
        order = step.view("token_order").tolist()
        kinds = [("small_tiles", 4, header[1:3])] * (num_tokens <= 512)
        kinds += [("large_tiles", 64, header[3:5])] * (num_tokens > 64)
        for name, longest, (num_with_adapter, num_tiles) in kinds:
            records = step.view(name).view(-1, 12)[:num_tiles].tolist()
            seen: list[int] = []
            for index, record in enumerate(records):
                adapter, num_pages, page, second_page, gain, count, first, _ = record[4:]
                assert 0 < count <= longest
                assert (adapter == NO_ADAPTER) == (index >= num_with_adapter)
                tokens = order[first : first + count]
                assert longest > 4 or record[:count] == tokens
                assert {adapters[token] for token in tokens} == {adapter}
                if adapter != NO_ADAPTER:
                    own = [*pages[adapter], -1]
                    assert (num_pages, page, second_page) == (len(own) - 1, own[0], own[1])
                assert gain == [*gains, NO_GAIN][adapter]
                seen += tokens
            assert sorted(seen) == list(range(num_tokens))

    @pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 300, 600])
    def test_items_bring_each_page_to_each_token_of_its_adapter(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        adapters = torch.randint(-1, 5, (num_tokens,), generator=generator).tolist()
        pages = [[3], [0, 7], [9, 1, 4], [2], [5, 6]]
        step = make_step(num_tokens)
        step.fill(adapters, pages, [NO_GAIN] * 5)
        order = step.view("token_order").tolist()
        items = step.view("items").view(-1, 4)[: int(step.view("header")[0])].tolist()
        brought = []
        for page, second_page, first, packed in items:
            count, place = packed & 0xFFFF, packed >> 16
            for token in order[first : first + count]:
                brought.append((token, place, page))
                if second_page >= 0:
                    brought.append((token, place + 1, second_page))
        assert sorted(brought) == [
            (token, place, page)
            for token, adapter in enumerate(adapters)
            if adapter != NO_ADAPTER
            for place, page in enumerate(pages[adapter])
        ]

    def test_pages_past_the_second_are_in_the_table(self) -> None:
        step = make_step(4)
        step.fill([1, 0, -1, 1], [[4, 2, 9], [7]], [NO_GAIN, 65])
        table = step.view("page_table").view(MAX_ADAPTERS, MAX_PAGES)
        assert table[0, :3].tolist() == [4, 2, 9]
        assert table[1, :1].tolist() == [7]

    @pytest.mark.parametrize("num_tokens", [1, 13, 300])
    def test_small_tiles_say_what_they_and_those_before_them_cost(self, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        adapters = torch.randint(-1, 6, (num_tokens,), generator=generator).tolist()
        cost_of_pages = {1: 8, 2: 8, 3: 12, 8: 20, 9: 24, 32: 68}
        pages = [list(range(count)) for count in cost_of_pages]
        step = make_step(num_tokens)
        step.fill(adapters, pages, [NO_GAIN] * 6)
        _, with_adapter, num_tiles, _, _, *totals = step.view("header").tolist()
        records = step.view("small_tiles").view(-1, 12)[:num_tiles].tolist()
        costs = [cost_of_pages[record[5]] if record[5] else 8 for record in records]
        before = [sum(costs[:index]) for index in range(num_tiles)]
        assert [record[11] >> 20 for record in records] == costs
        assert [record[11] & 0xFFFFF for record in records] == before
        assert totals == [sum(costs[:with_adapter]), sum(costs), min(costs)]

    def test_what_a_tile_costs_fits_into_its_record(self) -> None:
        step = LoraGpuStep(
            max_tokens=512, max_adapters=512, max_pages=200, device=torch.device("cpu")
        )
        step.fill(list(range(512)), [list(range(200))] * 512, [NO_GAIN] * 512)
        packed = step.view("small_tiles").view(-1, 12)[:, 11]
        assert packed[-1] == 255 << 20 | 511 * 255
        assert step.view("header")[6] == 512 * 255

    def test_filling_again_leaves_the_addresses_alone(self) -> None:
        step = make_step(8)
        before = step.addresses()
        step.fill([0] * 8, [[1]], [NO_GAIN])
        step.fill([], [], [])
        assert step.addresses() == before
        assert step.view("header").tolist() == [0] * 8

    def test_a_step_like_the_one_before_is_not_written_again(self) -> None:
        step = make_step(4)
        pages = [[4], [7]]
        step.fill([0, 1], pages, [NO_GAIN, NO_GAIN])
        step.device_buffer.zero_()
        step.fill([0, 1], [[4], [7]], [NO_GAIN, NO_GAIN])
        assert step.device_buffer.count_nonzero() == 0
        pages[1].append(8)  # a caller may change what it passed before
        step.fill([0, 1], pages, [NO_GAIN, NO_GAIN])
        assert step.view("small_tiles")[12 + 5] == 2

    def test_the_worst_batch_fits(self) -> None:
        for num_tokens in (64, 65, 2000):
            step = make_step(num_tokens)
            adapters = [token % MAX_ADAPTERS for token in range(num_tokens)]
            pages = [list(range(MAX_PAGES))] * MAX_ADAPTERS
            step.fill(adapters, pages, [NO_GAIN] * MAX_ADAPTERS)
            items, _, small, _, large, *_ = step.view("header").tolist()
            assert 0 < items <= step.max_items
            assert small <= step.max_small
            assert large <= step.max_large

    def test_more_than_fits_is_refused(self) -> None:
        step = make_step(2)
        with pytest.raises(AssertionError, match="too many tokens"):
            step.fill([-1] * 3, [], [])
        with pytest.raises(AssertionError, match="too many adapters"):
            step.fill([0], [[0]] * (MAX_ADAPTERS + 1), [NO_GAIN] * (MAX_ADAPTERS + 1))


@pytest.mark.parametrize(
    ("shared_kib", "highest"),
    [(99, 383), (163, 639), (227, 895)],  # sm_89, sm_80, sm_90
)
def test_ranks_that_a_block_cannot_hold_are_refused(shared_kib: int, highest: int) -> None:
    assert lora_launch.pages_of_rank(highest, shared_kib * 1024) == (highest + 1) // PAGE_ROWS
    with pytest.raises(ValueError, match=rf"max_rank is {highest + 1}, which takes .*--max-rank"):
        lora_launch.pages_of_rank(highest + 1, shared_kib * 1024)


def test_an_adapters_pages_hold_its_rank_and_a_gain() -> None:
    assert [lora_launch.pages_of_rank(rank, None) for rank in (1, 7, 8, 1024)] == [1, 1, 2, 129]


def test_the_reference_is_the_formula_of_lora() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 2, 24, generator=generator, dtype=torch.float64)
    b = torch.randn(16, 40, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    result = lora_gpu.add_lora_reference(y, x, a, b, (32, 8), [NO_ADAPTER, 0], [[1]], [0])
    left = y[1, :32] + x[1] @ a[8:, 0].T @ b[8:, :32]
    right = y[1, 32:] + x[1] @ a[8:, 1].T @ b[8:, 32:]
    expected = torch.cat((left, right)) * (1 + b[0])
    torch.testing.assert_close(result, torch.stack((y[0], expected)))


@pytest.mark.skipif(not nvrtc.is_available(), reason="needs NVRTC")
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_the_source_compiles_for_each_architecture(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.compiled(lora_launch.kernel_source(), arch)


@dataclass(frozen=True)
class Case:
    """Banks of one fused group, and adapters in them."""

    a_bank: torch.Tensor
    b_bank: torch.Tensor
    out_splits: tuple[int, ...]
    pages: list[list[int]]
    gain_rows: list[int]


QKV = (1024, 192, 192)
GATE_UP = (1536, 1536)
NARROW = (64, 32, 32)  # a tile of 64 outputs lies in two sublinears


def make_case(in_features: int, out_splits: tuple[int, ...], ranks: list[int]) -> Case:
    """Adapters of so many pages each, scattered over the banks; every third has DoRA's gain."""
    generator = torch.Generator("cuda").manual_seed(sum(ranks))
    num_pages = sum(ranks) + len(ranks) + 3
    rows = num_pages * PAGE_ROWS

    def bank(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16() * 0.05

    free = torch.randperm(num_pages, generator=generator, device="cuda").tolist()
    pages = [[free.pop() for _ in range(rank)] for rank in ranks]
    gains = [free.pop() * PAGE_ROWS + 3 if i % 3 == 0 else NO_GAIN for i in range(len(ranks))]
    a_bank = bank(len(out_splits), rows, in_features).transpose(0, 1)
    b_bank = bank(rows, sum(out_splits))
    unused = [page * PAGE_ROWS + row for page in free for row in range(PAGE_ROWS)]
    a_bank[unused] = torch.nan
    b_bank[unused] = torch.nan
    return Case(a_bank, b_bank, out_splits, pages, gains)


def run(case: Case, y: torch.Tensor, x: torch.Tensor, adapters: list[int]) -> torch.Tensor:
    step = make_step(max(len(adapters), 1), "cuda")
    step.fill(adapters, case.pages, case.gain_rows)
    y = y.clone()
    h = lora_gpu.shrink(x, case.a_bank, step)
    lora_gpu.expand(y, h, case.b_bank, case.out_splits, step)
    return y


def reference(case: Case, y: torch.Tensor, x: torch.Tensor, adapters: list[int]) -> torch.Tensor:
    return lora_gpu.add_lora_reference(
        y.double(),
        x,
        case.a_bank,
        case.b_bank,
        case.out_splits,
        adapters,
        case.pages,
        case.gain_rows,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


MIXES = {
    "one": [0] * 20,
    "distinct": list(range(6)),
    "interleaved": [0, 1, 2, -1, 3, 1, 0, 5, -1, 4, 2, 2] * 3,
    "none": [-1] * 5,
    "single": [4],
    "full": [i % 7 - 1 for i in range(64)],
    "prefill": [0] * 70 + [2] * 3 + [-1] * 17 + [5] * 64 + [1],
}
RANKS = [2, 1, 3, 8, 32, 1]  # pages


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("out_splits", [QKV, GATE_UP, NARROW, (576,)])
    @pytest.mark.parametrize("in_features", [64, 576, 1024, 1600, 14336])
    def test_it_agrees_with_the_reference(
        self, in_features: int, out_splits: tuple[int, ...], mix: str
    ) -> None:
        case = make_case(in_features, out_splits, RANKS)
        adapters = MIXES[mix]
        x = torch.randn(len(adapters), in_features, device="cuda").bfloat16()
        y = torch.randn(len(adapters), sum(out_splits), device="cuda").bfloat16()
        result = run(case, y, x, adapters)
        assert relative_error(result, reference(case, y, x, adapters)) < BF16_ROUNDING
        untouched = [token for token, adapter in enumerate(adapters) if adapter == NO_ADAPTER]
        assert torch.equal(result[untouched], y[untouched])

    @pytest.mark.parametrize("in_features", [576, 4096, 14336])
    def test_a_token_has_the_same_bits_whatever_stands_beside_it(self, in_features: int) -> None:
        case = make_case(in_features, QKV, RANKS)
        adapters = MIXES["full"]
        x = torch.randn(64, in_features, device="cuda").bfloat16()
        y = torch.randn(64, sum(QKV), device="cuda").bfloat16()
        together = run(case, y, x, adapters)
        for token in range(64):
            one = slice(token, token + 1)
            assert torch.equal(run(case, y[one], x[one], adapters[one]), together[one])
        backwards = run(case, y.flip(0), x.flip(0), adapters[::-1])
        assert torch.equal(backwards.flip(0), together)

    def test_a_neighbour_that_is_not_finite_stays_alone(self) -> None:
        case = make_case(576, QKV, RANKS)
        adapters = MIXES["interleaved"]
        x = torch.randn(len(adapters), 576, device="cuda").bfloat16()
        y = torch.randn(len(adapters), sum(QKV), device="cuda").bfloat16()
        clean = run(case, y, x, adapters)
        x[2] = torch.inf
        dirty = run(case, y, x, adapters)
        others = [token for token in range(len(adapters)) if token != 2]
        assert torch.equal(dirty[others], clean[others])

    def test_a_replayed_graph_follows_the_step_and_ignores_stale_tails(self) -> None:
        case = make_case(1024, QKV, RANKS)
        step = make_step(64, "cuda")
        x = torch.randn(64, 1024, device="cuda").bfloat16()
        base = torch.randn(64, sum(QKV), device="cuda").bfloat16()
        y = base.clone()

        def launch() -> None:
            y.copy_(base)
            h = lora_gpu.shrink(x, case.a_bank, step)
            lora_gpu.expand(y, h, case.b_bank, case.out_splits, step)

        step.fill(MIXES["full"], case.pages, case.gain_rows)
        launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        shorter = [3, 1] + [NO_ADAPTER] * 62
        for adapters in (MIXES["full"], shorter, [NO_ADAPTER] * 64, [4] * 64, MIXES["full"][::-1]):
            step.fill(adapters, case.pages, case.gain_rows)
            x.normal_()
            graph.replay()
            assert torch.equal(y, run(case, base, x, adapters))

    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("with_silu", [False, True])
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_finish_is_reduce_then_expand_then_the_rest(
        self, mix: str, with_silu: bool, with_residual: bool
    ) -> None:
        adapters = MIXES[mix]
        num_tokens = len(adapters)
        case = make_case(1024, GATE_UP, RANKS)
        out_features = sum(GATE_UP)
        qweight = torch.randint(0, 256, (out_features, 512), dtype=torch.uint8, device="cuda")
        absmax = torch.rand(out_features, 16, device="cuda") * 0.05
        weight = nf4_pack.pack(qweight, absmax)
        x = torch.randn(num_tokens, 1024, device="cuda").bfloat16()
        columns = out_features // 2 if with_silu else out_features
        residual = torch.randn(num_tokens, columns, device="cuda").bfloat16()
        step = make_step(num_tokens, "cuda")
        step.fill(adapters, case.pages, case.gain_rows)
        y = lora_gpu.finish(
            nf4_linear.partial_sums(x, weight),
            nf4_linear.split_of(weight),
            lora_gpu.shrink(x, case.a_bank, step),
            case.b_bank,
            GATE_UP,
            step,
            residual=residual if with_residual else None,
            with_silu=with_silu,
        )
        linear = x.double() @ nf4_pack.dequantize_reference(weight).double().T
        expected = reference(case, linear, x, adapters)
        if with_silu:
            gate, up = expected.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        if with_residual:
            expected = expected + residual
        assert relative_error(y, expected) < BF16_ROUNDING

    @pytest.mark.parametrize("num_tokens", [1, 16, 33, 64, 100])
    def test_finish_without_a_step_is_reduce(self, num_tokens: int) -> None:
        qweight = torch.randint(0, 256, (1600, 512), dtype=torch.uint8, device="cuda")
        weight = nf4_pack.pack(qweight, torch.rand(1600, 16, device="cuda"))
        x = torch.randn(num_tokens, 1024, device="cuda").bfloat16()
        workspace = nf4_linear.partial_sums(x, weight)
        split = nf4_linear.split_of(weight)
        y = lora_gpu.finish(workspace, split, None, None, (1600,), None)
        assert torch.equal(y, nf4_linear.reduce(workspace, weight))

    @pytest.mark.parametrize("mix", ["full", "prefill", "none"])
    def test_expand_adds_a_residual_to_every_row(self, mix: str) -> None:
        adapters = MIXES[mix]
        case = make_case(1024, QKV, RANKS)
        x = torch.randn(len(adapters), 1024, device="cuda").bfloat16()
        y = torch.randn(len(adapters), sum(QKV), device="cuda").bfloat16()
        residual = torch.randn(len(adapters), sum(QKV), device="cuda").bfloat16()
        step = make_step(len(adapters), "cuda")
        step.fill(adapters, case.pages, case.gain_rows)
        expected = reference(case, y, x, adapters) + residual
        h = lora_gpu.shrink(x, case.a_bank, step)
        lora_gpu.expand(y, h, case.b_bank, QKV, step, residual=residual)
        assert relative_error(y, expected) < BF16_ROUNDING

    @pytest.mark.parametrize("mix", ["full", "prefill"])
    def test_expand_silu_is_expand_then_silu(self, mix: str) -> None:
        adapters = MIXES[mix]
        case = make_case(1024, GATE_UP, RANKS)
        x = torch.randn(len(adapters), 1024, device="cuda").bfloat16()
        gate_up = torch.randn(len(adapters), sum(GATE_UP), device="cuda").bfloat16()
        step = make_step(len(adapters), "cuda")
        step.fill(adapters, case.pages, case.gain_rows)
        h = lora_gpu.shrink(x, case.a_bank, step)
        y = lora_gpu.expand_silu(gate_up, h, case.b_bank, step)
        gate, up = reference(case, gate_up, x, adapters).chunk(2, dim=1)
        assert relative_error(y, torch.nn.functional.silu(gate) * up) < BF16_ROUNDING
