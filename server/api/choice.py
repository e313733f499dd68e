"""One engine request on the HTTP side: who answers, with what prompt, and how far it has come."""

import hashlib
import time
from dataclasses import dataclass, replace
from typing import get_args

import msgspec

from adapters.catalog import Lease
from adapters.manifest import AdapterLost, AdapterNotFound
from server.api.detokenizer import Detokenizer
from server.api.services import Services
from server.engine.messages import AddRequest, EngineInfo, FirstToken, RequestOutput, TokenLogprobs
from server.engine.request import BASE, AdapterRef, FinishReason, SamplingParams
from server.errors import ServeError, bad_request, engine_failed, model_not_found
from server.metrics import ServingPath


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers: what `model` meant when the request came, for as long as the request lives."""

    model: str  # as the client wrote it
    lease: Lease | None  # None: the base
    weight_set: str = BASE  # the merged model that answers for the adapter, if one does

    @property
    def adapter(self) -> AdapterRef | None:
        """What the base needs beside it."""
        if self.lease is None or self.weight_set:
            return None
        return AdapterRef.of(self.lease.revision)

    @property
    def adapter_name(self) -> str | None:
        """The registry's name, for metrics."""
        return None if self.lease is None else self.lease.revision.name

    @property
    def chat_template(self) -> str | None:
        """The adapter's own, None for the base's."""
        return None if self.lease is None else self.lease.revision.chat_template

    @property
    def path(self) -> ServingPath:
        if self.lease is None:
            return "base"
        return "merged" if self.weight_set else "adapter"

    def limits(self, info: EngineInfo) -> EngineInfo:
        """What the engine said, with the longest request that this one takes."""
        rope = None if self.lease is None else self.lease.revision.rope
        return msgspec.structs.replace(info, max_model_len=info.longest(rope)) if rope else info

    def fingerprint(self, info: EngineInfo) -> str:
        """A short hash of all that decides the answer besides the request."""
        digest = "" if self.lease is None else self.lease.revision.digest
        build = f"{info.dtype}/{info.quantization}/{sorted(info.kernels.items())}"
        identity = "\n".join((info.base_digest, digest + self.weight_set, build))
        return f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def resolve(services: Services, model: str, path: str | None = None) -> Target:
    """Find who `model` is and take a lease.

    path  the serving path that the client insists on; None: merged where there is such a model

    Raises ServeError 404 for an unknown name, never falls back to the base; 500 for one whose
    object the store has lost; 400 for a path that there is not, 409 for one that does not serve
    this model now.
    """
    if path is not None and path not in get_args(ServingPath):
        paths = ", ".join(get_args(ServingPath))
        raise bad_request(f"x-serving-path is {path[:64]!r}; it may be {paths}.")
    target = _target(services, model, wants_adapter=path == "adapter")
    try:
        return _checked(target, path)
    except ServeError:
        if target.lease is not None:
            target.lease.release()
        raise


def resolve_again(services: Services, target: Target, path: str | None) -> Target:
    """The same revision as it is served by now: its merged model may have left meanwhile.

    For the moment of submitting: a model that leaves after that waits for the request. Raises
    ServeError 409 as `resolve` does.
    """
    if target.lease is None or not target.weight_set:
        return target
    if services.merged.route(target.lease.revision.digest) != target.weight_set:
        target = replace(target, weight_set=BASE)
    return _checked(target, path)


def _checked(target: Target, path: str | None) -> Target:
    if path is not None and target.path != path:
        message = f"{target.model[:256]} is served by the {target.path} path now, not by {path}."
        raise ServeError(409, "path_not_available", message)
    return target


def _target(services: Services, model: str, *, wants_adapter: bool) -> Target:
    if model == services.config.model.name:
        return Target(model, None)
    try:
        lease = services.registry.lease(model)
    except AdapterLost as error:
        raise ServeError(500, "adapter_load_failed", error.message) from None
    except AdapterNotFound:
        raise model_not_found(model[:256]) from None
    merged = None if wants_adapter else services.merged.route(lease.revision.digest)
    return Target(model, lease, merged or BASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One engine request: a prompt, and how to go on from it."""

    prompt_ids: list[int]
    sampling: SamplingParams
    stops: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new in one choice."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: FinishReason | None


class Choice:
    """One engine request under way."""

    def __init__(
        self, services: Services, target: Target, plan: Plan, index: int, request: AddRequest
    ) -> None:
        self.index = index
        self.prompt_ids = plan.prompt_ids
        self.first: FirstToken | None = None
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(
            services.codec, plan.prompt_ids, plan.stops, plan.sampling.min_tokens
        )
        self._end_ids = {*services.engine.info.eos_token_ids, *plan.sampling.stop_token_ids}
        self.stream = services.engine.submit(request)
        name = target.adapter_name
        if name is not None and not services.registry.has(name):
            name = None  # deleted meanwhile, its series too
        self.meter = services.metrics.start_request(
            target.path, name, len(plan.prompt_ids), request.arrival_time
        )

    @property
    def num_tokens(self) -> int:
        """Tokens generated, up to the one that completed a stop string."""
        return self._detokenizer.num_tokens

    def feed(self, output: RequestOutput) -> Delta:
        """Take what the engine says is new."""
        if output.first is not None:
            self.first = output.first
            self.meter.first(output.first)
        if output.finish_reason == "abort":
            raise engine_failed("The engine gave up this request.")
        num_before, given = self.num_tokens, output.token_ids
        ends = output.finish_reason == "stop" and bool(given) and given[-1] in self._end_ids
        text = self._detokenizer.feed(given[:-1] if ends else given)
        reason = output.finish_reason
        if self._detokenizer.has_stopped:
            reason = "stop"
            self.stream.close()
        elif reason is not None:
            self._detokenizer.skip(int(ends))  # the end of sequence counts, and is no text
            text += self._detokenizer.flush()
        used = self.num_tokens - num_before
        if used:
            self.meter.tokens(used, time.monotonic())
        if reason is not None:
            self.finish_reason = reason
            self.meter.finish(reason)
        return Delta(
            index=self.index,
            text=text,
            token_ids=given[:used],
            logprobs=output.logprobs[:used] if output.logprobs is not None else None,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=reason,
        )

    def close(self, error: ServeError | None) -> None:
        """Abort what is unfinished and count how it ended."""
        self.stream.close()
        if self.finish_reason is None:
            self.finish_reason = "abort"
            if error is None:
                self.meter.finish("abort")
            else:
                self.meter.fail(error.code or "error")
