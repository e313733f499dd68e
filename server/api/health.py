"""What orchestrators and dashboards ask: alive, ready, which version, how it goes."""

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.exposition import CONTENT_TYPE, render
from server.api.services import services_of

VERSION = "0.1.0"


async def health(request: Request) -> Response:
    """Whether this process lives: it answers, so it does."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests are served: 200, or 503 while starting, draining or without an engine."""
    services = services_of(request)
    services.check_open()
    return JSONResponse({"status": "ready"})


async def version(request: Request) -> Response:
    """This server's version."""
    return JSONResponse({"version": VERSION})


async def metrics(request: Request) -> Response:
    """The Prometheus exposition, made in a worker thread so that no stream waits for it."""
    services = services_of(request)
    services.metrics.num_restarts = services.engine.num_restarts
    if services.engine.is_ready:
        services.metrics.info = services.engine.info
    text = await asyncio.to_thread(render, services.metrics)
    return Response(text, headers={"content-type": CONTENT_TYPE})
