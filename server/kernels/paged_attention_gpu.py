"""Paged attention on the GPU: decode rows split over their keys, prompt chunks in tiles.

Both kernels read what a step needs from static device buffers (`AttentionGpuStep`), and their grids
follow from shapes alone, so captured graphs serve the step in which they are replayed. The query
heads that share a KV head stand in one tile. Softmax runs online in base 2 with fp32 sums
(FlashAttention-2, arXiv:2307.08691; split over keys: Flash-Decoding). A row's bits depend on its
own context alone.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton reads its functions' source; their arguments have no Python types.

import math
from functools import cache

import torch
import triton  # type: ignore[import-untyped]  # it ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from server.kernels import attention_step
from server.kernels.attention_step import MAX_SPLITS, TILE_ROWS, AttentionGpuStep

_RESIDENT_PROGRAMS = 4  # decode programs that a multiprocessor holds at once
_PROGRAMS_PER_ROW = 4  # so many rows of usual length are done without a second item in turn
_MERGED_SPLITS = 8  # of a row, at a time
_DECODE_KEYS = 32  # of a tile
# Two tiles are under way, a whole item of a short row; with more registers, fewer programs reside.
_DECODE_OPTIONS = {"num_warps": 2, "num_stages": 3}
_PREFILL_WARPS = 8
_PREFILL_LARGE, _PREFILL_SMALL = (64, 3), (32, 3)  # keys of a tile; stages
_MIN_DOT_ROWS = 16
_LARGE_SHARED = ((8, 0), (9, 0), (10, 0))  # compute capabilities with over 160 KiB a program

_HIDDEN = tl.constexpr(-1.0e30)  # below any score, and finite: exp2(_HIDDEN - _HIDDEN) is 1
_RECORD = tl.constexpr(attention_step.RECORD)
_NUM_ITEMS = tl.constexpr(attention_step.NUM_ITEMS)
_NUM_TILES = tl.constexpr(attention_step.NUM_TILES)
_NUM_DECODES = tl.constexpr(attention_step.NUM_DECODES)
_NUM_TOKENS = tl.constexpr(attention_step.NUM_TOKENS)
_ROW = tl.constexpr(attention_step.ROW)
_START = tl.constexpr(attention_step.START)
_STOP = tl.constexpr(attention_step.STOP)
_TABLE = tl.constexpr(attention_step.TABLE)
_SPLITS = tl.constexpr(attention_step.SPLITS)
_FIRST_ITEM = tl.constexpr(attention_step.FIRST_ITEM)
_FIRST = tl.constexpr(attention_step.FIRST)
_COUNT = tl.constexpr(attention_step.COUNT)
_POSITION = tl.constexpr(attention_step.POSITION)


def paged_attention_gpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: AttentionGpuStep,
    sliding_window: int | None,
    *,
    with_decodes: bool,
    with_chunks: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of every token over its own request's context, the step's tokens included.

    q                 [num_tokens, num_heads, head_dim]; at least the tokens the step was filled
                      with (and, in a graph, all that it will be); the first two strides are free
    k_cache, v_cache  [num_blocks, block_size, num_kv_heads, head_dim], this step's KV included; of
                      one layout, rows contiguous
    sliding_window    a token sees itself and the sliding_window - 1 tokens before it; None: all
    with_decodes      whether the step has, or in a graph may have, decode rows
    with_chunks       the same of chunks
    out, returns      [num_tokens, num_heads, head_dim], contiguous; zeros where a token is padding
    """
    _check(q, k_cache, v_cache, step, sliding_window)
    assert with_decodes or with_chunks, "a step has decode rows or chunks"
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous(), "out is contiguous"
    if with_decodes:
        _launch_decode(q, k_cache, v_cache, out, step, pads=not with_chunks)
    if with_chunks:
        _launch_prefill(q, k_cache, v_cache, out, step)
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: AttentionGpuStep,
    sliding_window: int | None,
) -> None:
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    assert k_cache.shape == v_cache.shape, "keys and values have one shape"
    assert k_cache.stride() == v_cache.stride(), "keys and values have one layout"
    assert q.stride(2) == k_cache.stride(3) == 1, "rows of q and of the cache are contiguous"
    assert head_dim >= _MIN_DOT_ROWS, "head_dim is too small"
    assert head_dim & (head_dim - 1) == 0, "head_dim is a power of two"
    assert sliding_window == step.sliding_window, "the step was made for another window"
    assert block_size == step.block_size, "the step was made for another block size"
    shape = (step.num_heads, step.num_kv_heads, step.head_dim)
    assert (q.shape[1], num_kv_heads, q.shape[2]) == shape, "the step was made for other heads"


def _launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    step: AttentionGpuStep,
    *,
    pads: bool,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // step.num_kv_heads
    rows = min(num_tokens, step.max_decodes)
    resident = -(-_RESIDENT_PROGRAMS * _multiprocessors(q.device) // step.num_kv_heads)
    programs = min(rows * MAX_SPLITS, max(resident, rows * _PROGRAMS_PER_ROW))
    _decode[(step.num_kv_heads, max(programs, 1))](
        q,
        k_cache,
        v_cache,
        out,
        step.device_buffer,
        step.part_values,
        step.part_sums,
        step.num_done,
        num_tokens,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        _scale(head_dim),
        ITEMS=step.items_at,
        GROUP=group,
        GROUP_ROWS=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=step.block_size,
        TILE_KEYS=_DECODE_KEYS,
        MERGED_ROWS=triton.next_power_of_2(group),
        MERGED_SPLITS=_MERGED_SPLITS,
        PADS=pads,
        **_DECODE_OPTIONS,
    )


def _launch_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    step: AttentionGpuStep,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    tile_keys, num_stages = _prefill_shape(q.device)
    _prefill[(step.num_kv_heads, step.max_tiles(num_tokens))](
        q,
        k_cache,
        v_cache,
        out,
        step.device_buffer,
        num_tokens,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        _scale(head_dim),
        TILES=step.tiles_at,
        GROUP=num_heads // step.num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=step.block_size,
        WINDOW=step.sliding_window or 0,
        TILE_ROWS=TILE_ROWS,
        TILE_KEYS=tile_keys,
        num_warps=_PREFILL_WARPS,
        num_stages=num_stages,
    )


def _scale(head_dim: int) -> float:
    """What scores are multiplied by: softmax's 1 / sqrt(head_dim), for powers of 2, not of e."""
    return math.log2(math.e) / math.sqrt(head_dim)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _prefill_shape(device: torch.device) -> tuple[int, int]:
    """Keys of a tile and stages of the pipeline that fit the device's shared memory."""
    if device.type != "cuda":
        return _PREFILL_SMALL
    is_large = torch.cuda.get_device_capability(device) in _LARGE_SHARED
    return _PREFILL_LARGE if is_large else _PREFILL_SMALL


@triton.jit
def _add_keys(top, total, acc, scores, scale, v):
    # One round of online softmax: highest scaled score, sum of weights and weighted values of each
    # row. Scaling after the maximum leaves one fused multiply-add for each score.
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    kept = tl.exp2(top - new_top)
    total = total * kept + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _merge(
    out,
    part_values,
    part_sums,
    row,
    first_item,
    num_splits,
    kv_head,
    num_kv_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # Adds up the parts of one row and KV head, always in the same order.
    num_heads = num_kv_heads * GROUP
    group = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, HEAD_DIM)
    is_head = group < GROUP
    heads = kv_head * GROUP + group
    top = tl.full([GROUP_ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
    for at in range(0, num_splits, SPLITS):
        split = at + tl.arange(0, SPLITS)
        items = (first_item + split)[:, None]
        is_part = (split < num_splits)[:, None] & is_head[None, :]
        of_row = part_values + (items * num_heads + heads[None, :])[:, :, None] * HEAD_DIM
        of_head = part_sums + items * 2 * num_heads + heads[None, :]
        # Past the first-level cache, which may hold what an earlier launch left there.
        part = tl.load(
            of_row + dims[None, None, :],
            mask=is_part[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        part_top = tl.load(of_head, mask=is_part, other=_HIDDEN, cache_modifier=".cg")
        part_total = tl.load(of_head + num_heads, mask=is_part, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(part_top, 0))
        weights = tl.exp2(part_top - new_top[None, :])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(part_total * weights, 0)
        acc = acc * kept[:, None] + tl.sum(part * weights[:, :, None], 0)
        top = new_top
    total = tl.where(total == 0.0, 1.0, total)
    out_rows = out + (row * num_heads + heads) * HEAD_DIM
    tl.store(out_rows[:, None] + dims[None, :], acc / total[:, None], mask=is_head[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _decode(
    q,
    k_cache,
    v_cache,
    out,
    step,
    part_values,
    part_sums,
    num_done,
    num_tokens,
    q_token_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    scale,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    PADS: tl.constexpr,
):
    # One program: the query heads of one KV head over the keys of one item after another. Whoever
    # finishes the last item of a row merges the row.
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    num_kv_heads = tl.num_programs(0)
    num_programs = tl.num_programs(1)
    num_items = tl.load(step + _NUM_ITEMS)
    num_heads = num_kv_heads * GROUP
    group = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, HEAD_DIM)
    is_head = group < GROUP
    heads = kv_head * GROUP + group
    for item in range(program, num_items, num_programs):
        record = step + ITEMS + item * _RECORD
        row = tl.load(record + _ROW)
        start = tl.load(record + _START)
        stop = tl.load(record + _STOP)
        table = step + tl.load(record + _TABLE)
        num_splits = tl.load(record + _SPLITS)
        first_item = tl.load(record + _FIRST_ITEM)
        q_rows = q + row * q_token_stride + heads * q_head_stride
        q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=is_head[:, None], other=0.0)
        top = tl.full([GROUP_ROWS], _HIDDEN, tl.float32)
        total = tl.zeros([GROUP_ROWS], tl.float32)
        acc = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
        # Block ids are loaded a tile ahead: keys whose address waits for nothing can be prefetched.
        ahead = start + tl.arange(0, TILE_KEYS)
        blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < stop, other=0)
        for at in range(start, stop, TILE_KEYS):
            keys = at + tl.arange(0, TILE_KEYS)
            is_key = keys < stop
            # int64: the cache may hold more than 2**31 numbers
            slots = blocks.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * slot_stride
            kv = (slots + kv_head * head_stride)[:, None] + dims[None, :]
            k = tl.load(k_cache + kv, mask=is_key[:, None], other=0.0)
            v = tl.load(v_cache + kv, mask=is_key[:, None], other=0.0)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            top, total, acc = _add_keys(top, total, acc, scores, scale, v)
            ahead = keys + TILE_KEYS
            blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < stop, other=0)
        if num_splits == 1:
            total = tl.where(total == 0.0, 1.0, total)
            out_rows = out + (row * num_heads + heads) * HEAD_DIM
            tl.store(out_rows[:, None] + dims[None, :], acc / total[:, None], mask=is_head[:, None])
        else:
            of_row = part_values + (item * num_heads + heads) * HEAD_DIM
            of_head = part_sums + item * 2 * num_heads + heads
            tl.store(of_row[:, None] + dims[None, :], acc, mask=is_head[:, None])
            tl.store(of_head, top, mask=is_head)
            tl.store(of_head + num_heads, total, mask=is_head)
            tl.debug_barrier()  # all threads' stores come before the count that announces them
            counter = num_done + row * num_kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
                _merge(
                    out,
                    part_values,
                    part_sums,
                    row,
                    first_item,
                    num_splits,
                    kv_head,
                    num_kv_heads,
                    GROUP,
                    HEAD_DIM,
                    MERGED_ROWS,
                    MERGED_SPLITS,
                )
                tl.store(counter, 0)  # for the next launch
    if PADS:
        zeros = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
        for padding in range(tl.load(step + _NUM_DECODES) + program, num_tokens, num_programs):
            pad_rows = out + (padding * num_heads + heads) * HEAD_DIM
            tl.store(pad_rows[:, None] + dims[None, :], zeros, mask=is_head[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _prefill(
    q,
    k_cache,
    v_cache,
    out,
    step,
    num_tokens,
    q_token_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    head_stride,
    scale,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    # One program: the query heads of one KV head, times the tokens of one tile, over all their
    # keys. Programs past the last tile write zeros to the tokens past the last chunk; there are
    # enough of them, because `max_tiles` grows with num_tokens as tiles do.
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    num_tiles = tl.load(step + _NUM_TILES)
    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, HEAD_DIM)
    tokens = rows // GROUP  # of the tile; rows that GROUP leaves over are past its last token
    heads = kv_head * GROUP + rows % GROUP
    num_heads = tl.num_programs(0) * GROUP
    if tile >= num_tiles:
        padding = tl.load(step + _NUM_TOKENS) + (tile - num_tiles) * (TILE_ROWS // GROUP) + tokens
        pad_rows = out + (padding * num_heads + heads) * HEAD_DIM
        zeros = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
        is_padding = padding < num_tokens
        tl.store(pad_rows[:, None] + dims[None, :], zeros, mask=is_padding[:, None])
        return
    record = step + TILES + tile * _RECORD
    first = tl.load(record + _FIRST)
    count = tl.load(record + _COUNT)
    position = tl.load(record + _POSITION)
    table = step + tl.load(record + _TABLE)
    is_row = tokens < count
    positions = position + tokens
    q_rows = q + (first + tokens) * q_token_stride + heads * q_head_stride
    q_tile = tl.load(q_rows[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)
    # Every query sees the tiles of keys [shared, shared_stop); only those around need a mask.
    stop = position + count
    shared_stop = (position + 1) // TILE_KEYS * TILE_KEYS
    first_key = tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0
    shared = 0
    if WINDOW:
        shared = tl.cdiv(tl.maximum(stop - WINDOW, 0), TILE_KEYS) * TILE_KEYS
        shared = tl.minimum(shared, shared_stop)
    bounds = (first_key // TILE_KEYS * TILE_KEYS, shared, shared_stop, stop)
    top = tl.full([TILE_ROWS], _HIDDEN, tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or WINDOW > 0:
            ahead = bounds[part] + tl.arange(0, TILE_KEYS)
            blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < stop, other=0)
            for at in range(bounds[part], bounds[part + 1], TILE_KEYS):
                keys = at + tl.arange(0, TILE_KEYS)
                is_key = (keys >= first_key) & (keys < stop)
                # int64: the cache may hold more than 2**31 numbers
                slots = blocks.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * slot_stride
                kv = (slots + kv_head * head_stride)[:, None] + dims[None, :]
                if part == 1:
                    k = tl.load(k_cache + kv)
                    v = tl.load(v_cache + kv)
                else:
                    k = tl.load(k_cache + kv, mask=is_key[:, None], other=0.0)
                    v = tl.load(v_cache + kv, mask=is_key[:, None], other=0.0)
                scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
                if part != 1:
                    is_visible = keys[None, :] <= positions[:, None]
                    if WINDOW:
                        is_visible &= keys[None, :] > positions[:, None] - WINDOW
                    scores = tl.where(is_visible, scores, float("-inf"))
                top, total, acc = _add_keys(top, total, acc, scores, scale, v)
                ahead = keys + TILE_KEYS
                blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < stop, other=0)
    total = tl.where(total == 0.0, 1.0, total)
    out_rows = out + ((first + tokens) * num_heads + heads) * HEAD_DIM
    tl.store(out_rows[:, None] + dims[None, :], acc / total[:, None], mask=is_row[:, None])
