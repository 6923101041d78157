"""Which launch configurations are worth trying for a matrix on a card: few enough to compile in a minute or two.

Plain arithmetic: what cannot fit is left out, the rest is ranked by how long a card would roughly need, and the
measurement decides. Knows no kernel's code and no device.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from lmtool.bench.shapes import Product
from lmtool.kernels.triton.tuning import RowConfig, TileConfig

BUCKETS = (1, 16, 32, 64)  # rows that share a configuration: up to so many
COUNT = 32  # candidates of a bucket in the first round

_TILES_N, _TILES_K = (16, 32, 64, 128), (64, 128, 256)
_TILE_WARPS = 4  # with 8, two groups that share a tile, results were wrong now and then (docs/log.md)
_STAGES, _SPLITS = range(2, 9), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
_ROWS_N, _ROWS_K, _ROW_WARPS = (1, 2, 4, 8), (256, 512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)

# a card's behaviour in round figures, good enough to rank by
_IN_FLIGHT_BYTES = 10_000  # a multiprocessor with so many bytes on their way reaches half of its share of the memory
_ALONE = 1.6  # times its share that a multiprocessor may draw while others have nothing to do
_WAVE_US, _SPLIT_US = 0.8, 1.2  # to fill the pipeline once; to add up the parts of a split
_X_COST = 0.35  # reading a byte of x again from the cache, beside a byte of weights from memory
_MAX_ACCUMULATORS = 128  # registers of a thread
_MAX_WARPS = 64  # of a multiprocessor
_SPLIT_ENDS = 65536  # counters of `launch.arrival_counters`: tiles of one split product


@dataclass(frozen=True, slots=True)
class Card:
    """shared_bytes: the most that one program may have; read_bytes_per_us: of the whole card."""

    num_processors: int
    shared_bytes: int
    read_bytes_per_us: float


def bucket(num_rows: int) -> int:
    """The bucket of ``num_rows``: as many rows as the kernel's tile holds."""
    return 1 if num_rows == 1 else max(16, 1 << (num_rows - 1).bit_length())


def row_candidates(product: Product) -> list[RowConfig]:
    """The likeliest for one row, best first."""
    ranked = sorted(_rows(product), key=lambda config: (_row_rank(config, product), config))
    return ranked[:COUNT]


def tile_candidates(product: Product, num_rows: int, card: Card) -> list[TileConfig]:
    """The likeliest for a bucket of ``num_rows`` rows, best first: four splits of a tile at most."""
    chosen: list[TileConfig] = []
    possible = _tiles(product, num_rows, card)
    for config in sorted(possible, key=lambda config: (tile_us(config, product, num_rows, card), config)):
        alike = [other for other in chosen if other[:3] == config[:3]]
        if len(alike) < 4 and all(other.split != config.split for other in alike):
            chosen.append(config)
    return chosen[:COUNT]


def neighbours(best: Sequence[TileConfig], product: Product, num_rows: int, card: Card) -> list[TileConfig]:
    """What differs from one of ``best`` in one step of its stages or its split, or in its operands' order, and fits."""
    possible = set(_tiles(product, num_rows, card))
    found: list[TileConfig] = []
    for config in best:
        i = _SPLITS.index(config.split) if config.split in _SPLITS else 0
        near = [config._replace(num_stages=config.num_stages + step) for step in (-3, -2, -1, 1, 2)]
        near += [config._replace(split=split) for split in _SPLITS[max(0, i - 1) : i + 2]]
        near = [other for other in near if other._replace(swap=True) in possible]
        near.append(config._replace(swap=not config.swap))
        found += [other for other in near if other not in (*found, *best)]
    return found


def fitting(configs: Iterable[TileConfig], product: Product, num_rows: int, card: Card) -> list[TileConfig]:
    """Those that hold a larger bucket too: with fewer stages, where that is what it takes."""
    possible = set(_tiles(product, num_rows, card))
    found: list[TileConfig] = []
    for config in configs:
        stages = range(config.num_stages, 1, -1)
        fits = (config._replace(num_stages=n) for n in stages if config._replace(num_stages=n, swap=True) in possible)
        found += [other for other in fits if other not in found][:1]
    return found


# ---------------------------------------------------------------------- one row
def _rows(product: Product) -> Iterator[RowConfig]:
    widest = 1 << (product.num_in - 1).bit_length()
    for block_n, block_k, num_warps in combinations(_ROWS_N, _ROWS_K, _ROW_WARPS):
        per_thread = block_n * block_k / (32 * num_warps)  # numbers of one tile; two tiles are held at a time
        if block_k <= max(widest, _ROWS_K[0]) and 16 <= per_thread <= (64 if product.paired else 128):
            yield RowConfig(block_n, block_k, num_warps)


def _row_rank(config: RowConfig, product: Product) -> float:
    """Few lanes without work; about 48 numbers a thread, 5 warps and 3 rows have been best (docs/log.md)."""
    idle = -(-product.num_in // config.block_k) * config.block_k / product.num_in - 1
    per_thread = config.block_n * config.block_k / (32 * config.num_warps) * (2 if product.paired else 1)
    odd = abs(math.log2(per_thread / 48)) + abs(math.log2(config.num_warps / 5)) / 2
    return (1 + idle / 2) * (1 + 0.05 * (odd + abs(math.log2(config.block_n / 3)) / 2))


# ---------------------------------------------------------------------- a few rows
def _tiles(product: Product, num_rows: int, card: Card) -> Iterator[TileConfig]:
    halves = 2 if product.paired else 1
    for block_n, block_k in combinations(_TILES_N, _TILES_K):
        tiles = -(-product.num_out // block_n)
        if block_n * num_rows * halves > _MAX_ACCUMULATORS * 32 * _TILE_WARPS:
            continue
        for num_stages, split in combinations(_STAGES, _SPLITS):
            config = TileConfig(block_n, block_k, _TILE_WARPS, num_stages, split=split)
            steps = -(-product.num_in // (split * block_k))
            fits = shared_bytes(config, product, num_rows) <= card.shared_bytes
            if fits and num_stages <= steps + 1 and (split == 1 or (steps >= 2 and tiles <= _SPLIT_ENDS)):
                yield config


def shared_bytes(config: TileConfig, product: Product, num_rows: int) -> int:
    """The stages of weights and x that a program holds."""
    numbers = (config.block_n * (2 if product.paired else 1) + num_rows) * config.block_k
    return config.num_stages * numbers * product.itemsize


def tile_us(config: TileConfig, product: Product, num_rows: int, card: Card) -> float:
    """A rough guess at the time, to rank by."""
    programs = -(-product.num_out // config.block_n) * config.split
    shared = shared_bytes(config, product, num_rows)
    room = max(1, min(card.shared_bytes // shared, _MAX_WARPS // config.num_warps))
    busiest = -(-programs // card.num_processors)
    weight_bytes = product.weight_bytes * (1 + _X_COST * num_rows / (config.block_n * (2 if product.paired else 1)))
    in_flight = min(room, busiest) * shared * (config.num_stages - 1) / config.num_stages
    share = in_flight / (in_flight + _IN_FLIGHT_BYTES)
    per_processor = card.read_bytes_per_us / card.num_processors * share
    even_us = weight_bytes / (per_processor * card.num_processors)
    busiest_us = busiest * weight_bytes / programs / (per_processor * _ALONE)
    waves_us = -(-busiest // room) * _WAVE_US
    partial_bytes = config.split * num_rows * product.num_out * (2 if product.paired else 1) * 8
    split_us = 0.0 if config.split == 1 else _SPLIT_US + partial_bytes / card.read_bytes_per_us / 2
    return max(even_us, busiest_us) + waves_us + split_us
