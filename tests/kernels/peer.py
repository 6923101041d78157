"""Ranks that add up over memory they share: `python -m tests.kernels.peer SIZE KIND`, which forks the others.

Each prints how many sums were right to the bit: of several sizes in turn, longer ones in several messages.
"""

import ctypes
import mmap
import os
import sys

SIZE, KIND = int(sys.argv[1]), sys.argv[2]
if KIND == "triton":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402  Triton reads the variable at its import

from lmtool import kernels  # noqa: E402
from lmtool.kernels import Peers  # noqa: E402

MOST_BYTES, PROGRAMS = 16384, 4
# values: of one program and of several, with a rest, of one message and more than one
LENGTHS = (16, 504, 5008, 16, 9000, 504)
# Triton's interpreter knows no bfloat16's bits
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if KIND == "reference" else [])]


def shared_memory() -> mmap.mmap:
    memory = mmap.mmap(-1, 2 * SIZE * MOST_BYTES)
    memory.write(b"\xff" * len(memory))
    return memory


def peers_of(rank: int, memories: list[mmap.mmap]) -> Peers:
    return Peers(
        rank=rank,
        size=SIZE,
        most_bytes=MOST_BYTES,
        inboxes=torch.tensor([ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in memories]),
        calls=torch.zeros(PROGRAMS, dtype=torch.int32),
        ended=torch.zeros(1, dtype=torch.int32),
    )


def num_right(peers: Peers, dtype: torch.dtype) -> int:
    found = 0
    for i, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(i)
        parts = [torch.randn(length, generator=generator).to(dtype) for _ in range(SIZE)]
        hidden = torch.randn(length, generator=generator).to(dtype)
        parts[1].view(torch.int32)[2:4] = -1  # numbers that are none, as their bits say "nothing has come"
        total = hidden.float()
        for part in parts:
            total = total + part.float()
        with kernels.force(KIND):
            same = kernels.add_all_reduce_(hidden.view(1, -1), parts[peers.rank].view(1, -1), peers)
        right = torch.equal(hidden.nan_to_num(1e3), total.to(dtype).nan_to_num(1e3))
        found += right and same.data_ptr() == hidden.data_ptr()
    return found


memories = [[shared_memory() for _ in range(SIZE)] for _ in DTYPES]
rank = next((rank for rank in range(1, SIZE) if not os.fork()), 0)
for dtype, shared in zip(DTYPES, memories, strict=True):
    os.write(1, f"{rank} {dtype}: {num_right(peers_of(rank, shared), dtype)} of {len(LENGTHS)}\n".encode())
if rank == 0:
    for _ in range(1, SIZE):
        os.wait()
