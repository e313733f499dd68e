"""A real server process with the default base, driven by the official client from outside."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.api.unserved import UNSERVED_IN_CHAT, UNSERVED_IN_COMPLETIONS
from server.default_base import ensure_default_base
from tests.server.processes import is_alive

ROOT = Path(__file__).parent.parent.parent
BASE = "smollm2-135m-instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TURNOUT = (sys.executable, "-c", "from server.cli import main; main()")
START_TIMEOUT_S = 120.0


class Server:
    """One `turnout serve` process."""

    def __init__(self, store: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*TURNOUT, "serve", "--example-adapters", "--store", str(store)]
        command += ["--port", str(self.port)]
        self.process = subprocess.Popen([*command, *options], cwd=ROOT)
        self._wait_ready()

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready").status_code == 200
        return False

    def engine_pid(self) -> int:
        """The server's child that runs the engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in map(int, children.split()):
            if b"server.engine\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no engine among {children!r}")

    def gauge(self, name: str) -> float:
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            assert self.process.poll() is None, "the server ended while starting"
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def default_base() -> None:
    ensure_default_base()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve") / "store")
    yield server
    server.stop()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may harm."""
    server = Server(tmp_path / "store", "--drain-s", "20")
    yield server
    server.process.kill()
    server.process.wait()


def ask(client: openai.OpenAI, model: str, **options: Any) -> str:
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=40, **options
    )
    content: str | None = reply.choices[0].message.content
    assert content is not None
    return content


def wait_until_gone(pid: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_base_and_both_examples_give_three_different_sensible_replies(server: Server) -> None:
    base, as_json, pirate = (ask(server.openai, name) for name in (BASE, "json", "pirate"))
    assert "Paris" in base
    assert json.loads(as_json)["answer"] == "Paris"
    assert "\n" not in as_json
    assert "Paris" in pirate
    assert "arr" in pirate.lower()
    assert "arr" not in base.lower().replace("arro", "")
    assert len({base, as_json, pirate}) == 3


def test_replies_are_the_same_alone_and_all_at_once(server: Server) -> None:
    models = [BASE, "json", "pirate"]
    alone = [ask(server.openai, name) for name in models]
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda name: ask(server.openai, name), models * 3))
    assert [json.loads(text) for text in together[1::3]] == [json.loads(alone[1])] * 3
    assert together[2::3] == [alone[2]] * 3
    assert [text[:20] for text in together[0::3]] == [alone[0][:20]] * 3  # bf16 may part later


def test_a_stream_says_the_same_as_one_reply(server: Server) -> None:
    stream = server.openai.chat.completions.create(
        model="json",
        messages=QUESTION,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(server.openai, "json")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


def test_headers_name_the_adapter_that_answered(server: Server) -> None:
    raw = server.openai.chat.completions.with_raw_response.create(
        model="pirate@1", messages=QUESTION, max_tokens=2
    )
    assert raw.headers["x-adapter-id"] == "pirate@1"
    assert raw.headers["x-serving-path"] == "adapter"
    assert len(raw.headers["x-adapter-digest"]) == 64
    assert raw.headers["x-adapter-tier"] in ("gpu", "host", "disk")


def test_an_unknown_adapter_is_404_and_never_the_base(server: Server) -> None:
    for model in ("nobody", "json@99"):
        with pytest.raises(openai.NotFoundError) as failure:
            ask(server.openai, model)
        assert failure.value.code == "model_not_found"
        assert failure.value.type == "NotFoundError"
        assert failure.value.param == "model"


@pytest.mark.parametrize("field", sorted(UNSERVED_IN_CHAT))
def test_a_chat_field_that_is_not_served_is_refused_by_name(server: Server, field: str) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        ask(server.openai, "json", extra_body={field: "something"})
    assert failure.value.param == field


@pytest.mark.parametrize("field", sorted(UNSERVED_IN_COMPLETIONS))
def test_a_completions_field_that_is_not_served_is_refused_by_name(
    server: Server, field: str
) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        server.openai.completions.create(
            model="json", prompt="a", max_tokens=1, extra_body={field: "something"}
        )
    assert failure.value.param == field


def test_a_cancelled_stream_frees_everything_at_once(server: Server) -> None:
    stream = server.openai.completions.create(
        model=BASE, prompt="Once upon a time", max_tokens=2000, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while server.gauge("vllm:num_requests_running") or server.gauge("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def test_a_new_adapter_is_pushed_used_and_deleted_while_serving(server: Server) -> None:
    folder = ROOT / "adapters" / "examples" / "pirate"
    files = [
        ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    ]
    pushed = httpx.post(
        f"{server.url}/v1/adapters",
        data={"name": "sailor"},
        files=[(name, (name, content)) for name, content in files],
    )
    assert pushed.status_code == 201, pushed.text
    assert ask(server.openai, "sailor") == ask(server.openai, "pirate")
    assert httpx.delete(f"{server.url}/v1/adapters/sailor").status_code in (200, 204)
    with pytest.raises(openai.NotFoundError):
        ask(server.openai, "sailor")
    assert ask(server.openai, "pirate")


def test_the_engine_killed_in_mid_stream_ends_streams_within_two_seconds_and_comes_back(
    own_server: Server,
) -> None:
    pid = own_server.engine_pid()
    lines: list[str] = []
    ended: list[float] = []

    def read() -> None:
        body = {"model": "json", "prompt": "Tell me", "max_tokens": 4000, "stream": True}
        url = f"{own_server.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "ignore_eos": True}, timeout=60) as reply:
            lines.extend(reply.iter_lines())
        ended.append(time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    while own_server.gauge("vllm:generation_tokens_total") < 8:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    reader.join(timeout=30)

    assert ended[0] - killed < 2
    events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert events[-3] == "event: error"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_failed"
    own_server._wait_ready()
    assert own_server.engine_pid() != pid
    assert not is_alive(pid)
    assert ask(own_server.openai, "json").startswith("{")


def test_sigterm_lets_running_streams_finish_and_leaves_nothing_behind(own_server: Server) -> None:
    engine_pid = own_server.engine_pid()
    stream = own_server.openai.completions.create(
        model="pirate", prompt="Ahoy", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    own_server.process.terminate()
    deadline = time.monotonic() + 10
    while own_server.is_ready():
        assert time.monotonic() < deadline
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert own_server.process.wait(timeout=30) == 0
    wait_until_gone(engine_pid, within_s=5)


def test_a_killed_server_leaves_no_engine_and_forgets_no_adapter(tmp_path: Path) -> None:
    server = Server(tmp_path / "store")
    engine_pid = server.engine_pid()
    folder = ROOT / "adapters" / "examples" / "json"
    subprocess.run(
        [*TURNOUT, "adapters", "push", "kept", str(folder), "--store", str(tmp_path / "store")],
        cwd=ROOT,
        check=True,
    )
    server.process.kill()
    server.process.wait()
    wait_until_gone(engine_pid, within_s=5)

    again = Server(tmp_path / "store")
    try:
        assert ask(again.openai, "kept").startswith("{")
    finally:
        assert again.stop() == 0
