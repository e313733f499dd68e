"""Which KV blocks are free, held or shared, and which prompt prefixes they still know."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BlockHash = bytes


def prefix_root(base_digest: str, digest: str, tenant: str) -> BlockHash:
    """The start of a hash chain: KV is shared only under the same weights and the same tenant.

    digest  of the adapter or merged model; empty for the base
    """
    parts = (base_digest, digest, tenant)
    return hashlib.sha256("\0".join(parts).encode()).digest()


def extend_chain(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The hash of one more full block after `parent`."""
    return hashlib.sha256(parent + np.asarray(token_ids, dtype=np.int32).tobytes()).digest()


class BlockManager:
    """Hands out fixed-size KV blocks. A block is free or referenced, never both.

    A free block keeps its contents, and the hash that finds them, until it is handed out again;
    the least recently freed goes first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._root_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        """Blocks that could be handed out now."""
        return len(self._free)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Make `block_table` cover `num_tokens`. False, changing nothing, if blocks run out."""
        num_missing = self.blocks_for(num_tokens) - len(block_table)
        if num_missing > len(self._free):
            return False
        block_table.extend(self._take() for _ in range(num_missing))
        return True

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def find(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of a hash chain are still known."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self._block_of:
                return count
        return len(hashes)

    def reuse(self, block_table: list[int], hashes: Sequence[BlockHash]) -> None:
        """Reference the known blocks of a chain and append them to `block_table`."""
        for block_hash in hashes:
            block = self._block_of[block_hash]
            self._free.pop(block, None)
            self._references[block] += 1
            block_table.append(block)

    def remember(self, block: int, block_hash: BlockHash, root: BlockHash) -> None:
        """Let later requests find this full, computed block. The first of equal blocks is kept."""
        if block_hash in self._block_of or block in self._hash_of:
            return
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        self._root_of[block] = root

    def release(self, block_table: list[int]) -> None:
        """Give back one reference of each block and empty the table."""
        for block in reversed(block_table):  # a prefix outlives what was built on it
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        block_table.clear()

    def forget(self, root: BlockHash) -> None:
        """Drop every hash of a chain's root: nothing finds these blocks any more."""
        for block in [block for block, own in self._root_of.items() if own == root]:
            self._forget_block(block)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget_block(block)
        self._references[block] = 1
        return block

    def _forget_block(self, block: int) -> None:
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            del self._root_of[block]
