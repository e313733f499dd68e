"""Attention over a paged KV cache (the idea: vLLM, arXiv:2309.06180)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Requests that add one token each; their tokens come first in the step.

    block_tables  [num_rows, max_blocks]   int64, rows padded with block 0
    lengths       [num_rows]               int64: tokens of context, the new one included
    """

    block_tables: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One request's chunk of prompt: tokens [first, first + num_tokens) of the step."""

    first: int
    num_tokens: int
    context: int  # tokens of this request whose KV exists already
    block_table: torch.Tensor  # [num_blocks] int64


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Where each token of one step finds its keys."""

    decode: DecodeRows | None
    chunks: tuple[PrefillChunk, ...]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: AttentionStep,
    sliding_window: int | None,
) -> torch.Tensor:
    """Causal attention of every token over its own request's context, the step's tokens included.

    q                 [num_tokens, num_heads, head_dim]
    k_cache, v_cache  [num_blocks, block_size, num_kv_heads, head_dim], this step's KV included
    sliding_window    a token sees itself and the sliding_window - 1 tokens before it; None: all
    returns           [num_tokens, num_heads, head_dim]
    """
    out = torch.empty_like(q)
    if step.decode is not None:
        num_rows = step.decode.lengths.numel()
        out[:num_rows] = _decode(q[:num_rows], k_cache, v_cache, step.decode, sliding_window)
    for chunk in step.chunks:
        tokens = slice(chunk.first, chunk.first + chunk.num_tokens)
        out[tokens] = _prefill(q[tokens], k_cache, v_cache, chunk, sliding_window)
    return out


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rows: DecodeRows,
    sliding_window: int | None,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    flat = rows.block_tables.flatten()
    # [num_rows, max_context, num_kv_heads, head_dim] -> heads first
    k = k_cache.index_select(0, flat).view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    v = v_cache.index_select(0, flat).view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
    at = torch.arange(k.shape[2], device=q.device)
    visible = at < rows.lengths[:, None]  # [num_rows, max_context]
    if sliding_window is not None:
        visible &= at >= rows.lengths[:, None] - sliding_window
    # Query heads that share a KV head stand where a prompt's queries would: one pass over its keys.
    q = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None, :])
    return out.reshape(num_rows, num_heads, head_dim)


def _prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunk: PrefillChunk,
    sliding_window: int | None,
) -> torch.Tensor:
    num_keys = chunk.context + chunk.num_tokens
    k = k_cache.index_select(0, chunk.block_table).flatten(0, 1)[:num_keys]
    v = v_cache.index_select(0, chunk.block_table).flatten(0, 1)[:num_keys]
    at = torch.arange(num_keys, device=q.device)
    last = torch.arange(chunk.context, num_keys, device=q.device)[:, None]
    visible = at <= last  # [num_tokens, num_keys]
    if sliding_window is not None:
        visible &= at > last - sliding_window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=visible,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
