"""How the LoRA kernels are compiled and launched: what `lora_gpu` has in common."""

from functools import cache
from pathlib import Path

import numpy as np
import torch

from server.kernels.lora_step import (
    DECODE_TOKENS,
    LARGE_TILE,
    PAGE_ROWS,
    SMALL_TILE,
    LoraGpuStep,
)
from server.kernels.nf4_pack import SplitK
from server.kernels.nvrtc import Kernel, Module, architecture, compiled

MAX_SUBLINEARS = 4

_SMALL_COLUMNS, _LARGE_COLUMNS = 64, 512  # at a time of a warp, and of a block
_LARGE_BLOCKS = 2112  # at most so many; then each does more in turn
_KERNELS = Path(__file__).parent
_SOURCES = (
    "common.cuh",
    "lora_step.cuh",
    "lora_shrink.cu",
    "lora_endings.cuh",
    "lora_expand.cu",
    "lora_expand_large.cu",
)

STEP_PARAMS = "6P2i"  # the kernels' Step
# ExpandParams after its Step: its own, then InputNorm, OutputNorm and Rotary.
EXPAND_PARAMS = "6Pq3i4i3iPi2f3P6P2i"
# What the structs of lora_endings.cuh hold where an ending has no use for them.
NO_INPUT_NORM: tuple[int | float, ...] = (0, 0, 0.0, 0.0)
NO_OUTPUT_NORM = (0, 0, 0)
NO_ROTARY = (0, 0, 0, 0, 0, 0, 0, 0)


def kernel_source() -> str:
    """The CUDA source; it compiles for sm_80 on."""
    return "\n".join((_KERNELS / name).read_text() for name in _SOURCES)


def slice_of_inputs(in_features: int) -> int:
    """Inputs that shrink sums in one part; a function of the shape alone."""
    return 1024 if in_features <= 8192 else 2048


def empty_h(x: torch.Tensor, a_bank: torch.Tensor, step: LoraGpuStep) -> torch.Tensor:
    """What shrink fills: fp32 [slices, num_tokens, sublinears, max_pages * PAGE_ROWS].

    x       [num_tokens, in]                 bf16
    a_bank  [num_bank_rows, sublinears, in]  bf16
    """
    num_tokens, in_features = x.shape
    assert x.dtype == a_bank.dtype == torch.bfloat16, "x and the bank are bf16"
    assert x.stride(1) == a_bank.stride(2) == 1, "rows of x and of the bank are contiguous"
    slices = -(-in_features // slice_of_inputs(in_features))
    shape = (slices, num_tokens, a_bank.shape[1], step.max_pages * PAGE_ROWS)
    return torch.empty(shape, device=x.device)


def run_expand(
    name: str,
    y: torch.Tensor,
    columns: int,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    linear: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    split: SplitK | None = None,
    residual: torch.Tensor | None = None,
    input_norm: tuple[int | float, ...] = NO_INPUT_NORM,
    output_norm: tuple[int, ...] = NO_OUTPUT_NORM,
    rotary: tuple[int, ...] = NO_ROTARY,
) -> None:
    """Launch a kernel of the expand family; `columns` are what its warps count by."""
    num_tokens, out_features = y.shape[0], sum(out_splits)
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
    kernels = kernels_of(y.device)
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
        *input_norm,
        *output_norm,
        *rotary,
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def large_tile_bytes(name: str, max_pages: int) -> int:
    """Shared memory of a kernel with large tiles: h of 64 tokens, every rank of an adapter."""
    parts = 2 if name == "expand_silu" else 1
    pitch = -(-max_pages // 2) * PAGE_ROWS + 4
    return parts * LARGE_TILE * pitch * 4


def pages_of_rank(max_rank: int, shared_limit: int | None) -> int:
    """Pages of an adapter at most: DoRA's gain takes a row too.

    shared_limit  bytes of shared memory that a block may have, if it is to run on a GPU

    ValueError where the kernels could not hold so many on the chip.
    """
    max_pages = -(-(max_rank + 1) // PAGE_ROWS)
    needed = large_tile_bytes("expand_silu", max_pages)
    if shared_limit is not None and needed > shared_limit:
        raise ValueError(
            f"adapters.max_rank is {max_rank}, which takes {needed} bytes of a block's shared "
            f"memory; on this GPU it has {shared_limit} (serve --max-rank)"
        )
    return max_pages


def compile_ahead(device: torch.device) -> None:
    """Compile into the cache on the disk; in any thread, whatever its context."""
    compiled(kernel_source(), architecture(device))


class Kernels:
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
            shared_bytes = large_tile_bytes(name, max_pages) if is_large else 0
            threads = 256 if is_large else 128
            self._expand[key] = self._kernel(
                f"{name}_{size}", EXPAND_PARAMS, threads=threads, shared_bytes=shared_bytes
            )
        return self._expand[key]

    def _kernel(self, name: str, params: str, *, threads: int, shared_bytes: int = 0) -> Kernel:
        return Kernel(
            self._module.function(f"lora_{name}"),
            STEP_PARAMS + params,
            threads=threads,
            shared_bytes=shared_bytes,
            is_dependent=self._is_dependent,
        )


def kernels_of(device: torch.device) -> Kernels:
    """The kernels of a device, compiled when first asked for."""
    return _kernels_of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _kernels_of_index(device_index: int) -> Kernels:
    return Kernels(torch.device("cuda", device_index))
