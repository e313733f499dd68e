"""Traces have the shape that was asked for, and a seed makes one trace."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from loadtest.trace import Line
from loadtest.workload import Burst, Storm, Workload, arrival_times, cold_models, make_trace, zipf

MODELS = tuple(f"m{index}" for index in range(10))


def made(**options: Any) -> list[Line]:
    return make_trace(Workload(**{"models": MODELS, "rate": 50.0, "duration_s": 40.0, **options}))


def test_one_seed_makes_one_trace_and_another_seed_another() -> None:
    assert made(seed=1) == made(seed=1)
    assert made(seed=1) != made(seed=2)


def test_poisson_arrivals_have_the_rate_and_the_scatter_of_a_poisson_process() -> None:
    times = arrival_times("poisson", 50.0, 400.0, np.random.default_rng(0))
    assert abs(len(times) - 20_000) < 3 * 20_000**0.5
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    per_second = np.histogram(times, bins=400)[0]
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, abs=0.25)


def test_constant_arrivals_are_evenly_spaced() -> None:
    times = [line.time_s for line in made(arrivals="constant", rate=4.0, duration_s=2.0)]
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_every_open_trace_is_in_order_and_within_its_time() -> None:
    trace = made(storm=Storm(at_s=5.0, models=("x", "y")), seed=3)
    times = [line.time_s for line in trace]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 40.0


def test_popularity_falls_as_zipf_says() -> None:
    shares = zipf(10, 1.0)
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] / shares[4] == pytest.approx(5.0)
    counts = Counter(line.model for line in made(alpha=1.0))
    total = sum(counts.values())
    for rank in (0, 1, 4):
        expected = shares[rank] * total
        assert abs(counts[MODELS[rank]] - expected) < 4 * expected**0.5


def test_with_alpha_zero_all_are_asked_alike() -> None:
    assert zipf(4, 0.0).tolist() == [0.25] * 4


def test_the_hot_set_drifts_by_one_rank_at_a_time() -> None:
    trace = made(alpha=2.0, drift_s=10.0)
    hottest = [
        Counter(each.model for each in trace if start <= each.time_s < start + 10).most_common(1)[
            0
        ][0]
        for start in (0, 10, 20, 30)
    ]
    assert hottest == ["m0", "m9", "m8", "m7"]


def test_without_drift_the_hottest_stays() -> None:
    trace = made(alpha=2.0)
    late = Counter(line.model for line in trace if line.time_s > 30)
    assert late.most_common(1)[0][0] == "m0"


def test_a_cold_start_storm_asks_each_cold_model_once_within_a_second() -> None:
    warm, cold = cold_models(MODELS, 4)
    trace = made(models=warm, storm=Storm(at_s=12.0, models=cold))
    stormy = [line for line in trace if line.model in cold]
    assert Counter(line.model for line in stormy) == dict.fromkeys(cold, 1)
    assert all(12.0 <= line.time_s <= 13.0 for line in stormy)
    assert (warm, cold) == (MODELS[:6], MODELS[6:])


@pytest.mark.parametrize("count", [0, 10, 11])
def test_a_storm_leaves_at_least_one_model_warm(count: int) -> None:
    with pytest.raises(ValueError, match="cold models"):
        cold_models(MODELS, count)


def test_a_burst_is_one_tenants_flood_over_everybodys_traffic() -> None:
    burst = Burst(at_s=10.0, length_s=5.0, rate=200.0, model="m3")
    with_burst, without = made(burst=burst, tenants=3), made(tenants=3)
    flood = [line for line in with_burst if line.tenant == "burst"]
    assert len(with_burst) - len(flood) == len(without)
    assert abs(len(flood) - 1000) < 4 * 1000**0.5
    assert {line.model for line in flood} == {"m3"}
    assert all(10.0 <= line.time_s < 15.0 for line in flood)


def test_requests_are_spread_over_tenants() -> None:
    counts = Counter(line.tenant for line in made(tenants=4))
    assert set(counts) == {f"tenant-{index}" for index in range(4)}
    assert min(counts.values()) > 400


def test_a_closed_loop_gives_every_user_its_requests() -> None:
    trace = made(arrivals="closed", users=3, requests_per_user=5)
    assert Counter(line.user for line in trace) == {0: 5, 1: 5, 2: 5}
    assert {line.time_s for line in trace} == {0.0}


def test_lengths_are_fixed_without_spread_and_log_normal_with_it() -> None:
    assert {line.prompt_tokens for line in made(prompt_tokens=64)} == {64}
    lengths = [line.output_tokens for line in made(output_tokens=100, spread=0.5)]
    assert np.median(lengths) == pytest.approx(100, rel=0.1)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.1)
    assert max(line.prompt_tokens for line in made(spread=3.0, max_tokens=200)) == 200


def test_seeds_differ_from_line_to_line() -> None:
    seeds = [line.seed for line in made()]
    assert len(set(seeds)) > 0.99 * len(seeds)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"models": ()}, "models is empty"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"duration_s": -1.0}, "duration_s is -1.0"),
        ({"users": 0}, "users is 0"),
        ({"tenants": 0}, "tenants is 0"),
        ({"alpha": -0.5}, "alpha is -0.5"),
        ({"spread": -1.0}, "spread is -1.0"),
        ({"drift_s": 0.0}, "drift_s is 0.0"),
        ({"arrivals": "closed", "burst": Burst(at_s=0, length_s=1, rate=1, model="a")},
         "need an open loop"),
        ({"arrivals": "closed", "drift_s": 3.0}, "need an open loop"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"spread": float("inf")}, "spread is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"rate": 1e9}, "that is 6e[+]10 requests"),
        ({"arrivals": "closed", "users": 10**5, "requests_per_user": 1000}, "1e[+]08 requests"),
        ({"output_tokens": 5000, "spread": 0.1}, "output_tokens is 5000; .* up to 4096"),
    ],
)  # fmt: skip
def test_a_workload_that_will_not_do_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Workload(**{"models": MODELS, **options})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"at_s": -1}, "at_s is -1"),
        ({"length_s": 0}, "length_s is 0"),
        ({"rate": -5}, "rate is -5"),
        ({"rate": 1e9}, "1e[+]09 requests"),
    ],
)
def test_a_burst_that_will_not_do_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Burst(**{"at_s": 0, "length_s": 1, "rate": 1, "model": "a", **options})


def test_a_storm_before_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="at_s is -1"):
        Storm(at_s=-1, models=("a",))


def test_the_widest_spread_draws_lengths_still() -> None:
    lengths = [line.output_tokens for line in made(spread=1000.0, max_tokens=100)]
    assert (min(lengths), max(lengths)) == (1, 100)
