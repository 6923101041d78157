"""Logits → next tokens, where nobody in a step asks for more than sampling: of many rows each rank chooses for some.

So a rank receives the logits of its own rows alone, and reads only those. What comes out is the same on all ranks.
"""

from torch import Tensor

from lmtool import kernels
from lmtool.models.decoder import Decoder

_LEAST_ROWS = 32  # for fewer, one message that brings all logits is sooner there than the two that this takes


def choose_(decoder: Decoder, hidden: Tensor, rows: Tensor, sampling: tuple[Tensor, ...], longs: Tensor) -> Tensor:
    """hidden [n, H] of the rows, whose slots are rows [n]; sampling: of `StepRows` → ids [n], and the slots go on.

    ids and longs as `kernels.advance_` leaves them.
    """
    group, num_ids = decoder.group, decoder.config.vocab_size
    if group is None or len(rows) < _LEAST_ROWS or len(rows) % group.size:
        scores = decoder.scores(hidden)
        ids = kernels.sample(scores, *sampling)
    else:
        scores = decoder.own_scores(hidden)
        part = len(rows) // group.size
        own = slice(group.rank * part, (group.rank + 1) * part)
        whole = group.exchange(scores)[:, :num_ids]
        ids = group.all_gather_rows(kernels.sample(whole, *(one[own] for one in sampling)))
    kernels.advance_(rows, ids, scores, longs, num_ids)
    return ids
