"""A step's rows are gathered from their slots, and written back: Triton against the reference."""

import pytest
import torch

from lmtool.kernels.layout import POSITION, SEED, STEP, TOKEN
from lmtool.kernels.reference import step as reference
from lmtool.kernels.triton import step as triton_step

BLOCK_SIZE = 16


def state(num_slots: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longs = torch.randint(0, 2**62, (4, num_slots))
    longs[POSITION] = torch.randint(0, width * BLOCK_SIZE, (num_slots,))
    words = torch.randint(0, 2**31 - 1, (4, num_slots)).int()
    tables = torch.randint(1, 1000, (num_slots, width)).int()
    return longs.to(device), words.to(device), tables.to(device)


@pytest.mark.parametrize("width", [1, 7, 1500])
@pytest.mark.parametrize("rows", [[2], [4, -1, 0, 3], [-1, -1]], ids=str)
def test_rows_are_gathered(rows, width, device):
    longs, words, tables = state(5, width, device)
    of_rows = torch.tensor(rows, dtype=torch.int32, device=device)
    expected = reference.step_rows(of_rows, longs, words, tables, BLOCK_SIZE)
    actual = triton_step.step_rows(of_rows, longs, words, tables, BLOCK_SIZE)
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert one.is_contiguous(), name
        # bit patterns: random words may be NaN as a float
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), name


def test_a_row_says_where_its_token_goes(device):
    longs, words, tables = state(5, 7, device)
    rows = torch.tensor([3, -1], dtype=torch.int32, device=device)
    found = reference.step_rows(rows, longs, words, tables, BLOCK_SIZE)
    position = int(longs[POSITION, 3])
    block = int(tables[3, position // BLOCK_SIZE])
    assert found.slots.tolist() == [block * BLOCK_SIZE + position % BLOCK_SIZE, 1]
    assert found.seq_lens.tolist() == [position + 1, 0]
    assert found.positions.tolist() == [position, 0]


@pytest.mark.parametrize("num_rows", [1, 3, 300])
def test_tokens_are_fed_back(num_rows, device):
    longs, _, _ = state(400, 4, device)
    rows = torch.randperm(400)[:num_rows].int()
    rows[num_rows // 2 + 1 :: 3] = -1
    rows = rows.to(device)
    ids = torch.randint(0, 1000, (num_rows,), device=device)
    logits = torch.zeros(num_rows, 500, device=device)  # a rank's half of them
    before, expected, kept = longs.clone(), longs.clone(), ids.clone()
    reference.advance_(rows, ids, logits, expected, 1000)
    triton_step.advance_(rows, ids, logits, longs, 1000)
    assert torch.equal(ids, kept)
    assert torch.equal(longs, expected)
    slot = int(rows[0])
    assert int(longs[TOKEN, slot]) == int(ids[0])
    assert (longs - before)[[POSITION, SEED, STEP], slot].tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", [reference, triton_step])
def test_logits_that_are_not_numbers_give_no_token_and_go_on_inside_the_vocabulary(kind, device):
    longs, _, _ = state(5, 4, device)
    rows = torch.tensor([3, 0, 2, -1], dtype=torch.int32, device=device)
    logits = torch.zeros(4, 50, device=device)
    logits[1] = torch.nan
    ids = torch.tensor([7, 9, 50, 60], device=device)
    kind.advance_(rows, ids, logits, longs, 50)
    assert ids.tolist() == [7, -1, -1, -1]
    assert longs[TOKEN, [3, 0, 2]].tolist() == [7, 0, 0]
