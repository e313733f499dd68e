"""`.ci/tools`: it fetches what can be had, says what cannot, and never fails a run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT

ORDINARY = ("bash", "cat", "chmod", "dirname", "mkdir", "tail", "timeout")
# Writes down how it was called, and makes what it was asked for.
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
[ "${DOWN:-0}" = 0 ] || { echo "no route to the mirror" >&2; exit 100; }
case "$*" in
  "-m venv "*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/pip" ;;
esac
"""
SUDO = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script, on a machine that has ordinary tools and fakes of those that reach outside."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "tools", tmp_path / ".ci" / "tools")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (*ORDINARY, "basename", "cp"):
        if (found := shutil.which(name)) is not None:
            (programs / name).symlink_to(found)
    for name in ("apt-get", "make", "npm", "python3", "sudo"):
        (programs / name).write_text(SUDO if name == "sudo" else FAKE)
        (programs / name).chmod(0o755)
    return tmp_path


def fetch(checkout: Path, *, mirrors_are_down: bool = False) -> tuple[list[str], str]:
    """Run the script, which must exit with 0: how outside tools were called, and what it said."""
    log = checkout / "log"
    log.write_text("")
    environment = {
        "PATH": str(checkout / "bin"),
        "LOG": str(log),
        "DOWN": str(int(mirrors_are_down)),
    }
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, ".ci/tools"], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines(), done.stderr


def test_everything_is_fetched_in_fixed_versions_where_they_can_be_chosen(checkout: Path) -> None:
    called, said = fetch(checkout)
    assert said == ""
    for package in ("prometheus", "chromium"):
        assert f"apt-get --yes install --no-install-recommends {package}" in called
    assert "make quantizer" in called
    (npm,) = [line for line in called if line.startswith("npm ")]
    assert npm.endswith("@grafana/schema@13.2.3 typescript@5.9.3")
    linters, aiperf = [line.split()[3:] for line in called if line.startswith("pip ")]
    assert all("==" in word for word in (*linters, *aiperf))
    assert [word.partition("==")[0] for word in aiperf] == ["aiperf"]


def test_a_mirror_that_is_down_is_said_and_fails_nothing(checkout: Path) -> None:
    called, said = fetch(checkout, mirrors_are_down=True)
    for what in (
        "Prometheus", "Chromium", "Grafana's schema", "hadolint or check-jsonschema", "aiperf",
    ):  # fmt: skip
        assert f"TOOLS: {what} could not be had; the tests that need it are SKIPPED" in said
    assert "no route to the mirror" in said
    assert any(line.endswith(" update") for line in called)  # an old list may be the reason


def test_what_is_there_is_not_fetched_again(checkout: Path) -> None:
    for name in ("prometheus", "promtool", "chromium"):
        (checkout / "bin" / name).symlink_to("bash")
    tools = checkout / ".turnout" / "tools"
    for module in ("@grafana/schema", "typescript"):
        (tools / "node_modules" / module).mkdir(parents=True)
    (tools / "venv" / "bin").mkdir(parents=True)
    for name in ("hadolint", "check-jsonschema"):
        (tools / "venv" / "bin" / name).symlink_to(checkout / "bin" / "cat")
    (tools / "aiperf" / "bin").mkdir(parents=True)
    (tools / "aiperf" / "bin" / "aiperf").symlink_to(checkout / "bin" / "cat")
    called, _ = fetch(checkout, mirrors_are_down=True)
    assert called == ["make quantizer"]  # which looks for itself


def test_ci_fetches_the_tools_before_the_tests_and_goes_on_without_them() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index("bash .ci/tools") < lines.index("make test")
    assert (ROOT / ".ci" / "tools").stat().st_mode & 0o111
