"""An engine driven in this process, and when its tokens came."""

import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.config import Config
from server.engine.build import build_engine
from server.engine.gpu_runner import GpuRunner
from server.engine.latency import settle
from server.engine.messages import RequestOutput, WeightSetEvent
from server.engine.request import BASE, AdapterRef, Request, SamplingParams

OnStep = Callable[[float, list[RequestOutput]], None]  # seconds since the start, what came


@dataclass(slots=True)
class Trace:
    """When tokens came, on the clock of time.perf_counter."""

    began: float
    ended: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)  # end of a step, tokens it gave
    times: dict[str, list[float]] = field(default_factory=dict)  # by request

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return self.ended - self.began

    def rate(self, first: float, last: float) -> float:
        """Tokens per second of the steps that ended between two moments, seconds after `began`."""
        ended = [(time - self.began, count) for time, count in self.steps]
        return sum(count for at, count in ended if first <= at < last) / (last - first)

    def step_ms(self, batch: int) -> float:
        """Mean time from a step that served the whole batch to the next, if that did too."""
        spans = [
            after[0] - before[0]
            for before, after in itertools.pairwise(self.steps)
            if before[1] == after[1] == batch
        ]
        return statistics.mean(spans) * 1e3

    @property
    def prefill_s(self) -> float:
        """From the start to the moment when every request had its first token."""
        return max(times[0] for times in self.times.values()) - self.began

    def first_token_ms(self) -> float:
        """Mean time from the start to a request's first token."""
        return statistics.mean(times[0] - self.began for times in self.times.values()) * 1e3

    def gaps_ms(self, requests: list[str]) -> list[float]:
        """Times between two tokens of a stream, of all these streams, shortest first."""
        return sorted(
            (after - before) * 1e3
            for request in requests
            for before, after in itertools.pairwise(self.times[request])
        )


def p99(ordered: list[float]) -> float:
    """The value that one in a hundred exceeds."""
    return ordered[int(0.99 * len(ordered))]


class Driver:
    """One engine, and greedy requests for it that never end early."""

    def __init__(self, config: Config) -> None:
        began = time.perf_counter()
        self.engine, self.info = build_engine(config, lambda stage, fraction: None)
        self.start_s = time.perf_counter() - began
        settle()
        self._ids = itertools.count()
        self._random = random.Random(0)

    def add(
        self,
        adapter: AdapterRef | None,
        prompt_ids: list[int],
        new_tokens: int,
        weight_set: str = BASE,
    ) -> str:
        """Queue a request; returns its id."""
        request_id = str(next(self._ids))
        self.engine.add(
            Request(
                request_id=request_id,
                prompt_ids=prompt_ids,
                sampling=SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True),
                adapter=adapter,
                weight_set=weight_set,
                tenant="",
                arrival_time=time.monotonic(),
                seed=0,
            )
        )
        return request_id

    def add_random(
        self,
        adapter: AdapterRef | None,
        num_tokens: int,
        new_tokens: int,
        weight_set: str = BASE,
    ) -> str:
        """Queue a request whose prompt is so many random tokens."""
        size = self.info.vocab_size
        prompt_ids = [self._random.randrange(3, size) for _ in range(num_tokens)]
        return self.add(adapter, prompt_ids, new_tokens, weight_set)

    def run(self, on_step: OnStep | None = None) -> Trace:
        """Step until nothing is left to do."""
        trace = Trace(time.perf_counter())
        while self.engine.has_work:
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                assert output.error is None, output.error
                trace.times.setdefault(output.request_id, []).append(now)
            if outputs:
                trace.steps.append((now, len(outputs)))
                trace.ended = now
            if self.engine.is_stalled:
                time.sleep(0.0002)
            if on_step is not None:
                on_step(now - trace.began, outputs)
        return trace

    def keep_busy(self, num_streams: int, add: Callable[[], object], seconds: float) -> float:
        """Tokens per second of streams that each `add` a request when they are done with one.

        The first fifth of `seconds` does not count (all streams begin as one), nor what the last
        requests get when it is over.
        """

        def go_on(elapsed: float, outputs: list[RequestOutput]) -> None:
            for output in outputs:
                if output.finish_reason is not None and elapsed < seconds:
                    add()

        for _ in range(num_streams):
            add()
        return self.run(go_on).rate(seconds / 5, seconds)

    def load(self, adapters: list[AdapterRef]) -> None:
        """Bring adapters into the bank."""
        for adapter in adapters:
            self.add_random(adapter, 8, 1)
        self.run()

    def load_weight_set(self, digest: str, folder: Path) -> WeightSetEvent:
        """Load a merged model beside the base; asserts that it came."""
        self.engine.weight_sets.add(digest, folder)
        while not (events := self.engine.weight_sets.take_events()):
            self.engine.poll()
            time.sleep(0.001)
        assert events[0].event == "loaded", events[0].message
        return events[0]

    def replay_ms(self) -> float:
        """What the last step's graph takes on the GPU, without the host."""
        runner = self.engine.weight_sets.base
        assert isinstance(runner, GpuRunner), "for the GPU's own kernels"
        return runner.replay_ms()
