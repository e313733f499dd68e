"""Runs a plan on the device and hands back the tokens when they are there."""

from dataclasses import dataclass

import torch

from server.engine.adapter_cache import AdapterCache
from server.engine.batch import build_input, num_logits
from server.engine.messages import TokenLogprobs
from server.engine.request import Request
from server.engine.sampler import SampledLogprobs, Sampler, token_logprobs
from server.engine.scheduler import Plan, Scheduled
from server.model.adapter_bank import AdapterBank
from server.model.decoder import Decoder
from server.model.kv_cache import KVCache


@dataclass(slots=True)
class Launched:
    """A step on its way: its plan, and device tensors that will hold what it found."""

    plan: Plan
    tokens: torch.Tensor  # [num_sampled] int64
    logprobs: SampledLogprobs | None
    prompt_logprobs: list[tuple[Scheduled, SampledLogprobs]]
    done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One part's newly sampled token."""

    part: Scheduled
    token_id: int
    logprobs: TokenLogprobs | None


class ModelRunner:
    """Owns the device: weights, KV cache, adapter bank and sampler."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        bank: AdapterBank,
        sampler: Sampler,
        adapters: AdapterCache,
        block_size: int,
    ) -> None:
        self.decoder = decoder
        self._kv = kv
        self._bank = bank
        self._sampler = sampler
        self._adapters = adapters
        self._block_size = block_size

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. On a GPU this returns before the step has run."""
        step = build_input(plan, self._adapters, self._sampler.last_tokens, self._block_size)
        logits = self.decoder.forward(step, self._kv, self._bank)  # [num_logits, vocab]
        prompt_logprobs = self._prompt_logprobs(plan, logits)
        sampling = [part.request for part in plan.parts if part.samples]
        sampled_logits = logits[self._sampled_rows(plan)] if prompt_logprobs else logits
        tokens = self._sampler.sample(sampled_logits, sampling)
        logprobs = _logprobs(sampled_logits, tokens, sampling)
        done = None
        if tokens.is_cuda:
            tokens = tokens.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Launched(plan, tokens, logprobs, prompt_logprobs, done)

    def collect(self, launched: Launched) -> list[Sampled]:
        """Wait for a step and bring its tokens to the host."""
        if launched.done is not None:
            launched.done.synchronize()
        for part, prompt in launched.prompt_logprobs:
            num_top = part.request.sampling.prompt_logprobs or 0
            part.request.prompt_logprobs[part.start :] = _to_host(prompt, num_top)
        sampling = [part for part in launched.plan.parts if part.samples]
        token_ids = launched.tokens.tolist()
        if launched.logprobs is None:
            return [Sampled(part, t, None) for part, t in zip(sampling, token_ids, strict=True)]
        found = _to_host(launched.logprobs, launched.logprobs.top_ids.shape[1])
        return [
            Sampled(part, token_id, _trim(row, part.request.sampling.logprobs))
            for part, token_id, row in zip(sampling, token_ids, found, strict=True)
        ]

    def _sampled_rows(self, plan: Plan) -> torch.Tensor:
        """Which logits rows are the sampled ones, where a prompt's own tokens have logits too."""
        rows, end = [], 0
        for part in plan.parts:
            end += num_logits(part)
            if part.samples:
                rows.append(end - 1)
        return torch.tensor(rows, dtype=torch.int64).to(self._sampler.last_tokens.device)

    def _prompt_logprobs(
        self, plan: Plan, logits: torch.Tensor
    ) -> list[tuple[Scheduled, SampledLogprobs]]:
        """Logprobs of each chunk's following prompt tokens, for requests that asked."""
        found, end = [], 0
        for part in plan.parts:
            first, end = end, end + num_logits(part)
            num_top = part.request.sampling.prompt_logprobs
            following = part.request.prompt_ids[part.start + 1 : part.stop + 1]
            if num_top is None or part.request.output_ids or not following:
                continue
            targets = torch.tensor(following, dtype=torch.int64).to(logits.device)
            rows = logits[first : first + len(following)]
            found.append((part, token_logprobs(rows, targets, num_top)))
        return found


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, requests: list[Request]
) -> SampledLogprobs | None:
    wanted = [r.sampling.logprobs for r in requests if r.sampling.logprobs is not None]
    return token_logprobs(logits, tokens, max(wanted)) if wanted else None


def _to_host(logprobs: SampledLogprobs, num_top: int) -> list[TokenLogprobs]:
    rows = zip(
        logprobs.chosen.tolist(),
        logprobs.top_ids[:, :num_top].tolist(),
        logprobs.top_logprobs[:, :num_top].tolist(),
        strict=True,
    )
    return [TokenLogprobs(chosen, ids, values) for chosen, ids, values in rows]


def _trim(row: TokenLogprobs, num_top: int | None) -> TokenLogprobs | None:
    if num_top is None:
        return None
    return TokenLogprobs(row.logprob, row.top_ids[:num_top], row.top_logprobs[:num_top])
