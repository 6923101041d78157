"""Who owns which block of the K/V cache, and which blocks hold a beginning that another prompt shares.

A full block is known by a hash chained over its sequence's tokens, so equal hashes mean equal beginnings. A
finished sequence's last, partly filled block is remembered too: the next turn of a conversation takes it over.
Knows neither torch nor the cache's dtype. Block 0 is never given out (padded rows use it).
"""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from collections import deque
from collections.abc import Iterable
from hashlib import blake2b
from heapq import heapify, heappop, heappush

_ROOT = b""
# partly filled blocks remembered after one beginning: each is compared token by token when a prompt comes
_MAX_TAILS = 16


def hash_block(parent: bytes, token_ids: array[int]) -> bytes:
    """A collision-resistant name for 'these tokens after that beginning'."""
    return blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class BlockManager:
    """``num_blocks`` counts block 0, so ``num_blocks - 1`` can be given out.

    keep_tails: whether a block holds its tokens before it is full; else a sequence's partly filled one is lost with it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, keep_tails: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.keep_tails = keep_tails
        self._ref_counts = [0] * num_blocks
        # blocks whose content nobody wants, lowest number first: neighbours are cheap to read on a CPU
        self._empty = list(range(1, num_blocks))
        heapify(self._empty)
        # free blocks whose content may be wanted again, least recently used first
        self._reusable: dict[int, None] = {}
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._tails_of: dict[bytes, dict[int, array[int]]] = {}  # parent hash -> block -> its tokens, newest last
        self._tail_parent: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._reusable)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ------------------------------------------------------------------ giving out and taking back
    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, each owned once. The caller has checked ``num_free``."""
        assert count <= self.num_free, "the scheduler checks before it allocates"
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._empty:
            block = heappop(self._empty)
        else:
            block = next(iter(self._reusable))
            del self._reusable[block]
            self._forget(block)
        self._ref_counts[block] = 1
        return block

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each. The last blocks are recycled first: beginnings are shared most."""
        for block in reversed(list(blocks)):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} freed twice"
            if self._ref_counts[block] == 0:
                if block in self._hash_of or block in self._tail_parent:
                    self._reusable[block] = None
                else:
                    heappush(self._empty, block)

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None and self._block_of.get(digest) == block:
            del self._block_of[digest]
        parent = self._tail_parent.pop(block, None)
        if parent is not None:
            del self._tails_of[parent][block]
            if not self._tails_of[parent]:
                del self._tails_of[parent]

    # ------------------------------------------------------------------ sharing
    def match(self, token_ids: array[int]) -> tuple[list[int], list[bytes], int]:
        """(blocks, their hashes, tokens they hold) of the longest known beginning; ownership is taken.

        At least one token is left to compute. The last block may be partly filled; it is then owned alone.
        """
        blocks: list[int] = []
        hashes: list[bytes] = []
        if not self.prefix_caching:
            return blocks, hashes, 0
        size = self.block_size
        parent = _ROOT
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            digest = hash_block(parent, token_ids[start : start + size])
            block = self._block_of.get(digest)
            if block is None:
                break
            self._own(block)
            blocks.append(block)
            hashes.append(digest)
            parent = digest
        num_cached = len(blocks) * size
        tail = self._match_tail(parent, token_ids, num_cached)
        if tail is not None:
            blocks.append(tail[0])
            num_cached += tail[1]
        return blocks, hashes, num_cached

    def _own(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._reusable[block]
        self._ref_counts[block] += 1

    def _match_tail(self, parent: bytes, token_ids: array[int], start: int) -> tuple[int, int] | None:
        wanted = token_ids[start : len(token_ids) - 1]
        best = (0, 0)  # tokens shared, block
        for block, tokens in self._tails_of.get(parent, {}).items():
            if self._ref_counts[block] == 0:
                best = max(best, (_num_shared(wanted, tokens), block))
        shared, block = best
        if shared == 0:
            return None
        self._own(block)
        self._forget(block)  # it will be written to: nobody else may find it
        return block, shared

    def publish(self, block: int, parent: bytes, token_ids: array[int]) -> bytes:
        """A block became full: others may find it. Returns its hash."""
        digest = hash_block(parent, token_ids)
        if self.prefix_caching and digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
        return digest

    def publish_tail(self, block: int, parent: bytes, token_ids: array[int]) -> None:
        """A sequence ends with this partly filled block, which it still owns alone."""
        if not (self.prefix_caching and self.keep_tails and token_ids):
            return
        tails = self._tails_of.setdefault(parent, {})
        if len(tails) == _MAX_TAILS:
            del self._tail_parent[next(iter(tails))]
            del tails[next(iter(tails))]
        tails[block] = token_ids
        self._tail_parent[block] = parent

    # ------------------------------------------------------------------ for tests
    def check_integrity(self, owners: Iterable[list[int]]) -> None:
        """Every block is empty, reusable or owned exactly as often as ``owners``' tables say."""
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the tables"
        free = deque(self._empty)
        free.extend(self._reusable)
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b in range(1, self.num_blocks) if counts[b] == 0}, "a block is lost"
        assert all(self._block_of[digest] == block for block, digest in self._hash_of.items())
        assert all(block in self._tails_of[parent] for block, parent in self._tail_parent.items())
        assert sum(len(tails) for tails in self._tails_of.values()) == len(self._tail_parent)
        assert len(self._block_of) == len(self._hash_of)


def _num_shared(first: array[int], second: array[int]) -> int:
    """Length of the common beginning."""
    for i, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        if mine != theirs:
            return i
    return min(len(first), len(second))
