"""Statistics that the reports rest on; each is a function of numbers alone."""

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Values = Sequence[float] | Floats
Statistic = Callable[[Values], float]

_RESAMPLES = 1000
_CONFIDENCE = 0.95


class Quantiles(msgspec.Struct, frozen=True):
    """Of one figure over many requests, in seconds; None where there is nothing to measure."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Interval(msgspec.Struct, frozen=True):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def quantiles(values: Values) -> Quantiles:
    """Mean and the usual quantiles, linearly interpolated."""
    if not len(values):
        return Quantiles(0, None, None, None, None)
    p50, p90, p99 = (float(value) for value in np.quantile(values, (0.5, 0.9, 0.99)))
    return Quantiles(len(values), float(np.mean(values)), p50, p90, p99)


def cdf(values: Sequence[float], points: int = 201) -> list[float]:
    """The quantiles at `points` even steps from 0 to 1: enough to draw the distribution."""
    if not values:
        return []
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, points))]


def jain(shares: Sequence[float]) -> float | None:
    """Jain's index, (sum x)^2 / (n sum x^2): 1 when all have the same, 1/n when one has all."""
    total, squares = sum(shares), sum(share * share for share in shares)
    return total * total / (len(shares) * squares) if squares else None


def worst_decile(values: Sequence[float]) -> float | None:
    """The mean of the largest tenth, at least one."""
    if not values:
        return None
    worst = sorted(values, reverse=True)[: math.ceil(len(values) / 10)]
    return sum(worst) / len(worst)


def paired_difference(
    a_blocks: Sequence[Sequence[float]],
    b_blocks: Sequence[Sequence[float]],
    statistic: Statistic,
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """statistic(B) - statistic(A) over interleaved blocks, with its bootstrap interval.

    Block i of A and block i of B replayed the same requests one after the other. Requests within a
    block share the machine's mood and each other's queue, so whole pairs of blocks are drawn, with
    replacement, never single requests; what both blocks of a pair suffered cancels. The interval is
    the percentile one. Raises ValueError for fewer than two pairs.
    """
    differences = resampled(
        a_blocks, b_blocks, lambda a, b: statistic(b) - statistic(a), resamples=resamples, seed=seed
    )
    value = statistic(_pool(b_blocks)) - statistic(_pool(a_blocks))
    return interval_of(value, differences)


def resampled(
    a_blocks: Sequence[Sequence[float]],
    b_blocks: Sequence[Sequence[float]],
    figure: Callable[[Floats, Floats], float],
    *,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> list[float]:
    """A figure of both sides' values, once for each draw of pairs of blocks."""
    assert len(a_blocks) == len(b_blocks), "blocks come in pairs"
    if len(a_blocks) < 2:
        raise ValueError(f"blocks is {len(a_blocks)}; an interval needs at least 2")
    a, b = ([np.asarray(block, np.float64) for block in side] for side in (a_blocks, b_blocks))
    drawn = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    return [
        figure(np.concatenate([a[i] for i in row]), np.concatenate([b[i] for i in row]))
        for row in drawn
    ]


def interval_of(value: float, resamples: Values) -> Interval:
    """The percentile interval of a value, from what it was in each resample."""
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(resamples, (tail, 1 - tail))
    return Interval(value, float(low), float(high))


def mean(values: Values) -> float:
    return float(np.mean(values))


def quantile(share: float) -> Statistic:
    """The statistic that is this quantile."""
    return lambda values: float(np.quantile(values, share))


def _pool(blocks: Sequence[Sequence[float]]) -> Floats:
    return np.concatenate([np.asarray(block, np.float64) for block in blocks])


def rate_misses(num_planned: int, num_sent: int) -> float:
    """How many sigmas the offered rate is off: |sent - planned| over the root of planned.

    Both count requests of the same stretch of time; the root is a Poisson count's own scatter, so
    that up to 2 the server cannot tell the load it was offered from the one that was meant.
    """
    return abs(num_sent - num_planned) / math.sqrt(num_planned) if num_planned else 0.0
