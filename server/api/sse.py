"""Event streams: bytes out, one write for each output of the engine, and an end to slow readers."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
from starlette.types import Receive, Send

from server.errors import ServeError

DONE = b"data: [DONE]\n\n"
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


encode = msgspec.json.encode


class StalledReader(Exception):
    """The client has taken nothing for too long."""


def error_event(error: ServeError) -> bytes:
    """How a stream that has begun ends when it fails."""
    return b"event: error\ndata: " + encode(error.body()) + b"\n\n" + DONE


async def pump(
    send: Send, headers: list[tuple[bytes, bytes]], events: AsyncIterator[bytes], stall_s: float
) -> None:
    """Send status 200 and then each of `events` as it comes, or nothing where it is empty.

    What the reader has not taken is bounded by the socket's buffers: `send` waits once they are
    full. Raises StalledReader when it waits for longer than `stall_s`.
    """
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        if event:
            await _write(send, event, stall_s, more=True)
    await _write(send, b"", stall_s, more=False)


async def _write(send: Send, body: bytes, stall_s: float, *, more: bool) -> None:
    try:
        async with asyncio.timeout(stall_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise StalledReader from None


async def drop(receive: Receive, send: Send) -> None:
    """Cut the connection, unsent bytes and all. Closing it would wait for the reader to take them.

    ASGI has no word for this, so it reaches for uvicorn's transport; under another server the
    connection is closed when the application returns.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
        while (await receive())["type"] != "http.disconnect":
            pass
