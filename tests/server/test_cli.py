"""The command line: what it passes on, what it prints, how it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapters.store import Store
from server import cli
from server.api.auth import load_keys
from server.config import Config
from tests.conftest import MakeAdapter
from tests.server.api.harness import Server, serving

Turnout = Callable[..., str]


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
def refused(capsys: pytest.CaptureFixture[str], turnout: Turnout) -> Callable[..., str]:
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
def fake_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a module with one function in place of the real one."""

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["adapters", "push", "--help"]])
def test_help_loads_no_torch(args: list[str]) -> None:
    code = (
        "import sys\nfrom server.cli import main\n"
        f"try:\n    main({args})\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_help_shows_every_option_whole_at_80_columns(turnout: Turnout) -> None:
    text = turnout("serve", "--help")
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "--max-waiting-per-tenant" in text
    assert "…" not in text


def test_serve_passes_every_option_on(
    fake_module: Callable[..., None], turnout: Turnout, tiny_base: Path, tmp_path: Path
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
    fake_module: Callable[..., None], turnout: Turnout, tiny_base: Path, tmp_path: Path
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


def test_the_gpus_table_is_asked_for_by_name(
    fake_module: Callable[..., None], turnout: Turnout, tmp_path: Path
) -> None:
    seen: list[Any] = []
    fake_module("server.bench.gpu_table", run=seen.append)
    turnout("bench", "--gpu-table", "--json", tmp_path / "t.json")
    assert seen == [tmp_path / "t.json"]


def test_popularity_is_asked_for_by_the_number_of_adapters(
    fake_module: Callable[..., None], turnout: Turnout, tmp_path: Path
) -> None:
    seen: list[Any] = []
    fake_module("server.bench.popularity", run=lambda *given: seen.append(given))
    turnout("bench", "--popular", 1000, "--seconds", 60, "--json", tmp_path / "t.json")
    assert seen == [(1000, 60.0, tmp_path / "t.json")]


def test_bench_passes_its_options_on(
    fake_module: Callable[..., None], turnout: Turnout, tiny_base: Path
) -> None:
    seen: list[dict[str, Any]] = []
    fake_module("server.bench.run", run=seen.append, BenchOptions=dict)
    turnout("bench", "--base", tiny_base, "--batch", 2, "--batch", 8, "--no-baseline")
    (options,) = seen
    assert options["model"].path == tiny_base
    assert (options["batch_sizes"], options["baseline"]) == ((2, 8), False)
    assert options["http"]


def test_an_option_with_a_bad_value_is_said_in_one_line(
    fake_module: Callable[..., None], refused: Callable[..., str], tiny_base: Path, tmp_path: Path
) -> None:
    fake_module("server.__main__", run=lambda *_, **__: pytest.fail("served"))
    said = refused("serve", "--base", tiny_base, "--bank-rows", 7)
    assert said == "turnout: adapters.bank_rows is 7; it must be a multiple of page_rows (8)\n"
    assert "--base is" in refused("serve", "--base", tmp_path / "nowhere")


def test_keys_new_prints_the_key_and_keeps_only_its_hash(
    turnout: Turnout, refused: Callable[..., str], tmp_path: Path
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
    assert len(load_keys(file)) == 2


# turnout adapters: on the store itself, and through a server


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(tiny_base, tmp_path / "served") as handle:
        yield handle


@pytest.fixture(params=["store", "url", "lock"])
def way(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path
) -> Iterator[tuple[object, ...]]:
    """Options that reach a store: itself, a server by URL, or the server that the lock names."""
    if request.param == "store":
        yield "--store", tmp_path / "own"
        return
    server: Server = request.getfixturevalue("server")
    if request.param == "url":
        yield "--url", server.url
        return
    held = Store.open(tmp_path / "held", server.url)
    yield "--store", tmp_path / "held"
    held.close()


def base_of(way: tuple[object, ...], tiny_base: Path) -> tuple[object, ...]:
    """Options that name the base, where no URL is given whose server knows it."""
    return () if way[0] == "--url" else ("--base", tiny_base)


def is_unserved(way: tuple[object, ...]) -> bool:
    return Path(str(way[1])).name == "own"


def test_an_adapter_lives_from_push_to_delete(
    turnout: Turnout,
    refused: Callable[..., str],
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    """The same commands say the same, whichever way they go."""
    base = () if way[0] == "--url" else ("--base", tiny_base, "--base-name", "tiny")
    allow = ("--allow-other-base",) if is_unserved(way) else ()
    first, second = make_adapter(seed=1), make_adapter(seed=2, r=16)

    def adapters(*args: object) -> str:
        return turnout("adapters", *args, *way)

    assert adapters("list") == "No adapters are registered.\n"
    assert adapters("push", "bot", first, *base, *allow).startswith("bot@1 registered, digest ")
    assert adapters("push", "bot", second, "--no-publish", *base, *allow).startswith("bot@2 ")
    assert adapters("show", "bot").startswith("bot means bot@1\n")
    assert adapters("publish", "bot", 2) == "bot means bot@2\n"
    assert adapters("rollback", "bot") == "bot means bot@1\n"
    assert adapters("pin", "bot") == "bot means bot@1, pinned\n"
    shown = adapters("show", "bot")
    assert shown.startswith("bot means bot@1, pinned\n")
    numbers = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert [number for number in numbers if number.isdigit()] == ["1", "2"]
    assert adapters("unpin", "bot") == "bot means bot@1\n"
    (row,) = [line for line in adapters("list").splitlines() if "bot" in line]
    assert row.split()[:4] == ["bot", "1", "2", "8"]
    assert "no revision 7" in refused("adapters", "publish", "bot", 7, *way)
    assert "no earlier publication" in refused("adapters", "rollback", "bot", *way)
    assert "does not exist" in refused("adapters", "delete", "bot?x", *way)
    assert "bot@1 is published" in refused("adapters", "delete", "bot@1", *way)
    for wrong in ("bot@", "bot@x", "bot@-2"):
        assert "names no revision" in refused("adapters", "delete", wrong, *way)
    assert adapters("delete", "bot@2") == "bot@2 deleted\n"
    assert "no revision 2" in refused("adapters", "delete", "bot@2", *way)
    assert adapters("delete", "bot") == "bot deleted\n"
    assert "does not exist" in refused("adapters", "show", "bot", *way)


def test_a_refused_adapter_is_said_with_the_field(
    refused: Callable[..., str], way: tuple[object, ...], make_adapter: MakeAdapter, tiny_base: Path
) -> None:
    folder = make_adapter(seed=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    base = base_of(way, tiny_base)
    assert "bias" in refused("adapters", "push", "bot", folder, *base, *way)


def test_an_adapter_trained_on_another_base_is_pushed_only_on_request(
    turnout: Turnout,
    refused: Callable[..., str],
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    base = base_of(way, tiny_base)
    folder = make_adapter(seed=3)
    notes = {"format": 1, "training": {"base_digest": "c" * 64}}
    (folder / "turnout.json").write_text(json.dumps(notes))

    assert "trained on base cccccccccccc" in refused("adapters", "push", "bot", folder, *base, *way)
    said = turnout("adapters", "push", "bot", folder, "--allow-mismatch", *base, *way)
    assert "bot@1 registered" in said


def test_another_bases_adapter_is_asked_of_the_server_that_holds_the_store(
    turnout: Turnout,
    refused: Callable[..., str],
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    base = base_of(way, tiny_base)
    words = ("adapters", "push", "bot", make_adapter(), "--allow-other-base", *base, *way)
    if is_unserved(way):
        assert "bot@1 registered" in turnout(*words)
    else:
        assert "when it was started with that option" in refused(*words)


def test_a_long_name_is_never_cut_in_a_list(
    turnout: Turnout, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    name, store = "n" * 64, ("--store", tmp_path / "own")
    allow = ("--base", tiny_base, "--allow-other-base")
    said = turnout("adapters", "push", name, make_adapter(), *allow, *store)
    digest = said.split()[-1]
    (row,) = (line for line in turnout("adapters", "list", *store).splitlines() if name in line)
    assert digest in row


def test_a_folder_without_an_adapter_is_refused(
    refused: Callable[..., str], way: tuple[object, ...], tiny_base: Path, tmp_path: Path
) -> None:
    base = base_of(way, tiny_base)
    assert "adapter_config.json" in refused("adapters", "push", "bot", tmp_path, *base, *way)


def test_a_store_held_by_nobody_who_serves_is_said_to_be_held(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    held = Store.open(tmp_path / "held")
    assert "held by another process" in refused("adapters", "list", "--store", tmp_path / "held")
    held.close()


def test_a_server_that_does_not_answer_is_named(refused: Callable[..., str]) -> None:
    url = "http://127.0.0.1:9"
    assert f"{url} does not answer" in refused("adapters", "list", "--url", url)


def test_the_api_key_opens_a_server_that_wants_one(
    turnout: Turnout, refused: Callable[..., str], tiny_base: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    secret = turnout("keys", "new", "ops", "--file", keys, "--scope", "adapters").strip()
    with serving(tiny_base, tmp_path / "served", api_keys=keys) as server:
        assert "API key" in refused("adapters", "list", "--url", server.url)
        turnout("adapters", "list", "--url", server.url, "--api-key", secret)


def test_a_held_store_is_reached_without_reading_the_base(
    turnout: Turnout, server: Server, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    held = Store.open(tmp_path / "held", server.url)
    said = turnout("adapters", "push", "bot", make_adapter(), "--store", tmp_path / "held")
    held.close()
    assert said.startswith("bot@1 registered")
    assert not (tmp_path / "state" / "base").exists()  # where the default base would be made
