"""Metrics as a busy server has them, without a server: every family has a sample."""

import hashlib
import time

from server.engine.messages import AdapterEvent, EngineInfo, EngineStats, FirstToken
from server.metrics import Metrics, RequestMeter, ServingPath

INFO = EngineInfo(
    base_digest="b" * 64,
    device="cuda",
    dtype="bfloat16",
    quantization="nf4",
    num_blocks=20_000,
    block_size=16,
    max_model_len=32_768,
    bank_rows=512,
    page_rows=8,
    vocab_size=32_000,
    eos_token_ids=[2],
    kernels={},
)
NUM_RESIDENT = 32


def busy_metrics(num_adapters: int, num_streams: int) -> Metrics:
    """Every adapter has served, failed, been loaded and evicted; the streams are under way."""
    digests = {digest_of(number): [name_of(number)] for number in range(num_adapters)}
    metrics = Metrics("mistral-7b", names=lambda digest: digests.get(digest, ()))
    metrics.info = INFO
    serve(metrics, None, 0)
    for number, digest in enumerate(digests):
        name = name_of(number)
        for repeat in range(3):
            serve(metrics, name, number * 7 + repeat)
        metrics.start_request("adapter", name, 1, 0.0).fail("engine_failed")
        _move(metrics, digest, number)
    for stream in range(num_streams):
        begin(metrics, name_of(stream % num_adapters), stream)
    metrics.errors["model_not_found"] += 1
    metrics.weight_set_bytes = {next(iter(digests)): 4_163_000_000}
    metrics.on_stats(_stats(list(digests), num_streams))
    return metrics


def name_of(number: int) -> str:
    """As operators name adapters: a team, a task, a date; no two alike."""
    noise = hashlib.sha256(str(number).encode()).hexdigest()
    return f"team-{noise[:6]}-{('summarize', 'support', 'classify')[number % 3]}-{noise[6:14]}"


def digest_of(number: int) -> str:
    """An adapter's digest."""
    return hashlib.sha256(f"adapter {number}".encode()).hexdigest()


def begin(metrics: Metrics, adapter: str | None, seed: int) -> RequestMeter:
    """A request that has 20 tokens, and goes on."""
    path: ServingPath = "base" if adapter is None else "adapter"
    arrival = time.monotonic() - 10
    meter = metrics.start_request(path, adapter, 200 + seed % 91, arrival)
    scheduled = arrival + 0.001 * (seed % 13)
    first = scheduled + 0.0123 + 0.00071 * (seed % 101)
    times = FirstToken(
        scheduled_time=scheduled, first_token_time=first, num_cached_tokens=0, tier=None
    )
    meter.first(times)
    for token in range(20):
        meter.tokens(1, first + token * (0.0041 + 0.0001 * (seed % 17)))
    return meter


def serve(metrics: Metrics, adapter: str | None, seed: int) -> None:
    """A request from its arrival to its end."""
    begin(metrics, adapter, seed).finish("stop")


def _move(metrics: Metrics, digest: str, number: int) -> None:
    seconds, size = 0.0123 * (1 + number % 7), 41_943_040 + number
    load = AdapterEvent(digest=digest, event="loaded", tier="disk", seconds=seconds, num_bytes=size)
    metrics.on_event(load)
    metrics.on_event(AdapterEvent(digest=digest, event="evicted", tier="gpu"))
    metrics.on_event(
        AdapterEvent(digest=digest, event="loaded", tier="host", seconds=seconds, num_bytes=size)
    )
    metrics.on_event(AdapterEvent(digest=digest, event="evicted", tier="host"))
    metrics.on_event(AdapterEvent(digest=digest, event="failed", tier="gpu"))


def _stats(digests: list[str], num_streams: int) -> EngineStats:
    return EngineStats(
        num_running=num_streams,
        num_waiting=7,
        num_free_blocks=1234,
        num_preemptions=3,
        num_steps=123_456,
        step_seconds=789.0123,
        prefix_queries=10_000,
        prefix_hits=2_500,
        bank_rows_used=512,
        host_bytes_used=1 << 30,
        resident_adapters=digests[:NUM_RESIDENT],
        wanted_adapters=digests[NUM_RESIDENT : NUM_RESIDENT + 20],
    )
