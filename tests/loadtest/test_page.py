"""The report's page: whole, self-contained, and its pictures there, in a real browser too."""

import functools
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.breakeven import curve
from loadtest.compare import _comparison, _curves, _Measured
from loadtest.figures import Slo
from loadtest.page import render, write_page
from loadtest.recheck import Recheck
from loadtest.report import CompareReport, KneeReport, Probe, Report, RunReport
from tests.loadtest.making import environment, line, record, run_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
RUN_FIGURES = ["ttft-cdf", "latency-cdf", "ttft-time", "in-flight", "adapters", "lateness"]


def a_run() -> Report:
    """60 requests of 5 adapters on two paths and two tiers, a few of them not ok."""
    trace = [line(i * 0.5, f"adapter-{i % 5}", seed=i) for i in range(60)]
    records = []
    for i, one in enumerate(trace):
        fields: dict[str, Any] = {
            "intended_s": one.time_s,
            "late_s": 0.0001 * (1 + i % 7),
            "ttft_s": 0.05 + 0.01 * (i % 11),
            "e2e_s": 0.4 + 0.02 * (i % 13),
            "path": "merged" if i % 3 else "adapter",
            "tier": "gpu" if i % 4 else "disk",
        }
        if i % 20 == 7:
            fields |= {"outcome": "rejected", "reason": "busy", "ttft_s": None, "e2e_s": None}
        records.append(record(i, **fields))
    return run_report(records, trace)


@functools.cache
def a_comparison() -> CompareReport:
    measured = {
        batch: _Measured(
            a=[[record(i, e2e_s=0.3 + 0.01 * (i + block)) for i in range(4)] for block in range(4)],
            b=[[record(i, e2e_s=0.2 + 0.01 * (i - block)) for i in range(4)] for block in range(4)],
        )
        for batch in (1, 8, 32)
    }
    return CompareReport(
        made_at="2026-01-01T00:00:00+00:00",
        names=("adapter", "merged"),
        targets=({"url": "http://a"}, {"url": "http://b"}),
        environment=environment(),
        memory_share=0.1,
        void=[],
        batches=[_comparison(batch, found) for batch, found in measured.items()],
        curves=_curves(measured, 0.1),
    )


def a_knee() -> KneeReport:
    probes = [
        Probe(
            rate=rate, offered_per_s=rate, good_share=share, per_s=rate * share,
            ttft_p50_s=0.1 * rate, ttft_p99_s=0.2 * rate, tpot_p50_s=0.01, void=void,
        )
        for rate, share, void in (
            (1.0, 1.0, []), (2.0, 0.97, []), (4.0, 0.5, []), (3.0, 0.0, ["x"]),
        )
    ]  # fmt: skip
    return KneeReport(
        made_at="2026-01-01T00:00:00+00:00",
        target={"url": "http://a"},
        environment=environment(),
        slo=Slo(),
        goal=0.95,
        knee_per_s=2.0,
        is_bounded=True,
        probes=probes,
    )


class Outside(HTMLParser):
    """Collects what a page would fetch, and checks that its tags close."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed"):
            self.fetched.append(tag)
        self.fetched += [
            f"{k}={v}" for k, v in attrs if k in ("src", "href", "srcset", "xlink:href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, tag
            assert self.open.pop() == tag


@pytest.mark.parametrize("make", [a_run, a_comparison, a_knee])
def test_a_page_is_well_formed_and_fetches_nothing(make: Any) -> None:
    text = render(make())
    page = Outside(text)
    assert page.fetched == []
    assert page.open == []
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text


def figures_of(text: str) -> list[str]:
    return re.findall(r"<figure id='([^']+)'", text)


def test_a_run_has_its_pictures_tiles_and_tables() -> None:
    text = render(a_run())
    assert figures_of(text) == RUN_FIGURES
    assert "valid" in text
    for word in (
        "Goodput",
        "57",
        "rejected busy",
        "adapter-3",
        "tier disk",
        "a processor",
        "sha256",
    ):
        assert word in text, word


def test_a_void_run_says_so_and_why() -> None:
    records = [record(0, late_s=0.5)]
    text = render(run_report(records, [line()]))
    assert '<span class="badge bad">void</span>' in text
    assert "p99 of send lateness is 500.0 ms" in text


def test_a_comparison_shows_differences_and_the_break_even_curve() -> None:
    report = a_comparison()
    text = render(report)
    assert figures_of(text) == ["break-even", "differences", "steps", "tpot-1", "tpot-8", "tpot-32"]
    assert "Batch 8: merged pays from" in text
    assert text.count('class="area c') >= 3  # a band for each curve


def test_a_merge_that_never_pays_is_said_to_never_pay() -> None:
    report = a_comparison()
    never = curve({1: 0.01}, {1: 0.02}, 1, 0.0)
    fields = {name: getattr(report, name) for name in report.__struct_fields__}
    text = render(CompareReport(**{**fields, "curves": [never]}))
    assert "never pays" in text
    assert "never to never" not in text


def test_replies_that_came_in_no_time_at_all_have_a_page_too() -> None:
    """A proxy that holds text back sends all of it at once: A's time per token is 0."""
    report = a_comparison()
    batch = report.batches[0]
    instant = [msgspec.structs.replace(each, a=0.0) for each in batch.differences]
    batches = [msgspec.structs.replace(batch, differences=instant)]
    text = render(msgspec.structs.replace(report, batches=batches))
    assert "<strong>-</strong>" in text


def test_a_knee_is_marked_and_void_rates_are_not_drawn() -> None:
    text = render(a_knee())
    assert figures_of(text) == ["goodput", "knee-ttft"]
    assert "knee 2.00/s" in text
    assert "3.00/s:" not in text


def test_names_from_outside_are_text() -> None:
    evil = "<script>alert(1)</script>"
    trace = [line(i * 0.1, evil, seed=i) for i in range(3)]
    records = [record(i, path=evil, tier=evil, reason=evil) for i in range(3)]
    assert "<script" not in render(run_report(records, trace, environment=environment(cpu=evil)))


def test_a_run_with_nothing_ok_still_has_a_page() -> None:
    records = [record(0, outcome="failed", ttft_s=None, e2e_s=None, num_tokens=0, gaps_s=[])]
    assert figures_of(render(run_report(records, [line()]))) == RUN_FIGURES


def test_a_page_is_written_where_it_shall_be(tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "report.html", a_knee())
    assert (tmp_path / "deep" / "report.html").read_text().startswith("<!doctype html>")


# In a browser


# What a reader would see of each picture: its size on the page, and how many shapes are painted.
LOOK = """
<script>
const painted = shape => {
  const box = shape.getBoundingClientRect(), style = getComputedStyle(shape);
  const isSeen = style.fill !== "none" || style.stroke !== "none";
  return isSeen && (box.width > 0 || box.height > 0) && style.visibility === "visible";
};
const seen = [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const shapes = [...svg.querySelectorAll("polyline, polygon, circle, rect, path")];
  return [figure.id, box.width, box.height, shapes.filter(painted).length, shapes.length];
});
const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.title = JSON.stringify({seen, overflow});
</script>
"""


def looked_at(page: Path, width: int) -> dict[str, Any]:
    """Open a page in headless Chromium and look at its pictures."""
    assert CHROMIUM is not None
    page.write_text(page.read_text() + LOOK)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2400",
        "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert isinstance(found, dict)
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize(
    ("make", "width"), [(a_run, 1280), (a_run, 600), (a_comparison, 1280), (a_knee, 1280)]
)
def test_every_picture_is_painted_in_a_real_browser(make: Any, width: int, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", make())
    expected = figures_of((tmp_path / "report.html").read_text())
    found = looked_at(tmp_path / "report.html", width)
    assert [key for key, *_ in found["seen"]] == expected
    for key, shown_width, shown_height, num_painted, num_shapes in found["seen"]:
        assert shown_width > 300, key
        assert shown_height > 100, key
        assert num_painted == num_shapes > 0, key
    assert found["overflow"] <= 0


# Words and tables


class Cells(HTMLParser):
    """The text of every table's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._is_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data


def row_of(text: str, first: str) -> list[str]:
    """The row whose first cell says so."""
    return next(row for row in Cells(text).rows if row and row[0] == first)


def test_each_adapter_has_a_row_with_its_figures() -> None:
    row = row_of(render(a_run()), "adapter-0")
    assert row[1:4] == ["12", "12", "36"]
    assert row[5].endswith("ms")


def test_each_path_and_tier_has_a_row_of_latencies() -> None:
    text = render(a_run())
    assert row_of(text, "all")[1] == "57"
    assert row_of(text, "merged")[1] == "38"
    assert row_of(text, "tier gpu")[1] == "42"


def test_what_was_checked_is_said_in_numbers() -> None:
    report = a_run()
    text = render(report)
    assert row_of(text, "adapter digests")[1].startswith("0 compared with the first reply")
    assert "57 replies name none" not in row_of(text, "adapter digests")[1]  # none was checked
    assert "requests per second, 0.00 sigma off" in row_of(text, "offered rate")[1]
    assert row_of(text, "3 replies")[1] == "rejected busy"


def test_parted_texts_are_said_with_how_much_of_them_is_the_same() -> None:
    again = Recheck(num_asked=4, num_same=2, num_parted=2, common_share=[0.25, 0.75])
    text = render(run_report(rechecked=again))
    said = row_of(text, "asked again alone")[1]
    assert said.startswith("4: 2 the same, 2 parted, 0 foreign, 0 unanswered")
    assert said.endswith("50% of the parted texts is the same")


def test_a_closed_loop_has_no_offered_rate() -> None:
    text = render(run_report([record(0)], [line(user=0)]))
    assert row_of(text, "offered rate")[1] == "closed loop"


def test_the_environments_fingerprint_is_on_every_page() -> None:
    for make in (a_run, a_comparison, a_knee):
        text = render(make())
        assert row_of(text, "processor")[1] == "a processor, 2 cores"
        assert row_of(text, "load average")[1] == "0.1 before, 0.2 after"
        assert row_of(text, "server version")[1] == "1"
        assert row_of(text, "packages")[1] == "numpy 2"


def test_the_trace_is_named_by_its_digest() -> None:
    report = a_run()
    assert isinstance(report, RunReport)
    assert row_of(render(report), "sha256")[1] == report.trace.sha256


def test_a_comparisons_table_has_every_difference_with_its_interval() -> None:
    report = a_comparison()
    rows = [row for row in Cells(render(report)).rows if len(row) == 7]
    assert len(rows) == 1 + 3 * 4  # the head, and four figures at three batches
    assert rows[0] == ["batch", "figure", "adapter", "difference", "95% from", "to", "relative"]
    assert rows[3][:2] == ["1", "tpot mean"]
    assert rows[3][6].startswith("-")


def test_both_targets_of_a_comparison_are_shown() -> None:
    rows = Cells(render(a_comparison())).rows
    assert ["url", "http://a"] in rows
    assert ["url", "http://b"] in rows


def test_a_void_comparison_and_a_missed_knee_say_why_first() -> None:
    void = msgspec.structs.replace(a_comparison(), void=["batch 1, because"])
    none = msgspec.structs.replace(a_knee(), knee_per_s=None)
    for report, why in ((void, "batch 1, because"), (none, "even the lowest rate misses")):
        text = render(report)
        assert '<span class="badge bad">void</span>' in text
        assert text.index(why) < text.index("<main>")


def test_every_rate_tried_is_a_row_in_the_order_of_trying() -> None:
    rows = [row for row in Cells(render(a_knee())).rows if len(row) == 6]
    assert [row[0] for row in rows[1:]] == ["1.00", "2.00", "4.00", "3.00"]
    assert rows[4][1] == "void"
    assert rows[4][5] == "x"


def test_an_unbounded_knee_is_a_lower_bound() -> None:
    text = render(msgspec.structs.replace(a_knee(), is_bounded=False))
    assert "2.00 /s or more" in text


def test_an_slo_is_said_limit_by_limit() -> None:
    text = render(msgspec.structs.replace(a_knee(), slo=Slo(ttft_s=0.5, tpot_s=0.02, e2e_s=3.0)))
    assert "TTFT up to 500 ms" in text
    assert "time per token up to 20 ms, end to end up to 3.00 s" in text
    free = Slo(ttft_s=None, tpot_s=None)
    assert "none" in render(msgspec.structs.replace(a_knee(), slo=free))


def test_both_colour_schemes_are_there() -> None:
    text = render(a_knee())
    assert "prefers-color-scheme: dark" in text
    for name in ("c0", "c1", "c2", "c3", "c4", "c5", "good", "bad"):
        assert text.count(f"--{name}:") == 2, name
