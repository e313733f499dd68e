"""What a scrape costs and what it says of drains: small, zipped, and there from the start."""

import asyncio
import gc
import gzip
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.api import exposition, health
from server.api.exposition import render
from server.engine.latency import settle_heap
from server.engine.messages import AdapterEvent
from server.metrics import Metrics
from tests.deploy.bench_scrape import NUM_STREAMS, largest_gap_s
from tests.deploy.traffic import busy_metrics
from tests.server.api.harness import BASE, Script, Server, serving, wait_until

NUM_ADAPTERS = 300
MAX_ZIPPED_BYTES = 60 * 1024


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(tiny_base, tmp_path / "store", drain_s=5.0) as handle:
        yield handle


def samples(metrics: Metrics) -> dict[str, float]:
    """name{labels} -> value"""
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in parse_text(render(metrics).decode())
        for sample in family.samples
    }


def scraped(server: Server, name: str) -> float:
    text = server.http().get("/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_300_adapters_and_64_streams_fit_the_budget_of_a_scrape() -> None:
    text = render(busy_metrics(NUM_ADAPTERS, NUM_STREAMS))
    adapters = {
        sample.labels["adapter"]
        for family in parse_text(text.decode())
        for sample in family.samples
        if sample.name == "turnout_adapter_requests_total"
    }
    assert len(adapters) == NUM_ADAPTERS
    assert len(gzip.compress(text, health._ZIP_LEVEL)) < MAX_ZIPPED_BYTES


def test_a_scrape_of_that_size_is_sent_zipped(server: Server) -> None:
    busy = busy_metrics(NUM_ADAPTERS, NUM_STREAMS)
    server.metrics.adapters, server.metrics.other = busy.adapters, busy.other
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        with http.stream("GET", "/metrics", headers={"accept-encoding": "gzip"}) as reply:
            sent = b"".join(reply.iter_raw())
        plain = http.get("/metrics", headers={"accept-encoding": "identity"})
    assert reply.headers["content-encoding"] == "gzip"
    assert len(sent) < MAX_ZIPPED_BYTES < len(plain.content)
    assert gzip.decompress(sent).splitlines()[0] == plain.content.splitlines()[0]
    assert "content-encoding" not in plain.headers
    assert {reply.headers["vary"], plain.headers["vary"]} == {"accept-encoding"}


@pytest.mark.parametrize(
    ("accepted", "is_zipped"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("br;q=1.0, gzip; q=1", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("identity", False),
        ("", False),
        ("x-gzip-like", False),
    ],
)
def test_only_who_takes_gzip_gets_it(server: Server, accepted: str, is_zipped: bool) -> None:
    reply = server.http().get("/metrics", headers={"accept-encoding": accepted})
    assert (reply.headers.get("content-encoding") == "gzip") == is_zipped
    assert "vllm:num_requests_running" in reply.text


def test_rendering_rests_after_each_family_for_as_long_as_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    rests: list[float] = []
    monkeypatch.setattr("server.api.exposition.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("server.api.exposition.time.sleep", rests.append)

    def families() -> Iterator[Metric]:
        for seconds in (1.0, 3.0):  # to make; as much again to render
            clock[0] += seconds
            yield Metric("a", "", "gauge")

    for metric in exposition._unhurried(families()):
        clock[0] += 1.0 if not rests else 3.0
        assert metric.name == "a"
    assert rests == [2.0, 6.0]


def test_a_scrape_rests_after_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("server.api.exposition.time.sleep", rests.append)
    text = render(Metrics("tiny")).decode()
    assert len(rests) == text.count("# TYPE ")


def test_what_start_up_left_is_collected_no_more() -> None:
    gc.unfreeze()
    settle_heap()
    try:
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_the_benchmark_finds_the_gap_that_is_there(server: Server) -> None:
    scripts = [Script([5] * 4, "length", delay_s=0.01) for _ in range(NUM_STREAMS)]
    scripts[7] = Script([5, 6], "length", delay_s=1.0)
    server.engine.scripts.extend(scripts)
    found = asyncio.run(largest_gap_s(server.url, scrapes=True))
    assert found > 0.3  # the first piece may be read late
    assert len(server.engine.requests) == NUM_STREAMS


def test_what_alerts_count_is_there_at_0_before_it_first_happens() -> None:
    seen = samples(Metrics("tiny"))
    for name in (
        "turnout_bank_loads_total['disk', 'ok']",
        "turnout_bank_loads_total['host', 'ok']",
        "turnout_bank_loads_total['failed', 'gpu']",
        "turnout_evictions_total['gpu']",
        "turnout_evictions_total['host']",
        "turnout_errors_total['server_overloaded']",
        "turnout_errors_total['adapter_load_failed']",
        "turnout_engine_restarts_total[]",
    ):
        assert seen[name] == 0


def test_loads_and_evictions_of_all_adapters_are_counted_once_whatever_they_are_called() -> None:
    metrics = Metrics("tiny", names={"d": ["one", "also-one"], "nameless": []}.__getitem__)
    for digest in ("d", "nameless"):
        metrics.on_event(AdapterEvent(digest=digest, event="loaded", tier="disk"))
        metrics.on_event(AdapterEvent(digest=digest, event="failed", tier="gpu"))
        metrics.on_event(AdapterEvent(digest=digest, event="evicted", tier="host"))
        metrics.on_event(AdapterEvent(digest=digest, event="dropped", tier="gpu"))
    seen = samples(metrics)
    assert seen["turnout_bank_loads_total['disk', 'ok']"] == 2
    assert seen["turnout_bank_loads_total['failed', 'gpu']"] == 2
    assert seen["turnout_evictions_total['host']"] == 2
    assert seen["turnout_evictions_total['gpu']"] == 0


def test_a_drain_and_its_limit_show_while_it_lasts(server: Server) -> None:
    assert scraped(server, "turnout_drain_seconds") == 0
    assert scraped(server, "turnout_drain_limit_seconds") == 5
    server.engine.scripts.append(Script([5], None))
    stream = server.client().chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hello"}], stream=True
    )
    next(stream)
    draining = asyncio.run_coroutine_threadsafe(server.services.drain(), server.loop)
    wait_until(lambda: scraped(server, "turnout_drain_seconds") > 0)
    assert not draining.done()
    stream.close()
    draining.result(20)
