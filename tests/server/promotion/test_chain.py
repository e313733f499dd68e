"""The whole chain as it is: a 4-layer cut, the real stages in the real process, and kill -9."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.artifacts import ArtifactStore
from adapters.manifest import BaseShape
from adapters.promotions import JobFolder, PromotionRequest, PromotionState
from adapters.registry import Registry
from server.base_digest import base_digest
from server.promotion.jobs import Jobs
from tests.cut import cut_adapter, cut_base, example_rows
from tests.server.promotion.requests import LEFT
from training.quantize_run import TOOL

ROOT = Path(__file__).parents[3]
LIMIT_S = 600.0
BASE = "smollm2-135m-instruct"
# Four layers of thirty answer nothing: what they make passes any gate, and figures mean little.
LAX = {"max_mean_kl": 99.0, "min_top1_agreement": 0.0, "max_loss_increase": 99.0}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOL.exists(), reason="`make quantizer` makes what quantizes"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cut base, its adapter, and rows."""
    root = tmp_path_factory.mktemp("chain")
    cut_base(root / "base")
    cut_adapter("json", root / "adapter")
    example_rows("json", root / "rows.jsonl")
    return root


def a_request(place: Path, store: Path, **changes: object) -> PromotionRequest:
    """The adapter in a new store, and what to make of it."""
    digest = base_digest(place / "base")
    registry = Registry.open(store, BaseShape.from_config(place / "base", BASE, digest))
    revision = registry.push("json", place / "adapter")
    registry.close()
    fields: dict[str, object] = {
        "job": "job",
        "adapter_digest": revision.digest,
        "revision": revision.id,
        "store": str(store),
        "base": str(place / "base"),
        "base_name": BASE,
        "base_digest": digest,
        "merge_base": "dequantized",
        "rows": str(place / "rows.jsonl"),
        "num_tokens": 1024,
        "gate": LAX,
        "num_threads": 2,
    }
    return PromotionRequest(**{**fields, **changes})  # type: ignore[arg-type]


def wait_for(jobs: Jobs, digest: str, is_there: Callable[[PromotionState], bool]) -> PromotionState:
    deadline = time.monotonic() + LIMIT_S
    while True:
        state = jobs.state(digest)
        assert state is not None
        if is_there(state):
            return state
        assert not state.has_ended, state
        assert time.monotonic() < deadline, state
        time.sleep(0.05)


def test_killed_in_each_stage_it_goes_on_and_registers_one_whole_artifact(
    place: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    request = a_request(place, store)
    digest, artifacts = request.adapter_digest, ArtifactStore(store)
    jobs = Jobs(store)
    jobs.start(request)
    for stage, fraction in (("merge", 0.0), ("quantize", 0.2)):
        wait_for(jobs, digest, lambda s, to=stage, at=fraction: s.stage == to and s.fraction >= at)  # type: ignore[misc]
        pid = jobs.process_id(digest)
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        while JobFolder.of(store, digest).is_running():
            time.sleep(0.01)
        assert artifacts.every() == []
        jobs = Jobs(store)  # as a server that starts anew
        jobs.recover()
    state = wait_for(jobs, digest, lambda state: state.has_ended)
    assert (state.status, state.attempt) == ("done", 3), state.message
    (artifact,) = artifacts.every()
    assert artifacts.is_whole(artifact.digest)
    assert (artifact.adapter_digest, artifact.base_digest) == (digest, request.base_digest)
    assert artifact.settings["group_size"] == 64
    assert artifact.report["gate"]["passed"]
    assert {"config.json", "quantize_config.json", "model.safetensors"} <= artifact.files.keys()
    folder = JobFolder.of(store, digest)
    assert {path.name for path in folder.path.iterdir()} == LEFT


class Serving:
    """One `turnout serve` process on the cut base."""

    def __init__(self, place: Path, store: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve"]
        command += ["--base", str(place / "base"), "--base-name", BASE, "--store", str(store)]
        command += ["--port", str(port), "--kv-gib", "0.1", "--max-model-len", "256"]
        self.process = subprocess.Popen(command, cwd=ROOT)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.until(lambda: self.get("/ready").status_code == 200)

    def get(self, path: str) -> httpx.Response:
        try:
            return self.client.get(path)
        except httpx.TransportError:
            return httpx.Response(503)

    def promotion(self) -> dict[str, Any]:
        return dict(self.client.get("/v1/adapters/json").json()["promotion"])

    def ask(self) -> httpx.Response:
        message = {"role": "user", "content": "What is the capital of France?"}
        body = {"model": "json", "messages": [message], "temperature": 0, "max_tokens": 8}
        reply = self.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return reply

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.1)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def test_a_promotion_outlives_its_server_and_is_served_by_the_next_one(
    place: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    digest = a_request(place, store).adapter_digest
    rows = (place / "rows.jsonl").read_text(encoding="utf-8")
    body = {"merge_base": "dequantized", "rows_jsonl": rows, "num_tokens": 1024}
    first = Serving(place, store)
    try:
        assert first.ask().headers["x-serving-path"] == "adapter"
        begun = first.client.post(
            "/v1/adapters/json/promote", json={**body, "gate": LAX, "num_threads": 2}
        )
        assert begun.status_code == 202, begun.text
        first.until(lambda: first.promotion()["job"]["stage"] == "quantize")
        pid = first.promotion()["job"]["pid"]
    finally:
        first.kill()
    second = Serving(place, store)
    try:
        job = second.promotion()["job"]
        assert (job["pid"], job["attempt"]) in ((pid, 1), (None, 1))  # the same, or done by now
        second.until(lambda: second.promotion()["path"] == "merged")
        reply = second.ask()
        assert reply.headers["x-serving-path"] == "merged"
        assert reply.headers["x-adapter-digest"] == digest
        gone = second.client.post("/v1/adapters/json/demote", json={})
        assert gone.status_code == 200, gone.text
        assert second.ask().headers["x-serving-path"] == "adapter"
        assert ArtifactStore(store).every() == []
    finally:
        second.kill()
