"""Which keys each token of one step attends to, as the attention kernels read it."""

from collections.abc import Sequence

import numpy as np
import torch

from server.kernels.staging import HostBuffers, positions

MAX_SPLITS = 32  # work items of a decode row
SPLIT_KEYS = 128  # keys of a work item; doubled until a row has no more than MAX_SPLITS items
TILE_ROWS = 128  # queries of a prefill tile: tokens times the query heads that share a KV head

HEADER, RECORD = 8, 8  # numbers in the header, and in an item or a tile
NUM_ITEMS, NUM_TILES, NUM_DECODES, NUM_TOKENS = range(4)  # in the header
ROW, START, STOP, TABLE, SPLITS, FIRST_ITEM = range(6)  # in an item
FIRST, COUNT, POSITION = range(3)  # in a tile; TABLE is where an item has it

# First token in the step, num_tokens, tokens of context before them, block table.
Chunk = tuple[int, int, int, list[int]]


class AttentionGpuStep:
    """Which keys each token of one step attends to, where the kernels read it.

    Filling it changes no address. The header bounds everything else, so what an earlier, larger
    step left behind is never read. A decode row is cut into items at multiples of a length that
    its own context alone decides, so its bits do not depend on its neighbours.

    header   [8]               items; tiles; decode rows; tokens
    tiles    [max_tiles, 8]    first token; tokens; position of the first; block table; those with
                               most keys first
    items    [max_items, 8]    row; first key; end of keys; block table; items of this row, end to
                               end; the first of them
    tables   [max_blocks]      block ids, table by table, right behind the step's last item; a
                               record's block table is the place in `device_buffer` where it begins

    What programs hand on to each other lies here too, so a step's kernels run one after another.

    part_values  [max_items, num_heads, head_dim]  an item's values, weighted and summed
    part_sums    [max_items, 2, num_heads]         its highest scores; its sums of weights
    num_done     [max_decodes, num_kv_heads]       items of a row that are done; 0 between launches
    """

    def __init__(
        self,
        *,
        max_decodes: int,
        max_chunks: int,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int | None,
        device: torch.device,
    ) -> None:
        """`max_blocks` counts a block once for every row and chunk that has it in its table."""
        group = num_heads // num_kv_heads
        assert num_heads == group * num_kv_heads, "query heads do not divide among the KV heads"
        assert group <= TILE_ROWS, "too many query heads for a KV head"
        self.max_decodes, self.max_chunks, self.max_tokens = max_decodes, max_chunks, max_tokens
        self.max_blocks, self.block_size = max_blocks, block_size
        self.sliding_window = sliding_window
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.tile_tokens = TILE_ROWS // group
        self.max_items = max_decodes * MAX_SPLITS
        self.tiles_at = HEADER
        self.items_at = self.tiles_at + RECORD * self.max_tiles(max_tokens)
        total = self.items_at + RECORD * self.max_items + max_blocks
        self.device_buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self.part_values = torch.zeros((self.max_items, num_heads, head_dim), device=device)
        self.part_sums = torch.zeros((self.max_items, 2, num_heads), device=device)
        self.num_done = torch.zeros((max_decodes, num_kv_heads), dtype=torch.int32, device=device)
        self._host_buffers = HostBuffers((total,), device)
        # Each decode row's table as it was last seen: converting those that grew is enough.
        self._tables: list[tuple[list[int], np.ndarray]] = [
            ([], np.zeros(0, np.int32)) for _ in range(max_decodes)
        ]

    def max_tiles(self, num_tokens: int) -> int:
        """Most prefill tiles that a step of so many tokens can have."""
        return -(-num_tokens // self.tile_tokens) + min(self.max_chunks, num_tokens)

    def fill(
        self,
        decode_lengths: Sequence[int],
        decode_tables: Sequence[list[int]],
        chunks: Sequence[Chunk] = (),
    ) -> None:
        """Describe the next step; the copy to the device is queued on the current stream.

        Decode rows are the step's first tokens, chunks follow end to end.

        decode_lengths  tokens of context of each row, the new one included; 0: padding
        decode_tables   each row's block table, at least as long as its context needs
        chunks          parts of prompts
        """
        num_decodes = len(decode_lengths)
        assert num_decodes <= self.max_decodes, "too many decode rows for this step"
        assert len(decode_tables) == num_decodes, "each decode row needs one block table"
        assert len(chunks) <= self.max_chunks, "too many chunks for this step"
        tables = [self._as_array(row, table) for row, table in enumerate(decode_tables)]
        tables += [np.array(chunk[3], np.int32) for chunk in chunks]
        sizes = np.array([len(table) for table in tables], np.int64)
        lengths = np.array(decode_lengths, np.int64)
        spans = np.array([chunk[:3] for chunk in chunks], np.int64).reshape(-1, 3)
        num_tokens = self._check(lengths, spans, sizes)

        items, tiles = self._items(lengths), self._tiles(spans)
        tables_at = self.items_at + items.size
        starts = tables_at + np.cumsum(sizes) - sizes
        items[:, TABLE] = starts[items[:, ROW]]
        tiles[:, TABLE] = starts[num_decodes + tiles[:, TABLE]]
        end = tables_at + int(sizes.sum())

        pinned = self._host_buffers.next()
        host = pinned.numpy()
        host[:4] = len(items), len(tiles), num_decodes, num_tokens
        host[self.tiles_at : self.tiles_at + tiles.size] = tiles.ravel()
        host[self.items_at : tables_at] = items.ravel()
        if tables:
            np.concatenate(tables, out=host[tables_at:end])
        self.device_buffer[:end].copy_(pinned[:end], non_blocking=True)
        self._host_buffers.sent()

    def _as_array(self, row: int, table: list[int]) -> np.ndarray:
        known, array = self._tables[row]
        if known != table:
            array = np.array(table, np.int32)
            self._tables[row] = (list(table), array)
        return array

    def _check(self, lengths: np.ndarray, spans: np.ndarray, sizes: np.ndarray) -> int:
        """Return the number of tokens of a step that is sound."""
        first, num_tokens, context = spans.T
        ends = len(lengths) + np.cumsum(num_tokens)
        assert (first == ends - num_tokens).all(), "chunks follow the decode rows end to end"
        contexts = np.concatenate((lengths, context + num_tokens))
        assert (sizes * self.block_size >= contexts).all(), "a block table is too short"
        total = int(ends[-1]) if len(ends) else len(lengths)
        assert total <= self.max_tokens, "too many tokens for this step"
        assert sizes.sum() <= self.max_blocks, "too many blocks for this step"
        return total

    def _items(self, lengths: np.ndarray) -> np.ndarray:
        """Cut each row's visible keys at multiples of its own split; padding has one empty item."""
        window = self.sliding_window
        first = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
        last = np.maximum(lengths - 1, 0)
        split = np.full_like(lengths, SPLIT_KEYS)
        while (has_many := last // split - first // split >= MAX_SPLITS).any():
            split[has_many] *= 2
        count = last // split - first // split + 1
        row = np.repeat(np.arange(len(lengths)), count)
        begin = (first // split)[row] + positions(count)
        items = np.zeros((len(row), RECORD), np.int32)
        items[:, ROW] = row
        items[:, START] = np.maximum(begin * split[row], first[row])
        items[:, STOP] = np.minimum((begin + 1) * split[row], lengths[row])
        items[:, SPLITS] = count[row]
        items[:, FIRST_ITEM] = (np.cumsum(count) - count)[row]
        return items

    def _tiles(self, spans: np.ndarray) -> np.ndarray:
        """Cut chunks into tiles, the longest work first; TABLE holds the chunk's number for now."""
        if not len(spans):
            return np.zeros((0, RECORD), np.int32)
        first, num_tokens, context = spans.T
        repeats = -(-num_tokens // self.tile_tokens)
        chunk = np.repeat(np.arange(len(spans)), repeats)
        skipped = positions(repeats) * self.tile_tokens
        tiles = np.zeros((len(chunk), RECORD), np.int32)
        tiles[:, FIRST] = first[chunk] + skipped
        tiles[:, COUNT] = np.minimum(self.tile_tokens, num_tokens[chunk] - skipped)
        tiles[:, POSITION] = context[chunk] + skipped
        tiles[:, TABLE] = chunk
        num_keys = tiles[:, POSITION] + tiles[:, COUNT]
        if self.sliding_window is not None:
            num_keys = np.minimum(num_keys, self.sliding_window + tiles[:, COUNT] - 1)
        return tiles[np.argsort(-num_keys, kind="stable")]
