"""HTTP/1.1 as servers really speak it, on sockets that close when they like."""

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from loadtest import connection
from loadtest.connection import Connection, Pool
from loadtest.reply import Reply
from tests.loadtest.scripted import Scripted
from tests.loadtest.stub import chunk, event

REQUEST = b"POST / HTTP/1.1\r\nhost: h\r\n\r\n"
CONTENT = event(chunk("a", finish_reason="length")) + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nX-Serving-Path: base\r\n\r\n" % len(CONTENT)
WITH_LENGTH = HEAD + CONTENT
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT
CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (CONTENT[:9], CONTENT[9:]))
    + b"0\r\n\r\n"
)
CLOSING = HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + CONTENT


class Script:
    """Starts scripted servers, and ends them all."""

    def __init__(self) -> None:
        self.started: list[Scripted] = []

    def __call__(self, *answers: bytes | list[bytes] | None) -> Scripted:
        self.started.append(Scripted(*answers))
        return self.started[-1]


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    yield made
    for server in made.started:
        server.close()


@contextlib.asynccontextmanager
async def pool_of(server: Scripted) -> AsyncIterator[Pool]:
    pool = Pool(server.url)
    try:
        async with asyncio.timeout(20):
            yield pool
    finally:
        pool.close()


async def asked(server: Scripted, times: int = 1) -> list[Reply]:
    """Ask one request after the other."""
    replies = []
    async with pool_of(server) as pool:
        for _ in range(times):
            reply = Reply(keep_text=True)
            await pool.ask(REQUEST, reply)
            replies.append(reply)
    return replies


def outcome(reply: Reply) -> tuple[str, str]:
    return reply.outcome(expected_tokens=None)


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED, UNTIL_CLOSED, CLOSING])
async def test_a_body_is_read_however_its_end_is_said(script: Script, answer: bytes) -> None:
    (reply,) = await asked(script(answer))
    assert outcome(reply) == ("ok", "")
    assert reply.pieces == ["a"]
    assert reply.status == 200


@pytest.mark.parametrize("answer", [WITH_LENGTH, CHUNKED])
async def test_a_reply_may_come_a_byte_at_a_time(script: Script, answer: bytes) -> None:
    (reply,) = await asked(script([answer[i : i + 1] for i in range(len(answer))]))
    assert outcome(reply) == ("ok", "")
    assert reply.pieces == ["a"]


async def test_header_names_are_read_in_any_case(script: Script) -> None:
    (reply,) = await asked(script(WITH_LENGTH))
    assert reply.headers["x-serving-path"] == "base"


async def test_a_connection_is_used_again(script: Script) -> None:
    server = script(WITH_LENGTH, CHUNKED, WITH_LENGTH)
    replies = await asked(server, times=3)
    assert [outcome(reply)[0] for reply in replies] == ["ok"] * 3
    assert server.num_connections == 1


async def test_a_connection_that_the_server_wants_closed_is_not(script: Script) -> None:
    server = script(CLOSING, CLOSING)
    replies = await asked(server, times=2)
    assert [outcome(reply)[0] for reply in replies] == ["ok"] * 2
    assert server.num_connections == 2


async def test_an_idle_connection_is_given_up_before_a_server_would(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_MAX_IDLE_S", 0.05)
    server = script(WITH_LENGTH, WITH_LENGTH)
    async with pool_of(server) as pool:
        await pool.ask(REQUEST, Reply())
        await asyncio.sleep(0.1)
        reply = Reply()
        await pool.ask(REQUEST, reply)
    assert outcome(reply) == ("ok", "")
    assert server.num_connections == 2


async def test_a_request_on_a_connection_that_was_just_closed_is_sent_once_more(
    script: Script,
) -> None:
    server = script(WITH_LENGTH, None, WITH_LENGTH)
    replies = await asked(server, times=2)
    assert [outcome(reply)[0] for reply in replies] == ["ok", "ok"]
    assert (server.num_connections, len(server.requests)) == (2, 3)


async def test_a_new_connection_that_is_closed_is_not_tried_again(script: Script) -> None:
    server = script(None)
    (reply,) = await asked(server)
    assert outcome(reply) == ("failed", "connection_lost")
    assert len(server.requests) == 1


async def test_a_reply_that_has_begun_is_never_asked_for_again(script: Script) -> None:
    """Half a reply counts as cut: the server may have generated all of it."""
    server = script(WITH_LENGTH, HEAD + CONTENT[:12])
    _, half = await asked(server, times=2)
    assert outcome(half) == ("cut", "connection_lost")
    assert len(server.requests) == 2


async def test_a_request_given_up_closes_its_connection(script: Script) -> None:
    server = script(HEAD + CONTENT[:12], WITH_LENGTH)
    async with pool_of(server) as pool:
        reply = Reply()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pool.ask(REQUEST, reply)
        assert reply.has_begun
        await pool.ask(REQUEST, Reply())
    assert server.num_connections == 2


async def test_what_is_no_http_is_not_waited_for(script: Script) -> None:
    (reply,) = await asked(script(b"SMTP at your service\r\n\r\n"))
    assert outcome(reply) == ("failed", "malformed_http")


async def test_a_switch_to_another_protocol_is_no_reply(script: Script) -> None:
    switch = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    (reply,) = await asked(script(switch + b"zzz"))
    assert outcome(reply) == ("failed", "http_101")


async def test_what_comes_before_a_reply_is_not_taken_for_it(script: Script) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    (reply,) = await asked(script([hints, WITH_LENGTH]))
    assert outcome(reply)[0] == "ok"
    assert "link" not in reply.headers


async def test_a_second_reply_to_one_request_is_not_added_to_the_first(script: Script) -> None:
    server = script(WITH_LENGTH + WITH_LENGTH, WITH_LENGTH)
    replies = await asked(server, times=2)
    assert [(outcome(reply)[0], len(reply.text_times)) for reply in replies] == [("ok", 1)] * 2
    assert server.num_connections == 2  # the first one said more than it was asked


async def test_a_body_cut_short_of_its_length_is_cut(script: Script) -> None:
    server = script(HEAD + CONTENT[:-8])
    (reply,) = await asked(server)
    assert outcome(reply) == ("cut", "connection_lost")


async def test_a_closed_port_fails_at_once() -> None:
    reply = Reply()
    await Pool("http://127.0.0.1:9").ask(REQUEST, reply)
    assert outcome(reply) == ("failed", "no_connection")


async def test_connections_that_this_machine_cannot_open_are_not_blamed_on_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def none_left(_: Pool) -> Connection:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Pool, "_connect", none_left)
    reply = Reply()
    await Pool("http://127.0.0.1:9").ask(REQUEST, reply)
    assert outcome(reply) == ("failed", "too_many_connections_here")


async def test_bytes_that_nobody_asked_for_close_the_connection(script: Script) -> None:
    server = script([WITH_LENGTH, b"HTTP/1.1 200 OK\r\n\r\nmore"], WITH_LENGTH)
    async with pool_of(server) as pool:
        first = Reply()
        await pool.ask(REQUEST, first)
        await asyncio.sleep(0.1)
        second = Reply()
        await pool.ask(REQUEST, second)
    assert outcome(first)[0] == "ok"
    assert outcome(second)[0] in ("ok", "failed")
    assert len(server.requests) == 2


async def test_requests_at_the_same_time_have_connections_of_their_own(script: Script) -> None:
    """The scripted server takes one connection at a time: the second waits, and is not mixed up."""
    server = script(CLOSING, CLOSING)
    async with pool_of(server) as pool:
        replies = [Reply(), Reply()]
        await asyncio.gather(*(pool.ask(REQUEST, reply) for reply in replies))
    assert [outcome(reply)[0] for reply in replies] == ["ok", "ok"]
    assert server.num_connections == 2


async def test_one_connection_refuses_two_requests_at_once(script: Script) -> None:
    server = script([HEAD])
    loop = asyncio.get_running_loop()
    port = int(server.url.rpartition(":")[2])
    _, opened = await loop.create_connection(Connection, "127.0.0.1", port)
    first = asyncio.ensure_future(opened.ask(REQUEST, Reply()))
    await asyncio.sleep(0)
    with pytest.raises(AssertionError, match="one request at a time"):
        await opened.ask(REQUEST, Reply())
    opened.close()
    await first


def test_https_is_spoken_where_the_url_says_so() -> None:
    assert Pool("https://host")._port == 443
    assert Pool("https://host")._tls is not None
    assert Pool("http://host")._port == 80
    assert Pool("http://host:81/v1")._tls is None


def test_the_clock_is_the_machines_own() -> None:
    """Processes agree on when to begin by it."""
    assert abs(connection.clock() - time.clock_gettime(time.CLOCK_MONOTONIC)) < 1.0
