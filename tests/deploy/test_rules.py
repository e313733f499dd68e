"""The rules: each alert is understood, documented, and shown to fire and to keep quiet."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_text

from deploy.grafana.__main__ import dashboards
from server.api.exposition import render
from tests.deploy.promql import PROMETHEUS, bounds, expressions, left_sides, names, rules
from tests.deploy.tools import must_pass, needs
from tests.deploy.traffic import busy_metrics

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "rules"
ALERTS = rules("alerts.yaml")
NAMES = sorted({rule["alert"] for rule in ALERTS})


def sections() -> dict[str, str]:
    """The alerts' sections in the operations manual."""
    manual = (ROOT / "docs" / "operations.md").read_text()
    return dict(re.findall(r"^### (Turnout\w+)\n(.*?)(?=^#|\Z)", manual, re.MULTILINE | re.DOTALL))


@needs("promtool")
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    said = must_pass("promtool", "check", "config", PROMETHEUS / "prometheus.yaml")
    assert "2 rule files found" in said
    for file in ("recording.yaml", "alerts.yaml"):
        must_pass("promtool", "check", "rules", PROMETHEUS / file)


@needs("promtool")
@pytest.mark.parametrize("name", NAMES)
def test_an_alert_fires_when_it_must_and_not_before(name: str) -> None:
    must_pass("promtool", "test", "rules", CASES / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_has_a_case_that_fires_and_one_that_is_quiet(name: str) -> None:
    content = yaml.safe_load((CASES / f"{name}.yaml").read_text())
    cases = [case for test in content["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases} == {name}
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}
    fired = {
        alert["exp_labels"]["severity"] for case in cases for alert in case.get("exp_alerts") or ()
    }
    assert fired == {rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == name}


def test_no_case_is_left_of_an_alert_that_is_gone() -> None:
    assert sorted(path.stem for path in CASES.iterdir()) == NAMES


@pytest.mark.parametrize("rule", ALERTS, ids=lambda r: f"{r['alert']} {r['labels']['severity']}")
def test_an_alert_is_comparisons_and_says_whom_to_wake_and_where_to_read(
    rule: dict[str, Any],
) -> None:
    assert left_sides(rule["expr"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_the_manual_has_a_section_for_each_alert_and_for_no_other() -> None:
    assert sorted(sections()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_section_says_what_it_means_what_to_look_at_and_what_to_do(name: str) -> None:
    for part in ("**Means.** ", "**Look at.** ", "**Do.** "):
        assert part in sections()[name]


def test_a_panel_that_a_text_names_is_there() -> None:
    titles = {panel.title for dashboard in dashboards() for panel in dashboard.panels}
    quoted = re.findall(r"“([^”]*)”", " ".join(sections().values()))
    named = {" ".join(title.split()) for title in quoted}
    assert len(named) > 10
    assert named <= titles


def test_alerts_that_panels_name_are_there() -> None:
    said = " ".join(panel.says for dashboard in dashboards() for panel in dashboard.panels)
    assert set(re.findall(r"\bTurnout[A-Z]\w+", said)) <= set(NAMES)


def test_every_recorded_series_has_its_own_name_and_somebody_who_reads_it() -> None:
    recorded = [rule["record"] for rule in rules("recording.yaml")]
    assert len(set(recorded)) == len(recorded)
    read = {name for rule in rules("recording.yaml") + ALERTS for name in names(rule["expr"])}
    read |= {name for each in dashboards() for expr in expressions(each) for name in names(expr)}
    assert set(recorded) <= read


def test_a_bound_that_a_rule_picks_is_one_of_the_histogram_s() -> None:
    """One that is not would read as 0 late, for ever."""
    exported = {
        (sample.name.removesuffix("_bucket"), sample.labels["le"])
        for family in parse_text(render(busy_metrics(1, 1)).decode())
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    picked = {pair for rule in rules("recording.yaml") for pair in bounds(rule["expr"])}
    assert len(picked) == 2
    assert picked <= exported


def test_the_windows_of_a_rule_s_name_and_of_its_expression_agree() -> None:
    for rule in rules("recording.yaml"):
        (said,) = re.findall(r"(?:rate|deriv|min)(\d+[mh])$", rule["record"])
        windows = set(re.findall(r"\[(\w+)\]", rule["expr"]))
        through = {
            re.findall(r"\d+[mh]$", name)[0] for name in names(rule["expr"]) if ":rate" in name
        }
        assert windows | through == {said}, rule["record"]


def test_the_scraped_job_is_the_one_that_rules_and_panels_name() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    (scraped,) = config["scrape_configs"]
    said = [rule["expr"] for rule in ALERTS]
    said += [expr for dashboard in dashboards() for expr in expressions(dashboard)]
    assert {job for expr in said for job in re.findall(r'job="(\w+)"', expr)} == {
        scraped["job_name"]
    }
    assert scraped["metrics_path"] == "/metrics"
    assert all((PROMETHEUS / file).is_file() for file in config["rule_files"])


@pytest.mark.parametrize(
    ("alert", "expected"),
    [
        ("a > 14.4 * 0.01 and b * 3600 > 50", ["a", "b * 3600"]),
        ('up{job="turnout"} < 1', ['up{job="turnout"}']),
        ("a - b > 15", ["a - b"]),
    ],
)
def test_left_sides_are_found(alert: str, expected: list[str]) -> None:
    assert left_sides(alert) == expected


@pytest.mark.parametrize("alert", ["a > b", "a > 1 or b > 1", "absent(a)"])
def test_an_alert_that_is_anything_else_is_refused(alert: str) -> None:
    with pytest.raises(AssertionError):
        left_sides(alert)
