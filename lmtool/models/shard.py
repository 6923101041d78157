"""A rank's share of a model: which rows and columns of each matrix are its own, and a checkpoint of only these.

Columns, rows and vocabulary as in Shoeybi et al., "Megatron-LM" (arXiv 1909.08053): q, k, v, gate and up by output, o
and down by input, so that two sums over all ranks make a layer. Knows no communication.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.staging import StoredTensor
from lmtool.checkpoint.vision import VisionPart
from lmtool.errors import CheckpointError, ConfigError
from lmtool.models.config import ModelConfig

_BY_COLUMN = ("o.weight", "down.weight")
Ranges = list[tuple[int, int]]  # of rows: first, and the one after the last


@dataclass(frozen=True, slots=True)
class Shard:
    """One of ``size`` ranks."""

    rank: int
    size: int

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError where the model cannot be shared out so."""
        heads, kv_heads = config.num_heads, config.num_kv_heads
        for what, count in (("attention heads", heads), ("MLP features", config.intermediate_size)):
            if count % self.size:
                raise ConfigError(
                    f"--tp {self.size} does not divide the model's {count} {what}",
                    f"give {_divisors(config)}",
                )
        if max(kv_heads, self.size) % min(kv_heads, self.size):
            raise ConfigError(
                f"--tp {self.size} and {kv_heads} key/value heads do not go into each other",
                f"give {_divisors(config)}",
            )

    def local(self, config: ModelConfig) -> ModelConfig:
        """What this rank's part looks like as a model; its vocabulary is padded to a multiple of the ranks."""
        self.check(config)
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=max(1, config.num_kv_heads // self.size),
            intermediate_size=config.intermediate_size // self.size,
            vocab_size=-(-config.vocab_size // self.size),
        )

    def even(self, count: int, first: int = 0) -> tuple[int, int]:
        """The rank's part of ``count`` things from ``first`` on."""
        part = count // self.size
        return first + self.rank * part, first + (self.rank + 1) * part

    def kv_heads(self, config: ModelConfig) -> tuple[int, int]:
        """Its key/value heads, from the first on; where there are fewer than ranks, several have the same one."""
        first = self.rank * config.num_kv_heads // self.size
        return first, first + max(1, config.num_kv_heads // self.size)

    def rows(self, ours: str, num_names: int, place: int, grouped: bool, config: ModelConfig) -> Ranges | None:
        """Of the stored tensor that is ``place`` of ``num_names`` for one of the loader's names; None: all of it.

        grouped: q, k and v are stored group by group, as InternLM2's are.
        """
        if ".qkv." in ours:
            parts = self._qkv(grouped, config)
            return parts if num_names == 1 else [self._alone(parts[place], place, config)]
        if ".gate_up." in ours:
            width = config.intermediate_size
            return [self.even(width, i * width if num_names == 1 else 0) for i in range(3 - num_names)]
        if ours in ("embed", "head.weight"):
            part = -(-config.vocab_size // self.size)
            return [(min(self.rank * part, config.vocab_size), min((self.rank + 1) * part, config.vocab_size))]
        return None

    def _qkv(self, grouped: bool, config: ModelConfig) -> Ranges:
        """Rows of this rank's q, k and v where they lie in one tensor."""
        dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
        q_first, q_last = self.even(heads)
        kv_first, kv_last = self.kv_heads(config)
        if not grouped:
            k, v = heads, heads + kv_heads
            ranges = [(q_first, q_last), (k + kv_first, k + kv_last), (v + kv_first, v + kv_last)]
        elif kv_heads >= self.size:
            width = heads // kv_heads + 2
            ranges = [(kv_first * width, kv_last * width)]
        else:  # several ranks share a group: each has some of its query heads, and its k and v
            group = heads // kv_heads
            first = kv_first * (group + 2)
            within = first - kv_first * group
            ranges = [(q_first + within, q_last + within), (first + group, first + group + 2)]
        return [(first * dim, last * dim) for first, last in ranges]

    def _alone(self, rows: tuple[int, int], place: int, config: ModelConfig) -> tuple[int, int]:
        """The same where q, k and v are tensors of their own."""
        before = (0, config.num_heads, config.num_heads + config.num_kv_heads)[place] * config.head_dim
        return rows[0] - before, rows[1] - before


def _divisors(config: ModelConfig) -> str:
    fitting = []
    for size in range(1, 65):
        kv = config.num_kv_heads
        if not (config.num_heads % size or config.intermediate_size % size or max(kv, size) % min(kv, size)):
            fitting.append(str(size))
    return ", ".join(fitting[:-1]) + " or " + fitting[-1] if len(fitting) > 1 else fitting[0]


@dataclass(frozen=True, slots=True)
class _Part:
    """Of one stored tensor. pad: rows of zeros below; zero: another rank's bias."""

    rows: Ranges | None
    columns: tuple[int, int] | None
    pad: int = 0
    zero: bool = False


class ShardView:
    """`Checkpoint` of one rank's part, under the names of the whole."""

    vision: VisionPart | None = None

    def __init__(self, whole: Checkpoint, shard: Shard, config: ModelConfig, names: ModuleType) -> None:
        """config, names: of the whole model. Raises ConfigError."""
        shard.check(config)
        self.path: Path = whole.path
        self.format: str = whole.format
        self.config: dict[str, Any] = whole.config
        self.generation_config = whole.generation_config
        self._whole = whole
        self._shard = shard
        self._parts: dict[str, _Part] = {}
        transforms = getattr(names, "TRANSFORMS", {})
        for ours, theirs in names.NAMES.items():
            for place, name in enumerate(theirs):
                part = self._part(ours, len(theirs), place, ours in transforms, config)
                for i in range(config.num_layers if "{i}" in ours else 1):
                    self._parts[name.format(i=i)] = part

    def _part(self, ours: str, num_names: int, place: int, grouped: bool, config: ModelConfig) -> _Part:
        shard = self._shard
        columns = None
        if ours.endswith(_BY_COLUMN):
            width = config.intermediate_size if "down" in ours else config.num_heads * config.head_dim
            columns = shard.even(width)
        rows = shard.rows(ours, num_names, place, grouped, config)
        pad = 0
        if ours in ("embed", "head.weight") and rows is not None:
            pad = -(-config.vocab_size // shard.size) - (rows[0][1] - rows[0][0])
        return _Part(rows, columns, pad, zero=ours.endswith("o.bias") and shard.rank > 0)

    def names(self) -> list[str]:
        return self._whole.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, part = self._whole.shape(name), self._of(name)
        if part.rows is not None:
            shape = (sum(last - first for first, last in part.rows) + part.pad, *shape[1:])
        if part.columns is not None:
            shape = (*shape[:1], part.columns[1] - part.columns[0], *shape[2:])
        return shape

    def dtype(self, name: str) -> str:
        return self._whole.dtype(name)

    def tensor(self, name: str) -> Tensor:
        part, stored = self._of(name), self._whole.stored(name)
        if stored is None:
            found = self._cut(self._whole.tensor(name), part)
        elif part.columns is not None:
            found = stored.read_slice(1, *part.columns)
        elif part.rows is not None:
            pieces = [stored.read_slice(0, first, last) for first, last in part.rows if first < last]
            found = torch.cat(pieces) if pieces else torch.empty((0, *stored.shape[1:]), dtype=stored.dtype)
        else:
            found = stored.read()
        if part.pad:
            found = torch.cat((found, found.new_zeros((part.pad, *found.shape[1:]))))
        return found.zero_() if part.zero else found

    def stored(self, name: str) -> StoredTensor | None:
        part, whole = self._of(name), self._whole.stored(name)
        if whole is None or part.columns is not None or part.pad or part.zero:
            return None
        if part.rows is None:
            return whole
        if len(part.rows) > 1:
            return None
        first, last = part.rows[0]
        row_bytes = whole.num_bytes // whole.shape[0]
        return replace(whole, start=whole.start + first * row_bytes, shape=(last - first, *whole.shape[1:]))

    def stored_w4(self, name: str) -> StoredW4 | None:
        """Tiles are made anew: those of the whole model lie otherwise."""
        return None

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        whole, part = self._whole.packed_int4(name, device), self._of(name)
        if whole is None:
            return None
        if part.columns is not None:
            group = whole.codes.shape[1] // whole.scale.shape[1]
            if part.columns[0] % group or part.columns[1] % group or whole.order is not None:
                why = "act-order mixes its groups" if whole.order is not None else f"its groups are {group} wide"
                raise CheckpointError(
                    f"--tp {self._shard.size} would cut groups of the 4-bit weights of {name}: {why}",
                    "give a smaller --tp, or quantize again with smaller groups and without act-order",
                )

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else self._cut(values, part, whole.codes.shape[1])

        codes, scale = cut(whole.codes), cut(whole.scale)
        assert codes is not None
        assert scale is not None
        return PackedInt4(codes, scale, cut(whole.minimum), cut(whole.zero), whole.order)

    def packed_int8(self, name: str) -> PackedInt8 | None:
        whole, part = self._whole.packed_int8(name), self._of(name)
        if whole is None or part.pad or part.columns is not None:
            return None
        return PackedInt8(self._cut(whole.codes, part), self._cut(whole.scale, part))

    def close(self) -> None:
        self._whole.close()

    def _of(self, name: str) -> _Part:
        return self._parts.get(name, _Part(None, None))

    @staticmethod
    def _cut(values: Tensor, part: _Part, num_columns: int | None = None) -> Tensor:
        """num_columns: of the matrix, where ``values`` may have one for each group of them."""
        if part.rows is not None:
            values = torch.cat([values[first:last] for first, last in part.rows])
        if part.columns is not None:
            width = (num_columns or values.shape[1]) // values.shape[1]
            values = values[:, part.columns[0] // width : part.columns[1] // width]
        return values.contiguous()
