"""What the terminal shows while a run lasts, and at its end."""

import io

import msgspec
import pytest
from rich.console import Console

from loadtest.progress import LiveProgress, ms, say, sparkline
from loadtest.report import Report
from tests.loadtest.making import line, record, run_report
from tests.loadtest.test_page import a_comparison, a_knee, a_run


def said(report: Report) -> str:
    console = Console(file=io.StringIO(), width=140)
    say(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(progress: LiveProgress) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(progress._render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (-0.004, "-4 ms"),
        (1e-17, "0 ms"),
        (-1e-9, "0 ms"),
    ],
)
def test_a_time_is_short(seconds: float | None, text: str) -> None:
    assert ms(seconds) == text


def test_brackets_in_names_are_shown_not_read() -> None:
    report = msgspec.structs.replace(a_comparison(), names=("[red]a", "[/b]"))
    assert "[/b] minus [red]a, paired" in said(report)
    progress = LiveProgress(Console(file=io.StringIO()))
    progress.stage("[/b], batch 1", 1)
    assert "[/b], batch 1" in shown(progress)
    odd = run_report([record(path="[/b]")], [line()])
    assert "[/b]" in said(odd)


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([1.0, 2.0]) == "▄█"
    assert sparkline([]) == sparkline([0.0]) == ""
    assert len(sparkline([0.001 * value for value in range(40)])) == 40


def test_progress_shows_the_stage_the_outcomes_and_the_latency() -> None:
    progress = LiveProgress(Console(file=io.StringIO()))
    progress.stage("Replaying", 10)
    progress.records([record(0), record(1, outcome="rejected", ttft_s=None), record(2, ttft_s=0.3)])
    text = shown(progress)
    for word in ("Replaying", "3/10", "2 ok", "1 rejected", "TTFT p50 200 ms"):
        assert word in text, word


def test_a_new_stage_begins_anew() -> None:
    progress = LiveProgress(Console(file=io.StringIO()))
    progress.stage("Replaying", 10)
    progress.records([record()])
    progress.stage("Asking again, alone", 4)
    progress.step()
    text = shown(progress)
    assert "1/4" in text
    assert "1 ok" not in text


def test_a_terminal_sees_it_live_and_a_file_does_not() -> None:
    for is_terminal in (True, False):
        file = io.StringIO()
        with LiveProgress(Console(file=file, force_terminal=is_terminal)) as progress:
            progress.stage("Replaying", 10)
            progress.records([record()])
        assert ("Replaying" in file.getvalue()) is is_terminal


def test_a_runs_summary_names_what_matters() -> None:
    text = said(a_run())
    for word in ("57 ok", "3 rejected", "adapter", "merged", "tier disk", "Within the SLO",
                 "Jain index", "3 x rejected busy", "Digests: 0 checked"):  # fmt: skip
        assert word in text, word
    assert "VOID" not in text


def test_a_void_run_is_shouted() -> None:
    assert "VOID: p99 of send lateness" in said(run_report([record(0, late_s=1.0)], [line()]))


def test_a_comparison_says_from_where_on_merging_pays() -> None:
    text = said(a_comparison())
    assert "merged minus adapter" in text
    assert "Batch 32: merged pays" in text
    assert "Batch 32: merged's tokens come 2.30 x as fast as adapter (" in text
    assert "tpot mean" in text


def test_a_knee_is_said_with_its_bound() -> None:
    knee = a_knee()
    assert "The knee is at 2.00 requests per second" in said(knee)
    unbounded = msgspec.structs.replace(knee, is_bounded=False)
    assert "2.00 or more requests" in said(unbounded)
    none = msgspec.structs.replace(knee, knee_per_s=None)
    assert "No knee: even the lowest rate misses the goal" in said(none)
    late = msgspec.structs.replace(knee.probes[0], void=["the sender was late"])
    void = msgspec.structs.replace(none, probes=[late])
    assert "No knee: the lowest rate could not be offered: the sender was late" in said(void)
