"""How an NF4 matrix is laid out for the GPU's linear, and how that work is split."""

from dataclasses import dataclass

import torch

GROUP_SIZE = 64  # weights along the inputs that share one absmax
TILE_OUT = 256
CHUNK_IN = 128
_CODE_BYTES = TILE_OUT * CHUNK_IN // 2
CHUNK_BYTES = _CODE_BYTES + TILE_OUT * CHUNK_IN // GROUP_SIZE * 4
_ZERO_CODE = 7  # the level that is 0
_MIN_ABSMAX = 1e-30  # a smaller one counts as 0: the kernel divides by it

# bitsandbytes' NF4 grid (QLoRA, arXiv:2305.14314, appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NF4LinearWeight:
    """One matrix [out, in] as the kernel reads it: every chunk's codes, then its absmax.

    packed  [tiles, chunks, CHUNK_BYTES]  uint8; a chunk is TILE_OUT outputs x CHUNK_IN inputs.
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

    def as_params(self) -> tuple[int, int, int]:
        """The kernels' struct of the same name."""
        return self.chunks_per_tile, self.num_chunks, self.num_workers

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
    packed = torch.empty(tiles, chunks, CHUNK_BYTES, dtype=torch.uint8, device=qweight.device)
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


def dequantize_reference(weight: NF4LinearWeight) -> torch.Tensor:
    """The matrix in fp32, in plain PyTorch: [out, in]."""
    qweight, absmax = unpack(weight)
    codes = torch.stack((qweight >> 4, qweight & 15), dim=-1).int()
    levels = torch.tensor(LEVELS, device=qweight.device)
    return (levels[codes].view(*absmax.shape, GROUP_SIZE) * absmax.unsqueeze(-1)).flatten(1)


def _padded(matrix: torch.Tensor, rows: int, columns: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows), value=value)
