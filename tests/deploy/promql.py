"""Just enough of PromQL to know which names an expression uses, and what an alert compares."""

import re
from pathlib import Path
from typing import Any

import yaml

from deploy.grafana.panels import Dashboard

PROMETHEUS = Path(__file__).parents[2] / "deploy" / "prometheus"
# What Grafana puts in place of its variables; the window suits a scrape every second.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$adapter": ".*"}

_NO_NAMES = (
    r'"(?:[^"\\]|\\.)*"',  # strings first: what is in them is no syntax
    r"\{[^}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\b\d[\w.]*",
)
_NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w|:|\s*\()")
_KEYWORDS = frozenset(("and", "or", "unless", "bool", "offset"))
_COMPARISON = re.compile(r"(?P<left>[^<>]+) (?P<sign>[<>]) (?P<right>\d[\d. *]*)")


def rules(file: str) -> list[dict[str, Any]]:
    """Every rule of one rule file, in order."""
    content = yaml.safe_load((PROMETHEUS / file).read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def names(expr: str) -> set[str]:
    """The metrics that an expression reads."""
    for pattern in _NO_NAMES:
        expr = re.sub(pattern, " ", expr)
    return set(_NAME.findall(expr)) - _KEYWORDS


def bounds(expr: str) -> set[tuple[str, str]]:
    """The histogram buckets that an expression picks: (metric, le)."""
    return set(re.findall(r'(\w+)_bucket\{[^}]*le="([^"]*)"', expr))


def left_sides(alert: str) -> list[str]:
    """What each comparison of an alert watches. AssertionError if it is anything else."""
    comparisons = [re.fullmatch(_COMPARISON, part) for part in alert.strip().split(" and ")]
    assert all(comparisons), f"not comparisons with numbers, joined by `and`: {alert}"
    return [match["left"] for match in comparisons if match]


def filled_in(expr: str) -> str:
    """The expression as Grafana would send it."""
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr, f"a variable that nobody defines: {expr}"
    return expr


def expressions(dashboard: Dashboard) -> list[str]:
    """Every expression of every panel."""
    return [query.expr for panel in dashboard.panels for query in panel.queries]
