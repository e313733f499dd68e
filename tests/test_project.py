"""The project's own files agree with each other."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# A pip of somebody else's must not decide what these tests see.
FAKE_PYTHON = """#!/bin/sh
echo "python $*" >> "$LOG"
case "$*" in
  *torch==2.13.0+cpu*) exit ${NO_CPU_BUILD:-0} ;;
esac
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]


def pins(lines: list[str]) -> dict[str, str]:
    """Exact versions by normalized name; anything else fails."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+]+)(; .+)?", line)
        assert match, line
        found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


def test_every_dependency_is_pinned_and_constraints_agree() -> None:
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    constrained = pins([line for line in constraints if not line.startswith("#")])
    wanted = pins(project()["dependencies"] + project()["optional-dependencies"]["dev"])
    assert {name: constrained.get(name) for name in wanted} == wanted
    assert "torch" not in constrained  # the Makefile's choice


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in set(phony[1].split()) - {"help"}:
        assert f"  make {target} " in said.stdout, target


def test_ci_runs_the_gate_the_fast_tests_and_the_slow_ones_last() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == [
        "make check",
        "make test",
        "make test-slow",
    ]
    assert "set -euo pipefail" in lines
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that set-up needs, with a python that only writes down how it was called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def make(checkout: Path, *args: str, gpu: bool = False, cpu_build: bool = True) -> list[str]:
    """Run make; return what pip was told to install, a line each."""
    log, tools = checkout / "log", checkout / "tools"
    log.write_text("")
    tools.mkdir(exist_ok=True)
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if gpu else 1}\n")
    (tools / "nvidia-smi").chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "LOG": str(log),
        "NO_CPU_BUILD": "0" if cpu_build else "1",
    }
    command = ["make", "-s", "PYTHON=python3", *args]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line for line in log.read_text().splitlines() if " install " in line]


def test_without_a_gpu_the_cpu_build_is_installed_and_no_other_index_asked(checkout: Path) -> None:
    torch, rest = make(checkout, "setup")
    assert torch.endswith(" torch==2.13.0+cpu")
    assert rest.endswith(" --editable .[dev]")
    assert all("--constraint constraints.txt" in line for line in (torch, rest))


def test_where_pip_knows_no_cpu_build_pytorchs_index_is_asked(checkout: Path) -> None:
    _, torch, _ = make(checkout, "setup", cpu_build=False)
    assert "torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu" in torch


def test_with_a_gpu_the_plain_build_is_installed(checkout: Path) -> None:
    torch, _ = make(checkout, "setup", gpu=True)
    assert torch.endswith(" torch==2.13.0")


def test_set_up_runs_once_and_again_when_the_pins_change(checkout: Path) -> None:
    assert make(checkout, "setup")
    assert make(checkout, "setup") == []
    stamp = (checkout / ".venv" / ".installed").stat()
    newer = stamp.st_mtime_ns + 10**9
    os.utime(checkout / "pyproject.toml", ns=(newer, newer))
    assert make(checkout, "setup")


def test_clean_keeps_the_adapters(checkout: Path) -> None:
    for folder in (".turnout/store/objects", ".turnout/base/x"):
        (checkout / folder).mkdir(parents=True)
    make(checkout, "clean")
    assert (checkout / ".turnout/store/objects").is_dir()
    assert not (checkout / ".turnout/base").exists()
    assert not (checkout / ".venv").exists()
