"""What requests and the engine leave in the counters, and the scrape's contract with dashboards."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.api.exposition import render
from server.engine.messages import AdapterChange, AdapterEvent, EngineInfo, EngineStats, FirstToken
from server.engine.request import Tier
from server.metrics import ITL_BOUNDS, NUM_TOP_ADAPTERS, Histogram, Metrics

VLLM_ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
VLLM_NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
    "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_prompt_tokens", "request_generation_tokens", "lora_requests_info",
}  # fmt: skip
INFO = EngineInfo(
    base_digest="b", device="cpu", dtype="float32", quantization="none", num_blocks=100,
    block_size=16, max_model_len=2048, bank_rows=64, page_rows=8, vocab_size=300, eos_token_ids=[1],
    kernels={},
)  # fmt: skip

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(metrics: Metrics) -> Samples:
    """Every sample by name and labels; a series that comes twice fails."""
    samples: Samples = {}
    for family in parse_text(render(metrics).decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"{key} comes twice"
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    if name.startswith("vllm:"):
        labels = {"model_name": "tiny", "engine": "0"} | labels
    return samples[name, frozenset(labels.items())]


def serve(
    metrics: Metrics, adapter: str | None = None, num_prompt: int = 10, num_tokens: int = 5
) -> None:
    """One request: 0.1 s in the queue, 0.3 s to its first token, then a token every 0.02 s."""
    arrival = time.monotonic() - 10
    path = "base" if adapter is None else "adapter"
    meter = metrics.start_request(path, adapter, num_prompt, arrival)  # type: ignore[arg-type]
    first = FirstToken(
        scheduled_time=arrival + 0.1, first_token_time=arrival + 0.3, num_cached_tokens=0, tier=None
    )
    meter.first(first)
    for index in range(num_tokens):
        meter.tokens(1, arrival + 0.3 + 0.02 * index)
    meter.finish("length")


NAMES = {"d1": ["one"], "d2": ["two", "also-two"]}


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics("tiny", names=lambda digest: NAMES.get(digest, ()))
    made.info = INFO
    return made


def test_every_name_of_the_contract_is_there_from_the_start(metrics: Metrics) -> None:
    names = {name for name, _ in scrape(metrics)}
    plain = {re.sub("_(bucket|count|sum)$", "", name) for name in names}
    assert {f"vllm:{name}" for name in VLLM_NAMES} <= names | plain


def test_vllm_s_series_carry_model_name_and_engine(metrics: Metrics) -> None:
    for name, labels in scrape(metrics):
        if name.startswith("vllm:") and name != "vllm:lora_requests_info":
            assert {("model_name", "tiny"), ("engine", "0")} <= labels


def test_the_engine_s_gauges_are_its_latest(metrics: Metrics) -> None:
    metrics.on_stats(EngineStats(num_running=3, num_waiting=2, num_free_blocks=25))
    samples = scrape(metrics)
    assert value(samples, "vllm:num_requests_running") == 3
    assert value(samples, "vllm:num_requests_waiting") == 2
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.75
    assert value(samples, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_totals_go_on_counting_in_the_next_engine_process(metrics: Metrics) -> None:
    old = EngineStats(num_steps=10, num_preemptions=2, prefix_queries=100, prefix_hits=40)
    metrics.on_stats(old)
    metrics.on_stats(EngineStats(num_steps=1, num_preemptions=1, prefix_queries=5, prefix_hits=1))
    samples = scrape(metrics)
    assert value(samples, "vllm:num_preemptions_total") == 3
    assert value(samples, "vllm:prefix_cache_queries_total") == 105
    assert value(samples, "vllm:prefix_cache_hits_total") == 41
    assert value(samples, "turnout_engine_steps_total") == 11


def test_a_request_is_counted_and_timed(metrics: Metrics) -> None:
    serve(metrics)
    samples = scrape(metrics)
    assert value(samples, "vllm:prompt_tokens_total") == 10
    assert value(samples, "vllm:generation_tokens_total") == 5
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 0
    for name, count, total in (
        ("time_to_first_token_seconds", 1, 0.3),
        ("request_queue_time_seconds", 1, 0.1),
        ("request_prefill_time_seconds", 1, 0.2),
        ("inter_token_latency_seconds", 4, 0.08),
        ("request_prompt_tokens", 1, 10),
        ("request_generation_tokens", 1, 5),
    ):
        for prefix, labels in (("vllm:", {}), ("turnout_", {"path": "base"})):
            assert value(samples, f"{prefix}{name}_count", **labels) == count
            assert value(samples, f"{prefix}{name}_sum", **labels) == pytest.approx(total)
    assert value(samples, "vllm:e2e_request_latency_seconds_sum") == pytest.approx(10, abs=1)
    assert value(samples, "vllm:request_decode_time_seconds_sum") == pytest.approx(9.7, abs=1)


def test_vllm_s_histograms_are_the_sum_of_the_paths(metrics: Metrics) -> None:
    serve(metrics)
    serve(metrics, "one")
    samples = scrape(metrics)
    name = "time_to_first_token_seconds_count"
    assert value(samples, f"turnout_{name}", path="base") == 1
    assert value(samples, f"turnout_{name}", path="adapter") == 1
    assert value(samples, f"vllm:{name}") == 2


def test_tokens_that_come_at_once_share_the_time_between(metrics: Metrics) -> None:
    meter = metrics.start_request("base", None, 1, 100.0)
    meter.first(
        FirstToken(scheduled_time=100, first_token_time=101, num_cached_tokens=0, tier=None)
    )
    meter.tokens(3, 101.2)  # the first one has no gap; two share 0.2 s
    meter.tokens(4, 101.6)
    samples = scrape(metrics)
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 6
    assert value(samples, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.6)
    assert value(samples, "vllm:inter_token_latency_seconds_bucket", le="0.15") == 6
    assert value(samples, "vllm:inter_token_latency_seconds_bucket", le="0.075") == 0


def test_an_aborted_request_is_counted_and_not_timed(metrics: Metrics) -> None:
    metrics.start_request("base", None, 1, 0.0).finish("abort")
    samples = scrape(metrics)
    assert value(samples, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(samples, "vllm:e2e_request_latency_seconds_count") == 0


def test_vllm_s_bounds_are_kept_and_finer_ones_come_before(metrics: Metrics) -> None:
    assert set(VLLM_ITL) <= set(ITL_BOUNDS)
    assert min(ITL_BOUNDS) < min(VLLM_ITL)
    bounds = {
        dict(labels)["le"]
        for name, labels in scrape(metrics)
        if name == "vllm:inter_token_latency_seconds_bucket"
    }
    assert {float(bound) for bound in bounds} == {*ITL_BOUNDS, float("inf")}


def test_a_bound_counts_what_is_equal_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for observed in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(observed)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 7.5


def test_an_adapter_has_its_own_counters(metrics: Metrics) -> None:
    serve(metrics, "one")
    serve(metrics, "one")
    metrics.start_request("adapter", "one", 1, 0.0).fail("engine_failed")
    samples = scrape(metrics)

    def own(name: str, **labels: str) -> float:
        return value(samples, f"turnout_adapter_{name}", adapter="one", **labels)

    assert own("requests_total") == 3
    assert own("prompt_tokens_total") == 20
    assert own("generation_tokens_total") == 10
    assert own("tokens_total", path="adapter") == 10
    assert own("errors_total", code="engine_failed") == 1
    assert (own("time_to_first_token_seconds_count"), own("queue_time_seconds_count")) == (2, 2)
    assert own("time_to_first_token_seconds_sum") == pytest.approx(0.6)
    assert value(samples, "turnout_tokens_total", path="adapter") == 10


def event(name: AdapterChange, tier: Tier, digest: str = "d1", **fields: Any) -> AdapterEvent:
    return AdapterEvent(digest=digest, event=name, tier=tier, **fields)


def test_moves_between_tiers_are_counted_under_every_name_of_the_digest(metrics: Metrics) -> None:
    metrics.on_event(event("loaded", "disk", "d2", seconds=0.5, num_bytes=1000))
    metrics.on_event(event("evicted", "gpu", "d2"))
    metrics.on_event(event("loaded", "host", "d2", seconds=0.25, num_bytes=1000))
    metrics.on_event(event("failed", "gpu", "d2", message="full"))
    metrics.on_stats(EngineStats(resident_adapters=["d2"]))
    for name in ("two", "also-two"):
        samples = scrape(metrics)
        loads = {
            (tier, result): value(
                samples, "turnout_adapter_loads_total", adapter=name, tier=tier, result=result
            )
            for tier, result in (("disk", "ok"), ("host", "ok"), ("gpu", "failed"))
        }
        assert set(loads.values()) == {1}
        assert value(samples, "turnout_adapter_load_seconds_sum", adapter=name) == 0.75
        assert value(samples, "turnout_adapter_resident_bytes", adapter=name) == 1000
    metrics.on_event(event("evicted", "gpu", "d2"))
    samples = scrape(metrics)
    assert value(samples, "turnout_adapter_evictions_total", adapter="two", tier="gpu") == 2
    assert value(samples, "turnout_adapter_resident_bytes", adapter="two") == 0


def test_bytes_that_leave_the_host_tier_stay_in_the_bank(metrics: Metrics) -> None:
    metrics.on_event(event("loaded", "host", num_bytes=1000))
    metrics.on_event(event("evicted", "host"))
    metrics.on_event(event("postponed", "disk"))
    metrics.on_stats(EngineStats(resident_adapters=["d1"]))
    samples = scrape(metrics)
    assert value(samples, "turnout_adapter_resident_bytes", adapter="one") == 1000
    assert value(samples, "turnout_adapter_evictions_total", adapter="one", tier="host") == 1


def test_an_engine_that_died_holds_no_bytes(metrics: Metrics) -> None:
    metrics.on_event(event("loaded", "host", num_bytes=1000))
    metrics.on_stats(EngineStats(resident_adapters=[]))
    assert value(scrape(metrics), "turnout_adapter_resident_bytes", adapter="one") == 0


def test_an_event_of_a_digest_without_a_name_makes_no_series(metrics: Metrics) -> None:
    metrics.on_event(event("dropped", "gpu", "gone"))
    assert metrics.adapters == {}


def lora_info(metrics: Metrics) -> tuple[dict[str, str], float]:
    [(labels, stamp)] = [
        (dict(labels), stamp)
        for (name, labels), stamp in scrape(metrics).items()
        if name == "vllm:lora_requests_info"
    ]
    return labels, stamp


def test_lora_requests_info_is_one_series_whatever_happens(metrics: Metrics) -> None:
    labels, _ = lora_info(metrics)
    assert labels == {
        "max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""
    }  # fmt: skip
    before = time.time()
    metrics.on_stats(EngineStats(resident_adapters=["d2", "gone"], wanted_adapters=["d1", "d2"]))
    labels, stamp = lora_info(metrics)
    assert labels["running_lora_adapters"] == "also-two,two"
    assert labels["waiting_lora_adapters"] == "one"  # never what is resident as well
    assert before <= stamp <= time.time()


def test_a_deleted_adapter_s_series_are_gone_and_what_it_saw_stays_counted(
    metrics: Metrics,
) -> None:
    serve(metrics, "one")
    assert any(("adapter", "one") in labels for _, labels in scrape(metrics))
    metrics.forget_adapter("one")
    metrics.forget_adapter("never-there")
    samples = scrape(metrics)
    assert not any(("adapter", "one") in labels for _, labels in samples)
    name = "turnout_top_adapter_time_to_first_token_seconds_count"
    assert value(samples, name, adapter="other") == 1
    assert value(samples, "vllm:generation_tokens_total") == 5


def with_histograms(samples: Samples) -> set[str]:
    name = "turnout_top_adapter_e2e_request_latency_seconds_count"
    return {dict(labels)["adapter"] for each, labels in samples if each == name}


def test_only_so_many_adapters_have_histograms_and_the_rest_share_one(metrics: Metrics) -> None:
    for number in range(NUM_TOP_ADAPTERS + 3):
        serve(metrics, f"a{number:02}", num_tokens=10)
    samples = scrape(metrics)
    top = {f"a{number:02}" for number in range(NUM_TOP_ADAPTERS)}
    assert with_histograms(samples) == top | {"other"}
    name = "turnout_top_adapter_e2e_request_latency_seconds_count"
    assert value(samples, name, adapter="other") == 3


def test_a_busier_adapter_takes_the_place_of_the_least_busy_and_no_count_is_lost(
    metrics: Metrics,
) -> None:
    for number in range(NUM_TOP_ADAPTERS):
        serve(metrics, f"a{number:02}", num_tokens=10 + number)
    serve(metrics, "late", num_tokens=11)  # not busier by enough
    assert "late" not in with_histograms(scrape(metrics))
    serve(metrics, "late", num_tokens=10)
    serve(metrics, "late", num_tokens=10)
    samples = scrape(metrics)
    names = with_histograms(samples)
    assert "late" in names
    assert "a00" not in names
    name = "turnout_top_adapter_e2e_request_latency_seconds_count"
    counted = sum(value(samples, name, adapter=each) for each in names)
    assert counted == NUM_TOP_ADAPTERS + 3


def test_a_place_that_becomes_free_is_taken(metrics: Metrics) -> None:
    for number in range(NUM_TOP_ADAPTERS + 1):
        serve(metrics, f"a{number:02}")
    metrics.forget_adapter("a00")
    serve(metrics, f"a{NUM_TOP_ADAPTERS:02}")
    assert f"a{NUM_TOP_ADAPTERS:02}" in with_histograms(scrape(metrics))


def test_an_adapter_costs_few_series(metrics: Metrics) -> None:
    for number in range(NUM_TOP_ADAPTERS):
        serve(metrics, f"a{number:02}", num_tokens=100)
    before = len(scrape(metrics))
    serve(metrics, "one")
    assert len(scrape(metrics)) - before <= 12


def test_errors_are_counted_by_code(metrics: Metrics) -> None:
    metrics.errors["model_not_found"] += 2
    assert value(scrape(metrics), "turnout_errors_total", code="model_not_found") == 2


def test_no_sample_is_a_creation_time(metrics: Metrics) -> None:
    serve(metrics, "one")
    assert not any(name.endswith("_created") for name, _ in scrape(metrics))


def test_a_scrape_while_requests_come_is_consistent_in_each_histogram(metrics: Metrics) -> None:
    serve(metrics)
    samples = scrape(metrics)
    for (name, labels), count in samples.items():
        if name.endswith("_count") and not name.startswith("turnout_adapter"):
            inf = (name.replace("_count", "_bucket"), labels | {("le", "+Inf")})
            assert samples[inf] == count


def test_every_metric_is_named_in_the_docs(metrics: Metrics) -> None:
    serve(metrics, "one")
    docs = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for family in parse_text(render(metrics).decode()):
        assert family.name in docs, family.name


def test_the_text_is_plain_and_no_openmetrics(metrics: Metrics) -> None:
    text = render(metrics).decode()
    assert "vllm_" not in text
    assert "# EOF" not in text
