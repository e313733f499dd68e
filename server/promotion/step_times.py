"""Step times for the cost model: those measured on one H100, or a file of one's own.

A file is what `turnout bench --gpu-table --json` writes, or the plain form:

    {"source": "…", "second_pass_ms": 0.1, "points": [{"batch": 8, "plain_ms": 2.6, "one_ms": 2.9,
     "many_ms": 3.3, "num_adapters": 8, "merged_ms": 2.6}, …]}
"""

import json
import re
from pathlib import Path
from typing import Any

from server.promotion.cost import StepPoint, StepTimes

_FIGURE = re.compile(r"decode step, batch (\d+), (?:(no adapter|merged)|(\d+) adapters?)")
_FIELDS = ("batch", "plain_ms", "one_ms", "many_ms", "num_adapters", "merged_ms")


def _point(
    batch: int, plain_ms: float, one_ms: float, many_ms: float, num_adapters: int, merged_ms: float
) -> StepPoint:
    return StepPoint(
        batch=batch,
        plain_s=plain_ms / 1e3,
        one_s=one_ms / 1e3,
        many_s=many_ms / 1e3,
        num_adapters=num_adapters,
        merged_s=merged_ms / 1e3,
    )


# docs/performance.md, "The engine on a GPU". Measured there: many_ms, and at batch 32 all
# but merged_ms. Elsewhere plain_ms is many_ms less LoRA's part of the linears ("LoRA" there), and
# one_ms the 0.32 ms more that one row with an adapter costs. A merged pass is taken to cost what
# the base costs without adapters: the same bytes by the same design.
H100 = StepTimes(
    source="Mistral-7B, adapters of rank 16, one H100 80GB; merged passes as the base's own",
    points=(
        _point(1, 2.49, 2.82, 2.82, 1, 2.49),
        _point(8, 2.63, 2.95, 3.34, 8, 2.63),
        _point(32, 3.82, 4.14, 5.27, 32, 3.82),
        _point(64, 4.94, 5.26, 6.64, 32, 4.94),
    ),
)


def read_step_times(path: Path | None) -> StepTimes:
    """Read a file of step times; None is the H100's. Raises ValueError naming what is wrong."""
    if path is None:
        return H100
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
        if "figures" in content:
            return _from_figures(content, path)
        points = [_point(*(point[field] for field in _FIELDS)) for point in content["points"]]
        return StepTimes(
            source=str(content.get("source") or path),
            points=tuple(sorted(points, key=lambda point: point.batch)),
            second_pass_s=float(content.get("second_pass_ms", 0.0)) / 1e3,
        )
    except KeyError as error:
        raise ValueError(f"the step times in {path} lack {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"the step times in {path} cannot be used: {error}") from error


def _from_figures(content: dict[str, Any], path: Path) -> StepTimes:
    """The decode steps of a GPU table, each batch size with every kind of pass."""
    found: dict[int, dict[str | int, float]] = {}
    for figure in content["figures"]:
        match = _FIGURE.fullmatch(figure["name"])
        if match is not None:
            kind = match[2] or int(match[3])
            found.setdefault(int(match[1]), {})[kind] = float(figure["value"])
    points = []
    for batch, by_kind in sorted(found.items()):
        for kind, name in (("no adapter", "no adapter"), (1, "1 adapter"), ("merged", "merged")):
            if kind not in by_kind:
                raise ValueError(f'there is no figure "decode step, batch {batch}, {name}"')
        most = max(kind for kind in by_kind if isinstance(kind, int))
        plain, one, merged = by_kind["no adapter"], by_kind[1], by_kind["merged"]
        points.append(_point(batch, plain, one, by_kind[most], most, merged))
    source = f"{content.get('gpu', path)}, {content.get('date', 'no date')}"
    return StepTimes(source=source, points=tuple(points))
