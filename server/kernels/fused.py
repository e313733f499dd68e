"""The small ops between the matrix products: norm, rotary embedding and KV write, activation."""

import torch
import torch.nn.functional as F

_LARGEST_KV = 2.0**15  # far above what a sound model produces, and finite in fp16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 inside (arXiv:1910.07467).

    x        [num_tokens, hidden]
    weight   [hidden]
    returns  [num_tokens, hidden]
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary_rows(frequencies: torch.Tensor, max_positions: int, factor: float = 1.0) -> torch.Tensor:
    """Cosines and sines of every position, times `factor` (arXiv:2104.09864).

    frequencies  [head_dim / 2] fp32: radians from one position to the next
    returns      [max_positions, 2, head_dim / 2] fp32: cosines, then sines
    """
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * factor


def cos_and_sin(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate_and_write` takes, of the tokens whose `rotary_rows` these are.

    The sines' first half is negated: rotating is one roll and two products.

    rows     [num_tokens, 2, head_dim / 2]
    returns  two tensors [num_tokens, 1, head_dim]
    """
    cos, sin = rows.to(dtype).split(1, dim=1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_and_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, put keys and values into the cache, return the queries.

    qkv               [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    cos, sin          [num_tokens, 1, head_dim], from `cos_and_sin`
    k_cache, v_cache  [num_blocks, block_size, num_kv_heads, head_dim], written at slot_mapping
    slot_mapping      [num_tokens] int64: block * block_size + offset
    returns           [num_tokens, num_heads, head_dim], in the dtype of the cache
    """
    _, _, num_kv_heads, head_dim = k_cache.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    qk, v = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    rotated = (qk * cos).addcmul_(qk.roll(head_dim // 2, dims=-1), sin).to(k_cache.dtype)
    q, k = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
    k_cache.view(-1, num_kv_heads, head_dim)[slot_mapping] = _finite(k)
    v_cache.view(-1, num_kv_heads, head_dim)[slot_mapping] = _finite(v.to(v_cache.dtype))
    return q


def _finite(x: torch.Tensor) -> torch.Tensor:
    """Bound what enters the cache: attention masks by adding -inf, and NaN or inf would survive it.

    Blocks are handed on between requests, so one adapter's overflow must not reach another's.
    """
    return torch.nan_to_num(x, nan=0.0).clamp_(-_LARGEST_KV, _LARGEST_KV)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the halves of the last dimension: [num_tokens, 2 * n] -> [num_tokens, n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
