"""Streams that ask for adapters by Zipf's law, on a tiny base and a CPU."""

import itertools
from pathlib import Path

import torch

from server.bench.driver import Driver
from server.bench.popularity import _host_gib, by_zipf
from server.bench.reference import register_adapters, save_reference_base
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.engine.request import AdapterRef
from tests.server.bench.test_reference import SMALL


def test_the_kth_adapter_is_asked_for_a_kth_as_often_as_the_first() -> None:
    pool = [AdapterRef(str(place), 4) for place in range(4)]
    asked = list(itertools.islice(by_zipf(pool), 25_000))
    counts = [asked.count(adapter) / 12_000 for adapter in pool]
    for place, count in enumerate(counts):
        assert abs(count - 1 / (place + 1)) < 0.05


def test_more_adapters_than_the_bank_holds_are_all_served(tmp_path: Path) -> None:
    store = tmp_path / "store"
    spec = save_reference_base(tmp_path / "base", torch.device("cpu"), **SMALL)
    adapters = register_adapters(store, tmp_path / "base", spec, [4] * 12)
    config = Config(
        model=ModelConfig(path=tmp_path / "base", device="cpu"),
        cache=CacheConfig(num_blocks=64, prefix_caching=False),
        adapters=AdapterConfig(store=store, bank_rows=32),
    )
    driver = Driver(config)
    asked, used = by_zipf(adapters), []

    def add() -> None:
        used.append(next(asked))
        driver.add_random(used[-1], 3, 2)

    assert driver.keep_busy(3, add, 0.3) > 0
    assert not driver.engine.has_work
    assert len(used) > 3, "no stream was followed by another"
    loaded = {event.digest for event in driver.engine.adapters.take_events()}
    assert loaded >= {adapter.digest for adapter in used}


def test_what_the_machine_holds_is_some_memory_and_less_than_a_terabyte() -> None:
    assert 0.01 < _host_gib() < 4096
