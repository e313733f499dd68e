"""The step loop: plan, launch, and deliver, for requests that come and go at any time."""

import logging
import time

from server.engine.adapter_cache import AdapterCache
from server.engine.block_manager import BlockManager
from server.engine.messages import EngineStats, FirstToken, RequestOutput
from server.engine.model_runner import Launched, Sampled
from server.engine.request import FinishReason, Request
from server.engine.scheduler import Scheduler
from server.engine.weight_sets import WeightSets

logger = logging.getLogger(__name__)


class Engine:
    """One base, its adapters, and every request in flight. Single-threaded; loads run beside it."""

    def __init__(
        self,
        scheduler: Scheduler,
        weight_sets: WeightSets,
        blocks: BlockManager,
        adapters: AdapterCache,
        eos_token_ids: tuple[int, ...],
        *,
        overlap: bool,
    ) -> None:
        self.adapters = adapters
        self._scheduler = scheduler
        self.weight_sets = weight_sets
        self._blocks = blocks
        self._eos_token_ids = frozenset(eos_token_ids)
        self._overlap = overlap
        self._requests: dict[str, Request] = {}
        self._in_flight: list[Launched] = []
        self._outputs: list[RequestOutput] = []  # made, and not handed out yet
        self.is_stalled = False  # the last step could run nothing: adapters are loading
        self._num_steps = 0
        self._step_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step may get anything done."""
        return bool(self._requests or self._in_flight)

    def add(self, request: Request) -> None:
        """Accept a request; RequestOutputs follow until one finishes it."""
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Free everything a request holds, at once."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._scheduler.finish(request)

    def drop_adapter(self, digest: str) -> None:
        """Free an adapter's bank pages, host memory and cached KV."""
        self._scheduler.forget_adapter(digest)
        self.adapters.drop(digest)

    def drop_weight_set(self, digest: str) -> None:
        """Free a merged model and its cached KV, once its requests are over."""
        self._scheduler.forget_adapter(digest)
        self.weight_sets.drop(digest)

    @property
    def is_loading(self) -> bool:
        """Whether adapters or weight sets are on their way."""
        return self.adapters.is_loading or self.weight_sets.is_loading

    def poll(self) -> None:
        """Take in adapters and weight sets that have arrived; a step does so too."""
        self.adapters.poll()
        if self.weight_sets.is_loading:
            self.weight_sets.poll({request.weight_set for request in self._requests.values()})

    def step(self) -> list[RequestOutput]:
        """Launch the next forward pass, then deliver the tokens of the one before it.

        Without overlap (a CPU has computed by the time `launch` returns) it delivers its own.
        """
        began = time.monotonic()
        self.poll()
        self._fail_unloadable()
        plan = self._scheduler.schedule(began)
        launched = self.weight_sets.launch(plan)
        if self._overlap:
            launched, self._in_flight = self._in_flight, launched
        for own in launched:
            self._commit(own)
        self.is_stalled = not plan.parts and not launched
        if plan.parts:
            self._num_steps += 1
            self._step_seconds += time.monotonic() - began
        return self._take_outputs()

    def fail_all(self, message: str) -> list[RequestOutput]:
        """Give up every request with an error: a step failed, and whose fault it was is unknown.

        Before the errors come the outputs of that step: requests may have ended in it.
        """
        self._in_flight = []
        for request_id in list(self._requests):
            self.abort(request_id)
            self._outputs.append(
                RequestOutput(request_id=request_id, error=message, error_code="engine_failed")
            )
        return self._take_outputs()

    def stats(self) -> EngineStats:
        """Gauges and running totals now."""
        waiting = self._scheduler.waiting
        ready = self.adapters.ready
        wanted = {r.adapter.digest for r in waiting if r.adapter is not None} - set(ready)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(waiting),
            num_free_blocks=self._blocks.num_free,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            prefix_queries=self._scheduler.prefix_queries,
            prefix_hits=self._scheduler.prefix_hits,
            bank_rows_used=self.adapters.num_rows_used,
            host_bytes_used=self.adapters.num_host_bytes,
            resident_adapters=ready,
            wanted_adapters=sorted(wanted),
        )

    def _take_outputs(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _fail_unloadable(self) -> None:
        """Requests whose adapter could not be loaded: an error, never the base instead."""
        for digest, message in self.adapters.take_failures().items():
            logger.error("adapter %s could not be loaded: %s", digest, message)
            waiting = [r for r in self._scheduler.waiting if r.fairness_key == digest]
            for request in waiting:
                self.abort(request.request_id)
                self._outputs.append(
                    RequestOutput(
                        request_id=request.request_id,
                        error=f"The adapter could not be loaded: {message}",
                        error_code="adapter_load_failed",
                    )
                )

    def _commit(self, launched: Launched) -> None:
        """Append what a step sampled; stop requests or let them go on."""
        now = time.monotonic()
        for sampled in launched.runner.collect(launched):
            request = sampled.part.request
            request.num_pending -= 1
            if request.is_finished:
                continue  # it stopped while this over-run token was on its way
            self._outputs.append(self._deliver(request, sampled, now))
        for part in launched.plan.chunks:
            if not part.samples:
                self._scheduler.remember_blocks(part)

    def _deliver(self, request: Request, sampled: Sampled, now: float) -> RequestOutput:
        request.output_ids.append(sampled.token_id)
        self._scheduler.remember_blocks(sampled.part)
        output = RequestOutput(request_id=request.request_id)
        if request.sampling.max_tokens:
            output.token_ids = [sampled.token_id]
            output.logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        if len(request.output_ids) == 1:
            self._add_first(request, output, now)
        output.finish_reason = self._finish_reason(request, sampled.token_id)
        if output.finish_reason is not None:
            del self._requests[request.request_id]
            self._scheduler.finish(request)
        return output

    def _add_first(self, request: Request, output: RequestOutput, now: float) -> None:
        assert request.first_scheduled_time is not None, "a token came before its schedule"
        output.first = FirstToken(
            scheduled_time=request.first_scheduled_time,
            first_token_time=now,
            num_cached_tokens=request.num_cached_tokens,
            tier=request.tier,
        )
        if request.sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *request.prompt_logprobs]

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.sampling
        if params.max_tokens and len(request.output_ids) > params.min_tokens:
            if token_id in self._eos_token_ids and not params.ignore_eos:
                return "stop"
            if token_id in params.stop_token_ids:
                return "stop"
        return "length" if len(request.output_ids) >= params.max_tokens else None
