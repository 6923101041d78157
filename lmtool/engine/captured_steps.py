"""The steps of a GPU that are graphs: decodes, a few short prompts, and decodes beside a few short prompts.

Launched kernel by kernel a step costs the host half a millisecond a layer, whatever is in it: where the GPU has less to
do than that, a graph is what makes it fast. Knows no queue, and nothing that only some requests ask for.
"""

import numpy as np
import torch
from torch import Tensor

from lmtool import kernels
from lmtool.engine.batch import Batch
from lmtool.engine.choice import choose_
from lmtool.engine.device_state import DeviceState
from lmtool.engine.graphs import Graphs, StartProgress, bucket_sizes
from lmtool.engine.inputs import lay_out
from lmtool.engine.prompt_rows import PromptRows
from lmtool.engine.transfer import upload
from lmtool.kernels.layout import StepRows
from lmtool.layers.context import AttentionContext
from lmtool.layers.kv_store import KvStore
from lmtool.models.decoder import Decoder

# tokens of prompts that a step is padded to; beyond, a GPU works longer than the host takes to launch its kernels
PROMPT_SIZES = (16, 32, 64, 128, 192, 256, 384, 512)
MOST_PROMPTS = 4
BESIDE_SIZES = (64, 128, 256, 512, 1024)
MOST_BESIDE = 16
_DECODES_BESIDE = (16, 64, 128, 192, 256, 512, 1024)


class CapturedSteps:
    """Each method launches a step and returns the ids [n] of its rows; they are valid until the next step.

    Until `capture` was called, and on a CPU, the same work is done without graphs.
    """

    def __init__(self, decoder: Decoder, caches: list[KvStore], state: DeviceState, *, max_batch_size: int) -> None:
        config = decoder.config
        self._decoder, self._caches, self._state = decoder, caches, state
        self._window, self._num_kv_heads = config.sliding_window, config.num_kv_heads
        self._prompts = PromptRows(PROMPT_SIZES[-1], min(MOST_PROMPTS, max_batch_size), decoder.device)
        self._beside = PromptRows(BESIDE_SIZES[-1], min(MOST_BESIDE, max_batch_size), decoder.device)
        self._every_row = torch.from_numpy(np.arange(max_batch_size)).to(decoder.device)
        self.of_decodes = Graphs(self._decode_rows, bucket_sizes(max_batch_size))
        self.of_prompts = Graphs(self._prompt_rows, PROMPT_SIZES)
        # where one sequence runs at a time nothing is ever beside it
        few = [size for size in _DECODES_BESIDE if size < max_batch_size]
        self.of_both = Graphs(self._mixed_rows, [*few, max_batch_size] if max_batch_size > 1 else [], BESIDE_SIZES)

    # ------------------------------------------------------------------ before the first request
    def run_each(self) -> None:
        """Every step once: what has to be compiled or loaded is, before anything is captured."""
        for graphs in (self.of_decodes, self.of_prompts, self.of_both):
            graphs.run_each()

    def capture(self, progress: StartProgress | None = None) -> None:
        """Raises torch's OutOfMemoryError."""
        self.of_decodes.capture("decode steps", progress)
        self.of_prompts.capture("short prompts", progress)
        self.of_both.capture("decodes beside short prompts", progress)

    def release(self) -> None:
        for graphs in (self.of_decodes, self.of_prompts, self.of_both):
            graphs.release()

    # ------------------------------------------------------------------ decodes
    def decodes(self, num_rows: int) -> Tensor:
        """Of the sequences whose slots stand in the state's first rows."""
        return self.of_decodes.run(num_rows)[:num_rows]

    def _decode_rows(self, num_rows: int) -> Tensor:
        rows = self._state.rows[:num_rows]
        hidden, sampling = self.forward_rows(rows)
        return choose_(self._decoder, hidden, rows, sampling, self._state.longs)

    def forward_rows(self, rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One token of each: the residual stream [n, H], and what `kernels.sample` takes."""
        step = self._step_rows(rows)
        context = AttentionContext(
            num_decode=len(rows),
            positions=step.positions,
            slots=step.slots,
            seq_lens=step.seq_lens,
            block_tables=step.tables,
            seq_slots=rows,
            plan=kernels.plan_decode(step.seq_lens, self._num_kv_heads, self._window),
        )
        return self._decoder.forward(step.ids, context, self._caches), step.sampling

    # ------------------------------------------------------------------ with prompts
    def has_graph(self, batch: Batch) -> bool:
        """Whether `with_prompts` is a graph's replay for it."""
        graphs, prompts = self._of(batch)
        return graphs.captured and prompts.fits(batch)

    def with_prompts(self, batch: Batch) -> Tensor:
        """Of the batch's `sampled_slots`; sends what the step reads. ``has_graph`` said that it fits."""
        state, (graphs, prompts) = self._state, self._of(batch)
        num_decodes, sampled_slots = len(batch.decodes), batch.sampled_slots
        rows = lay_out(Batch(chunks=batch.chunks), state.host_tables, state.block_size)
        counts = (num_decodes, len(rows.prompt_ids)) if num_decodes else (len(rows.prompt_ids),)
        first = 0  # of the rows of prompts; before them are decodes, some of them padding
        if num_decodes:
            state.set_rows(batch.decodes)
            first = graphs.size_of(*counts)[0]
            rows.sampled_rows += first
        packed = prompts.packed(rows, sampled_slots[num_decodes:])
        there, *changes = upload([packed, *state.changes()], self._decoder.device)
        if changes:
            state.write(*changes)
        prompts.write(there)
        ids = graphs.run(*counts)
        of_prompts = ids[first : first + len(sampled_slots) - num_decodes]
        return torch.cat((ids[:num_decodes], of_prompts)) if num_decodes else of_prompts

    def _of(self, batch: Batch) -> tuple[Graphs, PromptRows]:
        return (self.of_both, self._beside) if batch.decodes else (self.of_prompts, self._prompts)

    def _prompt_rows(self, num_tokens: int) -> Tensor:
        """Ids of the sequences whose prompts end in the step, in their order."""
        prompts = self._prompts
        context = AttentionContext(
            num_decode=0,
            positions=prompts.positions[:num_tokens],
            slots=prompts.addresses[:num_tokens],
            seq_lens=prompts.seq_lens,
            block_tables=self._state.tables.index_select(0, prompts.seq_slots),
            seq_slots=prompts.seq_slots,
            cu_seqlens_q=prompts.cu_seqlens,
            max_seqlen_q=num_tokens,
        )
        hidden = self._decoder.forward(prompts.ids[:num_tokens], context, self._caches, prompts.sampled_rows)
        slots = prompts.sampled_slots
        return choose_(self._decoder, hidden, slots, self._step_rows(slots).sampling, self._state.longs)

    def _mixed_rows(self, num_decodes: int, num_tokens: int) -> Tensor:
        """Ids of the decodes, then of the prompts that end in the step."""
        state, prompts = self._state, self._beside
        rows = state.rows[:num_decodes]
        step = self._step_rows(rows)
        prompt_tables = state.tables.index_select(0, prompts.seq_slots)
        context = AttentionContext(
            num_decode=num_decodes,
            positions=torch.cat((step.positions, prompts.positions[:num_tokens])),
            slots=torch.cat((step.slots, prompts.addresses[:num_tokens])),
            seq_lens=torch.cat((step.seq_lens, prompts.seq_lens)),
            block_tables=torch.cat((step.tables, prompt_tables)),
            seq_slots=torch.cat((rows.long(), prompts.seq_slots)),
            cu_seqlens_q=prompts.cu_seqlens,
            max_seqlen_q=num_tokens,
            plan=kernels.plan_decode(step.seq_lens, self._num_kv_heads, self._window),
        )
        ids = torch.cat((step.ids, prompts.ids[:num_tokens]))
        wanted = torch.cat((self._every_row[:num_decodes], prompts.sampled_rows))
        hidden = self._decoder.forward(ids, context, self._caches, wanted)
        slots = torch.cat((rows, prompts.sampled_slots))
        return choose_(self._decoder, hidden, slots, self._step_rows(slots).sampling, state.longs)

    # ------------------------------------------------------------------ parts of a step
    def _step_rows(self, rows: Tensor) -> StepRows:
        state = self._state
        return kernels.step_rows(rows, state.longs, state.words, state.tables, state.block_size)
