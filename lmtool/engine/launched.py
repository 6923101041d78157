"""A step that was launched on a device: what comes out of it, on its way to the host. Knows no model."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmtool.engine.batch import StepOutput
from lmtool.engine.extras import RowLogprob
from lmtool.engine.prompt_logprobs import Scores
from lmtool.engine.transfer import download


@dataclass(slots=True)
class Launched:
    """ids [n] of the slots, copied; ``arrived`` is None where everything is there."""

    ids: Tensor
    arrived: torch.cuda.Event | None
    slots: list[int]
    logprobs: dict[int, RowLogprob] = field(default_factory=dict)
    scores: Scores | None = None

    @classmethod
    def on_its_way(
        cls,
        ids: Tensor,
        slots: list[int],
        logprobs: dict[int, RowLogprob] | None = None,
        scores: Scores | None = None,
    ) -> "Launched":
        """Copies ``ids``; the copies of the others were begun before."""
        there = download(ids)
        arrived = None
        if ids.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(there, arrived, slots, logprobs or {}, scores)

    def read(self) -> StepOutput:
        if self.arrived is not None:
            self.arrived.synchronize()
        output = StepOutput(self.ids.tolist())
        if self.logprobs:
            token_of = dict(zip(self.slots, output.token_ids, strict=True))
            output.logprobs = {slot: row.report(token_of[slot]) for slot, row in self.logprobs.items()}
        if self.scores is not None:
            output.prompt_logprobs = self.scores.report()
        return output
