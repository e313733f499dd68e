"""Which adapter is on disk, in host memory, in the bank; least recently used leaves first."""

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol

import torch

from adapters.rope import RopeScaling
from server.engine.messages import AdapterChange, AdapterEvent
from server.engine.request import AdapterRef, Tier
from server.model.rotary import BASE_TABLE


class HostAdapter(Protocol):
    """An adapter in host memory, ready to copy into the bank."""

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""

    @property
    def gain_row(self) -> int | None:
        """Which of its rows holds DoRA's gain."""


ReadAdapter = Callable[[AdapterRef], HostAdapter]  # from disk; raises OSError or ValueError
WriteAdapter = Callable[[list[int], HostAdapter], None]  # into the bank's pages
WriteTable = Callable[[int, RopeScaling], None]  # one of the rotary tables


@dataclass(slots=True, eq=False)
class Resident:
    """An adapter with bank pages of its own: being loaded into them, or ready."""

    adapter: AdapterRef
    pages: list[int]
    loading: Future[HostAdapter] | None
    came_from: Tier
    started: float
    table: int  # which rotary table its tokens take
    num_leases: int = 0
    gain_row: int | None = None  # known once loaded
    is_dropped: bool = False  # leaves as soon as nothing uses it

    @property
    def is_ready(self) -> bool:
        """Whether its weights are in the bank."""
        return self.loading is None

    @property
    def is_idle(self) -> bool:
        """Whether its pages may be taken."""
        return self.num_leases == 0 and self.is_ready


@dataclass(slots=True)
class RotaryTable:
    """What a rotary table other than the base's is for."""

    scaling: RopeScaling | None = None
    is_written: bool = False


class AdapterCache:
    """Moves adapters between disk, host memory and the bank, off the step loop.

    Every page is free or owned by one resident adapter. A leased or loading adapter is never
    evicted, so the pages under a running request never change. Pinned adapters are evicted last.

    Residents of equal RoPE scaling share one rotary table, and a table gets another scaling only
    when none of them is resident. `executor` runs one load at a time: the first of them writes it.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_rows: int,
        max_host_bytes: int,
        read: ReadAdapter,
        write: WriteAdapter,
        executor: Executor,
        num_tables: int = 0,
        write_table: WriteTable | None = None,
    ) -> None:
        """`num_tables` counts rotary tables beside the base's; with any, `write_table` is there."""
        self.page_rows = page_rows
        self.num_host_bytes = 0
        self._events: list[AdapterEvent] = []
        self._failures: dict[str, str] = {}
        self._num_pages = num_pages
        self._max_host_bytes = max_host_bytes
        self._read, self._write, self._executor = read, write, executor
        self._free_pages = list(range(num_pages))
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()
        self._pinned: dict[str, AdapterRef] = {}
        self._write_table = write_table
        self._tables = {number: RotaryTable() for number in range(1, num_tables + 1)}

    @property
    def num_free_pages(self) -> int:
        """Pages that no adapter owns."""
        return len(self._free_pages)

    @property
    def num_rows_used(self) -> int:
        """Bank rows that adapters own."""
        return (self._num_pages - len(self._free_pages)) * self.page_rows

    @property
    def ready(self) -> list[str]:
        """Digests in the bank."""
        return [digest for digest, resident in self._residents.items() if resident.is_ready]

    @property
    def is_loading(self) -> bool:
        """Whether a load is under way."""
        return any(not resident.is_ready for resident in self._residents.values())

    def tier(self, digest: str) -> Tier:
        """Where an adapter is now."""
        resident = self._residents.get(digest)
        if resident is not None:
            return "gpu" if resident.is_ready else resident.came_from
        return "host" if digest in self._host else "disk"

    def is_ready(self, digest: str) -> bool:
        """Whether a request may use it in the next step."""
        resident = self._residents.get(digest)
        return resident is not None and resident.is_ready

    def pages(self, digest: str) -> list[int]:
        """Pages of a leased adapter."""
        return self._residents[digest].pages

    def rows(self, digest: str) -> list[int]:
        """Bank rows of a ready adapter, in the order of its rank rows."""
        return rows_of_pages(self._residents[digest].pages, self.page_rows)

    def gain_row(self, digest: str) -> int | None:
        """The bank row that holds a ready adapter's DoRA gain."""
        resident = self._residents[digest]
        if resident.gain_row is None:
            return None
        page, row = divmod(resident.gain_row, self.page_rows)
        return resident.pages[page] * self.page_rows + row

    def table(self, digest: str) -> int:
        """The rotary table of a resident adapter; 0 is the base's."""
        return self._residents[digest].table

    def acquire(self, adapter: AdapterRef) -> bool:
        """Lease an adapter, starting its load if need be. False if the bank has no room now."""
        resident = self._residents.get(adapter.digest) or self._start(adapter, self._evictable())
        if resident is None:
            return False
        resident.num_leases += 1
        self._residents.move_to_end(adapter.digest)
        return True

    def release(self, digest: str) -> None:
        """Give a lease back. After a failed load there is nothing left to give back."""
        resident = self._residents.get(digest)
        if resident is None:
            return
        assert resident.num_leases > 0, f"{digest} released more often than leased"
        resident.num_leases -= 1
        if resident.is_dropped and resident.is_idle:
            self._free(resident, "dropped")

    def pin(self, adapter: AdapterRef) -> None:
        """Bring an adapter into the bank as soon as there is room, and evict it last."""
        self._pinned[adapter.digest] = adapter

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted like any other."""
        self._pinned.pop(digest, None)

    def prefetch(self, adapter: AdapterRef) -> bool:
        """Start loading an adapter that no request has asked for yet. False if there is no room."""
        if adapter.digest in self._residents:
            return True
        return self._start(adapter, self._evictable(spare_pinned=True)) is not None

    def take_failures(self) -> dict[str, str]:
        """Leased adapters whose load failed since the last call: digest -> why."""
        failures, self._failures = self._failures, {}
        return failures

    def take_events(self) -> list[AdapterEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def drop(self, digest: str) -> None:
        """Free an adapter in every tier, as soon as nothing uses it."""
        self._pinned.pop(digest, None)
        self._forget_host(digest)
        resident = self._residents.get(digest)
        if resident is None:
            self._event(digest, "dropped", "disk")
        elif resident.is_idle:
            self._free(resident, "dropped")
        else:
            resident.is_dropped = True

    def evict(self, digest: str) -> None:
        """Take an idle adapter out of the bank; host memory keeps it."""
        resident = self._residents.get(digest)
        if resident is not None and resident.is_idle:
            self._free(resident, "evicted")

    def poll(self) -> None:
        """Publish finished loads; call it between two steps."""
        finished = [r for r in self._residents.values() if r.loading and r.loading.done()]
        for resident in finished:
            self._publish(resident)
        for digest, adapter in self._pinned.items():
            if digest not in self._residents:
                self._start(adapter, self._evictable(spare_pinned=True))

    def _publish(self, resident: Resident) -> None:
        assert resident.loading is not None
        digest, seconds = resident.adapter.digest, time.monotonic() - resident.started
        error = resident.loading.exception()
        if error is not None:
            if not isinstance(error, (OSError, ValueError)):
                raise error
            self._pinned.pop(digest, None)
            if resident.num_leases > 0:  # nobody waited for the others: a request tries again
                self._failures[digest] = str(error)
            self._free(resident, "failed", seconds=seconds, message=str(error))
            if resident.is_dropped:
                self._event(digest, "dropped", "disk")
            return
        host, resident.loading = resident.loading.result(), None
        resident.gain_row = host.gain_row
        self._event(digest, "loaded", resident.came_from, seconds, host.num_bytes)
        if resident.is_dropped:
            if resident.is_idle:
                self._free(resident, "dropped")
            return
        self._keep_in_host(digest, host)

    def _start(self, adapter: AdapterRef, evictable: list[Resident]) -> Resident | None:
        """Reserve pages and a table and start loading; None, evicting nobody, without enough."""
        victims = self._victims(adapter, evictable)
        if victims is None:
            return None
        for victim in victims:
            self._free(victim, "evicted")
        pages = self._take_pages(-(-adapter.num_rank_rows // self.page_rows))
        table = self._take_table(adapter.rope)
        host = self._host.get(adapter.digest)
        resident = Resident(
            adapter,
            pages,
            self._executor.submit(self._load, adapter, host, pages, table),
            "host" if host is not None else "disk",
            time.monotonic(),
            table,
        )
        self._residents[adapter.digest] = resident
        return resident

    def _load(
        self, adapter: AdapterRef, host: HostAdapter | None, pages: list[int], table: int
    ) -> HostAdapter:
        """Runs in a worker thread; nothing reads these pages, or a new table, until `_publish`.

        Raises OSError, ValueError, and what is a fault of our own.
        """
        try:
            host = host or self._read(adapter)
            if adapter.rope is not None and not self._tables[table].is_written:
                assert self._write_table is not None, "rotary tables are written by somebody"
                self._write_table(table, adapter.rope)
                self._tables[table].is_written = True
            self._write(pages, host)
        except torch.OutOfMemoryError as error:  # of its copies on the way; running rows go on
            raise OSError(f"no device memory for adapter {adapter.digest}: {error}") from error
        return host

    def _evictable(self, *, spare_pinned: bool = False) -> list[Resident]:
        """Idle residents, in the order in which they should leave."""
        idle = [resident for resident in self._residents.values() if resident.is_idle]
        found = [r for r in idle if r.adapter.digest not in self._pinned]
        if not spare_pinned:
            found += [r for r in idle if r.adapter.digest in self._pinned]
        return found

    def _victims(self, adapter: AdapterRef, evictable: list[Resident]) -> list[Resident] | None:
        """Who must leave so that the adapter has pages and a table; None if that is not enough."""
        victims = self._table_victims(adapter.rope, evictable)
        if victims is None:
            return None
        num_missing = -(-adapter.num_rank_rows // self.page_rows) - len(self._free_pages)
        num_missing -= sum(len(victim.pages) for victim in victims)
        for resident in evictable:
            if num_missing <= 0:
                break
            if resident not in victims:
                victims.append(resident)
                num_missing -= len(resident.pages)
        return None if num_missing > 0 else victims

    def _table_victims(
        self, rope: RopeScaling | None, evictable: list[Resident]
    ) -> list[Resident] | None:
        """Who must leave for a rotary table: all that share the one least recently used."""
        if rope is None or self._find_table(rope) is not None:
            return []
        by_table: dict[int, list[Resident]] = {number: [] for number in self._tables}
        for resident in self._residents.values():
            if resident.table != BASE_TABLE:
                by_table[resident.table].append(resident)
        turns = {resident.adapter.digest: turn for turn, resident in enumerate(evictable)}
        candidates = [
            (max(turns[r.adapter.digest] for r in users), number)
            for number, users in by_table.items()
            if all(r.adapter.digest in turns for r in users)
        ]
        return by_table[min(candidates)[1]] if candidates else None

    def _find_table(self, rope: RopeScaling) -> int | None:
        """The table that has this scaling, else one that no resident uses."""
        used = {resident.table for resident in self._residents.values()}
        unused = None
        for number, table in self._tables.items():
            if table.scaling == rope:
                return number
            if number not in used and unused is None:
                unused = number
        return unused

    def _take_table(self, rope: RopeScaling | None) -> int:
        """The table for this scaling, to be written by its first load unless it has it already."""
        if rope is None:
            return BASE_TABLE
        number = self._find_table(rope)
        assert number is not None, "its users have just left"
        if self._tables[number].scaling != rope:
            self._tables[number] = RotaryTable(rope)
        return number

    def _take_pages(self, count: int) -> list[int]:
        """The first run of `count` neighbours if there is one (it needs no gather), else any."""
        free = self._free_pages
        for first in range(len(free) - count + 1):
            if free[first + count - 1] - free[first] == count - 1:
                break
        else:
            first = 0
        pages = free[first : first + count]
        del free[first : first + count]
        return pages

    def _free(
        self, resident: Resident, event: AdapterChange, *, seconds: float = 0.0, message: str = ""
    ) -> None:
        del self._residents[resident.adapter.digest]
        self._free_pages = sorted(self._free_pages + resident.pages)
        self._event(resident.adapter.digest, event, "gpu", seconds, message=message)

    def _keep_in_host(self, digest: str, host: HostAdapter) -> None:
        if host.num_bytes > self._max_host_bytes:
            return  # it would drive out every other one and then itself
        if digest not in self._host:
            self._host[digest] = host
            self.num_host_bytes += host.num_bytes
        self._host.move_to_end(digest)
        while self.num_host_bytes > self._max_host_bytes:
            oldest = next(iter(self._host))
            self._forget_host(oldest)
            self._event(oldest, "evicted", "host")

    def _forget_host(self, digest: str) -> None:
        host = self._host.pop(digest, None)
        if host is not None:
            self.num_host_bytes -= host.num_bytes

    def _event(
        self,
        digest: str,
        event: AdapterChange,
        tier: Tier,
        seconds: float = 0.0,
        num_bytes: int = 0,
        message: str = "",
    ) -> None:
        self._events.append(
            AdapterEvent(
                digest=digest,
                event=event,
                tier=tier,
                seconds=seconds,
                num_bytes=num_bytes,
                message=message,
            )
        )


def rows_of_pages(pages: list[int], page_rows: int) -> list[int]:
    """The bank rows in these pages, in order."""
    return [page * page_rows + row for page in pages for row in range(page_rows)]
