"""`turnout loadtest demo`: a real server, many adapters, a page at the end."""

import asyncio
import json
from pathlib import Path

import pytest

from loadtest.demo import EXAMPLES, DemoOptions, demo, push_variant, serving
from loadtest.page import render
from loadtest.run import RunOptions, Unwatched
from server.default_base import ensure_default_base
from tests.loadtest.stub import Stub
from tests.server.processes import is_alive


async def test_a_server_that_ends_at_once_is_named_with_its_exit_code(tmp_path: Path) -> None:
    options = DemoOptions(command=("sh", "-c", "echo no such base; exit 3"))
    with pytest.raises(ValueError, match=r"^sh -c .* ended with 3: no such base$"):
        async with serving(options, tmp_path / "store"):
            pytest.fail("served")


def test_every_adapter_is_pushed_with_an_alpha_of_its_own(stub: Stub) -> None:
    names = [push_variant(stub.url, index) for index in range(20)]
    assert len(set(names)) == 20
    assert set(stub.pushed) == set(names)
    configs = [
        (name.partition("-")[0], json.loads(stub.pushed[name]["adapter_config.json"])["lora_alpha"])
        for name in names
    ]
    assert len(set(configs)) == 20  # so each is another adapter, with a digest of its own
    assert {folder for folder, _ in configs} == {
        path.name for path in EXAMPLES.iterdir() if path.is_dir()
    }
    weights = stub.pushed["json-3"]["adapter_model.safetensors"]
    assert weights == (EXAMPLES / "json" / "adapter_model.safetensors").read_bytes()


def test_a_refused_adapter_ends_the_demonstration_with_the_servers_words(stub: Stub) -> None:
    name = push_variant(stub.url, 0)
    with pytest.raises(ValueError, match=f"refused the adapter {name}: .*adapter_conflict"):
        push_variant(stub.url, 0)


async def test_a_server_that_never_gets_ready_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.demo._START_TIMEOUT_S", 0.3)
    options = DemoOptions(command=("sh", "-c", "echo $$ > pid; exec sleep 60"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="was not ready within"):
        async with serving(options, tmp_path / "store"):
            pytest.fail("served")
    assert not is_alive(int((tmp_path / "pid").read_text()))


async def test_a_wait_for_a_server_ends_as_soon_as_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C cancels the work; a wait that blocks would not hear of it for minutes."""
    monkeypatch.chdir(tmp_path)
    options = DemoOptions(command=("sh", "-c", "echo $$ > pid; exec sleep 60"))
    work = asyncio.ensure_future(demo(options, RunOptions(), Unwatched()))
    await wait_for_pid()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_server_that_went_away_is_said_in_words() -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9 did not take the adapter"):
        push_variant("http://127.0.0.1:9", 0)


async def test_a_server_that_does_not_end_when_told_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.demo._STOP_TIMEOUT_S", 0.2)
    monkeypatch.setattr("loadtest.demo._wait_ready", wait_for_pid)
    monkeypatch.chdir(tmp_path)
    deaf = "trap '' TERM; echo $$ > pid; while :; do sleep 0.05; done"
    async with serving(DemoOptions(command=("sh", "-c", deaf)), tmp_path / "store"):
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
    assert not is_alive(pid)


async def wait_for_pid(*_: object) -> None:
    """Ready is who has written down its number, in the current folder."""
    while not (Path("pid").exists() and Path("pid").read_text().strip()):
        await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_real_server_is_loaded_and_every_digest_is_its_adapters() -> None:
    ensure_default_base()
    options = DemoOptions(
        num_adapters=6, rate=1.0, duration_s=12.0, prompt_tokens=16, output_tokens=6, bank_rows=32
    )
    report = await demo(options, RunOptions(check_share=0.2), Unwatched())
    assert report.outcomes["ok"] == report.trace.num_lines
    assert (report.identity.num_checked, report.identity.num_mismatched) == (
        report.trace.num_lines,
        0,
    )
    assert report.identity.source == "registry"
    assert set(report.by_path) == {"adapter"}
    assert set(report.by_tier) & {"disk", "host"}  # the bank holds four of the six
    assert report.recheck.num_foreign == 0
    assert report.environment.server["version"]
    assert len({row.model for row in report.models}) > 2
    assert "<figure id='adapters'>" in render(report)
