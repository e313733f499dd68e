"""docs/loadtest.md and the README name what there is, and nothing that is not."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from loadtest import compare
from loadtest.cli import app
from loadtest.figures import MAX_LATE_S, MAX_SIGMAS
from loadtest.record import OUTCOMES
from loadtest.trace import decode_trace

ROOT = Path(__file__).parent.parent.parent
DOC = (ROOT / "docs" / "loadtest.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> dict[str, Any]:
    """The subcommands by name."""
    group: Any = get_command(app)
    return dict(group.commands)


def options_of(command: str) -> set[str]:
    """A command's options, both forms of a flag."""
    return {
        option
        for parameter in commands()[command].params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }


def called(text: str) -> list[list[str]]:
    """`turnout loadtest` commands in a text's code blocks, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines()]
    return [
        words[words.index("loadtest") + 1 :]
        for words in lines
        if "loadtest" in words and words[0] != "make"
    ]


@pytest.mark.parametrize("text", [DOC, README], ids=["docs/loadtest.md", "README.md"])
def test_every_command_that_is_shown_exists_with_its_options(text: str) -> None:
    assert called(text)
    for command, *words in called(text):
        assert command in commands()
        assert {word for word in words if word.startswith("--")} <= options_of(command)


def test_every_command_is_in_the_document() -> None:
    for name in commands():
        assert f"turnout loadtest {name}" in DOC or f"`{name}`" in DOC or name == "demo", name
    assert "make loadtest" in DOC


def test_every_option_in_prose_is_one_of_some_commands() -> None:
    known = set().union(*(options_of(name) for name in commands()))
    known |= {
        "--custom-dataset-type",
        "--fixed-schedule",
        "--input-file",
        "--streaming",
    }  # aiperf's
    known.add("--no-prefix-caching")  # of `turnout serve`
    assert set(re.findall(r"--[a-z][a-z0-9-]+", DOC)) <= known


def test_the_example_line_is_a_trace() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", DOC, re.DOTALL)
    (line,) = decode_trace(text.encode(), "docs/loadtest.md")
    assert line.prompt_tokens == 64


def test_every_outcome_and_every_limit_is_explained() -> None:
    for outcome in OUTCOMES:
        assert f"`{outcome}`" in DOC
    assert f"over {MAX_LATE_S * 1e3:.0f} ms" in DOC
    assert f"more than {MAX_SIGMAS:.0f} √n" in DOC
    assert "1, 8 and 32" in DOC
    assert compare.CompareOptions().batches == (1, 8, 32)


def test_make_loadtest_runs_the_demonstration() -> None:
    command = ["make", "-n", "loadtest", "ARGS=--adapters 3", f"PYTHON={sys.executable}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "turnout loadtest demo --adapters 3" in said.stdout
