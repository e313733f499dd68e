"""When merging an adapter into weights of its own pays for the memory that they take.

The model has three measured things and one given. With b requests under way, a decode step takes
A(b) seconds on the adapter path and M(b) on the merged path (the mean time per token of a closed
loop of b users, either side). The server holds B requests at most, so without merging it makes

    T0 = B / A(B)                                               tokens per second.

Merged weights take the share m of the memory of the KV cache, and so of the requests that it holds:
B' = B (1 - m). A share s of them ask for the merged adapter. Those and the others run one after the
other in each step, and each reads weights of its own:

    T1(s) = B' / (A((1 - s) B') + M(s B')).

The gain is T1(s) / T0 - 1. The break-even share is the smallest s from which on it stays above
zero: below it, a second set of weights (and the lost memory) costs more than the saved LoRA.

A and M run straight between the measured batch sizes. Below the smallest measured one, b1, a step
takes as long as at b1 and is not always needed: with fewer than one row on average, in a share b of
the steps only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from loadtest.report import Curve
from loadtest.stats import Floats, interval_of

_NUM_SHARES = 101
LEAST_S = 1e-9
LEAST_GAIN = 1e-9  # less is a rounding error


def step_time(step_s: Mapping[int, float], rows: npt.ArrayLike) -> Floats:
    """Seconds that a path adds to a step in which it has `rows` rows on average; any shape."""
    batches = sorted(step_s)
    given = np.asarray(rows, np.float64)
    full = np.interp(np.maximum(given, 1.0), batches, [step_s[batch] for batch in batches])
    # A reply that comes in one piece has no time per token; no step takes less than nothing.
    return np.asarray(np.minimum(given, 1.0) * np.maximum(full, LEAST_S), np.float64)


def gains(
    adapter: Mapping[int, float], merged: Mapping[int, float], batch: int, memory_share: float
) -> list[float]:
    """The gain at every share from 0 to 1, in hundredths.

    adapter, merged: step time in seconds by batch size, the same sizes, `batch` among them.
    """
    before = batch / step_time(adapter, batch)
    left = batch * (1 - memory_share)
    shares = np.arange(_NUM_SHARES) / (_NUM_SHARES - 1)
    steps = step_time(adapter, (1 - shares) * left) + step_time(merged, shares * left)
    return [float(gain) for gain in left / steps / before - 1]


def break_even(gain: Sequence[float]) -> float | None:
    """The smallest share from which on every gain is above zero; None if merging never pays."""
    losing = [index for index, value in enumerate(gain) if value <= LEAST_GAIN]
    first = losing[-1] + 1 if losing else 0
    return None if first == len(gain) else first / (len(gain) - 1)


def curve(
    adapter: Mapping[int, float],
    merged: Mapping[int, float],
    batch: int,
    memory_share: float,
    draws: Sequence[tuple[Mapping[int, float], Mapping[int, float]]] = (),
) -> Curve:
    """The curve at one batch size, with intervals from resampled step times."""
    gain = gains(adapter, merged, batch, memory_share)
    drawn = [gains(a, m, batch, memory_share) for a, m in draws] or [gain]
    bands = [
        interval_of(value, column) for value, column in zip(gain, np.transpose(drawn), strict=True)
    ]
    # 1.01 stands for "never", so that it sorts after every share.
    points = [1.01 if (point := break_even(each)) is None else point for each in drawn]
    low, high = np.quantile(points, (0.025, 0.975), method="nearest")
    return Curve(
        batch=batch,
        shares=[index / (len(gain) - 1) for index in range(len(gain))],
        gain=gain,
        low=[band.low for band in bands],
        high=[band.high for band in bands],
        break_even=break_even(gain),
        break_even_low=None if low > 1 else float(low),
        break_even_high=None if high > 1 else float(high),
    )
