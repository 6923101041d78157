"""The work list of a decode step's attention, made on the GPU in one small kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.layout import LONG_PIECE, PIECE_ALIGN, DecodePlan, num_plan_items
from lmtool.kernels.triton.launch import dependent_launch, wait_for_previous


@triton.jit(do_not_specialize=["batch_size", "window", "num_items"])
def _plan_kernel(
    seq_lens_ptr,
    items_ptr,
    spans_ptr,
    arrivals_ptr,
    batch_size,
    window,
    num_items,
    HKV: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ALIGN: tl.constexpr,
    LONG: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. Pieces of C tokens: total / (W - B) is the shortest that always fits into W items.

    It does not allow the next kernel to start early: whatever comes after may read the plan, and what the plan was
    made from, before its own wait.
    """
    wait_for_previous(PDL)
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch_size
    stop = tl.load(seq_lens_ptr + o_b, mask=m_b, other=0)
    start = tl.where(window > 0, tl.maximum(stop - window, 0) // ALIGN * ALIGN, 0)
    spare = num_items - batch_size
    # as layout.share_of_tokens has it
    total = tl.sum(stop - start, axis=0)
    coarse = tl.minimum(tl.cdiv(total, tl.maximum(spare // 2, 1)), LONG)
    piece = tl.cdiv(tl.maximum(tl.cdiv(total, spare), coarse), ALIGN) * ALIGN
    # the shortest piece worth merging, as layout.shortest_piece has it
    blocks = tl.cdiv(tl.max(stop - start, axis=0), ALIGN)
    o_n = tl.arange(0, 64) + 1
    piece = tl.maximum(piece, ALIGN * (1 + tl.sum((9 * o_n * o_n < blocks).to(tl.int32), axis=0)))
    count = tl.where(m_b, tl.maximum(tl.cdiv(stop - start, piece), 1), 0)
    first = tl.cumsum(count, axis=0) - count
    tl.store(spans_ptr + 2 * o_b, first, mask=m_b)
    tl.store(spans_ptr + 2 * o_b + 1, count, mask=m_b)
    for i in range(0, tl.max(count, axis=0)):
        m_i = i < count
        item_ptrs = items_ptr + 3 * (first + i)
        tl.store(item_ptrs, o_b, mask=m_i)
        tl.store(item_ptrs + 1, start + i * piece, mask=m_i)
        tl.store(item_ptrs + 2, tl.minimum(start + (i + 1) * piece, stop), mask=m_i)
    o_w = tl.arange(0, BLOCK_W)
    is_unused = (o_w >= tl.sum(count, axis=0)) & (o_w < num_items)
    tl.store(items_ptr + 3 * o_w, -1, mask=is_unused)
    tl.store(items_ptr + 3 * o_w + 1, 0, mask=is_unused)
    tl.store(items_ptr + 3 * o_w + 2, 0, mask=is_unused)
    for head in tl.static_range(HKV):
        tl.store(arrivals_ptr + o_b * HKV + head, 0, mask=m_b)


def plan_decode(seq_lens: Tensor, num_kv_heads: int, window: int = 0) -> DecodePlan:
    batch_size = seq_lens.shape[0]
    num_items = num_plan_items(batch_size, num_kv_heads)
    items, spans, arrivals = (
        torch.empty(shape, dtype=torch.int32, device=seq_lens.device)
        for shape in ((num_items, 3), (batch_size, 2), (batch_size, num_kv_heads))
    )
    _plan_kernel[(1,)](
        seq_lens,
        items,
        spans,
        arrivals,
        batch_size,
        window,
        num_items,
        HKV=num_kv_heads,
        BLOCK_B=triton.next_power_of_2(batch_size),
        BLOCK_W=triton.next_power_of_2(num_items),
        ALIGN=PIECE_ALIGN,
        LONG=LONG_PIECE,
        num_warps=4,
        **dependent_launch(seq_lens.device),
    )
    return DecodePlan(items, spans, arrivals)
