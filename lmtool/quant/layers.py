"""A checkpoint's blocks one at a time, and their matrices back under the checkpoint's own names and order of rows."""

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint
from lmtool.checkpoint.packing import pack_awq, pack_gptq
from lmtool.checkpoint.quantized import head_parts
from lmtool.errors import CheckpointError, ConfigError
from lmtool.layers.weights import round_int8
from lmtool.models.decoder import DecoderLayer
from lmtool.models.hf_view import huggingface_names
from lmtool.models.loader import read_model_config
from lmtool.models.registry import family
from lmtool.models.source import Source, in_stored_order
from lmtool.quant.grid import Codes
from lmtool.quant.groups import GROUPS, matrix_of
from lmtool.quant.options import QuantOptions


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear as the checkpoint has it: a stretch of rows of one of our matrices."""

    name: str  # without '.weight'
    num_out: int
    num_in: int


class Blocks:
    """The blocks of a checkpoint as float32, and the way back."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Raises CheckpointError for an architecture that is not known, missing tensors, codes instead of numbers."""
        if "quantization_config" in checkpoint.config:
            method = checkpoint.config["quantization_config"].get("quant_method", "some method")
            raise CheckpointError(
                f"{checkpoint.path} is quantized already ({method})", "give the model that it was made from"
            )
        if any(checkpoint.dtype(name) == "int4" for name in checkpoint.names()):  # a workspace of such a model
            raise CheckpointError(f"{checkpoint.path} is quantized already", "give the model that it was made from")
        self.config = read_model_config(checkpoint.config)
        # what is written goes by Hugging Face's names, whatever is read
        self.checkpoint = checkpoint = huggingface_names(checkpoint, self.config)
        self._source = Source(checkpoint, self.config, family(checkpoint.config), torch.float32, device)
        self._source.check_names()

    def __len__(self) -> int:
        return self.config.num_layers

    def load(self, i: int) -> DecoderLayer:
        """Block i. Raises CheckpointError where a weight is not a number."""
        layer = self._source.layer(i)
        for group in GROUPS:
            if not torch.isfinite(matrix_of(layer, group).weight).all():
                names = ", ".join(self._source.sources(f"layers.{{i}}.{group}.weight", i))
                raise CheckpointError(
                    f"{self.checkpoint.path}: weights of {names} are not numbers", "download the model again"
                )
        return layer

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [...] → float32 [..., H]."""
        (name,) = self._source.sources("embed", 0)
        rows = self.checkpoint.tensor(name).index_select(0, ids.flatten().cpu())
        return rows.to(self._source.device, torch.float32).view(*ids.shape, -1)

    def linears(self, i: int, group: str) -> list[Linear]:
        """What our matrix ``group`` of block i is made of, in the order in which it is stacked."""
        names = self._source.sources(f"layers.{{i}}.{group}.weight", i)
        shapes = [self.checkpoint.shape(name) for name in names]
        return [Linear(n.removesuffix(".weight"), s[0], s[1]) for n, s in zip(names, shapes, strict=True)]

    def quantized_tensors(self, i: int, group: str, codes: Codes, options: QuantOptions) -> dict[str, Tensor]:
        """A rounded matrix as AWQ's or GPTQ's files name and pack it, for each linear of the checkpoint."""
        stacked = Codes(*(self._as_stacked(f"{group}.weight", part) for part in (codes.codes, codes.scale, codes.zero)))
        tensors, first = {}, 0
        for linear in self.linears(i, group):
            for suffix, tensor in _packed(stacked.rows(first, first + linear.num_out), options).items():
                tensors[f"{linear.name}.{suffix}"] = tensor
            first += linear.num_out
        return tensors

    def dense_tensors(self, i: int, layer: DecoderLayer, skipped: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Block i's norms and biases, and the weights of ``skipped`` groups, as ``layer`` has them now."""
        tensors: dict[str, Tensor] = {}
        for ours in self._source.wanted():
            group, _, kind = ours.removeprefix("layers.{i}.").partition(".")
            if not ours.startswith("layers.") or (kind == "weight" and group not in skipped):
                continue
            value = getattr(matrix_of(layer, group), kind) if kind else getattr(layer, group)
            tensors |= self._split(ours, i, value.to(dtype))
        return tensors

    def outer_names(self) -> dict[str, int]:
        """Names of embedding, last norm and head, and how many numbers each holds."""
        outer = [ours for ours in self._source.wanted() if not ours.startswith("layers.")]
        names = [name for ours in outer for name in self._source.sources(ours, 0)]
        return {name: prod(self.checkpoint.shape(name)) for name in names}

    def stored_name(self, name: str) -> str:
        """What the model's files call one of the checkpoint's tensors: a LLaVA's, one of its vision part, too."""
        vision = self.checkpoint.vision
        return name if vision is None else vision.form.stored(name)

    def head_tensors(self) -> dict[str, Tensor]:
        """The head as int8 codes [V, H] and bfloat16 scales [V]. Raises CheckpointError where it holds NaN or inf."""
        (name,) = self._source.sources("embed" if self.config.tie_word_embeddings else "head.weight", 0)
        weight = self.checkpoint.tensor(name)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{self.checkpoint.path}: weights of {name} are not numbers", "download it again")
        return dict(zip(head_parts(self.head_name), round_int8(weight), strict=True))

    @property
    def head_name(self) -> str:
        """The checkpoint's, where the head is not tied to the embedding."""
        return self._source.sources("head.weight", 0)[0]

    def _split(self, ours: str, i: int, value: Tensor) -> dict[str, Tensor]:
        names = self._source.sources(ours, i)
        sizes = [self.checkpoint.shape(name)[0] for name in names]
        parts = self._as_stacked(ours.removeprefix("layers.{i}."), value).split(sizes)
        return {name: part.cpu().clone() for name, part in zip(names, parts, strict=True)}

    def _as_stacked(self, ours: str, rows: Tensor) -> Tensor:
        return in_stored_order(self._source.family, f"layers.{{i}}.{ours}", rows, self.config)


def skipped_groups(blocks: Blocks, i: int, patterns: tuple[str, ...]) -> set[str]:
    """Groups of block i that --skip leaves as they are. Raises ConfigError where it cuts one of our matrices."""
    skipped = set()
    for group in GROUPS:
        names = [linear.name for linear in blocks.linears(i, group)]
        hit = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
        if hit and len(hit) < len(names):
            left = ", ".join(name for name in names if name not in hit)
            raise ConfigError(
                f"--skip leaves out {', '.join(hit)} and not {left}",
                "engines run these as one matrix: name all or none",
            )
        if hit:
            skipped.add(group)
    return skipped


def _packed(codes: Codes, options: QuantOptions) -> dict[str, Tensor]:
    fields = (codes.codes.cpu(), codes.scale.cpu(), codes.zero.cpu())
    if options.format == "awq":
        return dict(zip(("qweight", "qzeros", "scales"), pack_awq(*fields), strict=True))
    # columns lie in order; GPTQ's readers want to be told all the same
    group_of = torch.arange(codes.codes.shape[1], dtype=torch.int32) // options.group_size
    packed = pack_gptq(*fields, bits=options.bits)
    return dict(zip(("qweight", "qzeros", "scales", "g_idx"), (*packed, group_of), strict=True))
