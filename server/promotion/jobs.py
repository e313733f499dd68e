"""Starts promotions as processes of their own, finds them again, and ends them.

A job outlives whoever started it. Only the process that holds the adapter store uses this.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from adapters.artifacts import Artifact, ArtifactStore
from adapters.manifest import AdapterConflict, AdapterNotFound, show
from adapters.promotions import (
    JobFolder,
    PromotionRequest,
    PromotionState,
    job_folders,
    promotions_folder,
    sweep_promotions,
)

COMMAND = (sys.executable, "-m", "training.promote")
MAX_ATTEMPTS = 3  # of a job whose process dies with the server's, or the machine
_ROOT = Path(__file__).parent.parent.parent  # where `training` is, installed or not
_TERM_S = 2.0  # between asking a job to end and ending it
_KILL_S = 10.0  # for the kernel to do so
_POLL_S = 0.02
_REAP_S = 1.0  # a process lets go of its lock a moment before it can be waited for
_LOG_CHARS = 300

log = logging.getLogger(__name__)


class Jobs:
    """Every promotion of one store. Methods block for as long as the disk does, `cancel` longer.

    Safe from any thread. Invariant: at most one process works on an adapter revision.
    """

    def __init__(self, store: Path, command: tuple[str, ...] = COMMAND) -> None:
        self._store, self._command = store.resolve(), command
        self._artifacts = ArtifactStore(self._store)
        self._changing = threading.Lock()
        self._children: dict[str, int] = {}  # adapter digest -> pid, until it was waited for

    def start(
        self, request: PromotionRequest, contents: Mapping[str, bytes] = MappingProxyType({})
    ) -> PromotionState:
        """Start a job; `contents` is JobFolder.create's.

        Raises AdapterConflict while one works on the same revision.
        """
        with self._changing:
            folder = self._folder(request.adapter_digest)
            before = folder.state()
            if before is not None and before.has_ended:
                self._await_exit(folder)
            if folder.is_running():
                how = "in an unknown state" if before is None else describe(before)
                raise AdapterConflict(
                    f"A promotion of {request.revision} is under way: {how}. "
                    "Wait for it, or cancel it."
                )
            folder = JobFolder.create(self._store, request, contents)
            self._spawn(folder, request)
            state = folder.state()
            assert state is not None, "written a moment ago"
            return state

    def state(self, adapter_digest: str) -> PromotionState | None:
        """How far an adapter revision's promotion is; None where there was none.

        One whose process has died without a word is over: failed, with what is known of it.
        """
        folder = self._folder(adapter_digest)
        state = folder.state()
        if state is None or state.has_ended:
            self._reap(adapter_digest)
            return state
        with self._changing:
            if folder.is_running():
                return folder.state()
            state = folder.state()  # it may have ended meanwhile
            if state is None or state.has_ended:
                return state
            return self._finish(folder, state, "failed", self._last_words(folder))

    def process_id(self, adapter_digest: str) -> int | None:
        """The pid of who works on it."""
        process = self._folder(adapter_digest).process()
        return None if process is None else process.pid

    def running(self) -> list[str]:
        """The adapter digests of the promotions that have not ended."""
        return [digest for digest in self._digests() if self._is_open(digest)]

    def cancel(self, adapter_digest: str) -> PromotionState:
        """End a promotion and delete what it left. Raises AdapterNotFound where none is under way.

        It has ended when this returns; an artifact it had just registered is deleted again.
        """
        folder = self._folder(adapter_digest)
        state = self.state(adapter_digest)
        if state is None or state.has_ended:
            raise AdapterNotFound(f"No promotion of {show(adapter_digest[:12])} is under way.")
        with self._changing:
            self._kill(folder)
            state = folder.state() or state
            made = self._made(folder)
            if made is not None:
                self._artifacts.remove(made.digest)
            return self._finish(folder, state, "cancelled", "cancelled by an operator")

    def forget(self, adapter_digest: str) -> None:
        """End and delete the promotion of an adapter revision that is gone."""
        folder = self._folder(adapter_digest)
        with self._changing:
            if folder.is_running():
                self._kill(folder)
            folder.delete()

    def recover(self) -> None:
        """Take over what an earlier process left: follow what runs, go on with what died.

        What has died `MAX_ATTEMPTS` times is failed and cleaned up.
        """
        sweep_promotions(self._store)
        for folder in job_folders(self._store):
            with self._changing:
                self._recover(folder)

    def _recover(self, folder: JobFolder) -> None:
        request, state = folder.request(), folder.state()
        if folder.is_running():
            log.info("promotion found running", extra={"adapter": folder.path.name})
        elif request is None or state is None or request.store != str(self._store):
            folder.delete()
        elif state.has_ended:
            folder.clear()
        elif state.attempt >= MAX_ATTEMPTS:
            message = f"its process died {state.attempt} times: {self._last_words(folder)}"
            self._finish(folder, state, "failed", message)
        else:
            folder.write_state(
                msgspec.structs.replace(state, status="waiting", attempt=state.attempt + 1)
            )
            log.info("promotion goes on", extra={"adapter": request.revision})
            self._spawn(folder, request)

    def _spawn(self, folder: JobFolder, request: PromotionRequest) -> None:
        """Start the job's process, in a process group of its own, and hand it the lock."""
        lock = folder.take_lock()
        while lock is None:  # somebody looks whether it runs, this very moment
            time.sleep(_POLL_S)
            lock = folder.take_lock()
        environment = dict(os.environ)
        threads = request.num_threads or max((os.cpu_count() or 2) // 2, 1)
        environment["OMP_NUM_THREADS"] = str(threads)
        if request.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # no context on the GPU that serves
        try:
            with folder.log.open("ab") as output:
                child = subprocess.Popen(
                    [*self._command, str(folder.path)],
                    cwd=_ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        finally:
            os.close(lock)  # the child has it now
        folder.write_process(child.pid)
        self._children[request.adapter_digest] = child.pid
        child.returncode = 0  # `_reap` waits for it; a Popen would complain of one that outlives it

    def _kill(self, folder: JobFolder) -> None:
        """End every process that works on it. Returns when the lock is free."""
        deadline = time.monotonic() + _TERM_S
        number = signal.SIGTERM
        while folder.is_running():
            if time.monotonic() > deadline:
                if number == signal.SIGKILL:
                    raise TimeoutError(f"kill -9 did not end who works on {folder.path}")
                number, deadline = signal.SIGKILL, time.monotonic() + _KILL_S
            process = folder.process()
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            self._reap(folder.path.name)
            time.sleep(_POLL_S)
        self._reap(folder.path.name)

    def _await_exit(self, folder: JobFolder) -> None:
        """A job that has said how it ended may still be deleting what its stages left."""
        deadline = time.monotonic() + _KILL_S
        while folder.is_running() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._reap(folder.path.name)

    def _finish(
        self, folder: JobFolder, state: PromotionState, status: str, message: str
    ) -> PromotionState:
        """Write down how a job ended that can no longer do so, and delete what it left."""
        made, now = self._made(folder), time.time()
        ended = msgspec.structs.replace(
            state, status=status, message=message, updated=now, finished=now
        )
        if made is not None:  # it died between registering and saying so
            ended = msgspec.structs.replace(
                ended, status="done", stage="register", fraction=1.0, message="", result=made.result
            )
        folder.write_state(ended)
        folder.clear()
        return ended

    def _made(self, folder: JobFolder) -> Artifact | None:
        """What the folder's job has registered."""
        request = folder.request()
        return None if request is None else self._artifacts.made_by(request.job)

    def _last_words(self, folder: JobFolder) -> str:
        """Why a job's process may have ended: its exit code, if it was ours, and its log's end."""
        code = self._reap(folder.path.name, within_s=_REAP_S)
        how = "ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        text = folder.log.read_text(errors="replace") if folder.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        said = f"; the last line of its log: {lines[-1][:_LOG_CHARS]}" if lines else ""
        return f"its process {how}{said}"

    def _reap(self, adapter_digest: str, within_s: float = 0.0) -> int | None:
        """The exit code of a child of ours that has ended, or does so soon."""
        pid = self._children.get(adapter_digest)
        deadline = time.monotonic() + within_s
        while pid is not None:
            try:
                ended, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # another thread was here first
                ended, status = pid, None
            if ended:
                if self._children.get(adapter_digest) == pid:
                    del self._children[adapter_digest]
                return None if status is None else os.waitstatus_to_exitcode(status)
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        return None

    def _is_open(self, adapter_digest: str) -> bool:
        state = self.state(adapter_digest)
        return state is not None and not state.has_ended

    def _digests(self) -> list[str]:
        return [folder.path.name for folder in job_folders(self._store)]

    def _folder(self, adapter_digest: str) -> JobFolder:
        return JobFolder(promotions_folder(self._store) / adapter_digest)


def describe(state: PromotionState) -> str:
    """A promotion in a few words."""
    stage = f", {state.stage}" if state.stage else ""
    return f"{state.status}{stage}, {state.fraction:.0%}" + (
        f" ({state.message})" if state.message else ""
    )
