"""The sampler in plain PyTorch: what serves without a GPU, and what the kernel is held to."""

import math

import torch

from server.engine.request import Request, SamplingParams
from server.engine.sampler_rows import (
    COLDEST,
    has_penalty,
    must_go_on,
    num_generated,
    stop_ids,
)

_CANDIDATES = 1024  # sorted first for top-k and top-p; more only if they do not suffice


class ReferenceSampler:
    """Chooses tokens by the book. See `Sampler` for the tensors, which it shares."""

    def __init__(
        self,
        last_tokens: torch.Tensor,
        output_counts: torch.Tensor,
        is_prompt: torch.Tensor,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._last_tokens = last_tokens
        self._output_counts = output_counts
        self._is_prompt = is_prompt
        self._eos_token_ids = eos_token_ids
        self._vocab_size = output_counts.shape[1]
        self._device = last_tokens.device

    def sample(self, logits: torch.Tensor, requests: list[Request]) -> torch.Tensor:
        """Choose one token for each row: logits [num_rows, vocab] -> [num_rows] int64."""
        rows = self._tensor([request.state_row for request in requests], torch.int64)
        penalized = [i for i, request in enumerate(requests) if has_penalty(request.sampling)]
        if penalized or any(_edits_logits(request) for request in requests):
            logits = logits.float().clone()
            self._bias(logits, requests)
            self._penalize(logits, requests, penalized)
        tokens = self._choose(logits, requests)
        self._last_tokens[rows] = tokens
        if penalized:
            at = self._tensor(penalized, torch.int64)
            self._output_counts[rows[at], tokens[at]] += 1
        return tokens

    def _choose(self, logits: torch.Tensor, requests: list[Request]) -> torch.Tensor:
        tokens = logits.argmax(dim=-1)
        drawn = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
        if drawn:
            at = self._tensor(drawn, torch.int64)
            tokens[at] = self._draw(logits[at].float(), [requests[i] for i in drawn])
        return tokens

    def _draw(self, logits: torch.Tensor, requests: list[Request]) -> torch.Tensor:
        """Inverse transform sampling: one counter-based number a row, whatever the batch."""
        params = [request.sampling for request in requests]
        # Down from the likeliest token's 0, no temperature however low makes an infinity of it.
        logits = logits - logits.amax(dim=-1, keepdim=True)
        logits = logits / self._column([max(p.temperature, COLDEST) for p in params])
        if any(p.min_p > 0 for p in params):
            floor = self._column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])
            logits.masked_fill_(logits < floor, -math.inf)
        probs = logits.softmax(dim=-1)
        filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
        if filtered:
            at = self._tensor(filtered, torch.int64)
            probs[at] = self._filter(probs[at], [params[i] for i in filtered])
        cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
        draws = [uniform(r.seed, num_generated(r)) for r in requests]
        target = self._column(draws, torch.float64) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        return tokens.clamp_max(self._vocab_size - 1)  # if the logits are NaN

    def _filter(self, probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        """Zero what top-k, then top-p over what is left, rule out; the likeliest always stays.

        Tokens as likely as the last that stays do too: among equals the order of a sort would
        decide, and that depends on how many are sorted, thus on the rest of the batch.
        """
        vocab = probs.shape[-1]
        top_k = self._column([min(p.top_k or vocab, vocab) for p in params], torch.int64)
        top_p = self._column([p.top_p for p in params], torch.float64)
        num_sorted = min(vocab, max(_CANDIDATES, *(p.top_k for p in params)))
        while True:
            values = probs.topk(num_sorted, dim=-1).values.double()  # sorted, largest first
            cumulative = values.cumsum(dim=-1)
            left = cumulative.gather(1, top_k.clamp_max(num_sorted) - 1)  # by top-k
            left.masked_fill_(top_k == vocab, 1.0)
            place = torch.arange(num_sorted, device=probs.device)
            keep = (place < top_k) & (cumulative - values < top_p * left)
            num_kept = keep.sum(dim=-1, keepdim=True).clamp_min(1)
            is_enough = (num_kept < num_sorted) | (top_k <= num_sorted)
            if num_sorted == vocab or bool(is_enough.all()):
                break
            num_sorted = vocab
        return probs.masked_fill(probs < values.gather(1, num_kept - 1), 0)

    def _bias(self, logits: torch.Tensor, requests: list[Request]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        for row, request in enumerate(requests):
            bias = dict(request.sampling.logit_bias)
            if must_go_on(request):
                banned = stop_ids(request.sampling, self._eos_token_ids)
                bias.update(dict.fromkeys(banned, -math.inf))
            rows.extend([row] * len(bias))
            columns.extend(bias.keys())
            values.extend(bias.values())
        if rows:
            at = (self._tensor(rows, torch.int64), self._tensor(columns, torch.int64))
            logits.index_put_(at, self._tensor(values, torch.float32), accumulate=True)

    def _penalize(
        self, logits: torch.Tensor, requests: list[Request], penalized: list[int]
    ) -> None:
        if not penalized:
            return
        chosen = [requests[i] for i in penalized]
        at = self._tensor(penalized, torch.int64)
        rows = self._tensor([request.state_row for request in chosen], torch.int64)
        params = [request.sampling for request in chosen]
        counts, is_prompt = self._output_counts[rows], self._is_prompt[rows]
        values = logits[at]
        repetition = self._column([p.repetition_penalty for p in params])
        weakened = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where((counts > 0) | is_prompt, weakened, values)
        values -= counts * self._column([p.frequency_penalty for p in params])
        values -= (counts > 0) * self._column([p.presence_penalty for p in params])
        logits[at] = values

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._tensor(values, dtype).unsqueeze(1)

    def _tensor(self, values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the token's place alone (splitmix64)."""
    mask = 0xFFFFFFFFFFFFFFFF
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 32) / 2**32


def _edits_logits(request: Request) -> bool:
    return bool(request.sampling.logit_bias) or request.sampling.min_tokens > 0
