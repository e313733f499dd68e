"""The HTTP application: its parts, routes and lifespan."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from adapters.registry import Registry
from server.api import adapters, health, models, promotion
from server.api.admission import Admission
from server.api.auth import Authenticator, check_listen, load_keys
from server.api.auth import Scope as KeyScope
from server.api.chat import chat_completions
from server.api.completions import completions
from server.api.merged import MergedRoutes
from server.api.outermost import Outermost, http_exception
from server.api.popularity import Popularity
from server.api.ports import Engine
from server.api.promoter import Promoter
from server.api.residency import EngineDropper, restore_pins
from server.api.services import Services, services_of
from server.api.tokenizer import TextCodec
from server.api.upload import upload_root
from server.api.weight_sets import MergedPath, WeightSets
from server.config import Config
from server.metrics import Metrics
from server.promotion.jobs import Jobs
from server.promotion.memory import weight_set_bytes
from server.promotion.step_times import read_step_times

Endpoint = Callable[[Request], Awaitable[Response]]

_WATCH_S = 1.0  # between two looks for an engine that has started
_USAGE_S = 5.0  # between two writes of token counts to the registry


def create_app(
    config: Config,
    engine: Engine,
    registry: Registry,
    codec: TextCodec,
    metrics: Metrics,
    *,
    dropper: EngineDropper | None = None,
    merged: MergedPath | None = None,
    jobs: Jobs | None = None,
) -> Starlette:
    """Build the application. `dropper` is the registry's `on_free`; it wakes with the lifespan.

    Raises ValueError for a host that needs keys, a keys file or step times that are wrong.
    """
    check_listen(config.server)
    merged = merged or MergedRoutes(engine)
    keys = None if config.server.api_keys is None else load_keys(config.server.api_keys)
    services = Services(
        config=config,
        engine=engine,
        registry=registry,
        codec=codec,
        metrics=metrics,
        admission=Admission(config.server.max_waiting, config.server.max_waiting_per_tenant),
        authenticator=Authenticator(keys),
        promoter=_promoter(config, engine, registry, metrics, merged, jobs),
        merged=merged,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if dropper is not None:
            dropper.attach(registry)
        left = upload_root(config.adapters)  # of a server that was killed
        await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        tasks = [
            asyncio.create_task(_watch_engine(services)),
            asyncio.create_task(_count_usage(services)),
            asyncio.create_task(services.promoter.run()),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await services.register_usage()

    return _Application(services, lifespan)


def _promoter(
    config: Config,
    engine: Engine,
    registry: Registry,
    metrics: Metrics,
    merged: MergedPath,
    jobs: Jobs | None,
) -> Promoter:
    sets = WeightSets(registry, engine, metrics, merged)
    times = read_step_times(config.promotion.step_times)
    num_bytes = weight_set_bytes(config.model.path)
    popularity = Popularity(config.promotion, registry, metrics, sets, times, num_bytes)
    jobs = jobs or Jobs(registry.root)
    return Promoter(config, engine, registry, metrics, jobs, sets, popularity)


class _Application(Starlette):
    """Starlette with our error handler around it in place of Starlette's own."""

    def __init__(
        self, services: Services, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]]
    ) -> None:
        super().__init__(routes=_routes(), lifespan=lifespan)
        self.router.redirect_slashes = False  # a path that is none of ours is told so
        self.state.services = services

    def build_middleware_stack(self) -> ASGIApp:
        routed = ExceptionMiddleware(self.router, handlers={HTTPException: http_exception})
        return Outermost(routed, self.state.services)


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
        route(f"{one}/revisions/{{revision}}", adapters.delete_revision, "DELETE", "adapters"),
        route(f"{one}/publish", adapters.publish_adapter, "POST", "adapters"),
        route(f"{one}/rollback", adapters.rollback_adapter, "POST", "adapters"),
        route(f"{one}/pin", adapters.pin_adapter, "POST", "adapters"),
        route(f"{one}/unpin", adapters.unpin_adapter, "POST", "adapters"),
        route(f"{one}/promote", promotion.promote_adapter, "POST", "adapters"),
        route(f"{one}/demote", promotion.demote_adapter, "POST", "adapters"),
        route(f"{one}/promotion", promotion.get_promotion, "GET", "adapters"),
        route(f"{one}/promotion", promotion.cancel_promotion, "DELETE", "adapters"),
        route("/v1/candidates", promotion.list_candidates, "GET", "adapters"),
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


async def _watch_engine(services: Services) -> None:
    """Pin anew in every engine process that starts."""
    pinned_in = -1
    while True:
        if services.engine.is_ready and services.engine.num_restarts != pinned_in:
            pinned_in = services.engine.num_restarts
            await restore_pins(services)
        await asyncio.sleep(_WATCH_S)


async def _count_usage(services: Services) -> None:
    while True:
        await asyncio.sleep(_USAGE_S)
        await services.register_usage()
