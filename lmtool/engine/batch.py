"""`Batch` and `StepOutput`: the plain messages between scheduler and runner. Knows no torch.

A running sequence owns a *slot*: a row of the runner's tables. The scheduler sends only what changed.
"""

from dataclasses import dataclass, field

from lmtool.engine.sequence import ImageRows, Request, Scored, TokenLogprob


@dataclass(slots=True)
class Join:
    """A sequence takes a slot. ``answer_ids``: what it had generated before it was preempted."""

    slot: int
    request: Request
    answer_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Chunk:
    """Prompt tokens to compute in this step. ``samples``: a token comes out, the chunk being the last.

    ``images``: what stands for the tokens whose ids are below 0.
    """

    slot: int
    start: int
    token_ids: list[int]
    samples: bool
    scored: Scored | None = None
    images: list[ImageRows] = field(default_factory=list)


@dataclass(slots=True)
class Mask:
    """Which ids may come out of this step for a slot: a bit for each, in 32-bit words. only_ends: none but its ends."""

    slot: int
    words: bytes
    only_ends: bool = False


@dataclass(slots=True)
class Load:
    """Blocks that come back from the host, [(host block, block)]. ``number``: by which its end is reported."""

    number: int
    blocks: list[tuple[int, int]]


@dataclass(slots=True)
class CopiesDone:
    """What came to an end since the last report. seconds: that the copies took, saves and loads."""

    loads: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Batch:
    """One step: first everything that changed, then one token for each slot of ``decodes``, then the chunks.

    saves        (block, host block) whose content goes to the host; the step's kernels may overwrite the block
    loads        blocks that come back from the host, whenever: no sequence of this step reads them
    copies       (block, block) whose content goes from one to the other, all read before any is written
    new_blocks   (slot, index in its block table, block)
    decodes      slots whose last token (which the runner holds) is computed; position is num_tokens - 1
    positions    the position of each decode's token
    bans         (slot, token id) that must not come out of this step
    masks        of the slots whose answers follow a grammar
    """

    saves: list[tuple[int, int]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    decodes: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    bans: list[tuple[int, int]] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def sampled_slots(self) -> list[int]:
        """The slots a token comes out of, in the order of `StepOutput.token_ids`."""
        return self.decodes + [chunk.slot for chunk in self.chunks if chunk.samples]


@dataclass(slots=True)
class StepOutput:
    """One token per sampled slot, -1 where its logits were not numbers; by slot, what was asked besides."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)


@dataclass(slots=True)
class Done:
    """A step that was over when its launch returned."""

    output: StepOutput

    def read(self) -> StepOutput:
        return self.output
