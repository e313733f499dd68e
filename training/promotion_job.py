"""The life of one promotion, around whatever makes the artifact: state, queue, registering.

Killed at any point, it goes on where it was when it is started anew; what is registered is whole.
"""

import contextlib
import os
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from adapters.artifacts import ArtifactStore
from adapters.promotions import (
    JobFolder,
    PromotionRequest,
    PromotionState,
    Stage,
    Status,
    queue_turn,
)

_WRITE_S = 0.5  # between two writes of the same stage's progress
_MADE_SHARE = 0.98  # of the whole; the rest is registering


class Made(Protocol):
    """A checkpoint folder that has passed the gate."""

    @property
    def folder(self) -> Path: ...
    @property
    def adapter_digest(self) -> str: ...
    @property
    def merge_base(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def provenance(self) -> dict[str, Any]: ...


class Listener(Protocol):
    """Who is told how far the making is."""

    def on_progress(self, stage: Stage, total: float, note: str) -> None: ...
    def on_wait(self, why: str) -> None: ...


class Make(Protocol):
    """What makes the artifact."""

    def __call__(
        self, request: PromotionRequest, out: Path, work: Path, listener: Listener
    ) -> Made:
        """Put a checkpoint folder at `out`, with `work` for what finished stages leave.

        Raises Refused. Called again with the same arguments after a kill, it goes on; what is at
        `out` already is taken as it is.
        """
        ...


class Refused(Exception):
    """The job cannot be done; `result` is what is known by then."""

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.result = result or {}


class Job:
    """Runs one promotion and keeps its state file."""

    def __init__(self, folder: JobFolder, make: Make) -> None:
        self._folder, self._make = folder, make
        request, state = folder.request(), folder.state()
        if request is None or state is None:
            raise ValueError(f"{folder.path} holds no promotion that this Turnout can read")
        self._request, self._state = request, state
        self._artifacts = ArtifactStore(Path(request.store))
        self._written = 0.0  # monotonic seconds

    def run(self) -> PromotionState:
        """Do what is left of it, and return how it ended."""
        self._say("waiting", message="waiting for another promotion to end")
        with queue_turn(Path(self._request.store)):
            try:
                result = self._registered_before() or self._make_and_register()
            except Refused as refused:
                self._end("failed", message=refused.message, result=refused.result)
            else:
                self._end("done", message="", stage="register", fraction=1.0, result=result)
        return self._state

    def _registered_before(self) -> dict[str, Any] | None:
        """What this very job registered before it was killed."""
        made = self._artifacts.made_by(self._request.job)
        return made.result if made else None

    def _make_and_register(self) -> dict[str, Any]:
        request, out = self._request, self._folder.path / "artifact"
        self._say("running", message="starting")
        made = self._make(request, out, self._folder.path / "work", self)
        if made.adapter_digest != request.adapter_digest:
            raise Refused(f"{request.revision} has become another adapter meanwhile")
        self._say("running", message="registering", stage="register", fraction=_MADE_SHARE)
        return self._artifacts.register(
            made.folder,
            adapter_digest=request.adapter_digest,
            base_digest=request.base_digest,
            revision=request.revision,
            job=request.job,
            settings={
                "merge_base": made.merge_base,
                "group_size": made.group_size,
                "asked": request.settings,
            },
            report=made.provenance,
        ).result

    def on_progress(self, stage: Stage, total: float, note: str) -> None:
        """Take in how far the making is; `total` is of all of it, 0 to 1."""
        is_same = (stage, "running") == (self._state.stage, self._state.status)
        if not is_same or time.monotonic() - self._written >= _WRITE_S:
            self._say("running", message=note, stage=stage, fraction=total * _MADE_SHARE)

    def on_wait(self, why: str) -> None:
        """Say that the making waits for something."""
        self._say("waiting", message=why)

    def _end(self, status: Status, **changes: Any) -> None:
        """Delete what the stages left, then say how it ended."""
        self._folder.clear()
        self._say(status, **changes)

    def _say(self, status: Status, **changes: Any) -> None:
        """Write the state; to the disk itself where status or stage is a new one."""
        now = time.time()
        before, self._state = (
            self._state,
            msgspec.structs.replace(self._state, status=status, updated=now, **changes),
        )
        if self._state.has_ended:
            self._state = msgspec.structs.replace(self._state, finished=now)
        is_new = (before.status, before.stage) != (self._state.status, self._state.stage)
        self._folder.write_state(self._state, sync=is_new)
        self._written = time.monotonic()


def step_aside() -> None:
    """Run only where nothing else wants to: a stream's next token comes first."""
    os.nice(19)
    with contextlib.suppress(OSError):  # a container may forbid it; nice stays
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
