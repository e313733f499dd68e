"""What a load test must not get wrong: a server that stalls must look as bad as its clients felt.

A sender that waits for replies sends nothing during a stall, and so counts it once. These tests
hold the open loop to counting it for every request that was due.
"""

import asyncio
from typing import Any

import pytest

from loadtest.connection import clock
from loadtest.figures import Slo, checks, goodput, latency, outcomes
from loadtest.record import Record
from loadtest.replay import Share, prepare, replay
from loadtest.target import Target
from loadtest.trace import Line
from tests.loadtest.making import line, lines, record
from tests.loadtest.stub import Behaviour, Stub

STALL_S = 0.8
EVERY_S = 0.05


async def replayed(target: Target, trace: list[Line]) -> list[Record]:
    records: list[Record] = []
    share = Share(target=target, lines=dict(enumerate(trace)))
    await replay(share, prepare(share), clock(), records.append)
    return sorted(records, key=lambda each: each.index)


@pytest.fixture
def stalling(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A stub whose every reply waits until a stall that begins with the fifth request is over."""
    real = stub._stream
    over = [float("inf")]

    def stalled(behaviour: Behaviour, body: dict[str, Any], *, is_chat: bool) -> Any:
        async def stream() -> Any:
            if len(stub.seen) == 5:
                over[0] = clock() + STALL_S
            if len(stub.seen) >= 5:
                await asyncio.sleep(max(0.0, over[0] - clock()))
            async for piece in real(behaviour, body, is_chat=is_chat):
                yield piece

        return stream()

    monkeypatch.setattr(stub, "_stream", stalled)
    return stub


async def test_every_request_that_was_due_in_a_stall_is_counted_as_slow(stalling: Stub) -> None:
    records = await replayed(Target(url=stalling.url), lines(24, every_s=EVERY_S))
    slow = [each for each in records if each.ttft_s is not None and each.ttft_s > 0.3]
    # 0.8 s of stall at 20 a second: 16 were due, and those of its first 0.5 s waited over 0.3 s.
    assert len(slow) >= 8
    assert [each.index for each in slow] == list(range(4, 4 + len(slow)))


async def test_a_closed_loop_of_one_user_meets_the_same_stall_once(stalling: Stub) -> None:
    """Which is why its latencies are not those of traffic; comparisons use it for step times."""
    trace = [line(seed=index, user=0) for index in range(10)]
    records = await replayed(Target(url=stalling.url), trace)
    slow = [each for each in records if each.ttft_s is not None and each.ttft_s > 0.5]
    assert len(slow) <= 1


def test_a_request_sent_late_is_slow_by_its_lateness_though_the_server_was_quick() -> None:
    """The record has no other TTFT than the one from the intended time."""
    late = record(late_s=2.0, ttft_s=2.1, e2e_s=2.2)
    assert latency([late]).ttft.p50 == 2.1
    assert late.ended_s == 2.2


def test_refused_requests_make_a_run_no_faster() -> None:
    fine = [record(index, ttft_s=0.1 * (1 + index)) for index in range(10)]
    refused = [
        record(index, ttft_s=None, e2e_s=None, outcome="rejected") for index in range(10, 20)
    ]
    assert latency([*fine, *refused]).ttft == latency(fine).ttft
    assert goodput([*fine, *refused], Slo()).share == goodput(fine, Slo()).share / 2
    assert outcomes([*fine, *refused])["rejected"] == 10


def test_a_reply_that_broke_off_after_a_quick_start_counts_nowhere_as_quick() -> None:
    cut = record(0, ttft_s=0.001, outcome="cut")
    assert latency([cut]).ttft.count == 0
    assert goodput([cut], Slo()).num_good == 0


def test_void_reasons_are_all_said_not_only_the_first() -> None:
    trace = lines(100)
    records = [
        record(index, intended_s=one.time_s, late_s=60.0, outcome="cut")
        for index, one in enumerate(trace)
    ]
    void = checks(records, trace).void
    assert len(void) == 3
    assert any("lateness" in why for why in void)
    assert any("sigma" in why for why in void)
    assert any("no reply is ok" in why for why in void)
