"""What merging an adapter saves, or costs, in GPU time: arithmetic over measured step times.

A step of a server that has promoted adapters makes one pass over the base for all rows that are
not merged, and one over each merged model that has rows. So a merge spares its rows' LoRA, and
reads a second set of weights in every step that has both kinds of rows: it can lose.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, lgamma, log, log1p

import numpy as np

BASE = ""  # the share of requests that name no adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """Seconds of a decode step with `batch` rows, each pass alone on the GPU."""

    batch: int
    plain_s: float  # the base, no row with an adapter
    one_s: float  # one adapter in the step
    many_s: float  # `num_adapters` of them
    num_adapters: int
    merged_s: float  # a merged model

    def __post_init__(self) -> None:
        times = (self.plain_s, self.one_s, self.many_s, self.merged_s)
        if self.batch < 1 or self.num_adapters < 1 or not all(t > 0 and isfinite(t) for t in times):
            raise ValueError(f"the step times at batch {self.batch} are not all positive: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Measured decode steps, by batch size."""

    source: str  # where they come from, for whoever reads the estimate
    points: tuple[StepPoint, ...]
    second_pass_s: float = 0.0  # what two passes in one step share: counted once, not twice

    def __post_init__(self) -> None:
        batches = [point.batch for point in self.points]
        if not batches or batches != sorted(set(batches)):
            raise ValueError(f"step times need batch sizes that rise; these are {batches}")

    def merged(self, num_rows: float) -> float:
        """A merged model's pass."""
        return self._at(num_rows, [point.merged_s for point in self.points])

    def over_base(self, num_rows: float, num_adapters: float) -> float:
        """A pass over the base whose rows name so many adapters."""
        plain = self._at(num_rows, [point.plain_s for point in self.points])
        one = self._at(num_rows, [point.one_s for point in self.points])
        each = self._at(num_rows, [_each_more(point) for point in self.points])
        if num_adapters <= 1:
            return plain + (one - plain) * num_adapters
        return one + each * (num_adapters - 1)

    def _at(self, num_rows: float, times: Sequence[float]) -> float:
        """Between two batch sizes on the line through both; below the smallest, the smallest's."""
        batches = [point.batch for point in self.points]
        if num_rows <= batches[0] or len(batches) == 1:
            return times[0]
        above = next((i for i, batch in enumerate(batches) if batch >= num_rows), len(batches) - 1)
        (x0, x1), (y0, y1) = batches[above - 1 : above + 1], times[above - 1 : above + 1]
        return max(y0 + (y1 - y0) * (num_rows - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds of GPU time for a generated token."""

    without_s: float  # nothing promoted
    with_s: float

    @property
    def saved_s(self) -> float:
        """For each token of the trace; below 0 the merge loses."""
        return self.without_s - self.with_s


def estimate(
    trace_shares: Mapping[str, float],
    batch_size: int,
    step_times: StepTimes,
    promoted: Collection[str] | None = None,
) -> Estimate:
    """Seconds per token of a mixed trace, without and with `promoted` on the merged path.

    trace_shares  adapter -> its share of the tokens; BASE is the base's own; scaled to sum to 1
    batch_size    rows of every decode step; who they belong to is drawn from the shares
    promoted      None: the adapter with the largest share

    Exact for that model: a step's expected time is the sum of its passes' expected times.
    """
    if promoted is None:
        adapters = {name: share for name, share in trace_shares.items() if name != BASE}
        promoted = [max(adapters, key=adapters.__getitem__)] if adapters else []
    return Estimate(
        without_s=seconds_per_token(trace_shares, batch_size, step_times, ()),
        with_s=seconds_per_token(trace_shares, batch_size, step_times, promoted),
    )


def seconds_per_token(
    trace_shares: Mapping[str, float],
    batch_size: int,
    step_times: StepTimes,
    promoted: Collection[str],
) -> float:
    """One side of an `estimate`."""
    total = sum(trace_shares.values())
    if total <= 0 or min(trace_shares.values()) < 0:
        raise ValueError("trace_shares must be 0 or more, and not all 0")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    shares = {name: share / total for name, share in trace_shares.items()}
    return _step_s(shares, batch_size, step_times, promoted) / batch_size


def _step_s(
    shares: Mapping[str, float], batch_size: int, times: StepTimes, promoted: Collection[str]
) -> float:
    merged = {name: share for name, share in shares.items() if name in promoted}
    rest = {name: share for name, share in shares.items() if name not in promoted}
    seconds = num_passes = 0.0
    for share in merged.values():
        for num_rows, chance in _binomial(batch_size, share):
            seconds += chance * times.merged(num_rows)
            num_passes += chance
    kept = sum(rest.values())
    if over_base := _binomial(batch_size, kept):
        num_distinct = _num_distinct(rest, kept, batch_size)
        for num_rows, chance in over_base:
            seconds += chance * times.over_base(num_rows, num_distinct[num_rows])
            num_passes += chance
    return seconds - max(num_passes - 1, 0.0) * times.second_pass_s


def _num_distinct(shares: Mapping[str, float], total: float, most_rows: int) -> list[float]:
    """How many adapters 0, 1, 2, … rows are expected to name; the base is none.

    Who has no share is left out: one more zero would change how the sum is rounded.
    """
    adapters = np.array([share for name, share in shares.items() if share and name != BASE])
    absent_once = 1 - np.minimum(adapters / total, 1.0)
    absent, found = np.ones_like(absent_once), [0.0]
    for _ in range(most_rows):
        absent *= absent_once
        found.append(float((1 - absent).sum()))
    return found


def _binomial(num_rows: int, share: float) -> list[tuple[int, float]]:
    """(k, chance) of every k from 1 on: how many of the rows belong to one with this share."""
    if share <= 0:
        return []
    if share >= 1:
        return [(num_rows, 1.0)]
    yes, no = log(share), log1p(-share)  # logarithms: the powers alone underflow
    return [
        (k, exp(_log_ways(num_rows, k) + k * yes + (num_rows - k) * no))
        for k in range(1, num_rows + 1)
    ]


def _log_ways(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def _each_more(point: StepPoint) -> float:
    """What each adapter beyond the first adds."""
    if point.num_adapters == 1:
        return 0.0
    return (point.many_s - point.one_s) / (point.num_adapters - 1)
