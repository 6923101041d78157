"""What a step reads of a few short prompts, at fixed places: so that the whole step can be a captured graph.

Between buckets the rows are padding: they belong to no sequence, read nothing and write to block 0. Knows no model.
"""

import numpy as np
import torch
from torch import Tensor

from lmtool.engine.batch import Batch
from lmtool.engine.inputs import MixedRows


class PromptRows:
    """Of the rows ids, positions, addresses [T] int64; of the sequences seq_slots [S] int64, seq_lens [S] and
    cu_seqlens [S + 1] int32; of what is sampled sampled_rows [S] int64, sampled_slots [S] int32: slot -1 is nobody's.
    """

    def __init__(self, most_tokens: int, num_sequences: int, device: torch.device) -> None:
        self._tokens, self._sequences = most_tokens, num_sequences
        longs, ints = 3 * most_tokens + 2 * num_sequences, 3 * num_sequences + 1
        self._device = torch.zeros(2 * longs + ints, dtype=torch.int32, device=device)
        self._host = np.zeros(2 * longs + ints, dtype=np.int32)
        self._longs = self._device[: 2 * longs].view(torch.int64)
        lengths = [most_tokens] * 3 + [num_sequences] * 2
        self.ids, self.positions, self.addresses, self.seq_slots, self.sampled_rows = self._longs.split(lengths)
        rest = self._device[2 * longs :]
        self.seq_lens, self.cu_seqlens, self.sampled_slots = rest.split(
            [num_sequences, num_sequences + 1, num_sequences]
        )
        self._num_longs = longs
        self.sampled_slots.fill_(-1)

    def fits(self, batch: Batch) -> bool:
        """Whether its prompts are few and short."""
        num_tokens = sum(len(chunk.token_ids) for chunk in batch.chunks)
        return 0 < num_tokens <= self._tokens and len(batch.chunks) <= self._sequences

    def packed(self, rows: MixedRows, sampled_slots: list[int]) -> np.ndarray:
        """All of it as int32 words, to be sent at once; what is beyond is padding."""
        host, tokens, sequences = self._host, self._tokens, self._sequences
        host[:] = 0
        longs = host[: 2 * self._num_longs].view(np.int64)
        num_tokens, num_sequences, num_sampled = len(rows.prompt_ids), len(rows.seq_slots), len(sampled_slots)
        for i, values in enumerate((rows.prompt_ids, rows.positions, rows.addresses)):
            longs[i * tokens : i * tokens + num_tokens] = values
        longs[3 * tokens : 3 * tokens + num_sequences] = rows.seq_slots
        first_sampled = 3 * tokens + sequences
        longs[first_sampled : first_sampled + num_sampled] = rows.sampled_rows
        ints = host[2 * self._num_longs :]
        ints[:num_sequences] = rows.seq_lens
        ints[sequences : 2 * sequences + 1] = num_tokens  # sequences that are not there are empty and at the end
        ints[sequences : sequences + num_sequences + 1] = rows.cu_seqlens
        ints[2 * sequences + 1 :] = -1
        ints[2 * sequences + 1 : 2 * sequences + 1 + num_sampled] = sampled_slots
        return host

    def write(self, there: Tensor) -> None:
        """`packed`, after it was copied to the device."""
        self._device.copy_(there)
