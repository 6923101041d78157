"""Where a sequence's beginning comes from: blocks on the device, or on their way to it from the host. Ints only.

A load owns its blocks until it has landed, whoever else wanted them meanwhile and gave up: so nobody writes to a block
that a copy is still writing to, and what an aborted request had asked for is there for the next one.
"""

from collections.abc import Iterable
from itertools import count

from lmtool.engine.batch import Load
from lmtool.engine.block_manager import BlockManager, Match
from lmtool.engine.counters import Counters
from lmtool.engine.sequence import Sequence
from lmtool.engine.swap_cost import SwapCost


class Loads:
    """A sequence that waits in here is in no queue. What it was given stands in its ``block_table``, as it does
    afterwards, until it starts or must give it back."""

    def __init__(self, blocks: BlockManager, counters: Counters, swap_cost: SwapCost) -> None:
        self._blocks = blocks
        self._counters = counters
        self._swap_cost = swap_cost
        self._numbers = count()
        self._under_way: dict[int, Load] = {}
        self._load_of: dict[int, int] = {}  # block -> number of the load that fills it
        self._awaited: dict[Sequence, set[int]] = {}  # in the order in which they began to wait

    def __bool__(self) -> bool:
        return bool(self._under_way)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._awaited

    @property
    def num_sequences(self) -> int:
        return len(self._awaited)

    @property
    def num_missing_blocks(self) -> int:
        """That those who wait will need to start, and one more each."""
        return sum(
            1 + self._blocks.blocks_for(sequence.num_tokens) - len(sequence.block_table) for sequence in self._awaited
        )

    @property
    def tables(self) -> list[list[int]]:
        """Who owns which blocks here: the loads, and the sequences that wait for them."""
        loads = [[block for _, block in load.blocks] for load in self._under_way.values()]
        return loads + [sequence.block_table for sequence in self._awaited]

    # ------------------------------------------------------------------ before it starts
    def find(self, sequence: Sequence) -> Match:
        """What was loaded for it, or what can be found; on the host only where loading is cheaper than computing."""
        if sequence.block_table:
            return Match(sequence.block_table, sequence.block_hashes, num_tokens=sequence.num_computed_tokens)
        match = self._blocks.match(sequence.shareable_ids)
        if match.on_host:
            first, _ = match.on_host[0]
            num_tokens = match.num_tokens - first * self._blocks.block_size
            if not self._swap_cost.prefers_load(len(match.on_host), num_tokens):
                self._blocks.release(match, sequence.token_ids)
                return self._blocks.match(sequence.shareable_ids, from_host=False)
        return match

    def put_back(self, sequence: Sequence, match: Match) -> None:
        """It cannot start now. What was loaded for it stays with it; what was only found is left to others."""
        if not sequence.block_table:
            self._blocks.release(match, sequence.token_ids)

    def give(self, sequence: Sequence, match: Match, loads: list[Load]) -> bool:
        """The sequence has this beginning. False: it is on the way, what is to be copied was added to ``loads``."""
        awaited = {self._load_of[block] for block in match.blocks if block in self._load_of}
        if match.on_host:
            load = self._begin(match)
            awaited.add(load.number)
            loads.append(load)
        if awaited:
            self._awaited[sequence] = awaited
            if match.part_of:  # it has no block yet to be copied into
                self._blocks.drop_part(match)
                match.num_tokens = len(match.hashes) * self._blocks.block_size
        _set_beginning(sequence, match)
        return not awaited

    def _begin(self, match: Match) -> Load:
        load = Load(next(self._numbers), self._blocks.fetch(match))
        self._under_way[load.number] = load
        self._load_of |= {block: load.number for _, block in load.blocks}
        self._counters.num_host_hit_blocks += len(load.blocks)
        self._counters.num_host_hit_tokens += len(load.blocks) * self._blocks.block_size
        self._counters.host_loaded_bytes += len(load.blocks) * self._blocks.host.block_bytes
        return load

    def take_back(self, sequence: Sequence) -> None:
        """It has not started; what it was given can be found again."""
        held = sequence.token_ids[: sequence.num_computed_tokens]
        self._blocks.give_back(sequence.block_table, sequence.block_hashes, held)
        _set_beginning(sequence, Match())

    # ------------------------------------------------------------------ afterwards
    def landed(self, numbers: Iterable[int]) -> list[Sequence]:
        """These are over: whose beginning is now complete."""
        for number in numbers:
            self._end(number)
        ready = [sequence for sequence, awaited in self._awaited.items() if not awaited & self._under_way.keys()]
        for sequence in ready:
            del self._awaited[sequence]
        return ready

    def failed(self, loads: Iterable[Load]) -> list[Sequence]:
        """Their blocks hold nothing: who waited for them, and has nothing now."""
        numbers = {load.number for load in loads}
        for number in numbers:
            for _, block in self._under_way[number].blocks:
                self._blocks.unpublish(block)
            self._end(number)
        losers = [sequence for sequence, awaited in self._awaited.items() if awaited & numbers]
        for sequence in losers:
            self.remove(sequence)
            self.take_back(sequence)
        return losers

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more; what was asked for comes all the same."""
        del self._awaited[sequence]

    def _end(self, number: int) -> None:
        blocks = self._under_way.pop(number).blocks
        for host_block, block in blocks:
            self._blocks.host.unpin(host_block)
            del self._load_of[block]
        self._blocks.free(block for _, block in blocks)


def _set_beginning(sequence: Sequence, match: Match) -> None:
    sequence.block_table, sequence.block_hashes = match.blocks, match.hashes
    sequence.num_computed_tokens = sequence.num_finished_tokens = match.num_tokens
