"""The dashboards: made by the script, whole, and about metrics that exist."""

import json
import re
from collections import Counter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from deploy.grafana.__main__ import FOLDER, dashboards, file_of, main, text_of
from deploy.grafana.panels import COLUMNS, Dashboard, Panel, Row, variable
from deploy.grafana.queries import mean, or_zero, quantile, rate, ratio
from server.api.exposition import render
from tests.deploy.promql import expressions, names, rules
from tests.deploy.traffic import busy_metrics

# Exported and on no panel, each with its reason.
INTERNAL = {
    f"vllm:{name}": "the sum over the paths of turnout_" + name
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    )
}
OF_PROMETHEUS = {"up"}
ALL = dashboards()
PANELS = [(dashboard, panel) for dashboard in ALL for panel in dashboard.panels]
EVERY_PANEL = pytest.mark.parametrize(
    ("dashboard", "panel"), PANELS, ids=[f"{d.uid}: {p.title}" for d, p in PANELS]
)
EVERY_DASHBOARD = pytest.mark.parametrize("dashboard", ALL, ids=[d.uid for d in ALL])


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Every family that a server ever exports."""
    text = render(busy_metrics(num_adapters=3, num_streams=2)).decode()
    families = list(parse_text(text))
    assert all(family.samples for family in families), "traffic that touches every family"
    return {family.name for family in families}


def family_of(sample: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", sample)


def read_by(expr: str, recorded: dict[str, str]) -> set[str]:
    """The families that an expression reads, through recording rules."""
    found: set[str] = set()
    for name in names(expr):
        found |= read_by(recorded[name], recorded) if name in recorded else {family_of(name)}
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules("recording.yaml")}


@EVERY_DASHBOARD
def test_the_file_is_what_the_script_makes(dashboard: Dashboard) -> None:
    assert file_of(dashboard).read_text(encoding="utf-8") == text_of(dashboard), (
        "run `python -m deploy.grafana`"
    )


def test_no_file_is_left_of_a_dashboard_that_is_gone() -> None:
    assert set(FOLDER.iterdir()) == {file_of(dashboard) for dashboard in ALL}


def test_the_script_writes_every_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.grafana.__main__.FOLDER", tmp_path)
    main()
    for dashboard in ALL:
        assert json.loads((tmp_path / f"{dashboard.uid}.json").read_text())["uid"] == dashboard.uid


def test_every_exported_metric_is_on_a_panel_or_listed_as_internal(
    exported: set[str], recorded: dict[str, str]
) -> None:
    shown = {
        name
        for dashboard in ALL
        for expr in expressions(dashboard)
        for name in read_by(expr, recorded)
    }
    assert exported - shown == set(INTERNAL)
    assert shown - exported == OF_PROMETHEUS


def test_every_rule_reads_metrics_that_are_exported(
    exported: set[str], recorded: dict[str, str]
) -> None:
    for rule in rules("recording.yaml") + rules("alerts.yaml"):
        assert read_by(rule["expr"], recorded) <= exported | OF_PROMETHEUS, rule


@EVERY_PANEL
def test_a_panel_says_what_it_shows(dashboard: Dashboard, panel: Panel) -> None:
    assert panel.title
    assert panel.says.endswith((".", "?"))
    assert panel.queries
    assert len(panel.columns) in (0, len(panel.queries))
    assert (panel.kind == "table") == bool(panel.columns)


@EVERY_DASHBOARD
def test_panels_have_their_own_place(dashboard: Dashboard) -> None:
    made: Any = dashboard.to_json()
    taken: Counter[tuple[int, int]] = Counter()
    for place in (panel["gridPos"] for panel in made["panels"]):
        assert 0 <= place["x"] <= place["x"] + place["w"] <= COLUMNS
        for y in range(place["y"], place["y"] + place["h"]):
            taken.update((x, y) for x in range(place["x"], place["x"] + place["w"]))
    assert set(taken.values()) == {1}
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)


@EVERY_DASHBOARD
def test_titles_are_not_used_twice(dashboard: Dashboard) -> None:
    titles = [(row.title, panel.title) for row in dashboard.rows for panel in row.panels]
    assert len(set(titles)) == len(titles)


@EVERY_DASHBOARD
def test_every_variable_that_is_used_is_defined(dashboard: Dashboard) -> None:
    made: Any = dashboard.to_json()
    defined = {each["name"] for each in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(made)))
    assert used == defined


@EVERY_DASHBOARD
def test_only_the_chosen_instances_are_shown(dashboard: Dashboard) -> None:
    for expr in expressions(dashboard):
        for name in names(expr) - OF_PROMETHEUS:
            if ":" not in name.removeprefix("vllm:"):  # a recorded series has no such label
                selected = re.findall(rf"{name}(\{{[^}}]*\}})", expr)
                assert selected, expr
                assert all('instance=~"$instance"' in each for each in selected), expr


def test_every_dashboard_has_its_own_address_and_links_to_the_others() -> None:
    assert len({dashboard.uid for dashboard in ALL}) == len(ALL) == 3
    for dashboard in ALL:
        made: Any = dashboard.to_json()
        (link,) = made["links"]
        assert set(link["tags"]) <= set(made["tags"])


def a_panel(title: str, width: int, height: int) -> Panel:
    return Panel(title=title, says="It.", queries=(), width=width, height=height)


def test_a_line_is_as_full_as_it_gets_and_as_tall_as_its_tallest() -> None:
    panels = (a_panel("a", 12, 4), a_panel("b", 12, 8), a_panel("c", 6, 3))
    row, after = Row("first", panels), Row("second", ())
    made: Any = Dashboard(uid="u", title="t", says="s", rows=(row, after)).to_json()
    places = {
        each["title"]: (each["gridPos"]["x"], each["gridPos"]["y"]) for each in made["panels"]
    }
    assert places == {"first": (0, 0), "a": (0, 1), "b": (12, 1), "c": (0, 9), "second": (0, 12)}


def test_a_table_joins_its_queries_and_asks_for_one_moment() -> None:
    panel: Any = next(panel for _, panel in PANELS if panel.kind == "table").to_json(1, 0, 0)
    assert {(t["instant"], t["range"], t["format"]) for t in panel["targets"]} == {
        (True, False, "table")
    }
    merge, organize = panel["transformations"]
    assert merge["id"] == "merge"
    columns = organize["options"]["renameByName"]
    assert set(columns) == {f"Value #{target['refId']}" for target in panel["targets"]}


def test_limits_become_lines_or_colors() -> None:
    for kind, mode in (("timeseries", "palette-classic"), ("stat", "thresholds")):
        panel: Any = Panel(
            title="a",
            says="It.",
            queries=(),
            kind=kind,  # type: ignore[arg-type]
            limits=(1, 2),
        ).to_json(1, 0, 0)
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["color"]["mode"] == mode
        assert [step["value"] for step in defaults["thresholds"]["steps"]] == [None, 1, 2]
        drawn = defaults["custom"].get("thresholdsStyle")
        assert drawn == ({"mode": "dashed"} if kind == "timeseries" else None)


def test_queries_are_written_as_they_are_meant() -> None:
    chosen = 'instance=~"$instance"'
    assert rate("a_total", 'x="1"', by="p", window="5m") == (
        f'sum by (p) (rate(a_total{{{chosen},x="1"}}[5m]))'
    )
    assert ratio("x", "y") == "x / (y > 0) or y * 0"
    assert or_zero("x") == "x or vector(0)"
    assert mean("h").startswith(f"sum (rate(h_sum{{{chosen}}}[$__rate_interval])) / (sum (rate(h_c")
    by_path = quantile(0.5, "h", by="path")
    assert by_path.startswith("histogram_quantile(0.5, sum by (le, path) (rate(h_bucket{")
    assert by_path.endswith(f"{{{chosen}}}[$__rate_interval])) * 0")


def test_a_variable_lists_a_label_and_begins_with_all() -> None:
    made: Any = variable("adapter", "Adapter", "turnout_adapter_requests_total")
    assert made["query"]["query"] == "label_values(turnout_adapter_requests_total, adapter)"
    assert made["current"]["value"] == ["$__all"]
    assert made["allValue"] == ".*"


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ('sum by (a, b) (rate(x_total{c="d",e=~"$f"}[5m]))', {"x_total"}),
        ("vllm:x / on (job) group_left () (y > 0) or y * 0", {"vllm:x", "y"}),
        ("histogram_quantile(0.99, sum by (le) (rate(h_bucket[1m]))) >= 1e-9", {"h_bucket"}),
        ("time() - max by (p) (g{}) or vector(0)", {"g"}),
        ("topk(12, a:b:rate5m)", {"a:b:rate5m"}),
    ],
)
def test_names_are_found_in_expressions(expr: str, expected: set[str]) -> None:
    assert names(expr) == expected
