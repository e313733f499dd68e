"""A real server, a real load, a real Prometheus: every expression of ours gives a finite figure."""

import contextlib
import json
import math
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.grafana.__main__ import dashboards
from server.default_base import DEFAULT_BASE_NAME, ensure_default_base
from tests.deploy.promoted import put_promoted
from tests.deploy.promql import PROMETHEUS, filled_in, left_sides, rules
from tests.deploy.scripted_load import PROMOTED, ScriptedLoad
from tests.deploy.tools import find, needs
from tests.server.test_serve import Server

pytestmark = [pytest.mark.slow, needs("prometheus")]

START_TIMEOUT_S = 60.0
PANELS = [
    (f"{dashboard.uid}: {panel.title} {index}", query.expr)
    for dashboard in dashboards()
    for panel in dashboard.panels
    for index, query in enumerate(panel.queries)
]
ABORTED = 'vllm:request_success_total{finished_reason="abort"}'
RULES = rules("recording.yaml") + rules("alerts.yaml")


class Prometheus:
    """One Prometheus process with our rules, scraping every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        folder.mkdir()
        config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / file) for file in config["rule_files"]]
        config["scrape_configs"][0]["scrape_timeout"] = "1s"
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = [
            str(find("prometheus")),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
            "--log.level=warn",
        ]
        self._process = subprocess.Popen(command)
        self._http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)
        self.wait_until(self._is_ready)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector that an expression gives now; a scalar as a vector of one."""
        reply = self._http.get("/api/v1/query", params={"query": expr}).json()
        assert reply["status"] == "success", f"{expr}: {reply['error']}"
        result = reply["data"]["result"]
        return result if reply["data"]["resultType"] == "vector" else [{"value": result}]

    def value(self, expr: str) -> float:
        """The one figure of an expression; 0 without any."""
        vector = self.query(expr)
        assert len(vector) <= 1, expr
        return float(vector[0]["value"][1]) if vector else 0.0

    def rule_groups(self) -> list[dict[str, Any]]:
        """What Prometheus itself says of our rules."""
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        assert isinstance(groups, list)
        return groups

    def wait_until(self, holds: Any) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not holds():
            assert self._process.poll() is None, "Prometheus ended"
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.2)

    def stop(self) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self._http.get("/-/ready").status_code == 200
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, when it has scraped a server before, during and after the scripted load."""
    ensure_default_base()
    folder = tmp_path_factory.mktemp("prometheus")
    store = folder / "store"
    put_promoted(store, PROMOTED)
    server = Server(store, "--bank-rows", "8", "--max-waiting", "3", "--kv-gib", "0.25")
    load = ScriptedLoad(server.url, DEFAULT_BASE_NAME, store)
    started: Prometheus | None = None
    try:
        started = Prometheus(folder / "prometheus", server.url.removeprefix("http://"))
        running = started
        running.wait_until(lambda: running.value('up{job="turnout"}') == 1)
        load.every_way()
        load.every_way()  # by now every series has been scraped, and grows
        failed = 'ALERTS{alertname="TurnoutAdapterLoadsFail",alertstate="firing"}'
        running.wait_until(lambda: running.value(failed) == 1)
        recorded = "instance:turnout_loads_per_request:ratio_rate10m"
        running.wait_until(lambda: running.value(recorded) > 0)
        running.wait_until(lambda: running.value(ABORTED) == 8)  # the last of what the load does
        yield running
    finally:
        load.close()
        if started is not None:
            started.stop()
        server.stop()


def assert_finite(prometheus: Prometheus, expr: str) -> None:
    figures = [float(sample["value"][1]) for sample in prometheus.query(expr)]
    assert figures, f"no sample: {expr}"
    assert all(map(math.isfinite, figures)), f"{figures}: {expr}"


@pytest.mark.parametrize("expr", [expr for _, expr in PANELS], ids=[name for name, _ in PANELS])
def test_every_expression_of_every_panel_gives_finite_samples(
    prometheus: Prometheus, expr: str
) -> None:
    assert_finite(prometheus, filled_in(expr))


@pytest.mark.parametrize("name", [rule["record"] for rule in rules("recording.yaml")])
def test_every_recorded_series_is_finite(prometheus: Prometheus, name: str) -> None:
    assert_finite(prometheus, name)


@pytest.mark.parametrize(
    "left", sorted({left for rule in rules("alerts.yaml") for left in left_sides(rule["expr"])})
)
def test_what_every_alert_watches_is_finite(prometheus: Prometheus, left: str) -> None:
    assert_finite(prometheus, left)


def test_prometheus_evaluates_every_rule_without_an_error(prometheus: Prometheus) -> None:
    evaluated = [rule for group in prometheus.rule_groups() for rule in group["rules"]]
    assert len(evaluated) == len(RULES)
    assert {(rule["health"], rule.get("lastError", "")) for rule in evaluated} == {("ok", "")}


def test_the_load_took_every_way(prometheus: Prometheus) -> None:
    for expr, at_least in (
        ('turnout_bank_loads_total{tier="disk",result="ok"}', 2),
        ('turnout_bank_loads_total{tier="host",result="ok"}', 2),
        ('turnout_bank_loads_total{tier="gpu",result="failed"}', 2),
        ('turnout_evictions_total{tier="gpu"}', 4),
        ('turnout_errors_total{code="server_overloaded"}', 2),
        ('turnout_errors_total{code="adapter_load_failed"}', 2),
        (ABORTED, 8),
        ('vllm:request_success_total{finished_reason="length"}', 8),
        ('turnout_tokens_total{path="base"}', 10),
        ('turnout_tokens_total{path="adapter"}', 30),
        ('turnout_tokens_total{path="merged"}', 12),
        ("vllm:prefix_cache_hits_total", 16),
        ("max_over_time(vllm:num_requests_running[5m])", 2),
    ):
        assert prometheus.value(expr) >= at_least, expr


def test_names_with_a_colon_arrive_as_they_are(prometheus: Prometheus) -> None:
    names = {
        sample["metric"]["__name__"]
        for sample in prometheus.query('{__name__=~"vllm.num_requests_.*"}')
    }
    assert names == {"vllm:num_requests_running", "vllm:num_requests_waiting"}


def test_no_alert_fires_but_those_that_the_load_provokes(prometheus: Prometheus) -> None:
    of_speed = {"TurnoutFirstTokenSlow", "TurnoutTokensSlow"}  # this machine may well be slow
    firing = prometheus.query('ALERTS{alertstate="firing"}')
    names = {sample["metric"]["alertname"] for sample in firing}
    assert names - of_speed == {"TurnoutAdapterLoadsFail"}


def test_grafana_s_variables_find_what_they_list(prometheus: Prometheus) -> None:
    for dashboard in dashboards():
        made: Any = dashboard.to_json()
        for variable in made["templating"]["list"]:
            if variable["type"] == "query":
                query = variable["query"]["query"]
                metric, label = query.removeprefix("label_values(").removesuffix(")").split(", ")
                assert prometheus.query(f"count by ({label}) ({metric})"), json.dumps(variable)
