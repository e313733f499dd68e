"""Statistics against values worked out by hand, or known by construction."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.stats import (
    Interval,
    cdf,
    interval_of,
    jain,
    mean,
    paired_difference,
    quantile,
    quantiles,
    rate_misses,
    resampled,
    worst_decile,
)


def test_quantiles_of_known_values() -> None:
    found = quantiles([float(value) for value in range(101)])
    assert (found.count, found.mean, found.p50, found.p90, found.p99) == (101, 50, 50, 90, 99)


def test_nothing_has_no_quantiles() -> None:
    assert quantiles([]).p50 is None
    assert cdf([]) == []


def test_a_cdf_goes_from_the_least_to_the_most() -> None:
    found = cdf([3.0, 1.0, 2.0], points=5)
    assert found == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_jain_is_one_for_equals_and_one_nth_for_one_who_has_all() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert jain([0.0, 0.0]) is None
    assert jain([]) is None


@given(st.lists(st.floats(0.01, 100), min_size=1), st.floats(0.1, 10))
def test_jain_lies_between_one_nth_and_one_and_does_not_mind_the_unit(
    shares: list[float], unit: float
) -> None:
    found = jain(shares)
    assert found is not None
    assert 1 / len(shares) - 1e-9 <= found <= 1 + 1e-9
    assert jain([share * unit for share in shares]) == pytest.approx(found)


def test_the_worst_decile_is_the_mean_of_the_largest_tenth() -> None:
    assert worst_decile([float(value) for value in range(20)]) == 18.5
    assert worst_decile([1.0, 7.0]) == 7.0
    assert worst_decile([]) is None


def blocks(
    count: int, size: int, shift: float, drift: float, seed: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Pairs of blocks: B is A plus `shift`; both share a mood that wanders by `drift`."""
    random = np.random.default_rng(seed)
    a, b = [], []
    for _ in range(count):
        mood = drift * random.standard_normal()
        noise = random.standard_normal((2, size)) * 0.1
        a.append((1.0 + mood + noise[0]).tolist())
        b.append((1.0 + mood + noise[1] + shift).tolist())
    return a, b


def test_a_known_shift_is_found_though_the_machines_mood_is_ten_times_larger() -> None:
    found = paired_difference(*blocks(12, 20, -0.05, 0.5, seed=1), mean)
    assert found.value == pytest.approx(-0.05, abs=0.03)
    assert found.is_clear
    assert found.low < -0.05 < found.high


def test_no_difference_is_not_called_one() -> None:
    found = paired_difference(*blocks(12, 20, 0.0, 0.5, seed=2), mean)
    assert not found.is_clear


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(100):
        a, b = blocks(12, 4, 0.2, 1.0, seed)
        found = paired_difference(a, b, mean, resamples=300)
        hits += found.low <= 0.2 <= found.high
    assert hits >= 82  # percentile intervals of 12 pairs are a little narrow


def test_the_difference_of_a_quantile_is_of_all_values_not_of_block_means() -> None:
    a, b = [[0.0, 10.0], [0.0, 10.0]], [[1.0, 11.0], [1.0, 31.0]]
    assert paired_difference(a, b, quantile(1.0)).value == 21.0


def test_pairs_stay_together_when_they_are_drawn() -> None:
    a, b = [[0.0], [100.0], [200.0]], [[1.0], [101.0], [201.0]]
    found = resampled(a, b, lambda x, y: mean(y) - mean(x), resamples=50)
    assert found == pytest.approx([1.0] * 50)


def test_the_same_seed_draws_the_same_pairs() -> None:
    a, b = blocks(5, 3, 0.1, 0.3, seed=3)
    assert resampled(a, b, lambda x, _: mean(x)) == resampled(a, b, lambda x, _: mean(x))


def test_one_pair_of_blocks_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference([[1.0]], [[2.0]], mean)


def test_an_interval_is_clear_only_if_it_leaves_zero_out() -> None:
    assert Interval(1, 0.1, 2).is_clear
    assert Interval(-1, -2, -0.1).is_clear
    assert not Interval(1, -0.1, 2).is_clear


def test_the_interval_leaves_a_fortieth_at_either_end() -> None:
    found = interval_of(0.0, [float(value) for value in range(1001)])
    assert (found.low, found.high) == pytest.approx((25, 975))


def test_a_rate_is_judged_by_the_scatter_of_a_poisson_count() -> None:
    assert rate_misses(100, 100) == 0
    assert rate_misses(100, 80) == pytest.approx(2.0)
    assert rate_misses(100, 121) == pytest.approx(2.1)
    assert rate_misses(0, 0) == 0
    assert math.isfinite(rate_misses(1, 0))
