"""LLaVA's ways from a picture to tiles, and which patches of the tiles become rows of the language model.

1.5: the whole picture in one tile. 1.6: besides, the picture enlarged or shrunk into the best of a few grids of tiles
("any resolution"). Pixels are those of transformers' Pillow processors to the bit, geometry is that of its
`LlavaNextProcessor`. Sources: Liu et al., "Improved Baselines with Visual Instruction Tuning" (2023); Liu et al.,
"LLaVA-NeXT" (2024). Needs Pillow only to prepare a picture, and never torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lmtool.errors import RequestError
from lmtool.images.prepared import PreparedImage

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "pad", "stretch", "anyres"]
MOST_RESIZED_PIXELS = 64_000_000  # what one step of the way may make of a long and thin picture
LONGEST_PADDED = 16_384  # pixels
STRIP = 64  # rows of a padded picture that are there at once


@dataclass(frozen=True, slots=True)
class GridRows:
    """How the tiles after the first lie side by side, and the patches that are left of them without the padding.

    tile_rows, tile_columns     of the grid of tiles
    first_row, num_rows         of patches, counted over the whole grid
    first_column, num_columns   likewise
    """

    tile_rows: int
    tile_columns: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    @property
    def num_tokens(self) -> int:
        """Each row of patches ends with a newline."""
        return self.num_rows * (self.num_columns + 1)


def best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid, in pixels, that keeps most of a picture and wastes least beside it. All are (height, width)."""
    height, width = size

    def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=worth)  # the first of equals


def grid_rows(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]], tile_size: int, patch_size: int) -> GridRows:
    """Of a picture of ``size`` pixels. size, pinpoints: (height, width). A very long picture may leave no rows."""
    height, width = size
    best_height, best_width = best_resolution(size, pinpoints)
    tile_rows, tile_columns = best_height // tile_size, best_width // tile_size
    rows, columns = (count * (tile_size // patch_size) for count in (tile_rows, tile_columns))
    first_row = first_column = 0
    if width / height > columns / rows:
        # rounded before it is cut off, as in transformers: 7.999999999 patches are 8
        first_row = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        first_column = (columns - int(round(width * (rows / height), 7))) // 2
    return GridRows(tile_rows, tile_columns, first_row, rows - 2 * first_row, first_column, columns - 2 * first_column)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlavaForm:
    """`ImageForm` of LLaVA 1.5 (``fit`` 'crop', 'pad' or 'stretch') and 1.6 ('anyres').

    tile_size, patch_size  pixels, of a side
    pinpoints              (height, width) in pixels of the grids that 'anyres' chooses from, in order
    mean, std              of the channels, for pixels in 0..1: the tower takes ``(pixels / 255 - mean) / std``
    keeps_class_token      a tile's rows begin with the tower's class token
    """

    fit: Fit
    tile_size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pinpoints: tuple[tuple[int, int], ...] = ()
    keeps_class_token: bool = False

    def prepare(self, image: "Image") -> PreparedImage:
        """image: RGB, upright, as `load_image` gives it. Raises RequestError for one that is too long and thin."""
        assert image.mode == "RGB"
        size = (image.height, image.width)
        tiles = self._any_resolution(image) if self.fit == "anyres" else _pixels(self._one_tile(image))[None]
        pixels = tiles.tobytes()
        name = blake2b(pixels, digest_size=16)
        name.update(np.array([*tiles.shape, *size], dtype="<i8").tobytes())
        return PreparedImage(
            pixels=pixels,
            num_tiles=len(tiles),
            tile_size=self.tile_size,
            size=size,
            num_tokens=self.num_tokens(size),
            digest=name.digest(),
        )

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Rows of a picture of this (height, width)."""
        of_tile = (self.tile_size // self.patch_size) ** 2 + self.keeps_class_token
        return of_tile + (self.grid_rows(size).num_tokens if self.fit == "anyres" else 0)

    def grid_rows(self, size: tuple[int, int]) -> GridRows:
        """Where the rows of an 'anyres' picture are among its patches."""
        return grid_rows(size, self.pinpoints, self.tile_size, self.patch_size)

    def _one_tile(self, image: "Image") -> "Image":
        if self.fit == "crop":
            return _cropped(image, self.tile_size)
        if self.fit == "pad":
            colour = (int(self.mean[0] * 255), int(self.mean[1] * 255), int(self.mean[2] * 255))
            return _padded(image, self.tile_size, colour)
        return _resized(image, self.tile_size, self.tile_size)

    def _any_resolution(self, image: "Image") -> NDArray[np.uint8]:
        """[1 + tiles of the grid, tile_size, tile_size, 3]: the picture in one tile, then in the grid's."""
        tile = self.tile_size
        height, width = best_resolution((image.height, image.width), self.pinpoints)
        scale_x, scale_y = width / image.width, height / image.height
        if scale_x < scale_y:
            resized = _resized(image, width, min(math.ceil(image.height * scale_x), height))
        else:
            resized = _resized(image, min(math.ceil(image.width * scale_y), width), height)
        grid = np.zeros((height, width, 3), dtype=np.uint8)
        top, left = (height - resized.height) // 2, (width - resized.width) // 2
        grid[top : top + resized.height, left : left + resized.width] = _pixels(resized)
        tiles = grid.reshape(height // tile, tile, width // tile, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        return np.concatenate([_pixels(_resized(image, tile, tile))[None], tiles])


def _pixels(image: "Image") -> NDArray[np.uint8]:
    """[height, width, 3]."""
    return np.asarray(image, dtype=np.uint8)


def _resized(image: "Image", width: int, height: int) -> "Image":
    from PIL.Image import Resampling

    return image.resize((width, height), Resampling.BICUBIC)


def _cropped(image: "Image", tile: int) -> "Image":
    """The middle of the picture, whose shorter side is made a tile's."""
    width, height = image.size
    long = int(tile * max(image.size) / min(image.size))
    if long * tile > MOST_RESIZED_PIXELS:
        raise RequestError(
            f"a picture of {width} x {height} pixels is too long for a model that takes squares out of the middle",
            "cut out the part that matters",
        )
    resized = _resized(image, tile, long) if width <= height else _resized(image, long, tile)
    left, top = (resized.width - tile) // 2, (resized.height - tile) // 2
    return resized.crop((left, top, left + tile, top + tile))


def _padded(image: "Image", tile: int, colour: tuple[int, int, int]) -> "Image":
    """The picture in the middle of a square. Pillow resizes the rows first, then the columns: so rows may come strip by
    strip, and the square, which is huge for a long picture, is never there as a whole."""
    from PIL import Image

    width, height = image.size
    side = max(image.size)
    if side > LONGEST_PADDED:
        raise RequestError(
            f"a picture of {width} x {height} pixels is too large for a model that pads it to a square",
            f"make its longer side {LONGEST_PADDED} pixels or less",
        )
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (tile, side), colour)
    for start in range(0, height, STRIP):
        rows = image.crop((0, start, width, min(start + STRIP, height)))
        strip = Image.new("RGB", (side, rows.height), colour)
        strip.paste(rows, (left, 0))
        narrow.paste(_resized(strip, tile, rows.height), (0, top + start))
    return _resized(narrow, tile, tile)
