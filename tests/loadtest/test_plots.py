"""What each picture shows of a report whose figures are known."""

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import msgspec
import pytest

from loadtest import plots
from loadtest.plots import Figure
from loadtest.report import Points, RunReport
from loadtest.stats import Interval
from tests.loadtest.making import line, lines, record, run_report
from tests.loadtest.test_page import a_comparison, a_knee, a_run


def figure(drawn: list[Figure], key: str) -> Figure:
    (found,) = [each for each in drawn if each.key == key]
    return found


def shapes(drawn: Figure, tag: str, css: str = "") -> list[ET.Element]:
    """Elements of a kind whose class holds `css`."""
    root = ET.fromstring(drawn.svg)
    return [
        each for each in root.iter(tag) if css in each.attrib.get("class", "").split() or not css
    ]


def titles(drawn: Figure, tag: str = "circle") -> list[str]:
    return [next(each.iter("title")).text or "" for each in shapes(drawn, tag)]


def points_of(element: ET.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in element.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def run_of(**columns: list[Any]) -> RunReport:
    """A report of as many requests as the columns have, a second apart."""
    count = len(next(iter(columns.values())))
    records = [
        record(
            index,
            intended_s=float(index),
            **{name: values[index] for name, values in columns.items()},
        )
        for index in range(count)
    ]
    return run_report(records, lines(count, every_s=1.0))


def test_a_run_has_six_pictures_each_with_words() -> None:
    drawn = plots.of_run(_run())
    assert len({each.key for each in drawn}) == len(drawn) == 6
    for each in drawn:
        assert each.title
        assert each.remark
        ET.fromstring(each.svg)


def _run() -> RunReport:
    report = a_run()
    assert isinstance(report, RunReport)
    return report


def test_a_cumulative_curve_rises_from_nothing_to_all_and_never_turns_back() -> None:
    (curve,) = shapes(figure(plots.of_run(run_of(ttft_s=[0.1, 0.2, 0.4])), "ttft-cdf"), "polyline")
    places = points_of(curve)
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in itertools.pairwise(places))
    assert places[0][1] > places[-1][1]


def test_a_faster_population_lies_further_left() -> None:
    report = run_of(ttft_s=[0.1, 0.1, 1.0, 1.0], tier=["gpu", "gpu", "disk", "disk"])
    drawn = figure(plots.of_run(report), "ttft-cdf")
    assert [name for name, _ in drawn.legend] == ["all", "tier disk", "tier gpu"]
    _, disk, gpu = shapes(drawn, "polyline")
    assert max(x for x, _ in points_of(gpu)) < min(x for x, _ in points_of(disk))


def test_a_population_that_is_everybody_is_not_drawn_twice() -> None:
    drawn = figure(plots.of_run(run_of(path=["adapter"] * 3)), "ttft-cdf")
    assert [name for name, _ in drawn.legend] == ["all"]


def test_replies_that_are_not_ok_are_in_no_latency() -> None:
    report = run_of(ttft_s=[0.1, 50.0], outcome=["ok", "wrong"])
    (curve,) = shapes(figure(plots.of_run(report), "ttft-cdf"), "polyline")
    assert len({x for x, _ in points_of(curve)}) == 1


def test_over_time_each_ok_reply_is_a_dot_and_every_other_a_cross() -> None:
    outcomes = ["ok", "rejected", "ok", "cut", "ok"]
    drawn = figure(plots.of_run(run_of(outcome=outcomes)), "ttft-time")
    assert titles(drawn) == ["a: 100 ms"] * 3
    assert titles(drawn, "path") == ["a: rejected", "a: cut"]
    assert ("2 not ok", "bad") in drawn.legend


def test_dots_are_coloured_by_path() -> None:
    drawn = figure(plots.of_run(run_of(path=["base", "merged", "base"])), "ttft-time")
    assert [name for name, _ in drawn.legend] == ["base", "merged", "median around"]
    assert len(shapes(drawn, "circle", "c0")) == 2
    assert len(shapes(drawn, "circle", "c1")) == 1


def test_many_dots_are_thinned_and_few_are_not() -> None:
    dots = [(float(index), 0.0, "") for index in range(10_000)]
    thin = list(plots._thinned(dots))
    assert len(thin) == 2500
    assert thin[0] == dots[0]
    assert list(plots._thinned(dots[:3000])) == dots[:3000]
    assert list(plots._thinned([])) == []


def test_the_running_median_follows_the_values_of_its_time() -> None:
    times, medians = plots._rolling([0.0, 0.1, 0.2, 60.0], [1.0, 5.0, 2.0, 9.0])
    assert medians == [2.0, 9.0]
    assert times[0] < 3
    assert times[1] > 57
    assert plots._rolling([], []) == ([], [])


def test_requests_under_way_are_counted_from_when_they_were_due_to_their_end() -> None:
    report = run_of(e2e_s=[2.5, 0.5, 0.25])  # due at 0, 1 and 2
    drawn = figure(plots.of_run(report), "in-flight")
    (line_,) = shapes(drawn, "polyline", "c2")
    heights = sorted({round(y, 1) for _, y in points_of(line_)}, reverse=True)
    assert len(heights) == 3  # none, one and two under way
    (area,) = shapes(drawn, "polygon", "area")
    assert points_of(area)[0][1] == points_of(area)[-1][1] == heights[0]


def test_a_long_runs_pictures_stay_small_and_show_its_peak_and_its_last_failure() -> None:
    trace = lines(8000, every_s=0.1)
    records = [record(i, intended_s=one.time_s, outcome="cut") for i, one in enumerate(trace)]
    for each in records[:50]:
        each.over_s = 400.0  # fifty under way until half the run is over
    drawn = plots.of_run(run_report(records, trace))
    under_way = figure(drawn, "in-flight")
    (line_,) = shapes(under_way, "polyline", "c2")
    places = points_of(line_)
    assert len(places) <= 3000
    half = [y for x, y in places if x < places[len(places) // 2][0]]
    assert min(y for _, y in places) == min(half)
    crosses = shapes(figure(drawn, "ttft-time"), "path", "cross")
    assert len(crosses) <= 3000
    last = float(crosses[-1].attrib["d"].split()[0].removeprefix("M"))
    assert last > 500  # at the right end


def test_a_request_that_never_got_a_word_is_under_way_until_our_limit() -> None:
    trace = lines(2)
    hung = record(1, outcome="cut", ttft_s=None, e2e_s=None, over_s=120.0)
    drawn = figure(plots.of_run(run_report([record(0), hung], trace)), "in-flight")
    (line_,) = shapes(drawn, "polyline", "c2")
    heights = [y for _, y in points_of(line_)]
    assert points_of(line_)[-2][1] < heights[0]  # one is under way to the right end
    assert points_of(line_)[-1][0] - points_of(line_)[-3][0] > 400


def test_a_refused_request_is_under_way_until_it_was_sent() -> None:
    report = run_of(e2e_s=[None], ttft_s=[None], outcome=["rejected"], late_s=[0.5])
    ET.fromstring(figure(plots.of_run(report), "in-flight").svg)


def test_adapters_are_bars_the_most_popular_first() -> None:
    trace = [line(index * 0.1, model) for index, model in enumerate(["b", "a", "a", "c", "a", "c"])]
    report = run_report([record(i, intended_s=one.time_s) for i, one in enumerate(trace)], trace)
    drawn = figure(plots.of_run(report), "adapters")
    names = [(each.text or "") for each in shapes(drawn, "text", "name")]
    notes = [(each.text or "") for each in shapes(drawn, "text", "note")]
    assert names == ["a", "c", "b"]
    assert notes == ["3 of 3", "2 of 2", "1 of 1"]


def test_what_is_past_the_longest_list_of_adapters_is_said() -> None:
    trace = [line(index * 0.1, f"m{index:02}") for index in range(30)]
    report = run_report([record(i, intended_s=one.time_s) for i, one in enumerate(trace)], trace)
    drawn = figure(plots.of_run(report), "adapters")
    assert len(shapes(drawn, "rect")) == 24
    assert "6 more in the table" in drawn.remark


def test_lateness_is_drawn_beside_its_limit() -> None:
    drawn = figure(plots.of_run(run_of(late_s=[0.001, 0.002, 0.02])), "lateness")
    (mark,) = shapes(drawn, "line", "mark")
    (curve,) = shapes(drawn, "polyline")
    limit = float(mark.attrib["x1"])
    xs = [x for x, _ in points_of(curve)]
    assert min(xs) < limit < max(xs)
    assert "p99 past 5 ms is void" in drawn.svg


def test_the_break_even_curve_has_a_band_and_a_mark_for_each_batch() -> None:
    report = a_comparison()
    drawn = figure(plots.of_comparison(report), "break-even")
    assert len(shapes(drawn, "polygon", "area")) == len(shapes(drawn, "polyline")) == 3
    pays = [curve for curve in report.curves if curve.break_even is not None]
    assert len(shapes(drawn, "circle")) == len(pays) > 0
    (zero,) = shapes(drawn, "line", "mark")
    assert zero.attrib["y1"] == zero.attrib["y2"]
    assert not shapes(drawn, "text", "mark-text")  # it would lie where the curves end
    assert "(dashed: none)" in drawn.remark
    assert "10% of the KV cache" in drawn.remark
    for curve, (name, _) in zip(report.curves, drawn.legend, strict=True):
        assert name.startswith(f"{curve.batch} under way: pays from")


def test_a_mark_lies_where_its_curve_crosses_zero() -> None:
    report = a_comparison()
    drawn = figure(plots.of_comparison(report), "break-even")
    (zero,) = shapes(drawn, "line", "mark")
    for dot in shapes(drawn, "circle"):
        assert float(dot.attrib["cy"]) == pytest.approx(float(zero.attrib["y1"]), abs=0.2)


def test_differences_are_coloured_by_what_they_say() -> None:
    report = a_comparison()
    (batch, *_) = report.batches

    def with_interval(low: float, high: float) -> list[ET.Element]:
        difference = msgspec.structs.replace(
            batch.differences[0], a=1.0, difference=Interval((low + high) / 2, low, high)
        )
        one = msgspec.structs.replace(batch, differences=[difference])
        drawn = plots.of_comparison(msgspec.structs.replace(report, batches=[one]))
        return shapes(figure(drawn, "differences"), "circle")

    assert with_interval(-0.3, -0.1)[0].attrib["class"] == "dot c2"  # faster
    assert with_interval(0.1, 0.3)[0].attrib["class"] == "dot bad"  # slower
    assert with_interval(-0.1, 0.3)[0].attrib["class"] == "dot "  # not told apart


def test_time_per_token_is_drawn_for_both_sides_at_each_batch() -> None:
    drawn = figure(plots.of_comparison(a_comparison()), "steps")
    assert [name for name, _ in drawn.legend] == ["adapter", "merged"]
    for css in ("c0", "c1"):
        assert len(shapes(drawn, "circle", css)) == 3
        assert len(shapes(drawn, "line", css)) == 3  # their intervals
    adapter, merged = shapes(drawn, "polyline")
    assert points_of(adapter)[0][1] < points_of(merged)[0][1]  # the slower is higher up


def test_a_knees_rates_are_drawn_in_order_without_the_void_ones() -> None:
    drawn = figure(plots.of_knee(a_knee()), "goodput")
    assert titles(drawn) == ["1.00/s: 100.0%", "2.00/s: 97.0%", "4.00/s: 50.0%"]
    (curve,) = shapes(drawn, "polyline")
    xs = [x for x, _ in points_of(curve)]
    assert xs == sorted(xs)
    assert len(shapes(drawn, "line", "mark")) == 2  # the goal and the knee


def test_without_a_knee_none_is_marked() -> None:
    none = msgspec.structs.replace(a_knee(), knee_per_s=None)
    drawn = figure(plots.of_knee(none), "goodput")
    assert len(shapes(drawn, "line", "mark")) == 1
    assert "knee" not in drawn.svg.replace("knee-ttft", "")


def test_a_rate_at_which_nothing_came_has_no_latency_to_draw() -> None:
    knee = a_knee()
    probes = [
        msgspec.structs.replace(knee.probes[0], rate=8.0, ttft_p50_s=None, ttft_p99_s=None),
        *knee.probes,
    ]
    drawn = figure(plots.of_knee(msgspec.structs.replace(knee, probes=probes)), "knee-ttft")
    assert len(titles(drawn)) == 6


def test_only_the_wanted_population_is_taken() -> None:
    points = Points(
        intended_s=[0.0] * 4, late_s=[0.0] * 4, over_s=[0.0] * 4,
        ttft_s=[1.0, 2.0, 3.0, None], e2e_s=[None] * 4, tpot_s=[None] * 4,
        outcome=["ok", "ok", "cut", "ok"], model=["m"] * 4,
        path=["a", "b", "a", "a"], tier=[None] * 4,
    )  # fmt: skip
    assert plots._ok(points, points.ttft_s) == [1.0, 2.0]
    assert plots._ok(points, points.ttft_s, points.path, "a") == [1.0]
