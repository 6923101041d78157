"""A checkpoint's weight → the tensors that a workspace holds it in; nothing is rounded unasked.

4-bit codes with zero points become the kernels' tiles; GGUF's Q4_0 has the zero point 8; Q4_1's minimums have no place
in a tile and stay beside the codes. All else is numbers, in the dtype in which they are stored.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtool.checkpoint.formats import PackedInt4
from lmtool.checkpoint.workspace import join_nibbles
from lmtool.errors import CheckpointError
from lmtool.models.source import Source, tiles_of

_MATRICES = ("qkv", "o", "gate_up", "down")
_TABLES = ("embed", "head")  # no kernel multiplies their codes
_Q4_0_ZERO = 8


@dataclass(frozen=True, slots=True)
class StoredForm:
    """kind, shape, group_size and paired as `workspace_manifest.WeightEntry` has them; exact: nothing was rounded."""

    kind: str
    shape: tuple[int, ...]
    parts: dict[str, Tensor]
    group_size: int = 0
    paired: bool = False
    exact: bool = True


def stored_form(source: Source, ours: str, i: int, dtype: torch.dtype | None) -> StoredForm:
    """Weight ``ours`` of layer i. dtype: of numbers; None: as stored, float16 for what GGUF packs otherwise."""
    matrix = ours.removeprefix("layers.{i}.").removesuffix(".weight")
    if matrix in _MATRICES or (dtype is None and matrix in _TABLES):
        packed = source.packed(ours, i)
        if packed is not None and (dtype != torch.float32 or _fits_tiles(packed)):
            where = f"{source.checkpoint.path}: {ours.format(i=i)}"
            return _codes(packed, where, paired=matrix == "gate_up", multiplied=matrix in _MATRICES)
    if dtype is None and (eight := _int8(source, ours, i)) is not None:
        return eight
    stored = dtype_of(source, ours, i)
    wanted = dtype or stored or torch.float16
    read = stored or torch.float32
    values = replace(source, dtype=read).tensor(ours, i)
    values = as_dtype(values, wanted, f"{source.checkpoint.path}: {ours.format(i=i)}")
    exact = torch.promote_types(read, wanted) == wanted
    return StoredForm("dense", tuple(values.shape), {"values": values}, exact=exact)


def as_dtype(values: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Rounded, never to infinity. where: file and name. Raises CheckpointError for numbers that float16 cannot hold."""
    rounded = values.to(dtype)
    overflows = dtype == torch.float16 != values.dtype and not torch.isfinite(rounded).all()
    if overflows and not torch.equal(torch.isfinite(rounded), torch.isfinite(values)):
        raise CheckpointError(f"{where} holds numbers that float16 cannot", "give --dtype bfloat16 or float32")
    return rounded


def dtype_of(source: Source, ours: str, i: int) -> torch.dtype | None:
    """In which a weight's numbers are stored, the widest of its parts'; None where they are packed."""
    widest: torch.dtype | None = None
    for name in source.sources(ours, i):
        dtype = getattr(torch, source.checkpoint.dtype(name), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return None
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest


def _int8(source: Source, ours: str, i: int) -> StoredForm | None:
    """Codes of 8 bits where all of a weight has them: as numbers they would not fit float16."""
    names = source.sources(ours, i)
    parts = [part for name in names if (part := source.checkpoint.packed_int8(name)) is not None]
    if len(parts) < len(names):
        return None
    source.check_shape(ours, i)
    codes, scale = (torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scale"))
    group_size = codes.shape[1] // scale.shape[1]
    return StoredForm("int8", tuple(codes.shape), {"codes": codes, "scale": scale}, group_size)


def _codes(packed: PackedInt4, where: str, *, paired: bool, multiplied: bool) -> StoredForm:
    num_out, num_in = packed.codes.shape
    group_size = num_in // packed.scale.shape[1]
    if multiplied and packed.minimum is not None and torch.equal(packed.minimum, -_Q4_0_ZERO * packed.scale):
        zero = torch.full(packed.scale.shape, _Q4_0_ZERO, dtype=torch.uint8)
        packed = PackedInt4(packed.codes, packed.scale, None, zero)
    if packed.minimum is not None:
        parts = {
            "codes": join_nibbles(packed.codes),
            "scale": _halves(packed.scale),
            "minimum": _halves(packed.minimum),
        }
        return StoredForm("int4", (num_out, num_in), parts, group_size)
    if not _fits_tiles(packed):
        raise CheckpointError(
            f"{where} has scales of 4-bit codes that float16 cannot hold", "give --dtype float32 to store numbers"
        )
    tiles = tiles_of(packed, paired=paired)
    parts = {"tiles": tiles.tiles} | ({} if packed.order is None else {"order": packed.order})
    return StoredForm("w4", (num_out, num_in), parts, tiles.group_size, paired)


def _fits_tiles(packed: PackedInt4) -> bool:
    """Tiles have float16 scales; minimums lie beside their codes in whatever dtype they need."""
    scale = packed.scale
    return packed.zero is None or torch.equal(scale.to(torch.float16).to(scale.dtype), scale)


def _halves(values: Tensor) -> Tensor:
    """float16 where that loses nothing: as GGUF has them."""
    half = values.to(torch.float16)
    return half if torch.equal(half.float(), values.float()) else values
