"""`PreparedImage`: a picture as a vision tower takes it, and the ids by which the engine knows its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import shake_128

import numpy as np

# what stands for a picture among the token ids of a prompt, until `RequestMaker` gives its rows their own
IMAGE_ID = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """A picture, resized and cut, not yet normalized.

    pixels      uint8 [num_tiles, tile_size, tile_size, 3], RGB, contiguous
    size        height and width of the picture, in pixels: where its padding is follows from it
    num_tokens  rows that it takes among the language model's tokens
    digest      16 bytes that name all of this: equal for equal pictures, and for no others
    """

    pixels: bytes
    num_tiles: int
    tile_size: int
    size: tuple[int, int]
    num_tokens: int
    digest: bytes

    def row_ids(self) -> list[int]:
        """An id below 0 for each row, as random as a hash of picture and row: whoever compares ids of tokens, such as
        the prefix cache, so compares pictures."""
        words = np.frombuffer(shake_128(self.digest).digest(8 * self.num_tokens), dtype="<i8")
        ids: list[int] = (words | np.int64(-(2**63))).tolist()
        return ids


def count_tokens(prompt_ids: Sequence[int], images: Sequence[PreparedImage]) -> int:
    """Tokens of a prompt in which `IMAGE_ID` stands for each of the pictures."""
    return len(prompt_ids) - len(images) + sum(image.num_tokens for image in images)
