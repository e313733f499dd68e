"""`turnout bench gpu-table`: the reference on this GPU, each figure beside its floor."""

import gc
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from server.bench.driver import Driver, p99
from server.bench.figures import Figure, show
from server.bench.http import HttpSystem
from server.bench.reference import reference_config, register_adapters, save_reference_base
from server.config import CacheConfig, ModelConfig
from server.engine.messages import RequestOutput
from server.engine.request import AdapterRef

PROMPT, NEW = 256, 256  # tokens of a request
NUM_ADAPTERS, RANK = 32, 16
MIXED_RANKS = (64, 16, 8, 8, 8, 8, 8, 8)  # 16 on average
CAPPED_GIB = 22

# batch -> what a step's bytes take at 3.0 TB/s, the bandwidth measured on an H100
STEP_FLOOR_MS = {1: 1.3, 8: 1.6, 32: 2.7, 64: 3.2}

# 131,072 tokens, whatever else lives on the card
CACHE = CacheConfig(num_blocks=8192, prefix_caching=False)

_TIERS = ("nobody", "host", "disk")  # where adapters come from beside running streams
_ROUNDS = 3  # the median of so many: a machine's hiccup is as long as a load


def run(json_file: Path | None) -> list[Figure]:
    """Measure everything, print each figure as it comes and the table at the end."""
    with tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch:
        return show(_figures(Path(scratch)), json_file)


def _figures(root: Path) -> Iterator[Figure]:
    device = torch.device("cuda")
    spec = save_reference_base(root / "base", device)
    store = root / "store"
    ranks = [RANK] * NUM_ADAPTERS + list(MIXED_RANKS) * (NUM_ADAPTERS // len(MIXED_RANKS))
    refs = register_adapters(store, root / "base", spec, ranks)
    uniform, mixed = refs[:NUM_ADAPTERS], refs[NUM_ADAPTERS:]

    driver = Driver(reference_config(root / "base", store, CACHE, 2 * NUM_ADAPTERS * RANK))
    yield Figure("start to ready, caches as they are", driver.start_s, "s")
    driver.load(uniform)
    yield from _decode(driver, uniform)
    yield from _one_row(driver, uniform)
    yield from _first_tokens(driver, uniform)
    yield from _prefill(driver, uniform)
    yield from _beside_prompts(driver, uniform)
    yield from _beside_loads(driver, uniform)
    yield from _mixed_ranks(driver, mixed)
    engine_s = _whole(driver, uniform)
    del driver
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()

    began = time.perf_counter()
    http = HttpSystem(
        ModelConfig(path=root / "base", name="reference"),
        [f"a{index}" for index in range(NUM_ADAPTERS)],
        store,
        NEW,
        2 * NUM_ADAPTERS * RANK,
    )
    try:
        yield Figure("server process, start to ready", time.perf_counter() - began, "s")
        yield from _over_http(http, engine_s)
    finally:
        http.close()
    yield from _capped(root / "base", store, uniform)


def _decode(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    for batch, count in ((1, 1), (8, 8), (32, 32), (64, 32)):
        for index in range(batch):
            driver.add_random(adapters[index % count], PROMPT, NEW)
        measured = driver.run().step_ms(batch)
        gpu = _gpu_ms(driver, [adapters[index % count] for index in range(batch)])
        note = f"{batch * 1e3 / measured:,.0f} tok/s; the GPU alone {gpu:.2f} ms"
        name = f"decode step, batch {batch}, {count} adapter{'s' * (count > 1)}"
        yield Figure(name, measured, "ms", STEP_FLOOR_MS[batch], note)


def _gpu_ms(driver: Driver, batch: list[AdapterRef]) -> float:
    """The step in the middle of such a run, replayed without the host."""
    requests = [driver.add_random(adapter, PROMPT, NEW) for adapter in batch]
    found: list[float] = []
    num_full = 0

    def replay(seconds: float, outputs: list[RequestOutput]) -> None:
        nonlocal num_full
        num_full += len(outputs) == len(batch)
        if num_full == NEW // 2 and not found:
            found.append(driver.replay_ms())
            for request in requests:
                driver.engine.abort(request)

    driver.run(replay)
    return found[0]


def _one_row(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    steps = []
    for first in (None, adapters[0]):
        for index in range(32):
            driver.add_random(first if index == 0 else None, PROMPT, NEW)
        steps.append(driver.run().step_ms(32))
    yield Figure("decode step, batch 32, no adapter", steps[0], "ms")
    yield Figure("one row of the 32 with an adapter", steps[1] - steps[0], "ms more")


def _mixed_ranks(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    driver.load(adapters)
    for adapter in adapters:
        driver.add_random(adapter, PROMPT, NEW)
    yield Figure("decode step, batch 32, ranks 8 to 64, mean 16", driver.run().step_ms(32), "ms")


def _first_tokens(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    for batch in (1, 8, 32, 64):
        for index in range(batch):
            driver.add_random(adapters[index % len(adapters)], PROMPT, 4)
        name = f"mean time to first token, {batch} prompt{'s' * (batch > 1)} at once"
        yield Figure(name, driver.run().first_token_ms(), "ms")


def _prefill(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    for index in range(8):
        driver.add_random(adapters[index], 2048, 1)
    yield Figure("prefill of 8 x 2,048 tokens, 8 adapters", driver.run().seconds, "s", 0.3)


def _beside_prompts(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    streams = [driver.add_random(adapter, PROMPT, 1000) for adapter in adapters]
    num_prompts = 0

    def add_prompt(seconds: float, outputs: list[RequestOutput]) -> None:
        nonlocal num_prompts
        if seconds > 1 + num_prompts:
            driver.add_random(adapters[num_prompts], 2048, 1)
            num_prompts += 1

    gaps = driver.run(add_prompt).gaps_ms(streams)
    note = f"median {statistics.median(gaps):.2f}, largest {gaps[-1]:.1f}"
    name = "p99 between tokens, 32 streams, a 2,048-token prompt a second"
    yield Figure(name, p99(gaps), "ms", None, note)


def _beside_loads(driver: Driver, adapters: list[AdapterRef]) -> Iterator[Figure]:
    """8 streams, alone, then while 5 adapters a second come from host memory, then from disk."""
    running, others = adapters[:8], adapters[8:]
    gaps_p99, loads_s = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for tier in _TIERS * _ROUNDS:
        for adapter in others if tier == "host" else ():
            driver.engine.adapters.evict(adapter.digest)
        for adapter in others if tier == "disk" else ():
            driver.engine.adapters.drop(adapter.digest)
        driver.engine.adapters.take_events()
        streams = [driver.add_random(adapter, PROMPT, 1400) for adapter in running]
        due = [(0.5 + 0.2 * index, adapter) for index, adapter in enumerate(others)]

        def load(
            seconds: float, outputs: list[RequestOutput], due: list[tuple[float, AdapterRef]] = due
        ) -> None:
            if due and seconds > due[0][0]:
                driver.engine.adapters.prefetch(due.pop(0)[1])

        gaps = driver.run(None if tier == "nobody" else load).gaps_ms(streams)
        gaps_p99[tier].append(p99(gaps))
        events = driver.engine.adapters.take_events()
        loads_s[tier] += [event.seconds for event in events if event.event == "loaded"]
    for tier in _TIERS:
        name = f"p99 between tokens, 8 streams, 5 loads a second from {tier}"
        note = f"{min(gaps_p99[tier]):.2f} to {max(gaps_p99[tier]):.2f} in {_ROUNDS} rounds"
        yield Figure(name, statistics.median(gaps_p99[tier]), "ms", None, note)
        if loads_s[tier]:
            name = f"{tier} to bank, rank 16"
            yield Figure(name, statistics.median(loads_s[tier]) * 1e3, "ms")
    driver.engine.adapters.drop(others[0].digest)
    driver.add_random(others[0], PROMPT, 1)
    yield Figure("disk to first token, rank 16", driver.run().first_token_ms(), "ms")


def _whole(driver: Driver, adapters: list[AdapterRef]) -> float:
    """Seconds for 64 requests, all at once, from the first to the last token."""
    driver.load(adapters)
    for index in range(64):
        driver.add_random(adapters[index % NUM_ADAPTERS], PROMPT, NEW)
    return driver.run().seconds


def _over_http(http: HttpSystem, engine_s: float) -> Iterator[Figure]:
    random_ = random.Random(1)
    choice: list[int | None] = [index % NUM_ADAPTERS for index in range(64)]
    for _ in range(2):  # the first round loads the adapters
        prompts = [[random_.randrange(3, 32000) for _ in range(PROMPT)] for _ in range(64)]
        seconds = http.run(prompts, choice).total_s
    note = f"engine {64 * NEW / engine_s:,.0f} tok/s, HTTP {64 * NEW / seconds:,.0f}"
    yield Figure(
        "throughput over HTTP with SSE, 64 streams", engine_s / seconds, "of it", None, note
    )


def _capped(base: Path, store: Path, adapters: list[AdapterRef]) -> Iterator[Figure]:
    """Base, 32 adapters of rank 16 and 64k tokens of KV on a card of 22 GiB."""
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(CAPPED_GIB * (1 << 30) / total)
    cache = CacheConfig(num_blocks=4096, prefix_caching=False)
    driver = Driver(reference_config(base, store, cache, NUM_ADAPTERS * RANK))
    driver.load(adapters)
    for adapter in adapters[:8]:
        driver.add_random(adapter, PROMPT, NEW)
    step = driver.run().step_ms(8)
    for adapter in adapters[:8]:
        driver.add_random(adapter, 2048, 1)
    driver.run()
    used = (free - torch.cuda.mem_get_info()[0]) / (1 << 30)
    note = f"{used:.1f} GiB used, prefill of 8 x 2,048 tokens included"
    yield Figure(f"decode step, batch 8, 8 adapters, {CAPPED_GIB} GiB", step, "ms", None, note)
