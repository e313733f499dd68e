"""Sends from several processes at once, so that no interpreter's lock holds a request up."""

import asyncio
import contextlib
import math
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from loadtest.connection import clock
from loadtest.record import Record
from loadtest.replay import Share
from loadtest.target import Target
from loadtest.trace import Line, duration_s, is_closed_loop

OnRecords = Callable[[list[Record]], None]

_ROOT = Path(__file__).parent.parent
_LEAD_S = 0.1  # from telling the processes when to begin until then
_RATE_PER_WORKER = 100.0  # requests per second that leave a process mostly idle
_USERS_PER_WORKER = 32
_MAX_LINE_BYTES = 1 << 30


def auto_workers(lines: Sequence[Line]) -> int:
    """How many processes a trace wants: as few as are mostly idle, one per core at most."""
    if is_closed_loop(lines):
        wanted = len({line.user for line in lines}) / _USERS_PER_WORKER
    else:
        wanted = len(lines) / max(1.0, duration_s(lines)) / _RATE_PER_WORKER
    return max(1, min(os.cpu_count() or 1, math.ceil(wanted)))


def split(target: Target, lines: Sequence[Line], keep_text: set[int], count: int) -> list[Share]:
    """Deal a trace's lines to `count` processes; a user's all go to one. No share is empty."""
    shares = [Share(target=target, lines={}, keep_text=set()) for _ in range(count)]
    for index, line in enumerate(lines):
        share = shares[(index if line.user is None else line.user) % count]
        share.lines[index] = line
        if index in keep_text:
            share.keep_text.add(index)
    return [share for share in shares if share.lines]


class Fleet:
    """Sending processes, started as they are needed and used again for the next trace.

    An async context manager: the processes are gone when it is left.
    """

    def __init__(self, num_workers: int = 0) -> None:
        """`num_workers` processes send each trace; 0: as many as it wants."""
        self._num_workers = num_workers
        self._workers: list[_Worker] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _together(worker.stop() for worker in self._workers)

    def workers_for(self, lines: Sequence[Line]) -> int:
        """How many processes send a trace: no more than it has requests."""
        return min(self._num_workers or auto_workers(lines), len(lines))

    async def send(
        self,
        target: Target,
        lines: Sequence[Line],
        *,
        keep_text: set[int] | None = None,
        on_records: OnRecords = lambda records: None,
    ) -> list[Record]:
        """Replay a trace. `on_records` sees records as they come. Returns them all, by index."""
        shares = split(target, lines, keep_text or set(), self.workers_for(lines))
        while len(self._workers) < len(shares):
            worker = _Worker()
            self._workers.append(worker)
            await worker.start()
        records: list[Record] = []

        def take(new: list[Record]) -> None:
            records.extend(new)
            on_records(new)

        busy = list(zip(self._workers, shares, strict=False))
        await _together(worker.load(share) for worker, share in busy)
        begin = clock() + _LEAD_S
        await _together(worker.run(begin, take) for worker, _ in busy)
        assert len(records) == len(lines), f"{len(records)} records of {len(lines)} requests"
        return sorted(records, key=lambda record: record.index)


async def _together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them all at once; the first that fails ends the others, and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Worker:
    """A process and its pipes."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it."""
        search = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadtest.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search},
            limit=_MAX_LINE_BYTES,
        )  # fmt: skip

    async def load(self, share: Share) -> None:
        """Hand it a share and wait until it is ready to send."""
        await self._tell(msgspec.json.encode(share))
        await self._line()

    async def run(self, begin: float, take: OnRecords) -> None:
        """Let it send from `begin` on, and take its records until it has them all."""
        await self._tell(msgspec.json.encode(begin))
        while (line := await self._line()) != b"\n":
            take(msgspec.json.decode(line, type=list[Record]))

    async def stop(self) -> None:
        """Kill it if it still runs."""
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.communicate()

    async def _tell(self, line: bytes) -> None:
        assert self._process is not None, "started"
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        # A process that has ended is found out by the line that it does not write.
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.drain()

    async def _line(self) -> bytes:
        assert self._process is not None, "started"
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = await self._process.stdout.readline()
        if not line:
            said = (await self._process.stderr.read()).decode(errors="replace")
            raise ChildProcessError(f"a sending process ended early: {said[-2000:]}")
        return line
