"""`turnout bench popular`: N registered adapters asked for by Zipf's law, on this GPU."""

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from server.bench.driver import Driver
from server.bench.figures import Figure, show
from server.bench.reference import reference_config, register_adapters, save_reference_base
from server.config import CacheConfig
from server.engine.request import AdapterRef

RANK = 4
RESIDENT = 44  # as many different ones as 64 streams ask for at a time by Zipf's law over 1,000
STREAMS, PROMPT = 64, 256
NEW = (128, 384)  # tokens, at least and at most: streams of one length would all end together
BANK_ROWS = 512  # room for 64 adapters of rank 4: a page is 8 rows
CACHE = CacheConfig(num_blocks=4096, prefix_caching=False)
HOST_BYTES = 4 << 30  # of adapters: less than a fifth of a thousand


def run(num_adapters: int, seconds: float, json_file: Path | None) -> list[Figure]:
    """Measure and print; needs 22 MB of disk for each adapter and 15 GB for the base.

    seconds  how long the N adapters are asked for, and those that stay before them
    """
    with tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch:
        return show(_figures(Path(scratch), num_adapters, seconds), json_file)


def _figures(root: Path, num_adapters: int, seconds: float) -> Iterator[Figure]:
    spec = save_reference_base(root / "base", torch.device("cuda"))
    store = root / "store"
    adapters = register_adapters(store, root / "base", spec, [RANK] * num_adapters)
    config = reference_config(root / "base", store, CACHE, BANK_ROWS, host_bytes=HOST_BYTES)
    driver = Driver(config)
    resident = adapters[:RESIDENT]
    driver.load(resident)

    lengths = random.Random(1)

    def rate(asked: Iterator[AdapterRef], seconds: float) -> float:
        return driver.keep_busy(
            STREAMS,
            lambda: driver.add_random(next(asked), PROMPT, lengths.randint(*NEW)),
            seconds,
        )

    alone = rate(itertools.cycle(resident), seconds)
    yield Figure(f"{len(resident)} adapters in turn, all resident", alone, "tok/s")
    asked = by_zipf(adapters)
    rate(asked, seconds / 5)  # fills the host's share of adapters
    host, device = _host_gib(), torch.cuda.memory_reserved()
    together = rate(asked, seconds)
    note = f"{together / alone:.3f} of it"
    yield Figure(f"Zipf over {num_adapters} adapters", together, "tok/s", None, note)
    loads = sum(event.event == "loaded" for event in driver.engine.adapters.take_events())
    yield Figure("loads into the bank", loads, "")
    yield Figure("host memory, growth", _host_gib() - host, "GiB", None, f"from {host:.2f} in all")
    grown = (torch.cuda.memory_reserved() - device) / (1 << 30)
    yield Figure("GPU memory, growth", grown, "GiB")


def by_zipf(pool: list[AdapterRef]) -> Iterator[AdapterRef]:
    """The k-th adapter with a weight of 1 / k, without end."""
    random_ = random.Random(0)
    weights = list(itertools.accumulate(1 / (place + 1) for place in range(len(pool))))
    while True:
        yield random_.choices(pool, cum_weights=weights)[0]


def _host_gib() -> float:
    """What all processes hold; the page cache does not count, pinned memory does."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return (kib["MemTotal"] - kib["MemAvailable"]) / (1 << 20)
