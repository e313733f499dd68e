"""What a layer does besides matrix products, in plain PyTorch; `kernels` does the same in Triton.

Every op writes into memory it is given, so that a step allocates little. Tokens are rows.
"""

import importlib.util
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.functional import silu

from server.quant.nf4 import NF4Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:  # it comes with torch's builds for a GPU
    from training.fast import kernels

Ops = SimpleNamespace | ModuleType


def fill(
    weight: NF4Tensor | torch.Tensor,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None,
    matrix: torch.Tensor,
    *,
    first_row: int,
    first_a_row: int,
    first_b_column: int,
    num_a_rows: int,
) -> None:
    """Write one linear into its group's matrix (see `linears.Group`).

    weight          [out, in]                     4 bits, or dense
    lora            A [rank, in], B [out, rank], scaling; or None
    matrix          [rows, in + width]            16 bits or fp32
        [first_row : + out, : in]                 gets the weight
        [first_row : + out, in :]                 scaling * B in columns from first_b_column, else 0
        [first_a_row : + num_a_rows, : in]        A, and zeros below it
    """
    out_features, in_features = weight.shape
    rows = matrix[first_row : first_row + out_features]
    if isinstance(weight, NF4Tensor):
        rows[:, :in_features] = weight.dequantize(matrix.dtype)
    else:
        rows[:, :in_features] = weight
    rows[:, in_features:] = 0
    matrix[first_a_row : first_a_row + num_a_rows, :in_features] = 0
    if lora is not None:
        lora_a, lora_b, scaling = lora
        rank = lora_a.shape[0]
        start = in_features + first_b_column
        rows[:, start : start + rank] = lora_b * scaling
        matrix[first_a_row : first_a_row + rank, :in_features] = lora_a


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = weight * x / rms(x): x and out [num_tokens, hidden], weight [hidden]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(weight * normed.to(x.dtype))


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out = residual + the gradient of x, from dy of its norm: all [num_tokens, hidden]."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, gradient = wide * scale, dy.float() * weight.float()
    gradient = scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
    out.copy_(gradient + residual.float())


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, out: torch.Tensor
) -> None:
    """Rotate every head by its token's angles; sign -1 is the gradient's way back.

    x, out      [num_tokens, num_heads * head_size]     may be the same memory
    cos, sin    [num_tokens, head_size]                 fp32, both halves equal
    """
    num_tokens, head_size = cos.shape
    heads = x.reshape(num_tokens, -1, head_size).float()
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1) * (sign * sin).unsqueeze(1)
    out.copy_((heads * cos.unsqueeze(1) + turned).reshape(num_tokens, -1))


def gate(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up: gate_up [num_tokens, 2 * size], out [num_tokens, size]."""
    size = out.shape[1]
    out.copy_(silu(gate_up[:, :size].float()) * gate_up[:, size:].float())


def gate_backward(gate_up: torch.Tensor, h: torch.Tensor) -> None:
    """Turn gate_up into its gradient and h, which holds its own gradient, into its value."""
    size = h.shape[1]
    gate_part, up = gate_up[:, :size].float(), gate_up[:, size:].float()
    dh, sigmoid = h.float(), torch.sigmoid(gate_part)
    activated = gate_part * sigmoid
    d_gate = dh * up * sigmoid * (1 + gate_part - activated)
    d_up = dh * activated
    h.copy_(activated * up)  # from here on: in fp32 the names above are the memory written to
    gate_up[:, :size] = d_gate
    gate_up[:, size:] = d_up


PLAIN = SimpleNamespace(
    fill=fill,
    rms_norm=rms_norm,
    rms_norm_backward=rms_norm_backward,
    rotate=rotate,
    gate=gate,
    gate_backward=gate_backward,
)


def pick(device: torch.device, *, fused: bool) -> Ops:
    """Triton's ops on a GPU, if they are wanted; else PyTorch's, with NF4 still read by Triton."""
    if device.type != "cuda" or not HAS_TRITON:
        return PLAIN
    if fused:
        return kernels
    return SimpleNamespace(**{**vars(PLAIN), "fill": kernels.fill})
