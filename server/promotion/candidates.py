"""Whom to promote: tokens served, and what each merge would save and take. Figures alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from server.promotion.cost import BASE, StepTimes, seconds_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One published revision and what it has served."""

    digest: str
    revision: str  # name@number
    tokens: int  # ever
    recent_tokens: float  # the longer ago, the less they count


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One published revision and what promoting it would do."""

    served: Served
    share: float  # of the recent tokens
    is_promoted: bool
    saved_s: float  # GPU-seconds for each token of the trace, beside what is promoted already
    num_bytes: int  # of GPU memory

    @property
    def pays(self) -> bool:
        """Whether the merged path costs less GPU time than it saves."""
        return self.saved_s > 0

    def card(self, recent_total: float) -> dict[str, Any]:
        """As GET /v1/candidates shows it."""
        return {
            "id": self.served.revision,
            "digest": self.served.digest,
            "tokens": self.served.tokens,
            "recent_tokens": round(self.served.recent_tokens),
            "share": round(self.share, 4),
            "is_promoted": self.is_promoted,
            "saved_us_per_token": round(self.saved_s * 1e6, 2),
            "saved_gpu_seconds": round(self.saved_s * recent_total, 2),
            "num_bytes": self.num_bytes,
            "pays": self.pays,
        }


def candidates(
    served: Sequence[Served],
    base_tokens: float,
    promoted: Collection[str],
    batch_size: int,
    times: StepTimes,
    num_bytes: int,
) -> list[Candidate]:
    """Every revision, the one that saves most first.

    What a merge saves depends on what is promoted already: a candidate's saving is that of adding
    it, a promoted revision's is what would be lost without it.
    """
    shares: dict[str, float] = {each.digest: each.recent_tokens for each in served}
    if base_tokens > 0:
        shares[BASE] = base_tokens
    total = sum(shares.values())

    def cost_s(merged: set[str]) -> float:
        return seconds_per_token(shares, batch_size, times, merged) if total else 0.0

    now, now_s = set(promoted), cost_s(set(promoted))

    def saved_s(digest: str) -> float:
        other_s = cost_s(now ^ {digest})
        return other_s - now_s if digest in now else now_s - other_s

    found = [
        Candidate(
            served=each,
            share=shares[each.digest] / total if total else 0.0,
            is_promoted=each.digest in now,
            saved_s=saved_s(each.digest),
            num_bytes=num_bytes,
        )
        for each in served
    ]
    return sorted(found, key=lambda c: (-c.saved_s, -c.served.tokens, c.served.revision))
