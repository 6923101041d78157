"""Log-probabilities of a prompt's own tokens, from the rows of its chunks. Knows no scheduling.

The logits are the model's own: no penalty, no temperature. They are made a few rows at a time, because those of a whole
chunk (8192 rows of 128k float32) would take 4 GB.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtool.engine.batch import Batch
from lmtool.engine.sequence import TokenLogprob
from lmtool.engine.transfer import download
from lmtool.models.decoder import Decoder

_PIECE_BYTES = 64 << 20  # of float32 logits; two and a half times as much is in use at once


@dataclass(slots=True)
class ScoredRows:
    """rows, target_ids [n] int64: row of the step, token that it is asked about; of: (slot, rows, alternatives)."""

    rows: np.ndarray
    target_ids: np.ndarray
    of: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.rows)


def scored_rows(batch: Batch) -> ScoredRows:
    rows: list[int] = []
    target_ids: list[int] = []
    of = []
    first_row = len(batch.decodes)
    for chunk in batch.chunks:
        if chunk.scored is not None:
            start, count = first_row + chunk.scored.first - chunk.start, len(chunk.scored.target_ids)
            rows += range(start, start + count)
            target_ids += chunk.scored.target_ids
            of.append((chunk.slot, count, chunk.scored.num_top))
        first_row += len(chunk.token_ids)
    return ScoredRows(np.asarray(rows, dtype=np.int64), np.asarray(target_ids, dtype=np.int64), of)


@dataclass(slots=True)
class Scores:
    """On the way to the host: logprobs [n] float32 of the targets, ids and logprobs [n, k] of the likeliest."""

    scored: ScoredRows
    logprobs: Tensor
    top_ids: Tensor
    top: Tensor

    def report(self) -> dict[int, list[TokenLogprob]]:
        """By slot. The copies have arrived."""
        rows = zip(
            self.scored.target_ids.tolist(),
            self.logprobs.tolist(),
            self.top_ids.tolist(),
            self.top.tolist(),
            strict=True,
        )
        return {
            slot: [
                TokenLogprob(token_id, logprob, tuple(zip(ids[:num_top], top[:num_top], strict=True)))
                for token_id, logprob, ids, top in (next(rows) for _ in range(count))
            ]
            for slot, count, num_top in self.scored.of
        }


def score(decoder: Decoder, hidden: Tensor, scored: ScoredRows, target_ids: Tensor) -> Scores:
    """hidden [n, H]: the residual stream of the scored rows; target_ids [n] int64 as in ``scored``, on the device."""
    vocab_size = decoder.config.vocab_size
    num_top = min(max(most for _, _, most in scored.of), vocab_size)
    num_rows = max(1, _PIECE_BYTES // (4 * vocab_size))
    pieces = []
    for rows, ids in zip(hidden.split(num_rows), target_ids.split(num_rows), strict=True):
        logits = decoder.logits(rows)
        total = torch.logsumexp(logits, dim=1, keepdim=True)
        top = torch.topk(logits, num_top)
        pieces.append(((logits.gather(1, ids[:, None]) - total)[:, 0], top.indices, top.values - total))
    logprobs, top_ids, top_logprobs = (download(torch.cat(parts)) for parts in zip(*pieces, strict=True))
    return Scores(scored, logprobs, top_ids, top_logprobs)
