"""One rank on a CPU: decoder, cache, sampler; a step is over when it returns. Knows no queue and no HTTP."""

import torch
from torch import Tensor

from lmtool.engine.batch import Batch, Done, StepOutput
from lmtool.engine.block_copies import RunnerCopies
from lmtool.engine.host_memory import HostPlan
from lmtool.engine.image_encoder import ImageEncoder
from lmtool.engine.inputs import SlotTables
from lmtool.engine.kv_cache import CachePlan, allocate_cache
from lmtool.engine.prompt_logprobs import score, scored_rows
from lmtool.engine.sampler import Sampler
from lmtool.errors import EngineError
from lmtool.models.decoder import Decoder


class ModelRunner(RunnerCopies):
    """Runs one `Batch` at a time; holds the tables that a batch changes."""

    depth = 0

    def __init__(self, decoder: Decoder, plan: CachePlan, *, max_batch_size: int, host: HostPlan | None = None) -> None:
        self.decoder = decoder
        self.plan = plan
        device = decoder.device
        self._caches = allocate_cache(plan, decoder.config, decoder.dtype, device, decoder.kv_parameters)
        super().__init__(self._caches, host)
        max_blocks = -(-plan.session_len // plan.block_size)
        self._tables = SlotTables(max_batch_size, max_blocks, plan.block_size, device)
        self._sampler = Sampler(max_batch_size, decoder.config.vocab_size, device)
        self._images = ImageEncoder(decoder)

    def launch(self, batch: Batch) -> Done:
        return Done(self.run(batch))

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        self.apply_changes(batch)
        if not batch.num_tokens:
            return StepOutput([])
        self.copy_within(batch.copies)
        inputs = self._tables.build(batch)
        slots, scored = batch.sampled_slots, scored_rows(batch)
        wanted = inputs.sampled_rows
        if wanted is not None and len(scored):
            wanted = torch.cat((wanted, torch.from_numpy(scored.rows)))
        inserted = self._images.of(batch)
        hidden = self.decoder.forward(inputs.ids, inputs.context, self._caches, wanted, inserted)
        output = self._sample(hidden[: len(slots)], batch) if slots else StepOutput([])
        if len(scored):
            scores = score(self.decoder, hidden[len(slots) :], scored, torch.from_numpy(scored.target_ids))
            output.prompt_logprobs = scores.report()
        return output

    def _sample(self, hidden: Tensor, batch: Batch) -> StepOutput:
        slots = batch.sampled_slots
        logits = self.decoder.logits(hidden)
        if bool(logits.isnan().any()):
            raise EngineError("the model's logits are not numbers", "its weights are damaged, or try --dtype float32")
        output = self._sampler.sample(logits, batch)
        self._tables.last_tokens[slots] = output.token_ids
        return output

    def apply_changes(self, batch: Batch) -> None:
        """Leaves first: a slot may be given up and taken again in one batch."""
        for slot in batch.leaves:
            self._sampler.leave(slot)
        for join in batch.joins:
            self._sampler.join(join)
        self._tables.apply(batch)
