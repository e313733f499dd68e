"""LoRA's shrink in the launch of a linear's partial sums: the bits that two launches give."""

import struct
from dataclasses import dataclass

import pytest
import torch

from server.kernels import lora_gpu, lora_launch, nf4_linear, nf4_pack, nvrtc
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN, PAGE_ROWS, LoraGpuStep
from server.kernels.nf4_pack import INT4, NF4, Format, PackedWeight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

MAX_PAGES = 32
RANKS = [2, 1, 3, 8, 32, 1]  # pages of each adapter; 32 are rank 256
MIXES = {
    "one": [0] * 20,
    "distinct": list(range(6)),
    "interleaved": [0, 1, 2, -1, 3, 1, 0, 5, -1, 4, 2, 2] * 3,
    "none": [-1] * 5,
    "single": [4],
    "full": [i % 7 - 1 for i in range(64)],
    "two": [1] * 33 + [3] * 31,
    "prefill": [0] * 70 + [2] * 3 + [-1] * 17 + [5] * 64 + [1],
}


def make_step(max_tokens: int, device: str = "cpu") -> LoraGpuStep:
    return LoraGpuStep(
        max_tokens=max_tokens, max_adapters=8, max_pages=MAX_PAGES, device=torch.device(device)
    )


class TestParameters:
    """What the host hands over; no GPU is needed."""

    X = torch.zeros(3, 2304).bfloat16()
    BANK = torch.zeros(2, 40, 2304).bfloat16().transpose(0, 1)

    def test_a_unit_is_eight_tokens_one_sublinear_and_one_slice(self) -> None:
        for num_tokens, octets in ((3, 1), (64, 1), (65, 4)):
            x = self.X[:1].expand(num_tokens, -1)
            step = make_step(100)
            h = lora_launch.empty_h(x, self.BANK, step)
            assert h.shape == (3, num_tokens, 2, MAX_PAGES * PAGE_ROWS)
            params = nf4_linear._shrink_params(x, self.BANK, step, h)
            assert params[10:12] == (2304, 40 * 2304)
            assert params[12:17] == (1024, 3, 2, octets, step.max_items)
            assert params[17:] == (1 / (octets * 2 * 3), 1 / 3, 1 / 2)

    def test_what_the_kernel_could_not_read_is_refused(self) -> None:
        step = make_step(3)
        h = lora_launch.empty_h(self.X, self.BANK, step)
        with pytest.raises(AssertionError, match="another linear"):
            nf4_linear._shrink_params(self.X[:, :64], self.BANK, step, h)
        with pytest.raises(AssertionError, match="start on 16 bytes"):
            nf4_linear._shrink_params(self.X[:, 1:], self.BANK[:, :, 1:], step, h)
        with pytest.raises(AssertionError, match="too many tokens"):
            nf4_linear._shrink_params(self.X, self.BANK, make_step(2), h)

    @pytest.mark.parametrize("divisor", [1, 2, 3, 7, 12, 21, 96, 224])
    def test_the_kernels_division_is_exact(self, divisor: int) -> None:
        dividend = torch.arange(1 << 20)
        quotient = (dividend.float() + 0.5) * torch.tensor(1 / divisor)
        assert torch.equal(quotient.long(), dividend // divisor)

    def test_a_struct_behind_a_tensor_map_starts_on_64_bytes(self) -> None:
        for params, size in (("PPi", 24), ("128sPPi", 192)):
            assert struct.calcsize("@" + nf4_linear._padded(params)) == size


@dataclass(frozen=True)
class Case:
    """A linear, and A of adapters over it, their pages scattered; NaN in the rows of nobody."""

    weight: PackedWeight
    a_bank: torch.Tensor
    pages: list[list[int]]

    def step(self, adapters: list[int], max_tokens: int = 200) -> LoraGpuStep:
        step = make_step(max_tokens, "cuda")
        stale = [i % len(self.pages) for i in range(max_tokens)]
        step.fill(stale, self.pages, [NO_GAIN] * len(self.pages))
        step.fill(adapters, self.pages, [NO_GAIN] * len(self.pages))
        return step


def make_case(out_features: int, in_features: int, sublinears: int, format: Format = NF4) -> Case:
    generator = torch.Generator("cuda").manual_seed(in_features)
    shape = (out_features, in_features // 2)
    qweight = torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=torch.uint8)
    shape = (out_features, in_features // format.group_size)
    scales = torch.rand(shape, generator=generator, device="cuda")
    num_pages = sum(RANKS) + 5
    free = torch.randperm(num_pages, generator=generator, device="cuda").tolist()
    pages = [[free.pop() for _ in range(rank)] for rank in RANKS]
    bank_shape = (sublinears, num_pages * PAGE_ROWS, in_features)
    bank = torch.randn(bank_shape, generator=generator, device="cuda").bfloat16()
    bank[:, [page * PAGE_ROWS + row for page in free for row in range(PAGE_ROWS)]] = torch.nan
    return Case(nf4_pack.pack(qweight, scales, format), bank.transpose(0, 1), pages)


def own_part(h: torch.Tensor, case: Case, adapters: list[int]) -> torch.Tensor:
    """True where `h` belongs to the token's own adapter."""
    is_own = torch.zeros(h.shape, dtype=torch.bool, device=h.device)
    for token, adapter in enumerate(adapters):
        if adapter != NO_ADAPTER:
            is_own[:, token, :, : len(case.pages[adapter]) * PAGE_ROWS] = True
    return is_own


def check(
    case: Case, adapters: list[int], kernels: nf4_linear._Kernels, max_tokens: int = 200
) -> None:
    """One launch writes what two write, and nothing else."""
    step = case.step(adapters, max_tokens)
    x = torch.randn(len(adapters), case.weight.in_features, device="cuda").bfloat16()
    sums = kernels.empty_workspace(x, case.weight).fill_(torch.nan)
    both_sums = sums.clone()
    both_h = lora_launch.empty_h(x, case.a_bank, step).fill_(torch.nan)
    kernels.partial_sums(x, case.weight, sums)
    kernels.partial_sums(x, case.weight, both_sums, case.weight, (case.a_bank, step, both_h))
    h = lora_gpu.shrink(x, case.a_bank, step)
    is_own = own_part(h, case, adapters)
    assert torch.equal(both_h[is_own], h[is_own])
    assert both_h[~is_own].isnan().all()
    assert torch.equal(both_sums.view(torch.int32), sums.view(torch.int32))


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    SHAPES = (
        (1408, 64, 3),
        (3072, 576, 2),
        (6144, 1024, 3),
        (72, 1600, 1),
        (3072, 4096, 2),
        (4096, 4096, 1),
        (4096, 14336, 1),
    )  # workers have 1 to 14 chunks: fewer, as many and more than the stages

    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize(("out_features", "in_features", "sublinears"), SHAPES)
    def test_it_is_partial_sums_and_shrink_bit_for_bit(
        self, out_features: int, in_features: int, sublinears: int, mix: str
    ) -> None:
        case = make_case(out_features, in_features, sublinears)
        weight = case.weight
        check(case, MIXES[mix], nf4_linear.kernels_of(weight.packed.device, weight.format))

    @pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 129])
    def test_any_number_of_tokens(self, num_tokens: int) -> None:
        case = make_case(6144, 4096, 3)
        kernels = nf4_linear.kernels_of(case.weight.packed.device, case.weight.format)
        for first in range(3):
            adapters = [(token * 5 + first) % 7 - 1 for token in range(num_tokens)]
            check(case, adapters, kernels, max_tokens=num_tokens)

    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("format", INT4.values(), ids=lambda format: format.name)
    def test_over_int4_too(self, format: Format, mix: str) -> None:
        for out_features, in_features, sublinears in (
            (72, 640, 1),
            (6144, 4096, 3),
            (4096, 14336, 1),
        ):
            case = make_case(out_features, in_features, sublinears, format)
            check(case, MIXES[mix], nf4_linear.kernels_of(case.weight.packed.device, format))

    @pytest.mark.parametrize("shared_limit", [101376, 166912])
    def test_kernels_for_lesser_cards(self, shared_limit: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        portable = nf4_linear._Kernels(device, nvrtc.architecture(device), shared_limit)
        for shape in self.SHAPES:
            case = make_case(*shape)
            for adapters in MIXES.values():
                check(case, adapters, portable)

    def test_a_token_has_the_same_bits_whatever_stands_beside_it(self) -> None:
        case = make_case(6144, 4096, 3)
        adapters = MIXES["full"]
        x = torch.randn(64, 4096, device="cuda").bfloat16()

        def run(rows: slice) -> torch.Tensor:
            step = case.step(adapters[rows])
            _, h = nf4_linear.partial_sums_and_shrink(x[rows], case.weight, case.a_bank, step)
            return h.masked_fill(~own_part(h, case, adapters[rows]), 0)

        together = run(slice(64))
        for token in range(64):
            alone = run(slice(token, token + 1))
            assert torch.equal(alone[:, 0], together[:, token])

    def test_a_neighbour_that_is_not_finite_stays_alone(self) -> None:
        case = make_case(1408, 576, 2)
        adapters = MIXES["full"]
        step = case.step(adapters)
        x = torch.randn(64, 576, device="cuda").bfloat16()
        _, clean = nf4_linear.partial_sums_and_shrink(x, case.weight, case.a_bank, step)
        x[2] = torch.inf
        _, dirty = nf4_linear.partial_sums_and_shrink(x, case.weight, case.a_bank, step)
        is_own = own_part(clean, case, adapters)
        is_own[:, 2] = False
        assert torch.equal(dirty[is_own], clean[is_own])

    def test_rows_of_x_may_be_part_of_wider_ones(self) -> None:
        case = make_case(1408, 576, 2)
        step = case.step([0, 3, 4])
        x = torch.randn(3, 1024, device="cuda").bfloat16()[:, 128 : 128 + 576]
        _, h = nf4_linear.partial_sums_and_shrink(x, case.weight, case.a_bank, step)
        expected = lora_gpu.shrink(x.contiguous(), case.a_bank, step)
        is_own = own_part(h, case, [0, 3, 4])
        assert torch.equal(h[is_own], expected[is_own])

    @pytest.mark.parametrize("format", [NF4, INT4[64]], ids=lambda format: format.name)
    @pytest.mark.parametrize("num_tokens", [1, 8, 32, 64])
    def test_a_replayed_graph_of_linears_in_a_row_follows_the_step(
        self, num_tokens: int, format: Format
    ) -> None:
        """Each linear reads what the kernel in front of it wrote, and none waits for the host."""
        splits = (384, 192)
        cases = [make_case(sum(splits), 576, 2, format) for _ in range(3)]
        num_rows = cases[0].a_bank.shape[0]
        b_bank = torch.randn(num_rows, sum(splits), device="cuda").bfloat16() * 0.01
        step = cases[0].step([0] * num_tokens, max_tokens=num_tokens)
        first_x = torch.randn(num_tokens, 576, device="cuda").bfloat16()
        in_one_launch = nf4_linear.partial_sums_and_shrink

        def run(*, separately: bool) -> torch.Tensor:
            x = first_x
            for case, following in zip(cases, [*cases[1:], cases[0]], strict=True):
                if separately:
                    h = lora_gpu.shrink(x, case.a_bank, step)
                    sums = nf4_linear.partial_sums(x, case.weight)
                else:
                    sums, h = in_one_launch(x, case.weight, case.a_bank, step, following.weight)
                split = nf4_linear.split_of(case.weight)
                x = lora_gpu.finish(sums, split, h, b_bank, splits, step)
            return x

        run(separately=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(separately=False)
        for adapters in (
            [token % 6 for token in range(num_tokens)],
            [3] + [NO_ADAPTER] * (num_tokens - 1),
            [NO_ADAPTER] * num_tokens,
            [4] * num_tokens,
            [NO_ADAPTER, 5, 1, 0, 2, 2, 3, 4] * 8,
        ):
            step.fill(adapters[:num_tokens], cases[0].pages, [NO_GAIN] * len(RANKS))
            first_x.normal_()
            for _ in range(3):
                graph.replay()
                assert y.isfinite().all()
                assert torch.equal(y, run(separately=True))
