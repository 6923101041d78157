"""Blocks are owned exactly once too often or not at all: hypothesis drives the manager through random lives."""

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmtool.engine.block_manager import BlockManager

SIZE = 4


class Blocks(RuleBasedStateMachine):
    """Each owner holds a table and the tokens it wrote; ``content`` is what each block physically holds."""

    @initialize(num_blocks=st.integers(4, 20), prefix_caching=st.booleans())
    def start(self, num_blocks: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(num_blocks, SIZE, prefix_caching=prefix_caching)
        self.content: dict[int, list[int]] = {b: [] for b in range(num_blocks)}
        self.owners: list[tuple[list[int], list[bytes], array]] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def take(self, token_ids: list[int]) -> None:
        tokens = array("q", token_ids)
        table, hashes, num_cached = self.manager.match(tokens)
        assert num_cached < len(tokens)
        held = [t for b in table for t in self.content[b]][:num_cached]
        assert held == token_ids[:num_cached], "the blocks found hold other tokens"
        missing = self.manager.blocks_for(len(tokens)) - len(table)
        if missing > self.manager.num_free:
            self.manager.free(table)
            return
        table += self.manager.allocate(missing)
        for i, block in enumerate(table):
            if i >= len(hashes):
                self.content[block] = token_ids[i * SIZE : (i + 1) * SIZE]
        for i in range(len(hashes), len(tokens) // SIZE):
            parent = hashes[-1] if hashes else b""
            hashes.append(self.manager.publish(table[i], parent, tokens[i * SIZE : (i + 1) * SIZE]))
        self.owners.append((table, hashes, tokens))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), keep=st.booleans())
    def give_back(self, data: st.DataObject, keep: bool) -> None:
        table, hashes, tokens = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        if keep and len(table) > len(hashes):
            parent = hashes[-1] if hashes else b""
            self.manager.publish_tail(table[len(hashes)], parent, tokens[len(hashes) * SIZE :])
        self.manager.free(table)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_integrity(table for table, _, _ in self.owners)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_beginning_is_given_up_first() -> None:
    manager = BlockManager(5, SIZE)
    old, new = array("q", [1] * SIZE), array("q", [2] * SIZE)
    for tokens in (old, new):
        block = manager.allocate(1)
        manager.publish(block[0], b"", tokens)
        manager.free(block)
    manager.allocate(3)  # two were empty, one had to be given up
    assert manager.match(array("q", [*old, 0]))[2] == 0
    assert manager.match(array("q", [*new, 0]))[2] == SIZE
