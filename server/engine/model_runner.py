"""Runs a plan on the device and hands back the tokens when they are there."""

from collections.abc import Iterator
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

PromptLogprobs = list[tuple[Scheduled, SampledLogprobs]]  # parts whose requests asked for them


@dataclass(slots=True)
class Launched:
    """A step on its way: its plan, and tensors in host memory that will hold what it found."""

    runner: "ModelRunner"
    plan: Plan
    tokens: torch.Tensor  # [num_sampled] int64
    logprobs: SampledLogprobs | None
    prompt_logprobs: PromptLogprobs
    done: torch.cuda.Event | None  # None: it is there


@dataclass(frozen=True, slots=True)
class Sampled:
    """One part's newly sampled token."""

    part: Scheduled
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """What a step works on beside the weights."""

    kv: KVCache
    bank: AdapterBank
    sampler: Sampler
    adapters: AdapterCache
    block_size: int


class ModelRunner:
    """Owns the device: weights, KV cache, adapter bank and sampler. Runs the reference ops."""

    def __init__(self, decoder: Decoder, parts: RunnerParts) -> None:
        self.decoder = decoder
        self._parts = parts

    def captures(self) -> Iterator[float]:
        """Prepare for steps of every shape, one at a time; yields the fraction that is done."""
        return iter(())

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step. On a GPU this returns before the step has run."""
        sampling = [part.request for part in plan.parts if part.samples]
        logits, tokens, prompt_logprobs = self._run(plan, sampling)
        logprobs = _logprobs(logits, tokens, sampling)
        if not tokens.is_cuda:
            return Launched(self, plan, tokens, logprobs, prompt_logprobs, None)
        prompt_logprobs = [(part, _copied(found)) for part, found in prompt_logprobs]
        logprobs = None if logprobs is None else _copied(logprobs)
        done = torch.cuda.Event()
        launched = Launched(self, plan, _pinned(tokens), logprobs, prompt_logprobs, done)
        done.record()
        return launched

    def _run(
        self, plan: Plan, sampling: list[Request]
    ) -> tuple[torch.Tensor, torch.Tensor, PromptLogprobs]:
        """Logits [num_sampled, vocab], tokens [num_sampled] and what prompts asked for."""
        parts = self._parts
        step = build_input(plan, parts.adapters, parts.sampler.last_tokens, parts.block_size)
        logits = self.decoder.forward(step, parts.kv, parts.bank)  # [num_logits, vocab]
        prompt_logprobs = self._prompt_logprobs(plan, logits)
        if prompt_logprobs:
            logits = logits[self._sampled_rows(plan)]
        return logits, parts.sampler.sample(logits, sampling), prompt_logprobs

    def collect(self, launched: Launched) -> list[Sampled]:
        """Wait for a step and bring its tokens to the host."""
        if launched.done is not None:
            launched.done.synchronize()
        for part, prompt in launched.prompt_logprobs:
            num_top = part.request.sampling.prompt_logprobs or 0
            part.request.prompt_logprobs[part.start :] = _as_lists(prompt, num_top)
        sampling = [part for part in launched.plan.parts if part.samples]
        token_ids = launched.tokens.tolist()
        if launched.logprobs is None:
            return [Sampled(part, t, None) for part, t in zip(sampling, token_ids, strict=True)]
        found = _as_lists(launched.logprobs, launched.logprobs.top_ids.shape[1])
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
        return torch.tensor(rows, dtype=torch.int64).to(self._parts.sampler.last_tokens.device)

    def _prompt_logprobs(self, plan: Plan, logits: torch.Tensor) -> PromptLogprobs:
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


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, on its way: only pinned memory is copied to without waiting."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _copied(logprobs: SampledLogprobs) -> SampledLogprobs:
    return SampledLogprobs(
        _pinned(logprobs.chosen), _pinned(logprobs.top_logprobs), _pinned(logprobs.top_ids)
    )


def _as_lists(logprobs: SampledLogprobs, num_top: int) -> list[TokenLogprobs]:
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
