"""The adapter tiers as a state machine, with loads that end late, out of order, or badly."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters.rope import RopeScaling
from server.engine.adapter_cache import AdapterCache
from server.engine.request import AdapterRef
from tests.server.engine.loading import FakeBank, HandExecutor

FEW = settings(stateful_step_count=40, deadline=None)
MANY = settings(stateful_step_count=100, deadline=None)
PAGE_ROWS = 4
NUM_PAGES = 6
MAX_HOST_BYTES = 45
SMALL, ALSO_SMALL, MIDDLE, ALSO_MIDDLE, LARGE, WHOLE = (
    AdapterRef(digest, rows)
    for digest, rows in [("s", 1), ("t", 4), ("m", 5), ("n", 8), ("l", 13), ("w", 24)]
)
ALL = [SMALL, ALSO_SMALL, MIDDLE, ALSO_MIDDLE, LARGE, WHOLE]
ADAPTERS = st.sampled_from(ALL)


def num_pages(adapter: AdapterRef) -> int:
    return -(-adapter.num_rank_rows // PAGE_ROWS)


class Setup:
    """A cache over a fake bank and an executor worked by hand."""

    def __init__(self, max_host_bytes: int = MAX_HOST_BYTES) -> None:
        self.bank = FakeBank(bytes_of=lambda adapter: 10 * num_pages(adapter))
        self.executor = HandExecutor()
        self.cache = AdapterCache(
            num_pages=NUM_PAGES,
            page_rows=PAGE_ROWS,
            max_host_bytes=max_host_bytes,
            read=self.bank.read,
            write=self.bank.write,
            executor=self.executor,
        )

    def load(self, *adapters: AdapterRef, leased: bool = False) -> None:
        """Bring adapters into the bank."""
        for adapter in adapters:
            assert self.cache.acquire(adapter)
            self.settle()
            if not leased:
                self.cache.release(adapter.digest)

    def settle(self) -> None:
        """Let every load end."""
        while self.executor.waiting:
            self.executor.finish()
            self.cache.poll()
        self.cache.poll()

    def events(self) -> list[tuple[str, str, str]]:
        """(event, digest, tier) since the last call."""
        return [(event.event, event.digest, event.tier) for event in self.cache.take_events()]


class AdapterCacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        setup = Setup()
        self.bank, self.executor, self.cache = setup.bank, setup.executor, setup.cache
        self.leases: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.loading: dict[str, list[int]] = {}  # begun and not yet published -> pages
        self.done: dict[str, bool] = {}  # of those, whose load has ended -> well?
        self.undropped: Counter[str] = Counter()  # drops not answered yet
        self.dropping: set[str] = set()
        self.failures: set[str] = set()

    def sync(self) -> None:
        """Learn which loads have begun, and which drops have been answered."""
        for load in self.executor.waiting:
            self.loading.setdefault(load.digest, load.pages)
        for event in self.cache.take_events():
            if event.event == "dropped":
                self.undropped[event.digest] = 0
                self.dropping.discard(event.digest)

    def idle(self) -> set[str]:
        return {digest for digest in self.cache.ready if not self.leases[digest]}

    @rule(adapter=ADAPTERS)
    def acquire(self, adapter: AdapterRef) -> None:
        digest, before, idle = adapter.digest, set(self.cache.ready), self.idle()
        room = self.cache.num_free_pages + sum(len(self.cache.pages(other)) for other in idle)
        is_resident = digest in before or digest in self.loading

        acquired = self.cache.acquire(adapter)

        self.sync()
        assert acquired == (is_resident or num_pages(adapter) <= room)
        evicted = before - set(self.cache.ready)
        assert evicted <= idle
        assert not (evicted and (is_resident or not acquired))
        if evicted & self.pinned:
            assert idle - evicted <= self.pinned
        if acquired:
            self.leases[digest] += 1

    @precondition(lambda self: +self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(+self.leases)))
        self.leases[digest] -= 1
        self.cache.release(digest)
        self.sync()

    @rule(adapter=ADAPTERS)
    def pin(self, adapter: AdapterRef) -> None:
        self.pinned.add(adapter.digest)
        self.cache.pin(adapter)

    @rule(adapter=ADAPTERS)
    def unpin(self, adapter: AdapterRef) -> None:
        self.pinned.discard(adapter.digest)
        self.cache.unpin(adapter.digest)

    @rule(adapter=ADAPTERS)
    def prefetch(self, adapter: AdapterRef) -> None:
        before = set(self.cache.ready)
        self.cache.prefetch(adapter)
        self.sync()
        assert not (before - set(self.cache.ready)) & (self.pinned | set(+self.leases))

    @rule(adapter=ADAPTERS)
    def drop(self, adapter: AdapterRef) -> None:
        digest = adapter.digest
        self.pinned.discard(digest)
        self.undropped[digest] += 1
        self.dropping.add(digest)
        self.cache.drop(digest)
        self.sync()

    @precondition(lambda self: self.executor.waiting)
    @rule(data=st.data(), well=st.booleans())
    def end_a_load(self, data: st.DataObject, well: bool) -> None:
        index = data.draw(st.integers(0, len(self.executor.waiting) - 1))
        digest = self.executor.waiting[index].digest
        self.bank.damaged = {} if well else {digest: ValueError("damaged")}
        load = self.executor.finish(index)
        self.done[digest] = load.future.exception() is None  # from host memory damage is not met

    @rule()
    def poll(self) -> None:
        before = set(self.cache.ready)
        failed = {digest for digest, well in self.done.items() if not well}
        published = set(self.done) - failed
        self.loading = {d: pages for d, pages in self.loading.items() if d not in self.done}
        self.done = {}

        self.cache.poll()
        self.sync()

        self.pinned -= failed
        ready = set(self.cache.ready)
        assert not (before - ready) & (self.pinned | set(+self.leases))
        assert {d for d in published if self.leases[d]} <= ready
        assert not failed & ready
        # Whoever waited for it is told, once; a load that nobody waited for is tried again later.
        assert set(self.cache.take_failures()) == {d for d in failed if self.leases[d]}
        assert self.cache.take_failures() == {}
        for digest in failed:
            for _ in range(self.leases.pop(digest, 0)):
                self.cache.release(digest)  # its requests end, and give back what is gone
            assert digest not in self.loading
            assert self.cache.tier(digest) == "disk"

    @rule()
    def every_adapter_that_fits_can_be_acquired_once_no_lease_is_held(self) -> None:
        for digest in list(+self.leases):
            for _ in range(self.leases.pop(digest)):
                self.cache.release(digest)
        self.finish_everything()
        self.bank.damaged = {}
        for adapter in ALL:
            for _ in range(50):
                if self.cache.acquire(adapter):
                    break
                self.finish_everything()
            else:
                raise AssertionError(f"{adapter.digest} never found room")
            self.finish_everything()
            assert self.cache.is_ready(adapter.digest)
            self.cache.release(adapter.digest)
        self.sync()

    def finish_everything(self) -> None:
        while self.executor.waiting:
            load = self.executor.finish()
            self.done[load.digest] = load.future.exception() is None
        self.pinned -= {digest for digest, well in self.done.items() if not well}
        self.loading, self.done = {}, {}
        self.cache.poll()
        self.cache.take_failures()  # of loads that ended badly before
        self.sync()

    @invariant()
    def every_page_is_free_or_has_one_owner(self) -> None:
        owned = [page for digest in self.cache.ready for page in self.cache.pages(digest)]
        owned += [page for pages in self.loading.values() for page in pages]
        assert len(owned) == len(set(owned)) == NUM_PAGES - self.cache.num_free_pages
        assert self.cache.num_rows_used == len(owned) * PAGE_ROWS
        assert set(owned) <= set(range(NUM_PAGES))

    @invariant()
    def the_pages_of_ready_adapters_hold_them(self) -> None:
        for adapter in ALL:
            if self.cache.is_ready(adapter.digest):
                pages = self.cache.pages(adapter.digest)
                assert len(pages) == num_pages(adapter)
                assert {self.bank.pages[page] for page in pages} == {adapter.digest}

    @invariant()
    def leased_and_loading_adapters_stay(self) -> None:
        for digest in +self.leases:
            assert self.cache.is_ready(digest) or digest in self.loading
        for digest, pages in self.loading.items():
            assert not self.cache.is_ready(digest)
            assert self.cache.pages(digest) == pages
        assert self.cache.is_loading == bool(self.loading)

    @invariant()
    def host_memory_is_bounded_and_counted(self) -> None:
        settled = [adapter for adapter in ALL if adapter.digest not in self.loading]
        in_host = [adapter for adapter in settled if self.cache.tier(adapter.digest) == "host"]
        assert 10 * sum(map(num_pages, in_host)) <= MAX_HOST_BYTES
        assert 0 <= self.cache.num_host_bytes <= MAX_HOST_BYTES

    @invariant()
    def a_drop_is_answered_once_nothing_uses_the_adapter(self) -> None:
        for digest in +self.undropped:
            assert digest in self.loading or self.leases[digest]

    @invariant()
    def what_was_dropped_waits_only_for_those_who_use_it(self) -> None:
        for digest in self.dropping:
            assert self.leases[digest] or digest in self.loading


def test_adapters_keep_their_pages_whatever_the_order_of_moves() -> None:
    run_state_machine_as_test(AdapterCacheMachine, settings=settings(FEW, max_examples=60))


@pytest.mark.slow
def test_adapters_keep_their_pages_over_many_moves() -> None:
    run_state_machine_as_test(AdapterCacheMachine, settings=settings(MANY, max_examples=1500))


def test_a_first_lease_starts_a_load_and_a_poll_after_it_makes_the_adapter_ready() -> None:
    setup = Setup()

    assert setup.cache.acquire(MIDDLE)
    assert (setup.cache.is_ready("m"), setup.cache.is_loading) == (False, True)
    setup.executor.finish()
    assert not setup.cache.is_ready("m")  # published between two steps, not in the middle of one
    setup.cache.poll()

    assert (setup.cache.is_ready("m"), setup.cache.is_loading) == (True, False)
    assert setup.cache.rows("m") == list(range(8))
    assert setup.events() == [("loaded", "m", "disk")]


def test_a_second_lease_shares_the_load_that_is_under_way() -> None:
    setup = Setup()
    setup.cache.acquire(MIDDLE)

    assert setup.cache.acquire(MIDDLE)

    assert len(setup.executor.waiting) == 1


def test_the_least_recently_used_idle_adapter_leaves_first() -> None:
    setup = Setup()
    setup.load(MIDDLE, ALSO_MIDDLE, SMALL, ALSO_SMALL)
    setup.load(MIDDLE)  # used again

    setup.load(LARGE)

    assert setup.cache.ready == ["m", "l"]


def test_a_pinned_adapter_leaves_only_after_every_other_one() -> None:
    setup = Setup()
    setup.cache.pin(MIDDLE)
    setup.cache.poll()
    setup.settle()
    setup.load(ALSO_MIDDLE, SMALL)

    assert setup.cache.acquire(LARGE)
    assert setup.cache.ready == ["m"]
    setup.settle()
    setup.cache.release("l")
    assert setup.cache.acquire(WHOLE)
    assert setup.cache.ready == []


def test_prefetching_takes_nothing_from_a_pinned_adapter() -> None:
    setup = Setup()
    setup.cache.pin(MIDDLE)
    setup.cache.poll()
    setup.settle()

    setup.cache.prefetch(WHOLE)

    assert setup.cache.ready == ["m"]
    assert not setup.executor.waiting


def test_an_adapter_that_finds_no_room_evicts_nobody_in_trying() -> None:
    setup = Setup()
    setup.load(MIDDLE)
    setup.load(LARGE, leased=True)

    assert not setup.cache.acquire(WHOLE)

    assert setup.cache.ready == ["m", "l"]


def test_an_evicted_adapter_comes_back_from_host_memory_without_the_disk() -> None:
    setup = Setup(max_host_bytes=1000)
    setup.load(ALSO_MIDDLE, MIDDLE, LARGE)
    assert setup.cache.tier("n") == "host"
    setup.events()
    reads = setup.bank.num_reads

    setup.load(ALSO_MIDDLE)

    assert setup.bank.num_reads == reads
    assert ("loaded", "n", "host") in setup.events()


def test_host_memory_forgets_the_least_recently_used_first() -> None:
    setup = Setup()
    setup.load(MIDDLE, ALSO_MIDDLE)  # 40 of 45 bytes
    setup.load(SMALL)

    assert setup.cache.num_host_bytes == 30
    assert ("evicted", "m", "host") in setup.events()


def test_a_use_from_host_memory_is_a_use_there_too() -> None:
    setup = Setup()
    setup.load(MIDDLE, ALSO_MIDDLE)  # 40 of 45 bytes
    setup.cache.acquire(LARGE)
    setup.cache.acquire(AdapterRef("filler", 5))
    setup.bank.damaged = {"l": ValueError(), "filler": ValueError()}
    setup.settle()  # both are out of the bank, and in host memory
    assert (setup.cache.tier("m"), setup.cache.tier("n")) == ("host", "host")

    setup.load(MIDDLE)
    setup.load(SMALL)

    setup.cache.acquire(LARGE)
    assert setup.cache.num_host_bytes == 30
    assert ("evicted", "n", "host") in setup.events()


def test_pages_given_back_in_any_order_are_neighbours_again() -> None:
    setup = Setup()
    setup.load(SMALL, ALSO_SMALL)  # pages 0 | 1
    setup.cache.drop("t")
    setup.cache.drop("s")

    setup.load(LARGE)

    assert setup.cache.pages("l") == [0, 1, 2, 3]


def test_an_adapter_larger_than_host_memory_flushes_nobody_else_from_it() -> None:
    setup = Setup()
    setup.load(MIDDLE, ALSO_MIDDLE)

    setup.load(WHOLE)

    assert (setup.cache.tier("m"), setup.cache.tier("n")) == ("host", "host")
    assert setup.cache.num_host_bytes == 40


def test_a_failed_load_gives_its_pages_back_and_is_told_once_to_those_who_waited() -> None:
    setup = Setup()
    setup.bank.damaged["m"] = ValueError("torn object")
    setup.cache.acquire(MIDDLE)

    setup.settle()

    assert setup.cache.take_failures() == {"m": "torn object"}
    assert setup.cache.take_failures() == {}
    assert (setup.cache.num_free_pages, setup.cache.tier("m")) == (NUM_PAGES, "disk")
    setup.cache.release("m")
    assert setup.events() == [("failed", "m", "gpu")]


def test_the_failure_of_a_load_that_nobody_waits_for_is_not_kept_for_a_later_request() -> None:
    setup = Setup()
    setup.bank.damaged["m"] = OSError("disk away for a moment")
    setup.cache.prefetch(MIDDLE)
    setup.settle()
    assert setup.events() == [("failed", "m", "gpu")]

    assert setup.cache.take_failures() == {}


def test_a_pinned_adapter_that_cannot_be_loaded_is_not_tried_for_ever() -> None:
    setup = Setup()
    setup.bank.damaged["m"] = ValueError("torn object")
    setup.cache.pin(MIDDLE)
    setup.cache.poll()
    setup.settle()

    setup.cache.poll()

    assert not setup.executor.waiting


def test_an_error_of_our_own_making_is_not_taken_for_a_bad_adapter() -> None:
    setup = Setup()
    setup.bank.damaged["m"] = RuntimeError("CUDA error")
    setup.cache.acquire(MIDDLE)
    setup.executor.finish()

    with pytest.raises(RuntimeError, match="CUDA error"):
        setup.cache.poll()


def test_device_memory_that_runs_out_fails_one_load_and_the_next_may_have_it() -> None:
    setup = Setup()
    setup.bank.damaged["m"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    setup.cache.acquire(MIDDLE)
    setup.settle()

    [(digest, message)] = setup.cache.take_failures().items()
    assert digest == "m"
    assert message.startswith("no device memory for adapter m: CUDA out of memory")
    del setup.bank.damaged["m"]
    setup.load(MIDDLE)


def test_an_evicted_adapter_leaves_the_bank_for_host_memory_unless_it_is_leased() -> None:
    setup = Setup()
    setup.load(MIDDLE)
    setup.load(SMALL, leased=True)
    setup.events()
    for digest in ("m", "s", "nosuch"):
        setup.cache.evict(digest)
    assert setup.events() == [("evicted", "m", "gpu")]
    assert (setup.cache.tier("m"), setup.cache.tier("s")) == ("host", "gpu")


def test_a_dropped_adapter_stays_while_it_is_leased_and_then_leaves_every_tier() -> None:
    setup = Setup()
    setup.load(MIDDLE, leased=True)
    setup.cache.pin(MIDDLE)
    setup.events()

    setup.cache.drop("m")
    assert setup.cache.is_ready("m")
    assert setup.events() == []
    setup.cache.release("m")

    assert setup.events() == [("dropped", "m", "gpu")]
    assert (setup.cache.tier("m"), setup.cache.num_host_bytes) == ("disk", 0)
    setup.cache.poll()
    assert not setup.executor.waiting  # nor does an old pin bring it back


def test_dropping_what_is_not_in_the_bank_is_answered_at_once_and_clears_host_memory() -> None:
    setup = Setup(max_host_bytes=1000)
    setup.load(ALSO_MIDDLE, MIDDLE, LARGE)
    setup.events()
    assert setup.cache.tier("n") == "host"

    setup.cache.drop("n")

    assert setup.cache.tier("n") == "disk"
    assert setup.events() == [("dropped", "n", "disk")]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_drop_during_a_load_is_answered_when_the_load_ends(ends_well: bool) -> None:
    setup = Setup()
    setup.cache.prefetch(MIDDLE)
    setup.cache.drop("m")
    assert setup.events() == []

    setup.bank.damaged = {} if ends_well else {"m": ValueError("torn object")}
    setup.settle()

    assert setup.events()[-1][:2] == ("dropped", "m")
    assert (setup.cache.num_free_pages, setup.cache.tier("m")) == (NUM_PAGES, "disk")
    assert setup.cache.num_host_bytes == 0


def test_neighbouring_pages_are_preferred_to_scattered_ones() -> None:
    setup = Setup()
    setup.load(SMALL, MIDDLE, ALSO_SMALL)  # pages 0 | 1 2 | 3
    setup.cache.drop("s")

    setup.load(ALSO_MIDDLE)

    assert setup.cache.pages("n") == [4, 5]


def test_scattered_pages_serve_where_there_are_no_neighbours() -> None:
    setup = Setup()
    others = [AdapterRef(str(index), 1) for index in range(NUM_PAGES)]
    setup.load(*others)
    for digest in "024":
        setup.cache.drop(digest)

    setup.load(MIDDLE)

    assert setup.cache.pages("m") == [0, 2]
    assert setup.cache.rows("m") == [0, 1, 2, 3, 8, 9, 10, 11]


def test_the_gain_row_is_counted_in_the_adapters_own_pages() -> None:
    setup = Setup()
    setup.bank.gain_row_of = lambda adapter: 5 if adapter is MIDDLE else None
    others = [AdapterRef(str(index), 1) for index in range(NUM_PAGES)]
    setup.load(*others)
    for digest in "024":
        setup.cache.drop(digest)

    setup.load(MIDDLE, SMALL)

    assert setup.cache.gain_row("m") == 9  # the sixth of rows 0-3 and 8-11
    assert setup.cache.gain_row("s") is None


def test_giving_back_more_leases_than_were_taken_is_our_own_mistake() -> None:
    setup = Setup()
    setup.load(SMALL)

    with pytest.raises(AssertionError, match="released more often"):
        setup.cache.release("s")


ROPES = [RopeScaling(rope_type="linear", factor=float(factor)) for factor in (2, 3, 4)]
SCALED = [
    AdapterRef(f"{rope.factor:g}{letter}", 1, rope) for rope in ROPES for letter in "xyz"
]  # a page each


class Tables:
    """A cache with two rotary tables, and what is written into them."""

    def __init__(self) -> None:
        self.bank = FakeBank()
        self.executor = HandExecutor()
        self.rows: dict[int, RopeScaling] = {}
        self.num_writes = 0
        self.cache = AdapterCache(
            num_pages=NUM_PAGES,
            page_rows=PAGE_ROWS,
            max_host_bytes=MAX_HOST_BYTES,
            read=self.bank.read,
            write=self.bank.write,
            executor=self.executor,
            num_tables=2,
            write_table=self.write,
        )

    def write(self, table: int, scaling: RopeScaling) -> None:
        """Never the base's, and never one that a ready adapter reads."""
        assert table in (1, 2)
        assert table not in {self.cache.table(digest) for digest in self.cache.ready}
        self.rows[table] = scaling
        self.num_writes += 1

    def load(self, *adapters: AdapterRef, leased: bool = False) -> None:
        for adapter in adapters:
            assert self.cache.acquire(adapter)
            while self.executor.waiting:
                self.executor.finish()
            self.cache.poll()
            if not leased:
                self.cache.release(adapter.digest)

    def check(self, adapter: AdapterRef) -> None:
        table = self.cache.table(adapter.digest)
        assert (self.rows[table] if adapter.rope else table) == (adapter.rope or 0)


def test_equal_scalings_share_a_table_that_is_written_once() -> None:
    setup = Tables()
    setup.load(SCALED[0], SCALED[1], SMALL, leased=True)
    assert [setup.cache.table(a.digest) for a in (SCALED[0], SCALED[1], SMALL)] == [1, 1, 0]
    setup.load(SCALED[3])
    assert setup.cache.table(SCALED[3].digest) == 2
    assert (setup.num_writes, setup.rows) == (2, {1: ROPES[0], 2: ROPES[1]})


def test_without_a_free_table_those_who_share_the_least_recent_one_leave() -> None:
    setup = Tables()
    setup.load(SCALED[0], SCALED[3], SCALED[1], SMALL)  # tables 1, 2, 1 and the base's
    setup.load(SCALED[6])
    assert set(setup.cache.ready) == {SCALED[0].digest, SCALED[1].digest, "s", SCALED[6].digest}
    setup.check(SCALED[6])
    setup.load(SCALED[3])
    assert set(setup.cache.ready) == {"s", SCALED[6].digest, SCALED[3].digest}
    setup.check(SCALED[3])
    assert setup.num_writes == 4


def test_a_table_in_use_is_waited_for_and_nobody_is_evicted_in_vain() -> None:
    setup = Tables()
    setup.load(SCALED[0], SCALED[3], leased=True)
    setup.load(SCALED[1], SMALL)
    before = setup.cache.ready
    assert not setup.cache.acquire(SCALED[6])
    assert setup.cache.ready == before
    assert setup.cache.acquire(SMALL), "who needs no table of its own need not wait"
    setup.cache.release(SCALED[0].digest)
    setup.load(SCALED[6])
    setup.check(SCALED[6])


def test_a_failed_first_load_leaves_the_table_to_be_written_by_the_second() -> None:
    setup = Tables()
    setup.bank.damaged[SCALED[0].digest] = ValueError("damaged")
    assert setup.cache.acquire(SCALED[0])
    assert setup.cache.acquire(SCALED[1])
    setup.executor.finish()
    assert setup.rows == {}
    setup.executor.finish()
    setup.cache.poll()
    setup.check(SCALED[1])


def test_a_scaling_that_comes_back_before_another_took_its_table_is_there_still() -> None:
    setup = Tables()
    setup.load(SCALED[0])
    setup.cache.drop(SCALED[0].digest)
    setup.load(SCALED[1])
    assert setup.num_writes == 1
    setup.check(SCALED[1])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*SCALED, SMALL, MIDDLE]),
            st.sampled_from(["acquire", "release", "finish", "pin", "unpin", "drop", "prefetch"]),
        ),
        max_size=60,
    )
)
def test_whoever_is_ready_finds_its_own_scaling_whatever_came_before(
    moves: list[tuple[AdapterRef, str]],
) -> None:
    setup = Tables()
    leases: Counter[str] = Counter()
    adapters = {adapter.digest: adapter for adapter in [*SCALED, SMALL, MIDDLE]}
    for adapter, move in moves:
        if move == "acquire":
            leases[adapter.digest] += setup.cache.acquire(adapter)
        elif move == "release" and leases[adapter.digest]:
            leases[adapter.digest] -= 1
            setup.cache.release(adapter.digest)
        elif move == "finish" and setup.executor.waiting:
            setup.executor.finish()
            setup.cache.poll()
        elif move in ("pin", "prefetch"):
            getattr(setup.cache, move)(adapter)
        elif move in ("unpin", "drop"):
            getattr(setup.cache, move)(adapter.digest)
        for digest in setup.cache.ready:
            setup.check(adapters[digest])
