"""What a run shows in the terminal while it lasts, and what it says at the end."""

from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loadtest.figures import Latency
from loadtest.record import OUTCOMES, Record
from loadtest.report import CompareReport, KneeReport, Report, RunReport
from loadtest.stats import Interval, quantiles

_RECENT = 200  # requests that the live figures are of
_SPARKS = " ▁▂▃▄▅▆▇█"
_STYLES = {"ok": "green", "rejected": "yellow", "failed": "red", "cut": "red", "wrong": "bold red"}


class LiveProgress:
    """A Watcher that draws; nothing is drawn where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("Starting", total=None)
        self._counts: Counter[str] = Counter()
        self._recent: deque[Record] = deque(maxlen=_RECENT)
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=4,
            transient=True,
            auto_refresh=console.is_terminal,
        )
        self._is_shown = console.is_terminal

    def __enter__(self) -> "LiveProgress":
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def stage(self, title: str, total: int) -> None:
        self._counts.clear()
        self._recent.clear()
        self._bar.reset(self._task, description=escape(title), total=total)

    def records(self, records: Sequence[Record]) -> None:
        self._counts.update(record.outcome for record in records)
        self._recent.extend(records)
        self._bar.advance(self._task, len(records))

    def step(self) -> None:
        self._bar.advance(self._task)

    def _render(self) -> RenderableType:
        if not self._counts:
            return self._bar
        return Group(self._bar, self._outcomes(), self._latencies())

    def _outcomes(self) -> Text:
        text = Text("  ")
        for outcome in OUTCOMES:
            if self._counts[outcome]:
                text.append(f"{self._counts[outcome]} {outcome}  ", style=_STYLES[outcome])
        return text

    def _latencies(self) -> Text:
        times = [record.ttft_s for record in self._recent if record.ttft_s is not None]
        found = quantiles(times)
        text = Text(f"  TTFT p50 {ms(found.p50)}  p99 {ms(found.p99)}  ")
        text.append(sparkline(times[-40:]), style="cyan")
        return text


def sparkline(values: Sequence[float]) -> str:
    """The values as bars a character high."""
    highest = max(values, default=0.0)
    if highest <= 0:
        return ""
    return "".join(_SPARKS[1 + int(value / highest * (len(_SPARKS) - 2))] for value in values)


def ms(seconds: float | None) -> str:
    """A time as people read it; less than the microsecond that records are rounded to is 0."""
    if seconds is None:
        return "-"
    if abs(seconds) >= 0.9995:
        return f"{seconds:.2f} s"
    return f"{round(seconds * 1e3, 3) + 0.0:.3g} ms"


def say(report: Report, console: Console) -> None:
    """Print what a report comes to."""
    if isinstance(report, RunReport):
        _say_run(report, console)
    elif isinstance(report, CompareReport):
        _say_compare(report, console)
    else:
        _say_knee(report, console)


def _say_run(report: RunReport, console: Console) -> None:
    counted = ", ".join(f"{count} {name}" for name, count in report.outcomes.items() if count)
    table = Table(title=f"{report.num_over} requests in {report.elapsed_s:.1f} s: {counted}")
    for column in ("", "ok", "TTFT p50", "p90", "p99", "gap p50", "p99", "e2e p50"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    parts = {"all": report.total, **report.by_path}
    parts |= {f"tier {tier}": part for tier, part in report.by_tier.items()}
    for name, part in parts.items():
        table.add_row(escape(name), f"{part.num_requests:,}", *_latency_cells(part))
    console.print(table)
    good, fair, again = report.goodput, report.fairness, report.recheck
    _line(console, f"Within the SLO: {good.share:.1%}, {good.per_s:.2f} requests per second")
    if fair.jain is not None:
        worst, median = ms(fair.worst_decile_ttft_s), ms(fair.median_ttft_s)
        _line(
            console,
            f"Between adapters: Jain index {fair.jain:.3f}; TTFT {median}, worst tenth {worst}",
        )
    _line(
        console,
        f"Digests: {report.identity.num_checked} checked, {report.identity.num_mismatched} wrong. "
        f"Asked again alone: {again.num_asked}, {again.num_same} the same, "
        f"{again.num_parted} parted, {again.num_foreign} foreign",
    )
    for reason, count in report.reasons.items():
        _line(console, f"{count} x {reason}", style="yellow")
    _say_void(report.checks.void, console)


def _latency_cells(part: Latency) -> list[str]:
    ttft, itl = part.ttft, part.itl
    values = (ttft.p50, ttft.p90, ttft.p99, itl.p50, itl.p99, part.e2e.p50)
    return [ms(value) for value in values]


def _say_compare(report: CompareReport, console: Console) -> None:
    a, b = report.names
    table = Table(title=escape(f"{b} minus {a}, paired, 95% intervals"))
    for column in ("batch", "", a, "difference", "from", "to"):
        table.add_column(escape(column), justify="right" if column else "left")
    for batch in report.batches:
        for each in batch.differences:
            table.add_row(
                str(batch.batch), each.figure, ms(each.a), *_interval_cells(each.difference)
            )
    console.print(table)
    for batch in report.batches:
        times = batch.speedup
        found = f"{times.value:.2f} x as fast as {a} ({times.low:.2f} to {times.high:.2f})"
        _line(console, f"Batch {batch.batch}: {b}'s tokens come {found}")
    for curve in report.curves:
        at = "never" if curve.break_even is None else f"from {curve.break_even:.0%} of traffic on"
        _line(console, f"Batch {curve.batch}: {b} pays {at}")
    _say_void(report.void, console)


def _interval_cells(interval: Interval) -> list[str]:
    style = "bold" if interval.is_clear else "dim"
    return [f"[{style}]{ms(value)}[/]" for value in (interval.value, interval.low, interval.high)]


def _say_knee(report: KneeReport, console: Console) -> None:
    table = Table(title="Within the SLO, by rate")
    for column in ("requests/s", "share", "TTFT p50", "TTFT p99"):
        table.add_column(column, justify="right")
    for probe in sorted(report.probes, key=lambda probe: probe.rate):
        share = "void" if probe.void else f"{probe.good_share:.1%}"
        table.add_row(f"{probe.rate:.2f}", share, ms(probe.ttft_p50_s), ms(probe.ttft_p99_s))
    console.print(table)
    if report.knee_per_s is None:
        _line(console, f"No knee: {report.why_none}", style="bold red")
        return
    bound = "" if report.is_bounded else " or more"
    _line(console, f"The knee is at {report.knee_per_s:.2f}{bound} requests per second")


def _say_void(void: Sequence[str], console: Console) -> None:
    for why in void:
        _line(console, f"VOID: {why}", style="bold red")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
