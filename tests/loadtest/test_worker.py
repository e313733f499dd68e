"""The sending process, driven in this one: what it writes and when."""

import asyncio
import gc
import io
import sys
import threading
import time

import msgspec
import pytest

from loadtest import worker
from loadtest.connection import clock
from loadtest.record import Record
from loadtest.replay import Share, prepare
from loadtest.target import Target
from loadtest.worker import main, work
from tests.loadtest.making import line, lines
from tests.loadtest.stub import Behaviour, Stub


class Slow(io.BytesIO):
    """A reader's end that takes its time over every write."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def write(self, data: object) -> int:
        self.threads.append(threading.current_thread().name)
        time.sleep(0.2)
        return super().write(data)  # type: ignore[arg-type]


def batches(written: bytes) -> list[list[Record]]:
    return [msgspec.json.decode(text, type=list[Record]) for text in written.splitlines()]


async def worked(share: Share, out: io.BytesIO) -> list[list[Record]]:
    await work(share, prepare(share), clock(), out)
    return batches(out.getvalue())


async def test_records_are_written_while_requests_are_under_way(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_FLUSH_S", 0.05)
    stub.models = {"slow": Behaviour(ttft_s=0.4)}
    share = Share(target=Target(url=stub.url), lines={0: line(), 1: line(model="slow")})
    written = await worked(share, io.BytesIO())
    assert [each.index for each in written[0]] == [0]
    assert [each.index for each in written[-1]] == [1]


async def test_every_record_is_written_once_whatever_the_flushes(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_FLUSH_S", 0.005)
    share = Share(target=Target(url=stub.url), lines=dict(enumerate(lines(30, every_s=0.005))))
    written = await worked(share, io.BytesIO())
    indices = [each.index for batch in written for each in batch]
    assert sorted(indices) == list(range(30))
    assert len(written) > 2


async def test_a_slow_reader_holds_no_request_up(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_FLUSH_S", 0.01)
    out = Slow()
    share = Share(target=Target(url=stub.url), lines=dict(enumerate(lines(10, every_s=0.05))))
    written = await worked(share, out)
    assert sum(len(batch) for batch in written) == 10
    assert all(name.startswith("asyncio_") for name in out.threads)  # another thread's


async def test_all_is_written_before_the_work_is_said_to_be_done(stub: Stub) -> None:
    """The line that ends a share must never come before its last records."""
    share = Share(target=Target(url=stub.url), lines=dict(enumerate(lines(3, every_s=0.001))))
    out = Slow()
    written = await worked(share, out)
    assert sum(len(batch) for batch in written) == 3


async def test_what_fails_in_the_process_is_not_swallowed() -> None:
    share = Share(target=Target(url="http://127.0.0.1:9"), lines={0: line()})
    with pytest.raises(ExceptionGroup):
        await work(share, {}, clock(), io.BytesIO())  # nothing was prepared


class Pipes:
    """stdin and stdout as `main` sees them."""

    def __init__(self, said: bytes) -> None:
        self.stdin, self.stdout = io.BytesIO(said), io.BytesIO()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Wrapper:
            def __init__(self, buffer: io.BytesIO) -> None:
                self.buffer = buffer

        monkeypatch.setattr(sys, "stdin", Wrapper(self.stdin))
        monkeypatch.setattr(sys, "stdout", Wrapper(self.stdout))


def test_one_share_after_the_other_until_stdin_ends(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b""
    for index in (3, 4):
        share = Share(target=Target(url=stub.url), lines={index: line()})
        said += msgspec.json.encode(share) + b"\n" + msgspec.json.encode(clock()) + b"\n"
    pipes = Pipes(said)
    pipes.install(monkeypatch)
    main()
    ready, first, over, ready_again, second, over_again = pipes.stdout.getvalue().split(b"\n")[:6]
    assert (ready, over, ready_again, over_again) == (b"", b"", b"", b"")
    assert [[each.index for each in batch] for batch in batches(first + b"\n" + second)] == [
        [3],
        [4],
    ]
    assert gc.isenabled()


def test_a_process_told_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = Pipes(b"")
    pipes.install(monkeypatch)
    main()
    assert pipes.stdout.getvalue() == b""


def test_collections_rest_while_requests_are_sent(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    async def watching(*_: object) -> None:
        seen.append(gc.isenabled())

    monkeypatch.setattr(worker, "work", watching)
    share = Share(target=Target(url=stub.url), lines={0: line()})
    Pipes(msgspec.json.encode(share) + b"\n1.0\n").install(monkeypatch)
    main()
    assert seen == [False]


async def test_the_flusher_ends_with_the_work(stub: Stub) -> None:
    share = Share(target=Target(url=stub.url), lines={0: line()})
    before = asyncio.all_tasks()
    await worked(share, io.BytesIO())
    assert asyncio.all_tasks() == before
