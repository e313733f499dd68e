"""Replays a trace against one server: each request at its time, whatever became of the others."""

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import msgspec

from loadtest.connection import Pool, clock
from loadtest.record import Record
from loadtest.reply import Reply
from loadtest.target import Target, request_bytes
from loadtest.trace import Line, is_closed_loop

Emit = Callable[[Record], None]

_SPIN_S = 0.001  # the event loop's own timers go by milliseconds; the rest is waited out awake


class Share(msgspec.Struct, kw_only=True):
    """What one process sends: lines of a trace by their index, and which replies to keep."""

    target: Target
    lines: dict[int, Line]
    keep_text: set[int] = set()  # these are asked greedily, and their text is kept


def prepare(share: Share) -> dict[int, bytes]:
    """Each line's request, made before the first is due."""
    return {
        index: request_bytes(share.target, line, greedy=index in share.keep_text)
        for index, line in share.lines.items()
    }


async def replay(share: Share, prepared: dict[int, bytes], begin: float, emit: Emit) -> None:
    """Send every line of the share, the trace's start being `begin` on `clock`; emit each record.

    An open loop sends on schedule and never waits for a reply. In a closed loop each user waits
    for its own.
    """
    pool = Pool(share.target.url)

    async def send(index: int, intended: float) -> None:
        emit(await _send(share, index, prepared[index], pool, begin, intended))

    async def be_user(indices: Sequence[int]) -> None:
        for index in indices:
            intended = max(clock(), begin + share.lines[index].time_s)
            await _wait_until(intended)
            await send(index, intended)

    try:
        async with asyncio.TaskGroup() as sending:
            if is_closed_loop(list(share.lines.values())):
                for indices in _by_user(share.lines):
                    sending.create_task(be_user(indices))
            else:
                for index, line in share.lines.items():
                    intended = begin + line.time_s
                    await _wait_until(intended)
                    sending.create_task(send(index, intended))
    finally:
        pool.close()


def _by_user(lines: Mapping[int, Line]) -> list[Sequence[int]]:
    """Each user's lines, in order."""
    users: defaultdict[int | None, list[int]] = defaultdict(list)
    for index, line in lines.items():
        users[line.user].append(index)
    return list(users.values())


async def _wait_until(time: float) -> None:
    """Return at `time`, at once if that is over. A timer that is late is not waited for twice."""
    while (left := time - clock()) > 0:
        whole_ms = math.floor((left - _SPIN_S) * 1000)
        await asyncio.sleep(whole_ms / 1000 if whole_ms > 0 else 0)


async def _send(
    share: Share, index: int, request: bytes, pool: Pool, begin: float, intended: float
) -> Record:
    """Send one request and say what became of it."""
    late_s = clock() - intended
    line = share.lines[index]
    reply = Reply(keep_text=index in share.keep_text)
    try:
        async with asyncio.timeout(share.target.timeout_s):
            await pool.ask(request, reply)
    except TimeoutError:
        reply.fail("timeout")
    return record_of(
        reply,
        index=index,
        intended=intended,
        begin=begin,
        late_s=late_s,
        over=clock(),
        expected_tokens=line.output_tokens if share.target.ignore_eos else None,
    )


def record_of(
    reply: Reply,
    *,
    index: int,
    intended: float,
    begin: float,
    late_s: float,
    over: float,
    expected_tokens: int | None,
) -> Record:
    """The record of a reply that was `over`; times are on the clock that the reply was fed."""
    outcome, reason = reply.outcome(expected_tokens=expected_tokens)
    times = reply.text_times
    headers = reply.headers
    return Record(
        index=index,
        intended_s=round(intended - begin, 6),
        late_s=round(late_s, 6),
        over_s=round(over - intended, 6),
        outcome=outcome,
        reason=reason,
        status=reply.status,
        ttft_s=round(times[0] - intended, 6) if times else None,
        e2e_s=round(times[-1] - intended, 6) if times else None,
        gaps_s=[round(b - a, 6) for a, b in itertools.pairwise(times)],
        num_prompt_tokens=reply.num_prompt_tokens,
        num_tokens=reply.num_tokens or len(times),
        num_cached_tokens=reply.num_cached_tokens,
        path=headers.get("x-serving-path"),
        tier=headers.get("x-adapter-tier"),
        adapter_id=headers.get("x-adapter-id"),
        digest=headers.get("x-adapter-digest"),
        text="".join(reply.pieces) if reply.pieces else None,
    )
