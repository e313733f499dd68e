"""LoRA on the GPU for a batch whose tokens use different adapters, at each adapter's true rank.

An adapter holds pages of `PAGE_ROWS` rows of the banks, anywhere in them. What a step needs to know
is made once on the host and lies in static device buffers (`LoraGpuStep`), so captured graphs read
the numbers of the step in which they are replayed. A token's result does not depend on its
neighbours; steps of up to `DECODE_TOKENS` tokens and longer ones sum in different orders.

For short steps the `finish` family ends a split-K linear in the same launch: LoRA, residual, SiLU,
the norms around it, rotary embedding and KV write (lora_endings.cuh).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.kernels.lora_launch import (
    NO_INPUT_NORM,
    empty_h,
    kernels_of,
    run_expand,
    slice_of_inputs,
)
from server.kernels.lora_step import (
    DECODE_TOKENS,
    FINISH_TOKENS,
    NO_ADAPTER,
    NO_GAIN,
    PAGE_ROWS,
    LoraGpuStep,
)
from server.kernels.nf4_pack import SplitK

SQUARES_COLUMNS = 64  # outputs whose squares `finish_norm` adds up in one part

_SHRINK_BLOCKS = 2112  # at most so many; then each does more in turn
_MAX_HEAD_DIM = 256  # a head's halves lie in one tile of the linear


@dataclass(frozen=True, slots=True)
class InputNorm:
    """The norm before a linear whose input was not divided by its root mean square.

    The linear's input is x * weight; its outputs are divided in place of it.

    squares  [num_tokens, parts]  fp32: parts of the sum of squares of each row of x
    hidden   elements of a row of x
    """

    squares: torch.Tensor
    hidden: int
    eps: float

    def as_params(self) -> tuple[int | float, ...]:
        """The kernels' struct of the same name."""
        assert self.squares.dtype == torch.float32, "sums of squares are fp32"
        assert self.squares.is_contiguous(), "sums of squares are contiguous"
        return self.squares.data_ptr(), self.squares.shape[1], 1 / self.hidden, self.eps


@dataclass(frozen=True, slots=True)
class RotaryStep:
    """Where the tokens of a step stand. Buffers may be longer than the step.

    rotary        [num_tables, max_positions, 2, head_dim / 2]  fp32: `fused.rotary_rows`
    positions     [num_tokens] int32
    tables        [num_tokens] int32: which of the rotary tables
    slot_mapping  [num_tokens] int32: block * block_size + offset; below 0 for padding, of which
                  nothing is written to the cache and neither position nor table is looked up
    """

    rotary: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    slot_mapping: torch.Tensor


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
    h = empty_h(x, a_bank, step)
    slices, _, sublinears, _ = h.shape
    usual_items = max(4, num_tokens)  # of rank 16; a block takes more in turn
    blocks = min(step.max_items, usual_items, max(1, _SHRINK_BLOCKS // (slices * sublinears)))
    kernels = kernels_of(x.device)
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
        slice_of_inputs(in_features),
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
    run_expand("expand", y, y.shape[1], h, b_bank, out_splits, step, linear=y, residual=residual)


def expand_silu(
    gate_up: torch.Tensor, h: torch.Tensor | None, b_bank: torch.Tensor, step: LoraGpuStep
) -> torch.Tensor:
    """What `expand` would make of `gate_up` [num_tokens, 2 * width], then silu(gate) * up."""
    num_tokens, out_features = gate_up.shape
    y = gate_up.new_empty((num_tokens, out_features // 2))
    splits = (out_features // 2, out_features // 2)
    run_expand("expand_silu", y, y.shape[1], h, b_bank, splits, step, linear=gate_up)
    return y


def finish(
    workspace: torch.Tensor,
    split: SplitK,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    input_norm: InputNorm | None = None,
    residual: torch.Tensor | None = None,
    with_silu: bool = False,
) -> torch.Tensor:
    """Finish a split-K linear: add its partial sums, LoRA, DoRA's gain and the residual in one go.

    workspace   [slots, num_tokens, out]  fp32, from `nf4_linear.partial_sums`
    split       of the same linear
    step        None where no token has an adapter; then h and b_bank are None too
    input_norm  divides the sums and LoRA, before DoRA's gain
    residual    [num_tokens, out]         bf16; added last
    with_silu   the linear is gate and up side by side: return silu(gate) * up
    returns     [num_tokens, out], or [num_tokens, out / 2] with_silu; bf16
    """
    num_tokens, columns = _finished_shape(workspace, out_splits)
    columns = columns // 2 if with_silu else columns
    y = torch.empty((num_tokens, columns), dtype=torch.bfloat16, device=workspace.device)
    run_expand(
        "finish_silu" if with_silu else "finish",
        y,
        columns,
        h,
        b_bank,
        out_splits,
        step,
        workspace=workspace,
        split=split,
        residual=residual,
        input_norm=input_norm.as_params() if input_norm else NO_INPUT_NORM,
    )
    return y


def finish_norm(
    workspace: torch.Tensor,
    split: SplitK,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    norm_weight: torch.Tensor,
    input_norm: InputNorm | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`finish`, and the norm after it up to the division, which is left to the next linear.

    norm_weight  [out]  bf16, contiguous
    returns      y [num_tokens, out] bf16, as `finish` returns it; y * norm_weight, likewise: what
                 the next linear and its shrink read; and the sums of squares of y
                 [num_tokens, ceil(out / SQUARES_COLUMNS)] fp32, for that linear's InputNorm
    """
    num_tokens, columns = _finished_shape(workspace, out_splits)
    assert norm_weight.shape == (columns,), "the norm is over the linear's outputs"
    assert norm_weight.dtype == torch.bfloat16, "the norm's weight is bf16"
    assert norm_weight.is_contiguous(), "the norm's weight is contiguous"
    y = torch.empty((num_tokens, columns), dtype=torch.bfloat16, device=workspace.device)
    scaled = torch.empty_like(y)
    squares = torch.empty((num_tokens, -(-columns // SQUARES_COLUMNS)), device=workspace.device)
    run_expand(
        "finish_norm",
        y,
        columns,
        h,
        b_bank,
        out_splits,
        step,
        workspace=workspace,
        split=split,
        residual=residual,
        input_norm=input_norm.as_params() if input_norm else NO_INPUT_NORM,
        output_norm=(norm_weight.data_ptr(), scaled.data_ptr(), squares.data_ptr()),
    )
    return y, scaled, squares


def finish_rotary(
    workspace: torch.Tensor,
    split: SplitK,
    h: torch.Tensor | None,
    b_bank: torch.Tensor | None,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    rotary_step: RotaryStep,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_norm: InputNorm | None = None,
) -> torch.Tensor:
    """`finish` of q, k and v side by side, then `fused_gpu.rotate_and_write_gpu`, in one go.

    Outputs are rounded to bf16 before they are rotated, as they are where these are two ops.

    k_cache, v_cache  [num_blocks, block_size, num_kv_heads, head_dim]  bf16, contiguous
    returns           the queries [num_tokens, num_heads, head_dim]  bf16
    """
    num_tokens, columns = _finished_shape(workspace, out_splits)
    num_kv_heads, head_dim = k_cache.shape[2:]
    half = head_dim // 2
    assert len(out_splits) == 3, "q, k and v"
    assert 16 <= head_dim <= _MAX_HEAD_DIM, "head sizes are 16 to 256"
    assert head_dim == 1 << half.bit_length(), "the head size is a power of two"
    assert out_splits[0] % head_dim == 0, "there are whole heads"
    assert out_splits[1] == out_splits[2] == num_kv_heads * head_dim, "qkv and the cache disagree"
    assert k_cache.dtype == v_cache.dtype == torch.bfloat16, "the cache is bf16"
    assert k_cache.is_contiguous(), "the key cache is contiguous"
    assert v_cache.is_contiguous(), "the value cache is contiguous"
    rotary = rotary_step.rotary
    assert rotary.shape[2:] == (2, half), "the rotary tables are for another head size"
    assert rotary.dtype == torch.float32, "rotary tables are fp32"
    assert rotary.is_contiguous(), "rotary tables are contiguous"
    per_token = rotary_step.positions, rotary_step.tables, rotary_step.slot_mapping
    assert all(part.dtype == torch.int32 for part in per_token), "where tokens stand is int32"
    assert all(part.shape[0] >= num_tokens for part in per_token), "each token stands somewhere"
    shape = (num_tokens, out_splits[0] // head_dim, head_dim)
    q = torch.empty(shape, dtype=torch.bfloat16, device=workspace.device)
    run_expand(
        "finish_rotary",
        q,
        columns // 2,
        h,
        b_bank,
        out_splits,
        step,
        workspace=workspace,
        split=split,
        input_norm=input_norm.as_params() if input_norm else NO_INPUT_NORM,
        rotary=(
            rotary.data_ptr(),
            *(part.data_ptr() for part in per_token),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            rotary.shape[1],
            half.bit_length() - 1,
        ),
    )
    return q


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


def _finished_shape(workspace: torch.Tensor, out_splits: tuple[int, ...]) -> tuple[int, int]:
    """Tokens and outputs of a linear whose sums are still apart."""
    _, num_tokens, out_features = workspace.shape
    assert num_tokens <= FINISH_TOKENS, "finish is for steps of few tokens"
    assert out_features == sum(out_splits), "the sublinears are not the linear's"
    return num_tokens, out_features
