"""Which blocks hold which beginnings of token ids. Knows neither who owns a block nor whether it is free.

A full block is known by a hash chained over its sequence's tokens, so equal hashes mean equal beginnings. A finished
sequence's last, partly filled block is remembered by its tokens: the next turn of a conversation takes it over.
"""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from collections.abc import Callable
from hashlib import blake2b

# partly filled blocks remembered after one beginning: each is compared token by token when a prompt comes
_MAX_TAILS = 16


def hash_block(parent: bytes, token_ids: array[int]) -> bytes:
    """A collision-resistant name for 'these tokens after that beginning'."""
    return blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class PrefixIndex:
    """Full blocks by hash, partly filled ones by the hash before them. A block is in it once at most."""

    def __init__(self) -> None:
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._tails_of: dict[bytes, dict[int, array[int]]] = {}  # parent hash -> block -> its tokens, newest last
        self._tail_parent: dict[int, bytes] = {}

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
        tails = self._tails_of.setdefault(parent, {})
        if len(tails) == _MAX_TAILS:
            oldest = next(iter(tails))
            del self._tail_parent[oldest], tails[oldest]
        tails[block] = token_ids
        self._tail_parent[block] = parent

    def best_tail(self, parent: bytes, wanted: array[int], usable: Callable[[int], bool]) -> tuple[int, int]:
        """(tokens shared, block) of the usable tail after ``parent`` that begins most like ``wanted``; (0, 0): none."""
        best = (0, 0)
        for block, tokens in self._tails_of.get(parent, {}).items():
            if usable(block):
                best = max(best, (_num_shared(wanted, tokens), block))
        return best if best[0] else (0, 0)

    def remove(self, block: int) -> None:
        """Its content is about to be another; harmless where it is not known."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        parent = self._tail_parent.pop(block, None)
        if parent is not None:
            del self._tails_of[parent][block]
            if not self._tails_of[parent]:
                del self._tails_of[parent]

    def check_integrity(self) -> None:
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._block_of[digest] == block for block, digest in self._hash_of.items())
        assert all(block in self._tails_of[parent] for block, parent in self._tail_parent.items())
        assert sum(len(tails) for tails in self._tails_of.values()) == len(self._tail_parent)
        assert not self._hash_of.keys() & self._tail_parent.keys(), "a block is full and is not"


def _num_shared(first: array[int], second: array[int]) -> int:
    """Length of the common beginning."""
    for i, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        if mine != theirs:
            return i
    return min(len(first), len(second))
