"""Blocks are owned exactly once too often or not at all: hypothesis drives the manager through random lives."""

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmtool.engine.block_manager import BlockManager
from lmtool.engine.host_tier import HostTier
from lmtool.engine.prefix_index import hash_block

SIZE = 4


@dataclass
class Owner:
    """Blocks, the hashes of the full ones, and the tokens they are to hold."""

    table: list[int]
    hashes: list[bytes]
    tokens: array


class Blocks(RuleBasedStateMachine):
    """``content`` is what each block physically holds, ``saved`` each host block; copies end when a rule says so."""

    @initialize(num_blocks=st.integers(4, 20), num_host=st.integers(0, 8), prefix_caching=st.booleans())
    def start(self, num_blocks: int, num_host: int, prefix_caching: bool) -> None:
        self.host = HostTier(num_host, 1)
        self.manager = BlockManager(num_blocks, SIZE, prefix_caching=prefix_caching, host=self.host)
        self.content: dict[int, list[int]] = {b: [] for b in range(num_blocks)}
        self.saved: dict[int, list[int]] = {b: [] for b in range(num_host)}
        self.owners: list[Owner] = []
        self.loads: list[list[tuple[int, int]]] = []

    def copy_out(self) -> None:
        """What was given up is saved before anybody writes to it."""
        for block, host_block in self.manager.take_saves():
            assert len(self.content[block]) == SIZE, "a block was saved that is not full"
            assert host_block not in {host for load in self.loads for host, _ in load}, "a pinned block was given up"
            self.saved[host_block] = list(self.content[block])

    def loading(self) -> set[int]:
        return {block for load in self.loads for _, block in load}

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), from_host=st.booleans())
    def take(self, token_ids: list[int], from_host: bool) -> None:
        tokens = array("q", token_ids)
        match = self.manager.match(tokens, from_host=from_host)
        assert match.num_tokens < len(tokens)
        assert from_host or not match.on_host
        missing = self.manager.blocks_for(len(tokens)) - len(match.blocks)
        if missing + len(match.on_host) > self.manager.num_free or self.loading() & set(match.blocks):
            self.manager.release(match, tokens)
            return
        held = [self.content[block] for block in match.blocks]
        for index, host_block in match.on_host:
            assert match.blocks[index] == 0
            held[index] = self.saved[host_block]
        if match.part_of:
            assert len(self.content[match.part_of]) == SIZE
            assert 0 < match.num_tokens - SIZE * len(match.blocks) < SIZE
            held.append(self.content[match.part_of])
        assert [t for part in held for t in part][: match.num_tokens] == token_ids[: match.num_tokens]
        pairs = self.manager.fetch(match)
        table, hashes = match.blocks, match.hashes
        table += self.manager.allocate(missing)
        assert match.part_of not in table or not match.part_of
        self.manager.drop_part(match)
        self.copy_out()
        if pairs:
            self.loads.append(pairs)
        for i, block in enumerate(table):
            if i >= len(hashes):
                self.content[block] = token_ids[i * SIZE : (i + 1) * SIZE]
        for i in range(len(hashes), len(tokens) // SIZE):
            parent = hashes[-1] if hashes else b""
            hashes.append(self.manager.publish(table[i], parent, tokens[i * SIZE : (i + 1) * SIZE]))
        for _, block in pairs:
            self.content[block] = []  # until the copy ends
        self.owners.append(Owner(table, hashes, tokens))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans())
    def land(self, data: st.DataObject, fails: bool) -> None:
        pairs = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        for host_block, block in pairs:
            self.content[block] = list(self.saved[host_block])
            self.host.unpin(host_block)
            if fails:
                self.manager.unpublish(block)
        self.manager.free(block for _, block in pairs)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), keep=st.booleans())
    def give_back(self, data: st.DataObject, keep: bool) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.manager.give_back(owner.table, owner.hashes, owner.tokens if keep else array("q"))

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "manager"):
            tables = [owner.table for owner in self.owners]
            self.manager.check_integrity(tables + [[block for _, block in load] for load in self.loads])
            assert self.host.num_pinned == len({host for load in self.loads for host, _ in load})

    @invariant()
    def every_owner_still_has_its_tokens(self) -> None:
        if hasattr(self, "manager"):
            for owner in self.owners:
                if not self.loading() & set(owner.table):
                    assert [t for block in owner.table for t in self.content[block]][: len(owner.tokens)] == list(
                        owner.tokens
                    )


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=120, stateful_step_count=40)


def filled(manager: BlockManager, tokens: array, parent: bytes = b"") -> int:
    """A block that was computed and is free now."""
    block = manager.allocate(1)
    manager.publish(block[0], parent, tokens)
    manager.free(block)
    return block[0]


def test_the_least_recently_used_beginning_is_given_up_first() -> None:
    manager = BlockManager(5, SIZE)
    old, new = array("q", [1] * SIZE), array("q", [2] * SIZE)
    for tokens in (old, new):
        filled(manager, tokens)
    manager.allocate(3)  # two were empty, one had to be given up
    assert manager.match(array("q", [*old, 0])).num_tokens == 0
    assert manager.match(array("q", [*new, 0])).num_tokens == SIZE


def test_what_leaves_the_device_is_saved_once_and_found_again() -> None:
    manager = BlockManager(3, SIZE, host=HostTier(4, 1))
    tokens = array("q", [1] * SIZE)
    block = filled(manager, tokens)
    taken = manager.allocate(2)
    ((saved, host_block),) = manager.take_saves()
    assert saved == block
    manager.free(taken)
    match = manager.match(array("q", [*tokens, 0]))
    assert match.on_host == [(0, host_block)]
    assert (match.blocks, match.num_tokens) == ([0], SIZE)
    ((_, back),) = manager.fetch(match)
    manager.free([back])
    manager.free([back])
    manager.allocate(2)
    assert manager.take_saves() == []  # the host has it still


def test_a_beginning_may_lie_partly_here_and_partly_there() -> None:
    manager = BlockManager(4, SIZE, host=HostTier(4, 1))
    parts = [array("q", [i] * SIZE) for i in range(3)]
    parent, blocks = b"", []
    for part in parts:
        blocks.append(filled(manager, part, parent))
        parent = hash_block(parent, part)
    first = manager.allocate(1)  # the least recently used: the first of the three
    assert first == blocks[:1]
    match = manager.match(array("q", [*parts[0], *parts[1], *parts[2], 9]))
    assert match.blocks == [0, blocks[1], blocks[2]]
    assert [index for index, _ in match.on_host] == [0]
    assert match.num_tokens == 3 * SIZE
    manager.release(match, array("q"))
    manager.check_integrity([first])


# ---------------------------------------------------------------------- the host tier by itself
def test_what_was_used_least_recently_makes_room_on_the_host() -> None:
    tier = HostTier(2, 1)
    first, second = tier.put(b"1"), tier.put(b"2")
    assert tier.put(b"1") is None  # it is there, and was used now
    assert tier.put(b"3") == second
    assert tier.num_evictions == 1
    assert (tier.pin(b"2"), tier.pin(b"1")) == (None, first)


def test_pinned_host_blocks_stay() -> None:
    tier = HostTier(1, 1)
    block = tier.put(b"1")
    assert tier.pin(b"1") == tier.pin(b"1") == block
    tier.unpin(0)
    assert tier.put(b"2") is None
    tier.unpin(0)
    assert tier.put(b"2") == block
    with pytest.raises(AssertionError, match="unpinned twice"):
        tier.unpin(0)


def test_a_forgotten_host_block_is_empty_when_nobody_pins_it() -> None:
    tier = HostTier(1, 1)
    tier.put(b"1")
    tier.pin(b"1")
    tier.forget(0)
    tier.check_integrity()
    assert tier.pin(b"1") is None
    assert tier.put(b"2") is None
    tier.unpin(0)
    assert tier.put(b"2") == 0
    tier.check_integrity()
