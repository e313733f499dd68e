"""`turnout bench`: a command for each measurement, with options of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server import cli
from tests.server.conftest import FakeModule, Turnout

MODULES = {
    "gpu-table": "server.bench.gpu_table",
    "merged": "server.bench.merged",
    "popular": "server.bench.popularity",
    "served": "server.bench.served",
}


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def asked(fake_module: FakeModule) -> list[tuple[Any, ...]]:
    """What a measurement of a GPU was called with: its command, arguments and keywords."""
    seen: list[tuple[Any, ...]] = []

    def note(command: str) -> Any:
        return lambda *given, **named: seen.append((command, *given, named))

    for command, module in MODULES.items():
        fake_module(module, run=note(command))
    return seen


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("command", ["gpu-table", "merged"])
def test_a_measurement_of_a_gpu_is_told_where_its_figures_go(
    asked: list[tuple[Any, ...]], turnout: Turnout, tmp_path: Path, command: str
) -> None:
    turnout("bench", command)
    turnout("bench", command, "--json", tmp_path / "t.json")
    assert asked == [(command, None, {}), (command, tmp_path / "t.json", {})]


@pytest.mark.usefixtures("_gpu")
def test_popularity_is_told_how_many_adapters_and_how_long(
    asked: list[tuple[Any, ...]], turnout: Turnout, tmp_path: Path
) -> None:
    turnout("bench", "popular")
    turnout("bench", "popular", "--adapters", 50, "--seconds", 60, "--json", tmp_path / "t.json")
    given = (50, 60.0, tmp_path / "t.json")
    assert asked == [("popular", 1000, 180.0, None, {}), ("popular", *given, {})]


@pytest.mark.usefixtures("_gpu")
def test_a_served_comparison_is_told_where_its_report_goes_and_whether_to_merge(
    asked: list[tuple[Any, ...]], turnout: Turnout, tmp_path: Path
) -> None:
    turnout("bench", "served")
    files = ("--out", tmp_path / "out", "--json", tmp_path / "t.json")
    turnout("bench", "served", "--beside-merge", *files)
    assert asked == [
        ("served", None, Path(".turnout/served"), {"beside_merge": False}),
        ("served", tmp_path / "t.json", tmp_path / "out", {"beside_merge": True}),
    ]


def test_the_engines_comparison_is_told_every_option(
    fake_module: FakeModule, turnout: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    fake_module("server.bench.run", run=seen.append, BenchOptions=dict)
    turnout("bench", "engine", "--base", tiny_base)
    sizes = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1, "--quantization", "none")
    less = ("--no-baseline", "--no-http", "--json", tmp_path / "t.json")
    turnout("bench", "engine", "--base", tiny_base, "--batch", 2, "--batch", 8, *sizes, *less)
    by_default, told = seen
    model = by_default.pop("model")
    assert (model.path, model.quantization) == (tiny_base, "nf4")
    assert by_default == {
        "batch_sizes": (1, 4, 16),
        "prompt_tokens": 64,
        "new_tokens": 64,
        "rounds": 3,
        "baseline": True,
        "http": True,
        "json_file": None,
    }
    model = told.pop("model")
    assert (model.path, model.quantization) == (tiny_base, "none")
    assert told == {
        "batch_sizes": (2, 8),
        "prompt_tokens": 8,
        "new_tokens": 4,
        "rounds": 1,
        "baseline": False,
        "http": False,
        "json_file": tmp_path / "t.json",
    }


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("engine", "--seconds=3"),
        ("engine", "--out=x"),
        ("gpu-table", "--batch=4"),
        ("gpu-table", "--base=x"),
        ("merged", "--beside-merge"),
        ("popular", "--rounds=2"),
        ("served", "--no-http"),
        ("served", "--seconds=3"),
    ],
)
def test_an_option_of_another_measurement_is_refused(
    asked: list[tuple[Any, ...]],
    fake_module: FakeModule,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
) -> None:
    fake_module("server.bench.run", run=asked.append, BenchOptions=dict)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", command, option])
    assert stopped.value.code == 2
    assert f"No such option: {option.partition('=')[0]}" in capsys.readouterr().err
    assert asked == []


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("command", "option"),
    [("engine", "--batch"), ("engine", "--rounds"), ("popular", "--adapters")],
)
def test_a_count_of_nothing_is_refused(
    asked: list[tuple[Any, ...]],
    fake_module: FakeModule,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
) -> None:
    fake_module("server.bench.run", run=asked.append, BenchOptions=dict)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", command, option, "0"])
    assert stopped.value.code == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize("command", MODULES)
def test_a_gpu_that_is_not_there_is_said_before_anything_is_made(
    asked: list[tuple[Any, ...]],
    refused: Turnout,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused("bench", command)
    assert said == f"turnout: `turnout bench {command}` measures a GPU, and torch finds none here\n"
    assert asked == []


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("command", ["engine", *MODULES])
def test_a_file_of_figures_that_cannot_be_written_is_refused_before_minutes_of_measuring(
    asked: list[tuple[Any, ...]],
    fake_module: FakeModule,
    refused: Turnout,
    tmp_path: Path,
    command: str,
) -> None:
    fake_module("server.bench.run", run=asked.append, BenchOptions=dict)
    for wrong in (tmp_path, tmp_path / "nowhere" / "t.json"):
        said = refused("bench", command, "--json", wrong)
        assert said.startswith(f"turnout: --json is '{wrong}'; it must be a file in a folder")
    assert asked == []


def test_bench_alone_shows_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench"])
    said = "".join(capsys.readouterr())
    assert "Usage: " in said
    for command in ("engine", *MODULES):
        assert f"  {command} " in said
