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

from server.kernels.lora_step import (
    DECODE_TOKENS,
    FINISH_TOKENS,
    LARGE_TILE,
    NO_ADAPTER,
    NO_GAIN,
    PAGE_ROWS,
    SMALL_TILE,
    LoraGpuStep,
)
from server.kernels.nf4_pack import SplitK
from server.kernels.nvrtc import Kernel, Module, architecture, compiled

MAX_SUBLINEARS = 4

_SMALL_COLUMNS, _LARGE_COLUMNS = 64, 512  # outputs at a time of a warp, and of a block
_SHRINK_BLOCKS = _LARGE_BLOCKS = 2112  # at most so many; then each does more in turn
_KERNELS = Path(__file__).parent


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
    blocks = min(step.max_items, usual_items, max(1, _SHRINK_BLOCKS // (slices * sublinears)))
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
    return "\n".join(
        (_KERNELS / name).read_text() for name in ("common.cuh", "lora_shrink.cu", "lora_expand.cu")
    )


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
    kernels = _kernels(y.device)
    if is_large:
        blocks_x = -(-columns // _LARGE_COLUMNS)
        tiles = num_tokens // LARGE_TILE + 1 + (step.max_adapters if step else 0)
        blocks_y = -(-tiles // -(-tiles * blocks_x // _LARGE_BLOCKS))  # all go through as many
    else:
        tiles = num_tokens if step else -(-num_tokens // SMALL_TILE)
        # As many blocks as run at a time: 3 on a multiprocessor, of `expand` 4.
        at_a_time = kernels.num_multiprocessors * (4 if name == "expand" else 3)
        blocks_x = min(at_a_time, -(-tiles * columns // _SMALL_COLUMNS))
        blocks_y = 1
    ends = np.cumsum(out_splits).tolist()
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
        *(split.as_params() if split else (1, 1, 1)),
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Kernels:
    """The compiled kernels of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device_index = 0 if device.index is None else device.index
        self._module = Module(compiled(kernel_source(), architecture(device)))
        self.num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
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
            shared_bytes = parts * LARGE_TILE * pitch * 4 if is_large else 0
            threads = 256 if is_large else 128
            self._expand[key] = self._kernel(
                f"{name}_{size}", "6Pq3i4i3i", threads=threads, shared_bytes=shared_bytes
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
