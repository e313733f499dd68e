"""A run in one HTML file: curves as inline SVG, figures as tables; nothing is fetched."""

import html
import math
from collections.abc import Sequence

from training.metrics import Generations
from training.result import Outcome

_WIDTH, _HEIGHT, _LEFT, _BELOW = 720, 260, 60, 30
Point = tuple[float, float]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ padding: 2px 14px 2px 0; text-align: left; vertical-align: top }}
.columns td {{ white-space: pre-wrap; overflow-wrap: anywhere }}
svg {{ width: 100%; height: auto }}
svg text {{ font: 12px system-ui, sans-serif; fill: currentColor }}
.axis {{ stroke: currentColor; stroke-opacity: .25 }}
.training {{ stroke: #3b78c3; fill: none; stroke-width: 1.5 }}
.evaluation {{ stroke: #d2691e; fill: none; stroke-width: 2 }}
:root {{ color-scheme: light dark }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def html_report(outcome: Outcome) -> str:
    """The whole page."""
    state = outcome.state
    training = [(record["step"], record["loss"]) for record in state.history]
    evaluation = [(record["step"], record["loss"]) for record in state.evaluations]
    rates = [(record["step"], record["learning_rate"]) for record in state.history]
    seconds = sum(record["seconds"] for record in state.history)
    tokens = sum(record["tokens"] for record in state.history)
    figures = [
        ("base", f"{outcome.base_name}, {outcome.base_digest[:12]}"),
        ("steps", f"{state.step:,}"),
        (
            "tokens",
            f"{tokens:,.0f} in {seconds:,.0f} s, {tokens / max(seconds, 1e-9):,.0f}/s",
        ),
        ("peak memory", f"{outcome.peak_bytes / 2**20:,.0f} MiB"),
    ]
    if state.best_loss is not None:
        text = f"{state.best_loss:.4f} at step {state.best_step}"
        figures.append(
            ("best held-out loss", f"{text}, perplexity {math.exp(state.best_loss):.2f}")
        )
    body = [
        _table(figures),
        *_answers(outcome.generations),
        "<h2>Loss</h2>",
        "<p>Blue: each step's own rows. Orange: held out.</p>",
        svg_chart([("training", training), ("evaluation", evaluation)], "loss of a token"),
        "<h2>Learning rate</h2>",
        svg_chart([("training", rates)], "learning rate"),
        "<h2>Data</h2>",
        *(_table([("file", report.path), *report.lines()]) for report in outcome.dataset.reports),
        "<h2>Settings</h2>",
        _table([(name, str(value)) for name, value in outcome.config]),
    ]
    title = html.escape(f"Training of {outcome.config.out.resolve().name}")
    return _PAGE.format(title=title, body="\n".join(body))


def svg_chart(series: Sequence[tuple[str, Sequence[Point]]], label: str) -> str:
    """Lines over steps, each of the CSS class that it is named by; y begins at 0."""
    points = [point for _, line in series for point in line]
    last = max((x for x, _ in points), default=1) or 1
    top = max((y for _, y in points), default=1) or 1

    def place(point: Point) -> str:
        x = _LEFT + point[0] / last * (_WIDTH - _LEFT - 10)
        y = 10 + (1 - point[1] / top) * (_HEIGHT - _BELOW - 10)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, y), (right, _) = (place((at, share * top)).split(",") for at in (0, last))
        parts.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="0" y="{float(y) + 4:.1f}">{share * top:.3g}</text>')
    for share in (0.0, 0.5, 1.0):
        x = place((share * last, 0)).split(",")[0]
        anchor = "end" if share == 1 else "middle"
        text = f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{share * last:.0f}</text>'
        parts.append(text)
    for name, line in series:
        if line:
            path = " ".join(place(point) for point in line)
            parts.append(f'<polyline class="{name}" points="{path}"/>')
    return "\n".join([*parts, "</svg>"])


def _answers(generations: Generations | None) -> list[str]:
    """Scores and answers of base and adapter."""
    if generations is None:
        return []
    scores = [
        (name, f"{before:.3g}", f"{generations.after[name]:.3g}")
        for name, before in generations.before.items()
    ]
    answers = [(s.question, s.before, s.after, s.reference) for s in generations.samples]
    return [
        "<h2>Answers</h2>",
        f"<p>Greedy, to {html.escape(generations.rows)}.</p>",
        _columns(("", "base", "adapter"), scores),
        _columns(("question", "base", "adapter", "reference"), answers),
    ]


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="columns"><tr>{head}</tr>{body}</table>'


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{''.join(cells)}</table>"
