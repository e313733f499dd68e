"""Linear over NF4 weights: repacked once at load, multiplied on tensor cores, exact absmax in fp32.

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

from server.kernels.nvrtc import (
    Kernel,
    Module,
    architecture,
    compiled,
    shared_memory_limit,
    tensor_map,
)

GROUP_SIZE = 64  # weights along the inputs that share one absmax
TILE_OUT = 256
CHUNK_IN = 128
_HALF_CHUNK = CHUNK_IN // 2
_CODE_BYTES = TILE_OUT * CHUNK_IN // 2
_CHUNK_BYTES = _CODE_BYTES + TILE_OUT * CHUNK_IN // GROUP_SIZE * 4
_BARRIER_BYTES = 128  # in shared memory, behind the stages
_ZERO_CODE = 7  # the level that is 0
_MIN_ABSMAX = 1e-30  # a smaller one counts as 0: the kernel divides by it

# bitsandbytes' NF4 grid (QLoRA, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The kernel multiplies bf16(level * factor) and divides the fp32 sum by the factor again. Of the
# factors in [1, 2) this one rounds the sixteen levels best: 6e-4 relative in place of 1.1e-3.
LEVEL_FACTOR = 1.437

_KERNELS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class NF4LinearWeight:
    """One matrix [out, in] as the kernel reads it: every chunk's codes, then its absmax.

    packed  [tiles, chunks, _CHUNK_BYTES]  uint8; a chunk is TILE_OUT outputs x CHUNK_IN inputs.
            codes   [4 x 64 outputs][2 x 64 inputs][4 x 16 outputs][32 lanes][4 x 16 inputs][4]:
                    the bytes that a lane decodes into the A operand of mma.m16n8k16
            absmax  [4 x 64 outputs][2 x 64 inputs][4 x 16 outputs][8][2] fp32: rows g and g + 8
    """

    packed: torch.Tensor
    out_features: int
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input features."""
        return self.out_features, self.in_features


@dataclass(frozen=True, slots=True)
class SplitK:
    """How a matrix is dealt to the GPU's multiprocessors; a function of its shape alone.

    Chunks are numbered with the inputs running fastest, and worker w has those from
    num_chunks * w // num_workers on. A tile's partial sums are in one slot for each worker that has
    a part of it.
    """

    chunks_per_tile: int
    num_chunks: int
    num_workers: int

    @property
    def num_slots(self) -> int:
        """The most slots that any tile of outputs needs."""
        starts = range(0, self.num_chunks, self.chunks_per_tile)
        return max(
            self._worker(start + self.chunks_per_tile - 1) - self._worker(start) + 1
            for start in starts
        )

    def _worker(self, chunk: int) -> int:
        return ((chunk + 1) * self.num_workers - 1) // self.num_chunks


def pack(qweight: torch.Tensor, absmax: torch.Tensor) -> NF4LinearWeight:
    """Lay a matrix out for the kernel; stack matrices with the same input along `out` first.

    qweight  [out, in / 2]   uint8: two codes a byte, the first weight in the high nibble
    absmax   [out, in / 64]  fp32
    """
    out_features, half_in = qweight.shape
    in_features = 2 * half_in
    if in_features % GROUP_SIZE:
        raise ValueError(
            f"NF4 needs input features in multiples of {GROUP_SIZE}, not {in_features}"
        )
    is_zero = absmax.abs() < _MIN_ABSMAX
    codes = qweight.view(out_features, -1, GROUP_SIZE // 2)
    codes = codes.masked_fill(is_zero.unsqueeze(-1), _ZERO_CODE * 0x11).view(out_features, half_in)
    absmax = absmax.masked_fill(is_zero, 1.0)
    tiles, chunks = -(-out_features // TILE_OUT), -(-in_features // CHUNK_IN)
    missing_out, missing_in = tiles * TILE_OUT - out_features, chunks * CHUNK_IN - in_features
    codes = _padded(codes, missing_out, missing_in // 2, _ZERO_CODE * 0x11)
    absmax = _padded(absmax.float(), missing_out, missing_in // GROUP_SIZE, 1.0)
    # tile, unit, m tile, row half, group; chunk, half, step, column half, quad
    codes = codes.view(tiles, 4, 4, 2, 8, chunks, 2, 4, 2, 4).permute(0, 5, 1, 6, 2, 4, 9, 7, 8, 3)
    absmax = absmax.view(tiles, 4, 4, 2, 8, chunks, 2).permute(0, 5, 1, 6, 2, 4, 3)
    packed = torch.empty(tiles, chunks, _CHUNK_BYTES, dtype=torch.uint8, device=qweight.device)
    packed[..., :_CODE_BYTES] = codes.reshape(tiles, chunks, -1)
    packed[..., _CODE_BYTES:] = absmax.reshape(tiles, chunks, -1).view(torch.uint8)
    return NF4LinearWeight(packed, out_features, in_features)


def unpack(weight: NF4LinearWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack`: qweight [out, in / 2] uint8 and absmax [out, in / 64] fp32."""
    out_features, in_features = weight.shape
    tiles, chunks, _ = weight.packed.shape
    codes = weight.packed[..., :_CODE_BYTES].view(tiles, chunks, 4, 2, 4, 8, 4, 4, 2, 2)
    codes = codes.permute(0, 2, 4, 9, 5, 1, 3, 7, 8, 6).reshape(tiles * TILE_OUT, -1)
    absmax = weight.packed[..., _CODE_BYTES:].contiguous().view(torch.float32)
    absmax = absmax.view(tiles, chunks, 4, 2, 4, 8, 2).permute(0, 2, 4, 6, 5, 1, 3)
    absmax = absmax.reshape(tiles * TILE_OUT, -1)
    return (
        codes[:out_features, : in_features // 2].contiguous(),
        absmax[:out_features, : in_features // GROUP_SIZE].contiguous(),
    )


def dequantize(weight: NF4LinearWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix in bf16, each weight rounded once: [out, in]."""
    if out is None:
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.packed.device)
    if not weight.packed.is_cuda:
        return out.copy_(dequantize_reference(weight))
    _kernels(weight.packed.device).dequantize(weight, out)
    return out


def dequantize_reference(weight: NF4LinearWeight) -> torch.Tensor:
    """The matrix in fp32, in plain PyTorch: [out, in]."""
    qweight, absmax = unpack(weight)
    codes = torch.stack((qweight >> 4, qweight & 15), dim=-1).int()
    levels = torch.tensor(LEVELS, device=qweight.device)
    return (levels[codes].view(*absmax.shape, GROUP_SIZE) * absmax.unsqueeze(-1)).flatten(1)


def nf4_linear(x: torch.Tensor, weight: NF4LinearWeight) -> torch.Tensor:
    """Multiply each row by the weight's transpose.

        y[t, n] = sum_k x[t, k] * LEVELS[code[n, k]] * absmax[n, k // 64]

    x        [num_tokens, in]   bf16; elements of a row contiguous
    returns  [num_tokens, out]  bf16
    """
    if not x.is_cuda:
        return nf4_linear_reference(x, weight)
    kernels = _kernels(x.device)
    if x.shape[0] > kernels.max_fused_rows:
        return x @ dequantize(weight).T
    return reduce(partial_sums(x, weight), weight)


def nf4_linear_reference(x: torch.Tensor, weight: NF4LinearWeight) -> torch.Tensor:
    """`nf4_linear` in plain PyTorch."""
    return (x.float() @ dequantize_reference(weight).T).to(x.dtype)


def is_fused(num_tokens: int, device: torch.device) -> bool:
    """Whether this many rows are multiplied without dequantizing the matrix first."""
    return num_tokens <= _kernels(device).max_fused_rows


def split_of(weight: NF4LinearWeight) -> SplitK:
    """How the matrix's partial sums are laid out in the workspace on this device."""
    return _kernels(weight.packed.device).split(weight)


def partial_sums(x: torch.Tensor, weight: NF4LinearWeight) -> torch.Tensor:
    """First half of `nf4_linear`: fp32 sums over parts of the inputs, [slots, num_tokens, out].

    Of the slots only those are written that the tile of outputs has: see SplitK.
    """
    kernels = _kernels(x.device)
    slots = kernels.split(weight).num_slots
    workspace = torch.empty(
        (slots, x.shape[0], weight.out_features), dtype=torch.float32, device=x.device
    )
    kernels.partial_sums(x, weight, workspace)
    return workspace


def reduce(workspace: torch.Tensor, weight: NF4LinearWeight) -> torch.Tensor:
    """Second half: add the slots, always in the same order. Returns [num_tokens, out] bf16."""
    out = torch.empty(workspace.shape[1:], dtype=torch.bfloat16, device=workspace.device)
    _kernels(workspace.device).reduce(workspace, weight, out)
    return out


def kernel_source(arch: str, shared_limit: int) -> tuple[str, dict[int, "Tile"]]:
    """The CUDA source for an architecture, and what it offers: token tile -> launch settings.

    shared_limit  bytes of shared memory that a block may have
    """
    has_wgmma = arch == "sm_90a"
    # A stride of 256 makes the table's address one byte permutation, where there is room for it.
    stride = 256 if shared_limit >= 200 * 1024 else 128
    tiles: dict[int, Tile] = {}
    for tokens in (8, 16, 32, 64, 128):
        with_wgmma = has_wgmma and tokens > 8  # for 8 it is the slower one; the bits are the same
        stage_bytes = _CHUNK_BYTES + tokens * CHUNK_IN * 2
        # Hopper starts the next kernel early: leave room for the blocks of the one before it.
        room = shared_limit - 256 * stride - (24 * 1024 if has_wgmma and tokens <= 64 else 0)
        stages = min((room - _BARRIER_BYTES) // stage_bytes, 6)
        if stages >= (3 if has_wgmma else 2) and (tokens <= 64 or with_wgmma):
            threads = 256 if tokens == 64 and not with_wgmma else 512
            shared_bytes = 256 * stride + stages * stage_bytes + _BARRIER_BYTES
            tiles[tokens] = Tile(threads, shared_bytes, stages, with_wgmma)
    defines = [f"#define TABLE_STRIDE {stride}", f"#define LEVEL_FACTOR {LEVEL_FACTOR}f"]
    for tokens, tile in tiles.items():
        prefix = "WGMMA_" if tile.with_wgmma else ""
        defines.append(f"#define {prefix}STAGES_{tokens} {tile.stages}")
    parts = ["\n".join(defines), (_KERNELS / "common.cuh").read_text()]
    if has_wgmma:
        parts.append(_wgmma_source(tuple(n for n, tile in tiles.items() if tile.with_wgmma)))
    parts.append((_KERNELS / "nf4_linear.cu").read_text())
    return "\n".join(parts), tiles


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch settings of the kernel for up to so many tokens a block."""

    threads: int
    shared_bytes: int
    stages: int
    with_wgmma: bool


def _padded(matrix: torch.Tensor, rows: int, columns: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows), value=value)


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


def _level_words() -> tuple[int, ...]:
    """The sixteen bf16 levels that the kernel multiplies, two a word."""
    bits = (torch.tensor(LEVELS) * LEVEL_FACTOR).bfloat16().view(torch.int16).tolist()
    return struct.unpack("@8I", struct.pack("@16h", *bits))


class _Kernels:
    """The compiled kernels of one device."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        arch = architecture(device)
        arch = "sm_90a" if arch == "sm_90" else arch
        source, tiles = kernel_source(arch, shared_memory_limit(device))
        module = Module(compiled(source, arch))
        is_dependent = properties.major >= 9
        self._num_workers = properties.multi_processor_count
        # Past this, dequantizing and cuBLAS are faster (docs/performance.md, "NF4 linear").
        self.max_fused_rows = 320 if 128 in tiles else 192
        self._device_index = 0 if device.index is None else device.index
        self._level_words = _level_words()
        self._has_tensor_maps = arch == "sm_90a"
        self._partials = {
            tokens: Kernel(
                module.function(f"nf4_partials_{tokens}"),
                f"{'128s' if self._has_tensor_maps else ''}PPPq4i3i8I",
                threads=tile.threads,
                shared_bytes=tile.shared_bytes,
                is_dependent=is_dependent,
            )
            for tokens, tile in tiles.items()
        }
        self._reduce = Kernel(
            module.function("nf4_reduce"), "PP2i3i", threads=256, is_dependent=is_dependent
        )
        self._dequantize = Kernel(module.function("nf4_dequantize"), "PP3i16f", threads=256)

    def split(self, weight: NF4LinearWeight) -> SplitK:
        tiles, chunks, _ = weight.packed.shape
        return _split(chunks, tiles * chunks, self._num_workers)

    def partial_sums(
        self, x: torch.Tensor, weight: NF4LinearWeight, workspace: torch.Tensor
    ) -> None:
        num_tokens = x.shape[0]
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
        self._partials[tile](
            (split.num_workers * token_tiles, 1, 1),
            self._device_index,
            *x_map,
            weight.packed.data_ptr(),
            x.data_ptr(),
            workspace.data_ptr(),
            x.stride(0),
            num_tokens,
            weight.in_features,
            weight.out_features,
            token_tiles,
            split.chunks_per_tile,
            split.num_chunks,
            split.num_workers,
            *self._level_words,
        )

    def reduce(self, workspace: torch.Tensor, weight: NF4LinearWeight, out: torch.Tensor) -> None:
        split = self.split(weight)
        num_tokens, out_features = out.shape
        self._reduce(
            (-(-out_features // 1024), num_tokens, 1),
            self._device_index,
            out.data_ptr(),
            workspace.data_ptr(),
            num_tokens,
            out_features,
            split.chunks_per_tile,
            split.num_chunks,
            split.num_workers,
        )

    def dequantize(self, weight: NF4LinearWeight, out: torch.Tensor) -> None:
        tiles, chunks, _ = weight.packed.shape
        self._dequantize(
            (tiles * chunks, 1, 1),
            self._device_index,
            weight.packed.data_ptr(),
            out.data_ptr(),
            weight.in_features,
            weight.out_features,
            chunks,
            *LEVELS,
        )


@cache
def _split(chunks_per_tile: int, num_chunks: int, num_multiprocessors: int) -> SplitK:
    return SplitK(chunks_per_tile, num_chunks, min(num_multiprocessors, num_chunks))


def _kernels(device: torch.device) -> _Kernels:
    index = device.index
    return _kernels_of(torch.cuda.current_device() if index is None else index)


@cache
def _kernels_of(device_index: int) -> _Kernels:
    return _Kernels(torch.device("cuda", device_index))
