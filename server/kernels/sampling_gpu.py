"""Sampling in one launch: every row by its own parameters, read where a CUDA graph can replay them.

A row's logits are never sorted. Top-k and top-p keep what lies above a threshold, and that is found
by bisection over the bits of the likelihoods, which as integers have the same order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Triton reads its functions' source; their arguments have no Python types.

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]  # it ships no types
import triton.language as tl  # type: ignore[import-untyped]  # as above

from server.kernels.sampling_step import BIAS_WORDS, ROW_WORDS, SamplerGpuStep

_TILE = 4096  # tokens that a program looks at together
_TOKENS_PER_WARP = 256  # of a tile
_ROW_WORDS, _BIAS_WORDS = tl.constexpr(ROW_WORDS), tl.constexpr(BIAS_WORDS)
_LIKELIEST = tl.constexpr(0x3F800000)  # the bits of 1.0, the likeliest token's weight
_LARGEST = tl.constexpr(0x7FFFFFFF)  # int32
_LOWEST = tl.constexpr(-(2**63))  # int64


@dataclass(frozen=True, slots=True)
class SamplerGpuState:
    """What the sampler keeps between steps, by state row.

    last_tokens    [max_running] int64           the newest token
    output_counts  [max_running, vocab] int32    how often each token was generated (penalties only)
    is_prompt      [max_running, vocab] bool     which tokens the prompt holds (penalties only)
    weights        [max_rows, vocab] fp32        scratch, by row of the step
    """

    last_tokens: torch.Tensor
    output_counts: torch.Tensor
    is_prompt: torch.Tensor
    weights: torch.Tensor


def sample_gpu(
    logits: torch.Tensor,
    step: SamplerGpuStep,
    state: SamplerGpuState,
    tokens_out: torch.Tensor,
) -> None:
    """Choose one token a row and take note of it in `state`. Nothing waits for the device.

    What is chosen depends on the row's own logits, parameters and state alone. Rows go through
    bias, penalties, temperature, min-p, top-k and top-p in that order; tokens as likely as the last
    that top-k or top-p keeps stay too, and the likeliest always does. Of what is left, the token is
    the first whose cumulative likelihood exceeds the row's random number.

    Greedy rows take the lowest of the ids that tie. A NaN counts as the largest logit; where the
    largest is NaN or infinite nothing is drawn, and its (first) id is the token.

    Weights and their sums are fp32, added up in a fixed order. So against exact arithmetic a draw
    can fall on the neighbouring token when it is within about 1e-6 of the edge between two, and
    top-p can keep or drop the tokens of one more likelihood when the mass above them is within
    about 1e-6 of top_p.

    logits      [num_rows, vocab]  bf16, fp16 or fp32, contiguous; left as they are
    step        filled for num_rows rows or more; padding rows do nothing
    tokens_out  [num_rows] int64
    """
    num_rows, vocab_size = logits.shape
    assert num_rows <= step.num_rows, "the step is filled for fewer rows"
    assert logits.is_contiguous(), "logits are contiguous"
    assert tokens_out.shape == (num_rows,), "one token a row"
    assert tokens_out.dtype == torch.int64, "token ids are int64"
    assert state.output_counts.shape[1] == vocab_size, "the state is for another vocabulary"
    assert state.weights.shape[1] >= vocab_size, "the state is for another vocabulary"
    if num_rows == 0:
        return
    _sample[(num_rows,)](
        logits,
        step.rows,
        step.biases,
        state.last_tokens,
        state.output_counts,
        state.is_prompt.view(torch.uint8),
        state.weights,
        tokens_out,
        state.weights.stride(0),
        VOCAB=vocab_size,
        TILE=_TILE,
        num_warps=max(1, _TILE // _TOKENS_PER_WARP),
        enable_fp_fusion=False,  # penalties round as they do one operation at a time
    )


@triton.jit
def _sample(
    logits,
    rows,
    biases,
    last_tokens,
    output_counts,
    is_prompt,
    weights,
    tokens_out,
    weights_stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one row of the step. The fields of its record are those of ROW, in order."""
    row = tl.program_id(0)
    record = rows + row * _ROW_WORDS
    state_row = tl.load(record).to(tl.int64)  # int64: state_row * vocab can pass 2**31
    temperature = tl.load(record + 1).to(tl.float32, bitcast=True)
    is_penalized = tl.load(record + 6) != 0
    num_biases = tl.load(record + 11)
    if state_row >= 0:
        row_logits = logits + row.to(tl.int64) * VOCAB
        row_weights = weights + row.to(tl.int64) * weights_stride
        counts = output_counts + state_row * VOCAB
        is_edited = is_penalized | (num_biases > 0)
        if is_edited:
            _copy(row_logits, row_weights, VOCAB, TILE)
            _add_biases(
                row_weights, biases + tl.load(record + 10) * _BIAS_WORDS, num_biases, VOCAB, TILE
            )
            if is_penalized:
                _penalize(row_weights, record, counts, is_prompt + state_row * VOCAB, VOCAB, TILE)
            token, largest = _find_likeliest(row_weights, VOCAB, TILE)
        else:
            token, largest = _find_likeliest(row_logits, VOCAB, TILE)
        if (temperature > 0) & (tl.abs(largest) < float("inf")):
            log_min_p = tl.load(record + 2).to(tl.float32, bitcast=True)
            if is_edited:
                mass = _weigh(
                    row_weights, row_weights, largest, temperature, log_min_p, VOCAB, TILE
                )
            else:
                mass = _weigh(row_logits, row_weights, largest, temperature, log_min_p, VOCAB, TILE)
            token = _draw(row_weights, record, mass, token, VOCAB, TILE)
        tl.store(tokens_out + row, token.to(tl.int64))
        tl.store(last_tokens + state_row, token.to(tl.int64))
        if is_penalized:
            tl.atomic_add(counts + token, 1)


@triton.jit
def _copy(logits, edited, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The row in fp32, where it may be edited. Ends in a barrier, as does all that writes."""
    for start in range(0, VOCAB, TILE):
        token = start + tl.arange(0, TILE)
        value = tl.load(logits + token, mask=token < VOCAB, other=0.0).to(tl.float32)
        tl.store(edited + token, value, mask=token < VOCAB)
    tl.debug_barrier()


@triton.jit
def _add_biases(edited, biases, num_biases, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Add a row's own list of biases; no token is in it twice."""
    start = 0
    while start < num_biases:
        index = start + tl.arange(0, TILE)
        bias_at = biases + index * _BIAS_WORDS
        token = tl.load(bias_at, mask=index < num_biases, other=-1)
        bias = tl.load(bias_at + 1, mask=index < num_biases, other=0).to(tl.float32, bitcast=True)
        is_token = (token >= 0) & (token < VOCAB)
        value = tl.load(edited + token, mask=is_token, other=0.0)
        tl.store(edited + token, value + bias, mask=is_token)
        start += TILE
    tl.debug_barrier()


@triton.jit
def _penalize(edited, record, counts, is_prompt, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Repetition over prompt and output, then frequency and presence over output."""
    repetition = tl.load(record + 7).to(tl.float32, bitcast=True)
    frequency = tl.load(record + 8).to(tl.float32, bitcast=True)
    presence = tl.load(record + 9).to(tl.float32, bitcast=True)
    for start in range(0, VOCAB, TILE):
        token = start + tl.arange(0, TILE)
        is_token = token < VOCAB
        value = tl.load(edited + token, mask=is_token, other=0.0)
        count = tl.load(counts + token, mask=is_token, other=0)
        prompt = tl.load(is_prompt + token, mask=is_token, other=0)
        weakened = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
        value = tl.where((count > 0) | (prompt != 0), weakened, value)
        value -= count.to(tl.float32) * frequency
        value -= tl.where(count > 0, presence, 0.0)
        tl.store(edited + token, value, mask=is_token)
    tl.debug_barrier()


@triton.jit
def _find_likeliest(logits, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Return the largest logit's id, the lowest of those that tie, and that logit.

    NaN is the largest of all. An fp32 becomes an integer of the same order, and the id's complement
    stands in the bits below it.
    """
    best = tl.full((TILE,), _LOWEST, tl.int64)
    for start in tl.range(0, VOCAB, TILE, loop_unroll_factor=4):
        token = start + tl.arange(0, TILE)
        value = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
        image = tl.where(value != value, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))
        best = tl.maximum(best, (image.to(tl.int64) << 32) | (~token & _LARGEST).to(tl.int64))
    found = tl.max(best, 0)
    image = (found >> 32).to(tl.int32)
    largest = (image ^ ((image >> 31) & _LARGEST)).to(tl.float32, bitcast=True)
    return (~found & _LARGEST).to(tl.int32), largest


@triton.jit
def _weigh(
    logits, weights, largest, temperature, log_min_p, VOCAB: tl.constexpr, TILE: tl.constexpr
):
    """Store exp((logit - largest) / temperature), or 0 below min-p; return the sum."""
    mass = tl.zeros((TILE,), tl.float32)
    for start in range(0, VOCAB, TILE):
        token = start + tl.arange(0, TILE)
        value = tl.load(logits + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
        value = tl.div_rn(value - largest, temperature)
        weight = tl.where(value < log_min_p, 0.0, tl.exp(value))
        tl.store(weights + token, weight, mask=token < VOCAB)
        mass += weight
    tl.debug_barrier()
    return tl.sum(mass, 0)


@triton.jit
def _draw(weights, record, mass, likeliest, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Rule out what top-k, then top-p over what is left, rule out; draw from the rest."""
    top_k = tl.load(record + 3)
    top_p = tl.load(record + 4).to(tl.float32, bitcast=True)
    low = top_k * 0 - 1
    if top_k > 0:
        wanted = top_k.to(tl.float32)
        low, least, count, above = _find_threshold(weights, low, wanted, True, VOCAB, TILE)
        mass = above + (wanted - count) * least.to(tl.float32, bitcast=True)
    if top_p < 1:
        low, _, _, _ = _find_threshold(weights, low, top_p * mass, False, VOCAB, TILE)
    draw = tl.load(record + 5).to(tl.uint32, bitcast=True)
    return _pick(weights, low, draw.to(tl.float64) * (2.0**-32), likeliest, VOCAB, TILE)


@triton.jit
def _find_threshold(
    weights, low, limit, BY_COUNT: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr
):
    """Find the least weight that has less than `limit` (tokens, or mass) above it.

    Returns low, high, amount, mass: weights whose bits are above `low` stay, the least of them has
    the bits `high`, and above that one are `amount` (as `limit`) and `mass`.
    """
    high = low * 0 + _LIKELIEST
    amount = limit * 0.0
    mass = limit * 0.0
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        counts = tl.zeros((TILE,), tl.float32)
        masses = tl.zeros((TILE,), tl.float32)
        below = tl.full((TILE,), -1, tl.int32)
        above = tl.full((TILE,), _LARGEST, tl.int32)
        for start in range(0, VOCAB, TILE):
            token = start + tl.arange(0, TILE)
            weight = tl.load(weights + token, mask=token < VOCAB, other=-1.0)
            bits = weight.to(tl.int32, bitcast=True)
            is_above = bits > middle
            if BY_COUNT:
                counts += tl.where(is_above, 1.0, 0.0)
            masses += tl.where(is_above, weight, 0.0)
            below = tl.maximum(below, tl.where(is_above, -1, bits))
            above = tl.minimum(above, tl.where(is_above, bits, _LARGEST))
        found_mass = tl.sum(masses, 0)
        found = tl.sum(counts, 0) if BY_COUNT else found_mass
        # Both ends move on to weights that there are, so few rounds go to the gaps between them.
        if found < limit:
            high = tl.maximum(tl.max(below, 0), low + 1)
            amount = found
            mass = found_mass
        else:
            low = tl.minimum(tl.min(above, 0), high) - 1
    return low, high, amount, mass


@triton.jit
def _kept(weights, token, low, VOCAB: tl.constexpr):
    """The weights of a tile, with 0 for what is ruled out."""
    weight = tl.load(weights + token, mask=token < VOCAB, other=0.0)
    return tl.where(weight.to(tl.int32, bitcast=True) > low, weight, 0.0)


@triton.jit
def _pick(weights, low, share, likeliest, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The first kept token up to which there is more than `share` of the kept mass."""
    mass = tl.zeros((), tl.float32)
    for start in range(0, VOCAB, TILE):
        mass += tl.sum(_kept(weights, start + tl.arange(0, TILE), low, VOCAB), 0)
    target = mass.to(tl.float64) * share
    token = tl.arange(0, TILE)
    before = tl.zeros((), tl.float32)
    inside = tl.sum(_kept(weights, token, low, VOCAB), 0)
    first = 0
    while (first + TILE < VOCAB) & ((before + inside).to(tl.float64) <= target):
        before += inside
        first += TILE
        inside = tl.sum(_kept(weights, first + token, low, VOCAB), 0)
    weight = _kept(weights, first + token, low, VOCAB)
    rest = (target - before.to(tl.float64)).to(tl.float32)
    # Rounding may leave the tile's running sum short of `rest`: then its last kept token is it.
    is_past = (weight > 0) & (tl.cumsum(weight, 0) > rest)
    past = tl.min(tl.where(is_past, token, _LARGEST), 0)
    last = tl.max(tl.where(weight > 0, token, -1), 0)
    found = tl.where(past < _LARGEST, past, last)
    return tl.where(found >= 0, first + found, likeliest)
