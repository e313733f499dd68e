"""Around every route: a request id for each reply, and the one error handler."""

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.manifest import AdapterError
from server.api import sse
from server.api.adapters import as_serve_error
from server.api.services import ClientGone, Services, draining
from server.api.sse import StalledReader
from server.errors import ServeError

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TELL_S = 1.0  # for the reader of a failed stream to take the error event


async def http_exception(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: no such route, or not with this method."""
    assert isinstance(error, HTTPException), "registered for it alone"
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:256]}: {error.detail}"
    return _error_response(ServeError(error.status_code, code, message), error.headers)


def _error_response(error: ServeError, headers: Mapping[str, str] | None = None) -> Response:
    response = Response(sse.encode(error.body()), error.status, headers)
    response.headers["content-type"] = "application/json"
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(round(error.retry_after_s), 1))
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


class Outermost:
    """Gives each reply its request id, and is the one place where errors become responses."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status = 0
        is_stream = False

        async def tracked(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                is_stream = any(value.startswith(b"text/event-stream") for _, value in headers)
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, tracked)
        except ClientGone:
            await sse.drop(receive, send)
        except StalledReader:
            log.info("reader dropped", extra={"request_id": request_id})
            await sse.drop(receive, send)
        except (Exception, asyncio.CancelledError) as error:  # the API's last handler: all is told
            failure = self._as_serve_error(error, request_id)
            if not status:
                await _error_response(failure)(scope, receive, tracked)
            elif is_stream:
                await _end_stream(failure, receive, send)
            else:
                await sse.drop(receive, send)

    def _as_serve_error(self, error: BaseException, request_id: str) -> ServeError:
        if isinstance(error, asyncio.CancelledError):
            if not self._services.is_draining:
                raise error
            error = draining()  # uvicorn waits no longer
        if isinstance(error, AdapterError):
            error = as_serve_error(error)
        if not isinstance(error, ServeError):
            log.error("request failed", exc_info=error, extra={"request_id": request_id})
            error = ServeError(500, "internal_error", "The server made a mistake; see its log.")
        self._services.metrics.errors[error.code or str(error.status)] += 1
        return error


async def _end_stream(error: ServeError, receive: Receive, send: Send) -> None:
    body = {"type": "http.response.body", "body": sse.error_event(error), "more_body": False}
    try:
        async with asyncio.timeout(_TELL_S):
            await send(body)
    except TimeoutError:
        await sse.drop(receive, send)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is a sane one, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return given
    return uuid.uuid4().hex
