"""Step times for the cost model: those measured on one H100, or a file of one's own.

A file is what `turnout bench merged --json` writes, a folder that and what `turnout bench
gpu-table --json` writes, for the steps of many adapters; or a file has the plain form:

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


# docs/performance.md: plain_ms, one_ms and merged_ms of "Merged models", many_ms of "The engine on
# a GPU" where that, another run, is not below one_ms (at batch 8 it is, by 0.08).
H100 = StepTimes(
    source="Mistral-7B, adapters of rank 16, one H100 80GB, 2026-11-22",
    points=(
        _point(1, 2.49, 2.88, 2.88, 1, 2.40),
        _point(8, 2.76, 3.42, 3.42, 8, 2.70),
        _point(32, 3.82, 4.42, 5.27, 32, 3.81),
        _point(64, 5.15, 5.88, 6.64, 32, 5.23),
    ),
)


def read_step_times(path: Path | None) -> StepTimes:
    """Read step times; None is the H100's. Raises ValueError naming what is wrong."""
    if path is None:
        return H100
    try:
        content = _content(path)
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


def _content(path: Path) -> dict[str, Any]:
    """The JSON object of a file, or of a folder's files with their figures together."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    objects = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not objects or not all(isinstance(each, dict) for each in objects):
        raise TypeError("it holds no JSON object")
    if len(objects) == 1:
        return dict(objects[0])
    return {**objects[0], "figures": [row for each in objects for row in each["figures"]]}


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
