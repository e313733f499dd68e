"""What a dashboard is made of, and its JSON as Grafana's classic model has it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
Object = dict[str, Json]
Kind = Literal["bargauge", "heatmap", "stat", "table", "timeseries"]

COLUMNS = 24  # of Grafana's grid
SCHEMA_VERSION = 41  # later Grafanas bring it up to date as they read it
SOURCE: Object = {"type": "prometheus", "uid": "${source}"}

_REDUCE: Object = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_TOOLTIP: Object = {"mode": "multi", "sort": "desc"}
_OPTIONS: dict[Kind, Object] = {
    "bargauge": {
        "displayMode": "basic",
        "legend": {"calcs": [], "displayMode": "list", "placement": "bottom", "showLegend": False},
        "maxVizHeight": 300,
        "minVizHeight": 16,
        "minVizWidth": 8,
        "namePlacement": "auto",
        "orientation": "horizontal",
        "reduceOptions": _REDUCE,
        "showUnfilled": True,
        "sizing": "auto",
        "valueMode": "color",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {
            "exponent": 0.5,
            "fill": "dark-orange",
            "mode": "scheme",
            "reverse": False,
            "scale": "exponential",
            "scheme": "Oranges",
            "steps": 64,
        },
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "showValue": "never",
        "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "s"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": _REDUCE,
        "showPercentChange": False,
        "textMode": "auto",
        "wideLayout": True,
    },
    "table": {"cellHeight": "sm", "frameIndex": 0, "showHeader": True},
    "timeseries": {
        "legend": {
            "calcs": ["lastNotNull", "max"],
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
        },
        "tooltip": _TOOLTIP,
    },
}
_LINES: Object = {
    "drawStyle": "line",
    "fillOpacity": 8,
    "lineWidth": 1,
    "showPoints": "never",
    "spanNulls": False,
}
_STACK: Object = {"fillOpacity": 35, "stacking": {"group": "A", "mode": "normal"}}


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture. `limits` are values from which on it turns orange, then red."""

    title: str
    says: str  # what an operator reads out of it
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    limits: tuple[float, ...] = ()
    stacked: bool = False
    columns: tuple[str, ...] = ()  # a table's, one for each query, beside the labels they share

    def to_json(self, panel_id: int, x: int, y: int) -> Object:
        """The panel at its place in the grid."""
        defaults: Object = {"unit": self.unit, "color": _color(self), "thresholds": _steps(self)}
        defaults["custom"] = _custom(self)
        panel: Object = {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.says,
            "datasource": SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "targets": [_target(self, index) for index in range(len(self.queries))],
            "options": _OPTIONS[self.kind],
            "fieldConfig": {"defaults": defaults, "overrides": []},
        }
        if self.columns:
            panel["transformations"] = _join(self)
        return panel


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading, left to right."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """A page of rows."""

    uid: str
    title: str
    says: str
    rows: tuple[Row, ...]
    variables: tuple[Object, ...] = field(default_factory=tuple)

    @property
    def panels(self) -> Iterator[Panel]:
        """Every panel, in reading order."""
        return (panel for row in self.rows for panel in row.panels)

    def to_json(self) -> Object:
        """The dashboard as Grafana provisions it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.says,
            "tags": ["turnout"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": False,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-1h", "to": "now"},
            "timezone": "browser",
            "links": [_LINKS],
            "templating": {"list": [_SOURCE_VARIABLE, _INSTANCE_VARIABLE, *self.variables]},
            "annotations": {"list": []},
            "panels": list(_laid_out(self.rows)),
        }


def variable(name: str, label: str, metric: str) -> Object:
    """A variable that lists the values of a label; all of them at first."""
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


_SOURCE_VARIABLE: Object = {"name": "source", "label": "Source", "type": "datasource"}
_SOURCE_VARIABLE |= {"query": "prometheus", "refresh": 1}
_INSTANCE_VARIABLE = variable("instance", "Instance", "turnout_engine_steps_total")
_LINKS: Object = {
    "asDropdown": False,
    "icon": "dashboard",
    "includeVars": True,
    "keepTime": True,
    "tags": ["turnout"],
    "targetBlank": False,
    "title": "Turnout",
    "tooltip": "",
    "type": "dashboards",
    "url": "",
}


def _laid_out(rows: tuple[Row, ...]) -> Iterator[Object]:
    """Each row's heading, then its panels in lines as full as they get."""
    ids, y = count(1), 0
    for row in rows:
        yield _heading(row.title, next(ids), y)
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            yield panel.to_json(next(ids), x, y)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _heading(title: str, panel_id: int, y: int) -> Object:
    place: Object = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
    return {
        "id": panel_id,
        "type": "row",
        "title": title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
    }


def _target(panel: Panel, index: int) -> Object:
    query = panel.queries[index]
    is_instant = panel.kind in ("bargauge", "table")
    formats = {"heatmap": "heatmap", "table": "table"}
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": formats.get(panel.kind, "time_series"),
        "instant": is_instant,
        "range": not is_instant,
        "legendFormat": query.legend or "__auto",
    }


def _color(panel: Panel) -> Object:
    has_limits = bool(panel.limits) and panel.kind != "timeseries"
    return {"mode": "thresholds" if has_limits else "palette-classic"}


def _steps(panel: Panel) -> Object:
    colors = ("green", "orange", "red")
    values = (None, *panel.limits)
    steps: list[Json] = [
        {"color": color, "value": value} for color, value in zip(colors, values, strict=False)
    ]
    return {"mode": "absolute", "steps": steps}


def _custom(panel: Panel) -> Object:
    """How lines are drawn; other kinds have no such choice here."""
    if panel.kind != "timeseries":
        return {}
    dashes: Object = {"thresholdsStyle": {"mode": "dashed" if panel.limits else "off"}}
    return _LINES | dashes | (_STACK if panel.stacked else {})


def _join(panel: Panel) -> list[Json]:
    """One table of all queries, a line for each value of the labels they share."""
    names: dict[str, Json] = {
        f"Value #{chr(ord('A') + index)}": column for index, column in enumerate(panel.columns)
    }
    organize: Object = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": organize},
    ]
