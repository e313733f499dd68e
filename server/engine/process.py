"""The engine process: start, receive, step, send, stop."""

import ctypes
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from server.config import Config
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.engine.latency import settle
from server.engine.messages import (
    AbortRequests,
    AdapterEvent,
    AddRequest,
    DropAdapter,
    DropWeightSet,
    EngineInfo,
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
)
from server.engine.request import AdapterRef, Request
from server.engine.wire import decode_config

logger = logging.getLogger(__name__)

_IDLE_POLL_MS = 500  # between looks at whether the parent still lives, and heartbeats
_STALL_POLL_MS = 2  # while nothing can run until an adapter has been loaded
_MAX_FAILED_STEPS = 3  # in a row: then the process gives up and is started afresh


class EngineProcess:
    """Runs an engine behind a socket; the one thread that touches it."""

    def __init__(self, socket: "zmq.Socket[bytes]", config: Config, parent_pid: int) -> None:
        self._socket = socket
        self._config = config
        self._parent_pid = parent_pid
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._early: list[RequestOutput] = []  # refusals, sent with the next step's outputs
        self._num_failed_steps = 0
        self._last_sent = 0.0

    def run(self) -> None:
        """Start the engine, then step until told to stop or the parent is gone."""
        try:
            engine, info = build_engine(self._config, self._on_progress)
        except (ValueError, OSError) as error:
            self._send(Fatal(str(error)))
            return
        settle()
        self._send(Ready(info))
        while self._receive(engine, info):
            outputs = self._early + (self._step(engine) if engine.has_work else [])
            self._early = []
            self._report(engine, outputs)

    def _report(self, engine: Engine, outputs: list[RequestOutput]) -> None:
        if not engine.has_work:
            engine.poll()
        for event in engine.adapters.take_events():
            self._send(event)
        for change in engine.weight_sets.take_events():
            self._send(change)
        now = time.monotonic()
        if outputs or now - self._last_sent > _IDLE_POLL_MS / 1000:
            self._send(StepOutputs(outputs, engine.stats()))
            self._last_sent = now

    def _step(self, engine: Engine) -> list[RequestOutput]:
        try:
            outputs = engine.step()
        except Exception as error:  # one of the two places: a failed step fails its requests
            logger.exception("an engine step failed")
            self._num_failed_steps += 1
            failed = engine.fail_all(f"The engine failed: {error}")
            if self._num_failed_steps >= _MAX_FAILED_STEPS or "CUDA" in str(error):
                self._send(StepOutputs(failed, engine.stats()))
                raise
            return failed
        self._num_failed_steps = 0
        return outputs

    def _receive(self, engine: Engine, info: EngineInfo) -> bool:
        """Take every message that is there; wait for one when there is nothing to do."""
        while self._socket.poll(self._patience_ms(engine)):
            message = self._decoder.decode(self._socket.recv())
            if isinstance(message, Shutdown):
                return False
            self._handle(engine, info, message)
        return os.getppid() == self._parent_pid

    def _patience_ms(self, engine: Engine) -> int:
        if self._early or (engine.has_work and not engine.is_stalled):
            return 0
        return _STALL_POLL_MS if engine.is_loading else _IDLE_POLL_MS

    def _handle(self, engine: Engine, info: EngineInfo, message: Any) -> None:
        match message:
            case AddRequest():
                self._add(engine, info, message)
            case AbortRequests(request_ids):
                for request_id in request_ids:
                    engine.abort(request_id)
            case LoadAdapter(adapter, pinned):
                self._load(engine, adapter, pinned=pinned)
            case UnpinAdapter(digest):
                engine.adapters.unpin(digest)
            case DropAdapter(digest):
                engine.drop_adapter(digest)
            case LoadWeightSet(digest, folder):
                engine.weight_sets.add(digest, Path(folder))
            case DropWeightSet(digest):
                engine.drop_weight_set(digest)

    def _load(self, engine: Engine, adapter: AdapterRef, *, pinned: bool) -> None:
        """Answered by the cache's own event, unless there is nothing to load or no room."""
        if pinned:
            engine.adapters.pin(adapter)
        if engine.adapters.is_ready(adapter.digest):
            self._send(AdapterEvent(digest=adapter.digest, event="loaded", tier="gpu"))
        elif not engine.adapters.prefetch(adapter):
            message = "the bank has no room now; it will be loaded by its first request"
            if pinned:
                message = "the bank has no room now; it will be loaded as soon as there is"
            self._send(
                AdapterEvent(digest=adapter.digest, event="postponed", tier="disk", message=message)
            )

    def _add(self, engine: Engine, info: EngineInfo, message: AddRequest) -> None:
        problem = find_problem(message, info)
        if problem is not None:
            refusal = RequestOutput(
                request_id=message.request_id, error=problem, error_code="invalid_request"
            )
            self._early.append(refusal)
            return
        if message.weight_set not in engine.weight_sets:
            text = f"The merged model {message.weight_set[:12]} is not loaded."
            gone = RequestOutput(
                request_id=message.request_id, error=text, error_code="weight_set_not_loaded"
            )
            self._early.append(gone)
            return
        seed = message.sampling.seed
        request = Request(
            request_id=message.request_id,
            prompt_ids=message.prompt_ids,
            sampling=message.sampling,
            adapter=message.adapter,
            weight_set=message.weight_set,
            tenant=message.tenant,
            arrival_time=message.arrival_time,
            seed=seed if seed is not None else random.getrandbits(63),
        )
        engine.add(request)

    def _on_progress(self, stage: str, fraction: float) -> None:
        self._send(Progress(stage, fraction))

    def _send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))


def find_problem(message: AddRequest, info: EngineInfo) -> str | None:
    """Why the engine could never run this request; None if it can."""
    num_tokens = len(message.prompt_ids) + message.sampling.max_tokens
    if not message.prompt_ids:
        return "The prompt has no tokens."
    if message.sampling.max_tokens < 0:
        return f"max_tokens is {message.sampling.max_tokens}; it must be at least 0."
    longest = info.longest(message.adapter.rope if message.adapter else None)
    if num_tokens > longest:
        return f"Prompt and completion need {num_tokens} tokens; the limit is {longest}."
    worst = max(message.prompt_ids)
    if worst >= info.vocab_size or min(message.prompt_ids) < 0:
        return f"Prompt token id {worst} is not in the vocabulary of {info.vocab_size}."
    if message.adapter is not None and message.adapter.num_rank_rows > info.bank_rows:
        return (
            f"The adapter needs {message.adapter.num_rank_rows} bank rows; "
            f"the bank holds {info.bank_rows}."
        )
    return None


def _die_with_parent() -> None:
    """Have the kernel end this process when the API process ends (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Run an engine for the process that started this one: see __main__.py."""
    endpoint, parent_pid = sys.argv[1], int(sys.argv[2])
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the API process, which drains
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    config = decode_config(sys.stdin.buffer.read())
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)  # the step loop never waits for its reader
        socket.linger = 1000
        socket.connect(endpoint)
        EngineProcess(socket, config, parent_pid).run()
