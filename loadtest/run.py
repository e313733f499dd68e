"""One run: replay a trace, check the replies, and put the figures together."""

import asyncio
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loadtest import figures
from loadtest.environment import Environment, fingerprint, load_now
from loadtest.fleet import Fleet, OnRecords
from loadtest.identity import IdentityCheck, server_facts
from loadtest.recheck import Recheck, pick, recheck
from loadtest.record import Record
from loadtest.report import Points, RunReport, TraceFacts
from loadtest.stats import cdf
from loadtest.target import Target
from loadtest.trace import Line, duration_s, is_closed_loop, models_of, trace_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run a trace and what to hold the replies to."""

    slo: figures.Slo = field(default_factory=figures.Slo)
    check_share: float = 0.01  # of replies, asked again alone
    num_workers: int = 0  # 0: as many as the trace wants
    seed: int = 0  # of which replies are asked again

    def __post_init__(self) -> None:
        if not 0 <= self.check_share <= 1:
            raise ValueError(f"check_share is {self.check_share}; it must be in 0..1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be 0 or more")


class Watcher(Protocol):
    """Who watches a run; see progress.py."""

    def stage(self, title: str, total: int) -> None:
        """Something of `total` steps begins."""
        ...

    def records(self, records: Sequence[Record]) -> None:
        """Requests that are over: a step each."""
        ...

    def step(self) -> None:
        """One step of another kind."""
        ...


class Unwatched:
    """Nobody watches."""

    def stage(self, title: str, total: int) -> None:
        pass

    def records(self, records: Sequence[Record]) -> None:
        pass

    def step(self) -> None:
        pass


async def run(
    target: Target, lines: Sequence[Line], options: RunOptions, watcher: Watcher
) -> RunReport:
    """Replay a trace against a server and report.

    Cancelled while it replays, it reports the requests that are over; nothing is asked again.
    """
    load_before = load_now()
    picked = pick(len(lines), options.check_share, options.seed)
    identity = IdentityCheck.of(target, models_of(lines))
    records: list[Record] = []
    async with Fleet(options.num_workers) as fleet:
        num_workers = fleet.workers_for(lines)
        try:
            await checked_replay(
                fleet, target, lines, identity, watcher, keep_text=picked, on_records=records.extend
            )
        except asyncio.CancelledError:
            if not records:
                raise
            picked = set()
    records.sort(key=lambda record: record.index)
    watcher.stage("Asking again, alone", len(picked))
    rechecked = await recheck(target, lines, records, picked, on_one=watcher.step)
    environment = fingerprint(
        load_before=load_before, num_workers=num_workers, server=server_facts(target)
    )
    return make_report(target, lines, records, options.slo, environment, identity, rechecked)


async def checked_replay(
    fleet: Fleet,
    target: Target,
    lines: Sequence[Line],
    identity: IdentityCheck,
    watcher: Watcher,
    *,
    keep_text: set[int] | None = None,
    on_records: OnRecords = lambda records: None,
    title: str = "Replaying",
) -> list[Record]:
    """Replay a trace and hold every reply to its adapter's digest."""

    def take(records: list[Record]) -> None:
        for record in records:
            identity.check(record, target.model_of(lines[record.index]))
        on_records(records)
        watcher.records(records)

    watcher.stage(title, len(lines))
    return await fleet.send(target, lines, keep_text=keep_text, on_records=take)


def make_report(
    target: Target,
    lines: Sequence[Line],
    records: Sequence[Record],
    slo: figures.Slo,
    environment: Environment,
    identity: IdentityCheck,
    rechecked: Recheck,
) -> RunReport:
    """Work out every figure of a run."""
    rows = figures.model_rows(records, lines)
    parts = {
        "path": figures.split_by(records, lambda record: record.path),
        "tier": figures.split_by(records, lambda record: record.tier),
    }
    return RunReport(
        made_at=now(),
        trace=trace_facts(lines),
        target=target.described(),
        environment=environment,
        checks=figures.checks(records, lines),
        elapsed_s=figures.elapsed_s(records),
        outcomes=figures.outcomes(records),
        reasons=figures.reasons(records),
        total=figures.latency(records),
        by_path={name: figures.latency(part) for name, part in parts["path"].items()},
        by_tier={name: figures.latency(part) for name, part in parts["tier"].items()},
        models=rows,
        fairness=figures.fairness(rows),
        goodput=figures.goodput(records, slo),
        identity=identity.counts,
        recheck=rechecked,
        itl_cdf_s=cdf([gap for record in records if record.is_ok for gap in record.gaps_s]),
        points=_points(records, lines),
    )


def trace_facts(lines: Sequence[Line]) -> TraceFacts:
    """What a report says of its trace."""
    return TraceFacts(
        sha256=trace_digest(lines),
        num_lines=len(lines),
        duration_s=duration_s(lines),
        loop="closed" if is_closed_loop(lines) else "open",
        num_models=len(models_of(lines)),
        num_tenants=len({line.tenant for line in lines}),
        num_prompt_tokens=sum(line.prompt_tokens for line in lines),
        num_output_tokens=sum(line.output_tokens for line in lines),
    )


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _points(records: Sequence[Record], lines: Sequence[Line]) -> Points:
    return Points(
        intended_s=[record.intended_s for record in records],
        late_s=[record.late_s for record in records],
        over_s=[record.over_s for record in records],
        ttft_s=[record.ttft_s for record in records],
        e2e_s=[record.e2e_s for record in records],
        tpot_s=[record.tpot_s for record in records],
        outcome=[record.outcome for record in records],
        model=[lines[record.index].model for record in records],
        path=[record.path for record in records],
        tier=[record.tier for record in records],
    )
