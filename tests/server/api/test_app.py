"""What holds for every route: errors, request ids, disconnects, stalled readers, drain."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from server.errors import ServeError
from tests.server.api.harness import BASE, Script, Server, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def test_an_unknown_model_is_not_found_and_the_base_does_not_answer(server: Server) -> None:
    client = server.client()
    creates: list[Callable[[], Any]] = [
        lambda: client.chat.completions.create(model="no-such", messages=CHAT["messages"]),
        lambda: client.completions.create(model="no-such@1", prompt="x"),
        lambda: client.models.retrieve("no-such"),
    ]
    for create in creates:
        with pytest.raises(openai.NotFoundError) as caught:
            create()
        error = caught.value
        assert (error.param, error.code, error.type) == (
            "model",
            "model_not_found",
            "NotFoundError",
        )
    assert server.engine.requests == []
    assert server.services.admission.num_admitted == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("DELETE", "/v1/adapters/", 404),  # and no redirect
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/adapters/x/train", 404),
        ("DELETE", "/v1/adapters/x/promotion", 404),
    ],
)
def test_routes_and_methods_that_are_not_there_answer_in_openai_s_shape(
    server: Server, method: str, path: str, status: int
) -> None:
    reply = server.http().request(method, path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert "x-request-id" in reply.headers


def test_a_mistake_of_ours_is_a_500_that_tells_nothing_and_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(model: str) -> None:
        raise RuntimeError("secret detail")

    server.registry.lease = broken  # type: ignore[method-assign, assignment]
    reply = server.http().post("/v1/chat/completions", json=CHAT | {"model": "x"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert "secret detail" in caplog.text
    assert server.services.admission.num_admitted == 0


def test_a_sane_request_id_is_sent_back_and_another_is_replaced(server: Server) -> None:
    http = server.http()
    given = http.get("/health", headers={"x-request-id": "abc-1.2:3_4"})
    assert given.headers["x-request-id"] == "abc-1.2:3_4"
    for insane in ("", "a b", "x" * 129, 'a"b'):
        reply = http.get("/health", headers={"x-request-id": insane})
        assert reply.headers["x-request-id"] not in ("", insane)


def test_two_requests_with_one_id_are_two_to_the_engine(server: Server) -> None:
    for _ in range(2):
        server.http().post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "same"})
    assert len({request.request_id for request in server.engine.requests}) == 2


def test_an_engine_that_is_down_refuses_with_503_and_a_time_to_come_back(server: Server) -> None:
    def down(request: object) -> None:
        raise ServeError(503, "engine_failed", "The engine is down.", retry_after_s=1.0)

    server.engine.submit = down  # type: ignore[method-assign, assignment]
    reply = server.http().post("/v1/chat/completions", json=CHAT)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert server.services.admission.num_admitted == 0


def test_before_the_engine_is_ready_the_server_is_alive_and_not_ready(server: Server) -> None:
    server.engine.is_ready = False
    http = server.http()
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 503
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 503
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] is None
    server.engine.is_ready = True
    assert http.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_a_status(server: Server, stream: bool) -> None:
    server.engine.scripts.append(Script([5, 6], fail_after=0))
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**CHAT, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event_and_then_done(
    server: Server,
) -> None:
    server.engine.scripts.append(Script(server.ids("hello over there"), fail_after=2))
    reply = server.http().post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert reply.status_code == 200
    *_, error, done, nothing = reply.text.split("\n\n")
    name, data = error.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "engine_failed"
    assert (done, nothing) == ("data: [DONE]", "")


def test_the_official_client_raises_what_a_broken_stream_says(server: Server) -> None:
    server.engine.scripts.append(Script(server.ids("hello over there"), fail_after=2))
    stream = server.client().chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match=r"The engine died\."):
        list(stream)


def test_a_mistake_of_ours_in_the_middle_of_a_stream_ends_it_in_order(server: Server) -> None:
    server.engine.scripts.append(Script([5, 10_000_000], delay_s=0.01))
    server.codec.visible_piece = lambda token_id: {5: b"a"}[token_id]  # type: ignore[method-assign]
    reply = server.http().post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert "event: error" in reply.text
    assert "internal_error" in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")


def test_one_choice_that_fails_ends_the_others(server: Server) -> None:
    server.engine.scripts += [Script([5], None), Script([5, 6], fail_after=1)]
    with pytest.raises(openai.APIStatusError):
        server.client().chat.completions.create(**CHAT, n=2)
    assert server.engine.aborted == [server.engine.requests[0].request_id]
    assert server.services.admission.num_admitted == 0


def test_an_engine_that_gives_up_a_request_is_an_error_and_no_finish_reason(
    server: Server,
) -> None:
    server.engine.scripts.append(Script([5], "abort"))
    with pytest.raises(openai.APIStatusError, match="gave up"):
        server.client().chat.completions.create(**CHAT)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_queued", [False, True])
def test_a_client_that_goes_away_aborts_at_once(
    server: Server, stream: bool, is_queued: bool, n: int
) -> None:
    """Streaming or not, generating or still waiting for the first token."""
    if is_queued:
        server.loop.call_soon_threadsafe(server.engine.gate.clear)
    server.engine.scripts += [Script([5] * 10, None, delay_s=0.01) for _ in range(n)]
    body = json.dumps(CHAT | {"stream": stream, "n": n}).encode()
    connection = _post(server, body)
    wait_until(lambda: len(server.engine.requests) == n)
    if stream and not is_queued:
        assert b"200 OK" in connection.recv(4096)
    assert server.engine.aborted == []
    connection.close()
    wait_until(lambda: len(server.engine.aborted) == n, 2.0)
    wait_until(lambda: server.services.admission.num_admitted == 0, 2.0)


def test_closing_the_official_client_s_stream_aborts(server: Server) -> None:
    server.engine.scripts.append(Script([5] * 1000, delay_s=0.01))
    stream = server.client().chat.completions.create(**CHAT, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: server.engine.aborted == [server.engine.requests[0].request_id], 2.0)


def test_a_reader_that_stops_reading_is_dropped_and_what_waits_for_it_is_bounded(
    tiny_base: Path, tmp_path: Path
) -> None:
    with serving(tiny_base, tmp_path / "store", stall_s=0.3) as server:
        server.engine.scripts += [Script([5] * 2000, None) for _ in range(4)]
        more_than_sockets_hold = {"n": 4, "logprobs": True, "top_logprobs": 20}
        body = json.dumps(CHAT | {"stream": True} | more_than_sockets_hold).encode()
        connection = _post(server, body, receive_buffer=4096)
        wait_until(lambda: server.engine.aborted != [], 10.0)
        wait_until(lambda: server.services.admission.num_admitted == 0, 2.0)
        wait_until(lambda: not server.connections, 2.0)  # though nothing was read
        received = _read_to_end(connection)
        assert b"[DONE]" not in received
        assert not server.services._running


def test_a_slow_reader_that_keeps_reading_is_not_dropped(tiny_base: Path, tmp_path: Path) -> None:
    with serving(tiny_base, tmp_path / "store", stall_s=0.5) as server:
        server.engine.scripts.append(Script([5] * 2000, "length"))
        connection = _post(server, json.dumps(CHAT | {"stream": True}).encode(), 4096)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(65536)
            assert part, "the server hung up"
            received += part
            time.sleep(0.01)
        assert b"data: [DONE]" in received
        connection.close()


def test_a_drain_lets_running_streams_finish_and_refuses_new_work(server: Server) -> None:
    server.engine.scripts.append(Script([5] * 30, "length", delay_s=0.02))
    stream = server.client().chat.completions.create(**CHAT, stream=True)
    next(stream)
    draining = asyncio.run_coroutine_threadsafe(server.services.drain(), server.loop)
    http = server.http()
    wait_until(lambda: http.get("/ready").status_code == 503)
    assert http.get("/health").status_code == 200
    refused = http.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
    assert "retry-after" in refused.headers
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    draining.result(5)
    assert server.engine.aborted == []


def test_stragglers_are_told_when_the_grace_period_is_over(tiny_base: Path, tmp_path: Path) -> None:
    with serving(tiny_base, tmp_path / "store", drain_s=0.2) as server:
        server.engine.scripts += [Script([5, 6], None, delay_s=0.01), Script([], None)]
        replies: list[httpx.Response] = []

        def post(stream: bool) -> None:
            replies.append(
                httpx.post(
                    f"{server.url}/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=20
                )
            )

        threads = [threading.Thread(target=post, args=(stream,)) for stream in (True, False)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until(lambda number=number: len(server.engine.requests) == number)
        time.sleep(0.1)  # until the stream has begun
        server.run(server.services.drain())
        for thread in threads:
            thread.join(5)
        by_status = {reply.status_code: reply for reply in replies}
        assert by_status[200].text.endswith("\n\ndata: [DONE]\n\n")
        assert "event: error" in by_status[200].text
        assert "server_draining" in by_status[200].text
        assert by_status[503].json()["error"]["code"] == "server_draining"
        assert len(server.engine.aborted) == 2
        assert server.services.admission.num_admitted == 0


def test_a_reply_says_which_path_served_it(server: Server) -> None:
    headers = server.http().post("/v1/chat/completions", json=CHAT).headers
    assert headers["x-serving-path"] == "base"
    assert "x-adapter-id" not in headers
    assert "x-adapter-tier" not in headers


def _post(server: Server, body: bytes, receive_buffer: int | None = None) -> socket.socket:
    """Send a chat on a bare socket, so that the test decides when to read and when to go."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def _read_to_end(connection: socket.socket) -> bytes:
    received = b""
    connection.settimeout(5)
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return received
