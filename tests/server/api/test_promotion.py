"""Promotion over HTTP: jobs, weight sets, refusals. The job's stages are stubs."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from adapters.artifacts import ArtifactStore
from adapters.manifest import AdapterNotFound
from server.config import PromotionConfig
from server.engine.messages import EngineStats
from server.errors import engine_failed
from server.promotion.jobs import Jobs
from server.promotion.policy import Demote, Promote
from tests.conftest import MakeAdapter
from tests.server.api.harness import Server, serving, wait_until
from tests.server.promotion.fakes import FakeMerged, stub_jobs

ROWS = {"rows_jsonl": '{"prompt": "a", "completion": "b"}\n'}
Open = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture
def merged() -> FakeMerged:
    return FakeMerged()


@pytest.fixture
def open_server(
    tiny_base: Path, tmp_path: Path, merged: FakeMerged, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Serve the store of this test; keywords say what the stub job does."""
    (tmp_path / "allowed").mkdir()

    @contextlib.contextmanager
    def open_it(**stub: Any) -> Iterator[Server]:
        store = tmp_path / "store"
        jobs = stub_jobs(store, monkeypatch, **stub)
        roots = (tmp_path / "allowed",)
        with serving(tiny_base, store, allowed_roots=roots, merged=merged, jobs=jobs) as server:
            yield server

    return open_it


@pytest.fixture(scope="module")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter(r=2)


def post(server: Server, path: str, body: dict[str, Any], status: int) -> dict[str, Any]:
    reply = server.http().post(f"/v1/adapters/{path}", json=body)
    assert reply.status_code == status, reply.text
    return dict(reply.json())


def card(server: Server, name: str = "bot") -> dict[str, Any]:
    return dict(server.http().get(f"/v1/adapters/{name}").json()["promotion"])


def look(server: Server) -> None:
    server.run(server.services.promoter.look())


def settle(server: Server, condition: Callable[[], bool]) -> None:
    """Have the promoter look until the condition holds."""

    def holds() -> bool:
        look(server)
        return condition()

    wait_until(holds)


def wait_ended(server: Server, name: str = "bot") -> dict[str, Any]:
    wait_until(lambda: card(server, name)["job"]["finished"] is not None)
    look(server)
    return card(server, name)


def test_a_promoted_adapter_is_served_merged_under_its_name(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    with open_server() as server:
        revision = server.registry.push("bot", adapter)
        job = post(server, "bot/promote", ROWS, 202)
        assert (job["id"], job["status"]) == ("bot@1", "waiting")

        shown = wait_ended(server)

        assert shown["job"]["status"] == "done"
        assert shown["path"] == "merged"
        assert shown["message"] == ""
        artifact = shown["artifact"]
        assert artifact["digest"] == shown["job"]["result"]["artifact"]
        assert artifact["merge_base"] == "dequantized"
        (loaded,) = merged.loads
        assert loaded[:2] == (revision.digest, artifact["digest"])


def test_progress_is_shown_while_the_job_runs_and_cancel_ends_it(
    open_server: Open, merged: FakeMerged, adapter: Path, tmp_path: Path
) -> None:
    with open_server(hang="quantize") as server:
        digest = server.registry.push("bot", adapter).digest
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["job"]["stage"] == "quantize")

        job = card(server)["job"]
        assert job["status"] == "running"
        assert 0.3 < job["fraction"] < 0.4
        assert job["message"] == "stub quantize"
        assert Path(f"/proc/{job['pid']}").exists()

        gone = server.http().delete("/v1/adapters/bot/promotion")
        assert (gone.status_code, gone.json()["status"]) == (200, "cancelled")
        assert not Path(f"/proc/{job['pid']}").exists()
        folder = tmp_path / "store" / "promotions" / digest
        assert {path.name for path in folder.iterdir()} == {
            "request.json", "state.json", "lock", "log.txt"
        }  # fmt: skip
        assert card(server)["path"] == "adapter"
        assert merged.loads == []
        assert server.metrics.promotions["cancelled"] == 1
        again = server.http().delete("/v1/adapters/bot/promotion")
        assert again.status_code == 404
        assert again.json()["error"]["message"] == "No promotion of bot@1 is under way."


def test_a_second_promotion_of_a_revision_is_refused_while_one_runs(
    open_server: Open, adapter: Path
) -> None:
    with open_server(hang="merge") as server:
        server.registry.push("bot", adapter)
        server.registry.push("alias", adapter)  # the same revision by another name
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["job"]["stage"] == "merge")
        for name in ("bot", "alias"):
            error = post(server, f"{name}/promote", ROWS, 409)["error"]
            assert error["code"] == "adapter_conflict"
            assert "@1 is under way: running, merge, 0% (stub merge)" in error["message"]
        error = post(server, "bot/demote", {}, 409)["error"]
        assert "cancel it first" in error["message"]
        server.http().delete("/v1/adapters/bot/promotion")


def test_a_failed_gate_registers_nothing_and_says_by_how_much(
    open_server: Open, merged: FakeMerged, adapter: Path, tmp_path: Path
) -> None:
    with open_server(fail="mean KL is 0.3, 0.2 over 0.1") as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        shown = wait_ended(server)
        assert shown["job"]["status"] == "failed"
        assert shown["job"]["message"] == "mean KL is 0.3, 0.2 over 0.1"
        assert shown["job"]["result"] == {"gate": {"passed": False}}
        assert shown["artifact"] is None
        assert not (tmp_path / "store" / "artifacts").exists()
        assert merged.loads == []
        assert server.metrics.promotions["failed"] == 1
        assert post(server, "bot/promote", ROWS, 202)["status"] == "waiting"  # and may try again
        wait_ended(server)


def test_a_job_that_dies_is_failed_with_what_is_known_of_it(
    open_server: Open, adapter: Path
) -> None:
    with open_server(crash="gate") as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        shown = wait_ended(server)
        assert shown["job"]["status"] == "failed"
        assert shown["job"]["message"] == "its process ended with exit code 3"


def test_what_does_not_fit_is_reported_and_the_adapter_path_serves(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    merged.refusal = "needs 4.1 GiB, 1.0 are free"
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        shown = wait_ended(server)
        assert (shown["path"], shown["message"]) == ("adapter", "needs 4.1 GiB, 1.0 are free")
        merged.refusal = None
        look(server)
        assert merged.loads == []  # not tried all the time
        reply = post(server, "bot/promote", ROWS, 200)  # the artifact is there: only loaded
        assert reply["artifact"]["digest"] == shown["artifact"]["digest"]
        settle(server, lambda: card(server)["path"] == "merged")


def test_other_settings_make_another_artifact_in_the_place_of_the_first(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        post(server, "bot/promote", {**ROWS, "seed": 1}, 202)
        shown = wait_ended(server)
        (artifact,) = server.registry.artifacts.every()
        assert artifact.digest == shown["artifact"]["digest"]
        assert shown["path"] == "merged"


def test_what_a_new_engine_does_not_load_again_falls_back_to_the_adapter_path(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    with open_server() as server:
        digest = server.registry.push("bot", adapter).digest
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        assert server.metrics.weight_set_bytes.keys() == {digest}
        merged.routes.clear()
        merged.refusal = "there is no room"
        server.engine.num_restarts += 1
        settle(server, lambda: card(server)["message"] == "there is no room")
        look(server)
        assert card(server)["path"] == "adapter"
        assert server.metrics.weight_set_bytes == {}
        assert len(merged.loads) == 1
        merged.refusal = None
        server.engine.num_restarts += 1  # the next has room
        settle(server, lambda: card(server)["path"] == "merged")


def test_demote_deletes_the_artifact_and_keep_leaves_it_unserved_for_good(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    with open_server() as server:
        digest = server.registry.push("bot", adapter).digest
        error = post(server, "bot/demote", {}, 409)["error"]
        assert error["message"] == "The adapter bot@1 is not promoted."
        post(server, "bot/promote", ROWS, 202)
        artifact = wait_ended(server)["artifact"]["digest"]
        kept = post(server, "bot/demote", {"keep": True}, 200)
        assert kept == {"id": "bot@1", "artifact": artifact, "kept": True}
        assert merged.unloads == [digest]
        look(server)
        assert (card(server)["path"], card(server)["message"]) == ("adapter", "demoted, and kept")
    with open_server() as server:  # also after a restart
        look(server)
        assert card(server)["path"] == "adapter"
        post(server, "bot/promote", ROWS, 200)
        settle(server, lambda: card(server)["path"] == "merged")
        post(server, "bot/demote", {}, 200)
        assert server.registry.artifacts.every() == []
        assert card(server)["artifact"] is None


@pytest.mark.parametrize("keep", [True, False])
def test_who_demotes_before_the_end_was_looked_at_has_the_last_word(
    open_server: Open, adapter: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Say a script that waits for the job's last state, and then demotes."""
    monkeypatch.setattr("server.api.promoter._LOOK_S", 3600.0)
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["job"]["finished"] is not None)
        post(server, "bot/demote", {"keep": keep}, 200)
        for _ in range(2):
            look(server)
        assert card(server)["path"] == "adapter"
        assert len(server.registry.artifacts.every()) == keep
        assert server.services.metrics.promotions["done"] == 1


def test_a_promotion_that_follows_at_once_is_counted_apart(
    open_server: Open, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.promoter._LOOK_S", 3600.0)
    with open_server() as server:
        server.registry.push("bot", adapter)
        for seed in (1, 2):
            post(server, "bot/promote", {**ROWS, "seed": seed}, 202)
            wait_until(lambda: card(server)["job"]["finished"] is not None)
        look(server)
        assert server.services.metrics.promotions["done"] == 2


def test_a_model_whose_streams_go_on_keeps_nobody_waiting(
    open_server: Open, merged: FakeMerged, adapter: Path, make_adapter: MakeAdapter
) -> None:
    with open_server() as server:
        digest = server.registry.push("bot", adapter).digest
        server.registry.push("other", make_adapter(r=2, seed=5))
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        merged.has_streams = True
        post(server, "bot/demote", {"keep": True}, 200)
        assert merged.unloads == [digest]
        assert card(server)["path"] == "adapter"
        look(server)
        assert server.http().delete("/v1/adapters/bot/promotion").status_code == 404
        post(server, "other/promote", ROWS, 202)
        assert wait_ended(server, "other")["path"] == "merged"
        post(server, "bot/promote", ROWS, 200)  # asked for again before it has left
        settle(server, lambda: card(server)["path"] == "merged")
        post(server, "bot/demote", {}, 200)
        assert [each.revision for each in server.registry.artifacts.every()] == ["other@1"]
        merged.has_streams = False
        assert post(server, "bot/demote", {}, 409)["error"]["message"].endswith("is not promoted.")
        assert merged.routes.keys() == {server.registry.resolve("other").digest}


def test_a_restart_while_a_demoted_model_s_streams_go_on_brings_nothing_back(
    open_server: Open, merged: FakeMerged, adapter: Path, tmp_path: Path
) -> None:
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        merged.has_streams = True
        post(server, "bot/demote", {}, 200)
        assert list((tmp_path / "store" / "artifacts").iterdir()) == []
    merged.has_streams = False
    merged.loads.clear()
    with open_server() as server:
        look(server)
        assert (card(server)["path"], card(server)["artifact"]) == ("adapter", None)
        assert merged.loads == []


def test_what_had_no_room_is_tried_again_when_another_model_has_left(
    open_server: Open, merged: FakeMerged, adapter: Path, make_adapter: MakeAdapter
) -> None:
    with open_server() as server:
        for name, folder in (("bot", adapter), ("other", make_adapter(r=2, seed=5))):
            server.registry.push(name, folder)
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        merged.has_streams, merged.refusal = True, "there is no room"
        post(server, "bot/demote", {}, 200)
        post(server, "other/promote", ROWS, 202)
        assert wait_ended(server, "other")["message"] == "there is no room"
        merged.refusal = None
        look(server)
        assert card(server, "other")["path"] == "adapter"  # not tried all the time
        merged.has_streams = False
        settle(server, lambda: card(server, "other")["path"] == "merged")


def test_the_engine_is_told_to_let_a_model_go_before_it_is_asked_for_it_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    """Else it would let go of what requests are sent to."""
    store, told = tmp_path / "store", []
    with serving(tiny_base, store, jobs=stub_jobs(store, monkeypatch)) as server:
        digest = server.registry.push("bot", adapter).digest
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        sets = server.services.promoter._sets

        async def never_free(artifact: str) -> None:
            told.append(artifact)
            await asyncio.Event().wait()

        async def unload() -> None:
            await sets.unload(digest)
            assert told, "the next thing that the engine hears may be a load"
            assert sets.path(digest) == "adapter"

        monkeypatch.setattr(server.engine, "drop_weight_set", never_free)
        server.run(unload())
        settle(server, lambda: card(server)["path"] == "merged")
        assert len(told) == 1


def test_a_restarted_server_loads_what_is_promoted_and_what_is_published(
    open_server: Open, merged: FakeMerged, adapter: Path, make_adapter: MakeAdapter
) -> None:
    with open_server() as server:
        first = server.registry.push("bot", adapter).digest
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
    merged.routes.clear()
    with open_server() as server:
        settle(server, lambda: merged.route(first) is not None)
        server.registry.push("bot", make_adapter(r=2, seed=5))
        assert card(server)["artifact"] is None  # the newer revision has none
        settle(server, lambda: merged.route(first) is None)  # and no name means the old one
        server.registry.rollback("bot")
        settle(server, lambda: card(server)["path"] == "merged")
        server.registry.delete("bot")
        settle(server, lambda: merged.route(first) is None)
        assert server.registry.artifacts.every() == []


def test_a_look_asks_once_for_the_artifacts_however_many_names_there_are(
    open_server: Open, adapter: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after a change each question reads every record, and all streams would wait."""
    with open_server() as server:
        for name, seed in (("bot", 1), ("cat", 2), ("dog", 3)):
            server.registry.push(name, make_adapter(r=2, seed=seed))
        post(server, "bot/promote", ROWS, 202)
        wait_ended(server)
        every = mock.Mock(wraps=server.registry.artifacts.every)
        monkeypatch.setattr(server.registry.artifacts, "every", every)
        server.run(server.services.promoter._sets.reconcile())
        every.assert_called_once_with()


def test_a_full_disk_ends_no_looking(
    open_server: Open, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server() as server:
        full = [OSError(28, "No space left on device"), AdapterNotFound("gone a moment ago")]

        async def look() -> None:
            if full:
                raise full.pop()

        with monkeypatch.context() as patched:
            patched.setattr("server.api.promoter._LOOK_S", 0.01)
            patched.setattr(server.services.promoter, "look", look)
            wait_until(lambda: not full)
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["path"] == "merged")  # the task goes on by itself


def test_what_cannot_be_recovered_at_first_is_tried_again(
    open_server: Open, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [OSError(28, "No space left on device")]
    recover = Jobs.recover

    def fail_once(jobs: Jobs) -> None:
        if full:
            raise full.pop()
        recover(jobs)

    monkeypatch.setattr(Jobs, "recover", fail_once)
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["path"] == "merged")  # the task goes on by itself


def test_an_artifact_that_an_engine_died_of_is_not_the_next_one_s_end_too(
    open_server: Open, merged: FakeMerged, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_server() as server:
        server.registry.push("bot", adapter)
        deaths: list[str] = []

        async def die(adapter_digest: str, artifact_digest: str, folder: Path) -> None:
            deaths.append(adapter_digest)
            server.engine.num_restarts += 1
            raise engine_failed("The engine process ended.")

        with monkeypatch.context() as patched:
            patched.setattr(merged, "load", die)
            post(server, "bot/promote", ROWS, 202)
            settle(server, lambda: bool(deaths))
            for _ in range(3):
                look(server)
        assert len(deaths) == 1
        assert card(server)["message"] == "The engine process ended."
        monkeypatch.setattr("server.api.weight_sets._RETRY_S", 0.0)
        settle(server, lambda: card(server)["path"] == "merged")


@pytest.mark.parametrize("trouble", [OSError(5, "Input/output error"), None])
def test_an_artifact_that_cannot_be_read_keeps_no_other_one_from_being_served(
    open_server: Open,
    merged: FakeMerged,
    adapter: Path,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    trouble: OSError | None,
) -> None:
    with open_server() as server:
        bad = server.registry.push("bot", adapter).digest
        server.registry.push("other", make_adapter(r=2, seed=5))
        for name in ("bot", "other"):
            post(server, f"{name}/promote", ROWS, 202)
            wait_ended(server, name)
        store = server.registry.artifacts
        found = store.find(bad)
        assert found is not None
    if trouble is None:
        (store.path(found.digest) / "link").symlink_to("elsewhere")
    else:
        is_whole = ArtifactStore.is_whole

        def fail(self: ArtifactStore, digest: str) -> bool:
            if digest == found.digest:
                raise trouble
            return is_whole(self, digest)

        monkeypatch.setattr(ArtifactStore, "is_whole", fail)
    merged.routes.clear()
    with open_server() as server:
        settle(server, lambda: card(server, "other")["path"] == "merged")
        said = card(server)["message"]
        assert said == "its files are damaged; promote it again" or "Input/output error" in said


def test_a_damaged_artifact_is_not_served(
    open_server: Open, merged: FakeMerged, adapter: Path
) -> None:
    with open_server() as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        digest = wait_ended(server)["artifact"]["digest"]
        weights = server.registry.artifacts.path(digest) / "merge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    merged.routes.clear()
    merged.loads.clear()
    with open_server() as server:
        settle(server, lambda: "damaged" in card(server)["message"])
        assert card(server)["path"] == "adapter"
        assert merged.loads == []
        post(server, "bot/promote", ROWS, 202)  # what is damaged is made again
        assert wait_ended(server)["path"] == "merged"


@pytest.mark.parametrize("path", ["", "/revisions/1"])
def test_deleting_what_is_promoted_ends_its_promotion(
    path: str, open_server: Open, adapter: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    with open_server(hang="gate") as server:
        server.registry.push("bot", adapter)
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["job"]["stage"] == "gate")
        pid = card(server)["job"]["pid"]
        server.registry.push("bot", make_adapter(r=2, seed=9))
        assert server.http().delete(f"/v1/adapters/bot{path}").status_code == 200
        look(server)
        assert not Path(f"/proc/{pid}").exists()
        assert not any(path.is_dir() for path in (tmp_path / "store" / "promotions").iterdir())


def test_what_a_job_registers_as_its_adapter_is_deleted_goes_too(
    open_server: Open, adapter: Path, tmp_path: Path
) -> None:
    with open_server(hang="gate") as server:
        digest = server.registry.push("bot", adapter).digest
        post(server, "bot/promote", ROWS, 202)
        wait_until(lambda: card(server)["job"]["stage"] == "gate")
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "config.json").write_text("{}")

        async def delete() -> None:
            async with server.services.promoter._changing:  # nobody looks in between
                server.registry.delete("bot")
                server.registry.artifacts.register(
                    tmp_path / "made",
                    adapter_digest=digest,
                    base_digest="b" * 64,
                    revision="bot@1",
                    job="job",
                    settings={},
                    report={},
                )

        server.run(delete())
        settle(server, lambda: server.registry.artifacts.every() == [])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "rows", "Nothing to calibrate on"),
        ({**ROWS, "rows": "x"}, "rows_jsonl", "exclude each other"),
        (
            {**ROWS, "eval_rows": "x", "eval_rows_jsonl": ""},
            "eval_rows_jsonl",
            "exclude each other",
        ),
        ({"text": "t", "eval_rows_jsonl": "{}"}, "eval_rows", "eval_rows without rows"),
        ({**ROWS, "eval_rows": "/etc/passwd"}, "eval_rows", "beneath a folder that this server"),
        ({**ROWS, "backend": "awq"}, "backend", "'auto', 'gptqmodel' or 'auto-round'"),
        ({"rows": "/etc/passwd"}, "rows", "beneath a folder that this server allows"),
        ({"rows": "http://host/rows"}, "rows", "never a URL"),
        ({"text": "missing.txt"}, "text", "names no file"),
        ({**ROWS, "merge_base": "nf4"}, "merge_base", "'auto', 'original' or 'dequantized'"),
        ({**ROWS, "group_size": 48}, "group_size", "0, 32, 64 or 128"),
        ({**ROWS, "num_tokens": 1}, "num_tokens", "greater than or equal to 512"),
        ({**ROWS, "gate": {"max_kl": 1}}, "gate.max_kl", "Unknown field"),
        ({**ROWS, "gate": {"max_mean_kl": -1}}, "gate.max_mean_kl", "greater than or equal"),
        ({**ROWS, "device": "tpu"}, "device", "'cpu' or 'cuda'"),
        ({**ROWS, "bits": 3}, "bits", "Unknown field"),
    ],
)
def test_a_bad_request_is_refused_and_says_what_is_wrong(
    promoting: Server, body: dict[str, Any], param: str, said: str
) -> None:
    error = post(promoting, "bot/promote", body, 400)["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert card(promoting)["job"] is None


@pytest.fixture(scope="module")
def promoting(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that has an adapter and is asked for nothing that it does."""
    root = tmp_path_factory.mktemp("promoting")
    with serving(tiny_base, root / "store", allowed_roots=(root,)) as server:
        server.registry.push("bot", make_adapter(r=2))
        server.registry.push("unpublished", make_adapter(r=2, seed=1), publish=False)
        yield server


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("nobody/promote", 404, "'nobody' does not exist"),
        ("unpublished/promote", 409, "no published revision"),
        ("nobody/demote", 404, "'nobody' does not exist"),
        ("bot/demote", 409, "bot@1 is not promoted"),
    ],
)
def test_what_is_not_there_is_neither_promoted_nor_demoted(
    promoting: Server, path: str, status: int, said: str
) -> None:
    body = ROWS if path.endswith("promote") else {}
    assert said in post(promoting, path, body, status)["error"]["message"]


def test_a_revision_that_is_not_there_is_not_promoted(promoting: Server) -> None:
    error = post(promoting, "bot/promote", {**ROWS, "revision": 7}, 404)["error"]
    assert error["message"] == "The adapter bot has no revision 7."


def test_rows_may_be_files_beneath_an_allowed_root(
    open_server: Open, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "allowed" / "rows.jsonl").write_text(ROWS["rows_jsonl"])
    given = {"rows": "rows.jsonl", "eval_rows": "rows.jsonl"}
    with open_server() as server:
        server.registry.push("bot", adapter)
        for options, is_new in (
            (given, True),
            ({**ROWS, "eval_rows_jsonl": ROWS["rows_jsonl"]}, False),  # the same, given otherwise
            ({**ROWS, "eval_rows_jsonl": "{}"}, True),
            ({**given, "backend": "auto-round"}, True),
            (ROWS, True),
        ):
            post(server, "bot/promote", options, 202 if is_new else 200)
            wait_ended(server)
        (artifact,) = server.registry.artifacts.every()
        assert artifact.settings["asked"]["rows_sha256"]


def test_a_text_that_says_something_else_now_is_another_one(
    open_server: Open, adapter: Path, tmp_path: Path
) -> None:
    text = tmp_path / "allowed" / "text.txt"
    with open_server() as server:
        server.registry.push("bot", adapter)
        for content, is_new in (("one", True), ("one", False), ("two", True)):
            text.write_text(content)
            post(server, "bot/promote", {"text": "text.txt"}, 202 if is_new else 200)
            wait_ended(server)


def test_candidates_are_those_who_served_with_what_a_merge_would_give(
    open_server: Open, adapter: Path, make_adapter: MakeAdapter
) -> None:
    with open_server() as server:
        busy = server.registry.push("busy", adapter)
        idle = server.registry.push("idle", make_adapter(r=2, seed=9))
        server.registry.add_usage({busy.digest: 10_000})
        reply = server.http().get("/v1/candidates", params={"batch": 32}).json()
        assert reply["batch"] == 32
        assert 9_900 < reply["recent_tokens"] <= 10_000  # they fade
        assert "H100" in reply["step_times"]
        first, second = reply["data"]
        assert [first["id"], second["id"]] == ["busy@1", "idle@1"]
        assert first["share"] == 1.0
        assert first["pays"]
        assert first["saved_gpu_seconds"] > 0
        assert not second["pays"]
        server.registry.add_usage({idle.digest: 3000})  # now every step has both kinds of rows
        reply = server.http().get("/v1/candidates", params={"batch": 32}).json()
        assert [each["pays"] for each in reply["data"]] == [False, False]
        for batch in ("0", "x", "5000", "-1"):
            bad = server.http().get("/v1/candidates", params={"batch": batch})
            assert bad.status_code == 400
            assert bad.json()["error"]["param"] == "batch"


def test_promotions_and_weight_sets_are_counted(open_server: Open, adapter: Path) -> None:
    with open_server() as server:
        server.registry.push("bot", adapter)
        server.registry.push("alias", adapter)
        post(server, "bot/promote", ROWS, 202)
        size = wait_ended(server)["artifact"]["num_bytes"]
        text = server.http().get("/metrics").text
        assert 'turnout_promotions_total{result="done"} 1.0' in text
        assert 'turnout_promotions_total{result="failed"} 0.0' in text
        assert "turnout_promotion_running 0.0" in text
        lines = [each for each in text.splitlines() if each.startswith("turnout_weight_set_bytes{")]
        assert lines == [f'turnout_weight_set_bytes{{adapter="alias"}} {float(size)}']


@pytest.fixture
def policy_server(
    tiny_base: Path, tmp_path: Path, merged: FakeMerged, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server whose policy promotes at most one of those that have rows; the test makes it act."""
    store, rows = tmp_path / "store", tmp_path / "rows"
    rows.mkdir()
    for name in ("busy", "rising"):
        (rows / f"{name}.jsonl").write_text(ROWS["rows_jsonl"])
    (text := rows / "text.txt").write_text("text")
    promotion = PromotionConfig(
        policy="auto", min_tokens=1000, cool_down_s=60, rows=rows, text=text
    )
    jobs = stub_jobs(store, monkeypatch)
    with serving(tiny_base, store, promotion=promotion, merged=merged, jobs=jobs) as server:
        yield server


def act(server: Server, after_s: float = 0.0) -> Promote | Demote | None:
    """What the policy does, so many seconds from now."""
    decision = server.run(server.services.promoter.apply_policy(time.time() + after_s))
    assert decision is None or isinstance(decision, (Promote, Demote))
    return decision


def test_the_policy_promotes_the_popular_and_demotes_it_for_one_more_popular(
    policy_server: Server, merged: FakeMerged, make_adapter: MakeAdapter
) -> None:
    server = policy_server
    push = server.registry.push
    busy, rising, norows = (
        push(name, make_adapter(r=2, seed=seed)).digest
        for seed, name in enumerate(("busy", "rising", "norows"))
    )
    server.registry.add_usage({norows: 100_000})
    assert act(server) is None  # nobody else has served anything
    server.registry.add_usage({busy: 10_000_000})
    assert act(server) == Promote(busy)
    assert act(server) is None  # one at a time
    wait_ended(server, "busy")
    assert card(server, "busy")["path"] == "merged"
    (artifact,) = server.registry.artifacts.every()
    asked = artifact.settings["asked"]
    assert asked["rows_sha256"] == hashlib.sha256(ROWS["rows_jsonl"].encode()).hexdigest()
    assert asked["text_sha256"] == hashlib.sha256(b"text").hexdigest()
    server.registry.add_usage({rising: 10_000_000_000})
    assert act(server) is None  # not so soon
    assert act(server, after_s=100) == Demote(busy)
    assert card(server, "busy")["path"] == "adapter"
    assert server.registry.artifacts.every() == []
    assert act(server, after_s=200) == Promote(rising)
    wait_ended(server, "rising")
    assert merged.routes.keys() == {rising}


def test_on_a_gpu_the_policy_promotes_what_the_memory_set_aside_holds(
    policy_server: Server, adapter: Path
) -> None:
    server = policy_server
    busy = server.registry.push("busy", adapter).digest
    server.registry.add_usage({busy: 10_000_000})
    on_cpu = server.engine.info
    server.engine.info = msgspec.structs.replace(on_cpu, device="cuda")
    assert act(server) is None  # nothing was set aside
    server.engine.info = on_cpu
    server.engine.is_ready = False
    assert act(server) is None
    server.engine.is_ready = True
    assert act(server) == Promote(busy)
    wait_ended(server, "busy")


def test_what_an_operator_demoted_to_keep_is_left_alone_by_the_policy(
    policy_server: Server, adapter: Path
) -> None:
    server = policy_server
    busy = server.registry.push("busy", adapter).digest
    server.registry.add_usage({busy: 10_000_000})
    assert act(server) == Promote(busy)
    wait_ended(server, "busy")
    post(server, "busy/demote", {"keep": True}, 200)
    assert act(server, after_s=1000) is None


def test_a_promotion_that_failed_is_not_tried_again_before_it_cooled_down(
    policy_server: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = policy_server
    monkeypatch.setenv("STUB", '{"fail": "the gate"}')
    busy = server.registry.push("busy", adapter).digest
    server.registry.add_usage({busy: 10_000_000})
    assert act(server) == Promote(busy)
    wait_ended(server, "busy")
    assert act(server, after_s=50) is None
    assert act(server, after_s=100) == Promote(busy)
    wait_ended(server, "busy")


def test_the_mean_batch_and_the_bases_share_come_from_what_was_served(
    open_server: Open, adapter: Path
) -> None:
    with open_server() as server:
        bot = server.registry.push("bot", adapter).digest
        server.registry.add_usage({bot: 1000})
        server.metrics.paths["base"].generation_tokens = 900
        server.metrics.paths["adapter"].generation_tokens = 300
        server.metrics.on_stats(EngineStats(num_steps=100))
        reply = server.http().get("/v1/candidates").json()
        assert reply["batch"] == 12
        assert 3_900 < reply["recent_tokens"] <= 4_000
        assert reply["data"][0]["share"] == 0.25
