"""Which blocks hold which beginnings of token ids. Knows neither who owns a block nor whether it is free.

A full block is known by a hash chained over its sequence's tokens, so equal hashes mean equal beginnings. A finished
sequence's last, partly filled block is remembered by its tokens: the next turn of a conversation takes it over. So are
the newest full ones, of which somebody else may want the beginning alone.
"""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from collections.abc import Callable
from hashlib import blake2b

# blocks remembered by their tokens after one beginning, of each kind: all are compared when a prompt comes
_MAX_TAILS = 16


def hash_block(parent: bytes, token_ids: array[int]) -> bytes:
    """A collision-resistant name for 'these tokens after that beginning'."""
    return blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class PrefixIndex:
    """Full blocks by hash, partly filled ones, and full ones of late, by the hash before them."""

    def __init__(self) -> None:
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._tails_of: dict[bytes, dict[int, array[int]]] = {}  # parent hash -> block -> its tokens, newest last
        self._tail_parent: dict[int, bytes] = {}
        self._full_of: dict[bytes, dict[int, array[int]]] = {}  # the same of full ones
        self._full_parent: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of or block in self._tail_parent

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def digest(self, block: int) -> bytes | None:
        """The hash of a full block; None for others."""
        return self._hash_of.get(block)

    def add(self, block: int, digest: bytes) -> None:
        """A block is full. Where another is known for these tokens, that one stays."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def add_tail(self, block: int, parent: bytes, token_ids: array[int]) -> None:
        """A block that is not full."""
        _remember(self._tails_of, self._tail_parent, block, parent, token_ids)

    def add_part(self, block: int, parent: bytes, token_ids: array[int]) -> None:
        """A full block, which was added: its beginning may be found too."""
        if block in self._hash_of:
            _remember(self._full_of, self._full_parent, block, parent, token_ids)

    def best_tail(self, parent: bytes, wanted: array[int], usable: Callable[[int], bool]) -> tuple[int, int]:
        """(tokens shared, block) of the usable tail after ``parent`` that begins most like ``wanted``; (0, 0): none."""
        return _best(self._tails_of.get(parent, {}), wanted, usable)

    def best_part(self, parent: bytes, wanted: array[int]) -> tuple[int, int]:
        """The same of full blocks."""
        return _best(self._full_of.get(parent, {}), wanted, lambda block: True)

    def remove(self, block: int) -> None:
        """Its content is about to be another; harmless where it is not known."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        _forget(self._tails_of, self._tail_parent, block)
        _forget(self._full_of, self._full_parent, block)

    def check_integrity(self) -> None:
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._block_of[digest] == block for block, digest in self._hash_of.items())
        for by_parent, parent_of in ((self._tails_of, self._tail_parent), (self._full_of, self._full_parent)):
            assert all(block in by_parent[parent] for block, parent in parent_of.items())
            assert sum(len(blocks) for blocks in by_parent.values()) == len(parent_of)
        assert self._full_parent.keys() <= self._hash_of.keys(), "a block is not full"
        assert not self._hash_of.keys() & self._tail_parent.keys(), "a block is full and is not"


def _remember(
    by_parent: dict[bytes, dict[int, array[int]]],
    parent_of: dict[int, bytes],
    block: int,
    parent: bytes,
    token_ids: array[int],
) -> None:
    blocks = by_parent.setdefault(parent, {})
    if len(blocks) == _MAX_TAILS:
        oldest = next(iter(blocks))
        del parent_of[oldest], blocks[oldest]
    blocks[block] = token_ids
    parent_of[block] = parent


def _forget(by_parent: dict[bytes, dict[int, array[int]]], parent_of: dict[int, bytes], block: int) -> None:
    parent = parent_of.pop(block, None)
    if parent is not None:
        del by_parent[parent][block]
        if not by_parent[parent]:
            del by_parent[parent]


def _best(blocks: dict[int, array[int]], wanted: array[int], usable: Callable[[int], bool]) -> tuple[int, int]:
    best = (0, 0)
    for block, tokens in blocks.items():
        if usable(block):
            best = max(best, (_num_shared(wanted, tokens), block))
    return best if best[0] else (0, 0)


def _num_shared(first: array[int], second: array[int]) -> int:
    """Length of the common beginning."""
    for i, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        if mine != theirs:
            return i
    return min(len(first), len(second))
