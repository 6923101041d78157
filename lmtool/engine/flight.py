"""A step between its launch and its reading, as the scheduler remembers it. Ints only."""

from dataclasses import dataclass, field

from lmtool.engine.batch import Batch
from lmtool.engine.sequence import Sequence


@dataclass(slots=True)
class Part:
    """A sequence's share of it. life: its ``num_preemptions`` then; end: how much is computed after it."""

    sequence: Sequence
    life: int
    end: int
    samples: bool


@dataclass(slots=True)
class Flight:
    """Parts in the order of the batch's decodes and chunks. num_tiles: of pictures, that the step encodes."""

    batch: Batch
    decodes: list[Part] = field(default_factory=list)
    chunks: list[Part] = field(default_factory=list)
    num_tiles: int = 0

    @property
    def parts(self) -> list[Part]:
        return self.decodes + self.chunks
