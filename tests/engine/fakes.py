"""`MemoryExecutor`: a runner without a model. Its "K/V cache" holds the token ids themselves, by block and offset.

A token comes out as a hash of every token that the sequence reads back through its block table. So any mistake in
blocks, sharing, chunking or preemption changes an answer, or trips an assertion here.

With a depth it is a device that is as late as can be: steps run in their order, and only when somebody reads.

A load clears its blocks when its turn comes in that order, and reads the host only when it lands, which is when
``lands`` says so or somebody waits: so neither end of it may be used by anybody else meanwhile.
"""

from collections import deque
from collections.abc import Callable, Sequence
from zlib import crc32

from lmtool.engine.batch import Batch, Chunk, CopiesDone, Load, StepOutput
from lmtool.engine.constraint import Constraint
from lmtool.engine.grammar_source import GrammarSource
from lmtool.engine.sequence import TokenLogprob
from lmtool.errors import RequestError

VOCAB = 50


def next_token(token_ids: Sequence[int]) -> int:
    return crc32(repr(list(token_ids)).encode()) % VOCAB


def expected_answer(prompt_ids: Sequence[int], count: int) -> list[int]:
    token_ids = list(prompt_ids)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt_ids) :]


def expected_scores(prompt_ids: Sequence[int]) -> tuple[TokenLogprob, ...]:
    """A token's "logprob" is a hash of all before it, too."""
    return tuple(
        TokenLogprob(token_id, float(next_token(prompt_ids[:i]))) for i, token_id in enumerate(prompt_ids) if i
    )


class LateGrammars:
    """Every grammar allows everything, and says so when ``ready`` does; those of `broken` texts come to nothing."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.pending: list[Constraint] = []
        self.told: dict[Constraint, list[int]] = {}
        self.left: list[Constraint] = []

    def follow(self, source: GrammarSource) -> Constraint:
        constraint = Constraint(source, follower=self)
        self.told[constraint] = []
        self.pending.append(constraint)
        return constraint

    def step(self, constraint: Constraint, token_id: int) -> None:
        assert constraint not in self.pending, "two tokens at once"
        self.told[constraint].append(token_id)
        self.pending.append(constraint)

    def leave(self, constraint: Constraint) -> None:
        self.left.append(constraint)
        self.pending = [one for one in self.pending if one is not constraint]

    def poll(self, wait_s: float = 0.0) -> list[Constraint]:
        news = [one for one in self.pending if wait_s or self.ready()]
        for constraint in news:
            self.pending.remove(constraint)
            assert constraint.source is not None
            if constraint.source.text == "broken" and len(self.told[constraint]) == 2:
                constraint.error = RequestError("it is broken")
            else:
                constraint.allowed = b"\xff" * 8
        return news

    def gather(self) -> list[Constraint]:
        return self.poll()

    def close(self) -> None:
        pass


class LateStep:
    def __init__(self, executor: "MemoryExecutor", batch: Batch) -> None:
        self.executor = executor
        self.batch = batch
        self.output: StepOutput | None = None

    def read(self) -> StepOutput:
        while self.output is None:
            self.executor.launched.popleft().do()
        return self.output

    def do(self) -> None:
        self.output = self.executor.run(self.batch)


class LateCopies:
    def __init__(self, executor: "MemoryExecutor", saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        self.executor = executor
        self.saves = saves
        self.loads = loads

    def do(self) -> None:
        executor = self.executor
        for block, host_block in self.saves:
            assert None not in executor.memory[block], "a block was saved that is not full"
            executor.host[host_block] = list(executor.memory[block])
        for load in self.loads:
            for _, block in load.blocks:
                executor.memory[block] = [None] * executor.block_size
        executor.loading.extend(self.loads)


class MemoryExecutor:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        depth: int = 0,
        num_host_blocks: int = 0,
        lands: Callable[[], bool] = lambda: False,
    ) -> None:
        self.depth = depth
        self.launched: deque[LateStep | LateCopies] = deque()
        self.host: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.loading: deque[Load] = deque()
        self.lands = lands
        self.fail_next_copy = False
        self.block_size = block_size
        self.memory: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.tables: dict[int, dict[int, int]] = {}
        self.last: dict[int, int] = {}
        self.constrained: set[int] = set()
        self.batches: list[Batch] = []
        self.fail_next = False

    def copy(self, saves: Sequence[tuple[int, int]], loads: Sequence[Load]) -> None:
        if self.fail_next_copy:
            self.fail_next_copy = False
            raise RuntimeError("no memory for the numbers of the blocks")
        self.launched.append(LateCopies(self, saves, loads))

    def copied(self, *, wait: bool) -> CopiesDone:
        while wait and not self.loading:
            self.launched.popleft().do()
        done = CopiesDone()
        while self.loading and (wait or self.lands()):
            wait = False
            load = self.loading.popleft()
            for host_block, block in load.blocks:
                self.memory[block] = list(self.host[host_block])
            done.loads.append(load.number)
        return done

    def check(self) -> None:
        """No other rank can be lost."""

    def launch(self, batch: Batch) -> LateStep:
        self.batches.append(batch)
        step = LateStep(self, batch)
        self.launched.append(step)
        if self.depth == 0:
            step.read()
        return step

    def run(self, batch: Batch) -> StepOutput:
        for slot in batch.leaves:
            self.tables.pop(slot, None)
            self.constrained.discard(slot)
        for join in batch.joins:
            assert join.slot not in self.tables, "the slot is taken"
            self.tables[join.slot] = {}
            if join.request.params.response_format is not None:
                self.constrained.add(join.slot)
            if join.answer_ids:
                self.last[join.slot] = join.answer_ids[-1]
        for slot, index, block in batch.new_blocks:
            assert block != 0, "block 0 belongs to nobody"
            self.tables[slot][index] = block
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the card fell off the bus\nwith details")
        contents = [list(self.memory[block]) for block, _ in batch.copies]
        for (block, copy), content in zip(batch.copies, contents, strict=True):
            assert None not in content, "a block is copied that is not full"
            assert copy != block
            self.memory[copy] = content
        slots = [*batch.decodes, *(chunk.slot for chunk in batch.chunks)]
        assert len(slots) == len(set(slots)), "a sequence is in the batch twice"
        out = [
            self._write(slot, at, [self.last[slot]]) for slot, at in zip(batch.decodes, batch.positions, strict=True)
        ]
        scores = {}
        for chunk in batch.chunks:
            token = self._write(chunk.slot, chunk.start, chunk.token_ids)
            if chunk.samples:
                out.append(token)
            if chunk.scored is not None:
                scores[chunk.slot] = self._score(chunk)
        assert {mask.slot for mask in batch.masks} == self.constrained & set(batch.sampled_slots)
        for slot, token in zip(batch.sampled_slots, out, strict=True):
            self.last[slot] = token
        return StepOutput(out, prompt_logprobs=scores)

    def _write(self, slot: int, start: int, token_ids: list[int]) -> int:
        table = self.tables[slot]
        for position, token in enumerate(token_ids, start):
            self.memory[table[position // self.block_size]][position % self.block_size] = token
        return next_token(self._read(slot, start + len(token_ids)))

    def _read(self, slot: int, count: int) -> list[int]:
        table = self.tables[slot]
        read = [self.memory[table[p // self.block_size]][p % self.block_size] for p in range(count)]
        assert None not in read, "a token was read that nobody wrote"
        return [token for token in read if token is not None]

    def _score(self, chunk: Chunk) -> list[TokenLogprob]:
        scored = chunk.scored
        assert scored is not None
        assert chunk.start <= scored.first, "a row that this step does not compute"
        assert scored.first + len(scored.target_ids) <= chunk.start + len(chunk.token_ids)
        return [
            TokenLogprob(token_id, float(next_token(self._read(chunk.slot, scored.first + i + 1))))
            for i, token_id in enumerate(scored.target_ids)
        ]

    def close(self) -> None:
        pass
