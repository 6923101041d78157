"""The rows that pictures have in a step: encoded in the very step that first computes one of them.

Knows no scheduling policy and no queue: a picture that is not there is encoded, whoever asks.
"""

import numpy as np
import torch
from torch import Tensor

from lmtool.engine.batch import Batch
from lmtool.engine.sequence import ImageRows
from lmtool.engine.transfer import upload
from lmtool.errors import EngineError
from lmtool.models.decoder import Decoder, Inserted


class ImageEncoder:
    """Keeps what it encoded as long as a prompt is in the midst of it: from one step to the next."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._kept: dict[bytes, Tensor] = {}

    def of(self, batch: Batch) -> Inserted | None:
        """Where in the step are rows of pictures, and which. Only launches work: nobody waits for it."""
        found: list[ImageRows] = []
        places: list[np.ndarray] = []
        start = len(batch.decodes)
        for chunk in batch.chunks:
            for rows in chunk.images:
                found.append(rows)
                places.append(np.arange(start + rows.at, start + rows.at + rows.count))
            start += len(chunk.token_ids)
        if not found:
            return None
        encoded = self._encoded(found)
        values = [encoded[rows.image.digest][rows.first : rows.first + rows.count] for rows in found]
        self._kept = {
            rows.image.digest: encoded[rows.image.digest]
            for rows in found
            if rows.first + rows.count < rows.image.num_tokens
        }
        where = upload([np.concatenate(places)], self._decoder.device)[0]
        return Inserted(where, values[0] if len(values) == 1 else torch.cat(values))

    def _encoded(self, found: list[ImageRows]) -> dict[bytes, Tensor]:
        """By digest: two that show the same picture have it encoded once."""
        if self._decoder.vision is None:
            raise EngineError("this model takes no pictures", "load a LLaVA model")
        new = {rows.image.digest: rows.image for rows in found if rows.image.digest not in self._kept}
        made = self._decoder.vision.encode(list(new.values())) if new else []
        return self._kept | dict(zip(new, made, strict=True))
