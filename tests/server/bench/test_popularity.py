"""Streams that ask for adapters by Zipf's law, on a tiny base and a CPU."""

from pathlib import Path

import pytest
import torch

from server.bench import popularity
from server.bench.driver import Driver
from server.bench.popularity import _host_gib, follow_zipf
from server.bench.reference import register_adapters, save_reference_base
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from tests.server.bench.test_reference import SMALL


def test_more_adapters_than_the_bank_holds_are_all_served_and_the_first_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"STREAMS": 3, "PROMPT": 3, "NEW": 2}.items():
        monkeypatch.setattr(popularity, name, value)
    store = tmp_path / "store"
    spec = save_reference_base(tmp_path / "base", torch.device("cpu"), **SMALL)
    adapters = register_adapters(store, tmp_path / "base", spec, [4] * 12)
    config = Config(
        model=ModelConfig(path=tmp_path / "base", device="cpu"),
        cache=CacheConfig(num_blocks=64, prefix_caching=False),
        adapters=AdapterConfig(store=store, bank_rows=32),
    )
    driver = Driver(config)
    asked: list[str] = []
    add_random = driver.add_random

    def add(adapter, num_tokens, new_tokens):  # type: ignore[no-untyped-def]
        asked.append(adapter.digest)
        return add_random(adapter, num_tokens, new_tokens)

    monkeypatch.setattr(driver, "add_random", add)
    rate = follow_zipf(driver, adapters, 0.5)
    assert rate > 0
    assert not driver.engine.has_work
    assert len(asked) > 3, "no stream was followed by another"
    counts = [asked.count(adapter.digest) for adapter in adapters]
    assert counts[0] == max(counts)
    loaded = {event.digest for event in driver.engine.adapters.take_events()}
    assert loaded >= set(asked)


def test_what_the_machine_holds_is_some_memory_and_less_than_a_terabyte() -> None:
    assert 0.01 < _host_gib() < 4096
