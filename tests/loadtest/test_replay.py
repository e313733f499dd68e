"""Replays against a stub: what was asked, what became of it, and when it was counted from."""

import itertools

import pytest

from loadtest.connection import clock
from loadtest.record import Record
from loadtest.replay import Share, prepare, record_of, replay
from loadtest.reply import Reply
from loadtest.target import Target
from loadtest.trace import Line
from tests.loadtest.making import line, lines
from tests.loadtest.stub import Behaviour, Stub, chunk, event


async def replayed(
    target: Target, trace: list[Line], keep_text: set[int] | None = None
) -> list[Record]:
    records: list[Record] = []
    share = Share(target=target, lines=dict(enumerate(trace)), keep_text=keep_text or set())
    await replay(share, prepare(share), clock(), records.append)
    return sorted(records, key=lambda record: record.index)


async def test_every_line_is_asked_once_as_it_stands(stub: Stub) -> None:
    trace = [line(0.0, "a", seed=1), line(0.01, "b", output_tokens=5, prompt_tokens=9)]
    records = await replayed(Target(url=stub.url), trace)
    assert [record.outcome for record in records] == ["ok", "ok"]
    assert [record.num_tokens for record in records] == [3, 5]
    assert [record.num_prompt_tokens for record in records] == [4, 9]
    asked = {body["model"]: body for body in stub.seen}
    assert asked["b"]["max_tokens"] == 5
    assert len(stub.seen) == 2


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_both_routes_are_read(stub: Stub, endpoint: str) -> None:
    target = Target(url=stub.url, endpoint=endpoint)  # type: ignore[arg-type]
    (record,) = await replayed(target, [line()], keep_text={0})
    assert (record.outcome, record.text) == ("ok", "word word word ")
    assert len(record.gaps_s) == 2


async def test_the_headers_that_say_who_answered_are_kept(stub: Stub) -> None:
    stub.default = Behaviour(digest="d", path="merged", tier="disk", cached_tokens=3)
    (record,) = await replayed(Target(url=stub.url), [line()])
    assert (record.digest, record.adapter_id) == ("d", "a@1")
    assert (record.path, record.tier, record.num_cached_tokens) == ("merged", "disk", 3)


async def test_latency_is_at_least_what_the_server_takes(stub: Stub) -> None:
    stub.default = Behaviour(ttft_s=0.1, gap_s=0.05)
    (record,) = await replayed(Target(url=stub.url), [line()])
    assert record.ttft_s is not None
    assert record.e2e_s is not None
    assert record.ttft_s >= 0.1
    assert record.e2e_s >= 0.2
    rounding = 1e-5  # each time is rounded to a microsecond
    assert 0 < sum(record.gaps_s) <= record.e2e_s - record.ttft_s + rounding


def test_latency_counts_from_when_the_request_was_meant_to_be_sent() -> None:
    """Due at 10 and sent at 12, text at 13 and 14: that took 3 and 4 s, not 1 and 2."""
    reply = Reply()
    reply.begin(200, {})
    reply.feed(event(chunk("a")), 13.0)
    reply.feed(event(chunk("b", finish_reason="length")), 14.0)
    reply.feed(b"data: [DONE]\n\n", 14.0)
    record = record_of(
        reply, index=3, intended=10.0, begin=8.0, late_s=2.0, over=14.5, expected_tokens=2
    )
    assert (record.intended_s, record.late_s, record.ended_s) == (2.0, 2.0, 6.5)
    assert (record.ttft_s, record.e2e_s, record.gaps_s) == (3.0, 4.0, [1.0])
    assert (record.outcome, record.num_tokens, record.tpot_s) == ("ok", 2, 1.0)


async def test_an_open_loop_waits_for_nobody(stub: Stub) -> None:
    stub.default = Behaviour(ttft_s=0.5)
    records = await replayed(Target(url=stub.url), lines(8, every_s=0.02))
    assert stub.most_at_once >= 4  # a stalled machine may send the last ones late
    assert [record.intended_s for record in records] == pytest.approx([i * 0.02 for i in range(8)])


async def test_what_is_overdue_is_sent_and_its_lateness_told(stub: Stub) -> None:
    records: list[Record] = []
    share = Share(target=Target(url=stub.url), lines={0: line(0.0), 1: line(0.1)})
    await replay(share, prepare(share), clock() - 1.0, records.append)
    assert min(record.late_s for record in records) >= 0.9
    assert min(record.ttft_s or 0 for record in records) >= 0.9


async def test_in_a_closed_loop_each_user_waits_for_its_own_reply(stub: Stub) -> None:
    stub.default = Behaviour(ttft_s=0.05)
    trace = [line(user=user, model=f"u{user}") for _ in range(3) for user in range(2)]
    records = await replayed(Target(url=stub.url), trace)
    assert stub.most_at_once == 2
    first = [record for record in records if record.index % 2 == 0]
    for before, after in itertools.pairwise(first):
        assert after.intended_s >= before.intended_s + (before.e2e_s or 0) - 1e-3
    assert max(record.late_s for record in records) < 5.0


async def test_refusals_cuts_and_errors_are_told_apart(stub: Stub) -> None:
    stub.models = {
        "busy": Behaviour(status=429),
        "down": Behaviour(status=503, code="server_draining"),
        "broken": Behaviour(status=500, code="internal_error"),
        "cut": Behaviour(cut_after=1),
        "error": Behaviour(error_after=2),
        "short": Behaviour(short_by=1),
    }
    trace = [line(model=model) for model in [*stub.models, "fine"]]
    records = await replayed(Target(url=stub.url), trace)
    found = {trace[r.index].model: (r.outcome, r.reason, r.status) for r in records}
    assert found == {
        "busy": ("rejected", "tenant_overloaded", 429),
        "down": ("rejected", "server_draining", 503),
        "broken": ("failed", "internal_error", 500),
        "cut": ("cut", "connection_lost", 200),
        "error": ("cut", "engine_failed", 200),
        "short": ("wrong", "token_count", 200),
        "fine": ("ok", "", 200),
    }


async def test_a_reply_that_takes_too_long_is_cut_at_the_limit(stub: Stub) -> None:
    stub.default = Behaviour(gap_s=30.0)
    (record,) = await replayed(Target(url=stub.url, timeout_s=0.3), [line()])
    assert (record.outcome, record.reason) == ("cut", "timeout")
    assert record.ttft_s is not None
    assert record.over_s >= 0.3  # under way until then, not until its last text


async def test_a_server_that_is_not_there_fails_every_request() -> None:
    records = await replayed(Target(url="http://127.0.0.1:9"), lines(2))
    assert {(record.outcome, record.reason) for record in records} == {("failed", "no_connection")}


async def test_connections_are_used_again_unless_the_server_closes_them(stub: Stub) -> None:
    target = Target(url=stub.url)
    for behaviour, expected in ((Behaviour(), 1), (Behaviour(closes=True), 3)):
        stub.default = behaviour
        stub.clear()
        records = await replayed(target, [line(user=0)] * 3)
        assert [record.outcome for record in records] == ["ok"] * 3
        assert len({headers["x-port"] for headers in stub.headers}) == expected
