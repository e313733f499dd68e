"""Asks for some replies again, alone and greedily, and compares: did the load change answers?"""

import random
from collections.abc import Callable, Sequence

import msgspec

from loadtest.connection import clock
from loadtest.record import Record
from loadtest.replay import Share, prepare, replay
from loadtest.target import Target
from loadtest.trace import Line


class Recheck(msgspec.Struct, kw_only=True):
    """Replies under load beside the same requests alone."""

    num_asked: int = 0
    num_same: int = 0
    num_parted: int = 0  # the same at first, then another text: rounding differs with the batch
    num_foreign: int = 0  # another text from the first character on
    num_unanswered: int = 0  # no ok reply, in the load or alone, to compare
    common_share: list[float] = []  # of each parted or foreign text: how much of it is the same


def pick(num_lines: int, share: float, seed: int) -> set[int]:
    """The lines to ask again: `share` of them, at least one unless `share` is 0."""
    if share <= 0:
        return set()
    count = min(num_lines, max(1, round(num_lines * share)))
    return set(random.Random(seed).sample(range(num_lines), count))


async def recheck(
    target: Target,
    lines: Sequence[Line],
    records: Sequence[Record],
    picked: set[int],
    *,
    on_one: Callable[[], None] = lambda: None,
) -> Recheck:
    """Ask each picked line again while nothing else runs."""
    found = Recheck()
    for index in sorted(picked):
        alone = await _ask_alone(target, lines[index])
        compare(found, records[index], alone)
        on_one()
    return found


def compare(found: Recheck, loaded: Record, alone: Record) -> None:
    """Count one pair. A foreign reply makes its record wrong; a parted one does not."""
    found.num_asked += 1
    if not (loaded.is_ok and alone.is_ok) or loaded.text is None or alone.text is None:
        found.num_unanswered += 1
        return
    if loaded.text == alone.text:
        found.num_same += 1
        return
    common = common_length(loaded.text, alone.text)
    found.common_share.append(round(common / max(len(loaded.text), len(alone.text)), 4))
    if common:
        found.num_parted += 1
    else:
        found.num_foreign += 1
        loaded.outcome, loaded.reason = "wrong", "foreign"


def common_length(a: str, b: str) -> int:
    """How many characters two texts have in common from the start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


async def _ask_alone(target: Target, line: Line) -> Record:
    records: list[Record] = []
    at_once = msgspec.structs.replace(line, time_s=0.0, user=None)
    share = Share(target=target, lines={0: at_once}, keep_text={0})
    await replay(share, prepare(share), clock(), records.append)
    (record,) = records
    return record
