"""How a matrix of 4-bit codes is laid out for the GPU's linear, and how that work is split."""

from dataclasses import dataclass

import torch

TILE_OUT = 256
CHUNK_IN = 128
_CODE_BYTES = TILE_OUT * CHUNK_IN // 2
_MIN_SCALE = 1e-30  # a smaller one counts as 0: the kernel divides by it

# bitsandbytes' NF4 grid (QLoRA, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """What a code stands for: levels[code] * scale, with a scale for every `group_size` inputs.

    levels     the sixteen values that a code may mean
    zero_code  the one that is 0
    """

    name: str
    group_size: int
    levels: tuple[float, ...]
    zero_code: int

    @property
    def is_integer(self) -> bool:
        """Whether the levels are code - 8, which the kernel computes; others it looks up."""
        return self.levels == INTEGER_LEVELS

    @property
    def chunk_bytes(self) -> int:
        """Of TILE_OUT outputs x CHUNK_IN inputs: the codes, then the scales."""
        return _CODE_BYTES + TILE_OUT * CHUNK_IN // self.group_size * 4


INTEGER_LEVELS = tuple(float(level) for level in range(-8, 8))
NF4 = Format("NF4", 64, LEVELS, zero_code=7)  # a group's scale is its absmax
INT4 = {size: Format(f"int4 g{size}", size, INTEGER_LEVELS, zero_code=8) for size in (32, 64, 128)}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix [out, in] as the kernel reads it: every chunk's codes, then its scales.

    packed  [tiles, chunks, format.chunk_bytes]  uint8; a chunk is TILE_OUT outputs x CHUNK_IN
            inputs.
            codes   [4 x 64 outputs][2 x 64 inputs][4 x 16 outputs][32 lanes][4 x 16 inputs][4]:
                    the bytes that a lane decodes into the A operand of mma.m16n8k16. A byte is a
                    pair of neighbouring inputs, the first in the high nibble. Integer levels:
                    nibble r of the four is the first input of register r, nibble r + 4 the second
            scales  [4 x 64 outputs][CHUNK_IN / group_size][4 x 16 outputs][8][2] fp32: rows g and
                    g + 8
    """

    packed: torch.Tensor
    out_features: int
    in_features: int
    format: Format = NF4

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

    def as_params(self) -> tuple[int, int, int]:
        """The kernels' struct of the same name."""
        return self.chunks_per_tile, self.num_chunks, self.num_workers

    def _worker(self, chunk: int) -> int:
        return ((chunk + 1) * self.num_workers - 1) // self.num_chunks


def pack(qweight: torch.Tensor, scales: torch.Tensor, format: Format = NF4) -> PackedWeight:
    """Lay a matrix out for the kernel; stack matrices with the same input along `out` first.

    qweight  [out, in / 2]           uint8: two codes a byte, the first weight in the high nibble
    scales   [out, in / group_size]  fp32
    """
    out_features, half_in = qweight.shape
    in_features, group_size = 2 * half_in, format.group_size
    if in_features % group_size:
        raise ValueError(
            f"{format.name} needs input features in multiples of {group_size}, not {in_features}"
        )
    zeros = format.zero_code * 0x11
    is_zero = scales.abs() < _MIN_SCALE
    codes = qweight.view(out_features, -1, group_size // 2)
    codes = codes.masked_fill(is_zero.unsqueeze(-1), zeros).view(out_features, half_in)
    scales = scales.masked_fill(is_zero, 1.0)
    tiles, chunks = -(-out_features // TILE_OUT), -(-in_features // CHUNK_IN)
    missing_out, missing_in = tiles * TILE_OUT - out_features, chunks * CHUNK_IN - in_features
    codes = _padded(codes, missing_out, missing_in // 2, zeros)
    scales = _padded(scales.float(), missing_out, missing_in // group_size, 1.0)
    # tile, unit, m tile, row half, group; chunk, half, step, column half, quad
    codes = codes.view(tiles, 4, 4, 2, 8, chunks, 2, 4, 2, 4).permute(0, 5, 1, 6, 2, 4, 9, 7, 8, 3)
    codes = codes.reshape(tiles, chunks, -1)
    if format.is_integer:
        codes = _interleaved(codes)
    scales = scales.view(tiles, 4, 4, 2, 8, chunks, -1).permute(0, 5, 1, 6, 2, 4, 3)
    shape = (tiles, chunks, format.chunk_bytes)
    packed = torch.empty(shape, dtype=torch.uint8, device=qweight.device)
    packed[..., :_CODE_BYTES] = codes
    packed[..., _CODE_BYTES:] = scales.reshape(tiles, chunks, -1).view(torch.uint8)
    return PackedWeight(packed, out_features, in_features, format)


def unpack(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack`: qweight [out, in / 2] uint8 and scales [out, in / group_size] fp32."""
    out_features, in_features = weight.shape
    tiles, chunks, _ = weight.packed.shape
    codes = weight.packed[..., :_CODE_BYTES]
    if weight.format.is_integer:
        codes = _separated(codes)
    codes = codes.reshape(tiles, chunks, 4, 2, 4, 8, 4, 4, 2, 2)
    codes = codes.permute(0, 2, 4, 9, 5, 1, 3, 7, 8, 6).reshape(tiles * TILE_OUT, -1)
    scales = weight.packed[..., _CODE_BYTES:].contiguous().view(torch.float32)
    scales = scales.view(tiles, chunks, 4, -1, 4, 8, 2).permute(0, 2, 4, 6, 5, 1, 3)
    scales = scales.reshape(tiles * TILE_OUT, -1)
    return (
        codes[:out_features, : in_features // 2].contiguous(),
        scales[:out_features, : in_features // weight.format.group_size].contiguous(),
    )


def dequantize_reference(weight: PackedWeight) -> torch.Tensor:
    """The matrix in fp32, in plain PyTorch: [out, in]."""
    qweight, scales = unpack(weight)
    codes = torch.stack((qweight >> 4, qweight & 15), dim=-1).int()
    levels = torch.tensor(weight.format.levels, device=qweight.device)
    group_size = weight.format.group_size
    return (levels[codes].view(*scales.shape, group_size) * scales.unsqueeze(-1)).flatten(1)


def _interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Four bytes of pairs to the nibbles of their firsts, then of their seconds."""
    pairs = codes.unflatten(-1, (-1, 2, 2))  # word, two registers, the one and the other
    one, other = pairs[..., 0], pairs[..., 1]
    firsts, seconds = (one >> 4) | (other & 0xF0), (one & 0x0F) | (other << 4)
    return torch.stack((firsts, seconds), dim=-2).flatten(-3)


def _separated(codes: torch.Tensor) -> torch.Tensor:
    """Undo `_interleaved`."""
    words = codes.unflatten(-1, (-1, 2, 2))
    firsts, seconds = words[..., 0, :], words[..., 1, :]
    one, other = (firsts << 4) | (seconds & 0x0F), (firsts & 0xF0) | (seconds >> 4)
    return torch.stack((one, other), dim=-1).flatten(-3)


def _padded(matrix: torch.Tensor, rows: int, columns: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows), value=value)
