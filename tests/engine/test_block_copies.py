"""Blocks keep their content on their way out and back, whatever is done to the cache meanwhile."""

import pytest
import torch

from lmtool.engine.batch import Load
from lmtool.engine.block_copies import BlockCopies
from lmtool.engine.host_memory import HostPlan

NUM_BLOCKS = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def caches(device: str) -> list[torch.Tensor]:
    """Two layers' tensors as the cache kinds have them: K and V in half precision, codes, scales."""
    generator = torch.Generator().manual_seed(3)
    tensors = []
    for _ in range(2):
        tensors += [
            torch.randn(2, NUM_BLOCKS, 64, 16, generator=generator).half(),
            torch.randn(2, NUM_BLOCKS, 64, 16, generator=generator),
            torch.randint(0, 256, (2, NUM_BLOCKS, 16, 64), generator=generator, dtype=torch.uint8),
            torch.randn(3, NUM_BLOCKS, 64, 2, generator=generator).half(),
        ]
    return [tensor.to(device) for tensor in tensors]


def make(tensors: list[torch.Tensor], num_host: int, num_staging: int = 16) -> BlockCopies:
    block_bytes = sum(t[:, 0].numel() * t.element_size() for t in tensors)
    return BlockCopies(tensors, HostPlan(num_blocks=num_host, block_bytes=block_bytes, num_staging=num_staging))


def finish(copies: BlockCopies) -> list[int]:
    numbers: list[int] = []
    while done := copies.over(wait=True).loads:
        numbers += done
    return numbers


@pytest.mark.parametrize("device", DEVICES)
def test_out_overwritten_and_back_elsewhere(device: str) -> None:
    tensors = caches(device)
    before = [tensor.clone() for tensor in tensors]
    copies = make(tensors, num_host=30)
    out = [(block, host) for block, host in zip(range(1, 26), [*range(20, 30), *range(15)], strict=True)]
    copies.begin(out, [])  # more than the staging buffer holds at once
    for tensor in tensors:
        tensor[:, 1:26].zero_()
    back = {block: 39 - i if i < 14 else i for i, (block, _) in enumerate(out)}
    pairs = [(host, back[block]) for block, host in out]
    copies.begin([], [Load(4, pairs[:3]), Load(5, pairs[3:])])
    assert finish(copies) == [4, 5]
    for tensor, old in zip(tensors, before, strict=True):
        for block, there in back.items():
            assert torch.equal(tensor[:, there], old[:, block])
        assert torch.equal(tensor[:, 0], old[:, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_every_block_moves_at_once_many_times(device: str) -> None:
    """Steps, saves and loads follow each other without anybody waiting: order alone keeps them apart."""
    tensors = caches(device)
    copies = make(tensors, num_host=NUM_BLOCKS, num_staging=8)
    expected = [tensor.clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(9)
    for turn in range(20):
        order = torch.randperm(NUM_BLOCKS - 1, generator=generator)[:20] + 1
        places = torch.randperm(NUM_BLOCKS, generator=generator)[:20]
        saves = list(zip(order.tolist(), places.tolist(), strict=True))
        for tensor, copy in zip(tensors, expected, strict=True):
            tensor[:, order.to(device)] += 1  # a step
            copy[:, order.to(device)] += 1
        copies.begin(saves, [])
        for tensor in tensors:
            tensor[:, order.to(device)] = 7  # the next, which was given the blocks
        shuffled = [saves[i] for i in torch.randperm(20, generator=generator).tolist()]
        copies.begin([], [Load(turn, [(host, block) for block, host in shuffled])])
        assert finish(copies) == [turn]
    for tensor, copy in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("device", DEVICES)
def test_the_way_back_is_measured_and_leaves_the_cache_as_it_was(device: str) -> None:
    tensors = caches(device)
    before = [tensor.clone() for tensor in tensors]
    copies = make(tensors, num_host=5)
    assert copies.measure() > 1e6
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    assert copies.over(wait=True).loads == []


def test_what_fails_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = caches("cpu")
    copies = make(tensors, num_host=5)
    with pytest.raises(IndexError):
        copies.begin([], [Load(0, [(0, 1)]), Load(1, [(1, NUM_BLOCKS)])])
    assert copies.over(wait=True).loads == []


def test_neighbours_on_the_host_are_one_copy() -> None:
    copies = make(caches("cpu"), num_host=5)
    host = copies._host
    host._per_chunk = 3
    host._chunks = [torch.arange(3)[:, None], torch.arange(3, 5)[:, None]]
    runs = [(start, rows[:, 0].tolist()) for start, rows in host.runs([1, 2, 3, 4, 0, 1, 3])]
    assert runs == [(0, [1, 2]), (2, [3, 4]), (4, [0, 1]), (6, [3])]
