"""Cache blocks in and out of rows that hold a whole block each, in plain torch."""

from collections.abc import Iterator

from torch import Tensor

from lmtool.kernels.block_pieces import BlockPieces


def gather_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    for tensor, part in _parts(pieces, rows):
        part.copy_(tensor.index_select(1, blocks))


def scatter_blocks(pieces: BlockPieces, blocks: Tensor, rows: Tensor) -> None:
    for tensor, part in _parts(pieces, rows):
        tensor.index_copy_(1, blocks, part)


def _parts(pieces: BlockPieces, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor [H, NB, n] and what the rows hold of it [H, N, n]."""
    start = 0
    for tensor in pieces.tensors:
        num_heads, _, length = tensor.shape
        yield tensor, rows[:, start : start + num_heads * length].unflatten(1, (num_heads, length)).transpose(0, 1)
        start += num_heads * length
