"""The small ops of `fused` on the GPU, one launch each.

Short decode steps have them inside the linears (`lora_gpu.finish_rotary`, `lora_gpu.finish_norm`);
these serve longer steps, and the ends of the model.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton reads its functions' source; their arguments have no Python types.

import torch
import triton  # type: ignore[import-untyped]  # it ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above

_LARGEST_KV = tl.constexpr(2.0**15)  # as in `fused`
_HEAD_TILE = 8


def rotate_and_write_gpu(
    qkv: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    tables: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, put keys and values into the cache, return the queries.

    qkv               [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; rows contiguous
    rotary            [num_tables, max_positions, 2, head_dim / 2]  fp32, from `fused.rotary_rows`
    positions         [num_tokens] int32
    tables            [num_tokens] int32: which of the rotary tables
    k_cache, v_cache  [num_blocks, block_size, num_kv_heads, head_dim], contiguous
    slot_mapping      [num_tokens] int32: block * block_size + offset; below 0 for padding, of which
                      nothing is written to the cache and neither position nor table is looked up
    returns           [num_tokens, num_heads, head_dim]
    """
    num_tokens, columns = qkv.shape
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = columns // head_dim - 2 * num_kv_heads
    assert columns == (num_heads + 2 * num_kv_heads) * head_dim, "qkv and the cache disagree"
    assert rotary.shape[2:] == (2, head_dim // 2), "the rotary tables are for another head size"
    assert rotary.dtype == torch.float32, "rotary tables are fp32"
    assert rotary.is_contiguous(), "rotary tables are contiguous"
    assert k_cache.is_contiguous(), "the key cache is contiguous"
    assert v_cache.is_contiguous(), "the value cache is contiguous"
    assert qkv.stride(1) == 1, "the elements of a row of qkv are contiguous"
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    grid = (num_tokens, triton.cdiv(columns // head_dim, _HEAD_TILE))
    if num_tokens == 0:
        return q
    _rotate_and_write[grid](
        qkv,
        rotary,
        positions,
        tables,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        qkv.stride(0),
        rotary.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HALF_TILE=triton.next_power_of_2(head_dim // 2),
        HEAD_TILE=_HEAD_TILE,
        num_warps=2,
    )
    return q


def rms_norm_gpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 inside, rounded once.

    x        [num_tokens, hidden]; rows contiguous
    weight   [hidden]
    returns  [num_tokens, hidden]
    """
    num_tokens, hidden = x.shape
    assert x.stride(1) == 1, "the elements of a row of x are contiguous"
    y = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    if num_tokens:
        tile = triton.next_power_of_2(hidden)
        _rms_norm[(num_tokens,)](
            x, weight, y, x.stride(0), eps, HIDDEN=hidden, TILE=tile, num_warps=_warps(tile)
        )
    return y


def embed_gpu(
    token_ids: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look tokens up and begin the first norm: its division is left to the linear after it.

    token_ids  [num_tokens] int32 or int64
    embedding  [vocab, hidden], contiguous
    weight     [hidden]: the norm's
    returns    x [num_tokens, hidden]; x * weight, likewise; x's sums of squares [num_tokens, 1]
               fp32: what `lora_gpu.finish_norm` returns
    """
    num_tokens, hidden = token_ids.shape[0], embedding.shape[1]
    assert embedding.is_contiguous(), "the embedding is contiguous"
    x = torch.empty((num_tokens, hidden), dtype=embedding.dtype, device=embedding.device)
    scaled = torch.empty_like(x)
    squares = torch.empty((num_tokens, 1), dtype=torch.float32, device=embedding.device)
    if num_tokens:
        tile = triton.next_power_of_2(hidden)
        _embed[(num_tokens,)](
            token_ids,
            embedding,
            weight,
            x,
            scaled,
            squares,
            HIDDEN=hidden,
            TILE=tile,
            num_warps=_warps(tile),
        )
    return x, scaled, squares


def _warps(tile: int) -> int:
    """Of a program that has a row of so many elements."""
    return min(16, max(1, tile // 256))


@triton.jit
def _bounded(x):
    """As `fused._finite`: no NaN, nothing too large to be halved."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -_LARGEST_KV), _LARGEST_KV)


@triton.jit
def _rotate_and_write(
    qkv,
    rotary,
    positions,
    tables,
    slot_mapping,
    q,
    k_cache,
    v_cache,
    qkv_stride,
    max_positions,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
):
    """One program: HEAD_TILE heads of one token, in their two halves."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
    i = tl.arange(0, HALF_TILE)[None, :]
    slot = tl.load(slot_mapping + token).to(tl.int64)  # int64: slot * width can pass 2**31
    is_real = slot >= 0
    position = tl.load(positions + token, mask=is_real, other=0).to(tl.int64)
    table = tl.load(tables + token, mask=is_real, other=0).to(tl.int64)
    row = rotary + (table * max_positions + position) * (2 * HALF)
    cos = tl.load(row + i, mask=i < HALF, other=0.0)
    sin = tl.load(row + HALF + i, mask=i < HALF, other=0.0)

    is_inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (i < HALF)
    at = qkv + token * qkv_stride + head * (2 * HALF) + i
    x = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
    y = tl.load(at + HALF, mask=is_inside, other=0.0).to(tl.float32)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    first = tl.where(is_value, x, x * cos - y * sin)
    second = tl.where(is_value, y, y * cos + x * sin)

    to_q = q + (token * NUM_HEADS + head) * (2 * HALF) + i
    is_query = (head < NUM_HEADS) & is_inside
    tl.store(to_q, first, mask=is_query)
    tl.store(to_q + HALF, second, mask=is_query)

    first, second = _bounded(first), _bounded(second)
    to_k = k_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS) * (2 * HALF) + i
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS) & is_inside & is_real
    tl.store(to_k, first, mask=is_key)
    tl.store(to_k + HALF, second, mask=is_key)
    to_v = v_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * (2 * HALF) + i
    tl.store(to_v, first, mask=is_value & is_inside & is_real)
    tl.store(to_v + HALF, second, mask=is_value & is_inside & is_real)


@triton.jit
def _rms_norm(x, weight, y, x_stride, eps, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """One program: one row."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    row = tl.load(x + token * x_stride + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    gain = tl.load(weight + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / HIDDEN + eps)
    tl.store(y + token * HIDDEN + i, row * scale * gain, mask=i < HIDDEN)


@triton.jit
def _embed(
    token_ids, embedding, weight, x, scaled, squares, HIDDEN: tl.constexpr, TILE: tl.constexpr
):
    """One program: one row."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    token_id = tl.load(token_ids + token).to(tl.int64)
    raw = tl.load(embedding + token_id * HIDDEN + i, mask=i < HIDDEN, other=0.0)
    row = raw.to(tl.float32)
    gain = tl.load(weight + i, mask=i < HIDDEN, other=0.0).to(tl.float32)
    tl.store(x + token * HIDDEN + i, raw, mask=i < HIDDEN)
    tl.store(scaled + token * HIDDEN + i, row * gain, mask=i < HIDDEN)
    tl.store(squares + token, tl.sum(row * row, axis=0))
