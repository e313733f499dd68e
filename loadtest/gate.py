"""Holds a run to a stored one: what became slower, or wrong."""

from collections.abc import Iterator

from loadtest.environment import differences
from loadtest.figures import Slo
from loadtest.report import RunReport

_QUANTILES = ("p50", "p90", "p99")
_LATENCIES = ("ttft", "itl", "e2e")
_MIN_SLOWER_S = 0.002  # less than this is not called slower, whatever the ratio


def regressions(stored: RunReport, new: RunReport, tolerance: float) -> list[str]:
    """Why the new run does not pass, a line each; empty when it does.

    A figure may be worse than the stored one by the share `tolerance`. Both runs must have replayed
    the same trace, and neither may be void. A reply that is not ok where the stored run's were is a
    regression at any tolerance.
    """
    if stored.trace.sha256 != new.trace.sha256:
        return ["the runs replayed different traces, so nothing can be said"]
    void = [
        f"the {name} run is void" for name, run in (("stored", stored), ("new", new)) if run.is_void
    ]
    if void:
        return void
    found = list(_slower(stored, new, tolerance))
    good, was = new.goodput.per_s, stored.goodput.per_s
    if stored.goodput.slo == new.goodput.slo and good < was * (1 - tolerance):
        found.append(f"goodput: {good:.2f} requests per second, was {was:.2f}")
    found += [
        f"{outcome}: {new.outcomes[outcome]}, was {stored.outcomes[outcome]}"
        for outcome in ("rejected", "failed", "cut", "wrong")
        if new.outcomes[outcome] > stored.outcomes[outcome]
    ]
    return found


def _slower(stored: RunReport, new: RunReport, tolerance: float) -> Iterator[str]:
    for name in _LATENCIES:
        for quantile in _QUANTILES:
            now = getattr(getattr(new.total, name), quantile)
            was = getattr(getattr(stored.total, name), quantile)
            if was is None or now is None:
                continue
            if now > was * (1 + tolerance) and now - was > _MIN_SLOWER_S:
                yield f"{name} {quantile}: {now * 1e3:.1f} ms, was {was * 1e3:.1f}"


def warnings(stored: RunReport, new: RunReport) -> list[str]:
    """What else differs between the runs: what was asked, of what server, from what machine."""
    pairs = [
        (name, stored.target.get(name), new.target.get(name))
        for name in sorted({*stored.target, *new.target} - {"url"})
    ]
    pairs += [
        (f"SLO {name}", getattr(stored.goodput.slo, name), getattr(new.goodput.slo, name))
        for name in Slo.__struct_fields__
    ]
    found = [f"{name}: {old} -> {now}" for name, old, now in pairs if old != now]
    return [*found, *differences(stored.environment, new.environment)]
