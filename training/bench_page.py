"""The benchmark's losses, one curve over the other, in a file that fetches nothing."""

import html
from collections.abc import Mapping, Sequence

from training.report import svg_chart

_COLOURS = ("#3b78c3", "#d2691e", "#3a9a5b", "#b8478f", "#8a6d1d", "#5b5bd6", "#c0392b", "#16808a")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Losses of each rung</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2em auto; padding: 0 1em }}
svg {{ width: 100%; height: auto }}
svg text {{ font: 12px system-ui, sans-serif; fill: currentColor }}
.axis {{ stroke: currentColor; stroke-opacity: .25 }}
polyline {{ fill: none; stroke-width: 1.5 }}
{colours}
:root {{ color-scheme: light dark }}
</style>
<h1>Losses of each rung</h1>
{body}
</html>
"""


def page(charts: Mapping[str, Sequence[tuple[str, Sequence[float]]]]) -> str:
    """A chart for each title, of named curves."""
    body = []
    for title, curves in charts.items():
        lines = [
            (f"curve-{number % len(_COLOURS)}", list(enumerate(losses, start=1)))
            for number, (_, losses) in enumerate(curves)
        ]
        keys = (
            f'<li style="color: {_COLOURS[number % len(_COLOURS)]}">{html.escape(name)}: '
            f"{losses[0]:.4f} to {losses[-1]:.4f}</li>"
            for number, (name, losses) in enumerate(curves)
        )
        body += [f"<h2>{html.escape(title)}</h2>", svg_chart(lines, "loss of a token")]
        body.append(f"<ul>{''.join(keys)}</ul>")
    colours = "\n".join(
        f".curve-{number} {{ stroke: {colour} }}" for number, colour in enumerate(_COLOURS)
    )
    return _PAGE.format(colours=colours, body="\n".join(body))
