"""Where the pieces of a cache block lie: in every tensor of every layer, one for each head. Knows no kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmtool.errors import KernelError

_WORD = 8
_ALIGN = 16  # bytes: what a kernel moves at once


class BlockPieces(NamedTuple):
    """A block is a row of ``row_words`` words of eight bytes: its pieces, tensor by tensor and head by head.

    tensors  int64 [H, NB, n]: the cache's own memory
    table    int64 [3, P], on their device: of each piece the address of its tensor's and head's block 0, its words n,
             and the word of a row at which it begins
    """

    tensors: tuple[Tensor, ...]
    table: Tensor
    row_words: int


def block_pieces(tensors: Sequence[Tensor]) -> BlockPieces:
    """tensors: everything that blocks hold, each [H, NB, …], contiguous, on one device. Raises KernelError."""
    words, pieces, end = [], [], 0
    for tensor in tensors:
        piece_bytes = tensor[0, 0].numel() * tensor.element_size()
        if not tensor.is_contiguous() or piece_bytes % _ALIGN or tensor.data_ptr() % _ALIGN:
            raise KernelError(
                f"a cache tensor {tuple(tensor.shape)} does not hold its blocks in pieces of {_ALIGN} bytes"
            )
        words.append(tensor.flatten(2).view(torch.int64))
        num_heads, num_blocks, length = words[-1].shape
        for head in range(num_heads):
            pieces.append((tensor.data_ptr() + head * num_blocks * piece_bytes, length, end))
            end += length
    table = torch.tensor(pieces, dtype=torch.int64).T.contiguous().to(tensors[0].device)
    return BlockPieces(tuple(words), table, end)
