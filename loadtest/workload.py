"""Makes traces: when requests come, whom they ask, how long they are. One seed, one trace."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtest.trace import Line

Arrivals = Literal["poisson", "constant", "closed"]

_STORM_S = 1.0  # a cold-start storm arrives within this time
_BURST_TENANT = "burst"
_MAX_REQUESTS = 10_000_000  # of a trace: some gigabytes

_Asked = tuple[float, str, str | None]  # time_s, model, and the tenant where it is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    """Cold-start storm: adapters nobody has asked for yet are all asked for within a second."""

    at_s: float
    models: tuple[str, ...]

    def __post_init__(self) -> None:
        _demand(self, "at_s", least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """One tenant's flood, over and above everybody's traffic, for one model."""

    at_s: float
    length_s: float
    rate: float  # requests per second
    model: str

    def __post_init__(self) -> None:
        _demand(self, "at_s", least=0)
        _demand(self, "length_s", "rate", over=0)
        _demand_room(self.rate * self.length_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a trace shall look like."""

    models: tuple[str, ...]  # the first is the most popular
    arrivals: Arrivals = "poisson"
    rate: float = 1.0  # requests per second; open loop
    duration_s: float = 60.0  # open loop
    users: int = 1  # closed loop
    requests_per_user: int = 10  # closed loop
    alpha: float = 1.0  # Zipf: popularity falls with rank ** -alpha; 0 is uniform
    drift_s: float | None = None  # every so often all models move down one rank, the last to first
    tenants: int = 1
    prompt_tokens: int = 64
    output_tokens: int = 32
    spread: float = 0.0  # sigma of the log-normal that lengths are drawn from; 0 is all the same
    storm: Storm | None = None
    burst: Burst | None = None
    seed: int = 0
    max_tokens: int = field(default=4096)  # no length is drawn past this

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty; a trace needs a model to ask for")
        _demand(self, "rate", "duration_s", "users", "requests_per_user", "tenants", over=0)
        _demand(self, "alpha", "spread", "seed", least=0)
        if self.drift_s is not None:
            _demand(self, "drift_s", over=0)
        if self.arrivals == "closed" and (self.storm or self.burst or self.drift_s):
            raise ValueError("storm, burst and drift need an open loop: arrivals is 'closed'")
        for name in ("prompt_tokens", "output_tokens"):
            if self.spread and getattr(self, name) > self.max_tokens:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; lengths with a spread are drawn "
                    f"up to {self.max_tokens}"
                )
        is_closed = self.arrivals == "closed"
        _demand_room(
            self.users * self.requests_per_user if is_closed else self.rate * self.duration_s
        )


def _demand(of: object, *names: str, over: float | None = None, least: float | None = None) -> None:
    """Raise ValueError for a number that is not finite, not `over` this, or less than `least`."""
    for name in names:
        value = getattr(of, name)
        if over is not None and not over < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be over {over}")
        if least is not None and not least <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be {least} or more")


def _demand_room(num_requests: float) -> None:
    if num_requests > _MAX_REQUESTS:
        raise ValueError(f"that is {num_requests:.3g} requests; a trace has {_MAX_REQUESTS:,}")


def make_trace(workload: Workload) -> list[Line]:
    """The requests of a workload, in the order of their times."""
    random = np.random.default_rng(workload.seed)
    if workload.arrivals == "closed":
        return _closed(workload, random)
    times = arrival_times(workload.arrivals, workload.rate, workload.duration_s, random)
    ranks = random.choice(
        len(workload.models), size=len(times), p=zipf(len(workload.models), workload.alpha)
    )
    asked: list[_Asked] = [
        (float(time), model_at(workload, int(rank), float(time)), None)
        for time, rank in zip(times, ranks, strict=True)
    ]
    asked += _storm(workload, random) + _burst(workload, random)
    asked.sort(key=lambda each: each[0])
    return [_line(workload, random, *each) for each in asked]


def arrival_times(
    arrivals: Arrivals, rate: float, duration_s: float, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Seconds at which requests come, ascending, all below `duration_s`.

    Poisson: the number is drawn, then each time is uniform, which is the same process.
    """
    if arrivals == "constant":
        return np.arange(max(1, round(rate * duration_s)), dtype=np.float64) / rate
    count = max(1, int(random.poisson(rate * duration_s)))
    return np.sort(random.uniform(0.0, duration_s, count))


def zipf(count: int, alpha: float) -> npt.NDArray[np.float64]:
    """[count], the share of each rank: proportional to rank ** -alpha, from rank 1 on."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -alpha
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def model_at(workload: Workload, rank: int, time_s: float) -> str:
    """Who holds a rank (from 0) at a time: the hot set drifts."""
    moved = 0 if workload.drift_s is None else int(time_s / workload.drift_s)
    return workload.models[(rank - moved) % len(workload.models)]


def _storm(workload: Workload, random: np.random.Generator) -> list[_Asked]:
    if workload.storm is None:
        return []
    times = workload.storm.at_s + random.uniform(0.0, _STORM_S, len(workload.storm.models))
    return [
        (float(time), model, None) for time, model in zip(times, workload.storm.models, strict=True)
    ]


def _burst(workload: Workload, random: np.random.Generator) -> list[_Asked]:
    burst = workload.burst
    if burst is None:
        return []
    times = burst.at_s + arrival_times("poisson", burst.rate, burst.length_s, random)
    return [(float(time), burst.model, _BURST_TENANT) for time in times]


def _closed(workload: Workload, random: np.random.Generator) -> list[Line]:
    share = zipf(len(workload.models), workload.alpha)
    lines = []
    for _ in range(workload.requests_per_user):
        for user in range(workload.users):
            rank = int(random.choice(len(workload.models), p=share))
            lines.append(_line(workload, random, 0.0, workload.models[rank], None, user))
    return lines


def _line(
    workload: Workload,
    random: np.random.Generator,
    time_s: float,
    model: str,
    tenant: str | None,
    user: int | None = None,
) -> Line:
    drawn = int(random.integers(workload.tenants))
    return Line(
        time_s=round(time_s, 6),
        tenant=tenant or f"tenant-{drawn}",
        model=model,
        prompt_tokens=_length(workload, workload.prompt_tokens, random),
        output_tokens=_length(workload, workload.output_tokens, random),
        seed=int(random.integers(1 << 31)),
        user=user,
    )


def _length(workload: Workload, median: int, random: np.random.Generator) -> int:
    """A length whose median is `median`."""
    if workload.spread == 0:
        return median
    with np.errstate(over="ignore"):
        drawn = median * float(np.exp(workload.spread * random.standard_normal()))
    return round(min(max(1.0, drawn), workload.max_tokens))


def cold_models(models: Sequence[str], count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keep the last `count` models cold for a storm; return those before it, and those in it."""
    if not 0 < count < len(models):
        raise ValueError(
            f"a storm of {count} needs that many cold models and one warm; there are {len(models)}"
        )
    return tuple(models[:-count]), tuple(models[-count:])
