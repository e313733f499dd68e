"""The report as one HTML page: no script, no outside asset, light or dark as the reader has it."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from loadtest import plots
from loadtest.environment import Environment
from loadtest.figures import Latency
from loadtest.plots import Figure
from loadtest.progress import ms
from loadtest.report import CompareReport, Difference, KneeReport, Report, RunReport

_CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

Tile = tuple[str, str, str]  # what it is, its figure, a remark


def render(report: Report) -> str:
    """The whole page."""
    if isinstance(report, RunReport):
        return _run_page(report)
    if isinstance(report, CompareReport):
        return _compare_page(report)
    return _knee_page(report)


def write_page(path: Path, report: Report) -> None:
    """Write the page to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")


def _run_page(report: RunReport) -> str:
    total, counts = report.total, report.outcomes
    good = report.goodput
    tiles = [
        (
            "Time to first token",
            ms(total.ttft.p50),
            f"p90 {ms(total.ttft.p90)}, p99 {ms(total.ttft.p99)}",
        ),
        (
            "Between pieces of text",
            ms(total.itl.p50),
            f"p90 {ms(total.itl.p90)}, p99 {ms(total.itl.p99)}",
        ),
        ("End to end", ms(total.e2e.p50), f"p90 {ms(total.e2e.p90)}, p99 {ms(total.e2e.p99)}"),
        ("Goodput", f"{good.per_s:.2f} /s", f"{good.share:.1%} of requests within the SLO"),
        (
            "Tokens",
            f"{total.num_tokens / report.elapsed_s:,.0f} /s" if report.elapsed_s else "-",
            f"{total.num_tokens:,} in {report.elapsed_s:.0f} s",
        ),
        ("Replies ok", f"{counts['ok'] / report.num_over:.1%}", _bad(counts)),
    ]
    latencies = {"all": total, **report.by_path}
    latencies |= {f"tier {tier}": part for tier, part in report.by_tier.items()}
    sections = [
        _tiles(tiles),
        _figures(plots.of_run(report)),
        _details("Latencies", _latency_table(latencies), is_open=True),
        _details("Adapters", _model_table(report)),
        _details("What was checked", _checks_table(report)),
        _facts("Trace", _trace_facts(report)),
        _facts("Target", report.target),
        _facts("Environment", _environment(report.environment)),
    ]
    title = f"{report.num_over:,} requests to {report.target['url']}"
    return _document("Load test", title, report.made_at, report.checks.void, sections)


def _compare_page(report: CompareReport) -> str:
    a, b = report.names
    tiles = []
    for batch in report.batches:
        step = next(each for each in batch.differences if each.figure == "tpot mean")
        tiles.append(
            (
                f"Batch {batch.batch}: time per token, {b} against {a}",
                _relative(step),
                f"{ms(step.difference.low)} to {ms(step.difference.high)} on {ms(step.a)}",
            )
        )
    for curve in report.curves:
        at = "never" if curve.break_even is None else f"{curve.break_even:.0%}"
        low, high = (
            "never" if end is None else f"{end:.0%}"
            for end in (curve.break_even_low, curve.break_even_high)
        )
        remark = f"of traffic; {low} to {high}" if (at, low) != ("never", "never") else ""
        tiles.append((f"Batch {curve.batch}: {b} pays from", at, remark))
    sections = [
        _tiles(tiles),
        _figures(plots.of_comparison(report)),
        _details("Differences", _difference_table(report), is_open=True),
        _facts(f"A: {a}", report.targets[0]),
        _facts(f"B: {b}", report.targets[1]),
        _facts("Environment", _environment(report.environment)),
    ]
    return _document("Comparison", f"{b} against {a}", report.made_at, report.void, sections)


def _knee_page(report: KneeReport) -> str:
    bound = "" if report.is_bounded else " or more"
    knee = "none" if report.knee_per_s is None else f"{report.knee_per_s:.2f} /s{bound}"
    slo = report.slo
    limits = [
        f"{name} up to {ms(limit)}"
        for name, limit in (
            ("TTFT", slo.ttft_s),
            ("time per token", slo.tpot_s),
            ("end to end", slo.e2e_s),
        )
        if limit is not None
    ]
    tiles = [
        ("Knee", knee, f"{report.goal:.0%} of requests within the SLO"),
        ("SLO", limits[0] if limits else "none", ", ".join(limits[1:])),
    ]
    rows = [
        (
            f"{probe.rate:.2f}",
            "void" if probe.void else f"{probe.good_share:.1%}",
            ms(probe.ttft_p50_s),
            ms(probe.ttft_p99_s),
            ms(probe.tpot_p50_s),
            "; ".join(probe.void),
        )
        for probe in report.probes
    ]
    columns = ("requests/s", "within the SLO", "TTFT p50", "p99", "per token p50", "void")
    sections = [
        _tiles(tiles),
        _figures(plots.of_knee(report)),
        _details("Rates tried", _table(columns, rows), is_open=True),
        _facts("Target", report.target),
        _facts("Environment", _environment(report.environment)),
    ]
    void = [report.why_none] if report.is_void else []
    return _document("Knee", report.target["url"], report.made_at, void, sections)


def _document(
    kind: str, title: str, made_at: str, void: Sequence[str], sections: Iterable[str]
) -> str:
    badge = (
        '<span class="badge bad">void</span>' if void else '<span class="badge good">valid</span>'
    )
    why = "".join(f"<li>{html.escape(reason)}</li>" for reason in void)
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{kind}: {html.escape(title)}</title><style>{_CSS}</style></head><body>"
        f"<header><p class='kind'>{kind} {badge}</p><h1>{html.escape(title)}</h1>"
        f"<p class='when'>{html.escape(made_at)}</p>"
        f"{f'<ul class=why>{why}</ul>' if void else ''}</header>"
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _tiles(tiles: Iterable[Tile]) -> str:
    cells = (
        f"<div class='tile'><p>{html.escape(name)}</p><strong>{html.escape(figure)}</strong>"
        f"<small>{html.escape(remark)}</small></div>"
        for name, figure, remark in tiles
    )
    return f"<section class='tiles'>{''.join(cells)}</section>"


def _figures(drawn: Iterable[Figure]) -> str:
    cells = []
    for figure in drawn:
        legend = "".join(
            f"<li><i class='swatch {css}'></i>{html.escape(name)}</li>"
            for name, css in figure.legend
        )
        cells.append(
            f"<figure id='{figure.key}'><figcaption><h2>{html.escape(figure.title)}</h2>"
            f"<p>{html.escape(figure.remark)}</p><ul class='legend'>{legend}</ul></figcaption>"
            f"{figure.svg}</figure>"
        )
    return f"<section class='figures'>{''.join(cells)}</section>"


def _latency_table(parts: Mapping[str, Latency]) -> str:
    columns = ("", "requests", "tokens", "TTFT p50", "p90", "p99", "gap p50", "p90", "p99",
               "end to end p50", "p90", "p99")  # fmt: skip
    rows = [
        (
            name,
            f"{part.num_requests:,}",
            f"{part.num_tokens:,}",
            *(
                ms(value)
                for each in (part.ttft, part.itl, part.e2e)
                for value in (each.p50, each.p90, each.p99)
            ),
        )
        for name, part in parts.items()
    ]
    return _table(columns, rows)


def _model_table(report: RunReport) -> str:
    columns = ("adapter", "requests", "ok", "tokens", "tokens/s", "TTFT p50", "p90", "p99")
    rows = [
        (
            row.model,
            f"{row.num_requests:,}",
            f"{row.num_ok:,}",
            f"{row.num_tokens:,}",
            "-" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
            *(ms(value) for value in (row.ttft.p50, row.ttft.p90, row.ttft.p99)),
        )
        for row in report.models
    ]
    return _table(columns, rows)


def _checks_table(report: RunReport) -> str:
    load, identity, again, fair = report.checks, report.identity, report.recheck, report.fairness
    offered = "closed loop"
    if load.offered_per_s is not None and load.planned_per_s is not None:
        offered = (
            f"{load.offered_per_s:.2f} of {load.planned_per_s:.2f} requests per second, "
            f"{load.sigmas_off:.2f} sigma off"
        )
    common = again.common_share
    shared = f"; {sum(common) / len(common):.0%} of the parted texts is the same" if common else ""
    rows = [
        ("send lateness, p99", ms(load.late_p99_s)),
        ("offered rate", offered),
        (
            "adapter digests",
            f"{identity.num_checked} compared with the {identity.source}, "
            f"{identity.num_mismatched} mismatched, {identity.num_unknown} replies name none",
        ),
        (
            "asked again alone",
            f"{again.num_asked}: {again.num_same} the same, {again.num_parted} parted, "
            f"{again.num_foreign} foreign, {again.num_unanswered} unanswered{shared}",
        ),
        ("Jain index between adapters", "-" if fair.jain is None else f"{fair.jain:.4f}"),
        (
            "median TTFT of adapters",
            f"{ms(fair.median_ttft_s)}; worst tenth {ms(fair.worst_decile_ttft_s)}",
        ),
        *((f"{count} replies", reason) for reason, count in report.reasons.items()),
    ]
    return _table(("", ""), rows)


def _difference_table(report: CompareReport) -> str:
    columns = ("batch", "figure", report.names[0], "difference", "95% from", "to", "relative")
    rows = [
        (
            str(batch.batch),
            each.figure,
            ms(each.a),
            ms(each.difference.value),
            ms(each.difference.low),
            ms(each.difference.high),
            _relative(each),
        )
        for batch in report.batches
        for each in batch.differences
    ]
    return _table(columns, rows)


def _relative(each: Difference) -> str:
    return f"{each.difference.value / each.a:+.1%}" if each.a else "-"


def _trace_facts(report: RunReport) -> dict[str, str]:
    facts = report.trace
    return {
        "sha256": facts.sha256,
        "loop": facts.loop,
        "requests": f"{facts.num_lines:,}",
        "length": f"{facts.duration_s:.1f} s",
        "models": str(facts.num_models),
        "tenants": str(facts.num_tenants),
        "prompt tokens": f"{facts.num_prompt_tokens:,}",
        "output tokens": f"{facts.num_output_tokens:,}",
    }


def _environment(environment: Environment) -> dict[str, str]:
    before, after = environment.load_average
    facts = {
        "processor": f"{environment.cpu}, {environment.num_cores} cores",
        "kernel": environment.kernel,
        "Python": environment.python,
        "packages": ", ".join(
            f"{name} {version}" for name, version in environment.packages.items()
        ),
        "load average": f"{before} before, {after} after",
        "sending processes": str(environment.num_workers),
    }
    return facts | {f"server {name}": value for name, value in environment.server.items()}


def _bad(counts: Mapping[str, int]) -> str:
    bad = [f"{count} {name}" for name, count in counts.items() if count and name != "ok"]
    return ", ".join(bad) or "none rejected, cut or wrong"


def _facts(title: str, facts: Mapping[str, str]) -> str:
    return _details(title, _table(("", ""), list(facts.items())))


def _details(title: str, body: str, *, is_open: bool = False) -> str:
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>"
        f"<div class='scroll'>{body}</div></details>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
