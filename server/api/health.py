"""What orchestrators and dashboards ask: alive, ready, which version, how it goes."""

import asyncio
import gzip

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.exposition import CONTENT_TYPE, render
from server.api.services import services_of
from server.metrics import Metrics

VERSION = "0.1.0"

_ZIP_LEVEL = 5  # 3 % larger than 9 makes it, in a seventh of the time


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
    services.metrics.drain_s = services.drain_s
    services.metrics.drain_limit_s = services.config.server.drain_s
    is_zipped = _takes_gzip(request.headers.get("accept-encoding", ""))
    body = await asyncio.to_thread(_exposition, services.metrics, is_zipped=is_zipped)
    headers = {"content-type": CONTENT_TYPE, "vary": "accept-encoding"}
    return Response(body, headers=headers | ({"content-encoding": "gzip"} if is_zipped else {}))


def _exposition(metrics: Metrics, *, is_zipped: bool) -> bytes:
    text = render(metrics)
    return gzip.compress(text, _ZIP_LEVEL) if is_zipped else text


def _takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header names gzip, and not with `q=0`."""
    for coding in accepted.split(","):
        name, _, weight = coding.replace(" ", "").lower().partition(";q=")
        if name == "gzip":
            return not weight or weight.strip("0.") != ""
    return False
