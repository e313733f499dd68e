"""The loss of a batch, without ever holding the logits of all its tokens."""

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from training.packing import IGNORED, Batch

CHUNK_TOKENS = 1024  # whose logits exist at once: 200 MB in fp32 with 49,152 tokens to choose from


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over the learned tokens of the negative log likelihood, fp32: a scalar.

    Only tokens that are learned pass the head, in chunks that are computed again for gradients.
    """
    hidden = model.model(
        input_ids=batch.ids,
        attention_mask=attention_mask(model, batch),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    is_learned = batch.labels != IGNORED
    hidden, labels = hidden[is_learned], batch.labels[is_learned]  # [num_learned, hidden]
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(labels), CHUNK_TOKENS):
        piece = hidden[start : start + CHUNK_TOKENS], labels[start : start + CHUNK_TOKENS]
        if torch.is_grad_enabled() and len(labels) > CHUNK_TOKENS:
            total = total + checkpoint(_chunk_loss, model.lm_head, *piece, use_reentrant=False)
        else:
            total = total + _chunk_loss(model.lm_head, *piece)
    return total


def attention_mask(model: Any, batch: Batch) -> torch.Tensor | None:
    """The batch's mask as this model's attention takes it.

    sdpa takes booleans, eager attention addends. Flash attention would take neither, and tells
    documents apart only in a batch of one row.
    """
    kind = model.config._attn_implementation
    assert kind in ("sdpa", "eager"), f"{kind} attention would let packed documents see each other"
    mask = batch.mask()
    if mask is None or kind != "eager":
        return mask
    lowest = torch.finfo(model.dtype).min
    zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return zeros.masked_fill(~mask, lowest)


def add_noise(model: Any, alpha: float) -> Any:
    """NEFTune (arXiv:2310.05914): uniform noise on embeddings while training; returns the hook."""

    def noisy(module: torch.nn.Module, _: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        width = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-width, width)

    return model.get_input_embeddings().register_forward_hook(noisy)


def _chunk_loss(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), labels, reduction="sum")
