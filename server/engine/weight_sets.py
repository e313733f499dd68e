"""The models of one engine: the base that adapters are over, and merged ones beside it."""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from server.engine.messages import WeightSetEvent
from server.engine.model_runner import Launched, ModelRunner
from server.engine.request import BASE
from server.engine.scheduler import Plan
from server.engine.threads import use_one_thread

logger = logging.getLogger(__name__)

_CAPTURE_PAUSE_S = 1.0  # between two graphs while streams run: each keeps them for a few steps


@dataclass(slots=True)
class _Arriving:
    """A merged model on its way."""

    digest: str
    num_bytes: int
    began: float
    reading: Future[ModelRunner]
    captures: Iterator[float] | None = None  # once it has been read
    next_capture: float = 0.0
    is_leaving: bool = False  # as soon as it has been read


@dataclass(slots=True)
class _Resident:
    runner: ModelRunner
    num_bytes: int
    is_leaving: bool = False


@dataclass(slots=True)
class WeightSets:
    """Runs each request of a step through its own weights; merged models come and go beside it.

    Belongs to the engine's thread. Reading a model takes seconds, in a thread of its own; what a
    GPU must capture for it is done between steps, one graph at a time.

    load       reads a GPTQ checkpoint, in any thread. ValueError says what is wrong with it
    max_bytes  that merged models may take together; None is no limit
    """

    base: ModelRunner
    load: Callable[[Path], ModelRunner]
    max_bytes: int | None = None
    _resident: dict[str, _Resident] = field(default_factory=dict)
    _arriving: deque[_Arriving] = field(default_factory=deque)
    _events: list[WeightSetEvent] = field(default_factory=list)
    _reader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(
            1, "weight-set-reader", initializer=use_one_thread
        )
    )

    def __contains__(self, digest: str) -> bool:
        """Whether requests can run on it now."""
        return digest == BASE or digest in self._resident

    @property
    def is_loading(self) -> bool:
        """Whether `poll` has something to wait for."""
        return bool(self._arriving) or any(found.is_leaving for found in self._resident.values())

    @property
    def num_bytes(self) -> int:
        """Of checkpoints that are here or on their way."""
        here = sum(found.num_bytes for found in self._resident.values())
        return here + sum(arriving.num_bytes for arriving in self._arriving)

    def launch(self, plan: Plan) -> list[Launched]:
        """Start a step: one pass for each weight set that has requests in it."""
        passes = _by_weight_set(plan).items()
        return [self._runner(digest).launch(own) for digest, own in passes]

    def add(self, digest: str, folder: Path) -> None:
        """Begin to load a merged model; a `loaded` or `failed` event follows."""
        resident = self._resident.get(digest)
        if resident is not None:
            self._keep(resident, digest)
            self._tell(digest, "loaded", num_bytes=resident.num_bytes)
            return
        arriving = self._find_arriving(digest)
        if arriving is not None:
            self._keep(arriving, digest)
            return  # that load's event answers both
        num_bytes = _num_bytes(folder)
        problem = self._why_not(folder, num_bytes)
        if problem:
            self._tell(digest, "failed", message=problem)
            return
        reading = self._reader.submit(self.load, folder)
        self._arriving.append(_Arriving(digest, num_bytes, time.monotonic(), reading))

    def drop(self, digest: str) -> None:
        """Free a merged model as soon as nothing runs on it; a `dropped` event follows.

        One that is asked for again before that stays, and the event comes at once.
        """
        found = self._resident.get(digest) or self._find_arriving(digest)
        if found is not None:
            found.is_leaving = True
        else:
            self._tell(digest, "dropped")

    def poll(self, in_use: Collection[str]) -> None:
        """Let go what is to leave and is not in use; take in what has been read.

        in_use  weight sets of all requests that are not over
        """
        if not self.is_loading:
            return
        for digest, found in list(self._resident.items()):
            if found.is_leaving and digest not in in_use:
                self._remove(digest)
        if self._arriving and self._arriving[0].reading.done():
            self._take_in(self._arriving[0], is_busy=bool(in_use))

    def take_events(self) -> list[WeightSetEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def _runner(self, digest: str) -> ModelRunner:
        return self.base if digest == BASE else self._resident[digest].runner

    def _find_arriving(self, digest: str) -> _Arriving | None:
        return next((each for each in self._arriving if each.digest == digest), None)

    def _keep(self, found: _Resident | _Arriving, digest: str) -> None:
        if found.is_leaving:
            found.is_leaving = False
            self._tell(digest, "dropped")  # whoever waits for it to leave would wait in vain

    def _why_not(self, folder: Path, num_bytes: int) -> str:
        if not num_bytes:
            return f"{folder} holds no safetensors"
        if self.max_bytes is not None and self.num_bytes + num_bytes > self.max_bytes:
            return (
                f"it takes {num_bytes / 1e9:.2f} GB; of {self.max_bytes / 1e9:.2f} GB set aside "
                f"for merged models {self.num_bytes / 1e9:.2f} are taken (serve --merged-gib)"
            )
        return ""

    def _take_in(self, arriving: _Arriving, *, is_busy: bool) -> None:
        """Capture one graph of a model that was read; the last one makes it resident."""
        failure = arriving.reading.exception()
        if failure is not None:
            self._fail(arriving, failure)
            return
        runner = arriving.reading.result()
        if arriving.is_leaving:
            self._arriving.popleft()
            self._resident[arriving.digest] = _Resident(runner, arriving.num_bytes, is_leaving=True)
            self._tell(arriving.digest, "failed", message="it was dropped before it had come")
            return
        if is_busy and time.monotonic() < arriving.next_capture:
            return
        arriving.next_capture = time.monotonic() + _CAPTURE_PAUSE_S
        arriving.captures = arriving.captures or runner.captures()
        try:
            if next(arriving.captures, None) is not None:
                return
        except torch.OutOfMemoryError as error:
            self._fail(arriving, error)
            return
        self._arriving.popleft()
        self._resident[arriving.digest] = _Resident(runner, arriving.num_bytes)
        seconds = time.monotonic() - arriving.began
        self._tell(arriving.digest, "loaded", seconds=seconds, num_bytes=arriving.num_bytes)

    def _fail(self, arriving: _Arriving, failure: BaseException) -> None:
        logger.error("weight set %s: %s", arriving.digest, failure, exc_info=failure)
        self._arriving.remove(arriving)
        self._tell(arriving.digest, "failed", message=str(failure) or type(failure).__name__)
        if arriving.is_leaving:
            self._tell(arriving.digest, "dropped")

    def _remove(self, digest: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a step whose requests are over may still run on it
        del self._resident[digest]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # it was allocated for another stream
        self._tell(digest, "dropped")

    def _tell(
        self,
        digest: str,
        event: Literal["loaded", "failed", "dropped"],
        *,
        seconds: float = 0.0,
        num_bytes: int = 0,
        message: str = "",
    ) -> None:
        self._events.append(
            WeightSetEvent(
                digest=digest,
                event=event,
                seconds=seconds,
                num_bytes=num_bytes,
                message=message,
            )
        )


def _num_bytes(folder: Path) -> int:
    """What its weights take; 0 where there are none, or somebody deletes them this very moment."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except OSError:
        return 0


def _by_weight_set(plan: Plan) -> dict[str, Plan]:
    """The plan of each weight set that has a part in it."""
    digests = dict.fromkeys(part.request.weight_set for part in plan.parts)
    if len(digests) == 1:
        return dict.fromkeys(digests, plan)
    return {
        digest: Plan(
            tuple(part for part in plan.decodes if part.request.weight_set == digest),
            tuple(part for part in plan.chunks if part.request.weight_set == digest),
        )
        for digest in digests
    }
