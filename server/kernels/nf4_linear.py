"""Linear over 4-bit weights: repacked once at load, multiplied on tensor cores, fp32 scales.

The weights are NF4 or symmetric int4 (GPTQ); nf4_pack.Format says which, and nf4_linear.cu is
compiled for each format that is used.

Up to a few hundred rows the kernel decodes the weights as it multiplies. Its work is split along
the inputs too: `partial_sums` leaves fp32 sums in a workspace, and `reduce` (or a kernel that does
more with them) adds these in a fixed order. With more rows the weight is dequantized into a scratch
matrix and cuBLAS multiplies. Up to 64 rows, neither the other rows nor their number change a bit.
"""

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from server.kernels.lora_launch import STEP_PARAMS, empty_h, slice_of_inputs
from server.kernels.lora_step import DECODE_TOKENS, LARGE_ITEM, SMALL_ITEM, LoraGpuStep
from server.kernels.nf4_pack import (
    CHUNK_IN,
    INT4,
    NF4,
    Format,
    PackedWeight,
    SplitK,
    dequantize_reference,
)
from server.kernels.nvrtc import (
    Kernel,
    Module,
    architecture,
    compiled,
    shared_memory_limit,
    tensor_map,
)

_HALF_CHUNK = CHUNK_IN // 2
# LoRA's shrink in the same launch: 16-byte loads of a bank row that a lane has under way at a time,
# the stages of weights that are asked for before them, and whether one more is before the products.
_SHRINK_PIECES, _SHRINK_STAGES_BEFORE, _SHRINK_WITH_SPARE = 4, 2, True
_BARRIER_BYTES = 256  # in shared memory, behind at most 16 stages: 16 bytes each
# The kernel multiplies bf16(level * factor) and divides the fp32 sum by the factor again. Of the
# factors in [1, 2) this one rounds NF4's levels best: 6e-4 relative in place of 1.1e-3.
LEVEL_FACTOR = 1.437
_INTEGER_FACTOR = 1.0  # whole numbers up to 8 are exact

_PARTIALS_PARAMS = "PPPqP4i6i8I"  # the kernels' PartialsParams, without its tensor map
_SHRINK_PARAMS = STEP_PARAMS + "2P7i3f"  # their ShrinkPart
_KERNELS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Tuning:
    """What is chosen by measuring, for a format.

    chains           runs that a tile's inputs are summed in: one, or each half of a chunk apart
    max_stages       chunks in shared memory, at most
    small_warps      8 or 16: warps of mma.sync's kernel for 8 tokens
    wgmma_from       tokens of the smallest tile that Hopper's wgmma multiplies (to the same bits)
    spare_bytes      of shared memory left to the blocks of the kernel in front, up to 64 tokens
    prefetch_chunks  of each worker's run in the next linear: 2 are 5 MB on an H100
    late_release     wgmma runs on into the next chunk before a stage is given back (one chain only:
                     with two, ptxas gives up their overlap)
    """

    chains: int = 2
    max_stages: int = 6
    small_warps: int = 16
    wgmma_from: int = 16
    spare_bytes: int = 24 * 1024
    prefetch_chunks: int = 2
    late_release: bool = False


_TUNING = {NF4: Tuning(), **dict.fromkeys(INT4.values(), Tuning(chains=1))}


def dequantize(weight: PackedWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix in bf16, each weight rounded once: [out, in]."""
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.packed.device)
    if not weight.packed.is_cuda:
        return out.copy_(dequantize_reference(weight))
    kernels_of(weight.packed.device, weight.format).dequantize(weight, out)
    return out


def nf4_linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Multiply each row by the weight's transpose.

        y[t, n] = sum_k x[t, k] * levels[code[n, k]] * scale[n, k // group_size]

    x        [num_tokens, in]   bf16; elements of a row contiguous
    returns  [num_tokens, out]  bf16
    """
    if not x.is_cuda:
        return nf4_linear_reference(x, weight)
    if not is_fused(x.shape[0], x.device):
        return x @ dequantize(weight).T
    return reduce(partial_sums(x, weight), weight)


def nf4_linear_reference(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`nf4_linear` in plain PyTorch."""
    return (x.float() @ dequantize_reference(weight).T).to(x.dtype)


def is_fused(num_tokens: int, device: torch.device) -> bool:
    """Whether this many rows are multiplied without dequantizing the matrix first."""
    return num_tokens <= _max_fused_rows(torch.cuda.get_device_capability(device))


def split_of(weight: PackedWeight) -> SplitK:
    """How the matrix's partial sums are laid out in the workspace on this device."""
    return kernels_of(weight.packed.device, weight.format).split(weight)


def partial_sums(
    x: torch.Tensor, weight: PackedWeight, next_weight: PackedWeight | None = None
) -> torch.Tensor:
    """First half of `nf4_linear`: fp32 sums over parts of the inputs, [slots, num_tokens, out].

    Of the slots only those are written that the tile of outputs has: see SplitK.

    next_weight  what the model's next linear will read, in the same format: its first part is
                 brought into the L2 cache, so that the memory is not idle until that linear starts
    """
    kernels = kernels_of(x.device, weight.format)
    workspace = kernels.empty_workspace(x, weight)
    kernels.partial_sums(x, weight, workspace, next_weight)
    return workspace


def partial_sums_and_shrink(
    x: torch.Tensor,
    weight: PackedWeight,
    a_bank: torch.Tensor,
    step: LoraGpuStep,
    next_weight: PackedWeight | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial_sums` and `lora_gpu.shrink` in one launch: the same bits as these two return.

    a_bank  [num_bank_rows, sublinears, in]  bf16; the first two strides are free
    step    filled for as many tokens as x has
    """
    kernels = kernels_of(x.device, weight.format)
    workspace, h = kernels.empty_workspace(x, weight), empty_h(x, a_bank, step)
    kernels.partial_sums(x, weight, workspace, next_weight, (a_bank, step, h))
    return workspace, h


def reduce(workspace: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Second half: add the slots, always in the same order. Returns [num_tokens, out] bf16."""
    out = torch.empty(workspace.shape[1:], dtype=torch.bfloat16, device=workspace.device)
    kernels_of(workspace.device, weight.format).reduce(workspace, weight, out)
    return out


def kernel_source(
    arch: str, shared_limit: int, format: Format = NF4, tuning: Tuning | None = None
) -> tuple[str, dict[int, "Tile"]]:
    """The CUDA source for an architecture, and what it offers: token tile -> launch settings.

    shared_limit  bytes of shared memory that a block may have
    tuning        None: what was measured best for the format
    """
    tuning = tuning or _TUNING[format]
    has_wgmma = arch == "sm_90a"
    # A stride of 256 makes the table's address one byte permutation, where there is room for it.
    stride = 0 if format.is_integer else 256 if shared_limit >= 200 * 1024 else 128
    tiles: dict[int, Tile] = {}
    for tokens in (8, 16, 32, 64, 128):
        with_wgmma = has_wgmma and tokens >= tuning.wgmma_from
        stage_bytes = format.chunk_bytes + tokens * CHUNK_IN * 2
        # Hopper starts the next kernel early: leave room for the blocks of the one before it.
        spare_bytes = tuning.spare_bytes if has_wgmma and tokens <= 64 else 0
        room = shared_limit - 256 * stride - spare_bytes - _BARRIER_BYTES
        stages = min(room // stage_bytes, tuning.max_stages)
        if stages >= (3 if has_wgmma else 2) and (tokens <= 64 or with_wgmma):
            is_half = not with_wgmma and (tokens == 64 or (tokens == 8 and tuning.small_warps == 8))
            threads = 256 if is_half else 512
            shared_bytes = 256 * stride + stages * stage_bytes + _BARRIER_BYTES
            tiles[tokens] = Tile(threads, shared_bytes, stages, with_wgmma)
    map_params = "128s" + _PARTIALS_PARAMS if has_wgmma else _PARTIALS_PARAMS
    defines = [
        f"#define PARTIALS_BYTES {struct.calcsize('@' + _padded(map_params))}",
        f"#define GROUP_SIZE {format.group_size}",
        f"#define INTEGER_LEVELS {int(format.is_integer)}",
        f"#define CHAINS {tuning.chains}",
        f"#define WARPS_8 {tuning.small_warps}",
        f"#define TABLE_STRIDE {stride}",
        f"#define LEVEL_FACTOR {_level_factor(format)}f",
        f"#define PREFETCH_CHUNKS {tuning.prefetch_chunks}",
        f"#define LATE_RELEASE {int(tuning.late_release)}",
        f"#define SHRINK_PIECES {_SHRINK_PIECES}",
        f"#define SHRINK_STAGES_BEFORE {_SHRINK_STAGES_BEFORE}",
        f"#define SHRINK_WITH_SPARE {int(_SHRINK_WITH_SPARE)}",
    ]
    for tokens, tile in tiles.items():
        prefix = "WGMMA_" if tile.with_wgmma else ""
        defines.append(f"#define {prefix}STAGES_{tokens} {tile.stages}")
    parts = ["\n".join(defines), (_KERNELS / "common.cuh").read_text()]
    if has_wgmma:
        parts.append(_wgmma_source(tuple(n for n, tile in tiles.items() if tile.with_wgmma)))
    names = ("lora_step.cuh", "nf4_feed.cuh", "nf4_shrink.cuh", "nf4_linear.cu")
    parts += [(_KERNELS / name).read_text() for name in names]
    return "\n".join(parts), tiles


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch settings of the kernel for up to so many tokens a block."""

    threads: int
    shared_bytes: int
    stages: int
    with_wgmma: bool


def _wgmma_source(sizes: tuple[int, ...]) -> str:
    """Wrappers of wgmma.m64nNk16, A in registers: an instruction names each register it takes."""
    lines = [
        "#define IS_HOPPER",
        "__device__ __forceinline__ void wgmma_fence() {",
        '    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");\n}',
        "__device__ __forceinline__ void wgmma_commit() {",
        '    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");\n}',
        "template <int PENDING> __device__ __forceinline__ void wgmma_wait() {",
        '    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");\n}',
        "template <int N> __device__ __forceinline__ void "
        "wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b);",
    ]
    for n in sizes:
        count = n // 2
        registers = ", ".join(f"%{i}" for i in range(count))
        outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        a = ", ".join(f"%{count + i}" for i in range(4))
        lines += [
            f"template <> __device__ __forceinline__ void "
            f"wgmma<{n}>(float (&d)[{count}], const u32 (&a)[4], u64 b) {{",
            '    asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; "',
            f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 "',
            f'        "{{{registers}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;}}"',
            f'        : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));',
            "}",
        ]
    return "\n".join(lines)


def _level_factor(format: Format) -> float:
    return _INTEGER_FACTOR if format.is_integer else LEVEL_FACTOR


def _level_words(format: Format) -> tuple[int, ...]:
    """The sixteen bf16 levels that the kernel multiplies, two a word."""
    levels = torch.tensor(format.levels) * _level_factor(format)
    bits = levels.bfloat16().view(torch.int16).tolist()
    return struct.unpack("@8I", struct.pack("@16h", *bits))


def _architecture(device: torch.device) -> str:
    own = architecture(device)
    return "sm_90a" if own == "sm_90" else own


def compile_ahead(device: torch.device, format: Format = NF4) -> None:
    """Compile into the cache on the disk; in any thread, whatever its context."""
    arch = _architecture(device)
    source, _ = kernel_source(arch, shared_memory_limit(device), format)
    compiled(source, arch)


class _Kernels:
    """The compiled kernels of one device for weights of one format."""

    def __init__(
        self,
        device: torch.device,
        arch: str | None = None,
        shared_limit: int | None = None,
        *,
        format: Format = NF4,
        tuning: Tuning | None = None,
    ) -> None:
        """Compile for the device, or for less than it can do."""
        properties = torch.cuda.get_device_properties(device)
        arch = arch or _architecture(device)
        shared_limit = shared_limit or shared_memory_limit(device)
        source, tiles = kernel_source(arch, shared_limit, format, tuning)
        module = Module(compiled(source, arch))
        is_dependent = properties.major >= 9
        self._num_workers = properties.multi_processor_count
        self._device_index = 0 if device.index is None else device.index
        self._format = format
        self._level_words = _level_words(format)
        self._has_tensor_maps = arch == "sm_90a"
        params = "128s" + _PARTIALS_PARAMS if self._has_tensor_maps else _PARTIALS_PARAMS
        self._partials, self._partials_shrink = (
            {
                tokens: Kernel(
                    module.function(f"{name}_{tokens}"),
                    own_params,
                    threads=tile.threads,
                    shared_bytes=tile.shared_bytes,
                    is_dependent=is_dependent,
                )
                for tokens, tile in tiles.items()
            }
            for name, own_params in (
                ("nf4_partials", params),
                ("nf4_partials_shrink", _padded(params) + _SHRINK_PARAMS),
            )
        )
        self._reduce = Kernel(
            module.function("nf4_reduce"), "PP2i3i", threads=256, is_dependent=is_dependent
        )
        self._dequantize = Kernel(module.function("nf4_dequantize"), "PP3i16f", threads=256)

    def split(self, weight: PackedWeight) -> SplitK:
        tiles, chunks, _ = weight.packed.shape
        return _split(chunks, tiles * chunks, self._num_workers)

    def empty_workspace(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        shape = (self.split(weight).num_slots, x.shape[0], weight.out_features)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def partial_sums(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        workspace: torch.Tensor,
        next_weight: PackedWeight | None = None,
        lora: tuple[torch.Tensor, LoraGpuStep, torch.Tensor] | None = None,  # A, step, h to fill
    ) -> None:
        num_tokens = x.shape[0]
        assert weight.format == self._format, "these kernels are for another format"
        assert next_weight is None or next_weight.format == self._format, "both in one format"
        assert x.dtype == torch.bfloat16, "x is bf16"
        assert x.stride(1) == 1, "the elements of a row of x are contiguous"
        assert (x.stride(0) * 2 | x.data_ptr()) % 16 == 0, "rows of x start on 16 bytes"
        split = self.split(weight)
        tile = next((size for size in self._partials if size >= num_tokens), max(self._partials))
        token_tiles = -(-num_tokens // tile)
        x_map: tuple[bytes, ...] = ()
        if self._has_tensor_maps:
            shape = (num_tokens, weight.in_features)
            x_map = (tensor_map(x.data_ptr(), shape, x.stride(0), (tile, _HALF_CHUNK)),)
        kernels = self._partials if lora is None else self._partials_shrink
        kernels[tile](
            (split.num_workers * token_tiles, 1, 1),
            self._device_index,
            *x_map,
            weight.packed.data_ptr(),
            x.data_ptr(),
            workspace.data_ptr(),
            x.stride(0),
            next_weight.packed.data_ptr() if next_weight else 0,
            num_tokens,
            weight.in_features,
            weight.out_features,
            token_tiles,
            *split.as_params(),
            *self.split(next_weight or weight).as_params(),
            *self._level_words,
            *(() if lora is None else _shrink_params(x, *lora)),
        )

    def reduce(self, workspace: torch.Tensor, weight: PackedWeight, out: torch.Tensor) -> None:
        split = self.split(weight)
        num_tokens, out_features = out.shape
        self._reduce(
            (-(-out_features // 1024), num_tokens, 1),
            self._device_index,
            out.data_ptr(),
            workspace.data_ptr(),
            num_tokens,
            out_features,
            *split.as_params(),
        )

    def dequantize(self, weight: PackedWeight, out: torch.Tensor) -> None:
        tiles, chunks, _ = weight.packed.shape
        self._dequantize(
            (tiles * chunks, 1, 1),
            self._device_index,
            weight.packed.data_ptr(),
            out.data_ptr(),
            weight.in_features,
            weight.out_features,
            chunks,
            *self._format.levels,
        )


def _padded(params: str) -> str:
    """A struct with a tensor map in front, as C lays out what comes behind it."""
    missing = -struct.calcsize("@" + params) % (64 if params.startswith("128s") else 8)
    return f"{params}{missing}x"


def _shrink_params(
    x: torch.Tensor, a_bank: torch.Tensor, step: LoraGpuStep, h: torch.Tensor
) -> tuple[int | float, ...]:
    """The kernels' ShrinkPart."""
    num_slices, num_tokens, num_sublinears, _ = h.shape
    octets = (SMALL_ITEM if num_tokens <= DECODE_TOKENS else LARGE_ITEM) // 8
    units = octets * num_sublinears * num_slices  # of an item
    assert num_tokens <= step.max_tokens, "too many tokens for this step"
    assert a_bank.shape[2] == x.shape[1], "the bank is for another linear"
    assert (a_bank.data_ptr() | a_bank.stride(0) * 2 | a_bank.stride(1) * 2) % 16 == 0, (
        "rows of the bank start on 16 bytes"
    )
    assert step.max_items * units < 1 << 20, "too much to shrink in one launch"
    assert h.numel() < 1 << 31, "h is too large"
    return (
        *step.addresses(),
        step.max_pages,
        num_tokens,
        a_bank.data_ptr(),
        h.data_ptr(),
        a_bank.stride(0),
        a_bank.stride(1),
        slice_of_inputs(x.shape[1]),
        num_slices,
        num_sublinears,
        octets,
        step.max_items,
        1 / units,
        1 / num_slices,
        1 / num_sublinears,
    )


@cache
def _split(chunks_per_tile: int, num_chunks: int, num_multiprocessors: int) -> SplitK:
    return SplitK(chunks_per_tile, num_chunks, min(num_multiprocessors, num_chunks))


def _max_fused_rows(capability: tuple[int, int]) -> int:
    """Past this, dequantizing and cuBLAS are faster (docs/performance.md, "NF4 linear")."""
    return 384 if capability == (9, 0) else 192


def kernels_of(device: torch.device, format: Format) -> _Kernels:
    """The kernels of a device for a format, compiled when first asked for."""
    index = device.index
    return _kernels_of_index(torch.cuda.current_device() if index is None else index, format)


@cache
def _kernels_of_index(device_index: int, format: Format) -> _Kernels:
    return _Kernels(torch.device("cuda", device_index), format=format)
