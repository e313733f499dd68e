"""Several processes send one trace, and none is left behind."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtest.connection import clock
from loadtest.fleet import _ROOT, Fleet, auto_workers, split
from loadtest.record import Record
from loadtest.replay import Share
from loadtest.target import Target
from tests.loadtest.making import line, lines
from tests.loadtest.stub import Behaviour, Stub
from tests.server.processes import is_alive


def children(of: int | str = "self") -> list[int]:
    """This process's own, or another's, of any of its threads."""
    tasks = Path(f"/proc/{of}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def workers() -> list[int]:
    return [pid for pid in children() if b"loadtest.worker" in command_of(pid)]


async def test_two_processes_send_every_line_once(stub: Stub) -> None:
    seen: list[int] = []

    def watch(records: list[Record]) -> None:
        seen.extend(record.index for record in records)

    async with Fleet(2) as fleet:
        trace = lines(20, every_s=0.01)
        records = await fleet.send(Target(url=stub.url), trace, on_records=watch)
        assert len(workers()) == 2
    assert [record.index for record in records] == list(range(20))
    assert sorted(seen) == list(range(20))
    assert {record.outcome for record in records} == {"ok"}
    assert sorted(body["seed"] for body in stub.seen) == list(range(20))


async def test_processes_are_used_again_and_are_gone_at_the_end(stub: Stub) -> None:
    target = Target(url=stub.url)
    async with Fleet() as fleet:
        await fleet.send(target, lines(2))
        first = workers()
        records = await fleet.send(target, lines(3))
        assert workers() == first
        assert len(first) == 1
    assert [record.outcome for record in records] == ["ok"] * 3
    assert workers() == []


async def test_records_come_while_others_are_still_under_way(stub: Stub) -> None:
    stub.models = {"slow": Behaviour(ttft_s=1.5)}
    batches: list[list[int]] = []
    async with Fleet(1) as fleet:
        await fleet.send(
            Target(url=stub.url),
            [line(0.0, "quick"), line(0.0, "slow")],
            on_records=lambda records: batches.append([record.index for record in records]),
        )
    assert [0] in batches
    assert batches[-1] == [1]


async def test_the_text_of_picked_replies_is_kept_and_of_no_other(stub: Stub) -> None:
    async with Fleet(2) as fleet:
        target = Target(url=stub.url, temperature=0.9)
        records = await fleet.send(target, lines(4), keep_text={2})
    assert [record.text for record in records] == [None, None, "word word word ", None]
    assert [body["temperature"] for body in sorted(stub.seen, key=lambda b: b["seed"])] == [
        0.9, 0.9, 0.0, 0.9,
    ]  # fmt: skip


async def test_a_process_that_ends_early_is_an_error_and_the_others_are_stopped(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.default = Behaviour(ttft_s=60.0)

    def one_bad_share(*args: Any) -> list[Share]:
        shares = split(*args)
        return [shares[0], msgspec.structs.replace(shares[1], lines={"x": 1})]

    monkeypatch.setattr("loadtest.fleet.split", one_bad_share)
    with pytest.raises(ChildProcessError, match=r"ended early[\s\S]*ValidationError"):
        async with Fleet(2) as fleet:
            await fleet.send(Target(url=stub.url), lines(4))
    assert workers() == []


def test_a_sending_process_ends_when_the_one_that_started_it_is_killed(stub: Stub) -> None:
    """Else it would go on loading the server, with nobody to say so."""
    stub.default = Behaviour(ttft_s=60.0)
    code = (
        "import asyncio\nfrom loadtest.fleet import Fleet\nfrom loadtest.target import Target\n"
        "from tests.loadtest.making import lines\n"
        "async def main():\n    async with Fleet(1) as fleet:\n"
        f"        await fleet.send(Target(url={stub.url!r}), lines(3))\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=_ROOT)
    try:
        wait_until(lambda: len(stub.seen) == 3)
        (worker,) = children(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(worker))


def test_no_more_processes_are_said_to_send_than_do() -> None:
    assert Fleet(8).workers_for(lines(3)) == 3


def test_lines_are_dealt_evenly_and_a_users_stay_together() -> None:
    shares = split(Target(), lines(7), {3, 4}, 3)
    assert [sorted(share.lines) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [share.keep_text for share in shares] == [{3}, {4}, set()]
    closed = split(Target(), [line(user=user) for user in (0, 1, 2, 0, 1, 2)], set(), 2)
    assert [sorted(share.lines) for share in closed] == [[0, 2, 3, 5], [1, 4]]
    assert len(split(Target(), lines(2), set(), 5)) == 2


def test_as_many_processes_as_the_load_wants_and_cores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert auto_workers(lines(100, every_s=0.1)) == 1
    assert auto_workers(lines(1000, every_s=0.005)) == 3
    assert auto_workers(lines(1000, every_s=0.0001)) == 4
    assert auto_workers([line(user=user) for user in range(33)]) == 2


def test_the_sending_process_loads_neither_numpy_nor_rich() -> None:
    """What it does not load cannot hold it up, and it starts in a fraction of a second."""
    code = (
        "import sys, loadtest.worker\n"
        "heavy = {'numpy', 'rich', 'typer', 'httpx', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=_ROOT)
    assert done.returncode == 0, done.stderr


def test_a_worker_by_hand_speaks_lines_of_json(stub: Stub) -> None:
    share = Share(target=Target(url=stub.url), lines={5: line()})
    worker = subprocess.Popen(
        [sys.executable, "-m", "loadtest.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(msgspec.json.encode(share) + b"\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == b"\n"
    out, _ = worker.communicate(msgspec.json.encode(clock()) + b"\n", timeout=30)
    *batches, last = out.splitlines()
    (record,) = [each for text in batches for each in msgspec.json.decode(text, type=list[Record])]
    assert last == b""
    assert (record.index, record.outcome) == (5, "ok")
