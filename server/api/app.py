"""The HTTP application: routes, lifespan, the one error handler."""

import asyncio
import contextlib
import logging
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.manifest import AdapterError
from adapters.registry import Registry
from server.api import adapters, health, models, sse
from server.api.adapters import EngineDropper, as_serve_error
from server.api.admission import Admission
from server.api.auth import Authenticator, check_listen, load_keys
from server.api.auth import Scope as KeyScope
from server.api.chat import chat_completions
from server.api.completions import completions
from server.api.ports import Engine
from server.api.services import ClientGone, Services, services_of
from server.api.sse import StalledReader
from server.api.tokenizer import TextCodec
from server.config import Config
from server.errors import ServeError
from server.metrics import Metrics

log = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_WATCH_S = 1.0  # between two looks for an engine that has started
_USAGE_S = 5.0  # between two writes of token counts to the registry
_TELL_S = 1.0  # for the reader of a failed stream to take the error event


def create_app(
    config: Config,
    engine: Engine,
    registry: Registry,
    codec: TextCodec,
    metrics: Metrics,
    *,
    dropper: EngineDropper | None = None,
) -> Starlette:
    """Build the application. `dropper` is the registry's `on_free`; it wakes with the lifespan.

    Raises ValueError for a host that needs keys, or a keys file that is wrong.
    """
    check_listen(config.server)
    keys = None if config.server.api_keys is None else load_keys(config.server.api_keys)
    services = Services(
        config=config,
        engine=engine,
        registry=registry,
        codec=codec,
        metrics=metrics,
        admission=Admission(config.server.max_waiting, config.server.max_waiting_per_tenant),
        authenticator=Authenticator(keys),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if dropper is not None:
            dropper.attach(registry)
        tasks = [
            asyncio.create_task(_watch_engine(services)),
            asyncio.create_task(_count_usage(services)),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _register_usage(services)

    app = Starlette(
        routes=_routes(),
        lifespan=lifespan,
        middleware=[Middleware(_Outermost, services=services)],
        exception_handlers={HTTPException: _http_exception},
    )
    app.state.services = services
    return app


def _routes() -> list[Route]:
    def route(path: str, endpoint: Endpoint, method: str, scope: KeyScope | None = None) -> Route:
        return Route(path, _guard(endpoint, scope) if scope else endpoint, methods=[method])

    one = "/v1/adapters/{name}"
    return [
        route("/v1/chat/completions", chat_completions, "POST", "infer"),
        route("/v1/completions", completions, "POST", "infer"),
        route("/v1/models", models.list_models, "GET", "infer"),
        route("/v1/models/{model:path}", models.get_model, "GET", "infer"),
        route("/tokenize", models.tokenize, "POST", "infer"),
        route("/detokenize", models.detokenize, "POST", "infer"),
        route("/v1/load_lora_adapter", adapters.load_lora_adapter, "POST", "adapters"),
        route("/v1/unload_lora_adapter", adapters.unload_lora_adapter, "POST", "adapters"),
        route("/v1/adapters", adapters.list_adapters, "GET", "adapters"),
        route("/v1/adapters", adapters.push_adapter, "POST", "adapters"),
        route(one, adapters.get_adapter, "GET", "adapters"),
        route(one, adapters.delete_adapter, "DELETE", "adapters"),
        route(f"{one}/revisions", adapters.list_revisions, "GET", "adapters"),
        route(f"{one}/publish", adapters.publish_adapter, "POST", "adapters"),
        route(f"{one}/rollback", adapters.rollback_adapter, "POST", "adapters"),
        route(f"{one}/pin", adapters.pin_adapter, "POST", "adapters"),
        route(f"{one}/unpin", adapters.unpin_adapter, "POST", "adapters"),
        route("/health", health.health, "GET"),
        route("/ready", health.ready, "GET"),
        route("/version", health.version, "GET"),
        route("/metrics", health.metrics, "GET"),
    ]


def _guard(endpoint: Endpoint, scope: KeyScope) -> Endpoint:
    """Let in only those whose key has the scope; the tenant is known from here on."""

    async def guarded(request: Request) -> Response:
        authenticator = services_of(request).authenticator
        request.state.tenant = authenticator.check(request.headers.get("authorization"), scope)
        return await endpoint(request)

    return guarded


async def _http_exception(request: Request, error: Exception) -> Response:
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


class _Outermost:
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
        except Exception as error:  # the API's last handler: whatever it is, the client is told
            failure = self._as_serve_error(error, request_id)
            if not status:
                await _error_response(failure)(scope, receive, tracked)
            elif is_stream:
                await _end_stream(failure, receive, send)
            else:
                await sse.drop(receive, send)

    def _as_serve_error(self, error: Exception, request_id: str) -> ServeError:
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


async def _watch_engine(services: Services) -> None:
    """Pin anew in every engine process that starts."""
    pinned_in = -1
    while True:
        if services.engine.is_ready and services.engine.num_restarts != pinned_in:
            pinned_in = services.engine.num_restarts
            await adapters.restore_pins(services)
        await asyncio.sleep(_WATCH_S)


async def _count_usage(services: Services) -> None:
    while True:
        await asyncio.sleep(_USAGE_S)
        await _register_usage(services)


async def _register_usage(services: Services) -> None:
    tokens, services.usage = services.usage, Counter()
    if tokens:
        await asyncio.to_thread(services.registry.add_usage, tokens)
