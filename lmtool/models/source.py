"""A checkpoint in the loader's names: every weight found, checked, stacked and stored as the decoder holds it.

Knows no file format: a checkpoint is its names, shapes and tensors.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from lmtool import kernels
from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8
from lmtool.checkpoint.staging import Stager
from lmtool.errors import CheckpointError
from lmtool.layers.weights import W4, Dense, Int4Cpu, Int8Cpu, Matrix, round_int8
from lmtool.models import own_names
from lmtool.models.config import ModelConfig
from lmtool.models.decoder import Decoder, DecoderLayer
from lmtool.models.registry import family

# left over from training code; they hold nothing that the config does not say
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.masked_bias$|\.attn\.bias$|^rope_freqs\.weight$")
_MOST_NAMES_SHOWN = 6

Progress = Callable[[int, int], None]  # layers done, layers in all


def names_of(checkpoint: Checkpoint) -> ModuleType:
    """The module that says what a checkpoint calls the loader's tensors."""
    return own_names if checkpoint.format == "lmtool" else family(checkpoint.config)


def in_stored_order(names: ModuleType, ours: str, rows: Tensor, config: ModelConfig) -> Tensor:
    """A weight's rows as the decoder has them → as a family's files do: InternLM2's wqkv goes group by group."""
    transform = getattr(names, "TRANSFORMS", {}).get(ours)
    if transform is None:
        return rows
    moved = transform(torch.arange(rows.shape[0], device=rows.device), config)
    stored = torch.empty_like(rows)
    stored[moved] = rows
    return stored


@dataclass(slots=True)
class Source:
    """A checkpoint in our names: what `load_decoder` walks, and quantization block by block.

    With a ``stager`` tensors are filled in the background: they hold their numbers after `finish`.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    family: ModuleType
    dtype: torch.dtype
    device: torch.device
    keep_int4: bool = False
    stager: Stager | None = None
    _untransformed: list[tuple[Tensor, Callable[[Tensor, ModelConfig], Tensor]]] = field(default_factory=list)

    def wanted(self) -> list[str]:
        """Our names of everything this config needs."""
        config = self.config
        absent = set()
        if not config.qkv_bias:
            absent.add("layers.{i}.qkv.bias")
        if not config.o_bias:
            absent.add("layers.{i}.o.bias")
        if not config.qk_norm:
            absent |= {"layers.{i}.q_norm", "layers.{i}.k_norm"}
        if config.tie_word_embeddings:
            absent.add("head.weight")
        return [name for name in self.family.NAMES if name not in absent]

    def check_names(self) -> None:
        wanted: set[str] = set()
        for ours in self.wanted():
            layers = range(self.config.num_layers) if "{i}" in ours else range(1)
            wanted.update(name.format(i=i) for name in self.family.NAMES[ours] for i in layers)
        present = set(self.checkpoint.names())
        missing = sorted(wanted - present)
        allowed = wanted | set(self.family.NAMES["head.weight"])  # a tied head is often stored all the same
        unexpected = sorted(name for name in present - allowed if not _IGNORED.search(name))
        if missing or unexpected:
            parts = []
            if missing:
                parts.append(f"{len(missing)} tensors are missing ({_some(missing)})")
            if unexpected:
                parts.append(f"{len(unexpected)} are unexpected ({_some(unexpected)})")
            raise CheckpointError(
                f"{self.checkpoint.path}: " + " and ".join(parts),
                f"config.json says {self.config.architecture}, {self.config.num_layers} layers: is it this model's?",
            )

    def shape(self, ours: str) -> tuple[int, ...]:
        c = self.config
        attention_size = c.num_heads * c.head_dim
        return {
            "embed": (c.vocab_size, c.hidden_size),
            "final_norm": (c.hidden_size,),
            "head.weight": (c.vocab_size, c.hidden_size),
            "attention_norm": (c.hidden_size,),
            "mlp_norm": (c.hidden_size,),
            "qkv.weight": (c.qkv_size, c.hidden_size),
            "qkv.bias": (c.qkv_size,),
            "q_norm": (c.head_dim,),
            "k_norm": (c.head_dim,),
            "o.weight": (c.hidden_size, attention_size),
            "o.bias": (c.hidden_size,),
            "gate_up.weight": (2 * c.intermediate_size, c.hidden_size),
            "down.weight": (c.hidden_size, c.intermediate_size),
        }[ours.removeprefix("layers.{i}.")]

    def sources(self, ours: str, i: int) -> list[str]:
        return [name.format(i=i) for name in self.family.NAMES[ours]]

    def check_shape(self, ours: str, i: int) -> None:
        names = self.sources(ours, i)
        shapes = [self.checkpoint.shape(name) for name in names]
        stacked = (sum(shape[0] if shape else 0 for shape in shapes), *shapes[0][1:])
        if stacked != self.shape(ours) or any(shape[1:] != shapes[0][1:] for shape in shapes):
            found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes, strict=True))
            raise CheckpointError(
                f"{self.checkpoint.path}: {found} do not make {list(self.shape(ours))}",
                "config.json and the weights are not of one model",
            )

    def tensor(self, ours: str, i: int = 0) -> Tensor:
        self.check_shape(ours, i)
        if self.device.type == "meta":
            return torch.empty(self.shape(ours), dtype=self.dtype, device=self.device)
        transform = getattr(self.family, "TRANSFORMS", {}).get(ours)
        staged = self._staged(self.sources(ours, i))
        if staged is not None:
            if transform is not None:
                self._untransformed.append((staged, transform))
            return staged
        parts = [self.checkpoint.tensor(name) for name in self.sources(ours, i)]
        for name, part in zip(self.sources(ours, i), parts, strict=True):
            self.check_floating(name, part.dtype)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if transform is not None:
            joined = transform(joined, self.config)
        return joined.to(device=self.device, dtype=self.dtype).contiguous()

    def _staged(self, names: list[str]) -> Tensor | None:
        """The named tensors one below the other, being filled; None where they do not lie in a file as they are."""
        if self.stager is None:
            return None
        stored = [part for name in names if (part := self.checkpoint.stored(name)) is not None]
        if len(stored) < len(names):
            return None
        for name, part in zip(names, stored, strict=True):
            self.check_floating(name, part.dtype)
        num_rows = [part.shape[0] for part in stored]
        joined = torch.empty((sum(num_rows), *stored[0].shape[1:]), dtype=self.dtype, device=self.device)
        for rows, part in zip(joined.split(num_rows), stored, strict=True):
            self.stager.fill(rows, part)
        return joined

    def check_floating(self, name: str, dtype: torch.dtype) -> None:
        if not dtype.is_floating_point or dtype.itemsize < 2:  # float8 means nothing without its scales
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} holds {dtype} numbers".replace("torch.", ""),
                "codes of a quantized model, which config.json does not explain: download the model again",
            )

    def finish(self) -> None:
        """Wait for what is being filled. Raises CheckpointError for a file that cannot be read."""
        if self.stager is not None:
            self.stager.wait()
        for tensor, transform in self._untransformed:
            tensor.copy_(transform(tensor.clone(), self.config))
        self._untransformed.clear()

    def optional(self, ours: str, i: int) -> Tensor | None:
        return self.tensor(ours, i) if ours in self.wanted() else None

    def matrix(self, ours: str, i: int) -> Matrix:
        bias_name = ours + ".bias"
        bias = self.optional(bias_name, i) if bias_name in self.family.NAMES else None
        weight_name = ours + ".weight"
        if not self.keep_int4:
            return Dense(self.tensor(weight_name, i), bias)
        if self.device.type != "cpu" and (tiles := self._stored_tiles(weight_name, i, bias)) is not None:
            return tiles
        if self.device.type == "meta":
            return self._outline(weight_name, i, bias)
        packed = self.packed(weight_name, i)
        if packed is not None and self.device.type == "cpu":
            return Int4Cpu(packed.codes, packed.scale, packed.lowest, bias, packed.order, keep_dense=self._dense_fits())
        if packed is None or packed.zero is None:  # a GPU's kernels know no minimums
            return Dense(self.tensor(weight_name, i), bias)
        return W4(tiles_of(packed, paired=ours.endswith("gate_up")), bias, packed.order)

    def _stored_tiles(self, weight_name: str, i: int, bias: Tensor | None) -> Matrix | None:
        """What a workspace holds as the kernels want it; None for anything else."""
        names = self.sources(weight_name, i)
        stored = self.checkpoint.stored_w4(names[0]) if len(names) == 1 else None
        if stored is None:
            return None
        self.check_shape(weight_name, i)
        weight = kernels.empty_w4(stored.num_out, stored.num_in, stored.group_size, self.device, paired=stored.paired)
        if self.stager is not None:
            self.stager.fill(weight.tiles, stored.tiles)
        elif self.device.type != "meta":
            weight.tiles.copy_(stored.tiles.read())
        return W4(weight, bias, None if stored.order is None else stored.order.read().to(self.device))

    def packed(self, weight_name: str, i: int) -> PackedInt4 | None:
        """The 4-bit codes of a matrix, one below the other; None where a part has none, or none that go together."""
        parts = [self.checkpoint.packed_int4(name, self.device) for name in self.sources(weight_name, i)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts) or any(part.scale.shape[1] != found[0].scale.shape[1] for part in found):
            return None
        if any(not _same_order(part.order, found[0].order) for part in found):
            return None  # act-order may differ between q, k and v; one product has one order of x
        self.check_shape(weight_name, i)
        transform = getattr(self.family, "TRANSFORMS", {}).get(weight_name)

        def joined(field: str) -> Tensor | None:
            rows = [part for packed in found if (part := getattr(packed, field)) is not None]
            if not rows:
                return None
            stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
            return stacked if transform is None else transform(stacked, self.config)  # it moves whole rows

        codes, scale = joined("codes"), joined("scale")
        assert codes is not None
        assert scale is not None
        return PackedInt4(codes, scale, joined("minimum"), joined("zero"), found[0].order)

    def _outline(self, weight_name: str, i: int, bias: Tensor | None) -> Matrix:
        """The shape of `tiles_of`'s matrix, and no arithmetic: on meta tensors its first use takes seconds."""
        part = self.checkpoint.packed_int4(self.sources(weight_name, i)[0], self.device)
        if part is None or part.zero is None:
            return Dense(self.tensor(weight_name, i), bias)
        num_out, num_in = self.shape(weight_name)
        group_size = min(part.codes.shape[1] // part.scale.shape[1], kernels.W4_LARGEST_GROUP)
        paired = weight_name.endswith("gate_up.weight")
        return W4(kernels.empty_w4(num_out, num_in, group_size, self.device, paired=paired), bias)

    def _dense_fits(self) -> bool:
        return self.config.num_parameters * 4 <= 2 << 30

    def decoder(self, num_positions: int, progress: Progress | None = None) -> Decoder:
        """The whole model. progress: called before each layer."""
        embed, final_norm = self.tensor("embed"), self.tensor("final_norm")
        if self.device.type == "cpu":
            layers, head = self._on_threads(embed, progress)
        else:
            head = self.head(embed)
            layers = [self._told(i, progress) for i in range(self.config.num_layers)]
        return Decoder(self.config, embed, layers, final_norm, head, num_positions)

    def _on_threads(self, embed: Tensor, progress: Progress | None) -> tuple[list[DecoderLayer], Matrix]:
        """Reading, unpacking and packing are one thread's work each, and let go of Python's lock: two are enough."""
        with ThreadPoolExecutor(2, "load") as pool:
            head = pool.submit(self.head, embed)
            layers = list(pool.map(lambda i: self._told(i, progress), range(self.config.num_layers)))
            return layers, head.result()

    def _told(self, i: int, progress: Progress | None) -> DecoderLayer:
        if progress:
            progress(i, self.config.num_layers)
        return self.layer(i)

    def layer(self, i: int) -> DecoderLayer:
        return DecoderLayer(
            attention_norm=self.tensor("layers.{i}.attention_norm", i),
            qkv=self.matrix("layers.{i}.qkv", i),
            o=self.matrix("layers.{i}.o", i),
            mlp_norm=self.tensor("layers.{i}.mlp_norm", i),
            gate_up=self.matrix("layers.{i}.gate_up", i),
            down=self.matrix("layers.{i}.down", i),
            q_norm=self.optional("layers.{i}.q_norm", i),
            k_norm=self.optional("layers.{i}.k_norm", i),
        )

    def head(self, embed: Tensor) -> Matrix:
        """The embedding where it is tied to it, unless it was rounded to 8 bits on its own."""
        as_int8 = self.keep_int4 and self.device.type == "cpu"
        rounded = self.int8_head()
        if rounded is not None and as_int8:
            self.check_shape("head.weight", 0)
            return Int8Cpu(rounded.codes, rounded.scale[:, 0])
        own = rounded is not None or not self.config.tie_word_embeddings
        weight = self.tensor("head.weight") if own else embed
        return Int8Cpu(*round_int8(weight)) if as_int8 else Dense(weight)

    def int8_head(self) -> PackedInt8 | None:
        """8-bit codes with one scale a row, as `lmtool lite --head-bits 8` leaves them."""
        name = self.sources("head.weight", 0)[0]
        packed = self.checkpoint.packed_int8(name) if name in self.checkpoint.names() else None
        return packed if packed is not None and packed.scale.shape[1] == 1 else None


def tiles_of(packed: PackedInt4, *, paired: bool) -> kernels.W4Tiles:
    """For the kernels. Groups longer than a tile are told once for each of its tiles."""
    assert packed.zero is not None
    scale, zero = packed.scale, packed.zero
    repeat = max(1, packed.codes.shape[1] // scale.shape[1] // kernels.W4_LARGEST_GROUP)
    scale, zero = scale.repeat_interleave(repeat, dim=1), zero.repeat_interleave(repeat, dim=1)
    return kernels.pack_w4(packed.codes, scale, zero, paired=paired)


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES_SHOWN])
    return shown + (", …" if len(names) > _MOST_NAMES_SHOWN else "")
