"""A against B, paired: the same requests on both, in blocks that take turns.

Whatever drifts (clocks, temperature, neighbours) strikes both sides of a pair of blocks alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtest import figures
from loadtest.breakeven import LEAST_S, curve
from loadtest.environment import fingerprint, load_now
from loadtest.fleet import Fleet
from loadtest.identity import IdentityCheck, server_facts
from loadtest.record import Record
from loadtest.report import BatchComparison, CompareReport, Curve, Difference, Side
from loadtest.run import Watcher, checked_replay, now
from loadtest.stats import (
    Interval,
    Statistic,
    Values,
    cdf,
    interval_of,
    mean,
    paired_difference,
    quantile,
    quantiles,
    resampled,
)
from loadtest.target import Target
from loadtest.trace import Line
from loadtest.workload import Workload, make_trace

_CURVE_RESAMPLES = 500
_MAX_CACHED_APART = 0.01  # of prompt tokens, between the sides' prefix cache hits

Block = list[Record]
Figure = Callable[[Record], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What to compare at."""

    batches: tuple[int, ...] = (1, 8, 32)
    num_blocks: int = 10  # of each side, at each batch size
    requests_per_user: int = 2  # in each block
    prompt_tokens: int = 64
    output_tokens: int = 64
    memory_share: float = 0.0  # of the KV cache that the merged weights take
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches is {self.batches}; each must be 1 or more")
        if sorted(set(self.batches)) != list(self.batches):
            raise ValueError(f"batches is {self.batches}; each is said once, the smallest first")
        if self.num_blocks < 2:
            raise ValueError(f"blocks is {self.num_blocks}; an interval needs at least 2")
        if self.output_tokens < 2:
            raise ValueError("output_tokens is 1; a time per token needs 2")
        if not 0 <= self.memory_share < 1:
            raise ValueError(f"memory_share is {self.memory_share}; it must be 0 or more, below 1")


@dataclass(frozen=True, slots=True)
class _SideOf:
    """One side's requests: how they are put, and who must answer."""

    name: str
    target: Target
    identity: IdentityCheck


@dataclass(slots=True)
class _Measured:
    """Both sides' blocks at one batch size."""

    a: list[Block] = field(default_factory=list)
    b: list[Block] = field(default_factory=list)

    def values(self, figure: Figure) -> tuple[list[list[float]], list[list[float]]]:
        """A figure of both sides, block by block: only of requests that were ok on both."""
        a_blocks, b_blocks = [], []
        for a_block, b_block in zip(self.a, self.b, strict=True):
            pairs = [
                (figure(a), figure(b))
                for a, b in zip(a_block, b_block, strict=True)
                if a.is_ok and b.is_ok
            ]
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            if both:
                a_blocks.append([a for a, _ in both])
                b_blocks.append([b for _, b in both])
        return a_blocks, b_blocks


_FIGURES: tuple[tuple[str, Figure, Statistic], ...] = (
    ("ttft p50", lambda record: record.ttft_s, quantile(0.5)),
    ("ttft p99", lambda record: record.ttft_s, quantile(0.99)),
    ("tpot mean", lambda record: record.tpot_s, mean),
    ("e2e p50", lambda record: record.e2e_s, quantile(0.5)),
)


async def compare(
    names: tuple[str, str],
    targets: tuple[Target, Target],
    models: tuple[str, ...],
    options: CompareOptions,
    watcher: Watcher,
) -> CompareReport:
    """Measure both targets at every batch size. `models` are asked for where a target names none.

    Raises ValueError where a side gave no pair of blocks to compare.
    """
    load_before = load_now()
    sides = [
        _SideOf(name, target, IdentityCheck.of(target, models))
        for name, target in zip(names, targets, strict=True)
    ]
    async with Fleet(options.num_workers) as fleet:
        measured = {
            batch: await _measure(fleet, sides, models, batch, options, watcher)
            for batch in options.batches
        }
        num_workers = fleet.workers_for(_block(models, max(options.batches), options, 0))
    void = [
        f"batch {batch}, {why}" for batch, found in measured.items() for why in _void(names, found)
    ]
    for batch, found in measured.items():
        if len(found.values(lambda record: record.tpot_s)[0]) < 2:
            raise ValueError("; ".join(void) or f"batch {batch}: no two blocks to compare")
    return CompareReport(
        made_at=now(),
        names=names,
        targets=(targets[0].described(), targets[1].described()),
        environment=fingerprint(
            load_before=load_before,
            num_workers=num_workers,
            server=server_facts(targets[0]),
        ),
        memory_share=options.memory_share,
        void=void,
        batches=[_comparison(batch, found) for batch, found in measured.items()],
        curves=_curves(measured, options.memory_share),
    )


async def _measure(
    fleet: Fleet,
    sides: Sequence[_SideOf],
    models: tuple[str, ...],
    batch: int,
    options: CompareOptions,
    watcher: Watcher,
) -> _Measured:
    """A, B, A, B, …; the first pair warms up and is not counted."""
    found = _Measured()
    for number in range(options.num_blocks + 1):
        lines = _block(models, batch, options, number)
        for side, blocks in zip(sides, (found.a, found.b), strict=True):
            what = f"block {number} of {options.num_blocks}" if number else "warming up"
            title = f"{side.name}, batch {batch}, {what}"
            records = await checked_replay(
                fleet, side.target, lines, side.identity, watcher, title=title
            )
            if number:
                blocks.append(records)
    return found


def _block(models: tuple[str, ...], batch: int, options: CompareOptions, number: int) -> list[Line]:
    """The requests of one block: a closed loop of `batch` users, its own seed."""
    workload = Workload(
        models=models,
        arrivals="closed",
        users=batch,
        requests_per_user=options.requests_per_user,
        alpha=0.0,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        seed=options.seed * 1_000_003 + batch * 1009 + number,
    )
    return make_trace(workload)


def _void(names: tuple[str, str], found: _Measured) -> list[str]:
    """Why a batch size says nothing."""
    void = []
    cached = []
    for name, blocks in zip(names, (found.a, found.b), strict=True):
        records = [record for block in blocks for record in block]
        bad = {outcome: n for outcome, n in figures.outcomes(records).items() if n}
        bad.pop("ok", None)
        if bad:
            worst = next(iter(figures.reasons(records)))
            void.append(f"{name}: {sum(bad.values())} of {len(records)} replies not ok ({worst})")
        late = quantiles([record.late_s for record in records]).p99 or 0.0
        if late > figures.MAX_LATE_S:
            void.append(f"{name}: p99 of send lateness is {late * 1e3:.1f} ms")
        num_prompt = sum(record.num_prompt_tokens for record in records)
        cached.append(sum(r.num_cached_tokens for r in records) / num_prompt if num_prompt else 0)
    if abs(cached[0] - cached[1]) > _MAX_CACHED_APART:
        void.append(
            f"prefix cache: {cached[0]:.0%} of {names[0]}'s prompt tokens and {cached[1]:.0%} of "
            f"{names[1]}'s; serve without prefix caching to compare"
        )
    return void


def _comparison(batch: int, found: _Measured) -> BatchComparison:
    return BatchComparison(
        batch=batch,
        num_blocks=len(found.a),
        a=_side(found, 0),
        b=_side(found, 1),
        speedup=_speedup(found),
        differences=[_difference(found, *each) for each in _FIGURES],
    )


def _speedup(found: _Measured) -> Interval:
    a, b = found.values(lambda record: record.tpot_s)

    def ratio(x: Values, y: Values) -> float:
        return mean(x) / max(mean(y), LEAST_S)

    return interval_of(ratio(_flat(a), _flat(b)), resampled(a, b, ratio))


def _difference(
    found: _Measured,
    name: str,
    figure: Figure,
    statistic: Statistic,
) -> Difference:
    a, b = found.values(figure)
    return Difference(
        figure=name,
        a=statistic(_flat(a)),
        difference=paired_difference(a, b, statistic),
        blocks=[statistic(y) - statistic(x) for x, y in zip(a, b, strict=True)],
    )


def _side(found: _Measured, which: int) -> Side:
    blocks = (found.a, found.b)[which]
    records = [record for block in blocks for record in block]
    own = found.values(lambda record: record.tpot_s)[which]
    tokens = sum(record.num_tokens for record in records if record.is_ok)
    step_s = interval_of(mean(_flat(own)), resampled(own, own, lambda x, _: mean(x)))
    return Side(
        latency=figures.latency(records),
        outcomes=figures.outcomes(records),
        tokens_per_s=tokens / sum(figures.elapsed_s(block) for block in blocks),
        step_s=step_s,
        ttft_cdf_s=cdf([r.ttft_s for r in records if r.is_ok and r.ttft_s is not None]),
        tpot_cdf_s=cdf(_flat(own)),
    )


def _curves(measured: Mapping[int, _Measured], memory_share: float) -> list[Curve]:
    """The break-even curve at each batch size."""
    steps = {batch: found.values(lambda record: record.tpot_s) for batch, found in measured.items()}
    adapter = {batch: mean(_flat(a)) for batch, (a, _) in steps.items()}
    merged = {batch: mean(_flat(b)) for batch, (_, b) in steps.items()}
    # The same seed: draw i of A and draw i of B are the same pairs of blocks.
    a_draws = {
        batch: resampled(a, b, lambda x, _: mean(x), resamples=_CURVE_RESAMPLES)
        for batch, (a, b) in steps.items()
    }
    b_draws = {
        batch: resampled(a, b, lambda _, y: mean(y), resamples=_CURVE_RESAMPLES)
        for batch, (a, b) in steps.items()
    }
    draws = [
        (
            {batch: drawn[i] for batch, drawn in a_draws.items()},
            {batch: drawn[i] for batch, drawn in b_draws.items()},
        )
        for i in range(_CURVE_RESAMPLES)
    ]
    return [curve(adapter, merged, batch, memory_share, draws) for batch in sorted(measured)]


def _flat(blocks: Sequence[Sequence[float]]) -> list[float]:
    return [value for block in blocks for value in block]
