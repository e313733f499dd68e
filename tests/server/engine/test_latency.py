import gc
import sys
from collections.abc import Iterator

import pytest

from server.engine.latency import settle


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    gc.unfreeze()


def test_what_is_loaded_is_out_of_the_collectors_sight_and_threads_change_soon() -> None:
    kept = [[index] for index in range(1000)]
    settle()
    assert gc.get_freeze_count() >= len(kept)
    assert sys.getswitchinterval() < 1e-3
