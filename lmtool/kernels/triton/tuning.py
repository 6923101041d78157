"""Launch configurations: what was measured for a shape, and a rule for every other. Knows no kernel.

Nothing is tuned while serving: `lmtool bench kernels --tune` writes the tables, `tables` reads them, each when it is
first needed. Lines of docs/log.md stand behind the rules.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from lmtool.kernels.triton import tables

_AMPERE, _HOPPER = 80, 90
_LIBRARY_ABOVE = 32  # rows, for shapes that were not measured: at 64 the library is the faster one almost everywhere


class RowConfig(NamedTuple):
    """One row of x against every weight row: each program holds ``block_n`` weight rows, ``block_k`` wide."""

    block_n: int
    block_k: int
    num_warps: int


class TileConfig(NamedTuple):
    """A few rows of x on the tensor cores; ``swap``: the weights are the left operand of the product.

    ``split``: how many programs share the in features of one tile.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = True
    split: int = 1


class LibraryConfig(NamedTuple):
    """More than ``above`` rows go to the library's matrix product."""

    above: int


class W4FewConfig(NamedTuple):
    """Up to 16 rows: ``along_k`` of ``num_warps`` warps share a row of tiles; a program takes ``turns`` tiles a warp.

    ``early``: hold the next tile in registers for a whole turn; ``registers``: what a thread may have. ``held``: hold
    all tiles from the start, turns of one row then. ``norm``: one row's norm is in the kernel, not one before it.
    """

    num_warps: int
    turns: int
    early: bool
    registers: int
    along_k: int = 1
    held: bool = False
    norm: bool = True


class W4WideConfig(NamedTuple):
    """``block_m`` rows of x and 16 · ``num_warps`` · ``high`` of the weights a program, ``split`` programs along K."""

    block_m: int
    num_warps: int
    high: int
    split: int
    num_stages: int


class W4HopperConfig(NamedTuple):
    """Tiles of ``block_m`` rows of x and 16 · ``num_warps`` · ``high`` of the weights.

    ``programs`` are on a multiprocessor at once: each has room for ``num_stages`` of 128 in features of x.
    """

    block_m: int
    num_warps: int
    high: int
    num_stages: int
    programs: int


# the kernels that a table may hold, and what it says about each
CONFIGS: dict[str, type] = {
    "rows": RowConfig,
    "tiles": TileConfig,
    "library": LibraryConfig,
    "w4_few": W4FewConfig,
    "w4_wide": W4WideConfig,
    "w4_hopper": W4HopperConfig,
}

_forced: ContextVar[tables.Table | None] = ContextVar("forced_tuning", default=None)


@contextmanager
def using(entries: Iterable[tables.Entry]) -> Iterator[None]:
    """These entries go before all others inside the block: for the tuner, which tries them out."""
    token = _forced.set(tables.Table(entries))
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _stored(capability: int) -> tables.Table:
    return tables.load(capability, CONFIGS)


def _find(capability: int, key: tables.Key, num_rows: int = 1) -> tables.Config | None:
    forced = _forced.get()
    found = None if forced is None else forced.find(key, num_rows)
    return _stored(capability).find(key, num_rows) if found is None else found


def row_config(capability: int, num_out: int, num_in: int, *, paired: bool, itemsize: int) -> RowConfig:
    """For one row. ``paired``: gate and up rows in one program. Raises ConfigError for a table that is damaged."""
    found = _find(capability, tables.Key("rows", num_out, num_in, paired, itemsize))
    if found is not None:
        return found
    if num_in > 4096 and num_in % 4096:  # a last turn of which a part is nothing: best for 7168 and 11008 (docs/log.md)
        return RowConfig(8, 512, 8)
    block_k = min(4096, _power_of_two(num_in))
    return RowConfig(2, block_k, 8 if block_k == 4096 else 4)


def tile_config(
    capability: int, num_rows: int, num_out: int, num_in: int, *, paired: bool, itemsize: int
) -> TileConfig:
    """For 2 to max_rows rows. Cards before Hopper have less shared memory: 64 KB on a 7.5, 99 KB on an 8.6."""
    found = _find(capability, tables.Key("tiles", num_out, num_in, paired, itemsize), num_rows)
    if found is not None:
        return found
    if itemsize == 4:
        return TileConfig(32, 32, 4, 2, swap=False)
    if capability < _HOPPER:
        return TileConfig(64, 64, 4, 3)
    if num_out >= 32768:
        return TileConfig(128, 128, 4, 3)
    if paired:
        return TileConfig(64, 128, 4, 4)
    # about one program for each multiprocessor, each with at least four steps
    split = max(1, min(4, 128 // -(-num_out // 64), num_in // 512))
    return TileConfig(64, 128, 4, 6, split=split)


def max_rows(capability: int, num_out: int, num_in: int, *, paired: bool, itemsize: int) -> int:
    """Above this many rows the library's matrix product is the faster one."""
    found = _find(capability, tables.Key("library", num_out, num_in, paired, itemsize))
    return _LIBRARY_ABOVE if found is None else found.above


def w4_few_config(
    capability: int, num_rows: int, num_out: int, num_in: int, *, paired: bool, group_size: int
) -> W4FewConfig:
    """For ``num_out`` × ``num_in`` filled up to whole tiles. As many programs as registers leave room for at once."""
    # measured with groups of 128: smaller ones want more registers
    found = _find(capability, tables.Key("w4_few", num_out, num_in, paired, 2), num_rows) if group_size == 128 else None
    if found is not None:
        return found
    tiles_n, tiles_k = num_out // 32, num_in // 128
    if num_rows == 1:
        along_k = 4 if tiles_k % 4 == 0 else 2
        row = tiles_k // along_k
        small_groups = group_size < 128  # their scales want registers
        turns = -(-tiles_n * row // (132 * (12 if small_groups else 16) // along_k))
        held = turns <= 2 and row % turns == 0 and not small_groups
        registers = 168 if small_groups else 144 if held else 128
        # a norm in the kernel is as dear as one before it from about four turns on
        return W4FewConfig(along_k, turns, False, registers, along_k, held, norm=turns <= 3)
    # with sixteen rows and a sum to add to, four warps are a register short: two are as fast (docs/log.md)
    four = tiles_n % 4 == 0 and (num_rows <= 8 or paired)
    num_warps = 4 if four else 2 if tiles_n % 2 == 0 else 1
    # of 4 warps on a multiprocessor: what registers leave room for
    programs = 3 if num_rows > 8 and group_size < 128 else 4
    turns = -(-(tiles_n // num_warps * tiles_k) // (132 * programs * 4 // num_warps))
    return W4FewConfig(num_warps, turns, early=num_rows <= 8, registers=168 if programs == 3 else 128)


def w4_wide_config(capability: int, num_rows: int, num_out: int, num_in: int, *, paired: bool) -> W4WideConfig:
    found = _find(capability, tables.Key("w4_wide", num_out, num_in, paired, 2), num_rows)
    if found is not None:
        return found
    tall = num_out >= 16384
    if capability < _HOPPER:
        return W4WideConfig(64, 4, 1, 1, 2)
    if num_rows <= 64:
        return W4WideConfig(64, 4, 2, 1, 3) if tall else W4WideConfig(64, 4, 1, min(4, num_in // 256), 4)
    if tall:
        return W4WideConfig(128, 4, 2, 1, 3) if num_rows <= 128 else W4WideConfig(256, 8, 1, 1, 3)
    low = -(-num_out // 64)
    if num_rows > 128 and low >= 80:
        return W4WideConfig(256, 4, 1, 1, 3)
    # a program for each multiprocessor: parts of K cost more than a second wave of them would save
    split = max(1, 132 // (low * -(-num_rows // 128)))
    return W4WideConfig(128, 4, 1, min(4, split, num_in // 256), 4)


def w4_hopper_config(num_rows: int, num_out: int, num_in: int, *, paired: bool) -> W4HopperConfig | None:
    """For ``num_out`` × ``num_in`` filled up to whole tiles. None where 64 rows of the weights are not whole tiles."""
    found = _find(_HOPPER, tables.Key("w4_hopper", num_out, num_in, paired, 2), num_rows)
    if found is not None or num_out % 64:
        return found
    if num_rows <= 32:
        return W4HopperConfig(32, 4, 1, 4, 4)
    small, whole = num_out * num_in <= 4096 * 2048, num_out % 128 == 0
    tall = whole and num_out >= 22528  # two thirds of a wave of tiles that no two programs share
    if num_rows <= 64:
        few = num_out * num_in < 6144 * 4096
        return W4HopperConfig(64, 4, 2, 5, 2) if tall else W4HopperConfig(64, 4, 1, *((5, 2) if few else (3, 4)))
    if num_rows <= 128 and small:
        return W4HopperConfig(64, 4, 1, 5, 2)
    if num_rows <= 96 and whole and not tall:
        return W4HopperConfig(64, 4, 2, 5, 2)  # a tile of 128 of which much is missing is slow
    if num_rows <= 128 or not whole:
        return W4HopperConfig(128, 4, 2 if tall else 1, 3, 2)
    if tall and num_rows <= 384 and -num_rows % 256 >= 96:
        return W4HopperConfig(128, 4, 2, 3, 2)
    # 256 rows of x are the faster ones where their tiles fill the card, alone or shared by a few programs
    num_tiles = num_out // 128 * -(-num_rows // 256)
    if num_tiles >= 86 or num_tiles * num_in >= 24 * 128 * 132:
        return W4HopperConfig(256, 8, 1, 3, 1)
    if small:
        return W4HopperConfig(64, 4, 1, 5, 2) if num_rows <= 256 else W4HopperConfig(128, 4, 1, 3, 2)
    return W4HopperConfig(128, 8, 1, 5, 1)


def w4_most_rows(capability: int) -> int:
    """Above this many rows the weights are expanded and the library multiplies, where no Hopper kernel takes all."""
    return 256 if capability >= _HOPPER else 64


class AttentionConfig(NamedTuple):
    """``block_r`` rows (queries × the heads that share a key), ``block_t`` keys a tile.

    ``prefetch``: ask for the first tile before the wait for the previous kernel.
    """

    block_r: int
    block_t: int
    num_warps: int
    num_stages: int
    prefetch: bool = False


def decode_config(capability: int, batch_size: int, head_dim: int, itemsize: int) -> AttentionConfig:
    if capability < _HOPPER:
        return AttentionConfig(16, _keys_of_16_kb(head_dim * itemsize), 4, 1)
    if head_dim > 128:
        return AttentionConfig(16, 64, 4, 2)
    if batch_size <= 4:
        return AttentionConfig(16, 64, 2, 2, prefetch=True)
    return AttentionConfig(16, 64, 4, 1 if batch_size < 256 else 2)


def prefill_config(capability: int, num_rows: int, head_dim: int, itemsize: int) -> AttentionConfig:
    """``num_rows``: queries × heads of the longest chunk."""
    block_r = min(64, max(16, _power_of_two(num_rows)))
    if capability < _HOPPER and itemsize == 2:
        return AttentionConfig(min(block_r, 32), 32, 4, 2 if head_dim <= 128 else 1)
    if capability < _HOPPER:
        return AttentionConfig(16, min(32, _keys_of_16_kb(head_dim * itemsize)), 4, 1)
    if itemsize == 4:
        return AttentionConfig(block_r if head_dim <= 128 else 16, 32, 4, 2)
    if head_dim > 128:
        return AttentionConfig(block_r, 16, 4, 2)  # with 32 keys registers spill
    if num_rows >= 16384:
        return AttentionConfig(128, 64, 4, 2)
    return AttentionConfig(block_r, 64, 4, 3)


def kv_decode_config(capability: int, itemsize: int) -> AttentionConfig:
    """Over a quantized cache; float16 and bfloat16 have a kernel of their own from 8.0 on, but for wide heads."""
    if capability < _AMPERE or itemsize == 4:  # no tensor cores: more threads, each with fewer numbers
        return AttentionConfig(16, 16, 8, 1)
    return AttentionConfig(16, 32, 8, 1)


def kv_prefill_config(capability: int, num_rows: int, head_dim: int, itemsize: int, *, static: bool) -> AttentionConfig:
    """Over a quantized cache. ``static``: its scales, which are all blocks', want registers."""
    if capability < _AMPERE or itemsize == 4:
        return AttentionConfig(16, 16, 8, 1)
    block_r = min(64, max(16, _power_of_two(num_rows)))
    if capability < _HOPPER or head_dim > 128:
        return AttentionConfig(min(block_r, 32), 32, 8, 1)
    if num_rows >= 1024:  # what is expanded serves twice as many queries
        return AttentionConfig(128, 64, 8, 1 if static else 2)
    return AttentionConfig(block_r, 64, 8 if static else 4, 2)


def _keys_of_16_kb(head_bytes: int) -> int:
    """A tile of keys and one of values leave room for the queries in the 64 KB of a 7.5."""
    return max(16, min(64, 16384 // _power_of_two(head_bytes)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
