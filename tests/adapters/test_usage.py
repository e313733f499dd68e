"""Tokens served: counted for good, and fading with age."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import registry as registry_module
from adapters.catalog import HALF_LIFE_S, Usage
from adapters.manifest import BaseShape
from adapters.registry import Registry
from tests.adapters.conftest import WriteFolder


def test_recent_tokens_halve_in_a_half_life() -> None:
    usage = Usage().plus(1000, now=5.0)
    assert usage == Usage(1000, 1000.0, 5.0)
    assert usage.recent_at(5.0 + HALF_LIFE_S) == 500
    assert usage.recent_at(0.0) == 1000  # a clock that was set back
    later = usage.plus(100, now=5.0 + 2 * HALF_LIFE_S)
    assert later == Usage(1100, 350.0, 5.0 + 2 * HALF_LIFE_S)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e5)), max_size=20))
def test_recent_tokens_are_never_more_than_all(served: list[tuple[int, float]]) -> None:
    usage, now = Usage(), 0.0
    for tokens, wait_s in served:
        now += wait_s
        usage = usage.plus(tokens, now)
        assert 0 <= usage.recent_at(now) <= usage.tokens * (1 + 1e-9)
    assert usage.tokens == sum(tokens for tokens, _ in served)


def test_popularity_survives_a_restart_and_goes_with_the_adapter(
    tmp_path: Path,
    one_linear: BaseShape,
    write_folder: WriteFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=100.0)
    clock.time = lambda: clock.now
    registry = Registry.open(tmp_path / "store", one_linear)
    digest = registry.push("bot", write_folder()).digest
    monkeypatch.setattr(registry_module, "time", clock)
    registry.add_usage({digest: 1000, "unknown": 5})
    clock.now += HALF_LIFE_S
    registry.add_usage({digest: 100})
    registry.close()
    registry = Registry.open(tmp_path / "store", one_linear)
    assert registry.popularity() == {digest: Usage(1100, 600.0, 100.0 + HALF_LIFE_S)}
    assert registry.usage() == {digest: 1100}
    registry.delete("bot")
    assert registry.popularity() == {}
    registry.close()
