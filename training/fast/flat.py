"""The adapter as one tensor, so that clearing, clipping and updating it take one launch each."""

from collections.abc import Sequence

import torch


def flatten(weights: Sequence[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Move the weights and their gradients into one fp32 tensor each, whose parts they become.

    What is returned is for an optimizer. Clear its gradient with `flat.grad.zero_()`: freeing the
    parts' gradients would part them from it.
    """
    assert {weight.dtype for weight in weights} == {torch.float32}
    flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for weight in weights:
        part = slice(start, start + weight.numel())
        weight.data = flat.data[part].view(weight.shape)
        weight.grad = flat.grad[part].view(weight.shape)
        start += weight.numel()
    return flat
