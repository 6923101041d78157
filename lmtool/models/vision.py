"""What a decoder sees pictures with. A family is a file of its own (`llava.py`), imported when it is needed: with it
comes transformers, which takes seconds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lmtool.errors import CheckpointError
from lmtool.images.llava import LlavaForm
from lmtool.images.prepared import PreparedImage

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart
    from lmtool.images.form import ImageForm


class VisionTower(Protocol):
    """Prepared pictures → rows among the language model's tokens."""

    @property
    def num_bytes(self) -> int:
        """Of its weights."""
        ...

    def encode(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Of each picture its rows [num_tokens, H], in the model's dtype. Launches work, and waits for none of it."""
        ...


def load_tower(part: "VisionPart", form: "ImageForm", dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Raises CheckpointError where a tensor is missing or has another shape."""
    if isinstance(form, LlavaForm):
        from lmtool.models.llava import load_llava

        return load_llava(part, form, dtype, device)
    raise CheckpointError(f"{type(form).__name__}: there is no vision tower for it")
