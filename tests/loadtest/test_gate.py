"""The gate lets an equal run pass, and says what is worse about a worse one."""

import msgspec
import pytest

from loadtest.figures import Slo
from loadtest.gate import regressions, warnings
from loadtest.report import RunReport
from tests.loadtest.making import environment, lines, record, run_report


def changed(**fields: object) -> RunReport:
    """A run whose records all have these fields."""
    trace = lines(20)
    records = [record(i, **{"intended_s": one.time_s, **fields}) for i, one in enumerate(trace)]
    return run_report(records, trace)


def test_the_same_run_passes() -> None:
    assert regressions(run_report(), run_report(), 0.0) == []


def test_a_figure_worse_by_more_than_the_tolerance_is_named() -> None:
    slower = changed(ttft_s=0.12, e2e_s=0.22)
    found = regressions(run_report(), slower, 0.1)
    assert [each.split(":")[0] for each in found] == ["ttft p50", "ttft p90", "ttft p99"]
    assert "120.0 ms, was 100.0" in found[0]
    assert regressions(run_report(), slower, 0.25) == []


def test_gaps_and_the_end_are_held_too() -> None:
    found = regressions(run_report(), changed(gaps_s=[0.09, 0.09], e2e_s=0.5), 0.1)
    assert {each.split()[0] for each in found} >= {"itl", "e2e"}


def test_faster_is_no_regression() -> None:
    assert regressions(run_report(), changed(ttft_s=0.05, e2e_s=0.1, gaps_s=[0.02]), 0.0) == []


def test_a_millisecond_is_not_slower_whatever_the_ratio() -> None:
    quick = changed(gaps_s=[0.001])
    assert regressions(quick, changed(gaps_s=[0.0025]), 0.1) == []


@pytest.mark.parametrize("outcome", ["rejected", "failed", "cut", "wrong"])
def test_one_reply_more_that_is_not_ok_fails_at_any_tolerance(outcome: str) -> None:
    trace = lines(20)
    records = [record(i, intended_s=one.time_s) for i, one in enumerate(trace)]
    records[3] = record(3, outcome=outcome)
    found = regressions(run_report(), run_report(records, trace), 10.0)
    assert found == [f"{outcome}: 1, was 0"]


def test_goodput_is_held_if_the_slo_is_the_same() -> None:
    good = changed(ttft_s=0.9, e2e_s=1.0)
    bad = changed(ttft_s=1.05, e2e_s=1.1)
    assert any(each.startswith("goodput") for each in regressions(good, bad, 0.2))
    stricter = run_report(slo=Slo(ttft_s=0.01))
    assert regressions(run_report(), stricter, 0.2) == []


def test_different_traces_are_not_compared() -> None:
    (why,) = regressions(run_report(), run_report(trace=lines(19)), 0.1)
    assert "different traces" in why


def test_a_void_run_neither_passes_nor_holds_another() -> None:
    void = changed(late_s=1.0)
    assert regressions(run_report(), void, 10.0) == ["the new run is void"]
    assert regressions(void, run_report(), 10.0) == ["the stored run is void"]


def test_a_changed_environment_is_warned_of_line_by_line() -> None:
    other = environment(num_cores=64, load_average=(9.0, 9.0), server={"version": "2"})
    found = warnings(run_report(), run_report(environment=other))
    assert found == ["num_cores: 2 -> 64", "server version: 1 -> 2"]
    assert warnings(run_report(), run_report()) == []


def test_another_target_or_slo_is_warned_of_too() -> None:
    """Chats are slower than completions, and goodput is not compared between two SLOs."""
    new = run_report(slo=Slo(ttft_s=0.5))
    new = msgspec.structs.replace(new, target={**new.target, "endpoint": "chat", "url": "http://b"})
    assert warnings(run_report(), new) == [
        "endpoint: completions -> chat",
        "SLO ttft_s: 1.0 -> 0.5",
    ]


def test_a_stored_run_is_still_one_after_a_round_trip() -> None:
    stored = msgspec.json.decode(msgspec.json.encode(run_report()), type=RunReport)
    assert regressions(stored, run_report(), 0.0) == []
