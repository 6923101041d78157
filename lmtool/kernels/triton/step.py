"""What a decode step reads from and writes back to the sequences' state by slot, in Triton: one kernel each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.layout import StepRows
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_MAX_TABLE_PART = 1024
_ROWS_PER_PROGRAM = 128


@triton.jit(do_not_specialize=["num_rows", "num_slots", "table_width"])
def _step_rows_kernel(
    rows_ptr,
    longs_ptr,
    words_ptr,
    tables_ptr,
    out_longs_ptr,
    out_words_ptr,
    out_tables_ptr,
    num_rows,
    num_slots,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, i): the i-th part of the row's block table; the first also everything else of the row."""
    allow_next(PDL)
    wait_for_previous(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(rows_ptr + row)
    live = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)
    table_ptr = tables_ptr + slot * table_width
    o_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < table_width
    blocks = tl.where(live, tl.load(table_ptr + o_m, mask=m_m, other=0), 0)
    tl.store(out_tables_ptr + row.to(tl.int64) * table_width + o_m, blocks, mask=m_m)
    if part == 0:
        o_4 = tl.arange(0, 4)
        numbers = tl.where(live, tl.load(longs_ptr + o_4 * num_slots + slot), 0)
        tl.store(out_longs_ptr + o_4 * num_rows + row, numbers)
        settings = tl.where(live, tl.load(words_ptr + o_4 * num_slots + slot), 0)
        tl.store(out_words_ptr + o_4 * num_rows + row, settings)
        # slot 0 stands in for a row without one; only its first block is looked at
        position = tl.where(live, tl.load(longs_ptr + num_slots + slot), 0)
        block = tl.where(live, tl.load(table_ptr + position // BLOCK_SIZE), 0).to(tl.int64)
        within = tl.where(live, position, row) % BLOCK_SIZE
        tl.store(out_longs_ptr + 4 * num_rows + row, block * BLOCK_SIZE + within)
        tl.store(out_words_ptr + 4 * num_rows + row, tl.where(live, position + 1, 0).to(tl.int32))


def step_rows(rows: Tensor, longs: Tensor, words: Tensor, tables: Tensor, block_size: int) -> StepRows:
    num_rows, table_width = rows.shape[0], tables.shape[1]
    numbers = torch.empty((5, num_rows), dtype=torch.int64, device=rows.device)
    settings = torch.empty((5, num_rows), dtype=torch.int32, device=rows.device)
    row_tables = torch.empty((num_rows, table_width), dtype=torch.int32, device=rows.device)
    block_m = min(_MAX_TABLE_PART, triton.next_power_of_2(table_width))
    _step_rows_kernel[(num_rows, triton.cdiv(table_width, block_m))](
        rows,
        longs,
        words,
        tables,
        numbers,
        settings,
        row_tables,
        num_rows,
        longs.shape[1],
        table_width,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        num_warps=4 if block_m > 128 else 1,
        **dependent_launch(rows.device),
    )
    ids, positions, seeds, steps, slots = numbers
    temperature, top_k, top_p, min_p, seq_lens = settings
    return StepRows(
        ids=ids,
        positions=positions,
        seq_lens=seq_lens,
        slots=slots,
        tables=row_tables,
        temperature=temperature.view(torch.float32),
        top_k=top_k,
        top_p=top_p.view(torch.float32),
        min_p=min_p.view(torch.float32),
        seeds=seeds,
        steps=steps,
    )


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _advance_kernel(
    rows_ptr, ids_ptr, logits_ptr, longs_ptr, num_rows, num_slots, V, num_ids, BLOCK_B: tl.constexpr, PDL: tl.constexpr
):
    allow_next(PDL)
    wait_for_previous(PDL)
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < num_rows
    slot = tl.load(rows_ptr + o_b, mask=m_b, other=-1)
    live = slot >= 0
    token = tl.load(ids_ptr + o_b, mask=m_b, other=0)
    first_logit = tl.load(logits_ptr + o_b.to(tl.int64) * V, mask=m_b, other=0.0).to(tl.float32)
    wrong = (first_logit != first_logit) | (token < 0) | (token >= num_ids)
    tl.store(ids_ptr + o_b, tl.full([BLOCK_B], -1, tl.int64), mask=m_b & wrong)
    tl.store(longs_ptr + slot, tl.where(wrong, 0, token), mask=live)
    for field in tl.static_range(1, 4, 2):  # position and step, not the seed between them
        ptrs = longs_ptr + field * num_slots + slot
        tl.store(ptrs, tl.load(ptrs, mask=live, other=0) + 1, mask=live)


def advance_(rows: Tensor, ids: Tensor, logits: Tensor, longs: Tensor, num_ids: int) -> None:
    num_rows = rows.shape[0]
    logits = logits.contiguous()
    _advance_kernel[(triton.cdiv(num_rows, _ROWS_PER_PROGRAM),)](
        rows,
        ids,
        logits,
        longs,
        num_rows,
        longs.shape[1],
        logits.shape[1],
        num_ids,
        BLOCK_B=_ROWS_PER_PROGRAM,
        num_warps=1,
        **dependent_launch(rows.device),
    )
