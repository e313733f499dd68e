"""A paired comparison against a stub whose two sides differ by a known time."""

from typing import Any

import pytest

from loadtest.compare import (
    CompareOptions,
    _block,
    _comparison,
    _curves,
    _Measured,
    _void,
    compare,
)
from loadtest.record import Record
from loadtest.report import CompareReport
from loadtest.run import Unwatched
from loadtest.target import Target
from tests.loadtest.making import record
from tests.loadtest.stub import Behaviour, Stub

NAMES = ("adapter", "merged")
OPTIONS = CompareOptions(
    batches=(1, 2), num_blocks=2, requests_per_user=1, output_tokens=3, num_workers=1
)


async def compared(
    stub: Stub, a: dict[str, Any], b: dict[str, Any], options: CompareOptions = OPTIONS
) -> CompareReport:
    targets = (
        Target(url=stub.url, model="slow", **a),
        Target(url=stub.url, model="fast", **b),
    )
    return await compare(NAMES, targets, ("x",), options, Unwatched())


async def test_a_known_difference_is_found_with_its_sign_at_every_batch(stub: Stub) -> None:
    stub.models = {
        "slow": Behaviour(ttft_s=0.15, gap_s=0.1, path="adapter"),
        "fast": Behaviour(path="merged"),
    }
    report = await compared(stub, {}, {})
    assert [batch.batch for batch in report.batches] == [1, 2]
    for batch in report.batches:
        found = {each.figure: each for each in batch.differences}
        for figure in ("ttft p50", "tpot mean", "e2e p50"):
            assert found[figure].difference.value < 0
            assert len(found[figure].blocks) == 2
        assert batch.a.outcomes["ok"] == 2 * batch.batch
        assert batch.a.step_s.value > 0.05
    assert [curve.batch for curve in report.curves] == [1, 2]
    assert report.curves[0].gain[-1] > 0


async def test_both_sides_replay_the_same_requests_in_turns(stub: Stub) -> None:
    await compared(stub, {}, {})
    models = [body["model"] for body in stub.seen]
    # Warming up and 2 blocks: A's and B's in turn, one request at batch 1 and two at batch 2.
    assert models == ["slow", "fast"] * 3 + ["slow", "slow", "fast", "fast"] * 3
    for model in ("slow", "fast"):
        prompts = [sorted(b["prompt"] for b in stub.seen if b["model"] == model)]
        assert prompts == [sorted(b["prompt"] for b in stub.seen if b["model"] == "slow")]
    seeds = [body["seed"] for body in stub.seen if body["model"] == "slow"]
    assert len(set(seeds)) == len(seeds)  # no block repeats another's


async def test_a_side_that_is_answered_by_another_path_voids_the_comparison(stub: Stub) -> None:
    with pytest.raises(
        ValueError, match=r"merged: 2 of 2 replies not ok .*path adapter, not merged"
    ):
        await compared(stub, {}, {"expect_path": "merged"})


async def test_one_refused_reply_voids_but_the_figures_stay(stub: Stub) -> None:
    stub.models = {"fast": Behaviour(status=503, refuse_every=8)}
    report = await compared(stub, {}, {})
    assert report.is_void
    assert any("merged: 1 of" in why for why in report.void)
    assert len(report.batches) == 2


async def test_headers_tell_the_sides_apart(stub: Stub) -> None:
    await compared(stub, {"headers": {"x-serving-path": "adapter"}}, {})
    asked = {headers.get("x-serving-path") for headers in stub.headers}
    assert asked == {"adapter", None}


def measured(a: dict[str, Any], b: dict[str, Any]) -> _Measured:
    return _Measured(a=[[record(**a)]], b=[[record(**b)]])


def test_unlike_prefix_cache_hits_void_a_comparison() -> None:
    assert _void(NAMES, measured({}, {})) == []
    assert _void(NAMES, measured({"num_cached_tokens": 2}, {"num_cached_tokens": 2})) == []
    (why,) = _void(NAMES, measured({}, {"num_cached_tokens": 2}))
    assert "0% of adapter's prompt tokens and 50% of merged's" in why


def test_late_sending_voids_a_comparison() -> None:
    (why,) = _void(NAMES, measured({}, {"late_s": 0.006}))
    assert "merged: p99 of send lateness is 6.0 ms" in why


def test_a_request_counts_only_if_both_sides_answered_it() -> None:
    found = _Measured(
        a=[[record(0, ttft_s=0.1), record(1, ttft_s=0.2)]],
        b=[[record(0, ttft_s=0.3), record(1, outcome="cut")]],
    )
    assert found.values(lambda each: each.ttft_s) == ([[0.1]], [[0.3]])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batches": ()}, "batches is"),
        ({"batches": (0,)}, "batches is"),
        ({"batches": (8, 1)}, "the smallest first"),
        ({"batches": (1, 1)}, "said once"),
        ({"num_blocks": 1}, "blocks is 1"),
        ({"output_tokens": 1}, "output_tokens is 1"),
        ({"memory_share": 1.0}, "memory_share is 1.0"),
    ],
)
def test_options_that_will_not_do_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CompareOptions(**options)


# The figures, from blocks that are known


def blocks(*values: list[float], start: int = 0) -> list[list[Record]]:
    """Blocks of replies whose time per token is as given: two tokens, the first after 0.1 s."""
    return [
        [
            record(start + index, ttft_s=0.1, e2e_s=0.1 + value, num_tokens=2, intended_s=0.0)
            for index, value in enumerate(block)
        ]
        for block in values
    ]


def test_a_batch_is_summed_up_side_by_side() -> None:
    found = _Measured(a=blocks([0.02, 0.04], [0.03, 0.05]), b=blocks([0.01, 0.02], [0.01, 0.02]))
    batch = _comparison(8, found)
    assert (batch.batch, batch.num_blocks) == (8, 2)
    assert batch.a.step_s.value == pytest.approx(0.035)
    assert batch.b.step_s.value == pytest.approx(0.015)
    assert batch.a.step_s.low <= 0.035 <= batch.a.step_s.high
    by_name = {each.figure: each for each in batch.differences}
    assert by_name["tpot mean"].difference.value == pytest.approx(-0.02)
    assert by_name["tpot mean"].blocks == pytest.approx([-0.015, -0.025])
    assert by_name["ttft p50"].difference.value == 0
    assert by_name["e2e p50"].a == pytest.approx(0.135)


def test_the_speedup_is_of_the_means_and_its_interval_of_pairs_of_blocks() -> None:
    found = _Measured(a=blocks([0.02, 0.04], [0.04, 0.08]), b=blocks([0.01, 0.02], [0.02, 0.04]))
    speedup = _comparison(8, found).speedup
    assert [speedup.value, speedup.low, speedup.high] == pytest.approx([2.0, 2.0, 2.0])
    at_once = _Measured(a=blocks([0.02], [0.04]), b=blocks([0.0], [0.0]))
    assert _comparison(1, at_once).speedup.value > 1e6


def test_tokens_per_second_are_over_the_time_of_each_block() -> None:
    found = _Measured(a=blocks([0.1, 0.3], [0.1, 0.2]), b=blocks([0.1, 0.1], [0.1, 0.1]))
    batch = _comparison(2, found)
    assert batch.a.tokens_per_s == pytest.approx(8 / (0.4 + 0.3))
    assert batch.b.tokens_per_s == pytest.approx(8 / 0.4)


def test_a_curve_rests_on_the_means_of_both_sides() -> None:
    found = {
        1: _Measured(a=blocks([0.02], [0.02]), b=blocks([0.01], [0.01])),
        8: _Measured(a=blocks([0.04], [0.04]), b=blocks([0.02], [0.02])),
    }
    one, eight = _curves(found, 0.0)
    assert (one.batch, eight.batch) == (1, 8)
    assert [one.gain[-1], eight.gain[-1]] == pytest.approx([1.0, 1.0])
    assert [eight.low[-1], eight.high[-1]] == pytest.approx([1.0, 1.0])  # no scatter, no band


def test_both_sides_of_a_draw_are_the_same_pairs_of_blocks() -> None:
    """Blocks that are slow on both sides alike leave the ratio, and the curve's end, sharp."""
    moods = [0.01, 0.02, 0.05, 0.09]
    found = {
        1: _Measured(
            a=blocks(*([2 * mood] for mood in moods)), b=blocks(*([mood] for mood in moods))
        )
    }
    (curve,) = _curves(found, 0.0)
    assert [curve.low[-1], curve.high[-1]] == pytest.approx([1.0, 1.0])


def test_each_block_has_its_own_requests_and_each_batch_too() -> None:
    options = CompareOptions(batches=(1, 8), requests_per_user=2)
    first, second = (_block(("m",), 8, options, number) for number in (1, 2))
    assert len(first) == len(second) == 16
    assert {one.user for one in first} == set(range(8))
    assert not {one.seed for one in first} & {one.seed for one in second}
    assert _block(("m",), 8, options, 1) == first
    assert {one.seed for one in _block(("m",), 1, options, 1)}.isdisjoint(one.seed for one in first)


def test_every_reason_that_voids_a_side_names_it() -> None:
    late = record(late_s=1.0)
    bad = record(outcome="cut", reason="timeout")
    void = _void(NAMES, _Measured(a=[[late]], b=[[bad]]))
    assert any(why.startswith("adapter: p99 of send lateness") for why in void)
    assert "merged: 1 of 1 replies not ok (cut timeout)" in void


def test_blocks_of_which_nothing_is_left_are_left_out() -> None:
    lost = [[record(0, outcome="cut")]]
    found = _Measured(a=blocks([0.1]) + lost, b=blocks([0.2]) + lost)
    a, b = found.values(lambda each: each.tpot_s)
    assert (len(a), len(b)) == (1, 1)
    assert [a[0][0], b[0][0]] == pytest.approx([0.1, 0.2])
