"""Penalties and masks on logits in Triton, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_BLOCK = 4096


# a row of an odd vocabulary begins anywhere, and so does each row's penalty
@triton.jit(do_not_specialize_on_alignment=["logits_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr"])
def _penalize_kernel(
    logits_ptr,
    prompt_mask_ptr,
    output_counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    factor, presence = tl.load(repetition_ptr + row), tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (factor == 1) & (presence == 0) & (frequency == 0):
        return  # a row without penalties costs nothing
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_v < V
    ptrs = row.to(tl.int64) * V + o_v
    x = tl.load(logits_ptr + ptrs, mask=mask, other=0.0)
    count = tl.load(output_counts_ptr + ptrs, mask=mask, other=0)
    in_prompt = tl.load(prompt_mask_ptr + ptrs, mask=mask, other=0) != 0
    penalized = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x = tl.where(in_prompt | (count > 0), penalized, x)
    x -= count.to(tl.float32) * frequency + tl.where(count > 0, presence, 0.0)
    tl.store(logits_ptr + ptrs, x, mask=mask)


def penalize_(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    num_rows, vocab_size = logits.shape
    if not logits.is_contiguous() or logits.dtype != torch.float32:
        raise KernelError(f"penalize_ works in place on contiguous float32 logits, got {logits.dtype}")
    if num_rows:
        _penalize_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            logits,
            prompt_mask,
            output_counts,
            repetition,
            presence,
            frequency,
            V=vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
            **dependent_launch(logits.device),
        )
    return logits


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "words_ptr"])
def _mask_kernel(
    logits_ptr, rows_ptr, words_ptr, V: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Program (i, part): BLOCK logits of the i-th row that is masked."""
    allow_next(PDL)
    wait_for_previous(PDL)
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + i * WORDS + o_v // 32, mask=o_v < V, other=-1)
    refused = ((words >> (o_v % 32)) & 1) == 0
    tl.store(logits_ptr + row * V + o_v, tl.full([BLOCK], float("-inf"), tl.float32), mask=refused)


def mask_(logits: Tensor, rows: Tensor, words: Tensor) -> Tensor:
    if not logits.is_contiguous() or logits.dtype != torch.float32:
        raise KernelError(f"mask_ works in place on contiguous float32 logits, got {logits.dtype}")
    if len(rows):
        vocab_size = logits.shape[1]
        _mask_kernel[(len(rows), triton.cdiv(vocab_size, _BLOCK))](
            logits,
            rows,
            words,
            V=vocab_size,
            WORDS=words.shape[1],
            BLOCK=_BLOCK,
            num_warps=8,
            **dependent_launch(logits.device),
        )
    return logits
