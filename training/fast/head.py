"""The last norm, the head and the loss in one op that never holds all logits."""

from typing import Any

import torch

from training.fast.ops import Ops

CHUNK_TOKENS = 512  # whose logits exist at once, in 16 bits and up to three times in fp32


class HeadLoss(torch.autograd.Function):
    """Sum of the negative log likelihoods of the learned tokens, fp32.

    hidden      [num_tokens, hidden]    of the last layer
    learned     [num_learned] int64     which of them predict a label
    labels      [num_learned] int64
    norm, head  [hidden], [vocab, hidden]: frozen

    The gradient of `hidden` is made chunk by chunk on the way forward, where the logits are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        learned: torch.Tensor,
        labels: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        head: torch.Tensor,
        ops: Ops,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        needs_gradient = ctx.needs_input_grad[0]
        d_hidden = torch.zeros_like(hidden) if needs_gradient else None
        for places, wanted in zip(
            learned.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True
        ):
            x = hidden.index_select(0, places)
            normed = torch.empty_like(x)
            ops.rms_norm(x, norm, eps, normed)
            logits = torch.mm(normed, head.t()).float()  # [num_chunk, vocab]
            log_sums = logits.logsumexp(-1, keepdim=True)
            total += (log_sums - logits.gather(1, wanted.unsqueeze(1))).sum()
            if d_hidden is None:
                continue
            d_logits = logits.sub_(log_sums).exp_()
            d_logits.scatter_add_(1, wanted.unsqueeze(1), d_logits.new_full((len(wanted), 1), -1.0))
            d_normed = torch.mm(d_logits.to(head.dtype), head)
            d_x = torch.empty_like(x)
            ops.rms_norm_backward(d_normed, x, norm, eps, torch.zeros_like(x), d_x)
            d_hidden.index_copy_(0, places, d_x)
        ctx.d_hidden = d_hidden
        return total

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> Any:
        d_hidden, ctx.d_hidden = ctx.d_hidden, None  # or it would stay until the whole pass is over
        return d_hidden.mul_(d_total), None, None, None, None, None, None
