"""AWQ and GPTQ checkpoints, seen as any other: a matrix under its own name, and its 4-bit codes for who wants them.

Knows the tensors of the two formats (AutoAWQ's GEMM, AutoGPTQ's first and second version) and the keys of
``quantization_config``; `packing` knows the bits. 8-bit GPTQ is read as numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.packing import unpack_awq, unpack_gptq
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart

_PARTS = {"awq": ("qzeros", "scales"), "gptq": ("qzeros", "scales", "g_idx")}
_WHAT_RUNS = "4-bit AWQ (version gemm) and 4- or 8-bit GPTQ run, in groups of 32, 64 or a multiple of 128"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """method 'awq' or 'gptq'; bits 4, or 8 (gptq); group_size along K, 0: all of K; zero_offset: a stored zero point
    is the true one minus this (1 in the first version of GPTQ's format); head_bits 8: the output head is int8."""

    method: str
    bits: int
    group_size: int
    zero_offset: int = 0
    head_bits: int = 16


def read_scheme(path: Path, config: Mapping[str, Any]) -> QuantScheme | None:
    """What config.json says of the weights; None: they are numbers.

    Raises CheckpointError for a scheme that cannot run.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{path}: quantization_config is not an object", _WHAT_RUNS)
    method = str(quantization.get("quant_method", "?")).lower()
    version = str(quantization.get("version" if method == "awq" else "checkpoint_format", "")).lower()
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    runs = _runs(method, version, bits, group_size) and quantization.get("zero_point", True) is not False
    head_bits = quantization.get("head_bits", 16)
    if runs and head_bits in (8, 16):
        offset = 1 if method == "gptq" and version != "gptq_v2" else 0
        return QuantScheme(method, int(str(bits)), max(int(str(group_size)), 0), offset, head_bits)
    keys = ("bits", "group_size", "zero_point", "head_bits")
    said = [f"{key} {quantization[key]}" for key in keys if key in quantization]
    named = ", ".join(part for part in (method, version, *said) if part)
    raise CheckpointError(f"{path} is quantized in a way that cannot be run: {named}", _WHAT_RUNS)


def _runs(method: str, version: str, bits: object, group_size: object) -> bool:
    if method == "awq":
        known = bits == 4 and version in ("", "gemm")
    else:
        known = method == "gptq" and bits in (4, 8) and version in ("", "gptq", "gptq_v2")
    is_size = isinstance(group_size, int) and (group_size in (-1, 32, 64) or (group_size > 0 and group_size % 128 == 0))
    return known and is_size


class QuantizedCheckpoint:
    """`Checkpoint` over one whose matrices are stored as ``qweight``, ``qzeros``, ``scales`` (and ``g_idx``)."""

    vision: "VisionPart | None" = None

    def __init__(self, inner: Checkpoint, scheme: QuantScheme) -> None:
        self.path = inner.path
        self.format = scheme.method
        self.config = inner.config
        self.generation_config = inner.generation_config
        self.scheme = scheme
        self._inner = inner
        self._present = present = set(inner.names())
        self._quantized = {name.removesuffix("qweight") + "weight" for name in present if name.endswith(".qweight")}
        for name in self._quantized:
            for part in ("qzeros", "scales"):
                if _part(name, part) not in present:
                    raise CheckpointError(f"{self.path}: {_part(name, part)} is missing", "download the model again")
        self._heads = self._int8_heads() if scheme.head_bits == 8 else set()
        if not self._quantized:
            raise CheckpointError(
                f"{self.path}: config.json says {scheme.method}, but no matrix is quantized",
                "remove quantization_config from config.json if the weights are plain numbers",
            )

    def names(self) -> list[str]:
        hidden = {_part(name, part) for name in self._quantized for part in ("qweight", *_PARTS[self.format])}
        hidden |= {part for name in self._heads for part in head_parts(name)}
        seen = (name for name in self._inner.names() if name not in hidden)
        return [*sorted(self._quantized), *sorted(self._heads), *seen]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._heads:
            return self._inner.shape(head_parts(name)[0])
        if name not in self._quantized:
            return self._inner.shape(name)
        rows, columns = self._inner.shape(_part(name, "qweight"))
        in_word = 32 // self.scheme.bits
        return (columns * in_word, rows) if self.format == "awq" else (columns, rows * in_word)

    def dtype(self, name: str) -> str:
        if name in self._heads:
            return "int8"
        return f"int{self.scheme.bits}" if name in self._quantized else self._inner.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """Of a quantized matrix the numbers that its codes stand for, float32."""
        if name in self._heads:
            packed = self.packed_int8(name)
            assert packed is not None
            return packed.dequantize()
        if name not in self._quantized:
            return self._inner.tensor(name)
        codes, scale, zero, group_of = self._unpack(name, torch.device("cpu"))
        if group_of is None:
            group_of = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
        scale, zero = scale.float()[:, group_of], zero.float()[:, group_of]
        return (codes.float() - zero) * scale

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._quantized | self._heads else self._inner.stored(name)

    def stored_w4(self, name: str) -> StoredW4 | None:
        return None

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        """Codes, scales and zero points on ``device``; None for numbers and for 8 bits."""
        if name not in self._quantized or self.scheme.bits != 4:
            return None
        if device is not None and device.type == "meta":
            return self._outline(name, device)
        codes, scale, zero, group_of = self._unpack(name, device or torch.device("cpu"))
        order = None
        if group_of is not None:
            # stable: columns of one group stay in the order of x, so that equal g_idx give equal orders
            order = torch.argsort(group_of, stable=True)
            codes = codes.index_select(1, order)
        return PackedInt4(codes, scale, None, zero, order)

    def packed_int8(self, name: str) -> PackedInt8 | None:
        """The output head's, one scale a row."""
        if name not in self._heads:
            return None
        codes, scale = (self._inner.tensor(part) for part in head_parts(name))
        return PackedInt8(codes, scale[:, None])

    def close(self) -> None:
        self._inner.close()

    def _int8_heads(self) -> set[str]:
        """Names of the heads whose two parts are there and fit."""
        found = {name.removesuffix("codes") + "weight" for name in self._present if name.endswith(".codes")}
        for name in found or {"lm_head.weight"}:
            codes, scale = head_parts(name)
            missing = [part for part in (codes, scale) if part not in self._present]
            if missing:
                raise CheckpointError(f"{self.path}: {missing[0]} is missing", "download the model again")
            dtypes = self._inner.dtype(codes), self._inner.dtype(scale)
            if dtypes != ("int8", "bfloat16") or self._inner.shape(scale) != self._inner.shape(codes)[:1]:
                raise CheckpointError(
                    f"{self.path}: {codes} ({dtypes[0]} {list(self._inner.shape(codes))}) and {scale} ({dtypes[1]} "
                    f"{list(self._inner.shape(scale))}) are no int8 head",
                    "config.json and the weights are not of one model",
                )
        return found

    def _unpack(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """codes [N, K], scale and zero [N, groups], and the group of each column where they are not in order."""
        words, zeros, scales = (
            self._inner.tensor(_part(name, part)).to(device) for part in ("qweight", "qzeros", "scales")
        )
        self._check(name, words, zeros, scales)
        if self.format == "awq":
            return *unpack_awq(words, zeros, scales), None
        scheme = self.scheme
        codes, scale, zero = unpack_gptq(words, zeros, scales, bits=scheme.bits, offset=scheme.zero_offset)
        return codes, scale, zero, self._group_of(name, codes.shape[1], scale.shape[1], device)

    def _outline(self, name: str, device: torch.device) -> PackedInt4:
        num_out, num_in = self.shape(name)
        groups = (num_out, num_in // (self.scheme.group_size or num_in))
        codes = torch.empty((num_out, num_in), dtype=torch.uint8, device=device)
        zero = torch.empty(groups, dtype=torch.uint8, device=device)
        return PackedInt4(codes, torch.empty(groups, dtype=torch.float16, device=device), None, zero)

    def _group_of(self, name: str, num_in: int, num_groups: int, device: torch.device) -> Tensor | None:
        if _part(name, "g_idx") not in self._present:
            return None
        group_of = self._inner.tensor(_part(name, "g_idx")).to(device=device, dtype=torch.int64)
        in_order = torch.arange(num_in, device=device) // (num_in // num_groups)
        if torch.equal(group_of, in_order):
            return None
        counts = torch.bincount(group_of, minlength=num_groups) if int(group_of.min()) >= 0 else None
        if counts is None or len(counts) != num_groups or int(counts.min()) != int(counts.max()):
            raise CheckpointError(
                f"{self.path}: {_part(name, 'g_idx')} does not put its columns into {num_groups} groups of one size",
                "download the model again",
            )
        return group_of

    def _check(self, name: str, words: Tensor, zeros: Tensor, scales: Tensor) -> None:
        num_out, num_in = self.shape(name)
        num_groups = num_in // (self.scheme.group_size or num_in)
        in_word = 32 // self.scheme.bits
        wanted = ((num_groups, num_out // in_word), (num_groups, num_out))
        found = (tuple(zeros.shape), tuple(scales.shape))
        if (
            found != wanted
            or words.dtype != torch.int32
            or zeros.dtype != torch.int32
            or not scales.is_floating_point()
        ):
            raise CheckpointError(
                f"{self.path}: {_part(name, 'qzeros')} {list(found[0])} and scales {list(found[1])} are not those of "
                f"{num_out} × {num_in} {self.scheme.bits}-bit weights in groups of {num_in // max(num_groups, 1)}",
                "config.json and the weights are not of one model",
            )


def head_parts(name: str) -> tuple[str, str]:
    """Of an int8 output head ``name``: its codes int8 [V, H], and bfloat16 [V] what a code of each row stands for.

    Names of lmtool's own: where a head is tied to the embedding other readers pass over them.
    """
    return name.removesuffix("weight") + "codes", name.removesuffix("weight") + "scale"


def _part(name: str, part: str) -> str:
    return name.removesuffix("weight") + part
