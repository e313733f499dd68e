"""The API process's side of the bridge: asyncio in, streams of tokens out, an engine kept alive."""

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from server.config import Config
from server.engine.channel import Channel
from server.engine.messages import (
    AbortRequests,
    AdapterEvent,
    AddRequest,
    DropAdapter,
    DropWeightSet,
    EngineInfo,
    EngineStats,
    Fatal,
    FromEngine,
    LoadAdapter,
    LoadWeightSet,
    Progress,
    Ready,
    RequestOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    UnpinAdapter,
    WeightSetEvent,
)
from server.engine.request import AdapterRef
from server.engine.wire import encode_config
from server.errors import ServeError, bad_request, engine_failed

logger = logging.getLogger(__name__)

_MAX_EARLY_DEATHS = 3  # in a row, before the engine was ready: then starting it again is hopeless
_RESTART_PAUSE_S = 0.2
_STOP_PATIENCE_S = 2
_SILENT_LOOKS = 10  # in a row: several, so that a pause of this process alone counts as one
_ENDED = "The engine process ended; it is being started again."


_Event = TypeVar("_Event")
_Waiters = dict[str, list[asyncio.Future[_Event]]]  # by digest


class EngineStartError(RuntimeError):
    """The engine cannot start; the message is for the operator."""


class OutputStream:
    """One request's outputs. A slow reader finds several steps' tokens in one output."""

    def __init__(self, request_id: str, on_close: Callable[[str], None]) -> None:
        self._request_id = request_id
        self._on_close = on_close
        self._waiting: RequestOutput | None = None
        self._failure: ServeError | None = None
        self._is_last = False
        self._arrived = asyncio.Event()

    def __aiter__(self) -> "OutputStream":
        return self

    async def __anext__(self) -> RequestOutput:
        """Return what is new; ServeError if the request failed."""
        await self._arrived.wait()
        output, self._waiting = self._waiting, None
        if output is not None:
            if not self._is_last and self._failure is None:
                self._arrived.clear()
            return output
        if self._failure is not None:
            raise self._failure
        raise StopAsyncIteration

    def close(self) -> None:
        """Abort in the engine what is unfinished. Idempotent."""
        if not self._is_last:
            self._is_last = True
            self._arrived.set()
            self._on_close(self._request_id)

    def put(self, output: RequestOutput) -> None:
        """Add what a step produced. The buffer is bounded by the request's own max_tokens."""
        if output.error is not None:
            self.fail(_failure(output))
            return
        self._waiting = output if self._waiting is None else _join(self._waiting, output)
        self._is_last = output.finish_reason is not None
        self._arrived.set()

    def fail(self, failure: ServeError) -> None:
        """End the stream with an error, after what has arrived already."""
        self._failure = failure
        self._is_last = True
        self._arrived.set()


class EngineClient:
    """Starts the engine process, talks to it, and starts it again when it dies.

    A death fails every stream at once: nothing waits for a restart. An engine that says nothing any
    more, not even that it idles, is killed. The engine process dies with this one (it asks the
    kernel to), so none is ever orphaned.
    """

    def __init__(
        self,
        config: Config,
        *,
        on_event: Callable[[AdapterEvent], None] = lambda event: None,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_progress: Callable[[str, float], None] = lambda stage, fraction: None,
    ) -> None:
        self.stats = EngineStats()
        self.num_restarts = 0
        self._config = config
        self._on_event, self._on_stats, self._on_progress = on_event, on_stats, on_progress
        self._info: EngineInfo | None = None
        self._is_ready = asyncio.Event()
        self._is_heard = False  # since it was last asked
        self._streams: dict[str, OutputStream] = {}
        self._loads: _Waiters[AdapterEvent] = {}
        self._drops: _Waiters[AdapterEvent] = {}
        self._set_loads: _Waiters[WeightSetEvent] = {}
        self._set_drops: _Waiters[WeightSetEvent] = {}
        self._num_early_deaths = 0
        self._fatal: str | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._context = zmq.Context()
        self._channel: Channel | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="turnout-")
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine found out while starting; it must have been ready once."""
        assert self._info is not None, "the engine has not been ready yet"
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted now."""
        return self._is_ready.is_set()

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it serves. EngineStartError if it cannot."""
        self._keeper = asyncio.create_task(self._keep_alive())
        ready = asyncio.create_task(self._is_ready.wait())
        await asyncio.wait({ready, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        if not self.is_ready:
            ready.cancel()
            await self.wait_closed()
        return self.info

    async def wait_closed(self) -> None:
        """Wait until the engine is given up; EngineStartError says why."""
        assert self._keeper is not None, "not started"
        await asyncio.shield(self._keeper)
        raise EngineStartError(self._fatal or "the engine was stopped")

    async def close(self) -> None:
        """Stop the engine process and free everything."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})  # how it ended, `start` and `wait_closed` say
        self._folder.cleanup()
        self._context.destroy(linger=0)

    def submit(self, request: AddRequest) -> OutputStream:
        """Hand a request over. ServeError 503 if the engine is down."""
        if not self.is_ready:
            raise engine_failed("The engine is not running; it is being started.")
        self._send(request)
        stream = self._streams[request.request_id] = OutputStream(request.request_id, self._abort)
        return stream

    async def load_adapter(self, adapter: AdapterRef, *, pinned: bool = False) -> AdapterEvent:
        """Bring an adapter into the bank; return what came of it: see AdapterChange."""
        if not self.is_ready:
            raise engine_failed("The engine is not running; it is being started.")
        self._send(LoadAdapter(adapter, pinned))
        return await _expect(self._loads, adapter.digest)

    def unpin_adapter(self, digest: str) -> None:
        """Let an adapter be evicted like any other."""
        if self.is_ready:
            with contextlib.suppress(ServeError):  # an engine that ends holds no pin
                self._send(UnpinAdapter(digest))

    async def drop_adapter(self, digest: str) -> None:
        """Free everything the engine holds of an adapter."""
        if self.is_ready:
            self._send(DropAdapter(digest))
            await _expect(self._drops, digest)

    async def load_weight_set(self, digest: str, folder: Path) -> WeightSetEvent:
        """Load a merged model beside the base; return what came of it: loaded or failed."""
        if not self.is_ready:
            raise engine_failed("The engine is not running; it is being started.")
        self._send(LoadWeightSet(digest, str(folder)))
        return await _expect(self._set_loads, digest)

    async def drop_weight_set(self, digest: str) -> None:
        """Free a merged model; returns when nothing runs on it any more."""
        if self.is_ready:
            self._send(DropWeightSet(digest))
            await _expect(self._set_drops, digest)

    async def _keep_alive(self) -> None:
        """Run engine processes, one after the other, until one says that it never can."""
        while self._fatal is None:
            try:
                how = f"ended with code {await self._run_once()}"
            except (OSError, zmq.ZMQError) as error:
                how = f"could not be started: {error}"
            if self._fatal is None:
                self._count_death(how)
                await asyncio.sleep(_RESTART_PAUSE_S)

    async def _run_once(self) -> int:
        """Start one engine process, read from it until it ends, and return its exit code."""
        endpoint = (
            f"ipc://{Path(self._folder.name) / f'engine-{self.num_restarts}-{time.time_ns()}'}"
        )
        self._process = None
        self._channel = Channel(self._context, self._receive)
        try:
            self._channel.bind(endpoint)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine",
                endpoint,
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
            )
            assert self._process.stdin is not None
            with contextlib.suppress(RuntimeError):  # uvloop's, where it has ended already
                self._process.stdin.write(encode_config(self._config))
                self._process.stdin.close()
            watch = asyncio.create_task(self._kill_when_silent(self._process))
            try:
                code = await self._process.wait()
            finally:
                watch.cancel()
            self._channel.read_all()  # what it sent before it ended
            return code
        finally:
            self._is_ready.clear()
            self._fail_streams(_ENDED)
            num_free_blocks = 0 if self._info is None else self._info.num_blocks
            self.stats = EngineStats(num_free_blocks=num_free_blocks)  # nothing runs any more
            self._on_stats(self.stats)
            try:
                if self._process is not None:
                    await self._stop(self._process)
            finally:
                self._channel.close()  # an open socket would keep this process from ending

    async def _kill_when_silent(self, process: asyncio.subprocess.Process) -> None:
        """End an engine that was ready and hangs: in a step, in a lock, in the GPU's driver."""
        limit_s, num_silent = self._config.server.engine_silence_s, 0
        if not limit_s:
            return
        while num_silent < _SILENT_LOOKS:
            self._is_heard = False
            await asyncio.sleep(limit_s / _SILENT_LOOKS)
            num_silent = num_silent + 1 if self.is_ready and not self._is_heard else 0
        logger.error("the engine process said nothing for %g s; killed", limit_s)
        process.kill()
        self._is_ready.clear()  # the driver may hold even a killed one
        self._fail_streams(_ENDED)

    def _count_death(self, how: str) -> None:
        logger.error("the engine process %s; starting it again", how)
        self.num_restarts += 1
        self._num_early_deaths += 1
        if self._num_early_deaths >= _MAX_EARLY_DEATHS:
            self._fatal = (
                f"the engine process ended {_MAX_EARLY_DEATHS} times without serving; "
                f"the last one {how}"
            )

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            return
        with contextlib.suppress(ServeError):  # it has not connected yet
            self._send(Shutdown())
        try:
            await asyncio.wait_for(process.wait(), _STOP_PATIENCE_S)
        except TimeoutError:
            logger.warning("the engine process did not end within %d s; killed", _STOP_PATIENCE_S)
            process.kill()
            await process.wait()

    def _receive(self, payload: bytes) -> None:
        self._is_heard = True
        message: FromEngine = self._decoder.decode(payload)
        match message:
            case StepOutputs(outputs, stats):
                self.stats = stats
                for output in outputs:
                    self._put(output)
                self._on_stats(stats)
            case AdapterEvent():
                if message.event != "evicted":
                    waiters = self._drops if message.event == "dropped" else self._loads
                    _settle(waiters, message.digest, message)
                is_answer_only = message.event == "postponed" or (
                    message.event == "loaded" and message.tier == "gpu"
                )
                if not is_answer_only:
                    self._on_event(message)
            case WeightSetEvent():
                waiting = self._set_drops if message.event == "dropped" else self._set_loads
                _settle(waiting, message.digest, message)
            case Progress(stage, fraction):
                self._on_progress(stage, fraction)
            case Ready(info):
                self._info = info
                self._num_early_deaths = 0
                self._is_ready.set()
            case Fatal(text):
                self._fatal = text

    def _put(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # closed while this was on its way
        if output.finish_reason is not None or output.error is not None:
            del self._streams[output.request_id]
        stream.put(output)

    def _fail_streams(self, message: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(engine_failed(message))
        for waiters in (self._loads, self._drops):
            _fail(waiters, message)
        for waiting in (self._set_loads, self._set_drops):
            _fail(waiting, message)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None and self.is_ready:
            with contextlib.suppress(ServeError):  # an engine that ends runs nothing on
                self._send(AbortRequests([request_id]))

    def _send(self, message: ToEngine) -> None:
        """Hand a message over. ServeError 503 if the engine has let go of its end: it is ending."""
        assert self._channel is not None, "the engine has never been started"
        try:
            self._channel.send(self._encoder.encode(message))
        except zmq.Again:
            raise engine_failed(_ENDED) from None


async def _expect(waiters: _Waiters[_Event], digest: str) -> _Event:
    future: asyncio.Future[_Event] = asyncio.get_running_loop().create_future()
    waiters.setdefault(digest, []).append(future)
    return await future


def _settle(waiters: _Waiters[_Event], digest: str, event: _Event) -> None:
    for future in waiters.pop(digest, []):
        if not future.done():
            future.set_result(event)


def _fail(waiters: _Waiters[_Event], message: str) -> None:
    for future in (future for futures in waiters.values() for future in futures):
        if not future.done():
            future.set_exception(engine_failed(message))
    waiters.clear()


def _join(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    earlier.token_ids += later.token_ids
    if later.logprobs is not None:
        earlier.logprobs = (earlier.logprobs or []) + later.logprobs
    earlier.finish_reason = later.finish_reason
    return earlier


def _failure(output: RequestOutput) -> ServeError:
    assert output.error is not None
    if output.error_code == "invalid_request":
        return bad_request(output.error)
    if output.error_code == "adapter_load_failed":
        return ServeError(500, "adapter_load_failed", output.error)
    return engine_failed(output.error)
