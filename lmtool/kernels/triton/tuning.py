"""Launch configurations: a small measured table and a rule for every other shape. Knows no kernel.

Nothing is tuned while serving; `benchmarks/gpu_kernels.py` prints the figures behind the table (docs/log.md has them).
"""

from typing import NamedTuple


class RowConfig(NamedTuple):
    """One row of x against every weight row: each program holds ``block_n`` weight rows, ``block_k`` wide."""

    block_n: int
    block_k: int
    num_warps: int


class TileConfig(NamedTuple):
    """A few rows of x on the tensor cores; ``swap``: the weights are the left operand of the product."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    prefetch: bool = True


def row_config(num_out: int, num_in: int, *, paired: bool) -> RowConfig:
    """For M = 1. ``paired``: gate and up rows in one program, so half as many of each."""
    return RowConfig(2 if paired else 4, min(2048, _power_of_two(num_in)), 4)


def tile_config(num_rows: int, num_out: int, num_in: int, *, paired: bool) -> TileConfig:
    """For 2 ≤ M ≤ max_rows."""
    return TileConfig(16 if paired else 32, 128, 4, 4)


def max_rows(num_out: int, num_in: int) -> int:
    """Above this many rows the library's matrix product is the faster one."""
    return 16


class AttentionConfig(NamedTuple):
    """``block_r`` rows (queries × the heads that share a key), ``block_t`` keys a tile."""

    block_r: int
    block_t: int
    num_warps: int
    num_stages: int


def decode_config(batch_size: int, head_dim: int) -> AttentionConfig:
    return AttentionConfig(16, 64, 4, 3 if head_dim <= 128 else 2)


def prefill_config(num_rows: int, head_dim: int, itemsize: int) -> AttentionConfig:
    """``num_rows``: queries × heads of the longest chunk."""
    block_r = min(128, max(16, _power_of_two(num_rows)))
    if head_dim > 128 or itemsize == 4:
        block_r = min(64, block_r)
    return AttentionConfig(block_r, 64 if itemsize == 2 else 32, 8 if block_r == 128 else 4, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
