"""The bridge with a real engine process behind it: streams, deaths, restarts, no orphans."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from adapters.manifest import BaseShape, Limits
from adapters.registry import Registry
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig, ServerConfig
from server.engine.client import EngineClient, EngineStartError
from server.engine.messages import AdapterEvent, AddRequest, EngineStats, RequestOutput
from server.engine.request import AdapterRef, SamplingParams
from server.engine.wire import encode_config
from server.errors import ServeError
from tests.server.engine.stub_engine import make_interpreter
from tests.server.processes import is_alive

ENDLESS = SamplingParams(max_tokens=480, temperature=0, ignore_eos=True)


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> Config:
    return Config(
        model=ModelConfig(path=tiny_base, quantization="none", dtype="float32"),
        cache=CacheConfig(num_blocks=128),
        adapters=AdapterConfig(store=tmp_path / "store", bank_rows=64),
    )


@contextlib.asynccontextmanager
async def running(config: Config, **options: Callable[..., None]) -> AsyncIterator[EngineClient]:
    client = EngineClient(config, **options)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


def request(name: str, sampling: SamplingParams = ENDLESS, **fields: Any) -> AddRequest:
    values = {"prompt_ids": [5, 6, 7], "arrival_time": time.monotonic(), **fields}
    return AddRequest(request_id=name, sampling=sampling, **values)


async def collect(client: EngineClient, message: AddRequest) -> list[RequestOutput]:
    stream = client.submit(message)
    try:
        return [output async for output in stream]
    finally:
        stream.close()


def token_ids(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


async def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return not is_alive(pid)


async def test_streams_carry_tokens_timing_and_one_finish_reason(config: Config) -> None:
    async with running(config) as client:
        sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        outputs = await asyncio.gather(
            *(collect(client, request(f"r{i}", sampling)) for i in range(4))
        )
        assert len({tuple(token_ids(found)) for found in outputs}) == 1
        for found in outputs:
            assert len(token_ids(found)) == 20
            assert found[0].first is not None
            assert found[0].first.first_token_time >= found[0].first.scheduled_time
            assert [output.finish_reason for output in found][:-1] == [None] * (len(found) - 1)
            assert found[-1].finish_reason == "length"


async def test_a_slow_reader_gets_joined_outputs_and_loses_nothing(config: Config) -> None:
    async with running(config) as client:
        sampling = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, logprobs=1)
        stream = client.submit(request("slow", sampling))
        first = await anext(stream)
        while client.stats.num_running or client.stats.num_waiting:
            await asyncio.sleep(0.05)
        rest = [output async for output in stream]
        assert len(rest) == 1
        assert len(token_ids([first, *rest])) == 60
        assert rest[0].logprobs is not None
        assert len(rest[0].logprobs) == len(rest[0].token_ids)
        assert rest[0].finish_reason == "length"


async def test_closing_a_stream_frees_everything_in_the_engine(config: Config) -> None:
    async with running(config) as client:
        stream = client.submit(request("cut"))
        await anext(stream)
        stream.close()
        stream.close()
        deadline = time.monotonic() + 5
        while client.stats.num_free_blocks != client.info.num_blocks:
            assert time.monotonic() < deadline, client.stats
            await asyncio.sleep(0.02)
        assert client.stats.num_running == 0


async def test_killing_the_engine_fails_every_stream_within_two_seconds_and_it_comes_back(
    config: Config,
) -> None:
    async with running(config) as client:
        streams = [client.submit(request(f"r{i}")) for i in range(3)]
        for stream in streams:
            await anext(stream)
        assert client.stats.num_running > 0
        first_pid = client.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        killed = time.monotonic()
        for stream in streams:
            with pytest.raises(ServeError, match="engine process ended") as failure:
                [output async for output in stream]
            assert failure.value.status == 503
        assert time.monotonic() - killed < 2
        assert client.stats == EngineStats(num_free_blocks=client.info.num_blocks)
        with pytest.raises(ServeError, match="not running"):
            client.submit(request("too early"))

        deadline = time.monotonic() + 60
        while not client.is_ready:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert client.num_restarts == 1
        assert client.pid != first_pid
        assert not is_alive(first_pid)
        again = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        assert len(token_ids(await collect(client, request("after", again)))) == 3


async def test_an_engine_that_hangs_is_killed_and_another_started(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, server=ServerConfig(engine_silence_s=4))
    async with running(config) as client:
        await asyncio.sleep(4.5)  # one that idles speaks
        assert client.num_restarts == 0
        first_pid, stream = client.pid, client.submit(request("r"))
        assert first_pid is not None
        await anext(stream)
        os.kill(first_pid, signal.SIGSTOP)
        with pytest.raises(ServeError, match="engine process ended"):
            [output async for output in stream]
        assert "said nothing for 4 s" in caplog.text
        while not client.is_ready:  # the test's own time limit bounds it
            await asyncio.sleep(0.05)
        assert client.num_restarts == 1
        assert not is_alive(first_pid)
        assert token_ids(await collect(client, request("again", SamplingParams(max_tokens=2))))


async def test_closing_the_client_ends_the_engine_process(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(config) as client:
        pid = client.pid
        assert pid is not None
    assert not is_alive(pid)
    assert "killed" not in caplog.text  # it ended when told to


async def test_the_engine_dies_with_a_killed_api_process(config: Config, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio, pathlib, sys
        from server.engine.client import EngineClient
        from server.engine.wire import decode_config

        async def main():
            client = EngineClient(decode_config(pathlib.Path(sys.argv[1]).read_bytes()))
            await client.start()
            print(client.pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    (tmp_path / "config.json").write_bytes(encode_config(config))
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "config.json")], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        engine_pid = int(await asyncio.to_thread(parent.stdout.readline))
        assert is_alive(engine_pid)
        parent.kill()
    assert await gone(engine_pid, within_s=5)


async def test_a_base_that_cannot_be_loaded_says_why_and_is_not_tried_again(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    broken = Config(model=ModelConfig(path=tmp_path), cache=config.cache, adapters=config.adapters)
    client = EngineClient(broken)
    with pytest.raises(EngineStartError, match="GPT2LMHeadModel is not MistralForCausalLM"):
        await client.start()
    await client.close()


@pytest.mark.parametrize("why", ["no interpreter", "no endpoint"])
async def test_an_engine_that_no_process_can_be_started_for_is_told_and_leaves_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    if why == "no interpreter":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
        says = "No such file or directory"
    else:
        (tmp_path / ("long" * 30)).mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
        says = "is longer than 107 characters"
    client = EngineClient(config)
    with pytest.raises(EngineStartError, match=f"3 times without serving; the last one .*{says}"):
        await client.start()
    await client.close()
    assert client._context.closed
    assert not Path(client._folder.name).exists()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_engine_that_ends_at_once_is_tried_three_times(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))

    async def start() -> None:
        client = EngineClient(config)
        with pytest.raises(EngineStartError, match=r"3 times .*; the last one ended with code 1$"):
            await client.start()
        await client.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(start())


async def test_an_engine_that_is_about_to_end_takes_nothing_more_and_holds_nothing_up(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(make_interpreter(tmp_path, "leaves")))
    async with running(config) as client:
        cut = client.submit(request("cut"))
        refused: ServeError | None = None
        async with asyncio.timeout(20):
            while refused is None:  # until it has let go of the socket
                try:
                    client.submit(request("late")).close()
                except ServeError as error:
                    refused = error
                await asyncio.sleep(0.01)
        assert (refused.status, refused.code) == (503, "engine_failed")
        assert client.is_ready, "its process has not ended yet"
        cut.close()
        client.unpin_adapter("0" * 64)
        with pytest.raises(ServeError, match="engine process ended"):
            await client.load_adapter(AdapterRef("0" * 64, 8))
        with pytest.raises(ServeError, match="engine process ended"):
            await client.drop_adapter("0" * 64)
        assert client._streams == {}
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)


@pytest.fixture
def adapter(config: Config, make_adapter: Callable[..., Path]) -> AdapterRef:
    """An adapter in the store."""
    shape = BaseShape.from_config(config.model.path, "base", "digest")
    registry = Registry.open(config.adapters.store, shape, Limits(allow_other_base=True))
    revision = registry.push("one", make_adapter(r=8))
    registry.close()
    return AdapterRef.of(revision)


async def test_adapters_are_loaded_reported_and_dropped(
    config: Config, adapter: AdapterRef
) -> None:
    events: list[AdapterEvent] = []
    async with running(config, on_event=events.append) as client:
        loaded = await client.load_adapter(adapter)
        assert (loaded.event, loaded.tier) == ("loaded", "disk")
        again = await client.load_adapter(adapter, pinned=True)
        assert (again.event, again.tier) == ("loaded", "gpu")

        few = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        base = token_ids(await collect(client, request("base", few)))
        outputs = await collect(client, request("adapter", few, adapter=adapter))
        assert outputs[0].first is not None
        assert outputs[0].first.tier == "gpu"
        assert token_ids(outputs) != base

        await client.drop_adapter(adapter.digest)
        assert [event.event for event in events] == ["loaded", "dropped"]
        deadline = time.monotonic() + 5
        while client.stats.bank_rows_used:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


async def test_an_adapter_without_its_object_fails_by_name(config: Config) -> None:
    missing = AdapterRef("0" * 64, 8)
    async with running(config) as client:
        event = await client.load_adapter(missing)
        assert event.event == "failed"
        assert "0" * 64 in event.message
        with pytest.raises(ServeError, match="could not be loaded") as failure:
            await collect(client, request("r", adapter=missing))
        assert failure.value.code == "adapter_load_failed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [1] * 100}, "need 580 tokens; the limit is 512"),
        ({"prompt_ids": [300]}, "token id 300 is not in the vocabulary of 256"),
        ({"adapter": AdapterRef("0" * 64, 65)}, "needs 65 bank rows; the bank holds 64"),
    ],
)
async def test_what_could_never_run_is_refused_by_the_engine_too(
    config: Config, fields: dict[str, Any], message: str
) -> None:
    async with running(config) as client:
        with pytest.raises(ServeError, match=message) as failure:
            await collect(client, request("r", **fields))
        assert failure.value.status == 400
