"""Heads without end: in bytes, and in time."""

import select
import socket

import pytest

from server.api.protocol import MAX_HEAD_BYTES, BoundedHead
from tests.server.api.harness import Server

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_until_closed(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(1 << 16):
        received += data
    return received


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /",
        GET + b"x-a: ",
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx-trailer: ",
        POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n1;extension=",
    ],
    ids=["url", "header", "trailer", "extension"],
)
def test_a_head_without_end_is_refused_while_it_comes(server: Server, begun: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(begun)
        for _ in range(100):
            connection.sendall(b"a" * (MAX_HEAD_BYTES // 8))
            if select.select([connection], [], [], 0.02)[0]:
                break
        reply = read_until_closed(connection)
    assert f"over the limit of {MAX_HEAD_BYTES} bytes".encode() in reply
    assert b" 400 " in reply.splitlines()[0]


def test_a_head_of_many_headers_and_a_large_body_are_taken(server: Server) -> None:
    headers = {f"x-{number}": "v" * 50 for number in range(500)}
    content = b"{" + b" " * (4 * MAX_HEAD_BYTES)
    for body in (content, (content[at : at + 1000] for at in range(0, len(content), 1000))):
        reply = server.http().post("/v1/completions", headers=headers, content=body)
        assert reply.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    "begun", [b"", b"\r\n", b"GET /hea", GET + b"\r\n", GET + b"content-length: 9\r\n\r\n1"]
)
def test_a_connection_whose_head_never_completes_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(BoundedHead, "head_s", 0.1)
    with connect(server) as connection:
        connection.sendall(begun)
        if begun.startswith(GET):
            reply = b""
            while not reply.endswith(b'{"status":"ok"}'):
                reply += connection.recv(4096)
            connection.sendall(b"2" if begun.endswith(b"1") else b"GET")
        assert read_until_closed(connection) == b""


def test_a_request_that_runs_for_longer_is_none_of_its_business(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedHead, "head_s", 0.1)
    server.say("the quick brown fox", delay_s=0.1)
    reply = server.client().completions.create(model="tiny", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in reply) == "the quick brown fox"
