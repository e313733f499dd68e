"""Promoted adapters: a merged, quantized model for each, as a folder of plain files.

root/artifacts/<digest>/           a checkpoint folder and `artifact.json`, complete and synced
root/artifacts/<digest>.demoted    it is kept and not served
root/artifacts/.gone-*             being deleted; swept on open

The folder appears by one rename and goes by one, so half an artifact has no name. Its digest is the
sha256 over every file's, the adapter's and the base's digest; the adapter's alone finds it.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from adapters.manifest import AdapterNotFound, show
from adapters.store import file_sha256, sync_folder

FORMAT = 1
RECORD_FILE = "artifact.json"
_DEMOTED = ".demoted"
_GONE = ".gone-"
_CLOCK_NS = 100_000_000  # file times are no finer than the kernel's tick, 10 ms at most


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """What `artifact.json` says."""

    digest: str  # of the artifact; the folder's name
    adapter_digest: str  # of the revision that was merged
    base_digest: str  # of the base it was merged into
    revision: str  # name@number, as it was called when it was promoted
    job: str  # which promotion made it
    created: float  # unix seconds
    files: dict[str, str]  # path in the folder -> sha256
    num_bytes: int  # of those files
    settings: dict[str, Any]  # how it was made; changes no answer by itself
    report: dict[str, Any]  # what the quality gate measured
    format: int = FORMAT

    @property
    def result(self) -> dict[str, Any]:
        """What the state of the promotion that made it says of it."""
        return {"artifact": self.digest, "gate": self.report.get("gate")}


class ArtifactStore:
    """Owns `root/artifacts`. Any process may register; who holds the adapter store may delete."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "artifacts"
        self._seen: tuple[int, dict[str, Artifact]] = (-1, {})  # the folder's time, what it held

    def path(self, digest: str) -> Path:
        """The checkpoint folder of an artifact."""
        return self.folder / digest

    def register(
        self,
        made: Path,
        *,
        adapter_digest: str,
        base_digest: str,
        revision: str,
        job: str,
        settings: dict[str, Any],
        report: dict[str, Any],
    ) -> Artifact:
        """Move the checkpoint folder `made`, on the same file system, to its digest's place.

        It is there whole, with every byte on the disk, or not at all. Registering what is there
        already leaves that in place, unless it is damaged, and deletes `made`.
        """
        (made / RECORD_FILE).unlink(missing_ok=True)  # of a try that was killed
        files = _hash_files(made)
        artifact = Artifact(
            digest=_digest(files, adapter_digest, base_digest),
            adapter_digest=adapter_digest,
            base_digest=base_digest,
            revision=revision,
            job=job,
            created=time.time(),
            files=files,
            num_bytes=sum((made / name).stat().st_size for name in files),
            settings=settings,
            report=report,
        )
        (made / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(artifact)))
        _sync_tree(made)
        self.folder.mkdir(parents=True, exist_ok=True)
        there = self._read(artifact.digest)
        if there is not None and self.is_whole(artifact.digest):
            self._delete(made)
            return there
        self.remove(artifact.digest)
        made.rename(self.path(artifact.digest))
        sync_folder(self.folder)
        return artifact

    def every(self) -> list[Artifact]:
        """Every artifact, oldest first."""
        return sorted(self._all().values(), key=lambda artifact: artifact.created)

    def get(self, digest: str) -> Artifact:
        """One artifact. Raises AdapterNotFound."""
        found = self._all().get(digest)
        if found is None:
            raise AdapterNotFound(f"There is no artifact {show(digest)}.")
        return found

    def find(self, adapter_digest: str) -> Artifact | None:
        """The newest artifact of an adapter's revision."""
        mine = [found for found in self.every() if found.adapter_digest == adapter_digest]
        return mine[-1] if mine else None

    def made_by(self, job: str) -> Artifact | None:
        """What a promotion has registered."""
        return next((found for found in self.every() if found.job == job), None)

    def reuse(self, adapter_digest: str, asked: dict[str, Any]) -> bool:
        """Whether the revision has an artifact made as `asked`: whole, and from now on served.

        A damaged one is deleted.
        """
        there = self.find(adapter_digest)
        if there is None or there.settings.get("asked") != asked:
            return False
        if not self.is_whole(there.digest):
            self.remove(there.digest)
            return False
        self.restore(there.digest)
        return True

    def is_whole(self, digest: str) -> bool:
        """Whether the artifact's files still make its digest (reads every byte)."""
        artifact = self._read(digest)
        if artifact is None:
            return False
        try:
            files = _hash_files(self.path(digest))
        except ValueError:  # a link, say
            return False
        files.pop(RECORD_FILE, None)
        return _digest(files, artifact.adapter_digest, artifact.base_digest) == digest

    def is_demoted(self, digest: str) -> bool:
        """Whether it is kept without being served."""
        return (self.folder / f"{digest}{_DEMOTED}").exists()

    def demote(self, digest: str) -> None:
        """Keep it and do not serve it, also after a restart."""
        self.get(digest)
        (self.folder / f"{digest}{_DEMOTED}").touch()
        sync_folder(self.folder)

    def restore(self, digest: str) -> None:
        """Take `demote` back."""
        self.get(digest)
        (self.folder / f"{digest}{_DEMOTED}").unlink(missing_ok=True)
        sync_folder(self.folder)

    def remove(self, digest: str) -> None:
        """Delete an artifact; from here on nobody finds it, whatever interrupts the rest."""
        if self.path(digest).exists():
            self._delete(self.path(digest))
        (self.folder / f"{digest}{_DEMOTED}").unlink(missing_ok=True)

    def remove_of(self, adapter_digest: str, *, but: str | None = None) -> list[str]:
        """Delete an adapter revision's artifacts, except the one called `but`; return which."""
        mine = [a.digest for a in self.every() if a.adapter_digest == adapter_digest]
        gone = [digest for digest in mine if digest != but]
        for digest in gone:
            self.remove(digest)
        return gone

    def sweep(self, adapter_digests: Collection[str]) -> list[str]:
        """Delete what a kill left, artifacts of no such adapter, and all but the newest of each.

        Returns the names of what went. Only for who holds the adapter store.
        """
        if not self.folder.is_dir():
            return []
        there = list(self.folder.iterdir())  # before the look: a job may register in between
        newest = {a.adapter_digest: a.digest for a in self.every()}
        keep = {newest[adapter] for adapter in newest.keys() & set(adapter_digests)}
        strays = [
            path
            for path in there
            if path.name.removesuffix(_DEMOTED) not in keep or path.name.startswith(_GONE)
        ]
        for path in strays:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            elif path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)  # a job may be at it
            else:
                self.remove(path.name)
        return [path.name for path in strays]

    def _delete(self, path: Path) -> None:
        """Delete a folder of this file system. A kill leaves all of it under its name, or none."""
        gone = Path(tempfile.mkdtemp(prefix=_GONE, dir=self.folder))
        with contextlib.suppress(FileNotFoundError):  # another thread deletes it too
            path.rename(gone / path.name)
        shutil.rmtree(gone, ignore_errors=True)  # a sweep may be at it

    def _all(self) -> dict[str, Artifact]:
        """By digest. Renames change the folder's time, so most calls read nothing else."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        is_settled = time.time_ns() - changed > _CLOCK_NS  # else it may change within its own tick
        if self._seen[0] != changed or not is_settled:
            names = [path.name for path in self.folder.iterdir() if path.name[0] != "."]
            found = {name: self._read(name) for name in names if not name.endswith(_DEMOTED)}
            self._seen = changed, {name: each for name, each in found.items() if each is not None}
        return self._seen[1]

    def _read(self, digest: str) -> Artifact | None:
        """None for what is no artifact: somebody else's folder, or a record nobody can read."""
        try:
            text = (self.path(digest) / RECORD_FILE).read_bytes()
            artifact = msgspec.json.decode(text, type=Artifact)
        except (OSError, msgspec.MsgspecError):
            return None
        return artifact if artifact.digest == digest and artifact.format == FORMAT else None


def _digest(files: dict[str, str], adapter_digest: str, base_digest: str) -> str:
    identity = {"format": FORMAT, "adapter": adapter_digest, "base": base_digest, "files": files}
    return hashlib.sha256(msgspec.json.encode(identity, order="sorted")).hexdigest()


def _hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file beneath the folder. Raises ValueError for anything but plain files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no plain file; an artifact holds nothing else")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = file_sha256(path)
    if not found:
        raise ValueError(f"{folder} holds no files")
    return found


def _sync_tree(folder: Path) -> None:
    """Make every file and folder in it survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
