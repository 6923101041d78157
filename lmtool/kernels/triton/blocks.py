"""Cache blocks in and out of rows that hold a whole block each: one kernel for all tensors of all layers."""

import triton
import triton.language as tl
from torch import Tensor

from lmtool.kernels.block_pieces import BlockPieces

_WORDS = 1024


@triton.jit
def _move_kernel(table_ptr, blocks_ptr, rows_ptr, num_pieces, row_words, GATHER: tl.constexpr, WORDS: tl.constexpr):
    """Program (piece, row). Pieces are multiples of 16 bytes and lie at such: two words at once."""
    piece, row = tl.program_id(0), tl.program_id(1)
    first = tl.load(table_ptr + piece)
    length = tl.multiple_of(tl.load(table_ptr + num_pieces + piece), 2)
    start = tl.multiple_of(tl.load(table_ptr + 2 * num_pieces + piece), 2)
    block = tl.load(blocks_ptr + row)
    stored_ptr = tl.multiple_of((first + block * length * 8).to(tl.pointer_type(tl.int64)), 16)
    row_ptr = rows_ptr + tl.multiple_of(row.to(tl.int64) * row_words + start, 2)
    for done in range(0, length, WORDS):
        o_w = done + tl.arange(0, WORDS)
        m_w = o_w < length
        if GATHER:
            tl.store(row_ptr + o_w, tl.load(stored_ptr + o_w, mask=m_w), mask=m_w)
        else:
            tl.store(stored_ptr + o_w, tl.load(row_ptr + o_w, mask=m_w), mask=m_w)


def gather_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    _move(pieces, blocks, rows, gather=True)


def scatter_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    _move(pieces, blocks, rows, gather=False)


def _move(pieces: BlockPieces, blocks: Tensor, rows: Tensor, *, gather: bool) -> None:
    num_pieces = pieces.table.shape[1]
    grid = (num_pieces, blocks.shape[0])
    _move_kernel[grid](
        pieces.table, blocks, rows, num_pieces, pieces.row_words, GATHER=gather, WORDS=_WORDS, num_warps=4
    )
