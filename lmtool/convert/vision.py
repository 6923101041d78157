"""What a LLaVA sees with, through a conversion: numbers as they are stored, or in the dtype that was asked for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint
from lmtool.checkpoint.tensor_file import tensor_bytes
from lmtool.checkpoint.vision import VisionPart
from lmtool.checkpoint.workspace_manifest import VISION
from lmtool.convert.progress import Progress
from lmtool.convert.stored import StoredForm, as_dtype
from lmtool.errors import InputError


def vision_tensors(vision: VisionPart, dtype: torch.dtype | None, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Our name and numbers of each. dtype: of numbers; None: as stored, float16 for what is stored as codes."""
    names = vision.names()
    for done, name in enumerate(names):
        progress("converting what it sees with", done, len(names))
        values = vision.tensor(name)
        stored = getattr(torch, vision.dtype(name), None)
        kept = values.dtype if isinstance(stored, torch.dtype) else torch.float16
        yield name, as_dtype(values, dtype or kept, f"{vision.where}: {name}")
    progress("converting what it sees with", len(names), len(names))


def vision_forms(vision: VisionPart, dtype: torch.dtype | None, progress: Progress) -> Iterator[tuple[str, StoredForm]]:
    """As a workspace holds them, under its names."""
    for name, values in vision_tensors(vision, dtype, progress):
        read = getattr(torch, vision.dtype(name), torch.float32)
        exact = torch.promote_types(read, values.dtype) == values.dtype
        yield VISION + name, StoredForm("dense", tuple(values.shape), {"values": values}, exact=exact)


def check_vision(source: Checkpoint, made: Checkpoint) -> None:
    """Raises InputError where one of them sees with something else than the other."""
    one, other = source.vision, made.vision
    if one is None and other is None:
        return
    assert one is not None
    assert other is not None
    for name in one.names():
        values = other.tensor(name)
        if tensor_bytes(one.tensor(name).to(values.dtype)) != tensor_bytes(values):
            raise InputError(
                f"{name} of the converted model is not the source's",
                "this is a fault of lmtool's, or of this machine: please report it; --no-check converts all the same",
            )
