"""The bar of an engine's start, and what is said of it afterwards."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from server.__main__ import _Handler
from server.start_display import StartDisplay


def test_each_stage_lasts_until_the_next_one_is_heard_of() -> None:
    clock = iter([10.0, 14.0, 19.0, 20.5])
    display = StartDisplay(Console(file=io.StringIO()), now=lambda: next(clock))
    display.on_progress("loading the base", 0.5)
    display._now = lambda: 16.0  # more of the same stage begins none
    display.on_progress("loading the base", 1.0)
    display._now = lambda: next(clock)
    display.on_progress("capturing CUDA graphs", 0.1)
    assert display.took() == (
        "Started in 10.5 s: starting the engine 4.0, loading the base 5.0, "
        "capturing CUDA graphs 1.5"
    )


def test_the_stage_that_runs_is_on_the_terminal_and_gone_at_the_end() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    with StartDisplay(console) as display:
        display.on_progress("loading the base", 0.25)
        display.refresh()
        assert "loading the base" in written.getvalue()
        assert "25%" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K")  # the bar's line is erased


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_the_log_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = _Handler()
    with StartDisplay(Console(file=terminal, width=80, legacy_windows=False)) as display:
        display.refresh()
        handler.emit(logging.makeLogRecord({"msg": "adapter registered"}))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", terminal.getvalue()).splitlines()
    assert "adapter registered" in lines
    handler.emit(logging.makeLogRecord({"msg": "afterwards"}))
    assert terminal.getvalue().endswith("afterwards\n")


def test_a_log_that_goes_to_a_file_is_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, file = _Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with StartDisplay(Console(file=terminal, width=80)):
        _Handler().emit(logging.makeLogRecord({"msg": "adapter registered"}))
    assert file.getvalue() == "adapter registered\n"
    assert "registered" not in terminal.getvalue()
