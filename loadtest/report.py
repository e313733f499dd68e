"""What a run leaves behind, as JSON: enough to draw its page, and to hold the next run to it."""

from pathlib import Path
from typing import Literal

import msgspec

from loadtest.environment import Environment
from loadtest.figures import Checks, Fairness, Goodput, Latency, ModelRow, Slo
from loadtest.identity import IdentityCounts
from loadtest.recheck import Recheck
from loadtest.stats import Interval


class TraceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Which trace was replayed."""

    sha256: str
    num_lines: int
    duration_s: float
    loop: Literal["open", "closed"]
    num_models: int
    num_tenants: int
    num_prompt_tokens: int  # as the trace has them
    num_output_tokens: int


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """Every request, column by column, in the order of the trace."""

    intended_s: list[float]
    late_s: list[float]
    over_s: list[float]
    ttft_s: list[float | None]
    e2e_s: list[float | None]
    tpot_s: list[float | None]
    outcome: list[str]
    model: list[str]
    path: list[str | None]
    tier: list[str | None]


class RunReport(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="kind"):
    """One replayed trace."""

    made_at: str  # ISO 8601, UTC
    trace: TraceFacts
    target: dict[str, str]
    environment: Environment
    checks: Checks
    elapsed_s: float
    outcomes: dict[str, int]
    reasons: dict[str, int]
    total: Latency
    by_path: dict[str, Latency]
    by_tier: dict[str, Latency]
    models: list[ModelRow]
    fairness: Fairness
    goodput: Goodput
    identity: IdentityCounts
    recheck: Recheck
    itl_cdf_s: list[float]  # quantiles at even steps from 0 to 1
    points: Points

    @property
    def is_void(self) -> bool:
        return bool(self.checks.void)

    @property
    def num_over(self) -> int:
        """Requests that came to an end; all of the trace's, unless the run was stopped."""
        return sum(self.outcomes.values())

    @property
    def is_whole(self) -> bool:
        return self.num_over == self.trace.num_lines

    @property
    def has_wrong_replies(self) -> bool:
        return self.outcomes["wrong"] > 0


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a comparison at one batch size."""

    latency: Latency
    outcomes: dict[str, int]
    tokens_per_s: float
    step_s: Interval  # mean time per token after the first
    ttft_cdf_s: list[float]
    tpot_cdf_s: list[float]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """B minus A of one figure, in seconds, over paired blocks."""

    figure: str
    a: float
    difference: Interval
    blocks: list[float]  # pair by pair


class BatchComparison(msgspec.Struct, frozen=True, kw_only=True):
    """A and B with so many requests under way at any time."""

    batch: int
    num_blocks: int
    a: Side
    b: Side
    speedup: Interval  # A's mean time per token over B's
    differences: list[Difference]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """What merging gains in throughput, by the adapter's share of traffic; see breakeven.py."""

    batch: int
    shares: list[float]
    gain: list[float]  # 0.1: a tenth more tokens per second
    low: list[float]  # 95 % interval
    high: list[float]
    break_even: float | None  # the smallest share from which on merging gains; None: never
    break_even_low: float | None  # of the resamples; None where even the luckiest never gains
    break_even_high: float | None


class CompareReport(msgspec.Struct, frozen=True, kw_only=True, tag="compare", tag_field="kind"):
    """A against B."""

    made_at: str
    names: tuple[str, str]
    targets: tuple[dict[str, str], dict[str, str]]
    environment: Environment
    memory_share: float  # of the KV cache that the merged weights take
    void: list[str]
    batches: list[BatchComparison]
    curves: list[Curve]

    @property
    def is_void(self) -> bool:
        return bool(self.void)


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One rate tried in the search for the knee."""

    rate: float
    offered_per_s: float | None
    good_share: float
    per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    void: list[str]


class KneeReport(msgspec.Struct, frozen=True, kw_only=True, tag="knee", tag_field="kind"):
    """The highest rate at which enough replies keep the SLO."""

    made_at: str
    target: dict[str, str]
    environment: Environment
    slo: Slo
    goal: float
    knee_per_s: float | None  # None: see why_none
    is_bounded: bool  # False: the highest rate tried held, or the sender gave out first
    probes: list[Probe]  # in the order of trying

    @property
    def is_void(self) -> bool:
        return self.knee_per_s is None

    @property
    def why_none(self) -> str:
        """Why no rate was found."""
        if self.probes and self.probes[0].void:
            return f"the lowest rate could not be offered: {self.probes[0].void[0]}"
        return "even the lowest rate misses the goal"


Report = RunReport | CompareReport | KneeReport


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))


def read_report(path: Path) -> Report:
    """Read a report. Raises ValueError where the file holds none."""
    try:
        report: Report = msgspec.json.decode(path.read_bytes(), type=Report)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no load test report: {error}") from None
    return report
