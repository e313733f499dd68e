"""Image, compose file and unit: what can be said of them without running them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from server import cli
from server.config import ServerConfig
from tests.deploy.tools import ROOT, must_pass, needs, run

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "turnout.service"


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions and their arguments, comments and line ends gone."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, rest in pairs]


def serve_options() -> set[str]:
    """Every option of `turnout serve`."""
    group: Any = typer.main.get_command(cli.app)
    command = group.commands["serve"]
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def compose() -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert isinstance(content, dict)
    return content


def unit() -> dict[str, list[str]]:
    """The unit's settings, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found


def seconds(text: str) -> int:
    return int(re.sub(r"s$", "", text))


def test_every_file_that_the_image_copies_is_there() -> None:
    copied = [rest for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = [source for rest in copied for source in rest.split()[:-1]]
    assert {"server", "adapters", "pyproject.toml"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    allowed = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    assert sorted(line[1:] for line in allowed if line.startswith("!")) == sorted(sources)


def test_the_image_runs_as_nobody_special_and_says_whether_it_lives() -> None:
    words = dict(instructions())
    assert words["USER"] == "10001:10001"
    assert "/health" in words["HEALTHCHECK"]
    assert words["ENTRYPOINT"] == '["turnout"]'
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 2
    assert all(re.search(r":\d", base) for base in bases), "a tag that moves"


def test_the_image_s_torch_is_the_makefile_s() -> None:
    (makefile,) = re.findall(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert ("ARG", f"TORCH={makefile}") in instructions()


def test_what_the_image_and_the_unit_start_with_are_options_of_serve() -> None:
    (command,) = [rest for word, rest in instructions() if word == "CMD"]
    (start,) = unit()["ExecStart"]
    given = yaml.safe_load(command) + shlex.split(start)
    environment = shlex.split((DEPLOY / "systemd" / "turnout.env").read_text(), comments=True)
    given += [word.removeprefix("TURNOUT_OPTIONS=") for word in environment]
    options = {word for word in given if word.startswith("--")}
    assert options >= {"--host", "--api-keys"}
    assert options <= serve_options()


def test_options_that_the_manual_names_are_there() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`(--[a-z-]+)", manual))
    assert len(named) > 10
    assert named <= serve_options()


def test_whoever_stops_the_server_waits_longer_than_a_drain_takes() -> None:
    drain_s = ServerConfig().drain_s
    service = compose()["services"]["turnout"]
    assert seconds(service["stop_grace_period"]) > drain_s + 5
    assert seconds(unit()["TimeoutStopSec"][0]) > drain_s + 5


def test_a_drain_that_is_stuck_is_heard_of_before_the_process_is_killed() -> None:
    """It takes a scrape and an evaluation; in those seconds nobody may have stopped the server."""
    alerts = (DEPLOY / "prometheus" / "alerts.yaml").read_text()
    (past_s,) = re.findall(r"turnout_drain_limit_seconds > (\d+)\n", alerts)
    scraping = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["global"]
    wait = sum(seconds(scraping[each]) for each in ("scrape_interval", "evaluation_interval"))
    heard_of = ServerConfig().drain_s + int(past_s) + wait
    assert seconds(compose()["services"]["turnout"]["stop_grace_period"]) > heard_of
    assert seconds(unit()["TimeoutStopSec"][0]) > heard_of


def test_only_the_server_gets_the_signal_and_an_engine_s_death_stops_nobody() -> None:
    assert unit()["KillMode"] == ["mixed"]
    assert unit()["OOMPolicy"] == ["continue"]


def test_the_three_services_are_confined_and_on_loopback() -> None:
    services = compose()["services"]
    assert set(services) == {"turnout", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name


def test_what_compose_mounts_is_there_and_where_it_is_looked_for() -> None:
    content = compose()
    services = content["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    for source in (mount.split(":")[0] for mount in mounts):
        assert source in content["volumes"] or (DEPLOY / source).is_dir(), source
    config = services["prometheus"]["command"][0].removeprefix("--config.file=/etc/prometheus/")
    assert (DEPLOY / "prometheus" / config).is_file()
    grafana = DEPLOY / "grafana"
    (provider,) = _yaml(grafana / "provisioning/dashboards/turnout.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (grafana / "dashboards" / home.name).is_file()


def test_grafana_asks_the_prometheus_that_scrapes_the_server() -> None:
    (source,) = _yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    scraped = _yaml(DEPLOY / "prometheus/prometheus.yaml")
    services = compose()["services"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"][0].endswith(":9090")
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == ["turnout:8000"]
    assert services["turnout"]["ports"][0].endswith(":8000")
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_secrets_are_files_that_git_ignores() -> None:
    content = compose()
    used = {name for service in content["services"].values() for name in service.get("secrets", ())}
    assert used == set(content["secrets"])
    files = [secret["file"] for secret in content["secrets"].values()]
    assert all(file.startswith("./secrets/") for file in files)
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_grafana_that_runs_is_the_one_whose_schema_is_checked() -> None:
    image = compose()["services"]["grafana"]["image"]
    tools = (ROOT / ".ci" / "tools").read_text()
    assert f"@grafana/schema@{image.split(':')[1]} " in tools


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@needs("hadolint")
def test_hadolint_has_nothing_to_say() -> None:
    assert must_pass("hadolint", "--failure-threshold", "style", DEPLOY / "Containerfile") == ""


@needs("check-jsonschema")
def test_the_compose_file_fits_its_schema() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    must_pass("check-jsonschema", *schema, DEPLOY / "compose.yaml")


def with_a_program_that_exists(folder: Path, text: str) -> Path:
    """The unit, beside nothing else, starting something that this machine has."""
    path = folder / "turnout.service"
    path.write_text(text.replace("/opt/turnout/.venv/bin/turnout", "/bin/true"))
    return path


@needs("systemd-analyze")
def test_systemd_understands_the_whole_unit(tmp_path: Path) -> None:
    path = with_a_program_that_exists(tmp_path, UNIT.read_text())
    done = run("systemd-analyze", "verify", "--man=no", path)
    assert (done.returncode, _about_the_unit(done.stdout + done.stderr)) == (0, [])


@needs("systemd-analyze")
def test_systemd_would_say_so_if_it_did_not(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("KillMode=mixed", "KillMood=mixed")
    done = run("systemd-analyze", "verify", "--man=no", with_a_program_that_exists(tmp_path, text))
    assert _about_the_unit(done.stdout + done.stderr)


@needs("systemd-analyze")
@pytest.mark.parametrize(("tenths", "is_enough"), [(20, True), (10, False)])
def test_the_unit_is_hardened(tmp_path: Path, tenths: int, is_enough: bool) -> None:
    path = with_a_program_that_exists(tmp_path, UNIT.read_text())
    options = ("--offline=yes", "--no-pager", f"--threshold={tenths}")
    done = run("systemd-analyze", "security", *options, path)
    assert "Overall exposure level" in done.stdout
    assert (done.returncode == 0) == is_enough


def _about_the_unit(said: str) -> list[str]:
    return [line for line in said.splitlines() if "turnout.service" in line]
