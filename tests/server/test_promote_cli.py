"""`turnout promote`, `demote` and `candidates`: through a server, and on a store nobody serves."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.artifacts import ArtifactStore
from adapters.manifest import BaseShape
from adapters.promotions import job_folders
from adapters.registry import Registry
from adapters.store import Store
from server import cli, promote_cli
from server.adapter_admin import Card
from server.base_digest import base_digest
from server.promotion import jobs as jobs_module
from server.promotion.jobs import Jobs
from tests.conftest import MakeAdapter
from tests.server.api.harness import Server, serving
from tests.server.promotion.fakes import FakeMerged, stub_jobs

Turnout = Callable[..., tuple[int, str, str]]


@pytest.fixture
def turnout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Turnout:
    """Run the command; return its exit code, stdout and stderr."""
    monkeypatch.setenv("TURNOUT_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(promote_cli, "_POLL_S", 0.02)

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(arg) for arg in args])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        code = stopped.value.code
        return int(code or 0), printed.out, printed.err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return file


class Way:
    """Options that reach a store in which `bot` is registered."""

    def __init__(self, root: Path, args: tuple[object, ...], server: Server | None) -> None:
        self.root, self.args, self.server = root, args, server

    @property
    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(self.root)


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter(r=2)


@pytest.fixture(params=["store", "url", "lock"])
def way(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Way]:
    """The store itself, a server by URL, or the server that the lock names; $STUB is the test's."""
    root = tmp_path / "store"
    jobs = stub_jobs(root, monkeypatch)
    if request.param == "store":
        monkeypatch.setattr(jobs_module, "COMMAND", jobs._command)
        monkeypatch.setattr(Jobs.__init__, "__defaults__", (jobs._command,))
        shape = BaseShape.from_config(tiny_base, "tiny", base_digest(tiny_base))
        registry = Registry.open(root, shape)
        registry.push("bot", adapter)
        registry.close()
        yield Way(root, ("--store", root), None)
        return
    with serving(tiny_base, root, merged=FakeMerged(), jobs=jobs) as server:
        server.registry.push("bot", adapter)
        if request.param == "url":
            yield Way(root, ("--url", server.url), server)
            return
        held = Store.open(tmp_path / "held", server.url)
        yield Way(root, ("--store", tmp_path / "held"), server)
        held.close()


# A server that the lock names is told the same as one by its URL.
TWO_WAYS = pytest.mark.parametrize("way", ["store", "url"], indirect=True)


def base_of(way: Way, tiny_base: Path) -> tuple[object, ...]:
    return () if way.server is not None else ("--base", tiny_base, "--base-name", "tiny")


def test_a_promotion_is_made_followed_and_taken_back(
    turnout: Turnout, way: Way, tiny_base: Path, rows: Path
) -> None:
    """The same commands say the same, whichever way they go."""
    options = ("--rows", rows, *base_of(way, tiny_base), *way.args)
    code, said, told = turnout("promote", "bot", "--wait", *options)
    assert code == 0, told
    (artifact,) = way.artifacts.every()
    how = "served merged" if way.server else "by the adapter path: no server runs; the next one"
    assert said.startswith(f"bot@1 promoted, artifact {artifact.digest[:12]}; {how}")
    code, said, _ = turnout("promote", "bot", *options)
    assert said == "bot has been promoted with these settings; it is served so again\n"
    code, said, _ = turnout("demote", "bot", "--keep", *way.args)
    assert said == f"bot@1 goes by the adapter path; artifact {artifact.digest[:12]} kept\n"
    assert way.artifacts.is_demoted(artifact.digest)
    code, said, _ = turnout("demote", "bot", *way.args)
    assert said.endswith("deleted\n")
    assert way.artifacts.every() == []
    code, _, told = turnout("demote", "bot", *way.args)
    assert (code, told) == (1, "turnout: The adapter bot@1 is not promoted.\n")


@TWO_WAYS
def test_a_failed_gate_is_said_and_exits_with_1(
    turnout: Turnout, way: Way, tiny_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", json.dumps({"fail": "mean KL is 0.3, 0.2 over 0.1"}))
    options = ("--rows", rows, *base_of(way, tiny_base), *way.args)
    code, _, told = turnout("promote", "bot", "--wait", *options)
    assert code == 1
    assert told.endswith("turnout: bot@1 was not promoted: mean KL is 0.3, 0.2 over 0.1\n")
    assert told.count("mean KL") == 1  # and not, cut off, beside the bar
    assert way.artifacts.every() == []


@TWO_WAYS
def test_a_promotion_goes_on_by_itself_is_followed_later_and_cancelled(
    turnout: Turnout, way: Way, tiny_base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", json.dumps({"hang": "gate"}))
    options = ("--rows", rows, *base_of(way, tiny_base), *way.args)
    code, said, told = turnout("promote", "bot", *options)
    assert code == 0, told
    assert said == "promotion of bot begun; `turnout promote bot --wait` follows it\n"
    code, _, told = turnout("promote", "bot", *options)
    assert code == 1
    assert "is under way" in told

    def interrupted(*_: object) -> Card:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server.promote_cli._follow", interrupted)
        code, said, _ = turnout("promote", "bot", "--wait", *way.args)
    assert (code, said.split(":")[0]) == (130, "the promotion of bot goes on")
    code, _, told = turnout("demote", "bot", *way.args)
    assert "cancel it first" in told
    code, said, _ = turnout("promote", "bot", "--cancel", *way.args)
    assert said == "bot@1: promotion cancelled\n"
    code, _, told = turnout("promote", "bot", "--wait", *way.args)
    assert told.endswith("bot@1 was not promoted: cancelled by an operator\n")
    code, _, told = turnout("promote", "bot", "--cancel", *way.args)
    assert code == 1
    assert "under way" in told


@TWO_WAYS
def test_the_jobs_options_are_those_of_the_command(
    turnout: Turnout, way: Way, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    text = tmp_path / "allowed.txt"
    text.write_text("text")
    given = ("--merge-base", "original", "--group-size", 32, "--tokens", 512, "--seed", 7)
    held = tmp_path / "held.jsonl"
    held.write_text("held")
    held_out = ("--eval-rows", held, "--backend", "auto-round")
    more = ("--gate", "max_mean_kl=0.5", "--device", "cuda", "--wait-gpu-s", 9, "--threads", 2)
    texts = () if way.server is not None else ("--text", text)
    options = ("--rows", rows, *base_of(way, tiny_base), *way.args)
    code, _, told = turnout(
        "promote", "bot", "--revision", 1, "--wait", *given, *held_out, *more, *texts, *options
    )
    assert code == 0, told
    (folder,) = job_folders(way.root)
    request = folder.request()
    assert request is not None
    assert (request.merge_base, request.group_size, request.num_tokens) == ("original", 32, 512)
    assert (request.seed, request.gate, request.device) == (7, {"max_mean_kl": 0.5}, "cuda")
    assert (request.wait_gpu_s, request.num_threads) == (9.0, 2)
    assert request.text == (str(text) if texts else None)
    assert request.text_sha256 == (hashlib.sha256(b"text").hexdigest() if texts else None)
    assert request.rows == str(folder.path / "rows.jsonl")
    assert request.eval_rows == str(folder.path / "eval_rows.jsonl")
    assert request.rows_sha256 != request.eval_rows_sha256 is not None
    assert request.backend == "auto-round"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "nothing to calibrate on"),
        (("--rows", "nowhere.jsonl"), "--rows is 'nowhere.jsonl'; it must be a file"),
        (("--text", __file__, "--eval-rows", __file__), "--eval-rows without --rows"),
        (("--rows", __file__, "--eval-rows", "nowhere"), "--eval-rows is 'nowhere'; it must be"),
        (("--text", "nowhere.txt"), "--text is 'nowhere.txt'; it must be a file"),
        (("--gate", "max_mean_kl"), "must be NAME=NUMBER"),
        (("--gate", "max_mean_kl=high"), "must be NAME=NUMBER"),
        (("--gate", "=1"), "must be NAME=NUMBER"),
        (("--wait",), "There is no promotion of bot"),
        (("--wait", "--revision", 5), "has no revision 5"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    turnout: Turnout, tiny_base: Path, adapter: Path, tmp_path: Path,
    args: tuple[object, ...], said: str,
) -> None:  # fmt: skip
    shape = BaseShape.from_config(tiny_base, "tiny", base_digest(tiny_base))
    registry = Registry.open(tmp_path / "own", shape)
    registry.push("bot", adapter)
    registry.close()
    code, _, told = turnout("promote", "bot", *args, "--store", tmp_path / "own")
    assert code == 1
    assert said in told


def test_an_adapter_of_another_base_is_not_merged_into_this_one(
    turnout: Turnout, tiny_base: Path, adapter: Path, tmp_path: Path, rows: Path
) -> None:
    registry = Registry.open(tmp_path / "own", BaseShape.from_config(tiny_base, "x", "e" * 64))
    registry.push("bot", adapter)
    registry.close()
    options = ("--rows", rows, "--base", tiny_base, "--store", tmp_path / "own")
    code, _, told = turnout("promote", "bot", *options)
    assert code == 1
    assert "was registered for base eeeeeeeeeeee; --base is" in told


def test_candidates_say_whom_to_promote_and_on_which_figures(
    turnout: Turnout, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with serving(tiny_base, tmp_path / "store", merged=FakeMerged()) as server:
        code, said, _ = turnout("candidates", "--url", server.url)
        assert said == "No adapter has a published revision.\n"
        busy = server.registry.push("busy", make_adapter(r=2))
        server.registry.push("idle", make_adapter(r=2, seed=1))
        server.registry.add_usage({busy.digest: 1_000_000})
        code, said, told = turnout("candidates", "--batch", 32, "--url", server.url)
    assert code == 0, told
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    assert [line[0] for line in lines if len(line) > 1] == ["busy@1", "idle@1"]
    first, second = (line for line in lines if len(line) > 1)
    assert first[1] == "1,000,000"
    assert 990_000 < int(first[2].replace(",", "")) <= 1_000_000  # they fade
    assert first[3] == "100.0%"
    assert float(first[4]) > 0
    assert (first[6], second[6]) == ("yes", "no")
    assert "in steps of 32 rows" in said
    assert "H100" in said


def test_candidates_need_a_server(turnout: Turnout, tmp_path: Path) -> None:
    code, _, told = turnout("candidates", "--store", tmp_path / "own")
    assert (code, "no server holds this store" in told) == (1, True)


def test_a_server_that_does_not_answer_is_named(turnout: Turnout) -> None:
    code, _, told = turnout("demote", "bot", "--url", "http://127.0.0.1:9")
    assert (code, "http://127.0.0.1:9 does not answer" in told) == (1, True)


def test_serve_passes_the_policys_options_on(
    turnout: Turnout, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("server.__main__.run", lambda config, **_: seen.append(config))
    (tmp_path / "text.txt").write_text("text")
    options: dict[str, object] = {
        "--promote-policy": "auto",
        "--promote-min-tokens": 7,
        "--promote-max-sets": 3,
        "--promote-cool-down-s": 1.5,
        "--promote-rows": tmp_path,
        "--promote-text": tmp_path / "text.txt",
        "--promote-device": "cuda",
        "--step-times": tmp_path / "times.json",
    }
    pairs = [part for option in options.items() for part in option]
    code, _, told = turnout("serve", "--base", tiny_base, *pairs)
    assert code == 0, told
    promotion = seen[0].promotion
    assert (promotion.policy, promotion.min_tokens, promotion.max_sets) == ("auto", 7, 3)
    assert (promotion.cool_down_s, promotion.device) == (1.5, "cuda")
    assert (promotion.rows, promotion.text) == (tmp_path, tmp_path / "text.txt")
    assert promotion.step_times == tmp_path / "times.json"
    code, _, told = turnout("serve", "--base", tiny_base, "--promote-policy", "auto")
    assert code == 1
    assert "promotion.rows is None" in told


def test_a_terminal_gets_notes_whose_words_are_whole_and_a_file_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("NO_COLOR", "1")
    promote_cli._say("saved over the recent tokens")
    assert capsys.readouterr().out == "saved over the recent tokens\n"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    promote_cli._say("saved over the recent tokens")
    assert capsys.readouterr().out.split("\n") == ["saved over the ", "recent tokens", ""]
