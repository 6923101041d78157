"""Who computes what in the next step: decodes first, then prompt chunks, under a token budget. Ints only.

A step may be scheduled before the ones before it were read: their tokens count as existing, and only their number is
used. When blocks run out the youngest sequence is preempted: its blocks are freed, and it starts again later with what
is left of them.
Knows neither torch nor models nor text.

Slots and blocks are handed out again as soon as they are given up, also while launched steps still use them: the
device runs steps in their order, so whoever gets them writes after the last one who reads or writes them.

A sequence whose beginning is on the host (`host_tier`) leaves the queue until it is back; then it starts next.
"""

from collections import deque
from collections.abc import Iterable

from lmtool.engine.batch import Batch, Chunk, CopiesDone, Join, Mask, StepOutput
from lmtool.engine.block_manager import BlockManager
from lmtool.engine.counters import Counters
from lmtool.engine.flight import Flight, Part
from lmtool.engine.image_budget import tiles_to_encode, tokens_within
from lmtool.engine.loads import Loads
from lmtool.engine.sequence import Sequence
from lmtool.engine.swap_cost import SwapCost


class Scheduler:
    """max_image_tiles: of pictures that a step encodes, unless its first one alone has more.

    join_group: while all slots are taken and others wait, sequences start so many at a time.

    A step with a prompt in it costs more than one without; where there is a queue anyway, a few of them at once are
    cheaper than one in each step.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_batched_tokens: int,
        max_image_tiles: int = 1,
        join_group: int = 1,
        swap_cost: SwapCost | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_batched_tokens = max_batched_tokens
        self.max_image_tiles = max_image_tiles
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.counters = Counters()
        self.swap_cost = swap_cost or SwapCost(float("inf"), blocks.host.block_bytes)
        self.loads = Loads(blocks, self.counters, self.swap_cost)
        self._join_group = join_group
        self._free_slots = list(range(max_batch_size - 1, -1, -1))
        self._left: list[int] = []  # slots given up since the last batch
        self._flights: deque[Flight] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.loads)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def add_first(self, sequences: Iterable[Sequence]) -> None:
        """They came before those who wait here, but could not start until now."""
        self.waiting.extendleft(reversed(list(sequences)))

    def abort(self, sequence: Sequence) -> None:
        """End it at once, whatever it is doing; its blocks are free when this returns, or their load has landed."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "abort"
            self._leave(sequence, keep=True)

    # ------------------------------------------------------------------ schedule
    def schedule(self) -> Batch:
        """The next step. Without tokens only when nothing waits or runs, or all of it waits for a step to be read or
        for a load to land."""
        flight = Flight(Batch())
        budget = self.max_batched_tokens
        # decodes come first by themselves: nobody starts behind a prompt that the budget has cut
        for sequence in [s for s in self.running if not self._must_wait(s)]:
            if budget > 0 and sequence.slot >= 0:  # an earlier one may have preempted it
                budget -= self._continue(sequence, budget, flight)
        while budget > 0 and self._may_join(flight.batch):
            num_tokens = self._start(self.waiting[0], budget, flight)
            if num_tokens is None:
                break
            budget -= num_tokens
        flight.batch.saves = self.blocks.take_saves()
        self.counters.host_saved_bytes += len(flight.batch.saves) * self.blocks.host.block_bytes
        self.counters.num_host_evictions = self.blocks.host.num_evictions
        if flight.decodes or flight.chunks:
            flight.batch.leaves, self._left = self._left, []
            self._flights.append(flight)
        return flight.batch

    @staticmethod
    def _must_wait(sequence: Sequence) -> bool:
        """For a step to be read: its last token is on the way, or what may come next depends on one that is. Or for
        its grammar, which is told a token only when it was read."""
        in_flight = sequence.num_inflight_tokens
        return sequence.waits_for_its_grammar or (
            in_flight > 0
            and (len(sequence.token_ids) + in_flight >= sequence.most_tokens or sequence.needs_known_tokens)
        )

    def _may_join(self, batch: Batch) -> bool:
        num_slots = len(self._free_slots) - self.loads.num_sequences  # those that wait for a load get theirs first
        if not self.waiting or num_slots <= 0:
            return False
        if self.waiting[0].num_inflight_tokens or self.waiting[0].waits_for_its_grammar:  # it was preempted just now
            return False
        enough = min(self._join_group, len(self.waiting), len(self.running) + 1)
        return bool(batch.joins) or num_slots >= enough

    def _continue(self, sequence: Sequence, budget: int, flight: Flight) -> int:
        start = sequence.num_computed_tokens
        count = min(sequence.num_uncomputed_tokens, budget)
        if sequence.request.images:
            count = tokens_within(sequence, start, count, flight.num_tiles, self.max_image_tiles)
        while not self._grow(sequence, start + count, flight.batch):
            if self._reclaim():
                continue
            victim = self.running[-1]
            self._preempt(victim, flight)
            if victim is sequence:
                return 0
        if count:
            self._enter(sequence, count, flight)
        return count

    def _start(self, sequence: Sequence, budget: int, flight: Flight) -> int | None:
        """Tokens that it computes in this step, 0: its beginning is on the way; None: there are not enough blocks, or
        enough pictures are encoded already."""
        match = self.loads.find(sequence)
        count = min(sequence.num_tokens - match.num_tokens, budget)
        count = tokens_within(sequence, match.num_tokens, count, flight.num_tiles, self.max_image_tiles, joined=True)
        if not count:
            self.loads.put_back(sequence, match)
            return None
        needed = self.blocks.blocks_for(match.num_tokens + count) - len(match.blocks) + len(match.on_host)
        # one block is left for each running sequence, so that starting this one does not at once preempt another
        if needed + len(self.running) + self.loads.num_missing_blocks > self.blocks.num_free:
            self.loads.put_back(sequence, match)
            again = not self.running and not self.loads and self._reclaim(but=sequence)
            return self._start(sequence, budget, flight) if again else None
        self.waiting.popleft()
        if not self.loads.give(sequence, match, flight.batch.loads):
            return 0
        self._join(sequence, flight.batch)
        self._grow(sequence, match.num_tokens + count, flight.batch)
        if match.part_of:
            flight.batch.copies.append((match.part_of, sequence.block_table[len(match.hashes)]))
            self.blocks.drop_part(match)
        self._enter(sequence, count, flight, joined=True)
        return count

    def _join(self, sequence: Sequence, batch: Batch) -> None:
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_tokens += sequence.num_cached_tokens
        answer = tuple(sequence.token_ids[sequence.num_prompt_tokens :])
        batch.joins.append(Join(sequence.slot, sequence.request, answer))
        batch.new_blocks.extend((sequence.slot, i, block) for i, block in enumerate(sequence.block_table))

    def _reclaim(self, but: Sequence | None = None) -> bool:
        """The last one in the queue for whom blocks were loaded gives them back."""
        for sequence in reversed(self.waiting):
            if sequence.block_table and sequence is not but:
                self.loads.take_back(sequence)
                return True
        return False

    def _grow(self, sequence: Sequence, num_tokens: int, batch: Batch) -> bool:
        """Give the sequence blocks for ``num_tokens``; False where there are not enough."""
        have = len(sequence.block_table)
        if num_tokens <= have * self.blocks.block_size:
            return True
        needed = self.blocks.blocks_for(num_tokens) - have
        if needed > self.blocks.num_free:
            return False
        new = self.blocks.allocate(needed)
        batch.new_blocks.extend((sequence.slot, have + i, block) for i, block in enumerate(new))
        sequence.block_table.extend(new)
        return True

    def _enter(self, sequence: Sequence, count: int, flight: Flight, *, joined: bool = False) -> None:
        start = sequence.num_computed_tokens
        end = start + count
        samples = end == sequence.num_tokens
        part = Part(sequence, sequence.num_preemptions, end, samples)
        batch = flight.batch
        if samples and sequence.request.bad_ids:
            batch.bans.extend((sequence.slot, token_id) for token_id in sequence.banned_next())
        constraint = sequence.constraint
        if samples and constraint is not None and constraint.allowed is not None:
            batch.masks.append(Mask(sequence.slot, constraint.allowed, constraint.only_ends))
        if samples and count == 1 and start >= sequence.num_prompt_tokens and not joined:
            batch.decodes.append(sequence.slot)
            batch.positions.append(start)
            flight.decodes.append(part)
        else:
            token_ids = sequence.token_ids[start:end].tolist()
            images = sequence.image_rows(start, end)
            flight.num_tiles += tiles_to_encode(images, joined=joined)
            batch.chunks.append(Chunk(sequence.slot, start, token_ids, samples, sequence.scored(start, end), images))
            flight.chunks.append(part)
        sequence.num_computed_tokens = end
        sequence.num_inflight_tokens += samples

    def _preempt(self, victim: Sequence, flight: Flight) -> None:
        assert all(part.sequence is not victim for part in flight.parts), "the youngest enters last"
        self._leave(victim, keep=False)  # its full blocks are found again; its open one is about to be taken
        victim.num_computed_tokens = victim.num_finished_tokens = 0
        victim.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.appendleft(victim)

    # ------------------------------------------------------------------ copies
    def landed(self, done: CopiesDone) -> None:
        """Copies came to an end: whose beginning is there now is the next to start."""
        self.counters.host_copy_s += done.seconds
        self.waiting.extendleft(reversed(self.loads.landed(done.loads)))

    def copies_failed(self, batch: Batch) -> None:
        """None of the batch's copies was made, or not whole: what they were to bring is computed again."""
        for _, host_block in batch.saves:
            self.blocks.host.forget(host_block)
        self.waiting.extendleft(reversed(self.loads.failed(batch.loads)))

    # ------------------------------------------------------------------ finish
    def finish(self, batch: Batch, output: StepOutput) -> list[Sequence | None]:
        """Take in what came out of ``batch``, the oldest that is not finished.

        Returns for each of its `sampled_slots` the sequence that got the token, or ended because none came; None: it
        had ended before, and the step that was launched for it meanwhile is wasted.
        """
        flight = self._flights.popleft()
        assert flight.batch is batch, "steps are finished in the order in which they were scheduled"
        self.counters.num_steps += 1
        for chunk, part in zip(batch.chunks, flight.chunks, strict=True):
            if chunk.scored is not None and part.sequence.finish_reason is None:
                part.sequence.take_scores(chunk.scored.first, output.prompt_logprobs[chunk.slot])
        touched: list[Sequence | None] = []
        token_ids = iter(output.token_ids)
        for part in flight.parts:
            sequence = part.sequence
            over = sequence.finish_reason is not None
            if not over and part.life == sequence.num_preemptions:
                sequence.num_finished_tokens = part.end
                if part.end >= (len(sequence.block_hashes) + 1) * self.blocks.block_size:
                    self._publish(sequence)
            if not part.samples:
                continue
            token_id = next(token_ids)
            sequence.num_inflight_tokens -= 1
            touched.append(None if over else sequence)
            if over:
                continue
            sequence.error = sequence.refuse(token_id)
            if sequence.error is not None:
                sequence.finish_reason = "error"
                self._leave(sequence, keep=False)
            else:
                sequence.append(token_id)
                self.counters.num_generated_tokens += 1
                if sequence.finish_reason is not None:
                    self._leave(sequence, keep=True)
        return touched

    def fail(self, batch: Batch) -> list[Sequence]:
        """The step broke: end every sequence that was in it, keep nothing it may have written."""
        flight = next(flight for flight in self._flights if flight.batch is batch)
        self._flights.remove(flight)
        failed = [part.sequence for part in flight.parts if part.sequence.finish_reason is None]
        for part in flight.parts:
            part.sequence.num_inflight_tokens -= part.samples
        for sequence in failed:
            sequence.finish_reason = "error"
            self._leave(sequence, keep=False)
        return failed

    def _publish(self, sequence: Sequence) -> None:
        """Full blocks may be found by others once the step that filled them was read."""
        size = self.blocks.block_size
        for i in range(len(sequence.block_hashes), sequence.num_finished_tokens // size):
            parent = sequence.block_hashes[-1] if i else b""
            tokens = sequence.token_ids[i * size : (i + 1) * size]
            sequence.block_hashes.append(self.blocks.publish(sequence.block_table[i], parent, tokens))

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Out of `running` or `waiting`; slot and blocks are given up. keep: what was computed may be found again."""
        if sequence.slot < 0:
            (self.loads if sequence in self.loads else self.waiting).remove(sequence)
            self.loads.take_back(sequence)
            return
        held = sequence.token_ids[: sequence.num_finished_tokens if keep else 0]
        self.blocks.give_back(sequence.block_table, sequence.block_hashes, held)
        sequence.block_table, sequence.block_hashes = [], []
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._left.append(sequence.slot)
        sequence.slot = -1
