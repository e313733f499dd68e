"""Outside tools that tests use where they are; `.ci/tools` fetches them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".turnout" / "tools"


def find(name: str) -> str | None:
    """The tool's path, or None where it is not installed."""
    beside = FETCHED / "venv" / "bin"
    return shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def needs(name: str) -> pytest.MarkDecorator:
    """Skip the test where the tool is not installed."""
    return pytest.mark.skipif(find(name) is None, reason=f"{name} is not installed: .ci/tools")


def run(name: str, *args: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the tool to its end."""
    tool = find(name)
    assert tool is not None, "a test that is not marked with `needs`"
    command = [tool, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def must_pass(name: str, *args: object, timeout_s: float = 60.0) -> str:
    """Run the tool, which must exit with 0; return what it printed."""
    done = run(name, *args, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
