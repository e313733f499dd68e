"""The break-even curve against cases that can be worked out by hand."""

import pytest

from loadtest.breakeven import break_even, curve, gains, step_time

FLAT = {1: 0.010, 8: 0.010, 32: 0.010}  # a step that reads weights costs the same for any rows
ADAPTER = {1: 0.010, 8: 0.016, 32: 0.030}


def test_a_step_runs_straight_between_measured_sizes() -> None:
    assert step_time(ADAPTER, 1) == pytest.approx(0.010)
    assert step_time(ADAPTER, 4.5) == pytest.approx(0.013)
    assert step_time(ADAPTER, 20) == pytest.approx(0.023)
    assert step_time(ADAPTER, 32) == pytest.approx(0.030)


def test_less_than_one_row_on_average_is_needed_in_some_steps_only() -> None:
    assert step_time(ADAPTER, 0.25) == pytest.approx(0.0025)
    assert step_time(ADAPTER, 0) == 0
    assert step_time(ADAPTER, [0, 0.25, 32]) == pytest.approx([0, 0.0025, 0.030])


def test_below_the_smallest_measured_size_a_step_takes_as_long_as_there() -> None:
    assert step_time({8: 0.016, 32: 0.030}, 3) == pytest.approx(0.016)


def test_at_no_traffic_nothing_is_gained_and_at_all_of_it_the_whole_ratio() -> None:
    merged = {batch: step / 2 for batch, step in ADAPTER.items()}
    found = gains(ADAPTER, merged, 32, 0.0)
    assert found[0] == pytest.approx(0.0)
    assert found[-1] == pytest.approx(1.0)


def test_a_second_set_of_weights_costs_more_than_it_saves_at_a_small_share() -> None:
    """Steps that cost the same for any rows: two sets take twice as long, until one is left."""
    merged = dict.fromkeys(FLAT, 0.008)
    found = gains(FLAT, merged, 32, 0.0)
    assert found[50] == pytest.approx(0.010 / 0.018 - 1)
    assert found[100] == pytest.approx(0.25)
    # Past 31/32 of the traffic less than one row is left to the adapter path:
    # 32 (1 - s) 0.010 + 0.008 = 0.010 at s = 0.99375.
    assert break_even(found) == 1.0


def test_merged_weights_take_requests_from_the_kv_cache() -> None:
    half = {batch: step / 2 for batch, step in ADAPTER.items()}
    found = gains(ADAPTER, half, 32, 0.25)
    assert found[0] == pytest.approx((24 / step_time(ADAPTER, 24)) / (32 / 0.030) - 1)
    assert found[0] < 0
    assert found[-1] == pytest.approx((24 / step_time(half, 24)) / (32 / 0.030) - 1)


def test_the_break_even_is_from_where_on_the_gain_stays_above_zero() -> None:
    assert break_even([-1, 1, -1, 1, 2]) == 0.75
    assert break_even([1, 1, 1]) == 0.0
    assert break_even([0.0, 1.0]) == 1.0
    assert break_even([2.2e-16, 0.1, 0.2]) == 0.5  # no gain but a rounding error
    assert break_even([1.0, 1.0, -0.1]) is None


def test_merging_that_is_slower_never_pays() -> None:
    slower = {batch: step * 1.1 for batch, step in ADAPTER.items()}
    found = curve(ADAPTER, slower, 8, 0.0)
    assert found.break_even is None
    assert found.break_even_low is None
    assert found.break_even_high is None


def test_a_curve_carries_the_scatter_of_the_measurement() -> None:
    merged = {batch: step * 0.3 for batch, step in ADAPTER.items()}
    draws = [
        (ADAPTER, {batch: step * factor for batch, step in merged.items()})
        for factor in (0.8, 0.9, 1.0, 1.1, 1.2)
    ]
    found = curve(ADAPTER, merged, 32, 0.1, draws)
    assert found.shares[0] == 0
    assert found.shares[-1] == 1
    assert all(low <= high for low, high in zip(found.low, found.high, strict=True))
    assert found.low[-1] < found.gain[-1] < found.high[-1]
    assert found.break_even is not None
    assert found.break_even_low is not None
    assert found.break_even_high is not None
    assert found.break_even_low <= found.break_even <= found.break_even_high
    assert found.break_even_low < found.break_even_high


def test_where_some_draws_never_pay_the_upper_end_is_never() -> None:
    draws = [(FLAT, dict.fromkeys(FLAT, 0.001 + 0.011 * (each % 2))) for each in range(10)]
    found = curve(FLAT, dict.fromkeys(FLAT, 0.001), 8, 0.0, draws)
    assert found.break_even_low is not None
    assert found.break_even_high is None
