"""Triton kernels of a training step: NF4 to 16 bits, norm, rotary embedding, gated activation."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton reads its functions' source; their arguments have no Python types.

import torch
import triton  # type: ignore[import-untyped]  # it ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from server.quant.nf4 import NF4Tensor

MIN_WARPS, MAX_WARPS = 4, 16
FILL_ROWS, FILL_GROUPS, FILL_WARPS = 4, 16, 4  # a thread writes 16 bytes at a time


@triton.jit
def _fill_kernel(
    qweight,
    absmax_codes,
    absmax_scales,
    absmax_levels,
    absmax_offset,
    levels,
    lora_a,
    lora_b,
    matrix,
    num_rows,
    in_features,
    stride,
    first_row,
    first_a_row,
    first_b_column,
    rank,
    width,
    scaling,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program writes GROUPS x 64 weights of ROWS rows, or as much of one row of lora_a."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = group[:, None] * 64 + tl.arange(0, 64)[None, :]
    is_inside = columns < in_features
    num_blocks = tl.cdiv(num_rows, ROWS)
    kind = matrix.dtype.element_ty
    if tl.program_id(0) < num_blocks:
        offset = tl.load(absmax_offset)
        bytes_at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
        tail = tl.arange(0, WIDTH)
        mine = tail - first_b_column
        for number in tl.static_range(ROWS):
            row = tl.program_id(0).to(tl.int64) * ROWS + number
            has_group = (group * 64 < in_features) & (row < num_rows)
            codes = tl.load(
                qweight + row * (in_features // 2) + bytes_at, mask=has_group[:, None], other=0
            ).to(tl.int32)
            at = row * (in_features // 64) + group
            fine = tl.load(absmax_codes + at, mask=has_group, other=0).to(tl.int32)
            coarse = tl.load(absmax_scales + at // 256, mask=has_group, other=0.0)
            absmax = tl.load(absmax_levels + fine) * coarse + offset
            high = tl.load(levels + (codes >> 4)) * absmax[:, None]
            low = tl.load(levels + (codes & 15)) * absmax[:, None]
            values = tl.reshape(tl.join(high, low), (GROUPS, 64))
            target = matrix + (first_row + row) * stride
            tl.store(target + columns, values.to(kind), mask=is_inside & (row < num_rows))
            if tl.program_id(1) == 0:
                has_b = (mine >= 0) & (mine < rank) & (row < num_rows)
                b = tl.load(lora_b + row * rank + mine, mask=has_b, other=0.0) * scaling
                has_room = (tail < width) & (row < num_rows)
                tl.store(target + in_features + tail, b.to(kind), mask=has_room)
    else:
        a_row = tl.program_id(0).to(tl.int64) - num_blocks
        has_a = (a_row < rank) & is_inside
        a = tl.load(lora_a + a_row * in_features + columns, mask=has_a, other=0.0)
        tl.store(matrix + (first_a_row + a_row) * stride + columns, a.to(kind), mask=is_inside)


@triton.jit
def _norm_kernel(x, weight, y, x_stride, y_stride, size, eps, BLOCK: tl.constexpr):
    """One program normalizes one token."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    normed = (value * scale).to(y.dtype.element_ty)  # rounded where the model rounds
    result = normed.to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    dy,
    x,
    weight,
    residual,
    dx,
    dy_stride,
    x_stride,
    residual_stride,
    dx_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    """One program: the gradient of one token before its norm, plus that of its residual."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    gradient = tl.load(dy + row * dy_stride + at, mask=inside, other=0.0).to(tl.float32)
    gradient *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = value * scale
    gradient = scale * (gradient - normed * (tl.sum(gradient * normed) / size))
    gradient += tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(dx + row * dx_stride + at, gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    y,
    x_stride,
    y_stride,
    num_heads,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One program rotates HEADS heads of one token; x and y may be the same memory."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF_BLOCK)
    inside = at < HALF
    c = tl.load(cos + row * 2 * HALF + at, mask=inside, other=0.0)[None, :]
    s = sign * tl.load(sin + row * 2 * HALF + at, mask=inside, other=0.0)[None, :]
    place = head[:, None] * 2 * HALF + at[None, :]
    mask = (head < num_heads)[:, None] & inside[None, :]
    first = tl.load(x + row * x_stride + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + row * x_stride + place + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    tl.store(y + row * y_stride + place, (first * c - second * s).to(kind), mask=mask)
    tl.store(y + row * y_stride + place + HALF, (second * c + first * s).to(kind), mask=mask)


@triton.jit
def _gate_kernel(gate_up, h, gate_up_stride, h_stride, size, BLOCK: tl.constexpr):
    """One program: silu(gate) * up of BLOCK features of one token."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    source = gate_up + row * gate_up_stride + at
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1 + tl.exp(-gate)) * up
    tl.store(h + row * h_stride + at, result.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(gate_up, h, gate_up_stride, h_stride, size, BLOCK: tl.constexpr):
    """One program: BLOCK features of one token. `h` holds its gradient before, its value after."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    source = gate_up + row * gate_up_stride + at
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(h + row * h_stride + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    kind = h.dtype.element_ty
    tl.store(h + row * h_stride + at, (silu * up).to(kind), mask=inside)
    slope = sigmoid * (1 + gate - silu)
    tl.store(source, (dh * up * slope).to(kind), mask=inside)
    tl.store(source + size, (dh * silu).to(kind), mask=inside)


def fill(
    weight: NF4Tensor,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None,
    matrix: torch.Tensor,
    *,
    first_row: int,
    first_a_row: int,
    first_b_column: int,
    num_a_rows: int,
) -> None:
    """See `ops.fill`; one launch."""
    out_features, in_features = weight.shape
    lora_a, lora_b, scaling = lora or (weight.levels, weight.levels, 0.0)
    width = matrix.shape[1] - in_features
    grid = (
        triton.cdiv(out_features, FILL_ROWS) + num_a_rows,
        triton.cdiv(in_features, 64 * FILL_GROUPS),
    )
    _fill_kernel[grid](
        weight.qweight,
        weight.absmax_codes,
        weight.absmax_scales,
        weight.absmax_levels,
        weight.absmax_offset,
        weight.levels,
        lora_a,
        lora_b,
        matrix,
        out_features,
        in_features,
        matrix.stride(0),
        first_row,
        first_a_row,
        first_b_column,
        lora_a.shape[0] if lora else 0,
        width,
        scaling,
        ROWS=FILL_ROWS,
        GROUPS=FILL_GROUPS,
        WIDTH=triton.next_power_of_2(max(width, 1)),
        num_warps=FILL_WARPS,
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See `ops.rms_norm`."""
    num_tokens, size = x.shape
    block = triton.next_power_of_2(size)
    _norm_kernel[(num_tokens,)](
        x, weight, out, x.stride(0), out.stride(0), size, eps, BLOCK=block, num_warps=_warps(block)
    )


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `ops.rms_norm_backward`."""
    num_tokens, size = x.shape
    block = triton.next_power_of_2(size)
    _norm_backward_kernel[(num_tokens,)](
        dy,
        x,
        weight,
        residual,
        out,
        dy.stride(0),
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        size,
        eps,
        BLOCK=block,
        num_warps=_warps(block),
    )


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float, out: torch.Tensor
) -> None:
    """See `ops.rotate`."""
    num_tokens, head_size = cos.shape
    num_heads = x.shape[1] // head_size
    heads = 8
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        out.stride(0),
        num_heads,
        sign,
        HEADS=heads,
        HALF=head_size // 2,
        HALF_BLOCK=triton.next_power_of_2(head_size // 2),
        num_warps=4,
    )


def gate(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """See `ops.gate`."""
    num_tokens, size = out.shape
    _gate_kernel[(num_tokens, triton.cdiv(size, 2048))](
        gate_up, out, gate_up.stride(0), out.stride(0), size, BLOCK=2048, num_warps=8
    )


def gate_backward(gate_up: torch.Tensor, h: torch.Tensor) -> None:
    """See `ops.gate_backward`."""
    num_tokens, size = h.shape
    _gate_backward_kernel[(num_tokens, triton.cdiv(size, 2048))](
        gate_up, h, gate_up.stride(0), h.stride(0), size, BLOCK=2048, num_warps=8
    )


def _warps(block: int) -> int:
    """Eight elements a thread."""
    return max(MIN_WARPS, min(MAX_WARPS, block // 256))
