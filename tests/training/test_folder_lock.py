"""One process at a time in a folder."""

import fcntl
import multiprocessing
from pathlib import Path

import pytest

from training.folder_lock import locked


def hold_and_die(folder: Path) -> None:
    locked(folder).__enter__()


def test_a_folder_is_held_until_it_is_let_go_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with pytest.raises(ValueError, match="another process is at work in"), locked(folder):
            pass
        assert list(folder.iterdir()) == []
    with locked(folder):
        pass


def test_a_process_that_died_holds_nothing(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    with locked(tmp_path):
        pass


def test_a_folder_that_its_last_holder_removed_is_made_and_held_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the last one removes it and a third one makes another."""
    folder, flock = tmp_path / "folder", fcntl.flock
    made_again = [True, False]

    def late(handle: int, how: int) -> None:
        if made_again:
            folder.rmdir()
            if made_again.pop(0):
                folder.mkdir()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(folder):
        assert not made_again, "both were noticed"
        with pytest.raises(ValueError, match="another process is at work in"), locked(folder):
            pass


def test_a_file_system_without_such_locks_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(handle: int, how: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", bad)
    with locked(tmp_path):
        assert "cannot keep other processes out" in caplog.text
