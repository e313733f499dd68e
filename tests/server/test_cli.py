"""The command line: what it passes on, what it prints, how it refuses."""

import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from server import cli
from server.api.auth import load_keys
from server.config import Config
from tests.server.conftest import FakeModule, Turnout


def commands() -> dict[str, Any]:
    """Every command and group by its words, but what `loadtest` holds."""
    found = {"": typer.main.get_command(cli.app)}
    todo = [""]
    while todo:
        words = todo.pop()
        for name, each in getattr(found[words], "commands", {}).items():
            if name != "loadtest":
                found[f"{words} {name}".strip()] = each
                todo.append(f"{words} {name}".strip())
    return found


COMMANDS = commands()
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def called(text: str) -> list[tuple[str, list[str]]]:
    """The commands that a text shows but those of `loadtest`, and the words after each."""
    found = []
    text = text.replace("\\\n", " ")
    for line in re.findall(r"(?:^|[`/])turnout (?!loadtest)([a-z][^`#\n]*)", text, re.MULTILINE):
        command, words = "", line.split()
        while words and f"{command} {words[0]}".strip() in COMMANDS:
            command = f"{command} {words.pop(0)}".strip()
        found.append((command, words))
    return found


def wrong(command: str, words: list[str]) -> str | None:
    """The first word after a command that it does not take; an ellipsis is somebody's choice."""
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    if hasattr(COMMANDS[command], "commands"):
        return next((word for word in words if word != "…"), None)
    if COMMANDS[command].context_settings.get("ignore_unknown_options"):
        return None
    options = {name for each in COMMANDS[command].params for name in each.opts}
    return next((word for word in given if word not in options), None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_is_shown_exists_with_its_options(document: Path) -> None:
    for command, words in called(document.read_text(encoding="utf-8")):
        assert wrong(command, words) is None, (command, words)


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("`turnout bench --batch 4`", "--batch"),
        ("$(BIN)/turnout bench merged --seconds=3", "--seconds"),
        ("turnout bench gpu_table", "gpu_table"),
        ("turnout quantise --model x", "quantise"),
        ("turnout merge --adapter x \\\n  --outt y", "--outt"),
        ("turnout train --rank 4 --out y", None),
        ("`turnout adapters …`", None),
    ],
)
def test_a_command_that_is_not_there_would_be_found(shown: str, found: str | None) -> None:
    ((command, words),) = called(shown)
    assert wrong(command, words) == found


def test_help_loads_no_torch() -> None:
    code = f"""if True:
    import sys
    from server.cli import main
    for words in {list(COMMANDS)}:
        try:
            main([*words.split(), "--help"])
        except SystemExit as stopped:
            assert not stopped.code, words
        heavy = {{"torch", "transformers", "peft", "bitsandbytes"}} & set(sys.modules)
        assert not heavy, (words, heavy)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS)
def test_help_is_whole_at_80_columns(turnout: Turnout, words: str) -> None:
    text = turnout(*words.split(), "--help")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "..." not in text.replace("[ARGS]...", "")  # what a short help that is cut ends in
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    options = {
        name for each in COMMANDS[words].params for name in (*each.opts, *each.secondary_opts)
    }
    assert {name for name in options if name.startswith("--")} <= shown


def test_help_lists_every_command_in_the_order_of_the_work(turnout: Turnout) -> None:
    listed = turnout("--help").partition("Commands:")[2].splitlines()
    names = [line.split()[0] for line in listed if line.strip()]
    assert names == [
        "serve",
        "doctor",
        "keys",
        "adapters",
        "train",
        "merge",
        "quantize",
        "promote",
        "demote",
        "candidates",
        "loadtest",
        "bench",
    ]


def test_serve_passes_every_option_on(
    fake_module: FakeModule, turnout: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[tuple[Config, bool]] = []
    fake_module(
        "server.__main__",
        run=lambda config, *, example_adapters: seen.append((config, example_adapters)),
    )
    options: dict[str, object] = {
        "--base": tiny_base,
        "--base-name": "tiny",
        "--quantization": "none",
        "--dtype": "float32",
        "--device": "cpu",
        "--max-model-len": 128,
        "--host": "0.0.0.0",
        "--port": 9000,
        "--api-keys": tmp_path / "keys",
        "--store": tmp_path / "store",
        "--bank-rows": 64,
        "--max-rank": 32,
        "--host-gib": 0.5,
        "--kv-gib": 0.25,
        "--kv-fraction": 0.8,
        "--max-running": 4,
        "--max-step-tokens": 32,
        "--max-waiting": 8,
        "--max-waiting-per-tenant": 6,
        "--drain-s": 1.5,
    }
    pairs = [part for option in options.items() for part in option]
    flags = ["--allow-other-base", "--no-prefix-caching", "--no-token-fair", "--example-adapters"]
    roots = ["--allowed-root", tmp_path / "a", "--allowed-root", tmp_path / "b"]
    turnout("serve", *pairs, *flags, *roots)
    ((config, examples),) = seen
    assert examples is True
    model, cache, scheduler = config.model, config.cache, config.scheduler
    assert (model.path, model.name, model.max_model_len) == (tiny_base, "tiny", 128)
    assert (model.quantization, model.dtype, model.device) == ("none", "float32", "cpu")
    assert (cache.cpu_bytes, cache.memory_fraction, cache.prefix_caching) == (1 << 28, 0.8, False)
    assert (scheduler.max_running, scheduler.max_step_tokens, scheduler.token_fair) == (
        4,
        32,
        False,
    )
    assert (config.adapters.bank_rows, config.adapters.max_rank) == (64, 32)
    assert (config.adapters.host_bytes, config.adapters.allow_other_base) == (1 << 29, True)
    assert config.adapters.store == tmp_path / "store"
    assert config.adapters.allowed_roots == (tmp_path / "a", tmp_path / "b")
    server = config.server
    assert (server.host, server.port, server.api_keys) == ("0.0.0.0", 9000, tmp_path / "keys")
    assert (server.max_waiting, server.max_waiting_per_tenant, server.drain_s) == (8, 6, 1.5)


def test_serve_without_options_is_the_config_without_options(
    fake_module: FakeModule, turnout: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[Config] = []
    fake_module("server.__main__", run=lambda config, **_: seen.append(config))
    turnout("serve", "--base", tiny_base)
    (config,) = seen
    defaults = Config(model=config.model)
    assert config.model.name == tiny_base.name
    assert (config.cache, config.scheduler) == (defaults.cache, defaults.scheduler)
    assert config.server == defaults.server
    assert config.adapters.store == tmp_path / "state" / "store"
    assert config.adapters.bank_rows == defaults.adapters.bank_rows


def test_an_option_with_a_bad_value_is_said_in_one_line(
    fake_module: FakeModule, refused: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    fake_module("server.__main__", run=lambda *_, **__: pytest.fail("served"))
    said = refused("serve", "--base", tiny_base, "--bank-rows", 7)
    assert said == "turnout: adapters.bank_rows is 7; it must be a multiple of page_rows (8)\n"
    assert "--base is" in refused("serve", "--base", tmp_path / "nowhere")
    for option in ("--kv-gib", "--host-gib", "--merged-gib"):
        said = refused("serve", "--base", tiny_base, option, "inf")
        assert said == f"turnout: {option} is inf; it must be finite\n"


def test_a_disk_that_is_full_is_said_in_one_line(
    fake_module: FakeModule, refused: Turnout, tiny_base: Path
) -> None:
    def run(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    fake_module("server.__main__", run=run)
    assert refused("serve", "--base", tiny_base) == "turnout: database or disk is full\n"


def test_a_terminal_gets_an_error_whose_words_are_whole(
    refused: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", refused("serve", "--base", "nowhere")).splitlines()
    assert max(len(line) for line in lines) <= 30
    whole = "turnout: --base is 'nowhere'; it must be a folder that holds config.json"
    assert " ".join(line.strip() for line in lines) == whole


def test_keys_new_prints_the_key_and_keeps_only_its_hash(
    turnout: Turnout, refused: Turnout, tmp_path: Path
) -> None:
    file = tmp_path / "secrets" / "keys"
    secret = turnout("keys", "new", "ops", "--file", file, "--scope", "infer,adapters").strip()
    turnout("keys", "new", "app", "--file", file)
    ops, app = load_keys(file)
    assert ops.name == "ops"
    assert ops.scopes == {"infer", "adapters"}
    assert app.scopes == {"infer"}
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "holds a key named 'app' already" in refused("keys", "new", "app", "--file", file)
    said = refused("keys", "new", "x", "--file", file, "--scope", "infer,root")
    assert "infer, adapters, admin" in said
    assert "NAME is empty" in refused("keys", "new", "", "--file", file)
    assert len(load_keys(file)) == 2


@pytest.mark.parametrize("text", ["", "# ours", "# ours\n"])
def test_keys_new_begins_a_line_of_its_own_in_a_file_edited_by_hand(
    turnout: Turnout, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    turnout("keys", "new", "one", "--file", file)
    file.write_text(file.read_text().rstrip("\n"))
    turnout("keys", "new", "two", "--file", file)
    assert [key.name for key in load_keys(file)] == ["one", "two"]
