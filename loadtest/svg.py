"""A small plotter: axes, lines, bands, dots and bars as SVG text, coloured by the page's CSS."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 40
_BAR_ROW = 20  # height of one bar and the gap below it
_LEAST = 1e-12  # no figure here is smaller and means anything
_BAR_LABEL = 150  # room for its name
_BAR_ROOM = WIDTH - _BAR_LABEL - 76  # and for itself; the rest is the note's
_NAME_CHARS = 22

Format = Callable[[float], str]


def plain(value: float) -> str:
    """A number with as few digits as will do."""
    return f"{value:.6g}"


def seconds(value: float) -> str:
    """A time with its unit."""
    if value == 0:
        return "0"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= unit * 0.9999:
            return f"{value / unit:.4g} {name}"
    return f"{value / 1e-9:.4g} ns"


def percent(value: float) -> str:
    return f"{value * 100:.4g}%"


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, from `low` to `high`."""

    low: float
    high: float
    label: str = ""
    is_log: bool = False
    format: Format = plain

    def place(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`. On a log axis nothing lies below `low`."""
        if not self.is_log:
            return (value - self.low) / (self.high - self.low)
        value = max(value, self.low)
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)


def linear(
    values: Iterable[float], label: str = "", *, zero: bool = True, format: Format = plain
) -> Axis:
    """A linear axis that holds all the values, from or around zero if `zero`."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= _LEAST * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    pad = 0.05 * (high - low)
    return Axis(low if zero and low == 0 else low - pad, high + pad, label, format=format)


def logarithmic(values: Iterable[float], label: str = "", *, format: Format = seconds) -> Axis:
    """A log axis that holds all the values above zero, by more than rounding."""
    above = [value for value in values if value > _LEAST and math.isfinite(value)]
    low, high = min(above, default=1e-3), max(above, default=1.0)
    low, high = low / 1.15, high * 1.15
    if high / low < 4:  # a narrow span would blow noise up
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    return Axis(low, high, label, is_log=True, format=format)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


class Plot:
    """Axes, and what is drawn between them, in the order of drawing."""

    def __init__(self, x: Axis, y: Axis, label: str) -> None:
        """`label` says what the picture shows, for those who cannot see it."""
        self._x, self._y, self._label = x, y, label
        self._parts: list[str] = []

    def line(self, xs: Sequence[float], ys: Sequence[float], css: str) -> None:
        """A line through the points."""
        if xs:
            self._parts.append(f'<polyline class="line {css}" points="{self._points(xs, ys)}"/>')

    def area(self, xs: Sequence[float], ys: Sequence[float], css: str) -> None:
        """A line, and what lies between it and the bottom."""
        if xs:
            bottom = self._y.low
            closed = self._points([xs[0], *xs, xs[-1]], [bottom, *ys, bottom])
            self._parts.append(f'<polygon class="area {css}" points="{closed}"/>')
            self.line(xs, ys, css)

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], css: str
    ) -> None:
        """What lies between two lines."""
        there = self._points(xs, highs)
        back = self._points(list(reversed(xs)), list(reversed(lows)))
        self._parts.append(f'<polygon class="area {css}" points="{there} {back}"/>')

    def dots(self, points: Iterable[tuple[float, float, str]], css: str, size: float = 2.6) -> None:
        """Dots at x and y, each with a text that shows when it is pointed at."""
        for x, y, title in points:
            at_x, at_y = self._at(x, y)
            self._parts.append(
                f'<circle class="dot {css}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{size}">'
                f"<title>{html.escape(title)}</title></circle>"
            )

    def crosses(self, xs: Iterable[tuple[float, str]], css: str) -> None:
        """Crosses along the top, for what has no height."""
        for x, title in xs:
            at_x, _ = self._at(x, self._y.high)
            self._parts.append(
                f'<path class="cross {css}" d="M{at_x - 3:.1f} {_TOP + 2}l6 6m0 -6l-6 6">'
                f"<title>{html.escape(title)}</title></path>"
            )

    def upright(self, x: float, low: float, high: float, css: str) -> None:
        """An upright stroke from one y to another."""
        at_x, bottom = self._at(x, max(low, self._y.low))
        _, top = self._at(x, min(high, self._y.high))
        self._parts.append(
            f'<line class="whisker {css}" x1="{at_x:.1f}" y1="{bottom:.1f}" '
            f'x2="{at_x:.1f}" y2="{top:.1f}"/>'
        )

    def mark_x(self, x: float, text: str) -> None:
        """A dashed upright line with a word beside it."""
        at_x, _ = self._at(x, self._y.low)
        near_right = at_x > WIDTH * 0.75
        anchor, offset = ("end", -5) if near_right else ("start", 5)
        self._parts.append(
            f'<line class="mark" x1="{at_x:.1f}" y1="{_TOP}" x2="{at_x:.1f}" y2="{_floor()}"/>'
            f'<text class="mark-text" x="{at_x + offset:.1f}" y="{_floor() - 8}" '
            f'text-anchor="{anchor}">{html.escape(text)}</text>'
        )

    def mark_y(self, y: float, text: str = "") -> None:
        """A dashed level line, with words above it if there are any."""
        _, at_y = self._at(self._x.low, y)
        self._parts.append(
            f'<line class="mark" x1="{_LEFT}" y1="{at_y:.1f}" '
            f'x2="{WIDTH - _RIGHT}" y2="{at_y:.1f}"/>'
        )
        if text:
            self._parts.append(
                f'<text class="mark-text" x="{WIDTH - _RIGHT - 4}" y="{at_y - 5:.1f}" '
                f'text-anchor="end">{html.escape(text)}</text>'
            )

    def render(self) -> str:
        """The picture."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{html.escape(self._label)}">'
            f"{self._grid()}{''.join(self._parts)}</svg>"
        )

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + self._x.place(x) * (WIDTH - _LEFT - _RIGHT),
            _floor() - self._y.place(y) * (_floor() - _TOP),
        )

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        places = (self._at(x, y) for x, y in zip(xs, ys, strict=True))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)

    def _grid(self) -> str:
        parts = []
        for tick in self._x.ticks():
            at_x, _ = self._at(tick, self._y.low)
            parts.append(
                f'<line class="grid" x1="{at_x:.1f}" y1="{_TOP}" x2="{at_x:.1f}" y2="{_floor()}"/>'
                f'<text class="tick" x="{at_x:.1f}" y="{_floor() + 15}" text-anchor="middle">'
                f"{html.escape(self._x.format(tick))}</text>"
            )
        for tick in self._y.ticks():
            _, at_y = self._at(self._x.low, tick)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" y1="{at_y:.1f}" x2="{WIDTH - _RIGHT}" '
                f'y2="{at_y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{at_y + 4:.1f}" text-anchor="end">'
                f"{html.escape(self._y.format(tick))}</text>"
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{html.escape(self._x.label)}</text>"
        )
        return "".join(parts)


def _floor() -> int:
    return HEIGHT - _BOTTOM


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a bar chart."""

    name: str
    value: float | None  # None: nothing was measured
    whisker: float | None  # a stroke to here
    note: str  # at the right end


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a chart of intervals."""

    name: str
    value: float
    low: float
    high: float
    css: str
    note: str


def bars(rows: Sequence[Bar], axis: Axis, label: str) -> str:
    """Level bars from zero, a row each, with a whisker and a note."""
    return _rows(
        [(row.name, row.note) for row in rows], [_bar(row, axis) for row in rows], axis, label
    )


def spans(rows: Sequence[Span], axis: Axis, label: str) -> str:
    """Values with their intervals, a row each, and an upright line at zero."""
    zero = _across(axis, 0.0)
    floor = _TOP + len(rows) * _BAR_ROW
    mark = f'<line class="mark" x1="{zero:.1f}" y1="{_TOP}" x2="{zero:.1f}" y2="{floor}"/>'
    drawn = [_span(row, axis) for row in rows]
    return _rows([(row.name, row.note) for row in rows], drawn, axis, label, below=mark)


def _rows(
    words: Sequence[tuple[str, str]],
    drawn: Sequence[str],
    axis: Axis,
    label: str,
    *,
    below: str = "",
) -> str:
    """Rows with a name at the left and a note at the right; what is drawn has its middle at 0."""
    height = _TOP + len(drawn) * _BAR_ROW + _BOTTOM
    floor = height - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_across(axis, tick):.1f}" y1="{_TOP}" '
        f'x2="{_across(axis, tick):.1f}" y2="{floor}"/>'
        f'<text class="tick" x="{_across(axis, tick):.1f}" y="{floor + 15}" text-anchor="middle">'
        f"{html.escape(axis.format(tick))}</text>"
        for tick in axis.ticks()
    ]
    parts.append(below)
    for index, ((name, note), shapes) in enumerate(zip(words, drawn, strict=True)):
        middle = _TOP + (index + 0.5) * _BAR_ROW
        parts.append(f'<g transform="translate(0 {middle:.1f})">{_words(name, note)}{shapes}</g>')
    parts.append(
        f'<text class="axis" x="{_BAR_LABEL + _BAR_ROOM / 2:.0f}" y="{height - 6}" '
        f'text-anchor="middle">{html.escape(axis.label)}</text>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _across(axis: Axis, value: float) -> float:
    return _BAR_LABEL + axis.place(value) * _BAR_ROOM


def _words(name: str, note: str) -> str:
    short = name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"
    return (
        f'<text class="name" x="{_BAR_LABEL - 8}" y="4" text-anchor="end">'
        f"{html.escape(short)}<title>{html.escape(name)}</title></text>"
        f'<text class="note" x="{WIDTH - 4}" y="4" text-anchor="end">{html.escape(note)}</text>'
    )


def _bar(row: Bar, axis: Axis) -> str:
    if row.value is None:
        return ""
    left, right = _across(axis, 0.0), max(_across(axis, row.value), _BAR_LABEL + 1.0)
    half = _BAR_ROW / 2 - 3
    drawn = (
        f'<rect class="bar" x="{left:.1f}" y="{-half}" width="{right - left:.1f}" '
        f'height="{2 * half}" rx="2"><title>{html.escape(row.name)}</title></rect>'
    )
    if row.whisker is not None:
        end = _across(axis, row.whisker)
        drawn += f'<path class="whisker c1" d="M{right:.1f} 0H{end:.1f}m0 -4v8"/>'
    return drawn


def _span(row: Span, axis: Axis) -> str:
    low, value, high = (_across(axis, each) for each in (row.low, row.value, row.high))
    return (
        f'<path class="whisker {row.css}" d="M{low:.1f} -4v8m0 -4H{high:.1f}m0 -4v8"/>'
        f'<circle class="dot {row.css}" cx="{value:.1f}" cy="0" r="4">'
        f"<title>{html.escape(row.name)}</title></circle>"
    )
