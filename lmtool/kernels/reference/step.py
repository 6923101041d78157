"""What a decode step reads from and writes back to the sequences' state by slot, plain torch."""

import torch
from torch import Tensor

from lmtool.kernels.layout import POSITION, SEED, STEP, TOKEN, StepRows


def step_rows(rows: Tensor, longs: Tensor, words: Tensor, tables: Tensor, block_size: int) -> StepRows:
    live = rows >= 0
    slots = rows.clamp_min(0).long()
    numbers = torch.where(live, longs[:, slots], 0)
    settings = torch.where(live, words[:, slots], 0)
    row_tables = torch.where(live[:, None], tables[slots], 0)
    positions = numbers[POSITION]
    blocks = row_tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    within = torch.where(live, positions, torch.arange(len(rows), device=rows.device)) % block_size
    temperature, top_k, top_p, min_p = settings
    return StepRows(
        ids=numbers[TOKEN],
        positions=positions,
        seq_lens=torch.where(live, positions + 1, 0).int(),
        slots=blocks * block_size + within,
        tables=row_tables,
        temperature=temperature.view(torch.float32),
        top_k=top_k,
        top_p=top_p.view(torch.float32),
        min_p=min_p.view(torch.float32),
        seeds=numbers[SEED],
        steps=numbers[STEP],
    )


def advance_(rows: Tensor, ids: Tensor, logits: Tensor, longs: Tensor, num_ids: int) -> None:
    wrong = logits[:, 0].isnan() | (ids < 0) | (ids >= num_ids)
    ids.masked_fill_(wrong, -1)
    live = rows >= 0
    slots = rows[live].long()
    longs[TOKEN, slots] = ids[live].clamp_min(0)
    longs[POSITION, slots] += 1
    longs[STEP, slots] += 1
