"""Blocks of the paged KV cache: who holds which, and which full blocks can be shared by equal prefixes.

Pure bookkeeping over block numbers and hashes: it knows no sequence, no tensor and no time. A block is

* **held** while its reference count is above zero;
* **free** otherwise. A free block may still hold the keys and values of a known prefix (it is *cached*): it is found
  by its hash until it is handed out again, least recently used first, blocks without a hash before all others.

A block's hash covers its own tokens and, through its parent's hash, all tokens before it, so equal hashes mean
equal prefixes. Only full blocks have one, and a full block is never written again: sharing needs no copy.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """128-bit BLAKE2b of a full block's tokens, chained to the hash of the block before it (``b""`` for the first)."""
    tokens = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


class BlockManager:
    """``num_blocks`` reference-counted blocks, numbered from 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be handed out first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest cached prefix of these hashes. They are not held yet: see ``acquire``."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def cost(self, matched: Iterable[int], num_new: int) -> int:
        """How many free blocks ``acquire(matched, num_new)`` would take."""
        return num_new + sum(1 for block in matched if self._ref_counts[block] == 0)

    def acquire(self, matched: Sequence[int], num_new: int) -> list[int]:
        """Hold the matched blocks and ``num_new`` others; the caller has seen to it that ``num_free`` suffices.

        The matched ones are taken out of the free list first, so that making room for the others cannot evict them.
        """
        for block in matched:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        blocks = list(matched)
        for _ in range(num_new):
            block, _none = self._free.popitem(last=False)
            digest = self._hashes[block]
            if digest is not None:
                del self._cached[digest]
                self._hashes[block] = None
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, digest: bytes) -> None:
        """Make a held, full block findable. If an equal one is known already, that one stays the shared copy."""
        if digest not in self._cached:
            assert self._hashes[block] is None, "a block's content never changes while it is held"
            self._cached[digest] = block
            self._hashes[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold of each block of a sequence, given in the sequence's order.

        The last block goes to the free list first: a prefix's end is evicted before its beginning, which more
        sequences can share.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} was released more often than acquired"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)
