"""Build the parts, serve, drain on SIGTERM: what `turnout serve` runs."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

import uvicorn
import uvloop
from rich.console import Console
from starlette.applications import Starlette

from adapters.registry import Registry
from server.adapter_admin import base_shape, limits, register_examples
from server.api.app import create_app
from server.api.auth import check_listen
from server.api.protocol import BoundedHead
from server.api.residency import EngineDropper
from server.api.tokenizer import TextCodec
from server.base_text import CheckpointText
from server.config import Config
from server.engine.client import EngineClient, EngineStartError
from server.engine.latency import settle_heap
from server.metrics import Metrics
from server.start_display import StartDisplay

logger = logging.getLogger(__name__)

_ABOUT = ("adapter", "request_id")  # what log calls pass as `extra`
_LET_GO_S = 5  # after the drain, for what is no inference: uploads, promotions, half a request
_LINES_TO_TRY = """
  curl {url}/v1/models

  curl {url}/v1/chat/completions \\
    -H 'content-type: application/json' \\
    -d '{{"model": "json", "messages":
        [{{"role": "user", "content": "{question}"}}]}}'

  curl {url}/v1/chat/completions \\
    -H 'content-type: application/json' \\
    -d '{{"model": "pirate", "stream": true, "messages":
        [{{"role": "user", "content": "{question}"}}]}}'
"""


def run(config: Config, *, example_adapters: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C. ValueError says what an operator must change."""
    handler = _Handler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    check_listen(config.server)
    try:
        uvloop.run(_serve(config, example_adapters=example_adapters))
    except EngineStartError as error:
        raise ValueError(str(error)) from error
    except asyncio.CancelledError:
        logger.info("told to stop while starting")


async def _serve(config: Config, *, example_adapters: bool) -> None:
    starter = asyncio.current_task()
    assert starter is not None, "this runs in one"
    # A container's first process gets no signal without a handler. Once: the closing goes on.
    _on_signal(lambda: starter.cancelling() or starter.cancel())
    listener = _listen(config.server.host, config.server.port)
    url = _url(config.server.host, listener)
    metrics = Metrics(config.model.name)
    console = Console()
    with StartDisplay(console) as display:
        engine = EngineClient(
            config,
            on_event=metrics.on_event,
            on_stats=metrics.on_stats,
            on_progress=display.on_progress,
        )
        starting = asyncio.create_task(engine.start())
        server: _Server | None = None
        try:
            # The engine loads in its own process meanwhile.
            app, registry = await asyncio.to_thread(
                _build_app, config, engine, metrics, url, example_adapters=example_adapters
            )
            options = uvicorn.Config(
                app,
                http=BoundedHead,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_LET_GO_S,
            )
            server = _Server(options)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await starting
        except BaseException:
            starting.cancel()
            await engine.close()
            if server is not None:
                server.should_exit = True
                await asyncio.wait({serving})
            raise
    settle_heap()  # a scrape would set off a full collection
    console.print(display.took(), style="dim", highlight=False, soft_wrap=True)
    _say_ready(console, config, url, example_adapters=example_adapters)
    try:
        await _until_stopped(app, engine, serving)
        server.should_exit = True
        await serving
    finally:
        await engine.close()
        registry.close()


def _say_ready(console: Console, config: Config, url: str, *, example_adapters: bool) -> None:
    console.print(f"Turnout serves {config.model.name} at {url}", style="bold green")
    if config.server.api_keys is not None:
        header = "-H 'authorization: Bearer KEY'"
        text = f"Each request needs {header}, of {config.server.api_keys}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if example_adapters:
        text = _LINES_TO_TRY.format(url=url, question="What is the capital of France?")
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _build_app(
    config: Config, engine: EngineClient, metrics: Metrics, url: str, *, example_adapters: bool
) -> tuple[Starlette, Registry]:
    dropper = EngineDropper(engine)
    registry = Registry.open(
        config.adapters.store,
        base_shape(config.model, CheckpointText),
        limits(config.adapters),
        url=url,
        on_free=dropper,
    )
    try:
        if example_adapters:
            register_examples(registry)
        metrics.names = registry.names_of
        codec = TextCodec.load(config.model.path)
        return create_app(config, engine, registry, codec, metrics, dropper=dropper), registry
    except BaseException:
        registry.close()
        raise


async def _until_stopped(
    app: Starlette, engine: EngineClient, serving: "asyncio.Task[None]"
) -> None:
    """Wait for a signal, then drain; EngineStartError if the engine is given up."""
    stop = asyncio.Event()
    _on_signal(stop.set)
    stopped = asyncio.create_task(stop.wait())
    given_up = asyncio.create_task(engine.wait_closed())
    await asyncio.wait({serving, stopped, given_up}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if given_up.done():
        given_up.result()
    given_up.cancel()
    await app.state.services.drain()


def _on_signal(call: Callable[[], object]) -> None:
    """Have SIGTERM and Ctrl-C do this from now on."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, call)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to whatever is stderr at the time, so that lines go above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    """Lines end with the adapter and the request that they are about, where there is one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        found = (f"{name}={vars(record)[name]}" for name in _ABOUT if name in vars(record))
        return " ".join((super().formatMessage(record).rstrip(), *found))


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: a drain comes first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _url(host: str, listener: socket.socket) -> str:
    """An IPv6 address goes into brackets; where the host means every address, this one is said.

    The port is the listener's: port 0 is whichever is free.
    """
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything slow begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host}, --port {port}: {error.strerror}") from error
    return listener
