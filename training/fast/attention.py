"""Causal attention over documents laid end to end, forward and backward, without autograd."""

from typing import Any

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.functional import scaled_dot_product_attention

_ALIGNED = 128  # tokens: cuDNN plans once for each length, so only few lengths are taken there
_CUDNN_FASTER = (9, 0)  # from this compute capability on


class Attention:
    """One pass over given documents; the same for all layers.

    Documents all as long go through cuDNN on a Hopper GPU or later, others through flash attention.
    Without a GPU, PyTorch takes them one by one.

        q           [num_tokens, num_heads, head_size]      last dimension contiguous
        k, v        [num_tokens, num_kv_heads, head_size]
        attended    as q, contiguous
        log_sums    the log of each softmax's sum, fp32; its shape is the library's
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self._lengths, self._longest = lengths, max(lengths)
        self._device = device
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._starts = starts.to(device, non_blocking=True)  # [num_documents + 1]
        self._is_even = len(set(lengths)) == 1 and self._longest % _ALIGNED == 0
        self._rest: tuple[Any, ...] = ()  # what cuDNN's backward pass takes besides tensors

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attended` and `log_sums`."""
        if not q.is_cuda:
            return self._by_document(q, k, v), q.new_empty(0)
        if self._goes_to_cudnn(q, k, v):
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *map(self._rows, (q, k, v)), None, True, 0.0, True, False
            )
            self._rest = (*found[6:8], None, *found[2:6], 0.0, True)
            return found[0].transpose(1, 2).reshape(q.shape), found[1]
        found = torch.ops.aten._flash_attention_forward(
            q, k, v, self._starts, self._starts, self._longest, self._longest, 0.0, True, False
        )
        return found[0], found[1]

    def backward(
        self,
        d_attended: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attended: torch.Tensor,
        log_sums: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Gradients of q, k and v."""
        if not q.is_cuda:
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
                again = self._by_document(inputs[0], inputs[1], inputs[2])
            return list(torch.autograd.grad(again, inputs, d_attended))
        if self._goes_to_cudnn(q, k, v):
            found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *map(self._rows, (d_attended, q, k, v, attended)), log_sums, *self._rest
            )
            return [tensor.transpose(1, 2).flatten(0, 1) for tensor in found]
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # no dropout, so no seed
        spans = (self._starts, self._starts, self._longest, self._longest)
        return list(
            torch.ops.aten._flash_attention_backward(
                d_attended, q, k, v, attended, log_sums, *spans, 0.0, True, unused, unused
            )
        )

    def _goes_to_cudnn(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        if not self._is_even or torch.cuda.get_device_capability(self._device) < _CUDNN_FASTER:
            return False
        q, k, v = map(self._rows, (q, k, v))
        return bool(can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, True)))

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[num_tokens, heads, head_size] as [num_documents, heads, length, head_size]: a view."""
        rows: torch.Tensor = tensor.unflatten(0, (-1, self._longest)).transpose(1, 2)
        return rows

    def _by_document(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pieces = []
        for parts in zip(*(tensor.split(self._lengths) for tensor in (q, k, v)), strict=True):
            one_q, one_k, one_v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
            seen = scaled_dot_product_attention(
                one_q, one_k, one_v, is_causal=True, enable_gqa=True
            )
            pieces.append(seen.squeeze(0).transpose(0, 1))
        return torch.cat(pieces)
