"""Alive, ready, version, and the three kinds of scrape."""

import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api import health
from server.api.exposition import CONTENT_TYPE, render
from server.metrics import Metrics
from tests.conftest import MakeAdapter
from tests.server.api.harness import BASE, Script, Server, wait_until

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
SCRAPES = {
    "plain": "text/plain",
    "openmetrics": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "escaping": (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4"
    ),
}


def samples(server: Server, accept: str = "text/plain") -> dict[str, float]:
    """name{labels} -> value"""
    reply = server.http().get("/metrics", headers={"accept": accept})
    assert reply.headers["content-type"] == CONTENT_TYPE
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(reply.text)
        for s in family.samples
    }


def test_alive_ready_and_version(server: Server) -> None:
    http = server.http()
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert http.get("/version").json() == {"version": project["version"]}


@pytest.mark.parametrize("accept", SCRAPES.values(), ids=SCRAPES)
def test_every_kind_of_scrape_sees_vllm_s_names_verbatim(server: Server, accept: str) -> None:
    server.http().post("/v1/chat/completions", json=CHAT)
    labels = [("engine", "0"), ("model_name", BASE)]
    seen = samples(server, accept)
    assert seen[f"vllm:num_requests_running{labels}"] == 0
    assert seen[f"vllm:time_to_first_token_seconds_count{labels}"] == 1
    assert not any(name.startswith("vllm_") for name in seen)


def test_a_scrape_is_made_in_another_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_in: list[int] = []

    def spy(metrics: Metrics) -> bytes:
        made_in.append(threading.get_ident())
        return render(metrics)

    monkeypatch.setattr(health, "render", spy)
    samples(server)

    async def ident() -> int:
        return threading.get_ident()

    assert made_in != [server.run(ident())]


def test_tokens_finished_and_refused_requests_show_in_a_scrape(
    server: Server, make_adapter: MakeAdapter
) -> None:
    server.registry.push("bot", make_adapter())
    http = server.http()
    server.say("the quick brown fox")
    reply = http.post("/v1/chat/completions", json=CHAT | {"model": "bot"}).json()
    http.post("/v1/chat/completions", json=CHAT | {"model": "nobody"})
    seen = samples(server)
    tokens = reply["usage"]["completion_tokens"]
    vllm = [("engine", "0"), ("model_name", BASE)]
    assert seen["turnout_adapter_generation_tokens_total[('adapter', 'bot')]"] == tokens
    assert seen[f"vllm:generation_tokens_total{vllm}"] == tokens
    stop = sorted([*vllm, ("finished_reason", "stop")])
    assert seen[f"vllm:request_success_total{stop}"] == 1
    assert seen["turnout_errors_total[('code', 'model_not_found')]"] == 1
    assert not any("nobody" in name for name in seen)


def test_the_adapter_label_is_the_registry_s_name_whatever_the_client_wrote(
    server: Server, make_adapter: MakeAdapter
) -> None:
    server.registry.push("bot", make_adapter())
    server.http().post("/v1/chat/completions", json=CHAT | {"model": "bot@1"})
    assert set(server.metrics.adapters) == {"bot"}


def test_a_deleted_adapter_leaves_the_scrape(server: Server, make_adapter: MakeAdapter) -> None:
    server.registry.push("bot", make_adapter())
    server.http().post("/v1/chat/completions", json=CHAT | {"model": "bot"})
    assert any("bot" in name for name in samples(server))
    server.http().delete("/v1/adapters/bot")
    assert not any("bot" in name for name in samples(server))


def test_a_request_that_was_being_tokenized_meanwhile_does_not_bring_it_back(
    server: Server, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.registry.push("bot", make_adapter())
    encode_chat = server.services.codec.encode_chat

    def encode(*args: Any, **options: Any) -> list[int]:
        threading.Thread(target=lambda: server.registry.delete("bot")).start()
        wait_until(lambda: server.registry.list() == [])
        server.metrics.forget_adapter("bot")
        return encode_chat(*args, **options)

    monkeypatch.setattr(server.services.codec, "encode_chat", encode)
    reply = server.http().post("/v1/chat/completions", json=CHAT | {"model": "bot"})
    assert reply.headers["x-adapter-id"] == "bot@1"
    assert not any("bot" in name for name in samples(server))


def test_a_failure_counts_against_the_adapter(server: Server, make_adapter: MakeAdapter) -> None:
    server.registry.push("bot", make_adapter())
    server.engine.scripts.append(Script([5, 6], fail_after=1))
    server.http().post("/v1/chat/completions", json=CHAT | {"model": "bot", "stream": True})
    name = "turnout_adapter_errors_total[('adapter', 'bot'), ('code', 'engine_failed')]"
    assert samples(server)[name] == 1


def test_a_client_that_goes_away_counts_as_an_abort(server: Server) -> None:
    server.engine.scripts.append(Script([5], None))
    stream = server.client().chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hello"}], stream=True
    )
    next(stream)
    stream.close()
    wait_until(lambda: server.metrics.finished["abort"] == 1)
