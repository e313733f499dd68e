"""Figures from records whose figures are known."""

import pytest

from loadtest.figures import (
    Slo,
    checks,
    elapsed_s,
    fairness,
    goodput,
    latency,
    model_rows,
    outcomes,
    reasons,
    split_by,
)
from loadtest.record import Record
from loadtest.trace import Line
from tests.loadtest.making import line, lines, record


def test_latency_counts_only_replies_that_are_ok() -> None:
    found = latency([record(), record(ttft_s=0.3), record(outcome="cut", ttft_s=9.0)])
    assert (found.num_requests, found.num_tokens) == (2, 6)
    assert found.ttft.p50 == pytest.approx(0.2)
    assert found.itl.count == 4


def test_the_mean_time_per_token_leaves_the_first_token_out() -> None:
    assert record(ttft_s=1.0, e2e_s=3.0, num_tokens=5).tpot_s == 0.5
    assert record(num_tokens=1).tpot_s is None
    assert record(ttft_s=None, e2e_s=None).tpot_s is None


def test_every_outcome_is_counted_apart() -> None:
    named = ["ok", "ok", "rejected", "failed", "cut", "wrong"]
    records = [record(outcome=name, reason=f"r-{name}") for name in named]
    assert outcomes(records) == {"ok": 2, "rejected": 1, "failed": 1, "cut": 1, "wrong": 1}
    assert reasons([*records, records[2]]) == {
        "rejected r-rejected": 2, "failed r-failed": 1, "cut r-cut": 1, "wrong r-wrong": 1,
    }  # fmt: skip


def test_records_without_the_key_are_in_no_part() -> None:
    parts = split_by(
        [record(0, path="base"), record(1, path="adapter"), record(2)], lambda r: r.path
    )
    assert {name: [r.index for r in part] for name, part in parts.items()} == {
        "adapter": [1],
        "base": [0],
    }


def test_a_row_per_model_the_most_popular_first() -> None:
    trace = [line(model="b"), line(model="a"), line(model="a")]
    rows = model_rows([record(0), record(1, outcome="cut"), record(2)], trace)
    assert [(row.model, row.num_requests, row.num_ok) for row in rows] == [("a", 2, 1), ("b", 1, 1)]
    assert rows[1].tokens_per_s == pytest.approx(3 / 0.2)


def test_fairness_sees_one_adapter_served_slower() -> None:
    trace = [line(model=name) for name in "abcd"]
    even = fairness(model_rows([record(index) for index in range(4)], trace))
    assert even.jain == pytest.approx(1.0)
    assert even.worst_decile_ttft_s == even.median_ttft_s == 0.1
    slow = [*(record(index) for index in range(3)), record(3, ttft_s=2.0, e2e_s=4.0)]
    uneven = fairness(model_rows(slow, trace))
    assert uneven.jain is not None
    assert uneven.jain < 0.8
    assert (uneven.worst_decile_ttft_s, uneven.median_ttft_s) == (2.0, 0.1)


def test_an_adapter_that_got_no_answer_counts_as_served_nothing() -> None:
    trace = [line(model="a"), line(model="b")]
    rows = model_rows([record(0), record(1, outcome="rejected", ttft_s=None, e2e_s=None)], trace)
    assert fairness(rows).jain == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("slo", "holds"),
    [
        (Slo(ttft_s=0.1, tpot_s=0.05, e2e_s=0.2), True),
        (Slo(ttft_s=0.099, tpot_s=None), False),
        (Slo(ttft_s=None, tpot_s=0.049), False),
        (Slo(ttft_s=None, tpot_s=None, e2e_s=0.199), False),
        (Slo(ttft_s=None, tpot_s=None), True),
    ],
)
def test_an_slo_holds_up_to_its_limits_and_each_limit_counts(slo: Slo, holds: bool) -> None:
    assert slo.holds(record()) is holds


def test_goodput_counts_refused_requests_against_the_share() -> None:
    records = [
        record(0, intended_s=9.8),
        record(1, outcome="rejected", ttft_s=None, e2e_s=None),
        record(2, outcome="wrong"),
        record(3, ttft_s=5.0, e2e_s=5.2),
    ]
    found = goodput(records, Slo())
    assert (found.num_good, found.share) == (1, 0.25)
    assert found.per_s == pytest.approx(1 / 10.0)


def test_a_run_lasts_to_the_end_of_its_last_reply() -> None:
    slow = record(0, e2e_s=7.0)
    refused = record(1, intended_s=6.0, late_s=0.5, ttft_s=None, e2e_s=None)
    assert elapsed_s([slow, refused]) == 7.0
    assert elapsed_s([refused]) == 6.5
    hung = record(2, intended_s=1.0, ttft_s=None, e2e_s=None, outcome="cut", over_s=120.0)
    assert elapsed_s([slow, hung]) == 121.0
    assert elapsed_s([]) == 0.0


def sent(
    count: int, *, late_s: float = 0.0, num_late: int = 0, by_s: float = 0.0
) -> tuple[list[Record], list[Line]]:
    """Records of an even trace: the last `num_late` sent `by_s` late, the others `late_s`."""
    trace = lines(count)
    late = [late_s] * (count - num_late) + [by_s] * num_late
    records = [
        record(index, intended_s=one.time_s, late_s=late[index]) for index, one in enumerate(trace)
    ]
    return records, trace


def test_a_run_sent_on_time_is_not_void() -> None:
    found = checks(*sent(200, late_s=0.004))
    assert found.void == []
    assert found.late_p99_s == pytest.approx(0.004)
    assert found.sigmas_off == 0
    assert found.planned_per_s == found.offered_per_s == pytest.approx(200 / 3.98)


def test_p99_of_send_lateness_over_5_ms_voids_a_run() -> None:
    assert checks(*sent(200, num_late=1, by_s=0.006)).void == []  # one in 200 is past p99
    (why,) = checks(*sent(200, late_s=0.0051)).void
    assert "lateness is 5.1 ms" in why


def test_an_offered_rate_2_sigma_off_voids_a_run() -> None:
    # 20 of 100 requests sent after the trace's end are 2 sigma, 21 are more.
    assert not any("sigma" in why for why in checks(*sent(100, num_late=20, by_s=60.0)).void)
    voided = checks(*sent(100, num_late=21, by_s=60.0))
    assert voided.sigmas_off == pytest.approx(2.1)
    assert any("79 of 100 requests" in why and "2.1 sigma" in why for why in voided.void)


def test_a_run_without_a_single_ok_reply_is_void() -> None:
    trace = lines(2)
    assert checks([record(0, outcome="cut"), record(1, outcome="cut")], trace).void == [
        "no reply is ok"
    ]


def test_a_run_that_was_stopped_is_void_in_either_loop() -> None:
    for trace in (lines(2), [line(user=0), line(user=1)]):
        assert "1 of 2 requests are over" in checks([record()], trace).void[0]
        assert checks([record(), record(1)], trace).void == []


def test_a_closed_loop_plans_no_rate() -> None:
    found = checks([record()], [line(user=0)])
    assert (found.planned_per_s, found.sigmas_off, found.void) == (None, None, [])


def test_text_in_one_piece_has_no_time_per_token() -> None:
    """A proxy that holds a reply back would make its tokens come in no time at all."""
    assert record(ttft_s=0.2, e2e_s=0.2, gaps_s=[], num_tokens=3).tpot_s is None


@pytest.mark.parametrize("limit", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_limit_that_nothing_or_everything_keeps_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="the SLO's tpot_s is"):
        Slo(tpot_s=limit)
