"""One rank on a GPU: state that stays there, a decode step that is one graph, and a host that never waits.

Every method that launches only puts work into the stream: nothing reads from the device but `_Launched.read`. On a
CPU it does the same work at once, which is how it is tested there. Knows no queue and no HTTP.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.config import GenerationConfig
from lmtool.engine.batch import Batch, Chunk, Done, Join, Mask, StepOutput
from lmtool.engine.block_copies import RunnerCopies
from lmtool.engine.captured_steps import CapturedSteps
from lmtool.engine.choice import choose_
from lmtool.engine.device_state import DeviceState
from lmtool.engine.executor import Pending
from lmtool.engine.extras import LogitExtras
from lmtool.engine.graphs import StartProgress
from lmtool.engine.host_memory import HostPlan
from lmtool.engine.image_encoder import ImageEncoder
from lmtool.engine.inputs import lay_out
from lmtool.engine.kv_cache import CachePlan, allocate_cache
from lmtool.engine.launched import Launched
from lmtool.engine.prompt_logprobs import Scores, score, scored_rows
from lmtool.engine.sequence import Request, Scored
from lmtool.engine.transfer import upload
from lmtool.layers.context import AttentionContext
from lmtool.models.decoder import Decoder

_log = logging.getLogger(__name__)
# prompt lengths that between them use every variant of the kernels
_WARM_UP_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 512, 4096)


class DeviceRunner(RunnerCopies):
    """Runs batches in the order in which they are launched."""

    depth = 1

    def __init__(
        self,
        decoder: Decoder,
        plan: CachePlan,
        *,
        max_batch_size: int,
        host: HostPlan | None = None,
        progress: StartProgress | None = None,
    ) -> None:
        self.decoder = decoder
        self.plan = plan
        self.device = decoder.device
        config = decoder.config
        self._window, self._num_kv_heads = config.sliding_window, config.num_kv_heads
        self._caches = allocate_cache(plan, config, decoder.dtype, self.device, decoder.kv_parameters)
        super().__init__(self._caches, host, progress)
        max_blocks = -(-plan.session_len // plan.block_size)
        self._state = DeviceState(max_batch_size, max_batch_size, max_blocks, plan.block_size, self.device)
        self._extras = LogitExtras(config.vocab_size, self.device)
        self._images = ImageEncoder(decoder)
        self._steps = CapturedSteps(decoder, self._caches, self._state, max_batch_size=max_batch_size)

    def launch(self, batch: Batch) -> Pending:
        with torch.inference_mode(), torch.cuda.device(self._index):
            self._apply(batch)
            if not batch.num_tokens:
                return Done(StepOutput([]))
            if batch.copies:
                self.copy_within(batch.copies)
            if not batch.chunks:
                return self._decode(batch)
            if self._is_plain(batch) and self._steps.has_graph(batch):
                return Launched.on_its_way(self._steps.with_prompts(batch), batch.sampled_slots)
            return self._mixed(batch)

    @property
    def _index(self) -> int:
        return self.device.index or 0 if self.device.type == "cuda" else -1  # -1: nothing to choose

    def _apply(self, batch: Batch) -> None:
        """Leaves first: a slot may be given up and taken again in one batch."""
        for slot in batch.leaves:
            self._extras.leave(slot)
        self._state.apply(batch)
        for join in batch.joins:
            self._extras.join(join)

    def close(self) -> None:
        self._steps.release()

    # ------------------------------------------------------------------ decodes only
    def _decode(self, batch: Batch) -> Pending:
        slots = batch.decodes
        self._state.set_rows(slots)
        changes = self._state.changes()
        if changes:
            self._state.write(*upload(changes, self.device))
        if self._extras.concerns(batch):
            return self._decode_with_extras(batch)
        return Launched.on_its_way(self._steps.decodes(len(slots)), slots)

    def _decode_with_extras(self, batch: Batch) -> Pending:
        """Some row asks for more than a graph holds. Slower: every kernel is launched by itself."""
        state = self._state
        rows = state.rows[: len(batch.decodes)]
        hidden, sampling = self._steps.forward_rows(rows)
        return self._sample(hidden, rows, sampling, batch)

    # ------------------------------------------------------------------ prompts, and decodes beside them
    def _is_plain(self, batch: Batch) -> bool:
        """Nobody asks for what a graph does not hold."""
        return not self._extras.concerns(batch) and not any(chunk.scored or chunk.images for chunk in batch.chunks)

    def _mixed(self, batch: Batch) -> Pending:
        state = self._state
        num_decodes = len(batch.decodes)
        rows = lay_out(batch, state.host_tables, state.block_size)
        sampled_slots, scored = batch.sampled_slots, scored_rows(batch)
        num_sampled = len(sampled_slots)
        arrays = [
            rows.prompt_ids,
            rows.positions,
            rows.addresses,
            rows.seq_slots,
            rows.seq_lens,
            rows.cu_seqlens,
            np.concatenate((rows.sampled_rows, scored.rows)),
            scored.target_ids,
            np.asarray(sampled_slots, dtype=np.int32),
        ]
        there = upload(arrays + state.changes(), self.device)
        prompt_ids, positions, addresses, seq_slots, seq_lens, cu_seqlens, wanted, target_ids, sampled = there[:9]
        if len(there) > len(arrays):
            state.write(*there[len(arrays) :])
        ids = prompt_ids
        plan = None
        if num_decodes:
            ids = torch.cat((state.longs[0].index_select(0, seq_slots[:num_decodes]), prompt_ids))
            plan = kernels.plan_decode(seq_lens[:num_decodes], self._num_kv_heads, self._window)
        context = AttentionContext(
            num_decode=num_decodes,
            positions=positions,
            slots=addresses,
            seq_lens=seq_lens,
            block_tables=state.tables.index_select(0, seq_slots),
            seq_slots=seq_slots,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=rows.max_chunk,
            plan=plan,
        )
        hidden = self.decoder.forward(ids, context, self._caches, wanted, self._images.of(batch))
        scores = score(self.decoder, hidden[num_sampled:], scored, target_ids) if len(scored) else None
        if not num_sampled:
            return Launched.on_its_way(ids[:0], [], scores=scores)
        step = kernels.step_rows(sampled, state.longs, state.words, state.tables, state.block_size)
        return self._sample(hidden[:num_sampled], sampled, step.sampling, batch, scores)

    # ------------------------------------------------------------------ what comes out
    def _sample(
        self,
        hidden: Tensor,
        rows: Tensor,
        sampling: tuple[Tensor, ...],
        batch: Batch,
        prompt_scores: Scores | None = None,
    ) -> Pending:
        slots = batch.sampled_slots
        if not self._extras.concerns(batch):
            ids = choose_(self.decoder, hidden, rows, sampling, self._state.longs)
            return Launched.on_its_way(ids, slots, None, prompt_scores)
        scores = self.decoder.scores(hidden)
        logits = scores.to(torch.float32, copy=True)
        self._extras.adjust_(logits, batch)
        ids = kernels.sample(logits, *sampling)
        kernels.advance_(rows, ids, scores, self._state.longs, self.decoder.config.vocab_size)
        return Launched.on_its_way(ids, slots, self._extras.sampled(logits, ids, slots), prompt_scores)

    # ------------------------------------------------------------------ before the first request
    def warm_up(self, *, max_batched_tokens: int, cuda_graphs: bool, progress: StartProgress | None = None) -> None:
        """Launch every kernel and capture every graph; the longest prompt chunk shows whether memory is enough.

        Only block 0, which belongs to nobody, is written to. Raises torch's OutOfMemoryError.
        """
        self.rehearse(max_batched_tokens)
        # torch's own ops alone, which on the meta device would import a compiler
        self.launch(_prompt_of(self._longest_chunk(max_batched_tokens), scored=True))
        if cuda_graphs and kernels.is_capturable(self.device, self.decoder.dtype, self.decoder.config.head_dim):
            with torch.inference_mode(), torch.cuda.device(self._index):
                self._steps.capture(progress)

    def _longest_chunk(self, max_batched_tokens: int) -> int:
        return min(max_batched_tokens, self.plan.session_len)

    def rehearse(self, max_batched_tokens: int) -> None:
        """Steps that between them launch every variant of the kernels that a later one may need.

        On tensors of the meta device it tells `precompile` what these variants are.
        """
        longest = self._longest_chunk(max_batched_tokens)
        few = _prompt_of(1, repetition_penalty=2.0)  # what is asked of few has kernels of its own
        few.masks.append(Mask(0, b"\xff" * (4 * -(-self.decoder.config.vocab_size // 32))))
        few.copies.append((0, 0))
        self.launch(few)
        for length in (longest, *(length for length in _WARM_UP_LENGTHS if length < longest)):
            self.launch(_prompt_of(length))
        with torch.inference_mode(), torch.cuda.device(self._index):
            # beside prompts any number of rows decodes, and the work list's kernel has a variant for odd ones
            for num_rows in (2**i + 1 for i in range(self._state.rows.shape[0].bit_length())):
                seq_lens = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
                kernels.plan_decode(seq_lens, self._num_kv_heads, self._window)
            self._steps.run_each()


def _prompt_of(num_tokens: int, *, scored: bool = False, **params: float) -> Batch:
    request = Request(
        request_id=-1,
        prompt_ids=(0,) * num_tokens,
        params=GenerationConfig(**params),  # type: ignore[arg-type]
        stop_ids=frozenset(),
        seed=0,
    )
    ids = [0] * num_tokens
    chunk = Chunk(0, 0, ids, True, Scored(0, ids[1:], 1) if scored else None)
    return Batch(joins=[Join(0, request)], leaves=[0], chunks=[chunk])
