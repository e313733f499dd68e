"""The command line, run in this process, for the tests of its files."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from server import cli

Turnout = Callable[..., str]
FakeModule = Callable[..., None]


@pytest.fixture
def turnout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Turnout:
    """Run the command in a state folder of its own; return stdout. Exit codes but 0 fail."""
    monkeypatch.setenv("TURNOUT_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args: object) -> str:
        capsys.readouterr()  # what came before is not the command's
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(arg) for arg in args])
        printed = capsys.readouterr()
        assert stopped.value.code in (0, None), printed.err
        return printed.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], turnout: Turnout) -> Turnout:
    """Run the command, which must exit with 1; return the one line it says on stderr."""

    def run(*args: object) -> str:
        capsys.readouterr()  # what came before is not the command's
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(arg) for arg in args])
        printed = capsys.readouterr()
        assert stopped.value.code == 1
        assert printed.out == ""
        assert printed.err.startswith("turnout: ")
        assert "Traceback" not in printed.err
        return printed.err

    return run


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """Put a module with one function in place of the real one."""

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put
