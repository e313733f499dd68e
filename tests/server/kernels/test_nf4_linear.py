"""NF4 and int4 linears: the repacking and the split on any machine, the kernels on a GPU."""

import itertools
import os
import random
from pathlib import Path

import pytest
import torch

from server.kernels import nf4_linear, nf4_pack, nvrtc
from server.kernels.nf4_linear import Tuning
from server.kernels.nf4_pack import INT4, LEVELS, NF4, Format, PackedWeight, SplitK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

FORMATS = [NF4, *INT4.values()]
SHAPES = [(256, 128), (192, 576), (6144, 4096), (1600, 1600), (72, 64), (4096, 14336)]
ODD_SHAPES = {32: [(200, 96), (264, 1632)], 64: [], 128: [(72, 640), (1600, 1664)]}
BF16_ROUNDING = 4e-3  # bf16 keeps 8 bits: results and levels are each rounded to 2**-9 relative


def named(value: object) -> str | None:
    """What a parameter is called in a test's name."""
    return value.name.replace(" ", "-") if isinstance(value, Format) else None


def shapes_of(format: Format) -> list[tuple[int, int]]:
    """The shapes whose inputs fill the format's groups."""
    size = format.group_size
    return [shape for shape in [*SHAPES, *ODD_SHAPES[size]] if shape[1] % size == 0]


formats = pytest.mark.parametrize("format", FORMATS, ids=named)
shapes = pytest.mark.parametrize(
    ("format", "out_features", "in_features"),
    [(format, *shape) for format in FORMATS for shape in shapes_of(format)],
    ids=named,
)
small_shapes = pytest.mark.parametrize(
    ("format", "out_features", "in_features"),
    [(f, *shape) for f in FORMATS for shape in shapes_of(f) if shape[1] <= 4096],
    ids=named,
)


def random_matrix(
    format: Format, out_features: int, in_features: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales of a matrix [out, in]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (out_features, in_features // 2)
    qweight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    shape = (out_features, in_features // format.group_size)
    scales = torch.rand(shape, generator=generator, device=device)
    return qweight, scales * 0.05 + 1e-3


def random_weight(
    format: Format, out_features: int, in_features: int, *, seed: int = 0
) -> PackedWeight:
    """The same, packed on the GPU."""
    matrix = random_matrix(format, out_features, in_features, seed=seed, device="cuda")
    return nf4_pack.pack(*matrix, format)


def plain_dequantize(format: Format, qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix in fp32, without going through the packed layout."""
    codes = torch.stack((qweight >> 4, qweight & 15), dim=-1).flatten(1)
    if format is NF4:
        levels = torch.tensor(LEVELS, device=qweight.device)[codes.long()]
    else:
        levels = codes.float() - 8
    return levels * scales.repeat_interleave(format.group_size, dim=1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where anything is NaN."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


class TestLayout:
    @small_shapes
    def test_unpacking_gives_back_what_was_packed(
        self, format: Format, out_features: int, in_features: int
    ) -> None:
        qweight, scales = random_matrix(format, out_features, in_features)
        unpacked = nf4_pack.unpack(nf4_pack.pack(qweight, scales, format))
        torch.testing.assert_close(unpacked, (qweight, scales), rtol=0, atol=0)

    @formats
    def test_a_lane_finds_the_codes_of_its_operand_together(self, format: Format) -> None:
        qweight, scales = random_matrix(format, 512, 256)
        packed = nf4_pack.pack(qweight, scales, format).packed
        rng = random.Random(0)
        for _ in range(500):
            tile, chunk, unit, half = (
                rng.randrange(2),
                rng.randrange(2),
                rng.randrange(4),
                rng.randrange(2),
            )
            m_tile, lane, step, register = (rng.randrange(n) for n in (4, 32, 4, 4))
            # mma.m16n8k16, A: register 1 and 3 are eight rows down, 2 and 3 eight columns right
            row = tile * 256 + unit * 64 + m_tile * 16 + register % 2 * 8 + lane // 4
            column = chunk * 128 + half * 64 + step * 16 + register // 2 * 8 + lane % 4 * 2
            at = (unit * 2 + half) * 2048 + m_tile * 512 + lane * 16 + step * 4
            if format is NF4:
                pair = int(packed[tile, chunk, at + register])
            else:  # in halves of the word: their first four bits are register 0's
                word = int.from_bytes(bytes(packed[tile, chunk, at : at + 4].tolist()), "little")
                first, second = word >> 4 * register & 15, word >> 4 * register + 16 & 15
                pair = first << 4 | second
            assert pair == qweight[row, column // 2]

    @formats
    def test_a_lane_finds_the_scales_of_its_two_rows_together(self, format: Format) -> None:
        qweight, scales = random_matrix(format, 512, 256)
        packed = nf4_pack.pack(qweight, scales, format).packed
        in_chunk = packed[..., 16384:].contiguous().view(torch.float32)
        groups = 128 // format.group_size
        rng = random.Random(0)
        for _ in range(200):
            tile, chunk, unit = rng.randrange(2), rng.randrange(2), rng.randrange(4)
            m_tile, lane_group, group = rng.randrange(4), rng.randrange(8), rng.randrange(groups)
            row = tile * 256 + unit * 64 + m_tile * 16 + lane_group
            at = (unit * groups + group) * 64 + m_tile * 16 + lane_group * 2
            expected = scales[[row, row + 8], chunk * groups + group]
            assert torch.equal(in_chunk[tile, chunk, at : at + 2], expected)

    @pytest.mark.parametrize("format", [NF4, INT4[32], INT4[64]], ids=named)
    def test_padding_decodes_to_zero(self, format: Format) -> None:
        weight = nf4_pack.pack(*random_matrix(format, 72, 64), format)
        whole = PackedWeight(weight.packed, 256, 128, format)
        dequantized = nf4_pack.dequantize_reference(whole)
        assert dequantized[72:].count_nonzero() == 0
        assert dequantized[:, 64:].count_nonzero() == 0

    @formats
    def test_a_group_without_a_scale_is_zero_and_its_scale_can_be_divided_by(
        self, format: Format
    ) -> None:
        qweight, scales = random_matrix(format, 64, 256)
        scales[3, 1] = 0.0
        scales[5, 0] = -1e-38
        weight = nf4_pack.pack(qweight, scales, format)
        assert nf4_pack.unpack(weight)[1].abs().min() > 1e-30
        expected = plain_dequantize(format, qweight, scales)
        expected[5, : format.group_size] = 0.0
        torch.testing.assert_close(nf4_pack.dequantize_reference(weight), expected)

    @formats
    def test_inputs_that_do_not_fill_their_groups_are_refused(self, format: Format) -> None:
        size = format.group_size
        with pytest.raises(ValueError, match=f"{format.name} needs.*of {size}, not {size + 16}"):
            nf4_pack.pack(
                torch.zeros(8, size // 2 + 8, dtype=torch.uint8), torch.zeros(8, 1), format
            )

    def test_it_holds_what_bitsandbytes_quantized(self) -> None:
        pytest.importorskip("bitsandbytes")
        from server.quant import nf4  # imports bitsandbytes, absent on some hosts

        matrix = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
        quantized = nf4.quantize(matrix)
        assert quantized.levels.tolist() == list(LEVELS)
        weight = nf4_pack.pack(quantized.qweight, quantized.absmax())
        expected = quantized.dequantize(torch.bfloat16)
        torch.testing.assert_close(nf4_linear.dequantize(weight), expected, rtol=0, atol=0)


class TestSplit:
    @pytest.mark.parametrize("workers", [1, 5, 132])
    @pytest.mark.parametrize("tiles", [1, 16, 112])
    @pytest.mark.parametrize("chunks", [1, 5, 32, 112])
    def test_every_chunk_has_one_worker_and_a_slot(
        self, tiles: int, chunks: int, workers: int
    ) -> None:
        num_chunks = tiles * chunks
        split = SplitK(chunks, num_chunks, min(workers, num_chunks))
        owners = [
            worker
            for worker in range(split.num_workers)
            for _ in range(
                num_chunks * worker // split.num_workers,
                num_chunks * (worker + 1) // split.num_workers,
            )
        ]
        assert owners == [split._worker(chunk) for chunk in range(num_chunks)]
        by_tile = [owners[tile * chunks : (tile + 1) * chunks] for tile in range(tiles)]
        assert split.num_slots == max(len(set(workers_of)) for workers_of in by_tile)
        assert all(sorted(set(o)) == list(range(o[0], o[-1] + 1)) for o in by_tile)


class TestWithoutGpu:
    @formats
    def test_the_linear_on_a_cpu_is_the_reference(self, format: Format) -> None:
        qweight, scales = random_matrix(format, 72, 128)
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        y = nf4_linear.nf4_linear(x, nf4_pack.pack(qweight, scales, format))
        expected = x.double() @ plain_dequantize(format, qweight, scales).double().T
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) < BF16_ROUNDING

    def test_the_level_factor_rounds_the_levels_better_than_none(self) -> None:
        levels = torch.tensor(LEVELS, dtype=torch.float64)

        def error(factor: float) -> float:
            return relative_error((levels * factor).float().bfloat16(), levels * factor)

        assert error(nf4_linear.LEVEL_FACTOR) < 6.4e-4 < 1.0e-3 < error(1.0)

    @pytest.mark.skipif(not nvrtc.is_available(), reason="needs NVRTC")
    @formats
    @pytest.mark.parametrize(
        ("arch", "shared_limit"),
        [
            ("sm_80", 166912),
            ("sm_86", 101376),
            ("sm_89", 101376),
            ("sm_90a", 232448),
            ("sm_120", 101376),
        ],
    )
    def test_the_source_compiles_and_fits_each_architecture(
        self,
        format: Format,
        arch: str,
        shared_limit: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        source, tiles = nf4_linear.kernel_source(arch, shared_limit, format)
        assert nvrtc.compiled(source, arch)
        assert {8, 16, 32} <= tiles.keys()
        assert max(tile.shared_bytes for tile in tiles.values()) <= shared_limit

    def test_a_cubin_is_compiled_once_and_then_read_from_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled: list[tuple[str, tuple[str, ...]]] = []

        def compile_to(source: str, arguments: tuple[str, ...]) -> bytes:
            compiled.append((source, arguments))
            return f"cubin {len(compiled)}".encode()

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(nvrtc, "_compile", compile_to)
        monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 0))
        assert nvrtc.compiled("a", "sm_90") == b"cubin 1"
        assert nvrtc.compiled("a", "sm_90") == b"cubin 1"
        assert nvrtc.compiled("b", "sm_90") == b"cubin 2"
        assert nvrtc.compiled("a", "sm_80") == b"cubin 3"
        assert nvrtc.compiled("a", "sm_90", ("-lineinfo",)) == b"cubin 4"
        monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 1))
        assert nvrtc.compiled("a", "sm_90") == b"cubin 5"
        assert len(list((tmp_path / "turnout" / "kernels").iterdir())) == 5

    def test_a_cubin_is_on_the_disk_before_it_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[object] = []
        replace = Path.replace

        def named(path: Path, target: Path) -> Path:
            steps.append("named")
            return replace(path, target)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(nvrtc, "_compile", lambda source, arguments: b"cubin")
        monkeypatch.setattr(nvrtc, "_nvrtc_version", lambda: (13, 0))
        monkeypatch.setattr(os, "fsync", lambda handle: steps.append(os.fstat(handle).st_size))
        monkeypatch.setattr(Path, "replace", named)
        nvrtc.compiled("a", "sm_90")
        assert steps == [len(b"cubin"), "named"]

    @pytest.mark.skipif(not nvrtc.is_available(), reason="needs NVRTC")
    def test_what_does_not_compile_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(RuntimeError, match="nonsense"):
            nvrtc.compiled("nonsense;", "sm_90")
        assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.gpu
@needs_gpu
class TestOnGpu:
    ROWS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200)

    @shapes
    def test_it_agrees_with_fp64_for_any_number_of_rows(
        self, format: Format, out_features: int, in_features: int
    ) -> None:
        qweight, scales = random_matrix(format, out_features, in_features, device="cuda")
        scales[0, 0] = 0.0
        weight = nf4_pack.pack(qweight, scales, format)
        x = torch.randn(400, in_features, device="cuda").bfloat16()
        expected = x.double() @ plain_dequantize(format, qweight, scales).double().T
        for rows in (*self.ROWS, 384, 400):
            y = nf4_linear.nf4_linear(x[:rows], weight)
            assert relative_error(y, expected[:rows]) < BF16_ROUNDING, rows

    @shapes
    def test_up_to_64_rows_a_row_has_the_same_bits_whatever_stands_beside_it(
        self, format: Format, out_features: int, in_features: int
    ) -> None:
        weight = random_weight(format, out_features, in_features)
        x = torch.randn(64, in_features, device="cuda").bfloat16()
        together = nf4_linear.nf4_linear(x, weight)
        for rows in self.ROWS[:10]:
            first = torch.randint(0, 65 - rows, ()).item()
            some = nf4_linear.nf4_linear(x[first : first + rows], weight)
            assert torch.equal(some, together[first : first + rows]), rows
        backwards = nf4_linear.nf4_linear(x.flip(0), weight)
        assert torch.equal(backwards.flip(0), together)

    @formats
    @pytest.mark.parametrize("shared_limit", [101376, 166912])
    def test_kernels_for_lesser_cards_give_the_same_bits(
        self, shared_limit: int, format: Format
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        arch = nvrtc.architecture(device)
        portable = nf4_linear._Kernels(device, arch, shared_limit, format=format)
        for out_features, in_features in shapes_of(format):
            weight = random_weight(format, out_features, in_features)
            x = torch.randn(64, in_features, device="cuda").bfloat16()
            expected = nf4_linear.nf4_linear(x, weight)
            for rows in self.ROWS[:10]:
                slots = portable.split(weight).num_slots
                workspace = torch.full((slots, rows, out_features), torch.nan, device="cuda")
                y = torch.empty(rows, out_features, device="cuda", dtype=torch.bfloat16)
                portable.partial_sums(x[:rows], weight, workspace)
                portable.reduce(workspace, weight, y)
                assert torch.equal(y, expected[:rows]), (out_features, in_features, rows)

    @formats
    def test_only_the_slots_of_a_tile_are_written_and_all_of_those(self, format: Format) -> None:
        weight = random_weight(format, 6144, 4096)
        split = nf4_linear.split_of(weight)
        x = torch.randn(5, 4096, device="cuda").bfloat16()
        kernels = nf4_linear.kernels_of(x.device, format)
        workspace = torch.full((split.num_slots, 5, 6144), torch.nan, device="cuda")
        kernels.partial_sums(x, weight, workspace)
        for tile in range(6144 // 256):
            chunks = range(tile * split.chunks_per_tile, (tile + 1) * split.chunks_per_tile)
            used = split._worker(chunks[-1]) - split._worker(chunks[0]) + 1
            columns = workspace[:, :, tile * 256 : (tile + 1) * 256]
            assert not columns[:used].isnan().any()
            assert columns[used:].isnan().all()

    @formats
    def test_rows_may_be_part_of_wider_ones(self, format: Format) -> None:
        weight = random_weight(format, 256, 640)
        wide = torch.randn(20, 1024, device="cuda").bfloat16()
        part = wide[:, 128 : 128 + 640]
        expected = nf4_linear.nf4_linear(part.contiguous(), weight)
        assert torch.equal(nf4_linear.nf4_linear(part, weight), expected)

    @formats
    def test_a_row_that_is_not_finite_stays_alone(self, format: Format) -> None:
        weight = random_weight(format, 256, 640)
        x = torch.randn(20, 640, device="cuda").bfloat16()
        clean = nf4_linear.nf4_linear(x, weight)
        x[3] = torch.inf
        dirty = nf4_linear.nf4_linear(x, weight)
        others = [row for row in range(20) if row != 3]
        assert torch.equal(dirty[others], clean[others])

    @small_shapes
    def test_dequantizing_rounds_each_weight_once(
        self, format: Format, out_features: int, in_features: int
    ) -> None:
        qweight, scales = random_matrix(format, out_features, in_features, device="cuda")
        expected = plain_dequantize(format, qweight, scales).bfloat16()
        assert torch.equal(nf4_linear.dequantize(nf4_pack.pack(qweight, scales, format)), expected)

    @formats
    @pytest.mark.parametrize("rows", [1, 8, 33, 128])
    def test_a_captured_graph_gives_the_same_bits_when_replayed(
        self, rows: int, format: Format
    ) -> None:
        layers = [random_weight(format, 1024, 1024, seed=seed) for seed in range(4)]
        x = torch.empty(rows, 1024, device="cuda", dtype=torch.bfloat16)

        def run() -> torch.Tensor:
            y = x
            for layer in layers:
                y = nf4_linear.nf4_linear(y, layer)
            return y

        x.normal_()
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(20):
            x.normal_()
            graph.replay()
            assert torch.equal(captured, run())

    @formats
    @pytest.mark.parametrize("chains", [1, 2])
    def test_every_tuning_is_right_and_has_the_same_bits_in_all_its_kernels(
        self, chains: int, format: Format
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        tunings = (
            Tuning(chains=chains, wgmma_from=8, max_stages=4),
            Tuning(chains=chains, wgmma_from=16, max_stages=9, spare_bytes=0, small_warps=8),
            Tuning(chains=chains, wgmma_from=8, max_stages=8, late_release=chains == 1),
        )
        sets = [nf4_linear._Kernels(device, format=format, tuning=one) for one in tunings]
        for out_features, in_features in ((1600, 640), (4096, 4096)):
            weight = random_weight(format, out_features, in_features)
            x = torch.randn(64, in_features, device="cuda").bfloat16()
            exact = x.double() @ nf4_pack.dequantize_reference(weight).double().T
            results = []
            for kernels, rows in itertools.product(sets, (1, 8, 13, 32, 64)):
                sums = kernels.empty_workspace(x[:rows], weight)
                y = torch.empty(rows, out_features, device="cuda", dtype=torch.bfloat16)
                kernels.partial_sums(x[:rows], weight, sums, weight)
                kernels.reduce(sums, weight, y)
                assert relative_error(y, exact[:rows]) < BF16_ROUNDING
                results.append(y)
            assert all(torch.equal(y, results[-1][: len(y)]) for y in results)

    def test_weights_of_another_format_are_refused(self) -> None:
        x = torch.randn(1, 128, device="cuda").bfloat16()
        ours, other = random_weight(INT4[64], 256, 128), random_weight(NF4, 256, 128)
        with pytest.raises(AssertionError, match="both in one format"):
            nf4_linear.partial_sums(x, ours, other)
