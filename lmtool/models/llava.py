"""What LLaVA has before its language model: a CLIP tower (transformers' module, weights loaded by us) and a projector.

LLaVA 1.5: arXiv 2310.03744; 1.6, with tiles of any resolution: llava-vl.github.io/blog/2024-01-30-llava-next. Knows no
engine: prepared pictures in, rows of the language model out.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from lmtool.errors import CheckpointError
from lmtool.images.prepared import PreparedImage

if TYPE_CHECKING:
    from lmtool.checkpoint.vision import VisionPart
    from lmtool.images.llava import LlavaForm

_TILES_AT_ONCE = 32  # more would only take more memory


class LlavaTower:
    """newline [H] stands at the end of each row of patches, where pictures are cut into tiles; else None."""

    def __init__(
        self,
        clip: Any,
        projector: Sequence[tuple[Tensor, Tensor | None]],
        newline: Tensor | None,
        form: "LlavaForm",
    ) -> None:
        """clip: a CLIPVisionModel whose last layer is the one that features are taken from. projector: the weights
        and biases of two matrices."""
        self._clip = clip
        self._projector = projector
        self._newline = newline
        self._form = form
        weight = projector[0][0]
        self._device, self._dtype = weight.device, weight.dtype
        shape = (1, 1, 1, 3)
        self._mean = torch.tensor(form.mean, device=self._device).view(shape)
        self._std = torch.tensor(form.std, device=self._device).view(shape)

    @property
    def num_bytes(self) -> int:
        weights = [*self._clip.parameters(), *(t for pair in self._projector for t in pair if t is not None)]
        return sum(tensor.nbytes for tensor in weights)

    def encode(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Of each picture its rows [num_tokens, H], all in one batch. Only launches work."""
        size = images[0].tile_size
        flat = np.concatenate([np.frombuffer(image.pixels, dtype=np.uint8) for image in images])
        tiles = torch.from_numpy(flat).to(self._device, non_blocking=True).view(-1, size, size, 3)
        features = torch.cat([self._features(piece) for piece in tiles.split(_TILES_AT_ONCE)])
        parts = features.split([image.num_tiles for image in images])
        return [self._rows(part, image) for part, image in zip(parts, images, strict=True)]

    def _features(self, tiles: Tensor) -> Tensor:
        """tiles uint8 [n, S, S, 3] → [n, patches, H]."""
        pixels = ((tiles.float() / 255 - self._mean) / self._std).to(self._dtype).permute(0, 3, 1, 2)
        hidden = self._clip(pixel_values=pixels).last_hidden_state
        if not self._form.keeps_class_token:
            hidden = hidden[:, 1:]
        (first, first_bias), (second, second_bias) = self._projector
        return linear(gelu(linear(hidden, first, first_bias)), second, second_bias)

    def _rows(self, features: Tensor, image: PreparedImage) -> Tensor:
        """The whole picture's tile, then the patches of the others as they lie in the picture, without its padding."""
        if self._form.fit != "anyres":
            return features.flatten(0, 1)
        grid = self._form.grid_rows(image.size)
        side = self._form.tile_size // self._form.patch_size
        patches = features[1:].view(grid.tile_rows, grid.tile_columns, side, side, -1).transpose(1, 2)
        patches = patches.reshape(grid.tile_rows * side, grid.tile_columns * side, -1)
        patches = patches[
            grid.first_row : grid.first_row + grid.num_rows,
            grid.first_column : grid.first_column + grid.num_columns,
        ]
        if self._newline is not None:
            patches = torch.cat((patches, self._newline.expand(len(patches), 1, -1)), dim=1)
        return torch.cat((features[0], patches.flatten(0, 1)))


def load_llava(part: "VisionPart", form: "LlavaForm", dtype: torch.dtype, device: torch.device) -> LlavaTower:
    """Raises CheckpointError where a tensor is missing or has another shape."""

    def tensor(name: str) -> Tensor:
        return part.tensor(name).to(device=device, dtype=dtype)

    names = set(part.names())
    projector = []
    for name in ("projector.linear_1", "projector.linear_2"):
        bias = tensor(f"{name}.bias") if f"{name}.bias" in names else None
        projector.append((tensor(f"{name}.weight"), bias))
    newline = tensor("newline") if "newline" in names else None
    return LlavaTower(_clip(part, dtype, device), projector, newline, form)


def _clip(part: "VisionPart", dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' module, without the layers behind the one that features are taken from."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings = dict(part.tower_config)
    num_layers = settings["num_hidden_layers"]
    last = part.feature_layer + (num_layers + 1 if part.feature_layer < 0 else 0)
    if not 0 < last <= num_layers:
        raise CheckpointError(
            f"config.json: features of layer {part.feature_layer}, the vision tower has {num_layers}",
            "the file is damaged",
        )
    settings["num_hidden_layers"] = last
    with torch.device("meta"):
        clip = CLIPVisionModel(CLIPVisionConfig(**settings, attn_implementation="sdpa"))
    wanted = dict(clip.named_parameters())
    for name, empty in wanted.items():
        ours = "tower." + name.removeprefix("vision_model.")
        if name.removeprefix("vision_model.").startswith("post_layernorm"):  # of what is not asked for
            _put(clip, name, torch.zeros(empty.shape, dtype=dtype, device=device))
            continue
        found = part.tensor(ours).to(device=device, dtype=dtype)
        if found.shape != empty.shape:
            raise CheckpointError(
                f"{ours} has the shape {list(found.shape)}, config.json says {list(empty.shape)}",
                "config.json and the weights are not of one model",
            )
        _put(clip, name, found)
    for name, buffer in list(clip.named_buffers()):
        positions = torch.arange(buffer.numel(), device=device).expand(buffer.shape)
        _put(clip, name, positions)
    return clip.eval()


def _put(module: Any, name: str, values: Tensor) -> None:
    """In place of a parameter or a buffer that has no memory yet."""
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    if last in module._parameters:
        module._parameters[last] = torch.nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[last] = values
