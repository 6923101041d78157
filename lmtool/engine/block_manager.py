"""Who owns which block of the K/V cache, and where a prompt's beginning is: on the device, or saved on the host.

Knows neither torch nor the cache's dtype. Block 0 is never given out (padded rows use it).
"""

from __future__ import annotations  # array[int] is only a type before Python 3.12

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from lmtool.engine.host_tier import HostTier
from lmtool.engine.prefix_index import PrefixIndex, hash_block

_ROOT = b""
_LEAST_COPIED = 4  # one in so many tokens of a block: fewer are computed sooner than a block is copied


@dataclass(slots=True)
class Match:
    """The longest known beginning of a prompt. Its blocks are owned, those on the host pinned.

    blocks      in their order; 0 stands where one is on the host. The last may be partly filled
    hashes      of the full ones
    on_host     (index in ``blocks``, host block)
    part_of     a full block whose beginning comes after those, and which is somebody else's; 0: none. It is to be
                copied into a block of one's own
    num_tokens  that all of them hold
    """

    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    on_host: list[tuple[int, int]] = field(default_factory=list)
    part_of: int = 0
    num_tokens: int = 0


class BlockManager:
    """``num_blocks`` counts block 0, so ``num_blocks - 1`` can be given out.

    keep_tails: whether a block holds its tokens before it is full; else a sequence's partly filled one is lost with it.
    host: where full blocks go when the device's memory is needed for something else.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        keep_tails: bool = True,
        host: HostTier | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.keep_tails = keep_tails
        self.host = host if host is not None else HostTier()
        self._ref_counts = [0] * num_blocks
        # blocks whose content nobody wants, lowest number first: neighbours are cheap to read on a CPU
        self._empty = list(range(1, num_blocks))
        heapify(self._empty)
        # free blocks whose content may be wanted again, least recently used first
        self._reusable: dict[int, None] = {}
        self._index = PrefixIndex()
        self._saves: dict[int, int] = {}  # host block -> block

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
        block = heappop(self._empty) if self._empty else self._evict()
        self._ref_counts[block] = 1
        return block

    def _evict(self) -> int:
        block = next(iter(self._reusable))
        del self._reusable[block]
        digest = self._index.digest(block)
        host_block = self.host.put(digest) if digest is not None else None
        if host_block is not None:
            self._saves[host_block] = block
        self._index.remove(block)
        return block

    def take_saves(self) -> list[tuple[int, int]]:
        """(block, host block) of what was given up since the last call: copied before anybody writes to the block."""
        saves = [(block, host_block) for host_block, block in self._saves.items()]
        self._saves = {}
        return saves

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each. The last blocks are recycled first: beginnings are shared most."""
        for block in reversed(list(blocks)):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} freed twice"
            if self._ref_counts[block] == 0:
                if block in self._index:
                    self._reusable[block] = None
                else:
                    heappush(self._empty, block)

    def give_back(self, blocks: Sequence[int], hashes: Sequence[bytes], token_ids: array[int]) -> None:
        """Free a sequence's blocks, which hold ``token_ids``; what fills no block may be found again too."""
        rest = token_ids[len(hashes) * self.block_size :]
        if len(blocks) > len(hashes) and rest and self.prefix_caching and self.keep_tails:
            self._index.add_tail(blocks[len(hashes)], hashes[-1] if hashes else _ROOT, rest)
        self.free(block for block in blocks if block)

    # ------------------------------------------------------------------ sharing
    def match(self, token_ids: array[int], *, from_host: bool = True) -> Match:
        """The longest known beginning. At least one token is left to compute; a partly filled block is owned alone."""
        match = Match()
        if not self.prefix_caching:
            return match
        size = self.block_size
        parent = _ROOT
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            digest = hash_block(parent, token_ids[start : start + size])
            block = self._index.find(digest)
            if block is not None:
                self._own(block)
            else:
                host_block = self.host.pin(digest) if from_host else None
                if host_block is None:
                    break
                match.on_host.append((len(match.blocks), host_block))
            match.blocks.append(block or 0)
            match.hashes.append(digest)
            parent = digest
        match.num_tokens = len(match.blocks) * size
        wanted = token_ids[match.num_tokens : len(token_ids) - 1]
        shared, tail = self._index.best_tail(parent, wanted, lambda block: self._ref_counts[block] == 0)
        if shared:
            self._own(tail)
            self._index.remove(tail)  # it will be written to: nobody else may find it
            match.blocks.append(tail)
            match.num_tokens += shared
        elif self.keep_tails and not match.on_host:
            self._share_part(match, parent, wanted)
        return match

    def _share_part(self, match: Match, parent: bytes, wanted: array[int]) -> None:
        shared, block = self._index.best_part(parent, wanted)
        # a copy is worth some tokens; or a row of a picture, for which the whole picture would be encoded again
        if shared * _LEAST_COPIED >= self.block_size or (shared and min(wanted[:shared]) < 0):
            self._own(block)
            match.part_of = block
            match.num_tokens += shared

    def drop_part(self, match: Match) -> None:
        """It is copied by now, in the order of the stream, or will not be."""
        if match.part_of:
            self.free([match.part_of])
            match.part_of = 0

    def release(self, match: Match, token_ids: array[int]) -> None:
        """Give up a match of ``token_ids``: everything can be found again where it was."""
        self.drop_part(match)
        for _, host_block in match.on_host:
            self.host.unpin(host_block)
        self.give_back(match.blocks, match.hashes, token_ids[: match.num_tokens])

    def fetch(self, match: Match) -> list[tuple[int, int]]:
        """Blocks for what is on the host: (host block, block), which are to be copied before anybody reads them.

        Others may find them at once. The copy owns them too; it ends with `free` and `unpin`. The caller has checked
        ``num_free``.
        """
        pairs = []
        for index, host_block in match.on_host:
            block = self._take()
            self._ref_counts[block] += 1
            self._index.add(block, match.hashes[index])
            match.blocks[index] = block
            pairs.append((host_block, block))
        match.on_host = []
        return pairs

    def unpublish(self, block: int) -> None:
        """It does not hold what was said of it."""
        self._index.remove(block)

    def _own(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._reusable[block]
        self._ref_counts[block] += 1

    def publish(self, block: int, parent: bytes, token_ids: array[int]) -> bytes:
        """A block became full: others may find it. Returns its hash."""
        digest = hash_block(parent, token_ids)
        if self.prefix_caching:
            self._index.add(block, digest)
            self._index.add_part(block, parent, token_ids)
        return digest

    # ------------------------------------------------------------------ for tests
    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Every block is empty, reusable or owned exactly as often as ``owners``' tables say."""
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the tables"
        free = [*self._empty, *self._reusable]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b in range(1, self.num_blocks) if counts[b] == 0}, "a block is lost"
        self._index.check_integrity()
        self.host.check_integrity()
