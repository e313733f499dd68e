"""What holds for any trace, any records and any reply, whatever hypothesis thinks of."""

import json
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.breakeven import LEAST_GAIN, break_even, curve, gains
from loadtest.figures import (
    Slo,
    checks,
    elapsed_s,
    fairness,
    goodput,
    latency,
    model_rows,
    outcomes,
    split_by,
)
from loadtest.fleet import split
from loadtest.gate import regressions
from loadtest.page import render
from loadtest.record import OUTCOMES, Record
from loadtest.reply import Reply
from loadtest.report import RunReport
from loadtest.stats import cdf, quantiles, worst_decile
from loadtest.target import Target, body_of, request_bytes
from loadtest.trace import Line, decode_trace, encode_trace
from loadtest.workload import Burst, Storm, Workload, make_trace
from tests.loadtest.making import line, run_report
from tests.loadtest.stub import chunk, event

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
)
TIMES = st.floats(0, 1e4, allow_nan=False).map(lambda value: round(value, 6))
LATENCIES = st.none() | st.floats(1e-4, 100)


@st.composite
def some_lines(draw: st.DrawFn) -> list[Line]:
    """A trace of one to twenty requests, open or closed."""
    users = draw(st.none() | st.integers(1, 4))
    times = sorted(draw(st.lists(TIMES, min_size=1, max_size=20)))
    return [
        Line(
            time_s=time,
            tenant=draw(st.sampled_from(["t0", "t1"])),
            model=draw(st.sampled_from(["a", "b", "c@2"])),
            prompt_tokens=draw(st.integers(1, 50)),
            output_tokens=draw(st.integers(1, 50)),
            seed=draw(st.integers(0, 2**31)),
            user=None if users is None else draw(st.integers(0, users - 1)),
        )
        for time in times
    ]


@st.composite
def some_records(draw: st.DrawFn) -> tuple[list[Line], list[Record]]:
    """A trace, and a fate for each of its requests."""
    trace = draw(some_lines())
    records = []
    for index, one in enumerate(trace):
        ttft = draw(LATENCIES)
        outcome = draw(st.sampled_from(OUTCOMES))
        if outcome == "ok" and ttft is None:
            ttft = 0.1
        late = draw(st.floats(0, 0.1))
        e2e = None if ttft is None else ttft + draw(st.floats(0, 10))
        records.append(
            Record(
                index=index,
                intended_s=one.time_s,
                late_s=late,
                over_s=max(late, e2e or 0.0) + draw(st.floats(0, 10)),
                outcome=outcome,
                reason="" if outcome == "ok" else draw(st.sampled_from(["x", "y"])),
                ttft_s=ttft,
                e2e_s=e2e,
                num_tokens=one.output_tokens,
                path=draw(st.sampled_from([None, "adapter", "merged"])),
            )
        )
    return trace, records


@given(some_lines())
def test_any_trace_survives_being_written(trace: list[Line]) -> None:
    assert decode_trace(encode_trace(trace), "a trace") == trace


@given(some_lines(), st.integers(1, 6))
def test_any_split_gives_every_line_to_exactly_one_process(trace: list[Line], count: int) -> None:
    shares = split(Target(), trace, {0}, count)
    dealt = sorted(index for share in shares for index in share.lines)
    assert dealt == list(range(len(trace)))
    assert all(share.lines for share in shares)
    assert [share for share in shares if share.keep_text] == [s for s in shares if 0 in s.lines]
    for user in {one.user for one in trace} - {None}:
        homes = [s for s in shares if any(one.user == user for one in s.lines.values())]
        assert len(homes) == 1


@given(
    st.builds(
        Workload,
        models=st.lists(NAMES, min_size=1, max_size=5, unique=True).map(tuple),
        arrivals=st.sampled_from(["poisson", "constant"]),
        rate=st.floats(0.1, 20),
        duration_s=st.floats(0.5, 10),
        alpha=st.floats(0, 3),
        drift_s=st.none() | st.floats(0.1, 5),
        tenants=st.integers(1, 3),
        prompt_tokens=st.integers(1, 200),
        output_tokens=st.integers(1, 200),
        spread=st.floats(0, 2),
        storm=st.none() | st.builds(Storm, at_s=st.floats(0, 5), models=st.just(("x", "y"))),
        burst=st.none()
        | st.builds(
            Burst, at_s=st.floats(0, 5), length_s=st.floats(0.1, 3), rate=st.floats(1, 20),
            model=st.just("z"),
        ),
        seed=st.integers(0, 100),
    )
)  # fmt: skip
def test_any_workload_is_a_trace_in_order_of_known_models_and_lengths(workload: Workload) -> None:
    trace = make_trace(workload)
    times = [one.time_s for one in trace]
    assert trace
    assert times == sorted(times)
    assert {one.model for one in trace} <= {*workload.models, "x", "y", "z"}
    assert all(1 <= one.output_tokens <= workload.max_tokens for one in trace)
    assert make_trace(workload) == trace


@given(
    some_lines(),
    st.sampled_from([("completions", "words"), ("completions", "ids"), ("chat", "words")]),
)
def test_any_request_is_whole_http_of_one_json_body(trace: list[Line], asked: Any) -> None:
    endpoint, prompt = asked
    target = Target(endpoint=endpoint, prompt=prompt)
    for one in trace:
        head, _, body = request_bytes(target, one).partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        decoded = json.loads(body)
        assert decoded == json.loads(body_of(target, one))
        assert (decoded["max_tokens"], decoded["model"]) == (one.output_tokens, one.model)


@given(some_records())
def test_outcomes_add_up_and_parts_are_no_more_than_the_whole(
    made: tuple[list[Line], list[Record]],
) -> None:
    trace, records = made
    counted = outcomes(records)
    assert sum(counted.values()) == len(records)
    assert latency(records).num_requests == counted["ok"]
    parts = split_by(records, lambda each: each.path)
    assert sum(len(part) for part in parts.values()) <= len(records)
    rows = model_rows(records, trace)
    assert sum(row.num_requests for row in rows) == len(records)
    assert sum(row.num_ok for row in rows) == counted["ok"]
    assert sum(row.num_tokens for row in rows) == latency(records).num_tokens


@given(some_records(), st.floats(0.001, 50))
def test_a_stricter_slo_never_has_more_goodput(
    made: tuple[list[Line], list[Record]], limit: float
) -> None:
    _, records = made
    strict = goodput(records, Slo(ttft_s=limit, tpot_s=limit, e2e_s=limit))
    loose = goodput(records, Slo(ttft_s=2 * limit, tpot_s=2 * limit, e2e_s=2 * limit))
    none = goodput(records, Slo(ttft_s=None, tpot_s=None))
    assert strict.num_good <= loose.num_good <= none.num_good == outcomes(records)["ok"]
    assert 0 <= strict.share <= 1


@given(some_records())
def test_a_run_ends_no_sooner_than_any_of_its_replies(
    made: tuple[list[Line], list[Record]],
) -> None:
    _, records = made
    end = elapsed_s(records)
    assert all(each.ended_s <= end for each in records)


@given(some_records())
def test_fairness_is_between_one_nth_and_one(made: tuple[list[Line], list[Record]]) -> None:
    trace, records = made
    rows = model_rows(records, trace)
    found = fairness(rows).jain
    assert found is None or 1 / len(rows) - 1e-9 <= found <= 1 + 1e-9


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(some_records())
def test_any_run_has_a_report_that_survives_its_file_and_has_a_page(
    made: tuple[list[Line], list[Record]],
) -> None:
    trace, records = made
    report = run_report(records, trace)
    again = msgspec.json.decode(msgspec.json.encode(report), type=RunReport)
    assert again.outcomes == report.outcomes
    assert "<figure" in render(again)
    if not checks(records, trace).void:
        assert regressions(report, again, 0.0) == []


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_quantiles_are_in_order_and_within_the_values(values: list[float]) -> None:
    found = quantiles(values)
    assert found.p50 is not None
    assert found.p90 is not None
    assert found.p99 is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    drawn = cdf(values)
    assert drawn == sorted(drawn)
    assert (drawn[0], drawn[-1]) == (min(values), max(values))
    worst = worst_decile(values)
    assert worst is not None
    assert worst >= quantiles(values).p50 - 1e-9  # type: ignore[operator]


STEPS = st.lists(st.floats(0.001, 0.1), min_size=3, max_size=3).map(
    lambda steps: dict(zip((1, 8, 32), sorted(steps), strict=True))
)


@given(STEPS, STEPS, st.sampled_from([1, 8, 32]), st.floats(0, 0.9))
def test_any_break_even_is_where_the_gain_stays_above_zero(
    adapter: dict[int, float], merged: dict[int, float], batch: int, memory: float
) -> None:
    gain = gains(adapter, merged, batch, memory)
    assert len(gain) == 101
    assert all(value > -1 for value in gain)
    at = break_even(gain)
    if at is None:
        assert gain[-1] <= LEAST_GAIN
    else:
        first = round(at * 100)
        assert all(value > LEAST_GAIN for value in gain[first:])
        assert first == 0 or gain[first - 1] <= LEAST_GAIN
    assert curve(adapter, merged, batch, memory).break_even == at


@given(STEPS, STEPS, st.floats(0, 0.4), st.floats(0.01, 0.4))
def test_more_memory_for_merged_weights_never_gains_more_at_one_set_of_weights(
    adapter: dict[int, float], merged: dict[int, float], memory: float, more: float
) -> None:
    """At share 1 only the fit counts, as long as tokens per second rise with the batch."""
    rising = all(b / merged[b] <= c / merged[c] for b, c in ((1, 8), (8, 32)))
    if rising:
        less = gains(adapter, merged, 32, memory)[-1]
        assert gains(adapter, merged, 32, memory + more)[-1] <= less + 1e-9


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=5)),
       st.lists(st.integers(1, 30)), st.booleans())  # fmt: skip
def test_any_text_is_read_whole_however_it_is_cut(
    pieces: list[str], sizes: list[int], is_chat: bool
) -> None:
    data = b"".join(event(chunk(piece, is_chat=is_chat)) for piece in pieces)
    data += event(chunk("", is_chat=is_chat, finish_reason="stop")) + b"data: [DONE]\n\n"
    reply = Reply(keep_text=True)
    reply.begin(200, {})
    now = 0.0
    for size in sizes:
        reply.feed(data[:size], now)
        data, now = data[size:], now + 1
    reply.feed(data, now)
    assert "".join(reply.pieces) == "".join(pieces)
    assert reply.outcome(expected_tokens=None) == ("ok", "")
    assert reply.text_times == sorted(reply.text_times)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    reply = Reply()
    reply.begin(200, {})
    reply.feed(data, 0.0)
    outcome, why = reply.outcome(expected_tokens=1)
    assert outcome in ("ok", "cut", "wrong")
    assert (why == "") is (outcome == "ok")


@given(st.integers(100, 599), st.binary(max_size=300))
def test_any_status_but_200_is_rejected_or_failed(status: int, data: bytes) -> None:
    reply = Reply()
    reply.begin(status, {})
    reply.feed(data, 0.0)
    outcome, why = reply.outcome(expected_tokens=None)
    if status != 200:
        assert outcome == ("rejected" if status in (429, 503) else "failed")
        assert why


def test_a_trace_file_is_read_by_the_same_decoder(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(encode_trace([line()]))
    assert decode_trace((tmp_path / "t").read_bytes(), "t") == [line()]
