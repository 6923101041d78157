"""Sums over ranks by memory that all of them write to: real processes, Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from lmtool import kernels
from lmtool.errors import KernelError
from lmtool.kernels import Peers


@pytest.mark.parametrize(("kind", "size"), [("reference", 2), ("triton", 2), ("triton", 3)])
def test_all_ranks_have_the_sum_that_float32_gives(kind, size):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.peer", str(size), kind],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    dtypes = ("float16", "float32", "bfloat16") if kind == "reference" else ("float16", "float32")
    expected = [f"{rank} torch.{dtype}: 6 of 6" for rank in range(size) for dtype in dtypes]
    assert sorted(done.stdout.splitlines()) == sorted(expected)


@pytest.mark.parametrize("shape", [(1, 16), (3, 5)])
def test_what_is_no_pair_of_whole_vectors_is_refused(shape):
    from lmtool.kernels.triton.all_reduce import add_all_reduce_

    none = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(KernelError, match="add_all_reduce_ takes two contiguous tensors"):
        add_all_reduce_(torch.zeros(3, 5), torch.zeros(shape), Peers(0, 2, 1024, none, none, none))


def test_the_door_chooses_for_a_cpu():
    assert kernels.implementation("all_reduce", torch.device("cpu")).__name__.endswith("reference.all_reduce")
