"""Who is promoted: one thing at a time, never too many, and not back and forth."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.promotion.policy import (
    KEEP_SHARE,
    OVERTAKE,
    Demote,
    PolicyLimits,
    Promote,
    Standing,
    decide,
)

LIMITS = PolicyLimits(min_tokens=1000, max_sets=1, cool_down_s=60)
NOW = 1e6

STANDINGS = st.lists(
    st.builds(
        Standing,
        digest=st.sampled_from("abcdefgh"),
        recent_tokens=st.floats(0, 1e5),
        saved_s=st.floats(-1e-3, 1e-3),
        is_promoted=st.booleans(),
        changed=st.none() | st.floats(NOW - 200, NOW),
        can_promote=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.digest,
)
SOME_LIMITS = st.builds(
    PolicyLimits,
    min_tokens=st.floats(1, 1e5),
    max_sets=st.integers(0, 4),
    cool_down_s=st.floats(0, 150),
)


def standing(digest: str, recent_tokens: float, **changes: object) -> Standing:
    usual = Standing(
        digest=digest, recent_tokens=recent_tokens, saved_s=1e-4, is_promoted=False, changed=None
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def decided(*standings: Standing, limits: PolicyLimits = LIMITS, is_busy: bool = False) -> object:
    return decide(standings, limits, NOW, is_busy=is_busy)


def test_the_most_popular_that_pays_is_promoted() -> None:
    loses = standing("c", 9000, saved_s=-1e-6)
    cannot = standing("d", 8000, can_promote=False)
    assert decided(standing("a", 1500), standing("b", 2000), loses, cannot) == Promote("b")


def test_nobody_is_promoted_before_the_threshold() -> None:
    assert decided(standing("a", 999)) is None
    assert decided(standing("a", 1000)) == Promote("a")


def test_a_promoted_revision_that_faded_or_loses_is_demoted() -> None:
    assert decided(standing("a", 1000 * KEEP_SHARE, is_promoted=True)) is None
    assert decided(standing("a", 1000 * KEEP_SHARE - 1, is_promoted=True)) == Demote("a")
    assert decided(standing("a", 5000, is_promoted=True, saved_s=-1e-6)) == Demote("a")


def test_one_that_loses_is_demoted_even_where_another_has_fewer_tokens() -> None:
    loses = standing("b", 5000, is_promoted=True, saved_s=-1e-6)
    limits = replace(LIMITS, max_sets=2)
    assert decided(standing("a", 900, is_promoted=True), loses, limits=limits) == Demote("b")


def test_a_newcomer_replaces_one_that_it_clearly_overtakes() -> None:
    there = standing("a", 2000, is_promoted=True)
    assert decided(there, standing("b", 2000 * OVERTAKE)) is None
    assert decided(there, standing("b", 2000 * OVERTAKE + 1)) == Demote("a")


def test_lowering_the_limit_demotes_the_least_popular() -> None:
    limits = replace(LIMITS, max_sets=0)
    two = standing("a", 5000, is_promoted=True), standing("b", 4000, is_promoted=True)
    assert decided(*two, limits=limits) == Demote("b")


def test_nothing_is_decided_while_a_promotion_runs() -> None:
    assert decided(standing("a", 5000), is_busy=True) is None


@pytest.mark.parametrize("is_promoted", [True, False])
def test_a_revision_is_left_alone_until_it_has_cooled_down(is_promoted: bool) -> None:
    tokens = 0 if is_promoted else 5000
    fresh = standing("a", tokens, is_promoted=is_promoted, changed=NOW - 59)
    assert decided(fresh) is None
    assert decided(replace(fresh, changed=NOW - 60)) is not None


@given(STANDINGS, SOME_LIMITS)
def test_every_decision_keeps_the_rules(standings: list[Standing], limits: PolicyLimits) -> None:
    decision = decide(standings, limits, NOW, is_busy=False)
    if decision is None:
        return
    (about,) = [each for each in standings if each.digest == decision.digest]
    assert about.changed is None or NOW - about.changed >= limits.cool_down_s
    num_promoted = sum(each.is_promoted for each in standings)
    if isinstance(decision, Promote):
        assert not about.is_promoted
        assert about.can_promote
        assert about.saved_s > 0
        assert about.recent_tokens >= limits.min_tokens
        assert num_promoted < limits.max_sets
    else:
        assert about.is_promoted


@given(STANDINGS, SOME_LIMITS)
def test_a_decision_depends_on_figures_alone(
    standings: list[Standing], limits: PolicyLimits
) -> None:
    forth = decide(standings, limits, NOW, is_busy=False)
    assert decide(standings[::-1], limits, NOW, is_busy=False) == forth


@given(STANDINGS, SOME_LIMITS)
def test_with_nothing_changing_it_comes_to_rest_within_the_limit(
    standings: list[Standing], limits: PolicyLimits
) -> None:
    """No back and forth: carried out one after the other, the decisions end."""
    now = NOW + limits.cool_down_s + 1  # everybody may be moved
    for _ in range(4 * len(standings) + 4):
        decision = decide(standings, limits, now, is_busy=False)
        if decision is None:
            break
        is_promoted = isinstance(decision, Promote)
        standings = [
            replace(each, is_promoted=is_promoted, changed=now)
            if each.digest == decision.digest
            else each
            for each in standings
        ]
        now += limits.cool_down_s + 1
    assert decide(standings, limits, now, is_busy=False) is None
    assert sum(each.is_promoted for each in standings) <= limits.max_sets
