"""Paged attention: the step on any machine, the kernels interpreted on a CPU and real on a GPU.

Triton must be told before it is imported that it shall interpret, and other tests may have imported
it already: the interpreted tests run in a pytest of their own, which one test here starts.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from server.kernels.attention_step import (
    COUNT,
    FIRST,
    FIRST_ITEM,
    MAX_SPLITS,
    POSITION,
    RECORD,
    ROW,
    SPLIT_KEYS,
    SPLITS,
    START,
    STOP,
    TABLE,
    TILE_ROWS,
    AttentionGpuStep,
    Chunk,
)
from server.kernels.paged_attention import (
    AttentionStep,
    DecodeRows,
    PrefillChunk,
    paged_attention,
)
from tests.interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")
paged_attention_gpu: Any = pytest.importorskip("server.kernels.paged_attention_gpu")

HAS_GPU = torch.cuda.is_available() and not INTERPRETED
MAX_CHUNKS = 4

# Of the result, relative; weights are rounded before they meet the values.
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def make_step(
    *, window: int | None = None, block_size: int = 16, device: str = "cpu", **sizes: int
) -> AttentionGpuStep:
    usual = {
        "max_decodes": 16,
        "max_chunks": MAX_CHUNKS,
        "max_tokens": 512,
        "max_blocks": 4096,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    return AttentionGpuStep(
        **{**usual, **sizes},
        block_size=block_size,
        sliding_window=window,
        device=torch.device(device),
    )


def tables_for(lengths: Sequence[int], block_size: int = 16) -> list[list[int]]:
    """Tables that cover so many tokens each, of block ids that no other one has."""
    ids = itertools.count(7)
    return [[next(ids) for _ in range(-(-length // block_size))] for length in lengths]


def chunks_for(first: int, spans: Sequence[tuple[int, int]]) -> list[Chunk]:
    """Chunks of (context, num_tokens) each, end to end."""
    tables = tables_for([sum(span) for span in spans])
    chunks: list[Chunk] = []
    for (context, num_tokens), table in zip(spans, tables, strict=True):
        chunks.append((first, num_tokens, context, table))
        first += num_tokens
    return chunks


def records(step: AttentionGpuStep, start: int, count: int) -> list[list[int]]:
    rows: list[list[int]] = step.device_buffer[start:][: count * RECORD].view(-1, RECORD).tolist()
    return rows


def items(step: AttentionGpuStep) -> list[list[int]]:
    return records(step, step.items_at, int(step.device_buffer[0]))


def tiles(step: AttentionGpuStep) -> list[list[int]]:
    return records(step, step.tiles_at, int(step.device_buffer[1]))


def ids_at(step: AttentionGpuStep, record: list[int], count: int) -> list[int]:
    ids: list[int] = step.device_buffer[record[TABLE] :][:count].tolist()
    return ids


def cuts(step: AttentionGpuStep, row: int) -> list[list[int]]:
    return [[item[START], item[STOP]] for item in items(step) if item[ROW] == row]


class TestStep:
    LENGTHS = (1, 0, 16, 127, 128, 129, 1000, 4096, 4097, 9000, 32768)
    SPANS = ((7, 100), (0, 1), (64, 129), (5, 32))

    @pytest.mark.parametrize("window", [None, 1, 5, 300, 4096])
    def test_items_hold_each_visible_key_of_each_row_once(self, window: int | None) -> None:
        tables = tables_for(self.LENGTHS)
        step = make_step(window=window)
        step.fill(self.LENGTHS, tables)
        found = items(step)
        for row, length in enumerate(self.LENGTHS):
            own = [index for index, item in enumerate(found) if item[ROW] == row]
            assert own == list(range(own[0], own[0] + len(own)))
            keys = [key for at in own for key in range(found[at][START], found[at][STOP])]
            assert keys == list(range(max(0, length - (window or length)), length))
            assert len(own) <= MAX_SPLITS
            for at in own:
                assert (found[at][SPLITS], found[at][FIRST_ITEM]) == (len(own), own[0])
                assert ids_at(step, found[at], len(tables[row])) == tables[row]
        rows = len(self.LENGTHS)
        assert step.device_buffer[:4].tolist() == [len(found), 0, rows, rows]

    @pytest.mark.parametrize("window", [None, 300])
    def test_a_row_is_cut_alike_alone_and_among_others(self, window: int | None) -> None:
        mixed, alone = make_step(window=window), make_step(window=window)
        mixed.fill(self.LENGTHS, tables_for(self.LENGTHS))
        for row, length in enumerate(self.LENGTHS):
            alone.fill([length], tables_for([length]))
            assert cuts(alone, 0) == cuts(mixed, row)

    def test_a_row_that_grows_is_cut_at_the_same_keys(self) -> None:
        step = make_step()
        for length in (300, 301, 383):
            step.fill([length], tables_for([length]))
            first, second = SPLIT_KEYS, 2 * SPLIT_KEYS
            assert cuts(step, 0) == [[0, first], [first, second], [second, length]]

    @pytest.mark.parametrize("window", [None, 40])
    @pytest.mark.parametrize(("num_heads", "tile_tokens"), [(2, 128), (8, 32), (6, 42)])
    def test_tiles_hold_each_token_of_each_chunk_once(
        self, num_heads: int, tile_tokens: int, window: int | None
    ) -> None:
        step = make_step(num_heads=num_heads, window=window)
        chunks = chunks_for(3, self.SPANS)
        step.fill([1, 2, 3], tables_for([1, 2, 3]), chunks)
        seen: list[int] = []
        for tile in tiles(step):
            tokens = range(tile[FIRST], tile[FIRST] + tile[COUNT])
            (owner,) = (c for c in chunks if c[0] <= tokens[0] and tokens[-1] < c[0] + c[1])
            assert tile[POSITION] == owner[2] + tile[FIRST] - owner[0]
            assert ids_at(step, tile, len(owner[3])) == owner[3]
            assert len(tokens) <= tile_tokens
            seen += tokens
        assert sorted(seen) == list(range(3, 3 + 100 + 1 + 129 + 32))
        assert int(step.device_buffer[3]) == 3 + len(seen)

    def test_the_tiles_with_most_keys_come_first(self) -> None:
        chunks = chunks_for(0, [(0, 64), (400, 64), (100, 32)])
        unlimited = make_step(num_heads=8)
        unlimited.fill([], [], chunks)
        assert [tile[POSITION] for tile in tiles(unlimited)] == [432, 400, 100, 32, 0]
        limited = make_step(num_heads=8, window=60)  # 91, 91, 91, 64, 32 keys
        limited.fill([], [], chunks)
        assert [tile[POSITION] for tile in tiles(limited)] == [400, 432, 100, 32, 0]

    def test_tiles_without_work_are_enough_for_the_padding(self) -> None:
        step = make_step(num_heads=8)
        for sizes in itertools.product((1, 31, 32, 33), repeat=3):
            step.fill([], [], chunks_for(0, [(0, size) for size in sizes]))
            for num_tokens in range(sum(sizes), sum(sizes) + 70):
                idle = step.max_tiles(num_tokens) - len(tiles(step))
                assert idle * step.tile_tokens >= num_tokens - sum(sizes)

    def test_filling_again_moves_nothing_and_copies_only_what_is_used(self) -> None:
        step = make_step()
        before = step.device_buffer.data_ptr()
        step.fill([4000] * 10, tables_for([4000] * 10))
        step.device_buffer[step.items_at :] = -1
        step.fill([20], tables_for([20]))
        assert step.device_buffer.data_ptr() == before
        end = step.items_at + RECORD + 2
        assert step.device_buffer[end - 2 :][:3].tolist() == [7, 8, -1]
        step.fill([], [])
        assert step.device_buffer[:4].tolist() == [0] * 4

    def test_a_table_that_its_owner_changed_is_read_anew(self) -> None:
        step = make_step()
        tables = [[4, 5], [9]]
        step.fill([20, 10], tables)
        tables[0].append(6)
        tables[1] = [3]
        step.fill([40, 10], tables)
        assert [ids_at(step, item, 1) for item in items(step)] == [[4], [3]]
        assert ids_at(step, items(step)[0], 4) == [4, 5, 6, 3]

    def test_the_worst_batch_fits(self) -> None:
        length = 32 * SPLIT_KEYS  # as many items as a row can have
        step = make_step(max_blocks=16 * length // 16)
        step.fill([length] * 16, tables_for([length] * 16))
        assert len(items(step)) == step.max_items

    def test_more_than_fits_is_refused(self) -> None:
        step = make_step(max_decodes=2, max_chunks=1, max_tokens=20, max_blocks=3)
        with pytest.raises(AssertionError, match="too many decode rows"):
            step.fill([1] * 3, [[0]] * 3)
        with pytest.raises(AssertionError, match="too many chunks"):
            step.fill([], [], chunks_for(0, [(0, 1), (0, 1)]))
        with pytest.raises(AssertionError, match="too many tokens"):
            step.fill([], [], chunks_for(0, [(0, 21)]))
        with pytest.raises(AssertionError, match="too many blocks"):
            step.fill([33, 1], [[0, 1, 2], [0]])

    def test_a_step_that_does_not_hold_together_is_refused(self) -> None:
        step = make_step()
        with pytest.raises(AssertionError, match="one block table"):
            step.fill([1, 1], [[0]])
        with pytest.raises(AssertionError, match="table is too short"):
            step.fill([17], [[0]])
        with pytest.raises(AssertionError, match="table is too short"):
            step.fill([], [], [(0, 2, 15, [0])])
        with pytest.raises(AssertionError, match="end to end"):
            step.fill([1], [[0]], chunks_for(2, [(0, 4)]))
        with pytest.raises(AssertionError, match="do not divide"):
            make_step(num_heads=5)


@dataclass(frozen=True)
class Case:
    """Requests over a cache in which all that is nobody's is NaN."""

    q: torch.Tensor  # a part of a wider tensor, as it comes out of qkv
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lengths: list[int]
    tables: list[list[int]]
    chunks: list[Chunk]
    window: int | None

    def __len__(self) -> int:
        return len(self.q)


def make_case(
    lengths: Sequence[int],
    spans: Sequence[tuple[int, int]] = (),
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 16,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Decode rows of so many tokens of context, and chunks of (context, num_tokens)."""
    generator = torch.Generator(device).manual_seed(sum(lengths) + head_dim)
    num_heads, num_kv_heads = heads
    contexts = [*lengths, *(sum(span) for span in spans)]
    sizes = [-(-context // block_size) for context in contexts]
    num_blocks = sum(sizes) + 2
    free = torch.randperm(num_blocks, generator=generator, device=device).tolist()
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    slots = [
        table[at // block_size] * block_size + at % block_size
        for table, context in zip(tables, contexts, strict=True)
        for at in range(context)
    ]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def cache() -> torch.Tensor:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        whole = torch.full(shape, torch.nan, dtype=dtype, device=device)
        whole.view(-1, num_kv_heads, head_dim)[slots] = normal(len(slots), num_kv_heads, head_dim)
        return whole

    num_tokens = len(lengths) + sum(num for _, num in spans)
    firsts = itertools.accumulate((num for _, num in spans), initial=len(lengths))
    chunks = [
        (first, num, context, table)
        for first, (context, num), table in zip(firsts, spans, tables[len(lengths) :], strict=False)
    ]
    q = normal(num_tokens, num_heads + 2 * num_kv_heads, head_dim)[:, :num_heads]
    return Case(q, cache(), cache(), [*lengths], tables[: len(lengths)], chunks, window)


def step_for(case: Case, **sizes: int) -> AttentionGpuStep:
    return make_step(
        window=case.window,
        block_size=case.k_cache.shape[1],
        device=case.q.device.type,
        num_heads=case.q.shape[1],
        num_kv_heads=case.k_cache.shape[2],
        head_dim=case.q.shape[2],
        **{"max_tokens": len(case) + 64, "max_blocks": 16384, "max_decodes": 64, **sizes},
    )


def launch(
    case: Case,
    step: AttentionGpuStep,
    q: torch.Tensor | None = None,
    *,
    with_decodes: bool = True,
    with_chunks: bool = True,
) -> torch.Tensor:
    q = case.q if q is None else q
    result: torch.Tensor = paged_attention_gpu.paged_attention_gpu(
        q,
        case.k_cache,
        case.v_cache,
        step,
        case.window,
        with_decodes=with_decodes,
        with_chunks=with_chunks,
        out=torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device),
    )
    return result


def run(case: Case, step: AttentionGpuStep | None = None, padding: int = 0) -> torch.Tensor:
    """The kernels' answer; `padding` tokens of NaN stand behind the step's own."""
    step = step or step_for(case)
    step.fill(case.lengths, case.tables, case.chunks)
    q = case.q
    if padding:
        q = torch.cat((q, torch.full_like(q[:1], torch.nan).expand(padding, -1, -1)))
    return launch(case, step, q, with_decodes=bool(case.lengths), with_chunks=bool(case.chunks))


def reference(case: Case) -> torch.Tensor:
    """The reference op in fp32; rows without context are zeros."""
    device = case.q.device
    longest = max((len(table) for table in case.tables), default=0) or 1
    padded = [table + [0] * (longest - len(table)) for table in case.tables]
    lengths = torch.tensor(case.lengths, device=device)
    decode = None
    if case.lengths:
        decode = DecodeRows(torch.tensor(padded, device=device), lengths.clamp(min=1))
    chunks = tuple(
        PrefillChunk(first, num, context, torch.tensor(table, device=device))
        for first, num, context, table in case.chunks
    )
    k, v = (cache.float().nan_to_num() for cache in (case.k_cache, case.v_cache))
    step = AttentionStep(decode, chunks)
    out = paged_attention(case.q.float().contiguous(), k, v, step, case.window)
    out[: len(lengths)][lengths == 0] = 0
    return out


def assert_close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Each token and head on its own, so that no long row hides a short one."""
    difference = (result[: len(expected)].float() - expected).norm(dim=-1)
    assert (difference <= ROUNDING[result.dtype] * (expected.norm(dim=-1) + 0.1)).all()
    assert not result[len(expected) :].any()  # padding is zeros


def assert_same_alone(case: Case, together: torch.Tensor) -> None:
    """Each row and each chunk gives the same bits in a step of its own."""
    step = step_for(case)
    for row, length in enumerate(case.lengths):
        step.fill([length], [case.tables[row]])
        alone = launch(case, step, case.q[row : row + 1], with_chunks=False)
        assert torch.equal(alone[0], together[row])
    for first, num_tokens, context, table in case.chunks:
        step.fill([], [], [(0, num_tokens, context, table)])
        tokens = slice(first, first + num_tokens)
        alone = launch(case, step, case.q[tokens], with_decodes=False)
        assert torch.equal(alone, together[tokens])


def compiled(kernel: Any, arch: int, constants: dict[str, int], **options: int) -> Any:
    """A kernel as the op compiles it for bf16, aligned pointers and usual strides."""
    types = {"step": "*i32", "num_done": "*i32", "part_values": "*fp32", "part_sums": "*fp32"}
    types |= dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*bf16")
    types |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    divisible = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("_stride")
    ]
    source = sys.modules["triton.compiler"].ASTSource(
        kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in divisible}
    )
    target = sys.modules["triton.backends.compiler"].GPUTarget("cuda", arch, 32)
    return sys.modules["triton"].compile(source, target=target, options=options)


@pytest.mark.skipif(INTERPRETED, reason="compiles what is not interpreted")
@pytest.mark.parametrize(
    ("arch", "shared_kib", "is_large"),
    [(80, 163, True), (86, 99, False), (89, 99, False), (90, 227, True), (120, 99, False)],
)
def test_the_kernels_compile_for_each_architecture_and_fit_its_shared_memory(
    arch: int, shared_kib: int, is_large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    op = paged_attention_gpu
    shape = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16}
    decode = {"ITEMS": 264, "GROUP_ROWS": 16, "TILE_KEYS": op._DECODE_KEYS, "PADS": 1}
    decode |= {"MERGED_ROWS": 4, "MERGED_SPLITS": op._MERGED_SPLITS}
    keys, stages = op._PREFILL_LARGE if is_large else op._PREFILL_SMALL
    prefill = {"TILES": 8, "WINDOW": 4096, "TILE_ROWS": TILE_ROWS, "TILE_KEYS": keys}
    for kernel, constants, options in (
        (op._decode, decode, op._DECODE_OPTIONS),
        (op._prefill, prefill, {"num_warps": op._PREFILL_WARPS, "num_stages": stages}),
    ):
        done = compiled(kernel, arch, shape | constants, **options)
        assert done.metadata.shared <= shared_kib << 10
        assert "cp.async" in done.asm["ptx"]  # keys and values are prefetched


@pytest.mark.slow
def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    assert "skipped" not in run_interpreted("-k", "TestInterpreted", __file__)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
class TestInterpreted:
    LENGTHS = (1, 0, 15, 16, 17, 127, 128, 129, 300)

    @pytest.fixture(autouse=True)
    def _index_of_a_scalar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interpreter keeps scalars in arrays of one, which numpy 2.4 takes for no index."""
        interpreter = sys.modules["triton.runtime.interpreter"]
        patch_tensor = interpreter._patch_lang_tensor

        def patch(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)

    @pytest.mark.parametrize("window", [None, 20, 150])
    @pytest.mark.parametrize(
        ("heads", "head_dim", "block_size"),
        [((4, 2), 16, 16), ((2, 2), 64, 4), ((3, 1), 32, 256), ((20, 1), 16, 16)],
    )
    def test_decode_agrees_with_the_reference(
        self, heads: tuple[int, int], head_dim: int, block_size: int, window: int | None
    ) -> None:
        case = make_case(
            self.LENGTHS, heads=heads, head_dim=head_dim, block_size=block_size, window=window
        )
        assert_close(run(case, padding=3), reference(case))

    @pytest.mark.parametrize("window", [None, 1, 20, 50])
    @pytest.mark.parametrize(
        ("heads", "head_dim", "block_size"),
        [((4, 2), 16, 16), ((2, 2), 64, 4), ((3, 1), 32, 256), ((20, 1), 16, 16)],
    )
    def test_chunks_agree_with_the_reference(
        self, heads: tuple[int, int], head_dim: int, block_size: int, window: int | None
    ) -> None:
        spans = [(0, 1), (0, 70), (33, 40), (100, 5)]
        case = make_case(
            [], spans, heads=heads, head_dim=head_dim, block_size=block_size, window=window
        )
        assert_close(run(case, padding=150), reference(case))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_decode_rows_and_chunks_share_a_step(self, dtype: torch.dtype) -> None:
        case = make_case([130, 5, 0], [(20, 30), (0, 3)], dtype=dtype)
        assert_close(run(case, padding=9), reference(case))

    @pytest.mark.parametrize("length", [1023, 4097, 8500])
    def test_a_long_row_is_merged_from_its_parts(self, length: int) -> None:
        case = make_case([length, 200], heads=(2, 1))
        assert_close(run(case), reference(case))

    def test_a_row_without_context_is_zeros_whatever_the_query(self) -> None:
        case = make_case([0, 4])
        case.q[0] = torch.nan
        assert not run(case)[0].any()

    def test_a_row_has_the_same_bits_whatever_stands_beside_it(self) -> None:
        case = make_case([300, 1, 140], [(50, 40), (0, 9)], dtype=torch.float16)
        assert_same_alone(case, run(case))

    def test_what_an_earlier_step_left_behind_is_not_read(self) -> None:
        small = make_case([140, 3], [(8, 30)])
        large = make_case([200, 600, 90, 17], [(0, 60), (40, 33)])
        step = step_for(large)
        assert_close(run(large, step), reference(large))
        for scratch in (step.part_values, step.part_sums):
            scratch.fill_(torch.nan)
        expected = run(small)
        assert torch.equal(run(small, step), expected)
        assert torch.equal(run(small, step), expected)
        assert not step.num_done.any()

    def test_a_step_made_for_something_else_is_refused(self) -> None:
        case = make_case([4])
        for step in (make_step(window=9), make_step(block_size=8), make_step(num_heads=2)):
            step.fill([4], [[0]])
            with pytest.raises(AssertionError, match="the step was made for"):
                launch(case, step)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
class TestOnGpu:
    LENGTHS = (1, 0, 16, 127, 128, 129, 384, 1000, 4095, 4096, 4097, 5000)
    SPANS = ((0, 300), (0, 1), (5000, 64), (17, 1000))
    SHAPES = (((32, 8), 128), ((9, 3), 64), ((8, 8), 128), ((16, 1), 64))

    def make(
        self,
        lengths: Sequence[int],
        spans: Sequence[tuple[int, int]] = (),
        *,
        heads: tuple[int, int] = (32, 8),
        head_dim: int = 128,
        block_size: int = 16,
        window: int | None = None,
    ) -> Case:
        return make_case(
            lengths,
            spans,
            heads=heads,
            head_dim=head_dim,
            block_size=block_size,
            window=window,
            dtype=torch.bfloat16,
            device="cuda",
        )

    @pytest.mark.parametrize("window", [None, 100, 4096])
    @pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
    def test_decode_agrees_with_the_reference(
        self, heads: tuple[int, int], head_dim: int, window: int | None
    ) -> None:
        case = self.make(self.LENGTHS, heads=heads, head_dim=head_dim, window=window)
        assert_close(run(case, padding=5), reference(case))

    @pytest.mark.parametrize("window", [None, 100, 4096])
    @pytest.mark.parametrize(("heads", "head_dim"), SHAPES)
    def test_chunks_agree_with_the_reference(
        self, heads: tuple[int, int], head_dim: int, window: int | None
    ) -> None:
        case = self.make([], self.SPANS, heads=heads, head_dim=head_dim, window=window)
        assert_close(run(case, padding=60), reference(case))

    @pytest.mark.parametrize("block_size", [8, 32, 256])
    def test_any_block_size_will_do(self, block_size: int) -> None:
        case = self.make([700, 3], [(90, 200)], block_size=block_size)
        assert_close(run(case), reference(case))

    def test_a_context_of_32k_is_served(self) -> None:
        case = self.make([32768, 10])
        assert_close(run(case), reference(case))

    def test_a_chunk_far_into_a_long_context_is_served(self) -> None:
        case = self.make([3], [(30000, 50), (0, 2048)])
        assert_close(run(case), reference(case))

    def test_a_row_has_the_same_bits_whatever_stands_beside_it(self) -> None:
        case = self.make(self.LENGTHS, self.SPANS)
        assert_same_alone(case, run(case))

    def test_the_same_step_gives_the_same_bits_each_time(self) -> None:
        case = self.make([384] * 60 + [3000] * 4)
        step = step_for(case)
        first = run(case, step)
        assert all(torch.equal(launch(case, step, with_chunks=False), first) for _ in range(200))
        assert not step.num_done.any()

    @pytest.mark.parametrize("with_chunks", [False, True])
    def test_a_replayed_graph_follows_the_step_and_ignores_stale_tails(
        self, with_chunks: bool
    ) -> None:
        pool = self.make([5000] * 8, [(0, 80), (40, 40)])
        chunks = pool.chunks if with_chunks else []
        num_tokens = 128 if with_chunks else 8
        step = step_for(pool)
        q = torch.randn(num_tokens, 32, 128, device="cuda").bfloat16()

        def fill(lengths: list[int], num_chunks: int) -> None:
            first, own = len(lengths), []
            for _, num, context, table in chunks[:num_chunks]:
                own.append((first, num, context, table))
                first += num
            step.fill(lengths, pool.tables[: len(lengths)], own)

        fill([5000] * 8, 2)
        launch(pool, step, q, with_chunks=with_chunks)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = launch(pool, step, q, with_chunks=with_chunks)
        steps = [
            ([5000] * 8, 2),
            ([7, 0, 900], 1),
            ([1], 0),
            ([4999, 300, 128, 20] * 2, 2),
            ([], 0),
        ]
        for lengths, num_chunks in steps:
            fill(lengths, num_chunks)
            q.normal_()
            graph.replay()
            fresh = step_for(pool)
            fresh.device_buffer.copy_(step.device_buffer)
            assert torch.equal(out, launch(pool, fresh, q, with_chunks=with_chunks))
            assert not out.isnan().any()
            tokens = int(step.device_buffer[3])
            assert not out[tokens:].any()
            assert out[:tokens].any() == (tokens > 0)
