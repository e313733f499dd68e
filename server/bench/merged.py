"""`turnout bench merged`: a merged model against its adapter over the base, on this GPU."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from server.bench.driver import Driver
from server.bench.figures import Figure, show
from server.bench.gpu_table import CACHE, NEW, NUM_ADAPTERS, PROMPT, RANK, STEP_FLOOR_MS
from server.bench.popularity import by_zipf
from server.bench.reference import (
    reference_config,
    register_adapters,
    save_reference_base,
    save_reference_gptq,
)
from server.engine.request import BASE, AdapterRef

STREAMS = 32  # of the mixed trace
MERGED = "merged"
SET_BYTES = 6 << 30


def run(json_file: Path | None) -> list[Figure]:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch:
        root, device = Path(scratch), torch.device("cuda")
        spec = save_reference_base(root / "base", device)
        folder = save_reference_gptq(root / "merged", root / "base", device)
        adapters = register_adapters(root / "store", root / "base", spec, [RANK] * NUM_ADAPTERS)
        config = reference_config(
            root / "base", root / "store", CACHE, NUM_ADAPTERS * RANK, set_bytes=SET_BYTES
        )
        return show(figures(Driver(config), adapters, folder, seconds=10.0), json_file)


def figures(
    driver: Driver, adapters: list[AdapterRef], folder: Path, seconds: float
) -> Iterator[Figure]:
    """Steps of each path alone, then a mixed trace with the first adapter merged and not.

    seconds  how long each trace is
    """
    driver.load(adapters)
    event = driver.load_weight_set(MERGED, folder)
    yield Figure("loading the merged model", event.seconds, "s")
    for batch in STEP_FLOOR_MS:
        ways = {"no adapter": (None, BASE), "1 adapter": (adapters[0], BASE)}
        ways[MERGED] = (None, MERGED)
        found = {}
        for name, (adapter, weight_set) in ways.items():
            for _ in range(batch):
                driver.add_random(adapter, PROMPT, NEW, weight_set)
            found[name] = driver.run().step_ms(batch)
            note = f"{found['1 adapter'] / found[name]:.2f} x as fast" if name == MERGED else ""
            yield Figure(f"decode step, batch {batch}, {name}", found[name], "ms", None, note)
    apart = mixed(driver, adapters, None, seconds)
    yield Figure(f"Zipf over {len(adapters)} adapters, none merged", apart, "tok/s")
    together = mixed(driver, adapters, adapters[0], seconds)
    note = f"{together / apart:.3f} of it"
    yield Figure("the same, the most popular merged", together, "tok/s", None, note)


def mixed(
    driver: Driver, adapters: list[AdapterRef], merged: AdapterRef | None, seconds: float
) -> float:
    """Tokens per second of streams that ask for adapters by Zipf's law."""
    asked = by_zipf(adapters)

    def add() -> None:
        adapter = next(asked)
        if adapter is merged:
            driver.add_random(None, PROMPT, NEW, MERGED)
        else:
            driver.add_random(adapter, PROMPT, NEW)

    return driver.keep_busy(STREAMS, add, seconds)
