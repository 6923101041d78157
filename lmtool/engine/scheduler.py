"""Who computes what in the next step: decodes first, then prompt chunks, under a token budget. Ints only.

When blocks run out the youngest sequence is preempted: its blocks are freed and it is computed again later.
Knows neither torch nor models nor text.
"""

from collections import deque
from dataclasses import dataclass

from lmtool.engine.batch import Batch, Chunk, Join, StepOutput
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.sequence import Sequence


@dataclass(slots=True)
class Counters:
    """Totals since the engine started."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0


class Scheduler:
    def __init__(self, blocks: BlockManager, *, max_batch_size: int, max_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._by_slot: dict[int, Sequence] = {}
        self._left: list[int] = []  # slots given up since the last batch

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End it at once, whatever it is doing; its blocks are free when this returns."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = "abort"
        if sequence in self.running:
            self._release(sequence, keep=True)
        else:
            self.waiting.remove(sequence)

    # ------------------------------------------------------------------ schedule
    def schedule(self) -> Batch:
        """The next step. Empty only when nothing is waiting or running."""
        batch = Batch()
        budget = self.max_batched_tokens
        decoding = [s for s in self.running if s.num_uncomputed_tokens == 1]
        prefilling = [s for s in self.running if s.num_uncomputed_tokens > 1]
        for sequence in decoding + prefilling:
            if budget > 0 and sequence.slot >= 0:  # an earlier one may have preempted it
                budget -= self._continue(sequence, budget, batch)
        while self.waiting and self._free_slots and budget > 0:
            num_tokens = self._start(self.waiting[0], budget, batch)
            if num_tokens == 0:
                break
            budget -= num_tokens
        batch.leaves, self._left = self._left, []
        return batch

    def _continue(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        count = min(sequence.num_uncomputed_tokens, budget)
        while not self._grow(sequence, sequence.num_computed_tokens + count, batch):
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is sequence:
                return 0
        self._enter(sequence, count, batch)
        return count

    def _start(self, sequence: Sequence, budget: int, batch: Batch) -> int:
        blocks, hashes, num_cached = self.blocks.match(sequence.token_ids)
        count = min(sequence.num_tokens - num_cached, budget)
        needed = self.blocks.blocks_for(num_cached + count) - len(blocks)
        # one block is left for each running sequence, so that starting this one does not at once preempt another
        if needed + (len(self.running) if self.running else 0) > self.blocks.num_free:
            self._return_match(sequence, blocks, hashes, num_cached)
            return 0
        self.waiting.popleft()
        sequence.slot = self._free_slots.pop()
        self._by_slot[sequence.slot] = sequence
        self.running.append(sequence)
        sequence.block_table, sequence.block_hashes = blocks, hashes
        sequence.num_computed_tokens = num_cached
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = num_cached
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_tokens += num_cached
        answer = tuple(sequence.token_ids[sequence.num_prompt_tokens :])
        batch.joins.append(Join(sequence.slot, sequence.request, answer))
        batch.new_blocks.extend((sequence.slot, i, block) for i, block in enumerate(blocks))
        self._grow(sequence, num_cached + count, batch)
        self._enter(sequence, count, batch)
        return count

    def _return_match(self, sequence: Sequence, blocks: list[int], hashes: list[bytes], num_cached: int) -> None:
        if len(blocks) > len(hashes):  # put a taken-over tail back where it can be found again
            start = len(hashes) * self.blocks.block_size
            parent = hashes[-1] if hashes else b""
            self.blocks.publish_tail(blocks[-1], parent, sequence.token_ids[start:num_cached])
        self.blocks.free(blocks)

    def _grow(self, sequence: Sequence, num_tokens: int, batch: Batch) -> bool:
        """Give the sequence blocks for ``num_tokens``; False where there are not enough."""
        have = len(sequence.block_table)
        needed = self.blocks.blocks_for(num_tokens) - have
        if needed > self.blocks.num_free:
            return False
        if needed > 0:
            new = self.blocks.allocate(needed)
            batch.new_blocks.extend((sequence.slot, have + i, block) for i, block in enumerate(new))
            sequence.block_table.extend(new)
        return True

    def _enter(self, sequence: Sequence, count: int, batch: Batch) -> None:
        start = sequence.num_computed_tokens
        samples = start + count == sequence.num_tokens
        if samples and sequence.request.bad_ids:
            batch.bans.extend((sequence.slot, token_id) for token_id in sequence.banned_next())
        if samples and count == 1 and sequence.num_generated_tokens > 0 and not self._joined(sequence, batch):
            batch.decodes.append(sequence.slot)
            batch.positions.append(start)
        else:
            token_ids = sequence.token_ids[start : start + count].tolist()
            batch.chunks.append(Chunk(sequence.slot, start, token_ids, samples))

    @staticmethod
    def _joined(sequence: Sequence, batch: Batch) -> bool:
        return any(join.slot == sequence.slot for join in batch.joins)

    def _preempt(self, victim: Sequence, batch: Batch) -> None:
        batch.new_blocks = [change for change in batch.new_blocks if change[0] != victim.slot]
        batch.bans = [ban for ban in batch.bans if ban[0] != victim.slot]
        if victim.slot in batch.decodes:
            at = batch.decodes.index(victim.slot)
            del batch.decodes[at], batch.positions[at]
        batch.chunks = [chunk for chunk in batch.chunks if chunk.slot != victim.slot]
        self._release(victim, keep=False)
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.appendleft(victim)

    # ------------------------------------------------------------------ finish
    def finish(self, batch: Batch, output: StepOutput) -> list[Sequence]:
        """Take in what came out of ``batch``; returns the sequences that got a token, in `sampled_slots`' order."""
        self.counters.num_steps += 1
        for slot in batch.decodes:
            self._advance(slot, 1)
        for chunk in batch.chunks:
            self._advance(chunk.slot, len(chunk.token_ids))
        touched = []
        for slot, token_id in zip(batch.sampled_slots, output.token_ids, strict=True):
            sequence = self._by_slot.get(slot)
            assert sequence is not None, "slots are given up between steps only"
            sequence.append(token_id)
            self.counters.num_generated_tokens += 1
            touched.append(sequence)
            if sequence.finish_reason is not None:
                self._release(sequence, keep=True)
        return touched

    def fail(self, batch: Batch) -> list[Sequence]:
        """The step broke: end every sequence that was in it, keep nothing it may have written."""
        slots = set(batch.decodes) | {chunk.slot for chunk in batch.chunks}
        failed = [s for s in self.running if s.slot in slots]
        for sequence in failed:
            sequence.finish_reason = "error"
            self._release(sequence, keep=False)
        return failed

    def _advance(self, slot: int, count: int) -> None:
        sequence = self._by_slot[slot]
        sequence.num_computed_tokens += count
        size = self.blocks.block_size
        while (len(sequence.block_hashes) + 1) * size <= sequence.num_computed_tokens:
            i = len(sequence.block_hashes)
            parent = sequence.block_hashes[-1] if i else b""
            tokens = sequence.token_ids[i * size : (i + 1) * size]
            sequence.block_hashes.append(self.blocks.publish(sequence.block_table[i], parent, tokens))

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        """Give up slot and blocks. keep: what was computed may be found again."""
        num_full = len(sequence.block_hashes)
        if keep and len(sequence.block_table) > num_full:
            parent = sequence.block_hashes[-1] if num_full else b""
            rest = sequence.token_ids[num_full * self.blocks.block_size : sequence.num_computed_tokens]
            self.blocks.publish_tail(sequence.block_table[num_full], parent, rest)
        self.blocks.free(sequence.block_table)
        sequence.block_table, sequence.block_hashes = [], []
        self.running.remove(sequence)
        del self._by_slot[sequence.slot]
        self._free_slots.append(sequence.slot)
        self._left.append(sequence.slot)
        sequence.slot = -1
