"""Cache blocks are gathered into rows and scattered from them: Triton against the reference, and there and back."""

import pytest
import torch

from lmtool.errors import KernelError
from lmtool.kernels.block_pieces import block_pieces
from lmtool.kernels.reference import blocks as reference
from lmtool.kernels.triton import blocks as triton_blocks

# two layers of a cache as numbers; codes with their scales; pieces longer than what a program moves at once
CACHES = {
    "numbers": [((3, 9, 64, 20), torch.float16)] * 4,
    "codes": [((2, 9, 64, 32), torch.uint8), ((2, 9, 16, 64), torch.uint8), ((2, 9, 64, 2), torch.float16)] * 2,
    "long": [((2, 9, 64, 256), torch.float32)] * 2,
}


def random_cache(kind: str, device: torch.device) -> list[torch.Tensor]:
    return [
        torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype).to(device)
        for shape, dtype in CACHES[kind]
    ]


@pytest.mark.parametrize("kind", CACHES)
def test_the_twins_move_the_same(kind, device):
    tensors = random_cache(kind, device)
    pieces = block_pieces(tensors)
    blocks = torch.tensor([7, 1, 4], device=device)
    expected, actual = torch.empty(2, 3, pieces.row_words, dtype=torch.int64, device=device)
    reference.gather_blocks(pieces, blocks, expected)
    triton_blocks.gather_blocks(pieces, blocks, actual)
    assert torch.equal(actual, expected)
    assert torch.equal(actual[1, : pieces.tensors[0].shape[2]], pieces.tensors[0][0, 1])
    others = random_cache(kind, device)
    for twin, cache in ((reference, tensors), (triton_blocks, others)):
        for tensor, other in zip(cache, tensors, strict=True):
            tensor.copy_(other)
        twin.scatter_blocks(block_pieces(cache), torch.tensor([8, 2, 3], device=device), expected)
    for one, other in zip(tensors, others, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("twin", [reference, triton_blocks])
def test_there_and_back(twin, device):
    tensors = random_cache("codes", device)
    before = [tensor.clone() for tensor in tensors]
    pieces = block_pieces(tensors)
    rows = torch.empty(4, pieces.row_words, dtype=torch.int64, device=device)
    twin.gather_blocks(pieces, torch.tensor([5, 3], device=device), rows[1:3])
    for tensor in tensors:
        tensor[:, [3, 5]] = 0
    twin.scatter_blocks(pieces, torch.tensor([3], device=device), rows[2:3])
    twin.scatter_blocks(pieces, torch.tensor([5], device=device), rows[1:2])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8))
    assert rows[0, 0] == rows[3, -1] == torch.iinfo(torch.int64).max  # the rows beside them were not touched


def test_pieces_that_no_kernel_moves_are_refused(device):
    with pytest.raises(KernelError, match=r"\(2, 9, 1, 6\) does not hold its blocks in pieces of 16 bytes"):
        block_pieces([torch.zeros(2, 9, 1, 6, device=device)])
