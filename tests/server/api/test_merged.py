"""Which path answers: an adapter's merged model while the engine has it, else the adapter."""

from pathlib import Path
from typing import Any

import pytest

from server.api.merged import MergedRoutes
from server.errors import ServeError, WeightSetRefused
from tests.conftest import MakeAdapter
from tests.server.api.harness import BASE, FakeEngine, Server, wait_until

FOLDER = Path("artifact")


@pytest.fixture
def digest(server: Server, make_adapter: MakeAdapter) -> str:
    """The digest of the adapter `bot`."""
    return server.registry.push("bot", make_adapter(r=2)).digest


def ask(server: Server, model: str = "bot", path: str | None = None, **fields: Any) -> Any:
    headers = {} if path is None else {"x-serving-path": path}
    body = {"model": model, "prompt": "hello there", "max_tokens": 4, **fields}
    return server.http().post("/v1/completions", json=body, headers=headers)


def merge(server: Server, digest: str, artifact: str = "artifact") -> None:
    server.run(server.services.merged.load(digest, artifact, FOLDER))


def test_a_loaded_merged_model_answers_under_the_adapters_name(server: Server, digest: str) -> None:
    before = ask(server)
    merge(server, digest)
    after = ask(server)
    assert [reply.headers["x-serving-path"] for reply in (before, after)] == ["adapter", "merged"]
    for reply in (before, after):
        assert reply.headers["x-adapter-id"] == "bot@1"
        assert reply.headers["x-adapter-digest"] == digest
        assert reply.json()["model"] == "bot"
    assert before.json()["system_fingerprint"] != after.json()["system_fingerprint"]
    by_adapter, by_merged = server.engine.requests
    assert by_adapter.adapter is not None
    assert (by_adapter.adapter.digest, by_adapter.weight_set) == (digest, "")
    assert (by_merged.adapter, by_merged.weight_set) == (None, "artifact")
    assert server.engine.weight_sets == {"artifact": FOLDER}


def test_tokens_by_path_are_counted_under_the_adapters_name(server: Server, digest: str) -> None:
    merge(server, digest)
    assert ask(server).status_code == 200
    text = server.http().get("/metrics").text
    lines = [line for line in text.splitlines() if 'adapter="bot"' in line and "merged" in line]
    assert lines
    assert all(not line.endswith(" 0.0") for line in lines)


def test_a_stream_says_its_path_too(server: Server, digest: str) -> None:
    merge(server, digest)
    assert ask(server, stream=True).headers["x-serving-path"] == "merged"


def test_the_base_and_other_adapters_are_not_touched(
    server: Server, digest: str, make_adapter: MakeAdapter
) -> None:
    server.registry.push("other", make_adapter(r=4, seed=1))
    merge(server, digest)
    assert ask(server, BASE).headers["x-serving-path"] == "base"
    assert ask(server, "other").headers["x-serving-path"] == "adapter"


def test_a_newer_revision_goes_by_the_adapter_path_and_the_old_one_stays_merged(
    server: Server, digest: str, make_adapter: MakeAdapter
) -> None:
    merge(server, digest)
    server.registry.push("bot", make_adapter(r=4, seed=1))
    assert ask(server).headers["x-serving-path"] == "adapter"
    assert ask(server, "bot@1").headers["x-serving-path"] == "merged"


@pytest.mark.parametrize("path", ["adapter", "merged"])
def test_a_client_may_insist_on_a_path(server: Server, digest: str, path: str) -> None:
    merge(server, digest)
    reply = ask(server, path=path)
    assert (reply.status_code, reply.headers["x-serving-path"]) == (200, path)


@pytest.mark.parametrize(
    ("model", "path", "says"),
    [
        ("bot", "merged", "bot is served by the adapter path now, not by merged."),
        ("bot", "base", "bot is served by the adapter path now, not by base."),
        (BASE, "merged", f"{BASE} is served by the base path now, not by merged."),
        (BASE, "adapter", f"{BASE} is served by the base path now, not by adapter."),
    ],
)
def test_a_path_that_does_not_serve_the_model_is_no_answer_by_another(
    server: Server, digest: str, model: str, path: str, says: str
) -> None:
    reply = ask(server, model, path)
    assert reply.status_code == 409
    error = reply.json()["error"]
    assert (error["code"], error["message"]) == ("path_not_available", says)
    assert server.engine.requests == []
    server.registry.delete("bot")
    wait_until(lambda: server.engine.dropped == [digest])  # no lease was left behind


@pytest.mark.parametrize("path", [None, "merged"])
def test_a_model_that_leaves_while_a_prompt_is_made_takes_no_request_along(
    server: Server, digest: str, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    merge(server, digest)

    async def run(num_chars: int, encode: Any, text: str) -> Any:
        await server.services.merged.unload(digest)
        return encode(text)

    monkeypatch.setattr(server.services.codec, "run", run)
    reply = ask(server, path=path)
    if path is None:
        assert (reply.status_code, reply.headers["x-serving-path"]) == (200, "adapter")
        [request] = server.engine.requests
        assert (request.weight_set, request.adapter is None) == ("", False)
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "path_not_available")
        assert server.engine.requests == []
    wait_until(lambda: server.registry.num_leases(digest) == 0)


def test_a_path_that_there_is_not_is_named(server: Server, digest: str) -> None:
    reply = ask(server, path="fast")
    assert reply.status_code == 400
    assert "x-serving-path is 'fast'; it may be base, adapter, merged" in reply.text


async def test_an_engine_that_was_started_again_has_no_merged_models() -> None:
    engine = FakeEngine(8)
    routes = MergedRoutes(engine)
    await routes.load("adapter", "artifact", FOLDER)
    assert routes.route("adapter") == "artifact"
    engine.num_restarts += 1
    assert routes.route("adapter") is None
    await routes.load("adapter", "artifact", FOLDER)
    assert routes.route("adapter") == "artifact"


async def test_an_engine_that_died_while_loading_is_not_routed_to() -> None:
    engine = FakeEngine(8)
    load = engine.load_weight_set

    async def die(digest: str, folder: Path) -> Any:
        engine.num_restarts += 1
        return await load(digest, folder)

    engine.load_weight_set = die  # type: ignore[method-assign]
    routes = MergedRoutes(engine)
    await routes.load("adapter", "artifact", FOLDER)
    assert routes.route("adapter") is None


async def test_what_the_engine_refuses_is_said_and_not_routed() -> None:
    engine = FakeEngine(8)
    engine.load_failure = "it takes 4.10 GB"
    routes = MergedRoutes(engine)
    with pytest.raises(WeightSetRefused, match=r"it takes 4\.10 GB"):
        await routes.load("adapter", "artifact", FOLDER)
    assert routes.route("adapter") is None


async def test_unloading_frees_a_model_when_its_last_route_goes() -> None:
    engine = FakeEngine(8)
    routes = MergedRoutes(engine)
    for adapter in ("one", "two"):
        await routes.load(adapter, "artifact", FOLDER)
    await routes.unload("one")
    assert (routes.route("one"), routes.route("two")) == (None, "artifact")
    assert "artifact" in engine.weight_sets
    await routes.unload("two")
    assert engine.weight_sets == {}
    await routes.unload("two")


async def test_a_route_ends_before_the_memory_is_freed() -> None:
    """Else a request could still be sent to a weight set that is gone."""
    engine = FakeEngine(8)
    routes = MergedRoutes(engine)
    await routes.load("adapter", "artifact", FOLDER)
    seen: list[str | None] = []

    async def drop(digest: str) -> None:
        seen.append(routes.route("adapter"))
        raise ServeError(503, "engine_failed", "The engine died.")

    engine.drop_weight_set = drop  # type: ignore[method-assign]
    with pytest.raises(ServeError):
        await routes.unload("adapter")
    assert seen == [None]
    assert routes.route("adapter") is None
