"""Sampling shared out: each rank chooses for some rows, and all know all tokens."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmtool.engine.choice import choose_
from lmtool.kernels.layout import POSITION, STEP, TOKEN
from lmtool.models.decoder import Decoder
from tests.models.test_shard import load, on_ranks
from tests.quant.models import tiny_folder

NUM_SLOTS = 80


def chosen(decoder: Decoder, num_rows: int) -> tuple[Tensor, Tensor]:
    """Ids and state after one step: greedy rows, sampled ones, restricted ones, one that holds no numbers, padding."""
    random = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, decoder.config.hidden_size, generator=random)
    hidden[3] = torch.nan
    rows = torch.randperm(NUM_SLOTS, generator=random)[:num_rows].int()
    rows[-2:] = -1
    kind = torch.arange(num_rows) % 4
    longs = torch.randint(0, 50, (4, NUM_SLOTS), generator=random)
    sampling = (
        torch.where(kind == 0, 0.0, 0.9),
        torch.where(kind == 1, 7, 0).int(),
        torch.where(kind == 2, 0.6, 1.0),
        torch.zeros(num_rows),
        torch.arange(num_rows),
        torch.arange(num_rows) * 3,
    )
    return choose_(decoder, hidden, rows, sampling, longs), longs


@pytest.mark.parametrize(("size", "num_rows"), [(2, 64), (4, 64), (2, 9), (4, 66)])
def test_every_rank_has_the_tokens_of_one_process(tmp_path: Path, size: int, num_rows: int) -> None:
    """Also of few rows and of ones that the ranks do not divide, for which all choose all; the vocabulary is 131."""
    folder = tiny_folder(tmp_path, vocab_size=131)
    ids, longs = chosen(load(folder), num_rows)
    assert ids[3] == -1
    assert ((ids >= 0) & (ids < 131)).sum() == num_rows - 1
    assert len(set(ids.tolist())) > num_rows // 4
    for found_ids, found_longs in on_ranks(folder, size, lambda decoder: chosen(decoder, num_rows)):
        assert torch.equal(found_ids, ids)
        for field in (TOKEN, POSITION, STEP):
            assert torch.equal(found_longs[field], longs[field])


_SCRIPT = """
import os, sys
from pathlib import Path
import torch
from lmtool.engine.rank_group import file_store, join_group
rank, path = int(sys.argv[1]), Path(sys.argv[2])
group = join_group(file_store(path, 2), rank, 2, torch.device("cpu"))
rows = torch.arange(24).view(4, 6) + 100 * rank
assert group.exchange(rows).tolist() == [
    [6 * row + i + 100 * r for r in range(2) for i in range(6)] for row in (2 * rank, 2 * rank + 1)
]
assert group.all_gather_rows(torch.tensor([rank, 7])).tolist() == [0, 7, 1, 7]
assert group.all_gather(torch.tensor([[rank], [5]])).tolist() == [[0, 1], [5, 5]]
assert group.least(3 - rank) == 2
print("said", flush=True)
sys.stdin.read()
os._exit(0)  # as ranks do: a group whose others are gone may end its process by SIGABRT
"""


def test_what_processes_say_to_each_other(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _SCRIPT]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*words, str(rank), str(tmp_path / "store")],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )
            )
            for rank in range(2)
        ]  # fmt: skip
        assert [process.stdout.readline() for process in processes] == ["said\n", "said\n"]
    assert [process.returncode for process in processes] == [0, 0]
