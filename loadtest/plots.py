"""Which pictures a report has, and what is in each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from loadtest.figures import MAX_LATE_S
from loadtest.progress import ms
from loadtest.report import BatchComparison, CompareReport, KneeReport, Points, RunReport
from loadtest.stats import cdf
from loadtest.svg import (
    Axis,
    Bar,
    Plot,
    Span,
    bars,
    linear,
    logarithmic,
    percent,
    plain,
    seconds,
    spans,
)

_COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
_MAX_DOTS = 3000  # of one picture
_MAX_BARS = 24
_Dot = TypeVar("_Dot")
_SHARE = Axis(0.0, 1.0, format=percent)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with its words."""

    key: str
    title: str
    remark: str
    legend: list[tuple[str, str]]  # name, CSS class
    svg: str


def of_run(report: RunReport) -> list[Figure]:
    """A run's pictures."""
    points = report.points
    return [
        _ttft_cdf(points),
        _e2e_and_gap_cdf(report),
        _ttft_over_time(report),
        _in_flight(points),
        _adapter_bars(report),
        _lateness(points),
    ]


def _ttft_cdf(points: Points) -> Figure:
    groups: dict[str, list[float]] = {"all": _ok(points, points.ttft_s)}
    for name, column in (("", points.path), ("tier ", points.tier)):
        values = sorted({entry for entry in column if entry is not None})
        if len(set(column)) > 1:  # one alone is all of them
            groups |= {name + each: _ok(points, points.ttft_s, column, each) for each in values}
    return _cdf_figure(
        "ttft-cdf", "Time to first token", "Share of replies that began within a time", groups
    )


def _e2e_and_gap_cdf(report: RunReport) -> Figure:
    points = report.points
    groups = {
        "between pieces of text": report.itl_cdf_s,
        "mean per token": _ok(points, points.tpot_s),
        "end to end": _ok(points, points.e2e_s),
    }
    return _cdf_figure(
        "latency-cdf", "Between tokens, and to the end", "Share of gaps or replies", groups
    )


def _cdf_figure(key: str, title: str, remark: str, groups: dict[str, list[float]]) -> Figure:
    curves = {name: cdf(values) for name, values in groups.items() if values}
    x = logarithmic((value for curve in curves.values() for value in curve), "time, log scale")
    plot = Plot(x, _SHARE, f"{title}: {remark}")
    legend = []
    for (name, curve), css in zip(curves.items(), _cycle(len(curves)), strict=True):
        plot.line(curve, [index / (len(curve) - 1) for index in range(len(curve))], css)
        legend.append((name, css))
    return Figure(key, title, remark, legend, plot.render())


def _ttft_over_time(report: RunReport) -> Figure:
    points = report.points
    fine = [
        (time, ttft, path or "reply", model)
        for time, ttft, path, model, outcome in zip(
            points.intended_s, points.ttft_s, points.path, points.model, points.outcome, strict=True
        )
        if ttft is not None and outcome == "ok"
    ]
    x = linear(points.intended_s, "seconds since the start")
    plot = Plot(x, logarithmic(ttft for _, ttft, _, _ in fine), "Time to first token over time")
    paths = sorted({path for _, _, path, _ in fine})
    legend = []
    for path, css in zip(paths, _cycle(len(paths)), strict=True):
        dots = [(t, ttft, f"{model}: {ms(ttft)}") for t, ttft, p, model in fine if p == path]
        plot.dots(_thinned(dots), css)
        legend.append((path, css))
    times, medians = _rolling([t for t, *_ in fine], [ttft for _, ttft, *_ in fine])
    plot.line(times, medians, "c3")
    legend.append(("median around", "c3"))
    bad = [
        (time, f"{model}: {outcome}")
        for time, model, outcome in zip(
            points.intended_s, points.model, points.outcome, strict=True
        )
        if outcome != "ok"
    ]
    plot.crosses(_thinned(bad), "bad")
    if bad:
        legend.append((f"{len(bad)} not ok", "bad"))
    remark = "Each dot a request, at the time it was meant to be sent"
    return Figure("ttft-time", "Time to first token, over time", remark, legend, plot.render())


def _in_flight(points: Points) -> Figure:
    changes = []
    for begun, length in zip(points.intended_s, points.over_s, strict=True):
        changes += [(begun, 1), (begun + length, -1)]
    times, counts, now = [0.0], [0.0], 0
    for time, change in sorted(changes):
        times += [time, time]
        counts += [float(now), float(now + change)]
        now += change
    width = math.ceil(len(times) / _MAX_DOTS)  # of so many changes the highest is drawn
    times = times[::width]
    counts = [max(counts[start : start + width]) for start in range(0, len(counts), width)]
    plot = Plot(
        linear(times, "seconds since the start"), linear(counts), "Requests under way over time"
    )
    plot.area(times, counts, "c2")
    remark = "Meant to be sent, and not over"
    return Figure("in-flight", "Requests under way", remark, [], plot.render())


def _adapter_bars(report: RunReport) -> Figure:
    rows = report.models[:_MAX_BARS]
    axis = linear(
        [value for row in rows for value in (row.ttft.p50, row.ttft.p90) if value is not None],
        "time to first token: median, and up to p90",
        format=seconds,
    )
    drawn = [
        Bar(row.model, row.ttft.p50, row.ttft.p90, f"{row.num_ok} of {row.num_requests}")
        for row in rows
    ]
    hidden = len(report.models) - len(rows)
    remark = "The most popular first; at the right, replies that are ok"
    if hidden > 0:
        remark += f"; {hidden} more in the table below"
    return Figure(
        "adapters",
        "Adapters",
        remark,
        [("median", "c0"), ("up to p90", "c1")],
        bars(drawn, axis, "Time to first token of each adapter"),
    )


def _lateness(points: Points) -> Figure:
    late = cdf([max(value, 1e-6) for value in points.late_s])
    axis = logarithmic([*late, 1e-5, 2 * MAX_LATE_S], "late by, log scale")
    plot = Plot(axis, _SHARE, "How late requests were sent")
    plot.line(late, [index / (len(late) - 1) for index in range(len(late))], "c4")
    plot.mark_x(MAX_LATE_S, f"p99 past {ms(MAX_LATE_S)} is void")
    remark = "Share of requests that were sent within a time of when they were due"
    return Figure("lateness", "The sender's own lateness", remark, [], plot.render())


def of_comparison(report: CompareReport) -> list[Figure]:
    """A comparison's pictures."""
    figures = [_break_even(report), _forest(report), _steps(report)]
    return figures + [_block_pairs(report, batch) for batch in report.batches]


def _break_even(report: CompareReport) -> Figure:
    values = [value for curve in report.curves for value in (*curve.low, *curve.high)]
    y = linear(values, format=percent)
    plot = Plot(
        Axis(0.0, 1.0, "the adapter's share of requests", format=percent),
        y,
        "Gain in throughput from merging, by share of traffic",
    )
    legend = []
    for curve, css in zip(report.curves, _cycle(len(report.curves)), strict=True):
        plot.band(curve.shares, curve.low, curve.high, css)
        plot.line(curve.shares, curve.gain, css)
        at = "never pays" if curve.break_even is None else f"pays from {curve.break_even:.0%} on"
        legend.append((f"{curve.batch} under way: {at}", css))
        if curve.break_even is not None:
            title = f"break-even at {curve.break_even:.0%}"
            plot.dots([(curve.break_even, 0.0, title)], css, size=5)
    plot.mark_y(0.0)  # at whose ends the curves begin and end: a word there would be crossed out
    remark = (
        "Tokens per second gained by merging (dashed: none); the merged weights take "
        f"{report.memory_share:.0%} of the KV cache"
    )
    return Figure("break-even", "When merging pays", remark, legend, plot.render())


def _forest(report: CompareReport) -> Figure:
    """Each difference with its interval, relative to A."""
    rows = [
        (f"{each.figure}, batch {batch.batch}", each)
        for batch in report.batches
        for each in batch.differences
        if each.a
    ]
    drawn = [
        Span(
            name,
            each.difference.value / each.a,
            each.difference.low / each.a,
            each.difference.high / each.a,
            ("c2" if each.difference.value < 0 else "bad") if each.difference.is_clear else "",
            f"{each.difference.value / each.a:+.1%}",
        )
        for name, each in rows
    ]
    ends = [end for row in drawn for end in (row.low, row.high)]
    axis = linear(ends, f"{report.names[1]} against {report.names[0]}", format=percent)
    legend = [("faster", "c2"), ("slower", "bad"), ("not told apart", "")]
    remark = "With 95% intervals from pairs of blocks"
    svg = spans(drawn, axis, "Paired differences")
    return Figure("differences", "Differences", remark, legend, svg)


def _steps(report: CompareReport) -> Figure:
    sides = [
        [(batch.batch, side.step_s) for batch, side in zip(report.batches, each, strict=True)]
        for each in ([b.a for b in report.batches], [b.b for b in report.batches])
    ]
    ends = [end for side in sides for _, step in side for end in (step.low, step.high)]
    x = linear([batch for batch, _ in sides[0]], "requests under way")
    plot = Plot(x, linear(ends, format=seconds), "Time per token by batch size")
    for side, css in zip(sides, _COLOURS, strict=False):
        plot.line([float(b) for b, _ in side], [step.value for _, step in side], css)
        plot.dots([(b, step.value, f"batch {b}: {ms(step.value)}") for b, step in side], css, 4)
        for batch, step in side:
            plot.upright(batch, step.low, step.high, css)
    legend = list(zip(report.names, _COLOURS, strict=False))
    remark = "Mean time per token after the first"
    return Figure("steps", "Time per token", remark, legend, plot.render())


def _block_pairs(report: CompareReport, batch: BatchComparison) -> Figure:
    """Distributions of time per token on both sides."""
    a, b = batch.a.tpot_cdf_s, batch.b.tpot_cdf_s
    plot = Plot(logarithmic([*a, *b], "time per token, log scale"), _SHARE, "Time per token")
    for curve, css in zip((a, b), _COLOURS, strict=False):
        plot.line(curve, [index / (len(curve) - 1) for index in range(len(curve))], css)
    return Figure(
        f"tpot-{batch.batch}",
        f"Time per token, {batch.batch} under way",
        f"Share of replies; {batch.num_blocks} blocks a side",
        list(zip(report.names, _COLOURS, strict=False)),
        plot.render(),
    )


def of_knee(report: KneeReport) -> list[Figure]:
    """The pictures of a search for the knee."""
    probes = sorted(
        (probe for probe in report.probes if not probe.void), key=lambda probe: probe.rate
    )
    rates = [probe.rate for probe in probes]
    x = logarithmic(rates, "requests per second, log scale", format=plain)
    shares = Plot(x, Axis(0.0, 1.05, format=percent), "Share within the SLO by rate")
    shares.line(rates, [probe.good_share for probe in probes], "c0")
    shares.dots(
        [(p.rate, p.good_share, f"{p.rate:.2f}/s: {p.good_share:.1%}") for p in probes], "c0", 4
    )
    shares.mark_y(report.goal, f"goal {report.goal:.0%}")
    latencies = _knee_latencies(x, report)
    if report.knee_per_s is not None:
        shares.mark_x(report.knee_per_s, f"knee {report.knee_per_s:.2f}/s")
    return [
        Figure("goodput", "Within the SLO", "Share of requests, by rate", [], shares.render()),
        latencies,
    ]


def _knee_latencies(x: Axis, report: KneeReport) -> Figure:
    curves = []
    for name in ("ttft_p50_s", "ttft_p99_s"):
        found = [(probe.rate, getattr(probe, name)) for probe in report.probes if not probe.void]
        curves.append(sorted((rate, value) for rate, value in found if value is not None))
    plot = Plot(x, logarithmic(v for curve in curves for _, v in curve), "Latency by rate")
    for curve, css in zip(curves, _COLOURS, strict=False):
        plot.line([rate for rate, _ in curve], [value for _, value in curve], css)
        plot.dots([(rate, value, f"{rate:.2f}/s: {ms(value)}") for rate, value in curve], css, 4)
    legend = [("p50", "c0"), ("p99", "c1")]
    return Figure("knee-ttft", "Time to first token", "By rate", legend, plot.render())


def _ok(
    points: Points,
    values: Sequence[float | None],
    column: Sequence[str | None] | None = None,
    wanted: str | None = None,
) -> list[float]:
    """The values of replies that are ok, of those where `column` is `wanted` if one is given."""
    chosen = column if column is not None else [wanted] * len(values)
    return [
        value
        for value, outcome, entry in zip(values, points.outcome, chosen, strict=True)
        if value is not None and outcome == "ok" and entry == wanted
    ]


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _thinned(dots: Sequence[_Dot]) -> Sequence[_Dot]:
    """At most _MAX_DOTS of them, evenly."""
    return dots[:: math.ceil(len(dots) / _MAX_DOTS) or 1]


def _rolling(times: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Medians over a thirtieth of the time each, where there are values."""
    if not times:
        return [], []
    edges = np.linspace(min(times), max(times) + 1e-9, 31)
    where = np.digitize(times, edges)
    column = np.asarray(values)
    found = [
        (float((edges[i - 1] + edges[i]) / 2), float(np.median(column[where == i])))
        for i in range(1, len(edges))
        if (where == i).any()
    ]
    return [time for time, _ in found], [value for _, value in found]
