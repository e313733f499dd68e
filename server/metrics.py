"""What is counted and timed: plain adds on the event loop, read by a scrape in another thread.

Nothing here locks: one thread (the event loop) writes, and a scrape copies what it reads. A scrape
may thus see a request's count one update before its sum, and never a torn value.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from server.engine.messages import AdapterEvent, EngineInfo, EngineStats, FirstToken
from server.engine.request import FinishReason

ServingPath = Literal["base", "adapter", "merged"]

NUM_TOP_ADAPTERS = 16  # that have histograms of their own; the rest share `other`
_OVERTAKE = 1.25  # a newcomer to the top needs this many times the tokens of the least one in it

# There from the start, at 0: a counter that appears with its first event hides it from `increase`.
_ALARMING_CODES = (
    "adapter_load_failed", "engine_failed", "internal_error", "server_overloaded",
    "tenant_overloaded",
)  # fmt: skip
_KINDS_OF_LOAD = (("disk", "ok"), ("host", "ok"), ("gpu", "failed"))  # (tier, result)
_EVICTING_TIERS = ("gpu", "host")
_PROMOTION_RESULTS = ("done", "failed", "cancelled")

# vLLM's bounds, with finer ones below them where its first bound is longer than our whole step.
TTFT_BOUNDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BOUNDS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_BOUNDS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


class Histogram:
    """Counts of observations between bounds; the last one is past every bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over. A bound counts what is equal to it, as Prometheus has it."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def merge(self, other: "Histogram") -> None:
        """Add everything that `other` has seen."""
        self.counts = [
            mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)
        ]
        self.total += other.total


class PathSeries:
    """What is kept for each way a request can be served: base, adapter, merged."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.histograms = {
            "time_to_first_token_seconds": Histogram(TTFT_BOUNDS),
            "inter_token_latency_seconds": Histogram(ITL_BOUNDS),
            "e2e_request_latency_seconds": Histogram(LATENCY_BOUNDS),
            "request_queue_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_prefill_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_decode_time_seconds": Histogram(LATENCY_BOUNDS),
            "request_prompt_tokens": Histogram(TOKEN_BOUNDS),
            "request_generation_tokens": Histogram(TOKEN_BOUNDS),
        }


class TopHistograms:
    """Full histograms, for one of the busiest adapters or for all the others together."""

    __slots__ = ("e2e", "itl", "ttft")

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BOUNDS)
        self.itl = Histogram(ITL_BOUNDS)
        self.e2e = Histogram(LATENCY_BOUNDS)

    def merge(self, other: "TopHistograms") -> None:
        """Add everything that `other` has seen."""
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)
        self.e2e.merge(other.e2e)


class AdapterSeries:
    """One adapter's counters and sum/count pairs; few, as there may be hundreds of adapters."""

    def __init__(self, histograms: TopHistograms) -> None:
        self.histograms = histograms  # its own, or the shared `other`
        self.requests = 0
        self.prompt_tokens = 0
        self.generation_tokens: Counter[ServingPath] = Counter()
        self.errors: Counter[str] = Counter()
        self.ttft_sum, self.ttft_count = 0.0, 0
        self.queue_sum, self.queue_count = 0.0, 0
        self.loads: Counter[tuple[str, str]] = Counter()  # (tier, result)
        self.load_sum, self.load_count = 0.0, 0
        self.evictions: Counter[str] = Counter()  # tier
        self.bank_bytes: dict[str, int] = {}  # digest -> bytes it took in the bank


class RequestMeter:
    """Times one engine request. `tokens` is the hot path: two histograms, two counters."""

    __slots__ = ("_adapter", "_arrival", "_first", "_generated", "_last", "_metrics", "_num_prompt",
                 "_path", "_series")  # fmt: skip

    def __init__(
        self, metrics: "Metrics", path: ServingPath, adapter: str | None, num_prompt_tokens: int,
        arrival_time: float,
    ) -> None:  # fmt: skip
        self._metrics = metrics
        self._path: ServingPath = path
        self._series = metrics.paths[path]
        self._adapter = None if adapter is None else metrics.adapter(adapter)
        self._num_prompt = num_prompt_tokens
        self._arrival = arrival_time
        self._first = self._last = arrival_time
        self._generated = 0

    def first(self, first: FirstToken) -> None:
        """Count the prompt and time the wait for the first token."""
        ttft, queued = first.first_token_time - self._arrival, first.scheduled_time - self._arrival
        self._first = self._last = first.first_token_time
        self._series.prompt_tokens += self._num_prompt
        histograms = self._series.histograms
        histograms["time_to_first_token_seconds"].observe(ttft)
        histograms["request_queue_time_seconds"].observe(queued)
        histograms["request_prefill_time_seconds"].observe(ttft - queued)
        histograms["request_prompt_tokens"].observe(self._num_prompt)
        if (adapter := self._adapter) is not None:
            adapter.prompt_tokens += self._num_prompt
            adapter.ttft_sum += ttft
            adapter.ttft_count += 1
            adapter.queue_sum += queued
            adapter.queue_count += 1
            adapter.histograms.ttft.observe(ttft)

    def tokens(self, num_tokens: int, now: float) -> None:
        """Count new tokens; several at once share the time since the ones before."""
        num_gaps = num_tokens if self._generated else num_tokens - 1
        self._generated += num_tokens
        self._series.generation_tokens += num_tokens
        gap = (now - self._last) / num_gaps if num_gaps else 0.0
        if num_gaps:
            self._series.histograms["inter_token_latency_seconds"].observe(gap, num_gaps)
        if (adapter := self._adapter) is not None:
            adapter.generation_tokens[self._path] += num_tokens
            if num_gaps:
                adapter.histograms.itl.observe(gap, num_gaps)
        self._last = now

    def finish(self, reason: FinishReason) -> None:
        """Count a request that ended; an aborted one is timed no further."""
        self._metrics.finished[reason] += 1
        if self._adapter is not None:
            self._adapter.requests += 1
            self._metrics.promote(self._adapter)
        if reason == "abort":
            return
        now = time.monotonic()
        histograms = self._series.histograms
        histograms["e2e_request_latency_seconds"].observe(now - self._arrival)
        histograms["request_decode_time_seconds"].observe(now - self._first)
        histograms["request_generation_tokens"].observe(self._generated)
        if self._adapter is not None:
            self._adapter.histograms.e2e.observe(now - self._arrival)

    def fail(self, code: str) -> None:
        """Count a request that ended in an error."""
        if self._adapter is not None:
            self._adapter.requests += 1
            self._adapter.errors[code] += 1


class Metrics:
    """Everything a scrape reports. Written by the event loop alone."""

    def __init__(
        self, model_name: str, names: Callable[[str], Sequence[str]] = lambda digest: ()
    ) -> None:
        """`names` tells which adapters a digest belongs to; a scrape calls it in its thread."""
        self.model_name = model_name
        self.names = names
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.stats_time = time.time()
        self.num_restarts = 0
        self.paths: dict[ServingPath, PathSeries] = {
            path: PathSeries() for path in get_args(ServingPath)
        }
        self.finished: Counter[FinishReason] = Counter()
        self.errors: Counter[str] = Counter(dict.fromkeys(_ALARMING_CODES, 0))  # on any route
        self.loads: Counter[tuple[str, str]] = Counter(dict.fromkeys(_KINDS_OF_LOAD, 0))
        self.evictions: Counter[str] = Counter(dict.fromkeys(_EVICTING_TIERS, 0))  # by tier
        self.drain_s = 0.0  # since the drain began; 0 before
        self.drain_limit_s = 0.0  # the grace that running requests have then
        self.promotions: Counter[str] = Counter(dict.fromkeys(_PROMOTION_RESULTS, 0))
        self.num_promoting = 0  # jobs under way
        self.weight_set_bytes: dict[str, int] = {}  # adapter digest -> its merged model's
        self.adapters: dict[str, AdapterSeries] = {}
        self.other = TopHistograms()
        self._before = EngineStats()  # totals of engines that have died

    def start_request(
        self, path: ServingPath, adapter: str | None, num_prompt_tokens: int, arrival_time: float
    ) -> RequestMeter:
        """Begin to time one engine request. `adapter` is the registry's name, None for the base."""
        return RequestMeter(self, path, adapter, num_prompt_tokens, arrival_time)

    def adapter(self, name: str) -> AdapterSeries:
        """The series of this adapter, made at its first use."""
        series = self.adapters.get(name)
        if series is None:
            is_top = sum(s.histograms is not self.other for s in self.adapters.values())
            histograms = TopHistograms() if is_top < NUM_TOP_ADAPTERS else self.other
            series = self.adapters[name] = AdapterSeries(histograms)
        return series

    def forget_adapter(self, name: str) -> None:
        """Drop a deleted adapter's series; what its histograms saw stays counted in `other`."""
        series = self.adapters.pop(name, None)
        if series is not None and series.histograms is not self.other:
            self.other.merge(series.histograms)

    def promote(self, series: AdapterSeries) -> None:
        """Give an adapter histograms of its own once it is busier than the least busy with them."""
        if series.histograms is not self.other:
            return
        top = [s for s in list(self.adapters.values()) if s.histograms is not self.other]
        if len(top) >= NUM_TOP_ADAPTERS:
            least = min(top, key=_num_generated)
            if _num_generated(series) <= _OVERTAKE * _num_generated(least):
                return
            self.other.merge(least.histograms)
            least.histograms = self.other
        series.histograms = TopHistograms()

    def on_stats(self, stats: EngineStats) -> None:
        """Take the engine's latest figures; those of a new engine process count on from the old."""
        if stats.num_steps < self.stats.num_steps:
            self._before = self.engine_totals()
        self.stats = stats
        self.stats_time = time.time()

    def engine_totals(self) -> EngineStats:
        """The latest stats with every running total counted since this process began."""
        before, now = self._before, self.stats
        return EngineStats(
            num_preemptions=before.num_preemptions + now.num_preemptions,
            num_steps=before.num_steps + now.num_steps,
            step_seconds=before.step_seconds + now.step_seconds,
            prefix_queries=before.prefix_queries + now.prefix_queries,
            prefix_hits=before.prefix_hits + now.prefix_hits,
        )

    def on_event(self, event: AdapterEvent) -> None:
        """Count an adapter's move between tiers: in all, and under every name it goes by."""
        if event.event in ("loaded", "failed"):
            self.loads[event.tier, "ok" if event.event == "loaded" else "failed"] += 1
        elif event.event == "evicted":
            self.evictions[event.tier] += 1
        for name in self.names(event.digest):
            _count_event(self.adapter(name), event)


def _num_generated(series: AdapterSeries) -> int:
    return series.generation_tokens.total()


def _count_event(series: AdapterSeries, event: AdapterEvent) -> None:
    if event.event == "loaded":
        series.loads[event.tier, "ok"] += 1
        series.load_sum += event.seconds
        series.load_count += 1
        series.bank_bytes[event.digest] = event.num_bytes
    elif event.event == "failed":
        series.loads[event.tier, "failed"] += 1
    elif event.event in ("evicted", "dropped"):
        series.evictions[event.tier] += event.event == "evicted"
        if event.tier == "gpu" or event.event == "dropped":
            series.bank_bytes.pop(event.digest, None)
