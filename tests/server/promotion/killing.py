"""Run something in a forked child and kill -9 it before its n-th touch of the file system."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_TOUCHES = ("open", "os.", "shutil.")


def run_and_kill(work: Callable[[], object], at: int | None) -> bool:
    """Whether `work` ended by itself; `at` counts opens, renames, deletions and the like from 0."""
    child = os.fork()
    if child == 0:
        _be_killed(at)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def count_touches(work: Callable[[], object]) -> int:
    """How many points there are to kill `work` at. Runs it to its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            count += event.startswith(_TOUCHES)

        sys.addaudithook(hook)
        work()
        os.write(writer, str(count).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return int(said.read())


def _be_killed(at: int | None) -> None:
    left = at

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if left is not None and event.startswith(_TOUCHES):
            left -= 1
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
