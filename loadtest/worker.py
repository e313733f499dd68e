"""One sending process: shares of traces come on stdin, their records go out on stdout.

In:   a Share as one line of JSON; then, when every process is ready, the time to begin.
Out:  an empty line when ready; then lines of JSON, each the records since the line before; then
      an empty line. After it the next share may come; at the end of stdin the process ends, and
      so it does, whatever it is doing, when the process that started it is no more.
"""

import asyncio
import contextlib
import gc
import os
import resource
import sys
from typing import BinaryIO

import msgspec
import uvloop

from loadtest.record import Record
from loadtest.replay import Share, prepare, replay

_FLUSH_S = 0.25


async def work(share: Share, prepared: dict[int, bytes], begin: float, out: BinaryIO) -> None:
    """Replay the share, writing records as they come to be."""
    records: list[Record] = []
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_flush(records, out, over, os.getppid()))
        try:
            await replay(share, prepared, begin, records.append)
        finally:
            over.set()


async def _flush(records: list[Record], out: BinaryIO, over: asyncio.Event, parent: int) -> None:
    """Write what has come to be, every so often, until the work is over and all is written."""
    while not over.is_set() or records:
        if os.getppid() != parent:
            raise ChildProcessError("nobody is left to read the records")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await over.wait()
        if records:
            ready = records.copy()
            records.clear()
            # In a thread: should the reader be busy, sending goes on.
            await asyncio.to_thread(_write, ready, out)


def _write(records: list[Record], out: BinaryIO) -> None:
    out.write(msgspec.json.encode(records) + b"\n")
    out.flush()


def main() -> None:
    """Work on what stdin says until it ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
    while line := stdin.readline():
        share = msgspec.json.decode(line, type=Share)
        prepared = prepare(share)
        gc.collect()
        gc.disable()  # a collection would hold up what is to be sent
        _say_nothing(stdout)
        begin = msgspec.json.decode(stdin.readline(), type=float)
        uvloop.run(work(share, prepared, begin, stdout))
        gc.enable()
        _say_nothing(stdout)


def _say_nothing(out: BinaryIO) -> None:
    out.write(b"\n")
    out.flush()


if __name__ == "__main__":
    main()
