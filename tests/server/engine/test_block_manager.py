"""KV blocks as a state machine: any moves in any order; a model knows what each block holds."""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.engine.block_manager import BlockManager, extend_chain, prefix_root

NUM_BLOCKS = 8
BLOCK_SIZE = 2
FEW = settings(stateful_step_count=30, deadline=None)
MANY = settings(stateful_step_count=80, deadline=None)
ROOTS = [prefix_root("base", adapter, "") for adapter in ("", "a")]
Content = tuple[bytes, tuple[int, ...]]  # root, every token up to the block's last


def chain(root: bytes, tokens: list[int]) -> list[bytes]:
    """Hashes of the full blocks of `tokens`."""
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        hashes.append(
            extend_chain(hashes[-1] if hashes else root, tokens[start : start + BLOCK_SIZE])
        )
    return hashes


@dataclass(eq=False)
class Table:
    """One request's blocks and what it has computed into them."""

    root: bytes
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.tables: list[Table] = []
        self.content: dict[int, Content] = {}  # what was last computed into each block
        self.known: dict[bytes, int] = {}  # hash -> block, as the manager should know them

    def held(self) -> set[int]:
        return {block for table in self.tables for block in table.blocks}

    def grow(self, table: Table, num_tokens: int) -> None:
        """Grow, and check what was handed out."""
        before, held = list(table.blocks), self.held()
        missing = -(-num_tokens // BLOCK_SIZE) - len(before)

        grown = self.manager.grow(table.blocks, num_tokens)

        assert grown == (missing <= NUM_BLOCKS - len(held))
        new = table.blocks[len(before) :]
        assert table.blocks[: len(before)] == before
        assert len(new) == (max(0, missing) if grown else 0)
        assert not held & set(new)
        assert len(set(new)) == len(new)
        for block in new:
            self.content.pop(block, None)
        self.known = {h: block for h, block in self.known.items() if block not in new}

    def compute(self, table: Table) -> None:
        """Write the KV of every token whose block the table holds."""
        for index, block in enumerate(table.blocks):
            stop = (index + 1) * BLOCK_SIZE
            if stop <= len(table.tokens):
                self.content[block] = (table.root, tuple(table.tokens[:stop]))

    @rule(root=st.sampled_from(ROOTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def start(self, root: bytes, tokens: list[int]) -> None:
        hashes = chain(root, tokens)
        expected = next((i for i, h in enumerate(hashes) if h not in self.known), len(hashes))

        found = self.manager.find(hashes)

        assert found == expected
        table = Table(root, tokens)
        self.manager.reuse(table.blocks, hashes[:found])
        for index, block in enumerate(table.blocks):
            assert self.content[block] == (root, tuple(tokens[: (index + 1) * BLOCK_SIZE]))
        self.tables.append(table)
        self.grow(table, len(tokens))
        if len(table.blocks) * BLOCK_SIZE < len(tokens):  # did not fit
            self.drop(table)
        else:
            self.compute(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=4))
    def extend(self, data: st.DataObject, more: list[int]) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.grow(table, len(table.tokens) + len(more))
        if len(table.blocks) * BLOCK_SIZE >= len(table.tokens) + len(more):
            table.tokens = table.tokens + more
            self.compute(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        hashes = chain(table.root, table.tokens)
        for index in range(data.draw(st.integers(0, len(hashes)))):
            block = table.blocks[index]
            if hashes[index] not in self.known and block not in self.known.values():
                self.known[hashes[index]] = block
            self.manager.remember(block, hashes[index], table.root)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.drop(data.draw(st.sampled_from(self.tables)))

    def drop(self, table: Table) -> None:
        self.tables.remove(table)
        self.manager.release(table.blocks)
        assert table.blocks == []

    @rule(root=st.sampled_from(ROOTS))
    def forget(self, root: bytes) -> None:
        self.manager.forget(root)
        self.known = {h: block for h, block in self.known.items() if self.content[block][0] != root}

    @invariant()
    def a_block_is_free_or_held_and_never_both(self) -> None:
        assert self.manager.num_free == NUM_BLOCKS - len(self.held())

    @invariant()
    def what_is_found_is_what_the_model_knows(self) -> None:
        for block_hash, block in self.known.items():
            assert self.manager.find([block_hash]) == 1
            root, tokens = self.content[block]
            assert chain(root, list(tokens))[-1] == block_hash

    @invariant()
    def a_root_with_nothing_remembered_finds_nothing(self) -> None:
        alive = {self.content[block][0] for block in self.known.values()}
        for root in set(ROOTS) - alive:
            for first in itertools.product((0, 1), repeat=BLOCK_SIZE):
                assert self.manager.find(chain(root, list(first))) == 0

    def teardown(self) -> None:
        for table in self.tables:
            self.manager.release(table.blocks)
        assert self.manager.num_free == NUM_BLOCKS


def test_blocks_stay_sound_whatever_the_order_of_moves() -> None:
    run_state_machine_as_test(BlockManagerMachine, settings=settings(FEW, max_examples=60))


@pytest.mark.slow
def test_blocks_stay_sound_over_many_moves() -> None:
    run_state_machine_as_test(BlockManagerMachine, settings=settings(MANY, max_examples=1500))


def test_a_table_grows_by_whole_blocks_and_only_by_what_is_missing() -> None:
    manager = BlockManager(num_blocks=4, block_size=16)
    table: list[int] = []

    assert manager.grow(table, 17)
    assert len(table) == 2
    assert manager.grow(table, 32)
    assert len(table) == 2
    assert manager.grow(table, 5)
    assert (len(table), manager.num_free) == (2, 2)


def test_without_enough_blocks_nothing_changes() -> None:
    manager = BlockManager(num_blocks=2, block_size=16)
    table: list[int] = []
    manager.grow(table, 16)

    assert not manager.grow(table, 49)
    assert (len(table), manager.num_free) == (1, 1)


def test_the_least_recently_freed_block_goes_first_and_a_prefix_outlives_its_tail() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    hashes = chain(ROOTS[0], [1, 2, 3, 4])
    first: list[int] = []
    manager.grow(first, 4)
    for block, block_hash in zip(first, hashes, strict=True):
        manager.remember(block, block_hash, ROOTS[0])
    manager.release(first)

    second: list[int] = []
    manager.grow(second, 2)
    assert manager.find(hashes) == 2  # the block that never held anything went first
    manager.grow(second, 4)
    assert manager.find(hashes) == 1  # then the end of the released table, not its start


def test_a_free_block_that_is_found_again_is_free_no_more() -> None:
    manager = BlockManager(num_blocks=1, block_size=2)
    [block_hash] = chain(ROOTS[0], [1, 2])
    first: list[int] = []
    manager.grow(first, 2)
    manager.remember(first[0], block_hash, ROOTS[0])
    manager.release(first)

    second: list[int] = []
    manager.reuse(second, [block_hash])

    assert (second, manager.num_free) == ([0], 0)
    assert not manager.grow([], 1)


def test_equal_blocks_are_found_through_the_first_one_as_long_as_it_lasts() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    [block_hash] = chain(ROOTS[0], [1, 2])
    first: list[int] = []
    second: list[int] = []
    manager.grow(first, 2)
    manager.grow(second, 2)
    manager.remember(first[0], block_hash, ROOTS[0])
    manager.remember(second[0], block_hash, ROOTS[0])

    table: list[int] = []
    manager.reuse(table, [block_hash])

    assert table == first


def test_kv_is_shared_only_under_one_base_one_adapter_and_one_tenant() -> None:
    roots = {
        prefix_root(base, adapter, tenant)
        for base in ("base", "base2")
        for adapter in ("", "a", "b")
        for tenant in ("", "t", "u")
    }
    assert len(roots) == 18
    assert prefix_root("base", "a", "t") == prefix_root("base", "a", "t")


def test_a_hash_depends_on_every_token_before_it() -> None:
    assert chain(ROOTS[0], [1, 2, 3, 4])[1] != chain(ROOTS[0], [1, 1, 3, 4])[1]
    assert chain(ROOTS[0], [1, 2, 3, 4])[1] != chain(ROOTS[0], [1, 2, 4, 3])[1]
    assert chain(ROOTS[0], [1, 2]) != chain(ROOTS[1], [1, 2])
