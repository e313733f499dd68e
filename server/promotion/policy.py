"""Who is promoted and who is demoted: one decision at a time, from figures alone."""

from collections.abc import Sequence
from dataclasses import dataclass

KEEP_SHARE = 0.5  # of min_tokens: a promoted revision that has fewer is demoted
OVERTAKE = 1.5  # a newcomer needs this many times the tokens of the one it replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLimits:
    """What an operator chose."""

    min_tokens: float  # recent ones, before a revision is promoted
    max_sets: int  # promoted revisions at a time
    cool_down_s: float  # after anything was done about a revision, before the next thing is


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One published revision, as the policy sees it."""

    digest: str
    recent_tokens: float
    saved_s: float  # GPU-seconds that its merge saves for each of its tokens; below 0 it loses
    is_promoted: bool
    changed: float | None = None  # when it was last promoted, demoted, or failed; unix seconds
    can_promote: bool = True  # there are rows to calibrate on


@dataclass(frozen=True, slots=True)
class Promote:
    digest: str


@dataclass(frozen=True, slots=True)
class Demote:
    digest: str


def decide(
    standings: Sequence[Standing], limits: PolicyLimits, now: float, *, is_busy: bool
) -> Promote | Demote | None:
    """The next thing to do, None while a promotion runs or nothing is worth it.

    Demotes before it promotes, so that there is never more than `max_sets`. Equal popularity is
    settled by the digest, so equal figures give equal decisions.
    """
    if is_busy:
        return None
    rested = [each for each in standings if _has_rested(each, limits, now)]
    promoted = [each for each in standings if each.is_promoted]
    movable = sorted((each for each in rested if each.is_promoted), key=_popularity)
    wanted = [each for each in rested if _is_worth_it(each, limits)]
    best = max(wanted, key=_popularity, default=None)
    faded = [each for each in movable if _has_faded(each, limits)]
    if faded:
        return Demote(faded[0].digest)
    if len(promoted) > limits.max_sets:
        return Demote(movable[0].digest) if movable else None
    if best is None:
        return None
    if len(promoted) < limits.max_sets:
        return Promote(best.digest)
    if movable and best.recent_tokens > OVERTAKE * movable[0].recent_tokens:
        return Demote(movable[0].digest)
    return None


def _popularity(each: Standing) -> tuple[float, str]:
    return each.recent_tokens, each.digest


def _has_rested(each: Standing, limits: PolicyLimits, now: float) -> bool:
    return each.changed is None or now - each.changed >= limits.cool_down_s


def _has_faded(each: Standing, limits: PolicyLimits) -> bool:
    return each.recent_tokens < KEEP_SHARE * limits.min_tokens or each.saved_s < 0


def _is_worth_it(each: Standing, limits: PolicyLimits) -> bool:
    is_popular = each.recent_tokens >= limits.min_tokens
    return is_popular and each.saved_s > 0 and each.can_promote and not each.is_promoted
