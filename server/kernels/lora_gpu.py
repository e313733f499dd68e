"""LoRA on the GPU for a batch whose tokens use different adapters, at each adapter's true rank.

An adapter holds pages of `PAGE_ROWS` rows of the banks, anywhere in them. What a step needs to know
is made once on the host and lies in static device buffers (`LoraGpuStep`), so captured graphs read
the numbers of the step in which they are replayed. A token's result does not depend on its
neighbours; steps of up to `DECODE_TOKENS` tokens and longer ones sum in different orders.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from server.kernels.nf4_linear import SplitK
from server.kernels.nvrtc import Kernel, Module, architecture, compiled

PAGE_ROWS = 8
DECODE_TOKENS = 64  # up to here small tiles throughout
FINISH_TOKENS = 512  # up to here `finish` can be used
NO_ADAPTER = -1
NO_GAIN = -1
MAX_SUBLINEARS = 4

_SMALL_TILE, _LARGE_TILE = 4, 64  # tokens of `expand`'s tiles
_SMALL_ITEM, _LARGE_ITEM, _ITEM_PAGES = 8, 32, 2  # tokens and pages of `shrink`'s items
_BLOCK_COLUMNS = 256  # outputs that a block of `expand` is for
_RECORD = 12
_HOST_BUFFERS = (
    3  # a copy of an earlier step may still be under way when the next step is filled in
)
_MAX_BLOCKS = 2112
_KERNELS = Path(__file__).parent


class LoraGpuStep:
    """Which token uses which adapter in one step, where the kernels read it.

    Filling it changes no address. `header` bounds everything else, so what an earlier, larger step
    left behind is never read. One record holds all that a block has to know.

    header       [8]   items; small tiles with an adapter, all small ones; the same of large ones
    items        [max_items, 4]    page, second page or -1; first position in token_order;
                                   tokens | place of the page among the adapter's << 16
    small_tiles  [max_small, 12]   up to 4 tokens of one adapter: the tokens; adapter or NO_ADAPTER,
                                   its number of pages, first and second page; bank row with DoRA's
                                   gain - 1 or NO_GAIN, tokens, first position in token_order, 0
    large_tiles  [max_large, 12]   up to 64 tokens, likewise, without the tokens
    page_table   [max_adapters, max_pages]
    token_order  [max_tokens]      tokens by adapter, those without one last
    """

    def __init__(
        self, *, max_tokens: int, max_adapters: int, max_pages: int, device: torch.device
    ) -> None:
        self.max_tokens, self.max_adapters, self.max_pages = max_tokens, max_adapters, max_pages
        few, many = min(max_tokens, DECODE_TOKENS), max_adapters + 1 + max_tokens // _LARGE_ITEM
        self.max_small = min(max_tokens, FINISH_TOKENS)
        self.max_large = max_adapters + 1 + max_tokens // _LARGE_TILE
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
        self._host_buffers = [
            torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
            for _ in range(_HOST_BUFFERS)
        ]
        self._next_host_buffer = 0
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

        adapter_of_token  index into `pages` for each token (padding too), or NO_ADAPTER
        pages             each distinct adapter's pages in the banks, in the order of its rank rows
        gain_rows         each distinct adapter's bank row with DoRA's gain - 1, or NO_GAIN
        """
        assert len(adapter_of_token) <= self.max_tokens, "too many tokens for this step"
        assert len(pages) <= self.max_adapters, "too many adapters for this step"
        host = self._host_buffers[self._next_host_buffer]
        self._next_host_buffer = (self._next_host_buffer + 1) % _HOST_BUFFERS
        self._write(host.numpy(), np.asarray(adapter_of_token, np.int32), pages, gain_rows)
        self.device_buffer.copy_(host, non_blocking=True)

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

        item_tokens = _SMALL_ITEM if num_tokens <= DECODE_TOKENS else _LARGE_ITEM
        owner, first, count = _tiles(ends[:-1], item_tokens)
        repeats = -(-num_pages[owner] // _ITEM_PAGES)
        place = _positions(repeats) * _ITEM_PAGES
        owner, first, count = (np.repeat(part, repeats) for part in (owner, first, count))
        items = (table[owner, place], table[owner, place + 1], first, count | place << 16)
        header[0] = len(place)
        self._put(buffer, "items", np.stack(items, axis=1))

        for name, size, at, is_wanted in (
            ("small_tiles", _SMALL_TILE, 1, num_tokens <= FINISH_TOKENS),
            ("large_tiles", _LARGE_TILE, 3, num_tokens > DECODE_TOKENS),
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
            header[at : at + 2] = np.count_nonzero(owner < num_adapters), len(owner)
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
    first = starts[owner] + _positions(repeats) * size
    return owner, first, np.minimum(size, ends[owner] - first)


def _positions(repeats: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each of `repeats` in turn, end to end."""
    starts: np.ndarray = np.repeat(np.cumsum(repeats) - repeats, repeats)
    positions: np.ndarray = np.arange(len(starts)) - starts
    return positions


def shrink(x: torch.Tensor, a_bank: torch.Tensor, step: LoraGpuStep) -> torch.Tensor:
    """Project each token down to the rank of its own adapter.

        h[:, t, s, j].sum(0) = x[t] @ a_bank[row j of t's adapter, s]

    x        [num_tokens, in]                   bf16; num_tokens as the step was filled
    a_bank   [num_bank_rows, sublinears, in]    bf16; the first two strides are free
    returns  [slices, num_tokens, sublinears, max_pages * PAGE_ROWS]  fp32, in parts over the
             inputs; only what belongs to a token's own adapter is written
    """
    num_tokens, in_features = x.shape
    is_decode = num_tokens <= DECODE_TOKENS
    slice_in = _slice_in(in_features)
    slices, sublinears = -(-in_features // slice_in), a_bank.shape[1]
    assert x.dtype == a_bank.dtype == torch.bfloat16, "x and the bank are bf16"
    assert x.stride(1) == a_bank.stride(2) == 1, "rows of x and of the bank are contiguous"
    width = step.max_pages * PAGE_ROWS
    h = torch.empty((slices, num_tokens, sublinears, width), device=x.device)
    usual_items = max(4, num_tokens)  # of rank 16; a block takes more in turn
    blocks = min(step.max_items, usual_items, max(1, _MAX_BLOCKS // (slices * sublinears)))
    kernels = _kernels(x.device)
    kernels.shrink[is_decode](
        (blocks, sublinears, slices),
        kernels.device_index,
        *step.addresses(),
        step.max_pages,
        num_tokens,
        x.data_ptr(),
        a_bank.data_ptr(),
        h.data_ptr(),
        x.stride(0),
        a_bank.stride(0),
        a_bank.stride(1),
        in_features,
        slice_in,
    )
    return h


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    b_bank: torch.Tensor,
    out_splits: tuple[int, ...],
    step: LoraGpuStep,
    *,
    residual: torch.Tensor | None = None,
) -> None:
    """Add to each row of `y`, in place, what the row's own adapter adds; other rows stay.

        y[t, c] += h[:, t, s(c), j].sum(0) @ b_bank[row j of t's adapter, c]
        y[t, c] += y[t, c] * b_bank[gain row of t's adapter, c]

    y           [num_tokens, out]      bf16
    h           as `shrink` returns it
    b_bank      [num_bank_rows, out]   bf16; row j is B's column j, scaling folded in
    out_splits  outputs of each sublinear; s(c) is the one that output c is in
    residual    [num_tokens, out]      bf16; added to every row, last
    """
    _run_expand("expand", y, h, b_bank, out_splits, step, linear=y, residual=residual)


def expand_silu(
    gate_up: torch.Tensor, h: torch.Tensor | None, b_bank: torch.Tensor, step: LoraGpuStep
) -> torch.Tensor:
    """What `expand` would make of `gate_up` [num_tokens, 2 * width], then silu(gate) * up."""
    num_tokens, out_features = gate_up.shape
    y = gate_up.new_empty((num_tokens, out_features // 2))
    splits = (out_features // 2, out_features // 2)
    _run_expand("expand_silu", y, h, b_bank, splits, step, linear=gate_up)
    return y


def finish(
    workspace: torch.Tensor,
    split: SplitK,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    residual: torch.Tensor | None = None,
    with_silu: bool = False,
) -> torch.Tensor:
    """Finish a split-K linear: add its partial sums, LoRA, DoRA's gain and the residual in one go.

    workspace  [slots, num_tokens, out]  fp32, from `nf4_linear.partial_sums`
    split      of the same linear
    step       None where no token has an adapter; then h and b_bank are None too
    residual   [num_tokens, out]         bf16; added last
    with_silu  the linear is gate and up side by side: return silu(gate) * up
    returns    [num_tokens, out], or [num_tokens, out / 2] with_silu; bf16
    """
    _, num_tokens, out_features = workspace.shape
    assert num_tokens <= FINISH_TOKENS, "finish is for steps of few tokens"
    columns = out_features // 2 if with_silu else out_features
    y = torch.empty((num_tokens, columns), dtype=torch.bfloat16, device=workspace.device)
    name = "finish_silu" if with_silu else "finish"
    _run_expand(
        name, y, h, b_bank, out_splits, step, workspace=workspace, split=split, residual=residual
    )
    return y


def add_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a_bank: torch.Tensor,
    b_bank: torch.Tensor,
    out_splits: tuple[int, ...],
    adapter_of_token: Sequence[int],
    pages: Sequence[Sequence[int]],
    gain_rows: Sequence[int],
) -> torch.Tensor:
    """`shrink` and `expand` in plain PyTorch: what `y` becomes, in the dtype of `y`."""
    y = y.clone()
    for token, adapter in enumerate(adapter_of_token):
        if adapter == NO_ADAPTER:
            continue
        rows = [page * PAGE_ROWS + row for page in pages[adapter] for row in range(PAGE_ROWS)]
        first = 0
        for sublinear, width in enumerate(out_splits):
            columns = slice(first, first + width)
            h = a_bank[rows, sublinear].to(y.dtype) @ x[token].to(y.dtype)
            y[token, columns] += h @ b_bank[rows, columns].to(y.dtype)
            first += width
        if gain_rows[adapter] != NO_GAIN:
            y[token] += y[token] * b_bank[gain_rows[adapter]].to(y.dtype)
    return y


def kernel_source() -> str:
    """The CUDA source; it compiles for sm_80 on."""
    return "\n".join((_KERNELS / name).read_text() for name in ("common.cuh", "lora_gpu.cu"))


def _slice_in(in_features: int) -> int:
    """Inputs that one block sums; a function of the shape alone."""
    return 1024 if in_features <= 8192 else 2048


def _run_expand(
    name: str,
    y: torch.Tensor,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    linear: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    split: SplitK | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    num_tokens, columns = y.shape
    out_features = sum(out_splits)
    assert len(out_splits) <= MAX_SUBLINEARS, "too many sublinears"
    assert all(width % 8 == 0 for width in out_splits), "sublinears have multiples of 8 outputs"
    assert y.is_contiguous(), "y is contiguous"
    if step is None:
        addresses: tuple[int, ...] = (0,) * 6
        max_pages, slices, bank_stride = 0, 0, 0
    else:
        assert h is not None, "a step with adapters needs h"
        assert b_bank is not None, "a step with adapters needs the bank"
        addresses, max_pages = step.addresses(), step.max_pages
        slices, bank_stride = h.shape[0], b_bank.stride(0)
    is_large = workspace is None and num_tokens > DECODE_TOKENS
    blocks_x = -(-columns // _BLOCK_COLUMNS)
    if is_large:
        tiles = num_tokens // _LARGE_TILE + 1 + (step.max_adapters if step else 0)
    else:
        tiles = num_tokens if step else -(-num_tokens // _SMALL_TILE)
    rounds = -(-tiles * blocks_x // _MAX_BLOCKS)  # that a block goes through, all blocks as many
    blocks_y = -(-tiles // rounds)
    ends = np.cumsum(out_splits).tolist()
    kernels = _kernels(y.device)
    kernels.expand(name, is_large, max_pages)(
        (blocks_x, blocks_y, 1),
        kernels.device_index,
        *addresses,
        max_pages,
        num_tokens,
        _address(h),
        _address(b_bank),
        _address(workspace),
        _address(linear),
        _address(residual),
        y.data_ptr(),
        bank_stride,
        out_features,
        len(out_splits),
        slices,
        *(ends + [out_features] * (MAX_SUBLINEARS - len(ends))),
        *((split.chunks_per_tile, split.num_chunks, split.num_workers) if split else (1, 1, 1)),
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Kernels:
    """The compiled kernels of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device_index = 0 if device.index is None else device.index
        self._module = Module(compiled(kernel_source(), architecture(device)))
        self._is_dependent = torch.cuda.get_device_capability(device)[0] >= 9
        self._expand: dict[tuple[str, bool, int], Kernel] = {}
        self.shrink = {
            is_decode: self._kernel(f"shrink_{size}", "3P3q2i", threads=256)
            for is_decode, size in ((True, "small"), (False, "large"))
        }

    def expand(self, name: str, is_large: bool, max_pages: int) -> Kernel:
        """A kernel of the expand family; with large tiles it holds every rank of h on the chip."""
        key = (name, is_large, max_pages)
        if key not in self._expand:
            size = "large" if is_large else "small"
            parts = 2 if name == "expand_silu" else 1
            pitch = -(-max_pages // 2) * PAGE_ROWS + 4
            shared_bytes = parts * _LARGE_TILE * pitch * 4 if is_large else 0
            self._expand[key] = self._kernel(
                f"{name}_{size}", "6Pq3i4i3i", threads=128, shared_bytes=shared_bytes
            )
        return self._expand[key]

    def _kernel(self, name: str, params: str, *, threads: int, shared_bytes: int = 0) -> Kernel:
        return Kernel(
            self._module.function(f"lora_{name}"),
            "6P2i" + params,
            threads=threads,
            shared_bytes=shared_bytes,
            is_dependent=self._is_dependent,
        )


def _kernels(device: torch.device) -> _Kernels:
    return _kernels_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _kernels_of(device_index: int) -> _Kernels:
    return _Kernels(torch.device("cuda", device_index))
