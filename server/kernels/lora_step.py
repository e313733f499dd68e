"""Which token uses which adapter in one step, as the LoRA kernels read it."""

from collections.abc import Sequence

import numpy as np
import torch

from server.kernels.staging import HostBuffers, positions

PAGE_ROWS = 8  # rows of the banks in a page
DECODE_TOKENS = 64  # up to here a step is cut into small items and tiles only
FINISH_TOKENS = 512  # up to here a step is cut into small tiles too
NO_ADAPTER = -1
NO_GAIN = -1
SMALL_TILE, LARGE_TILE = 4, 64  # tokens of one adapter that expand goes through together

SMALL_ITEM, LARGE_ITEM = 8, 32  # tokens of one adapter that are shrunk together
_ITEM_PAGES = 2  # and pages
_RECORD = 12
# What 64 outputs of a small tile cost expand: with two pages at most, and each two pages more.
_COST, _MORE_COST, _MAX_COST, _COST_SHIFT = 8, 4, 255, 20


class LoraGpuStep:
    """Which token uses which adapter in one step, where the kernels read it.

    Filling it changes no address. `header` bounds everything else, so what an earlier, larger step
    left behind is never read. One record holds all that a block has to know.

    header       [8]   items; small tiles with an adapter, all small ones; the same of large ones;
                       costs of the small ones with an adapter, of all; the least of one
    items        [max_items, 4]    page, second page or -1; first position in token_order;
                                   tokens | place of the page among the adapter's << 16
    small_tiles  [max_small, 12]   up to 4 tokens of one adapter: the tokens; adapter or NO_ADAPTER,
                                   its number of pages, first and second page; bank row with DoRA's
                                   gain - 1 or NO_GAIN, tokens, first position in token_order,
                                   cost << 20 | costs of the tiles before
    large_tiles  [max_large, 12]   up to 64 tokens, likewise, without the tokens and costs
    page_table   [max_adapters, max_pages]
    token_order  [max_tokens]      tokens by adapter, those without one last
    """

    def __init__(
        self, *, max_tokens: int, max_adapters: int, max_pages: int, device: torch.device
    ) -> None:
        self.max_tokens, self.max_adapters, self.max_pages = max_tokens, max_adapters, max_pages
        few, many = min(max_tokens, DECODE_TOKENS), max_adapters + 1 + max_tokens // LARGE_ITEM
        self.max_small = min(max_tokens, FINISH_TOKENS)
        self.max_large = max_adapters + 1 + max_tokens // LARGE_TILE
        self.max_items = max(few, many) * -(-max_pages // _ITEM_PAGES)
        sizes = {
            "header": 8,
            "items": 4 * self.max_items,
            "small_tiles": _RECORD * self.max_small,
            "large_tiles": _RECORD * self.max_large,
            "page_table": max_adapters * max_pages,
            "token_order": max_tokens,
        }
        total = sum(sizes.values())
        self.device_buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self._host_buffers = HostBuffers((total,), device)
        self._filled_with: object = None
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, size in sizes.items():
            self._offsets[name] = offset
            offset += size

    def fill(
        self,
        adapter_of_token: Sequence[int],
        pages: Sequence[Sequence[int]],
        gain_rows: Sequence[int],
    ) -> None:
        """Describe the next step; the copy to the device is queued on the current stream.

        A step like the one before it, as most decode steps are, costs next to nothing.

        adapter_of_token  index into `pages` for each token (padding too), or NO_ADAPTER
        pages             each distinct adapter's pages in the banks, in the order of its rank rows
        gain_rows         each distinct adapter's bank row with DoRA's gain - 1, or NO_GAIN
        """
        assert len(adapter_of_token) <= self.max_tokens, "too many tokens for this step"
        assert len(pages) <= self.max_adapters, "too many adapters for this step"
        content = (list(adapter_of_token), [list(own) for own in pages], list(gain_rows))
        if content == self._filled_with:
            return
        self._filled_with = content
        host = self._host_buffers.next()
        self._write(host.numpy(), np.asarray(adapter_of_token, np.int32), pages, gain_rows)
        self.device_buffer.copy_(host, non_blocking=True)
        self._host_buffers.sent()

    def view(self, name: str) -> torch.Tensor:
        """One of the parts named above, flat, on the device."""
        starts = sorted([*self._offsets.values(), self.device_buffer.numel()])
        start = self._offsets[name]
        return self.device_buffer[start : starts[starts.index(start) + 1]]

    def addresses(self) -> tuple[int, ...]:
        """Device addresses in the order of the kernels' `Step`."""
        base = self.device_buffer.data_ptr()
        names = ("header", "items", "small_tiles", "large_tiles", "token_order", "page_table")
        return tuple(base + 4 * self._offsets[name] for name in names)

    def _write(
        self,
        buffer: np.ndarray,
        adapters: np.ndarray,
        pages: Sequence[Sequence[int]],
        gain_rows: Sequence[int],
    ) -> None:
        num_tokens, num_adapters = len(adapters), len(pages)
        table = np.full((num_adapters + 1, self.max_pages + 1), -1, np.int32)
        for adapter, own in enumerate(pages):
            table[adapter, : len(own)] = own
        num_pages = np.array([*map(len, pages), 0], np.int32)
        gains = np.array([*gain_rows, NO_GAIN], np.int32)
        ranked = np.where(adapters < 0, num_adapters, adapters)  # those without one last
        order = np.argsort(ranked, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(ranked, minlength=num_adapters + 1))
        header = np.zeros(8, np.int32)

        item_tokens = SMALL_ITEM if num_tokens <= DECODE_TOKENS else LARGE_ITEM
        owner, first, count = _tiles(ends[:-1], item_tokens)
        repeats = -(-num_pages[owner] // _ITEM_PAGES)
        place = positions(repeats) * _ITEM_PAGES
        owner, first, count = (np.repeat(part, repeats) for part in (owner, first, count))
        items = (table[owner, place], table[owner, place + 1], first, count | place << 16)
        header[0] = len(place)
        self._put(buffer, "items", np.stack(items, axis=1))

        for name, size, at, is_wanted in (
            ("small_tiles", SMALL_TILE, 1, num_tokens <= FINISH_TOKENS),
            ("large_tiles", LARGE_TILE, 3, num_tokens > DECODE_TOKENS),
        ):
            if not is_wanted:
                continue
            owner, first, count = _tiles(ends, size)
            records = np.zeros((len(owner), _RECORD), np.int32)
            position = np.minimum(first[:, None] + np.arange(4), num_tokens - 1)
            records[:, :4] = order[position]
            records[:, 4] = np.where(owner == num_adapters, NO_ADAPTER, owner)
            records[:, 5] = num_pages[owner]
            records[:, 6], records[:, 7] = table[owner, 0], table[owner, 1]
            records[:, 8], records[:, 9], records[:, 10] = gains[owner], count, first
            num_with_adapter = np.count_nonzero(owner < num_adapters)
            header[at : at + 2] = num_with_adapter, len(owner)
            if size == SMALL_TILE:
                further = np.maximum(num_pages - 1, 0) // 2  # pairs of pages of each adapter
                costs = np.minimum(_COST + _MORE_COST * further, _MAX_COST)[owner]
                records[:, 11] = costs << _COST_SHIFT | np.cumsum(costs) - costs
                with_adapter = costs[:num_with_adapter].sum()
                header[5:8] = with_adapter, costs.sum(), min(costs.tolist(), default=0)
            self._put(buffer, name, records)
        self._put(buffer, "header", header)
        self._put(buffer, "page_table", table[:num_adapters, : self.max_pages])
        self._put(buffer, "token_order", order)

    def _put(self, buffer: np.ndarray, name: str, values: np.ndarray) -> None:
        offset = self._offsets[name]
        buffer[offset : offset + values.size] = values.ravel()


def _tiles(ends: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut runs of tokens, each up to its end, into tiles: their run, start and length."""
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    repeats = -(-(ends - starts) // size)
    owner = np.repeat(np.arange(len(ends)), repeats)
    first = starts[owner] + positions(repeats) * size
    return owner, first, np.minimum(size, ends[owner] - first)
