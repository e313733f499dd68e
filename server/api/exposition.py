"""Metrics as Prometheus text: vLLM's names and ours, fed by the same values.

The route is served by ourselves, with the text format and `escaping="allow-utf-8"` whatever the
scraper accepts: prometheus-client answers a scraper that asks for OpenMetrics without an escaping
parameter with `vllm_x` in place of `vllm:x`.
"""

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from server.metrics import AdapterSeries, Histogram, Metrics, PathSeries, TopHistograms

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ENGINE = "0"  # one engine per API process
_USUAL_RANK = 16  # `max_lora` counts adapters of this rank
_HISTOGRAM_HELP = {
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "Between one token and the next.",
    "e2e_request_latency_seconds": "From arrival to the last token.",
    "request_queue_time_seconds": "From arrival until a step first had the request.",
    "request_prefill_time_seconds": "From leaving the queue to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Generated tokens of a request.",
}
_TOP_HISTOGRAMS = {
    "ttft": "time_to_first_token_seconds",
    "itl": "inter_token_latency_seconds",
    "e2e": "e2e_request_latency_seconds",
}


def render(metrics: Metrics) -> bytes:
    """The whole exposition. Takes tens of milliseconds with many adapters: call it in a thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Exposition(metrics))
    return generate_latest(registry, escaping="allow-utf-8")


class _Exposition(Collector):
    """Turns the accumulated values into metric families, once for each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []  # registered anew for each scrape, so there is nothing to clash with

    def collect(self) -> Iterator[Metric]:
        return _unhurried(self._families())

    def _families(self) -> Iterator[Metric]:
        yield from _vllm_gauges(self._metrics)
        yield from _vllm_counters(self._metrics)
        yield from _path_histograms(self._metrics)
        yield _lora_requests_info(self._metrics)
        yield from _engine_families(self._metrics)
        yield from _adapter_families(dict(self._metrics.adapters), self._metrics)
        yield from _top_histograms(dict(self._metrics.adapters), self._metrics.other)


def _unhurried(families: Iterator[Metric]) -> Iterator[Metric]:
    """Rest after each family for as long as it took, so that streams get their turn.

    Each send of the event loop gives up the interpreter lock, and waits 5 ms for it while another
    thread computes: without rests, no stream would move until everything is rendered.
    """
    began = time.perf_counter()
    for family in families:
        yield family  # rendered before this goes on
        time.sleep(time.perf_counter() - began)
        began = time.perf_counter()


def _vllm_gauges(metrics: Metrics) -> Iterator[Metric]:
    stats, info, names = metrics.stats, metrics.info, ["model_name", "engine"]
    labels = [metrics.model_name, ENGINE]
    num_blocks = info.num_blocks if info else 0
    used = (num_blocks - stats.num_free_blocks) / num_blocks if num_blocks else 0.0
    for name, text, value in (
        ("num_requests_running", "Requests in the current step.", float(stats.num_running)),
        ("num_requests_waiting", "Requests waiting to join a step.", float(stats.num_waiting)),
        ("kv_cache_usage_perc", "KV blocks in use, 0 to 1.", min(max(used, 0.0), 1.0)),
    ):
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
        gauge.add_metric(labels, value)
        yield gauge
    if info is not None:
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache's shape.",
            labels=[*names, "block_size", "num_gpu_blocks"],
        )
        config.add_metric([*labels, str(info.block_size), str(info.num_blocks)], 1.0)
        yield config


def _vllm_counters(metrics: Metrics) -> Iterator[Metric]:
    names, labels = ["model_name", "engine"], [metrics.model_name, ENGINE]
    totals, paths = metrics.engine_totals(), list(metrics.paths.values())
    for name, text, value in (
        ("prompt_tokens", "Prompt tokens processed.", sum(p.prompt_tokens for p in paths)),
        ("generation_tokens", "Tokens generated.", sum(p.generation_tokens for p in paths)),
        ("num_preemptions", "Requests put back to recompute.", totals.num_preemptions),
        ("prefix_cache_queries", "Prompt tokens looked up.", totals.prefix_queries),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", totals.prefix_hits),
    ):
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
        counter.add_metric(labels, value)
        yield counter
    success = CounterMetricFamily(
        "vllm:request_success",
        "Requests that ended, by reason.",
        labels=[*names, "finished_reason"],
    )
    for reason in ("stop", "length", "abort"):
        success.add_metric([*labels, reason], metrics.finished[reason])
    yield success


def _path_histograms(metrics: Metrics) -> Iterator[Metric]:
    for name, text in _HISTOGRAM_HELP.items():
        ours = HistogramMetricFamily(f"turnout_{name}", text, labels=["path"])
        theirs = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
        both: Histogram | None = None
        for path, series in metrics.paths.items():
            histogram = _copy(series, name)
            _add(ours, [path], histogram)
            if both is None:
                both = Histogram(histogram.bounds)
            both.merge(histogram)
        assert both is not None, "there is always the base path"
        _add(theirs, [metrics.model_name, ENGINE], both)
        yield ours
        yield theirs


def _copy(series: PathSeries, name: str) -> Histogram:
    """A copy, so that both families of one scrape report the same counts."""
    source = series.histograms[name]
    copy = Histogram(source.bounds)
    copy.merge(source)
    return copy


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    running, buckets = 0, []
    counts = histogram.counts.copy()
    for bound, count in zip((*histogram.bounds, float("inf")), counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
    family.add_metric(labels, buckets, histogram.total)


def _lora_requests_info(metrics: Metrics) -> Metric:
    """Exactly one series, from start-up on: which adapters are resident, which waited for."""
    stats = metrics.stats
    running = {name for digest in stats.resident_adapters for name in metrics.names(digest)}
    waiting = {name for digest in stats.wanted_adapters for name in metrics.names(digest)} - running
    capacity = metrics.info.bank_rows // _USUAL_RANK if metrics.info else 0
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "When the lists of resident and of waited-for adapters were made.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    family.add_metric(
        [str(max(capacity, len(running))), ",".join(sorted(running)), ",".join(sorted(waiting))],
        metrics.stats_time,
    )
    return family


def _engine_families(metrics: Metrics) -> Iterator[Metric]:
    totals, stats = metrics.engine_totals(), metrics.stats
    for name, text, total in (
        ("engine_steps", "Steps the engine ran.", float(totals.num_steps)),
        ("engine_step_seconds", "Time the engine spent in steps.", totals.step_seconds),
        ("engine_restarts", "Engine processes started again.", float(metrics.num_restarts)),
    ):
        yield CounterMetricFamily(f"turnout_{name}", text, value=total)
    for name, text, value in (
        ("bank_rows", "Rank rows the adapter bank holds.", _bank_rows(metrics)),
        ("bank_rows_used", "Rank rows of the bank in use.", stats.bank_rows_used),
        ("host_adapter_bytes", "Host memory that adapters take.", stats.host_bytes_used),
        ("drain_seconds", "Since the drain began; 0 before.", metrics.drain_s),
        ("drain_limit_seconds", "What a drain may take.", metrics.drain_limit_s),
        ("promotion_running", "Promotions under way.", float(metrics.num_promoting)),
    ):
        yield GaugeMetricFamily(f"turnout_{name}", text, value=value)
    tokens = CounterMetricFamily(
        "turnout_tokens", "Tokens generated, by the path that served them.", labels=["path"]
    )
    for path, series in metrics.paths.items():
        tokens.add_metric([path], series.generation_tokens)
    yield tokens
    yield _counter("turnout_errors", "Requests refused or failed, by code.", "code", metrics.errors)
    results = metrics.promotions
    yield _counter("turnout_promotions", "Promotions that ended, by result.", "result", results)
    yield _counter("turnout_evictions", "Evictions from a tier.", "tier", metrics.evictions)
    loads = CounterMetricFamily(
        "turnout_bank_loads", "Loads into the bank.", labels=["tier", "result"]
    )
    for (tier, result), count in sorted(dict(metrics.loads).items()):
        loads.add_metric([tier, result], count)
    yield loads


def _bank_rows(metrics: Metrics) -> int:
    return metrics.info.bank_rows if metrics.info else 0


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in sorted(dict(values).items()):
        family.add_metric([key], value)
    return family


def _adapter_families(adapters: dict[str, AdapterSeries], metrics: Metrics) -> Iterator[Metric]:
    yield from _adapter_counters(adapters)
    yield from _adapter_summaries(adapters)
    resident = set(metrics.stats.resident_adapters)
    family = GaugeMetricFamily(
        "turnout_adapter_resident_bytes", "Bytes in the adapter bank.", labels=["adapter"]
    )
    for name, series in adapters.items():
        held = dict(series.bank_bytes)
        family.add_metric([name], sum(held[digest] for digest in held.keys() & resident))
    yield family
    yield _weight_sets(metrics)


def _weight_sets(metrics: Metrics) -> Metric:
    family = GaugeMetricFamily(
        "turnout_weight_set_bytes",
        "Checkpoints of merged models in the engine.",
        labels=["adapter"],
    )
    for digest, num_bytes in dict(metrics.weight_set_bytes).items():
        for name in metrics.names(digest)[:1]:  # one model, whatever names it goes by
            family.add_metric([name], num_bytes)
    return family


def _adapter_counters(adapters: dict[str, AdapterSeries]) -> Iterator[Metric]:
    def family(name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"turnout_adapter_{name}", text, labels=["adapter", *labels])

    requests = family("requests", "Requests that ended.")
    prompt = family("prompt_tokens", "Prompt tokens processed.")
    generated = family("generation_tokens", "Tokens generated.")
    tokens = family("tokens", "Tokens generated, by the path that served them.", "path")
    errors = family("errors", "Requests that failed, by code.", "code")
    loads = family("loads", "Loads into a tier.", "tier", "result")
    evictions = family("evictions", "Evictions from a tier.", "tier")
    for name, series in adapters.items():
        requests.add_metric([name], series.requests)
        prompt.add_metric([name], series.prompt_tokens)
        generated.add_metric([name], series.generation_tokens.total())
        for path, count in dict(series.generation_tokens).items():
            tokens.add_metric([name, path], count)
        for code, count in dict(series.errors).items():
            errors.add_metric([name, code], count)
        for (tier, result), count in dict(series.loads).items():
            loads.add_metric([name, tier, result], count)
        for tier, count in dict(series.evictions).items():
            evictions.add_metric([name, tier], count)
    return iter((requests, prompt, generated, tokens, errors, loads, evictions))


def _adapter_summaries(adapters: dict[str, AdapterSeries]) -> Iterator[Metric]:
    def family(name: str, text: str) -> SummaryMetricFamily:
        return SummaryMetricFamily(f"turnout_adapter_{name}", text, labels=["adapter"])

    ttft = family("time_to_first_token_seconds", "From arrival to the first token.")
    queue = family("queue_time_seconds", "From arrival until a step first had the request.")
    load = family("load_seconds", "Time that loads took.")
    for name, series in adapters.items():
        ttft.add_metric([name], series.ttft_count, series.ttft_sum)
        queue.add_metric([name], series.queue_count, series.queue_sum)
        load.add_metric([name], series.load_count, series.load_sum)
    return iter((ttft, queue, load))


def _top_histograms(adapters: dict[str, AdapterSeries], other: TopHistograms) -> Iterator[Metric]:
    """Full histograms of the busiest adapters and, under `other`, of the rest together.

    No adapter may be named `other`: that would be two series of one name, so it is left out here.
    """
    for attribute, name in _TOP_HISTOGRAMS.items():
        family = HistogramMetricFamily(
            f"turnout_top_adapter_{name}", _HISTOGRAM_HELP[name], labels=["adapter"]
        )
        for adapter, series in adapters.items():
            if series.histograms is not other and adapter != "other":
                _add(family, [adapter], getattr(series.histograms, attribute))
        _add(family, ["other"], getattr(other, attribute))
        yield family
