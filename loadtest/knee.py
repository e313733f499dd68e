"""Finds the knee: the highest rate at which enough replies still keep the SLO."""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from loadtest.environment import fingerprint, load_now
from loadtest.figures import Slo, checks, goodput, latency
from loadtest.fleet import Fleet
from loadtest.identity import IdentityCheck, server_facts
from loadtest.record import Record
from loadtest.report import KneeReport, Probe
from loadtest.run import Watcher, checked_replay, now
from loadtest.target import Target
from loadtest.trace import Line
from loadtest.workload import Workload, make_trace

_WARM_USERS = 4  # who share the models between them

Verdict = bool | None  # holds, misses, or None: the sender could not offer that rate


@dataclass(frozen=True, slots=True, kw_only=True)
class KneeOptions:
    """What to look for, and where."""

    slo: Slo = field(default_factory=Slo)
    goal: float = 0.95  # of all requests, within the SLO
    low: float = 0.5  # requests per second
    high: float = 64.0
    tolerance: float = 0.1  # stop when the two sides are this close, relatively
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"low and high are {self.low} and {self.high}; 0 < low < high")
        if not 0 < self.goal <= 1:
            raise ValueError(f"goal is {self.goal}, not in (0, 1]")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be over 0")


async def bisect(
    holds: Callable[[float], Awaitable[Verdict]], low: float, high: float, tolerance: float
) -> tuple[float | None, bool]:
    """The highest rate that holds, and whether one above it was seen to miss.

    Doubles from `low` until a rate misses, then halves the interval in log scale until its ends
    are within `tolerance`. None if even `low` misses. Where the sender gives out before the server,
    the rate found is a lower bound.
    """
    if not await holds(low):
        return None, False
    while True:
        tried = min(2 * low, high)
        verdict = await holds(tried)
        if verdict is None:
            return low, False
        if not verdict:
            break
        low = tried
        if low >= high:
            return low, False
    miss = tried
    while miss / low > 1 + tolerance:
        middle = math.sqrt(low * miss)
        if not low < middle < miss:  # no number is left between them
            break
        verdict = await holds(middle)
        if verdict is None:
            return low, False
        low, miss = (middle, miss) if verdict else (low, middle)
    return low, True


async def find_knee(
    target: Target, workload: Workload, options: KneeOptions, watcher: Watcher
) -> KneeReport:
    """Offer a workload at one rate after another. Its seed stays, so each trace is the same mix."""
    load_before = load_now()
    probes: list[Probe] = []
    identity = IdentityCheck.of(target, workload.models)
    num_workers = 1

    async def holds(rate: float) -> Verdict:
        nonlocal num_workers
        lines = make_trace(dataclasses.replace(workload, rate=rate))
        num_workers = max(num_workers, fleet.workers_for(lines))
        title = f"{rate:.2f} requests a second"
        records = await checked_replay(fleet, target, lines, identity, watcher, title=title)
        probe = probe_of(rate, records, lines, options.slo)
        probes.append(probe)
        return None if probe.void else probe.good_share >= options.goal

    async with Fleet(options.num_workers) as fleet:
        once = [_once(workload, model, number) for number, model in enumerate(workload.models)]
        await checked_replay(fleet, target, once, identity, watcher, title="Warming up")
        knee, is_bounded = await bisect(holds, options.low, options.high, options.tolerance)
    return KneeReport(
        made_at=now(),
        target=target.described(),
        environment=fingerprint(
            load_before=load_before,
            num_workers=num_workers,
            server=server_facts(target),
        ),
        slo=options.slo,
        goal=options.goal,
        knee_per_s=knee,
        is_bounded=is_bounded,
        probes=probes,
    )


def _once(workload: Workload, model: str, number: int) -> Line:
    """One request that brings a model in."""
    return Line(
        time_s=0.0,
        tenant="",
        model=model,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        user=number % _WARM_USERS,
    )


def probe_of(rate: float, records: Sequence[Record], lines: Sequence[Line], slo: Slo) -> Probe:
    """What one rate came to."""
    load = checks(records, lines)
    good, measured = goodput(records, slo), latency(records)
    return Probe(
        rate=rate,
        offered_per_s=load.offered_per_s,
        good_share=good.share,
        per_s=good.per_s,
        ttft_p50_s=measured.ttft.p50,
        ttft_p99_s=measured.ttft.p99,
        tpot_p50_s=measured.tpot.p50,
        void=load.void if measured.num_requests else [],  # with no reply ok, the server missed
    )
