"""A promotion on disk: what was asked for, how far it is, and whether somebody works on it.

root/promotions/<adapter digest>/
    request.json      what to make; never changes
    state.json        how far it is; replaced whole, by the job while it lives, else by the starter
    lock              held by the job; the starter takes it and hands it over, so there is no gap
    log.txt           what the job said
    work/, artifact/, rows.jsonl, …    what its stages read and leave; gone when it ends
root/promotions/queue     held by the one job that works; the others wait for it
root/promotions/.*        being made or deleted; swept on open

The process that holds the adapter store starts and ends jobs. The job outlives it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from adapters.store import file_sha256, sync_folder

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
Stage = Literal["merge", "quantize", "gate", "register"]
MergeBase = Literal["auto", "original", "dequantized"]
Device = Literal["cpu", "cuda"]
Backend = Literal["auto", "gptqmodel", "auto-round"]
STAGES: tuple[Stage, ...] = get_args(Stage)
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled")
WAITING = "waiting to be loaded"  # what is said of an artifact between its end and its serving

_REQUEST, _STATE, _LOCK, _LOG = "request.json", "state.json", "lock", "log.txt"
_KEPT = (_REQUEST, _STATE, _LOCK, _LOG)
_Kind = TypeVar("_Kind", bound=msgspec.Struct)


class PromotionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a job needs to know; paths are absolute."""

    job: str  # unlike any other
    adapter_digest: str
    revision: str  # name@number
    store: str
    base: str  # the checkpoint's folder
    base_name: str
    base_digest: str
    merge_base: MergeBase = "auto"
    group_size: int = 0  # 0: the largest of 128, 64, 32 that divides every layer's input width
    backend: Backend = "auto"  # what quantizes
    rows: str | None = None  # rows like those it was trained on: calibration, and the gate's
    rows_sha256: str | None = None  # of that file
    eval_rows: str | None = None  # the gate's, where they are in a file of their own
    eval_rows_sha256: str | None = None
    text: str | None = None  # general text to calibrate on
    text_sha256: str | None = None
    num_tokens: int = 16384  # of calibration
    gate: dict[str, float] = {}  # thresholds; what is not named has its default
    seed: int = 0
    device: Device = "cpu"
    wait_gpu_s: float = 0.0  # how long to wait for room on the GPU
    num_threads: int = 0  # 0: half of the cores
    allow_other_base: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two artifacts of one revision differ."""
        names = ("base_digest", "merge_base", "group_size", "backend", "rows_sha256",
                 "eval_rows_sha256", "text_sha256", "num_tokens", "gate", "seed")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def changed_files(self) -> list[str]:
        """Those of its files that are not what they were when it was asked for. Reads them."""
        fields = ("rows", "eval_rows", "text")
        files = [(getattr(self, name), getattr(self, f"{name}_sha256")) for name in fields]
        return [path for path, sha256 in files if sha256 and file_sha256(path) != sha256]


class PromotionState(msgspec.Struct, frozen=True, kw_only=True):
    """How far a promotion is."""

    status: Status
    stage: Stage | None = None
    fraction: float = 0.0  # of the whole
    message: str = ""
    attempt: int = 1
    started: float  # unix seconds, of the first attempt
    updated: float
    finished: float | None = None
    result: dict[str, Any] = {}  # the artifact's digest; what the gate measured

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ENDED


class Process(msgspec.Struct, frozen=True):
    """A process that no later one with the same pid is mistaken for."""

    pid: int
    began: str  # which boot, and how many ticks after it

    @property
    def is_alive(self) -> bool:
        """Whether it runs; one that has ended and was not waited for does not."""
        return _began(self.pid) == self.began

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process with this pid now; None where there is none."""
        began = _began(pid)
        return None if began is None else cls(pid, began)


class JobFolder:
    """One promotion's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / _LOG

    @classmethod
    def of(cls, root: Path, adapter_digest: str) -> "JobFolder":
        """The folder of an adapter revision's promotion, whether it is there or not."""
        return cls(promotions_folder(root) / adapter_digest)

    @classmethod
    def create(
        cls, root: Path, request: PromotionRequest, contents: Mapping[str, bytes]
    ) -> "JobFolder":
        """Write a new job, in the place of the last one, which must have ended.

        contents  of the request's `rows` and `eval_rows`, in JSON lines, that are kept with the job
        """
        promotions = promotions_folder(root)
        promotions.mkdir(parents=True, exist_ok=True)
        target = cls(promotions / request.adapter_digest)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=promotions))
        for field, content in contents.items():
            (new / f"{field}.jsonl").write_bytes(content)
            kept = {field: str(target.path / f"{field}.jsonl")}
            request = msgspec.structs.replace(request, **kept)
        now = time.time()
        (new / _REQUEST).write_bytes(msgspec.json.encode(request))
        state = PromotionState(status="waiting", started=now, updated=now, message="starting")
        cls(new).write_state(state)
        target.delete()
        new.rename(target.path)
        sync_folder(promotions)
        return target

    def request(self) -> PromotionRequest | None:
        """What is to be made; None where nobody can tell."""
        return _read(self.path / _REQUEST, PromotionRequest)

    def state(self) -> PromotionState | None:
        """How far it is; None where there is no promotion."""
        return _read(self.path / _STATE, PromotionState)

    def write_state(self, state: PromotionState, *, sync: bool = True) -> None:
        """Replace the state. Without `sync` a power cut may bring back the one before."""
        new = self.path / f".{_STATE}.{os.getpid()}"
        with new.open("wb") as file:
            file.write(msgspec.json.encode(state))
            if sync:
                file.flush()
                os.fsync(file.fileno())
        new.rename(self.path / _STATE)
        if sync:
            sync_folder(self.path)

    def take_lock(self) -> int | None:
        """Lock it for a job that is about to start; None while a job has it.

        Returns the open file: the lock lasts until every process that has it open has ended.
        """
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def is_running(self) -> bool:
        """Whether a job works on it."""
        if not self.path.is_dir():
            return False
        handle = self.take_lock()
        if handle is not None:
            os.close(handle)
        return handle is None

    def write_process(self, pid: int) -> None:
        """Say who has the lock."""
        process = Process.of(pid)
        if process is not None:
            (self.path / _LOCK).write_bytes(msgspec.json.encode(process))

    def process(self) -> Process | None:
        """Who has the lock, if it is still there."""
        found = _read(self.path / _LOCK, Process)
        return found if found is not None and found.is_alive else None

    def clear(self) -> None:
        """Delete what the stages left, their temporaries too. Nobody else must work on it."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # the rest goes with the folder
            elif path.name not in _KEPT:
                path.unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete it all; from here on nobody finds it. Nobody must work on it."""
        if self.path.is_dir():
            gone = Path(tempfile.mkdtemp(prefix=".gone-", dir=self.path.parent))
            self.path.rename(gone / self.path.name)
            shutil.rmtree(gone)


def promotions_folder(root: Path) -> Path:
    """Where the store at `root` keeps its promotions."""
    return root / "promotions"


def job_folders(root: Path) -> list[JobFolder]:
    """Every promotion's folder."""
    folder = promotions_folder(root)
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [JobFolder(path) for path in found]


def sweep_promotions(root: Path) -> list[str]:
    """Delete what a kill left half made or half deleted. For who holds the adapter store."""
    folder = promotions_folder(root)
    strays = sorted(folder.glob(".*")) if folder.is_dir() else []
    for path in strays:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in strays]


@contextlib.contextmanager
def queue_turn(root: Path) -> Iterator[None]:
    """Wait until no other job works, and keep others waiting."""
    path = promotions_folder(root) / "queue"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _began(pid: int) -> str | None:
    """When a process began; None where there is none, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name may hold blanks and brackets
    return None if fields[0] in "ZX" else f"{boot}+{fields[19]}"


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None
