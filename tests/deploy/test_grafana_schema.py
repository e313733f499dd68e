"""The dashboards against Grafana's own types: npm's `@grafana/schema`, and its compiler's word."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.__main__ import dashboards
from tests.deploy.tools import FETCHED

MODULES = FETCHED / "node_modules"
SCHEMA = MODULES / "@grafana" / "schema"
TSC = MODULES / "typescript" / "bin" / "tsc"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None or not SCHEMA.is_dir() or not TSC.is_file(),
        reason="@grafana/schema is not installed: .ci/tools",
    ),
]

# `Plain` lets a string stand for the enum member of that value, as JSON has it. The schema leaves
# a query's own fields to its data source, whose package brings all of Grafana along: written out.
PRELUDE = """\
import type { DataQuery, Dashboard, Panel, RowPanel, VariableModel } from '@grafana/schema';
type Plain<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
  : T extends (infer U)[] ? Plain<U>[] : { [K in keyof T]: Plain<T[K]> };
interface Prometheus extends DataQuery {
  expr: string; editorMode?: 'builder' | 'code'; format?: 'time_series' | 'table' | 'heatmap';
  instant?: boolean; range?: boolean; legendFormat?: string;
}
"""
KINDS = ("bargauge", "heatmap", "stat", "table", "timeseries")
OPTIONS = (
    *("--noEmit", "--strict", "--skipLibCheck"),
    *("--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"),
)


def module_of(kind: str) -> str:
    """Where the schema keeps a panel kind's options."""
    folder = f"dist/esm/raw/composable/{kind}/panelcfg/x"
    (found,) = (SCHEMA / folder).glob("*PanelCfg_types.gen.d.ts")
    return f"@grafana/schema/{folder}/{found.name.removesuffix('.d.ts')}"


def as_typescript(made: Any) -> str:
    """The dashboard, and each panel's options and queries, as values of Grafana's types."""
    lines = [PRELUDE]
    lines += [f"import type * as {kind} from '{module_of(kind)}';" for kind in KINDS]
    lines.append(f"const whole: Plain<Omit<Dashboard, 'panels'>> = {_text(made, 'panels')};")
    lines += [
        f"const v_{variable['name']}: Plain<VariableModel> = {_text(variable)};"
        for variable in made["templating"]["list"]
    ]
    for panel in made["panels"]:
        lines += _of_panel(panel)
    return "\n".join(lines) + "\n"


def _of_panel(panel: Any) -> list[str]:
    name, kind = f"p{panel['id']}", panel["type"]
    if kind == "row":
        return [f"const {name}: Plain<RowPanel> = {_text(panel)};"]
    custom = panel["fieldConfig"]["defaults"]["custom"]
    lines = [
        f"const {name}: Plain<Omit<Panel, 'targets'>> = {_text(panel, 'targets')};",
        f"const {name}_options: Plain<{kind}.Options> = {_text(panel['options'])};",
    ]
    if custom:
        lines.append(f"const {name}_custom: Plain<{kind}.FieldConfig> = {_text(custom)};")
    for target in panel["targets"]:
        text = _text(target, "datasource")
        lines.append(
            f"const {name}_{target['refId']}: Plain<Omit<Prometheus, 'datasource'>> = {text};"
        )
    return lines


def _text(value: dict[str, Any], *without: str) -> str:
    return json.dumps({key: each for key, each in value.items() if key not in without})


def complaints(folder: Path, source: str) -> list[str]:
    """What the compiler has to say of a module."""
    (folder / "node_modules").symlink_to(MODULES.resolve(), target_is_directory=True)
    (folder / "dashboard.ts").write_text(source)
    command = ["node", str(TSC.resolve()), *OPTIONS, "dashboard.ts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard.uid)
def test_grafana_s_own_types_accept_the_dashboard(dashboard: Any, tmp_path: Path) -> None:
    assert complaints(tmp_path, as_typescript(dashboard.to_json())) == []


def test_the_types_are_those_of_every_kind_of_panel_that_we_use() -> None:
    assert {panel.kind for dashboard in dashboards() for panel in dashboard.panels} == set(KINDS)


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ('"graphMode": "area"', '"graphMode": "aera"', '"aera"'),
        ('"schemaVersion": 41', '"schemaVersion": "41"', "to type 'number'"),
        ('"drawStyle": "line"', '"drawStile": "line"', "drawStile"),
        ('"format": "time_series"', '"format": "series"', '"series"'),
    ],
)
def test_a_dashboard_that_is_wrong_is_refused(
    tmp_path: Path, right: str, wrong: str, what: str
) -> None:
    source = as_typescript(dashboards()[0].to_json())
    assert right in source
    said = "\n".join(complaints(tmp_path, source.replace(right, wrong)))
    assert what in said
