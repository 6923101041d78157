"""What several tests of the engine watch."""

from collections.abc import Sequence

import pytest
import torch

from lmtool.images.prepared import PreparedImage
from lmtool.models.llava import LlavaTower


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the tower was given."""
    encode, counts = LlavaTower.encode, []

    def counting(tower: LlavaTower, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        counts.append(len(images))
        return encode(tower, images)

    monkeypatch.setattr(LlavaTower, "encode", counting)
    return counts
