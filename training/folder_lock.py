"""Keeps two processes out of one folder, and leaves nothing in it."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is not there. Raises ValueError where another process does."""
    handle = _hold(folder)
    try:
        yield
    finally:
        os.close(handle)


def _hold(folder: Path) -> int:
    """Open and lock the folder that is there now: its last holder may be removing it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, handle)
            _lock(handle, folder)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                opened.pop_all()
                return handle


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}") from None
    except OSError:  # NFS has no locks on folders
        log.warning("%s: its file system cannot keep other processes out of it", folder)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Hold a folder that is empty at first and gone at the end, whatever a killed process left."""
    with locked(folder):
        empty(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # its next holder empties it


def empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
