"""Replies asked again alone: the same, parted, or another's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.recheck import Recheck, common_length, compare, pick, recheck
from loadtest.target import Target
from tests.loadtest.making import line, lines, record
from tests.loadtest.stub import Behaviour, Stub


def test_one_percent_is_picked_and_at_least_one() -> None:
    assert len(pick(1000, 0.01, 0)) == 10
    assert len(pick(20, 0.01, 0)) == 1
    assert pick(20, 0.0, 0) == set()
    assert pick(5, 1.0, 0) == {0, 1, 2, 3, 4}
    assert pick(1000, 0.01, 0) == pick(1000, 0.01, 0) != pick(1000, 0.01, 1)


@pytest.mark.parametrize(
    ("loaded", "alone", "field", "outcome"),
    [
        ("Paris is", "Paris is", "num_same", "ok"),
        ("Paris is", "Paris or", "num_parted", "ok"),
        ("Paris", "Ahoy", "num_foreign", "wrong"),
    ],
)
def test_a_pair_is_the_same_parted_or_foreign(
    loaded: str, alone: str, field: str, outcome: str
) -> None:
    found, under_load = Recheck(), record(text=loaded)
    compare(found, under_load, record(text=alone))
    assert found.num_asked == getattr(found, field) == 1
    assert under_load.outcome == outcome
    counts = (found.num_same, found.num_parted, found.num_foreign, found.num_unanswered)
    assert sum(counts) == 1


def test_a_parted_text_says_how_much_is_the_same() -> None:
    found = Recheck()
    compare(found, record(text="abcdefgh"), record(text="abxy"))
    assert found.common_share == [0.25]


def test_a_reply_that_failed_on_either_side_is_not_compared() -> None:
    found = Recheck()
    compare(found, record(outcome="cut", text="a"), record(text="b"))
    compare(found, record(text="a"), record(outcome="rejected", text=None))
    assert (found.num_asked, found.num_unanswered) == (2, 2)


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_the_common_length_is_that_of_the_common_start(a: str, b: str) -> None:
    common = common_length(a, b)
    assert a[:common] == b[:common]
    assert a[common : common + 1] != b[common : common + 1] or len(a) == len(b) == common


async def test_picked_lines_are_asked_alone_and_greedily(stub: Stub) -> None:
    trace = [line(0.0, "a", seed=1), line(5.0, "b", seed=2), line(9.0, "c", seed=3)]
    records = [record(index, text="word word word ") for index in range(3)]
    steps: list[int] = []
    target = Target(url=stub.url, temperature=0.8)
    found = await recheck(target, trace, records, {0, 2}, on_one=lambda: steps.append(1))
    assert (found.num_asked, found.num_same, len(steps)) == (2, 2, 2)
    assert [body["model"] for body in stub.seen] == ["a", "c"]
    assert {body["temperature"] for body in stub.seen} == {0.0}
    assert stub.most_at_once == 1


async def test_a_server_that_mixes_answers_up_under_load_is_caught(stub: Stub) -> None:
    stub.default = Behaviour(word="mine")
    records = [record(index, text="yours yours ") for index in range(4)]
    found = await recheck(Target(url=stub.url), lines(4), records, {1})
    assert found.num_foreign == 1
    assert [each.outcome for each in records] == ["ok", "wrong", "ok", "ok"]
