from pathlib import Path

import pytest

from server.bench.driver import Driver, Trace, p99
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig


def test_a_step_counts_only_beside_another_that_served_the_whole_batch_too() -> None:
    steps = [(0.0, 1), (1.0, 2), (1.004, 2), (1.010, 2), (2.0, 1), (3.0, 2)]
    assert Trace(began=0.0, steps=steps).step_ms(2) == pytest.approx(5.0)


def test_a_rate_counts_the_steps_that_ended_between_two_moments() -> None:
    trace = Trace(began=10.0, steps=[(10.1, 8), (11.0, 4), (12.5, 6), (13.0, 5), (14.0, 9)])
    assert trace.rate(1.0, 3.0) == (4 + 6) / 2


def test_first_tokens_and_gaps_are_taken_by_request() -> None:
    trace = Trace(began=1.0, times={"a": [1.01, 1.02, 1.05], "b": [1.03], "c": [1.0, 1.001]})
    assert trace.first_token_ms() == pytest.approx((10 + 30 + 0) / 3)
    assert trace.prefill_s == pytest.approx(0.03)
    assert trace.gaps_ms(["a", "b", "c"]) == pytest.approx([1, 10, 30])


def test_one_value_in_a_hundred_exceeds_the_99th_percentile() -> None:
    assert p99([float(value) for value in range(100)]) == 99.0
    assert p99([float(value) for value in range(1000)]) == 990.0


def test_every_request_gives_its_tokens_and_a_hook_sees_each_step(
    tiny_base: Path, tmp_path: Path
) -> None:
    cache = CacheConfig(num_blocks=64, prefix_caching=False)
    config = Config(
        model=ModelConfig(path=tiny_base, device="cpu"),
        cache=cache,
        adapters=AdapterConfig(store=tmp_path / "store", bank_rows=64),
    )
    driver = Driver(config)
    requests = [driver.add(None, [5, 6, 7], 4), driver.add_random(None, 9, 3)]
    seen: list[int] = []
    trace = driver.run(lambda seconds, outputs: seen.append(len(outputs)))
    assert [len(trace.times[request]) for request in requests] == [4, 3]
    assert sum(count for _, count in trace.steps) == sum(seen) == 7
    assert trace.seconds > 0
    assert driver.start_s > 0
