"""Pictures: things lie where their values say, and nothing breaks the page."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.svg import (
    HEIGHT,
    WIDTH,
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


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def plot() -> Plot:
    return Plot(Axis(0.0, 10.0, "x"), Axis(0.0, 1.0), "a picture")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "12.3 ms"), (2.5, "2.5 s"), (0.00005, "50 µs"), (1e-3, "1 ms"),
     (2e-9, "2 ns")],
)  # fmt: skip
def test_times_have_their_unit(value: float, text: str) -> None:
    assert seconds(value) == text


def test_numbers_and_shares_are_short() -> None:
    assert plain(0.30000000000000004) == "0.3"
    assert percent(0.07) == "7%"


def test_values_lie_between_the_ends_of_a_linear_and_of_a_log_axis() -> None:
    axis = Axis(0.0, 10.0)
    assert [axis.place(value) for value in (0.0, 5.0, 10.0)] == [0.0, 0.5, 1.0]
    log = Axis(0.001, 1.0, is_log=True)
    assert log.place(0.001) == 0
    assert log.place(1.0) == pytest.approx(1.0)
    assert log.place(0.0316227766) == pytest.approx(0.5)
    assert log.place(0.0) == 0  # below the lowest


@given(st.lists(st.floats(-1e6, 1e6), max_size=20))
def test_a_linear_axis_holds_all_its_values_with_a_few_round_ticks(values: list[float]) -> None:
    axis = linear(values)
    assert all(axis.low <= value <= axis.high for value in values)
    assert 2 <= len(axis.ticks()) <= 12
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())


@given(st.lists(st.just(0.0) | st.floats(1e-9, 1e4), max_size=20))
def test_a_log_axis_holds_all_values_above_zero_with_a_few_ticks(values: list[float]) -> None:
    axis = logarithmic(values)
    assert all(axis.low <= value <= axis.high for value in values if value > 0)
    assert axis.low > 0
    assert 1 <= len(axis.ticks()) <= 15


def test_ticks_are_round() -> None:
    assert Axis(0.0, 1.0).ticks() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Axis(0.01, 1.0, is_log=True).ticks() == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def test_a_line_goes_through_its_points_up_being_more() -> None:
    drawn = plot()
    drawn.line([0.0, 10.0], [0.0, 1.0], "c0")
    (line,) = [each for each in parsed(drawn.render()) if each.tag == "polyline"]
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.attrib["points"].split())
    assert x0 < x1
    assert y0 > y1
    assert line.attrib["class"] == "line c0"


def test_everything_lies_within_the_picture() -> None:
    drawn = plot()
    drawn.area([0.0, 10.0], [0.0, 1.0], "c0")
    drawn.band([0.0, 10.0], [0.1, 0.2], [0.3, 0.4], "c1")
    drawn.dots([(5.0, 0.5, "five")], "c2")
    drawn.crosses([(1.0, "bad")], "bad")
    drawn.upright(5.0, -5.0, 5.0, "c3")
    drawn.mark_x(9.0, "here")
    drawn.mark_y(0.5, "there")
    root = parsed(drawn.render())
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.attrib.get(name, 0)) <= WIDTH
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.attrib.get(name, 0)) <= HEIGHT
    texts = "".join(root.itertext())
    for word in ("five", "bad", "here", "there", "x"):
        assert word in texts


def test_what_a_name_holds_is_text_and_never_markup() -> None:
    evil = '</svg><script>alert("x")</script>'
    drawn = Plot(Axis(0.0, 1.0, evil), Axis(0.0, 1.0), evil)
    drawn.dots([(0.5, 0.5, evil)], "c0")
    drawn.mark_x(0.5, evil)
    drawn.mark_y(0.5, evil)
    drawn.crosses([(0.5, evil)], "c0")
    axis = linear([2.0], evil)
    rows = bars([Bar(evil, 1.0, 2.0, evil)], axis, evil)
    for svg in (drawn.render(), rows, spans([Span(evil, 1.0, 0.0, 2.0, "c0", evil)], axis, evil)):
        assert "<script" not in svg
        parsed(svg)


def test_a_bar_is_as_long_as_its_value_and_one_without_a_value_is_not_drawn() -> None:
    rows = [Bar("one", 1.0, 1.5, "n"), Bar("two", 2.0, None, "n"), Bar("none", None, None, "0 ok")]
    root = parsed(bars(rows, linear([2.0]), "bars"))
    widths = [float(each.attrib["width"]) for each in root.iter("rect")]
    assert len(widths) == 2
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert len([each for each in root.iter("path") if "whisker" in each.attrib["class"]]) == 1
    assert re.search("0 ok", "".join(root.itertext()))


def test_a_span_lies_between_its_ends_beside_zero() -> None:
    axis = linear([-0.5, 0.5])
    root = parsed(spans([Span("one", -0.2, -0.3, -0.1, "c2", "-20 %")], axis, "spans"))
    (stroke,) = [each for each in root.iter("path") if each.attrib["class"] == "whisker c2"]
    low, high = re.findall(r"(?:M|H)([0-9.]+)", stroke.attrib["d"])
    (dot,) = root.iter("circle")
    (mark,) = [each for each in root.iter("line") if each.attrib["class"] == "mark"]
    assert float(low) < float(dot.attrib["cx"]) < float(high) < float(mark.attrib["x1"])
    assert "-20 %" in "".join(root.itertext())


def test_a_long_name_is_cut_and_whole_when_pointed_at() -> None:
    name = "a" * 40
    root = parsed(bars([Bar(name, 1.0, None, "")], linear([1.0]), "bars"))
    (label,) = [each for each in root.iter("text") if each.attrib["class"] == "name"]
    assert label.text == "a" * 21 + "…"
    assert next(label.iter("title")).text == name


def test_nothing_to_draw_is_an_empty_picture() -> None:
    drawn = Plot(linear([]), logarithmic([]), "empty")
    drawn.line([], [], "c0")
    drawn.area([], [], "c0")
    parsed(drawn.render())
    parsed(bars([], linear([]), "empty"))


@pytest.mark.parametrize("values", [[5e-324], [5e-324, 1.0], [0.0], [1.0, 1.0 + 1e-16], []])
def test_an_axis_of_next_to_nothing_still_has_ticks(values: list[float]) -> None:
    for axis in (linear(values, zero=False), linear(values), logarithmic(values)):
        assert axis.low < axis.high
        assert axis.ticks()
