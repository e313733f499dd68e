"""Each token's own LoRA, added to a linear's output (the idea: Punica, arXiv:2310.18547)."""

from dataclasses import dataclass

import torch

NO_ROW = -1


@dataclass(frozen=True, slots=True)
class LoraStep:
    """Which bank rows each token of one step may use; made once a step, used by every linear.

    rows         slice, or [num_rows] int64    bank rows of the step's adapters, end to end
    foreign      [num_tokens, num_rows] bool   True where a row is another adapter's; None: nowhere
    gain_rows    [num_gain_tokens] int64       bank row with DoRA's gain, for tokens that have one
    gain_tokens  [num_gain_tokens] int64       those tokens
    """

    rows: slice | torch.Tensor
    foreign: torch.Tensor | None
    gain_rows: torch.Tensor | None
    gain_tokens: torch.Tensor | None


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    out_splits: tuple[int, ...],
    step: LoraStep,
) -> None:
    """Add to each row of `y`, in place, what the row's own adapter adds.

        h[t, s]        = x[t] @ lora_a[s, rows of t's adapter].T          shrink
        y[t, cols(s)] += h[t, s] @ lora_b[rows of t's adapter, cols(s)]   expand
        y[t]          += y[t] * lora_b[gain row of t's adapter]           DoRA: gain - 1 per column

    y       [num_tokens, out]               the linear's output: stacked sublinears side by side
    x       [num_tokens, in]                the linear's input
    lora_a  [num_sublinears, num_bank_rows, in]
    lora_b  [num_bank_rows, out]            scaling folded in
    out_splits                              columns of each sublinear; their sum is `out`
    """
    x = x.to(lora_a.dtype)
    accumulate = y if y.dtype == lora_b.dtype else torch.zeros_like(y, dtype=lora_b.dtype)
    first = 0
    for sublinear, width in enumerate(out_splits):
        columns = slice(first, first + width)
        h = x @ lora_a[sublinear, step.rows].T  # [num_tokens, num_rows]
        if step.foreign is not None:
            h.masked_fill_(step.foreign, 0)  # not a product: 0 * inf of a neighbour would be NaN
        accumulate[:, columns].addmm_(h, lora_b[step.rows, columns])
        first += width
    if accumulate is not y:
        y += accumulate
    if step.gain_rows is not None:
        gained = y[step.gain_tokens]
        y[step.gain_tokens] = gained.addcmul(gained, lora_b[step.gain_rows].to(y.dtype))
