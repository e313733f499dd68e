"""Operator routes over a real registry: push, publish, roll back, pin, delete, load, unload."""

import json
import shutil
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch

from adapters.registry import Registry
from adapters.rope import RopeScaling
from server.engine.messages import AdapterEvent
from server.engine.request import AdapterRef
from server.errors import ServeError
from tests.conftest import MakeAdapter
from tests.server.api.harness import BASE, Script, Server, serving, wait_until

NAME = "support-bot"


@pytest.fixture
def folder(make_adapter: MakeAdapter) -> Path:
    return make_adapter(seed=1)


@pytest.fixture
def other(make_adapter: MakeAdapter) -> Path:
    return make_adapter(seed=2)


def upload(
    server: Server, folder: Path, name: str = NAME, key: str | None = None, **fields: str
) -> httpx.Response:
    files = {
        file: (file, (folder / file).read_bytes())
        for file in ("adapter_config.json", "adapter_model.safetensors", "turnout.json")
        if (folder / file).is_file()
    }
    headers = {} if key is None else {"idempotency-key": key}
    return server.http().post(
        "/v1/adapters", data={"name": name, **fields}, files=files, headers=headers
    )


def allowed(server: Server, folder: Path) -> Path:
    """A copy of the adapter beneath the allowed root."""
    root = server.services.config.adapters.allowed_roots[0]
    target = root / folder.name
    shutil.copytree(folder, target)
    return target


def chat(server: Server, model: str = NAME, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
    return server.http().post("/v1/chat/completions", json=body)


def load(server: Server, path: object, name: str = NAME, **fields: Any) -> httpx.Response:
    return server.http().post(
        "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields}
    )


def test_an_upload_is_registered_and_can_be_asked_at_once(server: Server, folder: Path) -> None:
    reply = upload(server, folder)
    assert reply.status_code == 201
    digest = reply.json()["current"]["digest"]
    assert reply.json()["loaded"] is False
    answer = chat(server)
    assert answer.headers["x-adapter-id"] == f"{NAME}@1"
    assert answer.headers["x-adapter-digest"] == digest
    assert answer.headers["x-serving-path"] == "adapter"
    assert answer.headers["x-adapter-tier"] == "host"
    assert answer.json()["model"] == NAME
    adapter = server.engine.requests[0].adapter
    assert adapter is not None
    assert (adapter.digest, adapter.num_rank_rows) == (digest, 8)


def test_a_stream_s_headers_name_the_adapter_too(server: Server, folder: Path) -> None:
    upload(server, folder)
    headers = chat(server, stream=True).headers
    assert (headers["x-adapter-id"], headers["x-adapter-tier"]) == (f"{NAME}@1", "host")


def test_the_fingerprint_tells_base_and_revisions_apart(
    server: Server, folder: Path, other: Path
) -> None:
    upload(server, folder)
    upload(server, other)
    models = (BASE, f"{NAME}@1", f"{NAME}@2", NAME)
    prints = [chat(server, model).json()["system_fingerprint"] for model in models]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]


def test_an_upload_leaves_nothing_behind(server: Server, folder: Path) -> None:
    upload(server, folder)
    server.http().post("/v1/adapters", data={"name": NAME}, files={"a": ("b.bin", b"x")})
    uploads = server.services.config.adapters.store / "uploads"
    wait_until(lambda: not list(uploads.iterdir()), 10.0)


def test_the_same_idempotency_key_gives_the_same_revision(
    server: Server, folder: Path, other: Path
) -> None:
    first, second = upload(server, folder, key="k1"), upload(server, folder, key="k1")
    assert first.json()["revision"]["id"] == second.json()["revision"]["id"] == f"{NAME}@1"
    third = upload(server, other, key="k1")
    assert (third.status_code, third.json()["error"]["code"]) == (409, "adapter_conflict")


def test_a_folder_beneath_an_allowed_root_is_pushed(server: Server, folder: Path) -> None:
    path = allowed(server, folder)
    for given in (str(path), path.name):
        reply = server.http().post("/v1/adapters", json={"name": NAME, "path": given})
        assert reply.status_code == 201
        assert reply.json()["num_revisions"] == 1


def test_a_path_out_of_the_allowed_roots_is_refused(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    root = server.services.config.adapters.allowed_roots[0]
    (root / "link").symlink_to(folder)
    for path in (folder, "../allowed-not", root / ".." / "store", root / "link", "/etc", "a\0b"):
        reply = load(server, path)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "InvalidUserInput")
    for url in ("https://example.com/a", "hf://a/b", "file:///etc"):
        assert "never a URL" in load(server, url).json()["error"]["message"]


def test_a_path_that_no_file_system_could_follow_is_not_found(server: Server) -> None:
    circle = server.services.config.adapters.allowed_roots[0] / "circle"
    circle.symlink_to(circle)
    for path in ("a" * 300, "a/" * 2000, "circle"):
        reply = load(server, path)
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, "lora_path")


def test_without_allowed_roots_no_path_is_taken(
    tiny_base: Path, tmp_path: Path, folder: Path
) -> None:
    with serving(tiny_base, tmp_path / "store") as server:
        assert load(server, folder).status_code == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [("name", "a/b"), ("name", "a b"), ("name", "a,b"), ("name", BASE), ("name", "")],
)
def test_a_name_that_cannot_be_an_adapter_s_is_refused(
    server: Server, folder: Path, name: str, value: str
) -> None:
    reply = upload(server, folder, **{name: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "name")


def test_a_refused_adapter_is_told_by_field(server: Server, make_adapter: MakeAdapter) -> None:
    reply = upload(server, make_adapter(bias="lora_only"))
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "adapter_refused", "bias")
    assert server.registry.list() == []


def test_unpublished_and_preloaded_are_as_asked(server: Server, folder: Path) -> None:
    reply = upload(server, folder, publish="false", preload="true").json()
    assert (reply["current"], reply["loaded"]) == (None, True)
    assert [pinned for _, pinned in server.engine.loaded] == [False]
    assert chat(server).status_code == 404
    assert chat(server, f"{NAME}@1").status_code == 200


def test_what_cannot_be_preloaded_now_is_not_registered_either(
    server: Server, folder: Path
) -> None:
    server.engine.is_ready = False
    assert upload(server, folder, preload="true").status_code == 503
    assert server.registry.list() == []


def test_an_adapter_may_be_named_true(server: Server, folder: Path) -> None:
    assert upload(server, folder, "true").json()["current"]["id"] == "true@1"
    assert upload(server, folder, publish="yes").json()["error"]["param"] == "publish"


def test_a_form_field_that_is_unknown_is_refused_by_name(server: Server, folder: Path) -> None:
    reply = upload(server, folder, surprise="1")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "surprise")


def test_adapters_are_listed_shown_published_and_rolled_back(
    server: Server, folder: Path, other: Path
) -> None:
    http = server.http()
    upload(server, folder)
    upload(server, other)
    listed = http.get("/v1/adapters").json()
    assert [(a["name"], a["num_revisions"]) for a in listed["data"]] == [(NAME, 2)]
    assert http.get(f"/v1/adapters/{NAME}").json()["current"]["id"] == f"{NAME}@2"
    revisions = http.get(f"/v1/adapters/{NAME}/revisions").json()["data"]
    assert [r["revision"] for r in revisions] == [1, 2]
    back = http.post(f"/v1/adapters/{NAME}/rollback").json()
    assert back["current"]["id"] == f"{NAME}@1"
    assert chat(server).headers["x-adapter-id"] == f"{NAME}@1"
    forth = http.post(f"/v1/adapters/{NAME}/publish", json={"revision": 2}).json()
    assert forth["current"]["id"] == f"{NAME}@2"
    assert http.post(f"/v1/adapters/{NAME}/publish", json={}).status_code == 400
    assert http.post(f"/v1/adapters/{NAME}/publish", json={"revision": 9}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("DELETE", ""), ("GET", "/revisions"), ("POST", "/rollback"), ("POST", "/pin"),
        ("POST", "/unpin"), ("DELETE", "/revisions/1"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_there_is_404(server: Server, method: str, path: str) -> None:
    reply = server.http().request(method, f"/v1/adapters/nobody{path}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "adapter_not_found")


def test_a_request_under_way_keeps_its_revision(server: Server, folder: Path, other: Path) -> None:
    upload(server, folder)
    server.loop.call_soon_threadsafe(server.engine.gate.clear)
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(chat(server)))
    thread.start()
    wait_until(lambda: len(server.engine.requests) == 1)
    upload(server, other)
    server.loop.call_soon_threadsafe(server.engine.gate.set)
    thread.join(10)
    assert replies[0].headers["x-adapter-id"] == f"{NAME}@1"


def test_a_pin_loads_and_holds_and_follows_what_is_published(
    server: Server, folder: Path, other: Path
) -> None:
    upload(server, folder)
    first = server.registry.resolve(NAME).digest
    assert server.http().post(f"/v1/adapters/{NAME}/pin").json()["pinned"] is True
    assert [(a.digest, pinned) for a, pinned in server.engine.loaded] == [(first, True)]
    upload(server, other)
    second = server.registry.resolve(NAME).digest
    assert server.engine.unpinned == [first]
    assert (server.engine.loaded[-1][0].digest, server.engine.loaded[-1][1]) == (second, True)
    assert server.http().post(f"/v1/adapters/{NAME}/unpin").json()["pinned"] is False
    assert server.engine.unpinned == [first, second]


def test_a_pin_from_before_anything_was_published_loads_what_is_published(
    server: Server, folder: Path
) -> None:
    upload(server, folder, publish="false")
    assert server.http().post(f"/v1/adapters/{NAME}/pin").json()["pinned"] is True
    assert server.engine.loaded == []
    server.http().post(f"/v1/adapters/{NAME}/publish", json={"revision": 1})
    digest = server.registry.resolve(NAME).digest
    assert [(a.digest, pinned) for a, pinned in server.engine.loaded] == [(digest, True)]
    assert server.engine.unpinned == []


def test_content_that_two_names_pin_stays_until_both_let_go(server: Server, folder: Path) -> None:
    http = server.http()
    for name in ("one", "two"):
        upload(server, folder, name)
        http.post(f"/v1/adapters/{name}/pin")
    http.post("/v1/adapters/one/unpin")
    assert server.engine.unpinned == []
    digest = server.registry.resolve("two").digest
    http.delete("/v1/adapters/two")
    assert server.engine.unpinned == [digest]


def test_a_pinned_adapter_may_be_published_while_the_engine_is_down(
    server: Server, folder: Path, other: Path
) -> None:
    upload(server, folder)
    server.http().post(f"/v1/adapters/{NAME}/pin")
    server.engine.is_ready = False
    assert upload(server, other).status_code == 201
    server.engine.num_restarts += 1
    server.engine.is_ready = True
    second = server.registry.resolve(NAME).digest
    wait_until(lambda: server.engine.loaded[-1][0].digest == second, 5.0)


def test_a_pin_that_cannot_be_kept_is_taken_back_and_told(server: Server, folder: Path) -> None:
    upload(server, folder)
    server.engine.load_failure = "the object cannot be read"
    reply = server.http().post(f"/v1/adapters/{NAME}/pin")
    assert reply.status_code == 409
    assert "the object cannot be read" in reply.json()["error"]["message"]
    assert server.registry.get(NAME).pinned is False
    assert server.engine.unpinned == [server.registry.resolve(NAME).digest]


def test_a_full_bank_postpones_and_refuses_nothing(server: Server, folder: Path) -> None:
    server.engine.is_full = True
    assert upload(server, folder, preload="true").json()["loaded"] is False
    reply = server.http().post(f"/v1/adapters/{NAME}/pin")
    assert (reply.status_code, reply.json()["pinned"]) == (200, True)
    assert server.engine.unpinned == []


def test_pins_are_restored_in_an_engine_that_has_started_anew(server: Server, folder: Path) -> None:
    upload(server, folder)
    server.http().post(f"/v1/adapters/{NAME}/pin")
    server.engine.num_restarts += 1
    wait_until(lambda: len(server.engine.loaded) == 2, 5.0)
    assert server.engine.loaded[0] == server.engine.loaded[1]


@pytest.mark.parametrize("how", ["pin", "publish", "restart"])
def test_a_pin_that_is_taken_back_while_it_is_made_does_not_stay(
    server: Server, folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    upload(server, folder)
    if how != "pin":
        server.http().post(f"/v1/adapters/{NAME}/pin")
    load_adapter = server.engine.load_adapter

    async def load(adapter: AdapterRef, *, pinned: bool = False) -> AdapterEvent:
        server.registry.unpin(NAME)  # whose word to the engine came before this one's
        return await load_adapter(adapter, pinned=pinned)

    monkeypatch.setattr(server.engine, "load_adapter", load)
    if how == "pin":
        server.http().post(f"/v1/adapters/{NAME}/pin")
    elif how == "publish":
        upload(server, other)
    else:
        server.engine.num_restarts += 1
    digest = server.registry.resolve(NAME).digest
    wait_until(lambda: server.engine.unpinned[-1:] == [digest], 5.0)


def test_a_pin_that_was_there_outlives_one_that_fails(server: Server, folder: Path) -> None:
    upload(server, folder)
    server.http().post(f"/v1/adapters/{NAME}/pin")
    server.engine.is_ready = False
    assert server.http().post(f"/v1/adapters/{NAME}/pin").status_code == 503
    server.engine.is_ready = True
    server.engine.load_failure = "the object cannot be read"
    assert server.http().post(f"/v1/adapters/{NAME}/pin").status_code == 409
    assert server.registry.get(NAME).pinned is True
    assert server.engine.unpinned == []


def test_tokens_that_cannot_be_registered_are_kept(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    add_usage, full = server.registry.add_usage, [sqlite3.OperationalError("the disk is full")]

    def fail_once(tokens: Mapping[str, int]) -> None:
        if full:
            raise full.pop()
        add_usage(tokens)

    monkeypatch.setattr(server.registry, "add_usage", fail_once)
    server.services.usage[digest] = 7
    server.run(server.services.register_usage())
    assert server.services.usage == {digest: 7}
    server.run(server.services.register_usage())
    assert server.registry.usage()[digest] == 7


def test_a_delete_forgets_the_name_at_once_and_frees_after_the_last_request(
    server: Server, folder: Path
) -> None:
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    server.engine.scripts.append(Script([5], None))
    with server.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "hello"}], stream=True
    ) as stream:
        next(stream)
        reply = server.http().delete(f"/v1/adapters/{NAME}").json()
        assert (reply["deleted"], reply["freed"], reply["draining"]) == (True, [], [digest])
        assert chat(server).status_code == 404
        assert server.engine.dropped == []
    wait_until(lambda: server.engine.dropped == [digest], 3.0)
    assert list((server.services.config.adapters.store / "objects").iterdir()) == []


def test_uploads_that_a_crash_left_are_swept_at_the_start(tiny_base: Path, tmp_path: Path) -> None:
    left = tmp_path / "store" / "uploads" / "tmpabc"
    left.mkdir(parents=True)
    with serving(tiny_base, tmp_path / "store"):
        assert not left.exists()


def test_a_delete_without_requests_frees_at_once(server: Server, folder: Path) -> None:
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    assert server.http().delete(f"/v1/adapters/{NAME}").json()["freed"] == [digest]
    wait_until(lambda: server.engine.dropped == [digest], 3.0)


def test_a_revision_is_deleted_and_the_adapter_answers_on(
    server: Server, folder: Path, other: Path
) -> None:
    http, one = server.http(), f"/v1/adapters/{NAME}"
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    upload(server, other)
    assert http.delete(f"{one}/revisions/1").json() == {
        "id": f"{NAME}@1",
        "object": "adapter.revision.deleted",
        "deleted": True,
        "freed": [digest],
        "draining": [],
    }
    wait_until(lambda: server.engine.dropped == [digest], 3.0)
    assert chat(server).headers["x-adapter-id"] == f"{NAME}@2"
    assert chat(server, f"{NAME}@1").status_code == 404
    assert [card["revision"] for card in http.get(f"{one}/revisions").json()["data"]] == [2]


def test_a_revision_under_way_is_freed_after_its_last_request(
    server: Server, folder: Path, other: Path
) -> None:
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    server.engine.scripts.append(Script([5], None))
    with server.client().completions.create(model=NAME, prompt="hello", stream=True) as stream:
        next(stream)
        upload(server, other)
        reply = server.http().delete(f"/v1/adapters/{NAME}/revisions/1").json()
        assert (reply["freed"], reply["draining"]) == ([], [digest])
        assert server.engine.dropped == []
    wait_until(lambda: server.engine.dropped == [digest], 3.0)


def test_the_published_revision_is_not_deleted(server: Server, folder: Path, other: Path) -> None:
    upload(server, folder)
    upload(server, other)
    reply = server.http().delete(f"/v1/adapters/{NAME}/revisions/2")
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_conflict")
    assert reply.json()["error"]["message"] == (
        f"{NAME}@2 is published; publish another revision first."
    )
    assert chat(server).headers["x-adapter-id"] == f"{NAME}@2"


@pytest.mark.parametrize("number", ["3", "0", "x", "-1", "1e0", "9" * 5000, "%D9%A1"])
def test_a_revision_that_is_not_there_is_not_deleted(
    server: Server, folder: Path, number: str
) -> None:
    upload(server, folder)
    reply = server.http().delete(f"/v1/adapters/{NAME}/revisions/{number}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "adapter_not_found")
    assert "has no revision" in reply.json()["error"]["message"]


def test_content_that_was_pushed_again_is_not_dropped(server: Server, folder: Path) -> None:
    upload(server, folder)
    digest = server.registry.resolve(NAME).digest
    server.run(server.dropper.drop(digest))  # as a message that comes late
    assert server.engine.dropped == []


def test_an_engine_that_is_down_does_not_break_a_delete(server: Server, folder: Path) -> None:
    async def down(digest: str) -> None:
        raise ServeError(503, "engine_failed", "down")

    upload(server, folder)
    server.engine.drop_adapter = down  # type: ignore[method-assign]
    assert server.http().delete(f"/v1/adapters/{NAME}").status_code == 200
    assert server.http().get("/health").status_code == 200


def test_tokens_served_are_in_the_registry_once_the_server_has_stopped(
    tiny_base: Path, tmp_path: Path, folder: Path
) -> None:
    with serving(tiny_base, tmp_path / "store") as server:
        upload(server, folder)
        digest = server.registry.resolve(NAME).digest
        tokens = chat(server).json()["usage"]["completion_tokens"]
    registry = Registry.open(tmp_path / "store")
    assert registry.usage() == {digest: tokens}
    registry.close()


def test_vllm_s_load_and_unload_answer_as_its_controllers_expect(
    server: Server, folder: Path
) -> None:
    reply = load(server, allowed(server, folder))
    assert (reply.status_code, reply.text) == (
        200, f"Success: LoRA adapter '{NAME}' added successfully."
    )  # fmt: skip
    assert reply.headers["content-type"].startswith("text/plain")
    assert chat(server).status_code == 200
    reply = server.http().post("/v1/unload_lora_adapter", json={"lora_name": NAME})
    assert (reply.status_code, reply.text) == (
        200, f"Success: LoRA adapter '{NAME}' removed successfully."
    )  # fmt: skip
    assert chat(server).status_code == 404


def test_loading_twice_is_refused_unless_in_place(
    server: Server, folder: Path, other: Path
) -> None:
    load(server, allowed(server, folder))
    path = allowed(server, other)
    again = load(server, path)
    assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
    assert "already been loaded" in again.json()["error"]["message"]
    assert load(server, path, load_inplace=True).status_code == 200
    assert chat(server).headers["x-adapter-id"] == f"{NAME}@2"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_name": "", "lora_path": "x"}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": ""}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": "no-such-folder"}, 404, "NotFoundError"),
        ({"lora_name": BASE, "lora_path": "good"}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": "bad"}, 400, "InvalidUserInput"),
        ({"lora_name": "x", "lora_path": "empty"}, 404, "NotFoundError"),
    ],
)
def test_vllm_s_load_refuses_with_vllm_s_types(
    server: Server, folder: Path, body: dict[str, str], status: int, kind: str
) -> None:
    root = server.services.config.adapters.allowed_roots[0]
    shutil.copytree(folder, root / "good")
    shutil.copytree(folder, root / "bad")
    config = json.loads((root / "bad" / "adapter_config.json").read_text())
    (root / "bad" / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    (root / "empty").mkdir()
    reply = server.http().post("/v1/load_lora_adapter", json=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind), reply.text


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"lora_name": ""}, 400, "InvalidUserInput"),
        ({"lora_name": "nobody"}, 404, "NotFoundError"),
        ({"lora_name": BASE}, 404, "NotFoundError"),
    ],
)
def test_vllm_s_unload_refuses_with_vllm_s_types(
    server: Server, body: dict[str, str], status: int, kind: str
) -> None:
    reply = server.http().post("/v1/unload_lora_adapter", json=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)


def test_an_adapter_s_own_template_renders_its_chats(server: Server, folder: Path) -> None:
    path = allowed(server, folder)
    sidecar = {"format": 1, "chat_template": "<{{ messages[0]['content'] }}>"}
    (path / "turnout.json").write_text(json.dumps(sidecar))
    assert load(server, path).status_code == 200
    chat(server)
    assert server.codec.decode(server.engine.requests[0].prompt_ids) == "<hello>"


def test_adapters_of_other_dtypes_are_taken(server: Server, make_adapter: MakeAdapter) -> None:
    assert upload(server, make_adapter(dtype=torch.bfloat16)).status_code == 201


def note(folder: Path, **fields: Any) -> Path:
    """Put a turnout.json beside an adapter."""
    (folder / "turnout.json").write_text(json.dumps({"format": 1, **fields}))
    return folder


def test_an_adapter_of_another_base_is_taken_only_by_who_says_so(
    server: Server, folder: Path
) -> None:
    note(folder, training={"base_digest": "c" * 64})
    reply = upload(server, folder)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("adapter_refused", "training.base_digest")
    assert "trained on base cccccccccccc" in error["message"]

    overlooked = upload(server, folder, allow_mismatch="true")
    assert overlooked.status_code == 201
    assert list(overlooked.json()["mismatches"]) == ["training.base_digest"]
    body = {"name": "again", "path": str(allowed(server, folder))}
    assert server.http().post("/v1/adapters", json=body).status_code == 400
    again = server.http().post("/v1/adapters", json={**body, "allow_mismatch": True})
    assert list(again.json()["mismatches"]) == ["training.base_digest"]


def test_an_adapter_that_agrees_or_says_nothing_has_no_mismatches(
    server: Server, folder: Path, other: Path
) -> None:
    assert upload(server, folder).json()["mismatches"] == {}
    first = server.registry.get(NAME).current
    assert first is not None
    note(other, training={"base_digest": first.base_digest, "seed": 1})
    assert upload(server, other).json()["mismatches"] == {}


def test_rope_scaling_lengthens_what_its_adapter_takes_and_nobody_else(
    server: Server, folder: Path, other: Path
) -> None:
    longest = server.engine.info.max_model_len
    server.engine.info = msgspec.structs.replace(
        server.engine.info, trained_len=longest, max_scaled_len=2 * longest - 5
    )
    note(folder, rope={"rope_type": "linear", "factor": 2})
    upload(server, folder)
    upload(server, other, name="plain")
    prompt = [7] * (longest + 10)

    def ask(model: str, max_tokens: int = 4) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        return server.http().post("/v1/completions", json=body)

    assert ask(NAME).status_code == 200
    adapter = server.engine.requests[-1].adapter
    assert adapter is not None
    assert adapter.rope == RopeScaling(rope_type="linear", factor=2.0)
    for refused in (ask("plain"), ask(BASE), ask(NAME, max_tokens=longest)):
        assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert f"the limit is {2 * longest - 5}." in refused.json()["error"]["message"]
    lengths = {
        card["id"]: card["max_model_len"] for card in server.http().get("/v1/models").json()["data"]
    }
    assert lengths == {BASE: longest, "plain": longest, NAME: 2 * longest - 5}
    counted = server.http().post("/tokenize", json={"model": NAME, "prompt": "a"}).json()
    assert counted["max_model_len"] == 2 * longest - 5


def test_a_lost_object_is_said_to_be_lost_and_a_push_brings_it_back(
    tiny_base: Path, tmp_path: Path, folder: Path
) -> None:
    with serving(tiny_base, tmp_path / "store") as server:
        upload(server, folder)
    (lost,) = (tmp_path / "store" / "objects").iterdir()
    lost.unlink()
    with serving(tiny_base, tmp_path / "store") as server:
        reply = chat(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "adapter_load_failed")
        assert f"lost {NAME}@1; push it again" in reply.json()["error"]["message"]
        upload(server, folder)
        assert chat(server).headers["x-adapter-id"] == f"{NAME}@1"
