"""hidden += the sum of all ranks' parts, by one kernel: each rank writes its part into the others' memory, then adds up
what the others have written into its own. Nothing is read over the link, and no flag crosses it.

A word that nobody has written yet is a NaN of all ones, which no part has; who has read one puts that back. So values
say themselves that they have come, as in TensorRT-LLM's one-shot sums (there it is -0).
"""

import triton
import triton.language as tl
from torch import Tensor

from lmtool.errors import KernelError
from lmtool.kernels.layout import VECTOR_BYTES, Peers
from lmtool.kernels.triton.launch import allow_next, dependent_launch, wait_for_previous

_NOTHING = tl.constexpr(-1)
_OTHER_NAN = tl.constexpr(0x7FFF7FFF)  # of one number of 32 bits as of two of 16

# words of four bytes a program, the same for all messages: two vectors of 16 bytes a thread (docs/log.md)
_BLOCK = 512
_NUM_WARPS = 2


@triton.jit
def _unpacked(word, dtype: tl.constexpr):
    """Four bytes → the two values in them; of one value, that and something."""
    if dtype.primitive_bitwidth == 32:
        first = word.to(tl.float32, bitcast=True)
        last = first
    else:
        first = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        last = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, last


@triton.jit
def _packed(first, last, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 32:
        word = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (last.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def _part(part_ptr, o_w, m_w):
    part = tl.load(part_ptr + o_w, mask=m_w, other=0)
    return tl.where(part == _NOTHING, _OTHER_NAN, part)


@triton.jit
def _take(inbox_ptr, ended_ptr, m_w):
    """Waits for the words that come to inbox_ptr, and leaves nothing behind."""
    word = tl.load(inbox_ptr, mask=m_w, other=0, volatile=True)
    missing = tl.sum((word == _NOTHING).to(tl.int32), axis=0)
    while missing != 0:
        word = tl.load(inbox_ptr, mask=m_w, other=0, volatile=True)
        missing = tl.sum((word == _NOTHING).to(tl.int32), axis=0) * (1 - tl.load(ended_ptr, volatile=True))
    tl.store(inbox_ptr, _NOTHING, mask=m_w)
    return word


@triton.jit(do_not_specialize=["num_vectors", "most_vectors"])
def _add_all_reduce_kernel(
    hidden_ptr,
    part_ptr,
    inboxes_ptr,
    calls_ptr,
    ended_ptr,
    num_vectors,
    most_vectors,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p has the blocks p, p + PROGRAMS, … of all messages, long and short.

    Every rank has an inbox for each other, twice: who writes into the one of the call after the next has read the next
    call's, whose writer had emptied this one's before.
    """
    allow_next(PDL)
    num_words, most = num_vectors * 4, most_vectors * 4  # so that whole vectors are there or not
    program = tl.program_id(0)
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    hidden_ptr = hidden_ptr.to(tl.pointer_type(tl.int32))
    part_ptr = part_ptr.to(tl.pointer_type(tl.int32))
    own_ptr = tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int32))
    wait_for_previous(PDL)
    call = tl.load(calls_ptr + program)
    half = ((call & 1) * SIZE).to(tl.int64)
    for start in range(program * BLOCK, num_words, PROGRAMS * BLOCK):
        o_w = start + tl.arange(0, BLOCK)
        m_w = o_w < num_words
        part = _part(part_ptr, o_w, m_w)
        for step in tl.static_range(1, SIZE):
            other = (RANK + step) % SIZE
            inbox_ptr = tl.load(inboxes_ptr + other).to(tl.pointer_type(tl.int32)) + (half + RANK) * most
            tl.store(tl.multiple_of(inbox_ptr, 16) + o_w, part, mask=m_w)
    for start in range(program * BLOCK, num_words, PROGRAMS * BLOCK):
        o_w = start + tl.arange(0, BLOCK)
        m_w = o_w < num_words
        first, last = _unpacked(tl.load(hidden_ptr + o_w, mask=m_w, other=0), dtype)
        for rank in tl.static_range(SIZE):  # in the same order everywhere: all ranks have the same sum
            if rank == RANK:
                word = _part(part_ptr, o_w, m_w)
            else:
                word = _take(tl.multiple_of(own_ptr + (half + rank) * most, 16) + o_w, ended_ptr, m_w)
            come_first, come_last = _unpacked(word, dtype)
            first += come_first
            last += come_last
        tl.store(hidden_ptr + o_w, _packed(first, last, dtype), mask=m_w)
    tl.store(calls_ptr + program, call + 1)


def add_all_reduce_(hidden: Tensor, part: Tensor, peers: Peers) -> Tensor:
    same = (hidden.shape, hidden.dtype) == (part.shape, part.dtype)
    if not same or not hidden.is_contiguous() or not part.is_contiguous() or hidden.nbytes % VECTOR_BYTES:
        raise KernelError(
            f"add_all_reduce_ takes two contiguous tensors of one shape and dtype, of whole vectors of {VECTOR_BYTES}"
            f" bytes, got {list(hidden.shape)} {hidden.dtype} and {list(part.shape)} {part.dtype}"
        )
    most = peers.most_bytes // hidden.itemsize
    if hidden.numel() <= most:
        _launch(hidden, part, peers)
        return hidden
    for some, some_part in zip(hidden.view(-1).split(most), part.view(-1).split(most), strict=True):
        _launch(some, some_part, peers)
    return hidden


def _launch(hidden: Tensor, part: Tensor, peers: Peers) -> None:
    programs = peers.calls.numel()
    _add_all_reduce_kernel[(min(programs, triton.cdiv(hidden.nbytes, 4 * _BLOCK)),)](
        hidden,
        part,
        peers.inboxes,
        peers.calls,
        peers.ended,
        hidden.nbytes // VECTOR_BYTES,
        peers.most_bytes // VECTOR_BYTES,
        RANK=peers.rank,
        SIZE=peers.size,
        PROGRAMS=programs,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
        **dependent_launch(hidden.device),
    )
