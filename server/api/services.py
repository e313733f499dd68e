"""What every route works with, and the life of a request around its work."""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from adapters.registry import Registry
from server.api.admission import Admission
from server.api.auth import Authenticator
from server.api.parsing import Body, parse_body
from server.api.ports import Engine
from server.api.promoter import Promoter
from server.api.tokenizer import TextCodec
from server.api.weight_sets import MergedPath
from server.config import Config
from server.errors import ServeError
from server.metrics import Metrics

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_POLL_S = 0.02  # how often a drain looks whether it is over
_CUT_OFF_S = 2.0  # for stragglers to be told


class ClientGone(Exception):
    """Nobody is left to answer."""


@dataclass(slots=True, kw_only=True)
class Services:
    """The parts of the server, and whether it is taking on work."""

    config: Config
    engine: Engine
    registry: Registry
    codec: TextCodec
    metrics: Metrics
    admission: Admission
    authenticator: Authenticator
    promoter: Promoter
    merged: MergedPath
    started: int = field(default_factory=lambda: int(time.time()))  # unix seconds
    is_draining: bool = False
    drain_began: float | None = None  # monotonic seconds
    is_cut_off: bool = False  # the drain's grace is over
    usage: Counter[str] = field(default_factory=Counter)  # tokens per digest, not yet registered
    _running: set[asyncio.Future[Any]] = field(default_factory=set)

    @property
    def drain_s(self) -> float:
        """Seconds since the drain began; 0 before."""
        return 0.0 if self.drain_began is None else time.monotonic() - self.drain_began

    def check_open(self) -> None:
        """Raise ServeError 503 while starting, draining, or without an engine."""
        if self.is_draining:
            raise draining()
        if not self.engine.is_ready:
            raise ServeError(503, "engine_not_ready", "The engine is starting.", retry_after_s=1.0)

    async def guarded(self, receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run `work` until it ends, the client goes (ClientGone), or a drain cuts it off (503).

        Whichever comes, the work has ended when this returns.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        self._running.add(task)
        try:
            if self.is_cut_off:
                task.cancel()
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled() and self.is_cut_off:
                raise draining()
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            self._running.discard(task)
            gone.cancel()
            await _end(task)

    async def register_usage(self) -> None:
        """Write the tokens counted since the last time to the registry; keep them if it cannot."""
        tokens, self.usage = self.usage, Counter()
        if tokens:
            try:
                await asyncio.to_thread(self.registry.add_usage, tokens)
            except (OSError, sqlite3.Error) as error:  # a full disk
                log.error("tokens are not registered: %s", error)
                self.usage.update(tokens)

    async def drain(self) -> None:
        """Stop taking on work, let what runs finish within the grace period, then cut it off."""
        self.is_draining = True
        self.drain_began = time.monotonic()
        grace_s = self.config.server.drain_s
        log.info("drain begun", extra={"num_requests": self.admission.num_admitted})
        if not await self._wait_until_idle(grace_s):
            self.is_cut_off = True
            for task in list(self._running):
                task.cancel()
            await self._wait_until_idle(_CUT_OFF_S)
        log.info("drain ended", extra={"num_requests": self.admission.num_admitted})

    async def _wait_until_idle(self, limit_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.admission.num_admitted:
                    await asyncio.sleep(_POLL_S)
        return self.admission.num_admitted == 0


def services_of(request: Request) -> Services:
    """The application's parts."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def read_json(request: Request, kind: type[Body]) -> Body:
    """Read the body into `kind`. Raises ServeError 400, or 413 without reading it all."""
    limit = services_of(request).config.server.max_body_bytes
    return parse_body(kind, await read_bytes(request, limit))


async def read_bytes(request: Request, limit: int) -> bytes:
    """Read a body of up to `limit` bytes. Raises ServeError 413 at the first byte past it."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    data = bytearray()
    async for chunk in body_chunks(request):
        data += chunk
        if len(data) > limit:
            raise _too_large(limit)
    return bytes(data)


async def body_chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ClientGone, or ServeError 408 if nothing comes for `stall_s`."""
    chunks, stall_s = request.stream(), services_of(request).config.server.stall_s
    while True:
        try:
            async with asyncio.timeout(stall_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except ClientDisconnect:
            raise ClientGone from None
        except TimeoutError:
            message = f"Nothing of the body has come for {stall_s:g} s."
            raise ServeError(408, "body_stalled", message) from None
        yield chunk


def _too_large(limit: int) -> ServeError:
    return ServeError(413, "body_too_large", f"The body is over the limit of {limit} bytes.")


def draining() -> ServeError:
    """What is said to whom a drain refuses or cuts off."""
    return ServeError(503, "server_draining", "The server is shutting down.", retry_after_s=5.0)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel the task if it still runs, and wait until it has cleaned up."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen here, should nobody else look
