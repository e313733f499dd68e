"""NF4 linear: the repacking and the split on any machine, the kernels on a GPU."""

import random
from pathlib import Path

import pytest
import torch

from server.kernels import nf4_linear, nf4_pack, nvrtc
from server.kernels.nf4_pack import LEVELS, PackedWeight, SplitK

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = [(256, 128), (192, 576), (6144, 4096), (1600, 1600), (72, 64), (4096, 14336)]
BF16_ROUNDING = 4e-3  # bf16 keeps 8 bits: results and levels are each rounded to 2**-9 relative


def random_matrix(
    out_features: int, in_features: int, *, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and absmax of a matrix [out, in]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (out_features, in_features // 2)
    qweight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    absmax = torch.rand(out_features, in_features // 64, generator=generator, device=device)
    return qweight, absmax * 0.05 + 1e-3


def plain_dequantize(qweight: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """The matrix in fp32, without going through the packed layout."""
    codes = torch.stack((qweight >> 4, qweight & 15), dim=-1).flatten(1).long()
    levels = torch.tensor(LEVELS, device=qweight.device)
    return levels[codes] * absmax.repeat_interleave(64, dim=1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where anything is NaN."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


class TestLayout:
    @pytest.mark.parametrize(("out_features", "in_features"), [*SHAPES[:4], (72, 64)])
    def test_unpacking_gives_back_what_was_packed(
        self, out_features: int, in_features: int
    ) -> None:
        qweight, absmax = random_matrix(out_features, in_features)
        unpacked = nf4_pack.unpack(nf4_pack.pack(qweight, absmax))
        torch.testing.assert_close(unpacked, (qweight, absmax), rtol=0, atol=0)

    def test_a_lane_finds_the_bytes_of_its_operand_together(self) -> None:
        qweight, absmax = random_matrix(512, 256)
        packed = nf4_pack.pack(qweight, absmax).packed
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
            at = (unit * 2 + half) * 2048 + m_tile * 512 + lane * 16 + step * 4 + register
            assert packed[tile, chunk, at] == qweight[row, column // 2]

    def test_padding_decodes_to_zero(self) -> None:
        weight = nf4_pack.pack(*random_matrix(72, 64))
        whole = PackedWeight(weight.packed, 256, 128)
        dequantized = nf4_pack.dequantize_reference(whole)
        assert dequantized[72:].count_nonzero() == 0
        assert dequantized[:, 64:].count_nonzero() == 0

    def test_a_group_without_absmax_is_zero_and_its_absmax_can_be_divided_by(self) -> None:
        qweight, absmax = random_matrix(64, 128)
        absmax[3, 1] = 0.0
        absmax[5, 0] = -1e-38
        weight = nf4_pack.pack(qweight, absmax)
        assert nf4_pack.unpack(weight)[1].abs().min() > 1e-30
        expected = plain_dequantize(qweight, absmax)
        expected[5, :64] = 0.0
        torch.testing.assert_close(nf4_pack.dequantize_reference(weight), expected)

    def test_inputs_that_do_not_fill_their_groups_are_refused(self) -> None:
        with pytest.raises(ValueError, match="multiples of 64, not 96"):
            nf4_pack.pack(torch.zeros(8, 48, dtype=torch.uint8), torch.zeros(8, 1))

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
    def test_the_linear_on_a_cpu_is_the_reference(self) -> None:
        qweight, absmax = random_matrix(72, 128)
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        y = nf4_linear.nf4_linear(x, nf4_pack.pack(qweight, absmax))
        expected = x.double() @ plain_dequantize(qweight, absmax).double().T
        assert y.dtype == torch.bfloat16
        assert relative_error(y, expected) < BF16_ROUNDING

    def test_the_level_factor_rounds_the_levels_better_than_none(self) -> None:
        levels = torch.tensor(LEVELS, dtype=torch.float64)

        def error(factor: float) -> float:
            return relative_error((levels * factor).float().bfloat16(), levels * factor)

        assert error(nf4_linear.LEVEL_FACTOR) < 6.4e-4 < 1.0e-3 < error(1.0)

    @pytest.mark.skipif(not nvrtc.is_available(), reason="needs NVRTC")
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
        self, arch: str, shared_limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        source, tiles = nf4_linear.kernel_source(arch, shared_limit)
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

    @pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
    def test_it_agrees_with_fp64_for_any_number_of_rows(
        self, out_features: int, in_features: int
    ) -> None:
        qweight, absmax = random_matrix(out_features, in_features, device="cuda")
        absmax[0, 0] = 0.0
        weight = nf4_pack.pack(qweight, absmax)
        x = torch.randn(400, in_features, device="cuda").bfloat16()
        expected = x.double() @ plain_dequantize(qweight, absmax).double().T
        for rows in (*self.ROWS, 384, 400):
            y = nf4_linear.nf4_linear(x[:rows], weight)
            assert relative_error(y, expected[:rows]) < BF16_ROUNDING, rows

    @pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
    def test_up_to_64_rows_a_row_has_the_same_bits_whatever_stands_beside_it(
        self, out_features: int, in_features: int
    ) -> None:
        weight = nf4_pack.pack(*random_matrix(out_features, in_features, device="cuda"))
        x = torch.randn(64, in_features, device="cuda").bfloat16()
        together = nf4_linear.nf4_linear(x, weight)
        for rows in self.ROWS[:10]:
            first = torch.randint(0, 65 - rows, ()).item()
            some = nf4_linear.nf4_linear(x[first : first + rows], weight)
            assert torch.equal(some, together[first : first + rows]), rows
        backwards = nf4_linear.nf4_linear(x.flip(0), weight)
        assert torch.equal(backwards.flip(0), together)

    @pytest.mark.parametrize("shared_limit", [101376, 166912])
    def test_kernels_for_lesser_cards_give_the_same_bits(self, shared_limit: int) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        portable = nf4_linear._Kernels(device, nvrtc.architecture(device), shared_limit)
        for out_features, in_features in SHAPES:
            weight = nf4_pack.pack(*random_matrix(out_features, in_features, device="cuda"))
            x = torch.randn(64, in_features, device="cuda").bfloat16()
            expected = nf4_linear.nf4_linear(x, weight)
            for rows in self.ROWS[:10]:
                slots = portable.split(weight).num_slots
                workspace = torch.full((slots, rows, out_features), torch.nan, device="cuda")
                y = torch.empty(rows, out_features, device="cuda", dtype=torch.bfloat16)
                portable.partial_sums(x[:rows], weight, workspace)
                portable.reduce(workspace, weight, y)
                assert torch.equal(y, expected[:rows]), (out_features, in_features, rows)

    def test_only_the_slots_of_a_tile_are_written_and_all_of_those(self) -> None:
        weight = nf4_pack.pack(*random_matrix(6144, 4096, device="cuda"))
        split = nf4_linear.split_of(weight)
        x = torch.randn(5, 4096, device="cuda").bfloat16()
        kernels = nf4_linear._kernels(x.device)
        workspace = torch.full((split.num_slots, 5, 6144), torch.nan, device="cuda")
        kernels.partial_sums(x, weight, workspace)
        for tile in range(6144 // 256):
            chunks = range(tile * split.chunks_per_tile, (tile + 1) * split.chunks_per_tile)
            used = split._worker(chunks[-1]) - split._worker(chunks[0]) + 1
            columns = workspace[:, :, tile * 256 : (tile + 1) * 256]
            assert not columns[:used].isnan().any()
            assert columns[used:].isnan().all()

    def test_rows_may_be_part_of_wider_ones(self) -> None:
        weight = nf4_pack.pack(*random_matrix(256, 576, device="cuda"))
        wide = torch.randn(20, 1024, device="cuda").bfloat16()
        part = wide[:, 128 : 128 + 576]
        expected = nf4_linear.nf4_linear(part.contiguous(), weight)
        assert torch.equal(nf4_linear.nf4_linear(part, weight), expected)

    def test_a_row_that_is_not_finite_stays_alone(self) -> None:
        weight = nf4_pack.pack(*random_matrix(256, 576, device="cuda"))
        x = torch.randn(20, 576, device="cuda").bfloat16()
        clean = nf4_linear.nf4_linear(x, weight)
        x[3] = torch.inf
        dirty = nf4_linear.nf4_linear(x, weight)
        others = [row for row in range(20) if row != 3]
        assert torch.equal(dirty[others], clean[others])

    @pytest.mark.parametrize(("out_features", "in_features"), SHAPES[:4])
    def test_dequantizing_rounds_each_weight_once(
        self, out_features: int, in_features: int
    ) -> None:
        qweight, absmax = random_matrix(out_features, in_features, device="cuda")
        expected = plain_dequantize(qweight, absmax).bfloat16()
        assert torch.equal(nf4_linear.dequantize(nf4_pack.pack(qweight, absmax)), expected)

    @pytest.mark.parametrize("rows", [1, 8, 33, 128])
    def test_a_captured_graph_gives_the_same_bits_when_replayed(self, rows: int) -> None:
        layers = [
            nf4_pack.pack(*random_matrix(1024, 1024, seed=seed, device="cuda")) for seed in range(4)
        ]
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
