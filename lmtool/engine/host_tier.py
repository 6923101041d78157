"""What the blocks in host memory hold: full blocks that left the device. Numbers only; `block_copies` moves the bytes.

A block comes in when the device's memory is needed for something else, and stays when it is copied back, so that it
need not be saved again. What was used least recently makes room. A block that is being copied back is pinned.
"""

from heapq import heapify, heappop, heappush


class HostTier:
    """``num_blocks`` of ``block_bytes`` each; 0 blocks: there is none, and nothing is ever found."""

    def __init__(self, num_blocks: int = 0, block_bytes: int = 0) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.num_evictions = 0
        self._pins = [0] * num_blocks
        # lowest number first: neighbours are saved in one copy
        self._empty = list(range(num_blocks))
        heapify(self._empty)
        self._block_of: dict[bytes, int] = {}  # least recently used first
        self._hash_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Blocks that hold something."""
        return len(self._hash_of)

    def pin(self, digest: bytes) -> int | None:
        """The block with this content, which now stays until it is unpinned as often; None where it is not here."""
        block = self._touch(digest)
        if block is not None:
            self._pins[block] += 1
        return block

    def unpin(self, block: int) -> None:
        self._pins[block] -= 1
        assert self._pins[block] >= 0, f"host block {block} unpinned twice"
        if self._pins[block] == 0 and block not in self._hash_of:  # forgotten meanwhile
            heappush(self._empty, block)

    def put(self, digest: bytes) -> int | None:
        """A block for content that leaves the device; None: it is here already, or every block is pinned."""
        if self._touch(digest) is not None:
            return None
        block = heappop(self._empty) if self._empty else self._evict()
        if block is not None:
            self._block_of[digest] = block
            self._hash_of[block] = digest
        return block

    def forget(self, block: int) -> None:
        """What it was to hold never came."""
        del self._block_of[self._hash_of.pop(block)]
        if self._pins[block] == 0:
            heappush(self._empty, block)

    def _touch(self, digest: bytes) -> int | None:
        block = self._block_of.pop(digest, None)
        if block is not None:
            self._block_of[digest] = block
        return block

    def _evict(self) -> int | None:
        for digest, block in self._block_of.items():
            if self._pins[block] == 0:
                del self._block_of[digest], self._hash_of[block]
                self.num_evictions += 1
                return block
        return None

    def check_integrity(self) -> None:
        """Every block is empty, or holds something, or is pinned and forgotten."""
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of
        forgotten = {b for b in range(self.num_blocks) if self._pins[b] and b not in self._hash_of}
        assert len(set(self._empty)) == len(self._empty), "a host block is empty twice"
        assert not forgotten & set(self._empty)
        assert set(self._empty) | set(self._hash_of) | forgotten == set(range(self.num_blocks)), "a host block is lost"
        assert not set(self._empty) & set(self._hash_of), "an empty host block holds something"

    @property
    def num_pinned(self) -> int:
        return sum(pins > 0 for pins in self._pins)
