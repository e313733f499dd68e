"""From records to the figures of a report."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from loadtest.record import OUTCOMES, Record
from loadtest.stats import Quantiles, jain, quantiles, rate_misses, worst_decile
from loadtest.trace import Line, duration_s, is_closed_loop

MAX_LATE_S = 0.005  # p99 of send lateness past which a run says nothing about the server
MAX_SIGMAS = 2.0  # that the offered rate may be off


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a reply must keep to count as good. None is no limit."""

    ttft_s: float | None = 1.0
    tpot_s: float | None = 0.2  # the mean time per token after the first
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"the SLO's {name} is {limit}; it must be over 0")

    def holds(self, record: Record) -> bool:
        """Whether a reply is right, whole and within every limit."""
        if not record.is_ok or record.ttft_s is None:
            return False
        measured = (record.ttft_s, record.tpot_s, record.e2e_s)
        limits = (self.ttft_s, self.tpot_s, self.e2e_s)
        return all(
            limit is None or value is None or value <= limit
            for value, limit in zip(measured, limits, strict=True)
        )


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Over the replies that are ok."""

    num_requests: int
    num_tokens: int
    ttft: Quantiles
    itl: Quantiles  # gaps between pieces of text, as a reader sees them
    tpot: Quantiles
    e2e: Quantiles


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter's share of a run."""

    model: str
    num_requests: int
    num_ok: int
    num_tokens: int
    ttft: Quantiles
    tokens_per_s: float | None  # generated, over the time that its requests took


class Fairness(msgspec.Struct, frozen=True):
    """Between adapters; None where too few were answered."""

    jain: float | None  # of tokens_per_s
    worst_decile_ttft_s: float | None  # mean, over the worst tenth of adapters, of their median
    median_ttft_s: float | None  # of the adapters' medians


class Goodput(msgspec.Struct, frozen=True):
    """Replies that kept the SLO."""

    slo: Slo
    num_good: int
    share: float  # of all requests, those refused included
    per_s: float


class Checks(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the load was the one that was meant."""

    late_p99_s: float
    planned_per_s: float | None  # None in a closed loop, which plans no rate
    offered_per_s: float | None
    sigmas_off: float | None
    void: list[str]  # why the run says nothing about the server; empty when it does


def latency(records: Iterable[Record]) -> Latency:
    """The latencies of the replies that are ok."""
    fine = [record for record in records if record.is_ok]
    return Latency(
        num_requests=len(fine),
        num_tokens=sum(record.num_tokens for record in fine),
        ttft=quantiles([r.ttft_s for r in fine if r.ttft_s is not None]),
        itl=quantiles([gap for record in fine for gap in record.gaps_s]),
        tpot=quantiles([tpot for r in fine if (tpot := r.tpot_s) is not None]),
        e2e=quantiles([r.e2e_s for r in fine if r.e2e_s is not None]),
    )


def split_by(
    records: Iterable[Record], key: Callable[[Record], str | None]
) -> dict[str, list[Record]]:
    """Records by a key, sorted by it; those without one are left out."""
    parts: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        value = key(record)
        if value is not None:
            parts[value].append(record)
    return dict(sorted(parts.items()))


def outcomes(records: Iterable[Record]) -> dict[str, int]:
    """How many replies had each outcome, zeros included."""
    counted = Counter(record.outcome for record in records)
    return {outcome: counted[outcome] for outcome in OUTCOMES}


def reasons(records: Iterable[Record]) -> dict[str, int]:
    """Why replies were not ok, the most frequent first: "rejected tenant_overloaded"."""
    counted = Counter(f"{r.outcome} {r.reason}" for r in records if not r.is_ok)
    return dict(counted.most_common())


def model_rows(records: Sequence[Record], lines: Sequence[Line]) -> list[ModelRow]:
    """A row for each model asked for, the most popular first."""
    parts = split_by(records, lambda record: lines[record.index].model)
    rows = [_model_row(model, part) for model, part in parts.items()]
    return sorted(rows, key=lambda row: (-row.num_requests, row.model))


def _model_row(model: str, records: list[Record]) -> ModelRow:
    fine = [record for record in records if record.is_ok]
    num_tokens = sum(record.num_tokens for record in fine)
    busy_s = sum(record.e2e_s or 0.0 for record in fine)
    return ModelRow(
        model=model,
        num_requests=len(records),
        num_ok=len(fine),
        num_tokens=num_tokens,
        ttft=quantiles([r.ttft_s for r in fine if r.ttft_s is not None]),
        tokens_per_s=num_tokens / busy_s if busy_s else None,
    )


def fairness(rows: Sequence[ModelRow]) -> Fairness:
    """How evenly adapters were served; one that got no answer at all counts as served nothing."""
    medians = [row.ttft.p50 for row in rows if row.ttft.p50 is not None]
    return Fairness(
        jain([row.tokens_per_s or 0.0 for row in rows]),
        worst_decile(medians),
        quantiles(medians).p50,
    )


def goodput(records: Sequence[Record], slo: Slo) -> Goodput:
    """Replies within the SLO, over the time from the first request to the last reply."""
    num_good = sum(slo.holds(record) for record in records)
    elapsed = elapsed_s(records)
    return Goodput(
        slo,
        num_good,
        num_good / len(records) if records else 0.0,
        num_good / elapsed if elapsed else 0.0,
    )


def elapsed_s(records: Iterable[Record]) -> float:
    """From the start of the run until its last request was over, be it by our time limit."""
    return max((record.ended_s for record in records), default=0.0)


def checks(records: Sequence[Record], lines: Sequence[Line]) -> Checks:
    """Judge the load itself: void if it was sent late, or not as much as was meant."""
    late_p99_s = quantiles([record.late_s for record in records]).p99 or 0.0
    void = []
    if len(records) < len(lines):
        void.append(
            f"it was stopped: {len(records)} of {len(lines)} requests are over, and those that "
            f"took longer are missing"
        )
    if late_p99_s > MAX_LATE_S:
        void.append(
            f"p99 of send lateness is {late_p99_s * 1e3:.1f} ms; past {MAX_LATE_S * 1e3:.0f} ms "
            f"the sender was too busy"
        )
    if not any(record.is_ok for record in records):
        void.append("no reply is ok")
    span_s = duration_s(lines)
    if is_closed_loop(lines) or span_s == 0:
        return Checks(
            late_p99_s=late_p99_s,
            planned_per_s=None,
            offered_per_s=None,
            sigmas_off=None,
            void=void,
        )
    # Those sent after the last was due came too late to be part of the load that was meant.
    num_sent = sum(record.intended_s + record.late_s <= span_s + MAX_LATE_S for record in records)
    sigmas = rate_misses(len(lines), num_sent)
    if sigmas > MAX_SIGMAS:
        void.append(
            f"{num_sent} of {len(lines)} requests were sent in the trace's time; "
            f"that is {sigmas:.1f} sigma off, and {MAX_SIGMAS:.0f} are allowed"
        )
    return Checks(
        late_p99_s=late_p99_s,
        planned_per_s=len(lines) / span_s,
        offered_per_s=num_sent / span_s,
        sigmas_off=sigmas,
        void=void,
    )
