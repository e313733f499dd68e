"""Where adapters' bytes are: one immutable file per digest, owned by one process at a time.

root/objects/<digest>.safetensors    complete and synced before any row names it
root/tmp/                            being written; swept on open
root/registry.sqlite                 registry.py's rows
root/lock                            held by one process, which says in it where it serves
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Sidecar,
    open_regular,
    read_sidecar,
    read_small,
)
from adapters.header import read_header
from adapters.manifest import (
    AdapterManifest,
    AdapterNotFound,
    BaseShape,
    Limits,
    ModuleEntry,
    StoreBusy,
    count_rank_rows,
    show,
)
from adapters.peft_config import read_peft_config
from adapters.weights import Copy, match_tensors, object_digest, read_object, write_object

SUFFIX = ".safetensors"


def object_path(root: Path, digest: str) -> Path:
    """Where the store at `root` keeps the object; a lease on the digest keeps it there."""
    return root / "objects" / f"{digest}{SUFFIX}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedObject:
    """A validated, synced object that is not in the store yet: put it, or discard it."""

    path: Path
    digest: str
    manifest: AdapterManifest
    declared_base: str | None  # what the adapter's config calls its base
    training: dict[str, Any]  # how it was made, from turnout.json; changes no answer
    mismatches: dict[str, str]  # field of turnout.json -> what differs here, overlooked on request

    def discard(self) -> None:
        """Delete the file if it was not put."""
        self.path.unlink(missing_ok=True)


class Store:
    """Owns the folder `root`: while this is open, no other process can open it."""

    def __init__(self, root: Path, lock_file: int) -> None:
        self.root = root
        self.objects = root / "objects"
        self._tmp = root / "tmp"
        self._lock_file = lock_file

    @classmethod
    def open(cls, root: Path, url: str | None = None) -> "Store":
        """Take the store at `root`, made if needed, and say that it is served at `url`.

        Raises StoreBusy, with the holder's url, while another process holds it.
        """
        for folder in (root, root / "objects", root / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        store = cls(root, _take_lock(root, url))
        for leftover in store._tmp.iterdir():
            leftover.unlink()
        return store

    def close(self) -> None:
        """Let another process open the store."""
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def stage(
        self, folder: Path, base: BaseShape, limits: Limits, *, allow_mismatch: bool = False
    ) -> StagedObject:
        """Validate the adapter in `folder` and write it beside the store, complete and synced."""
        config = read_peft_config(read_small(folder, CONFIG_FILE), base, limits)
        sidecar = read_sidecar(folder, base, allow_mismatch=allow_mismatch)
        limits.check_fit(count_rank_rows(config.modules))
        with open_regular(folder, WEIGHTS_FILE) as source:
            header = read_header(source, WEIGHTS_FILE, max_bytes=limits.max_bytes)
            copies = match_tensors(header, config.modules, base)
            manifest = _manifest(config.modules, copies, sidecar)
            path, digest = self._write(source, copies, manifest)
        return StagedObject(
            path=path,
            digest=digest,
            manifest=manifest,
            declared_base=config.declared_base,
            training=sidecar.training,
            mismatches=sidecar.mismatches,
        )

    def put(self, staged: StagedObject) -> None:
        """Move a staged object to its digest's place. It must get a row, or `remove` it.

        What is there already has the same bytes, or is damaged and made whole.
        """
        staged.path.rename(object_path(self.root, staged.digest))
        sync_folder(self.objects)

    def has(self, digest: str) -> bool:
        """Whether the object is there."""
        return object_path(self.root, digest).exists()

    def remove(self, digest: str) -> None:
        """Free the object's disk bytes."""
        object_path(self.root, digest).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> list[str]:
        """Delete every object whose digest is not in `keep`; return the names of what went."""
        strays = [
            path
            for path in self.objects.iterdir()
            if path.suffix != SUFFIX or path.stem not in keep
        ]
        for path in strays:
            path.unlink()
        return [path.name for path in strays]

    def manifest(self, digest: str) -> AdapterManifest:
        """Read an object's manifest."""
        if not self.has(digest):
            raise AdapterNotFound(f"The store holds no object {show(digest)}.")
        return read_object(object_path(self.root, digest))[0]

    def is_whole(self, digest: str) -> bool:
        """Whether the object's bytes still make its digest (reads them all)."""
        return self.has(digest) and object_digest(object_path(self.root, digest)) == digest

    def _write(
        self, source: BinaryIO, copies: tuple[Copy, ...], manifest: AdapterManifest
    ) -> tuple[Path, str]:
        handle, name = tempfile.mkstemp(dir=self._tmp, suffix=SUFFIX)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as target:
                digest = write_object(source, copies, manifest, target)
                target.flush()
                os.fsync(target.fileno())
        except BaseException:
            path.unlink()
            raise
        return path, digest


def file_sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_lock(root: Path, url: str | None) -> int:
    """Lock the store's lock file and write into it who holds it; return the open file."""
    handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 1 << 16, 0)
        os.close(handle)
        raise StoreBusy(root, _holder_url(holder)) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "url": url}).encode(), 0)
    return handle


def _holder_url(text: bytes) -> str | None:
    """What the holder wrote; None where it serves nothing or has not written yet."""
    with contextlib.suppress(ValueError):
        holder = json.loads(text)
        if isinstance(holder, dict) and isinstance(holder.get("url"), str):
            return str(holder["url"])
    return None


def _manifest(
    modules: tuple[ModuleEntry, ...], copies: tuple[Copy, ...], sidecar: Sidecar
) -> AdapterManifest:
    return AdapterManifest(
        modules=modules,
        num_parameters=sum(copy.source.num_elements for copy in copies),
        num_bytes=sum(copy.source.num_bytes for copy in copies),
        rope=sidecar.rope,
        chat_template=sidecar.chat_template,
    )
