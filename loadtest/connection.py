"""HTTP/1.1 with as little as possible between the socket and the clock."""

import asyncio
import errno
import ssl
import time
import urllib.parse
from typing import cast

import httptools

from loadtest.reply import Reply

# What says that this machine, not the server, can open no more connections.
_OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)
_MAX_IDLE_S = 1.0  # servers close idle connections after some seconds; ours are younger

clock = time.monotonic  # the same clock in every process of this machine


class Connection(asyncio.Protocol):
    """One connection; it carries one request at a time."""

    def __init__(self) -> None:
        self.idle_since = clock()
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._over: asyncio.Future[None] | None = None
        self._now = 0.0
        self._keeps_alive = False
        self._headers: dict[str, str] = {}
        self._parser = httptools.HttpResponseParser(self)

    @property
    def is_usable(self) -> bool:
        """Whether another request can go over it."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and clock() - self.idle_since < _MAX_IDLE_S
        )

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Send a request and feed `reply` until its end, or the connection's."""
        assert self._transport is not None, "connected"
        assert self._over is None, "one request at a time"
        self._reply, self._keeps_alive = reply, False
        self._over = asyncio.get_running_loop().create_future()
        self._headers = {}
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        try:
            await self._over
        finally:
            self._reply = self._over = None
            self.idle_since = clock()
            if not self._keeps_alive:
                self.close()

    def close(self) -> None:
        """Cut it; what is unread is lost."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._now = clock()
        if self._reply is None:
            self.close()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._keeps_alive = False
            if self._over is not None and not self._over.done():  # what follows a reply is no part
                self._reply.fail("malformed_http")
                self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._reply is not None and self._over is not None and not self._over.done():
            # A body without a length ends with the connection, and may have ended well.
            if not self._reply.is_done:
                self._reply.fail("connection_lost")
            self._finish()

    # httptools calls these

    def on_message_begin(self) -> None:
        if self._over is None or self._over.done():
            raise ValueError("a second reply to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._reply is not None
        self._reply.begin(self._parser.get_status_code(), self._headers)

    def on_body(self, body: bytes) -> None:
        assert self._reply is not None
        self._reply.feed(body, self._now)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # the reply is yet to come
            self._headers = {}
            return
        self._keeps_alive = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


class Pool:
    """Connections to one server, kept alive and used again, newest first."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None, "checked by Target"
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Send a request and feed `reply` to its end. Whatever goes wrong is told to the reply."""
        connection = self._take()
        try:
            if connection is not None:
                await self._over(connection, request, reply)
                if reply.has_begun:
                    return
                reply.forget()  # the server closed an idle connection just then
            await self._over(await self._connect(), request, reply)
        except OSError as error:
            is_ours = error.errno in _OUR_LIMITS
            reply.fail("too_many_connections_here" if is_ours else "no_connection")

    def close(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _over(self, connection: Connection, request: bytes, reply: Reply) -> None:
        await connection.ask(request, reply)
        if connection.is_usable:
            self._idle.append(connection)

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            Connection, self._host, self._port, ssl=self._tls
        )
        return connection
