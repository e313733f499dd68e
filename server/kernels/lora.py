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


def rows_index(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """A slice where the bank rows are neighbours in order (no gather), else [num_rows] int64."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


# The step's rows of one linear, for each sublinear (or for all, stacked): A transposed
# [in, num_rows]; B [num_rows, width], scaling folded in; B's columns among the outputs, None: all.
LoraRows = list[tuple[torch.Tensor, torch.Tensor, slice | None]]


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: LoraRows,
    lora_b: torch.Tensor,
    step: LoraStep,
) -> None:
    """Add to each row of `y`, in place, what the row's own adapter adds.

        h[t, s]        = x[t] @ A[s, rows of t's adapter].T          shrink
        y[t, cols(s)] += h[t, s] @ B[rows of t's adapter, cols(s)]   expand
        y[t]          += y[t] * lora_b[gain row of t's adapter]      DoRA: gain - 1 per column

    y       [num_tokens, out]     the linear's output: stacked sublinears side by side
    x       [num_tokens, in]      the linear's input; both in the dtype of the bank
    rows                          the step's rows of the bank, from `AdapterBank.rows`
    lora_b  [num_bank_rows, out]  the whole bank, for gains
    """
    x = x.to(lora_b.dtype)
    for a, b, columns in rows:
        h = x @ a  # [num_tokens, num_rows]
        if step.foreign is not None:
            foreign = step.foreign
            if h.shape[1] > foreign.shape[1]:  # stacked: the same rows once for each sublinear
                foreign = foreign.repeat(1, h.shape[1] // foreign.shape[1])
            h.masked_fill_(foreign, 0)  # not a product: 0 * inf of a neighbour would be NaN
        (y if columns is None else y[:, columns]).addmm_(h, b)
    if step.gain_rows is not None:
        gained = y[step.gain_tokens]
        y[step.gain_tokens] = gained.addcmul(gained, lora_b[step.gain_rows])
