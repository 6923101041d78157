"""`ImageForm`: how a model wants its pictures, read from its folder. Does not know what a vision tower is."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lmtool.errors import CheckpointError
from lmtool.images import llava_config
from lmtool.images.prepared import PreparedImage
from lmtool.json_file import json_object

if TYPE_CHECKING:
    from PIL.Image import Image

MANIFEST = "lmtool.json"  # a workspace's; the room that writes it lies above this one
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_json = partial(json_object, refusal=CheckpointError)


class ImageForm(Protocol):
    """mean, std: of the channels, for pixels in 0..1; what the tower normalizes with."""

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...

    def prepare(self, image: "Image") -> PreparedImage:
        """Resize and cut an RGB picture. Raises RequestError for one whose shape is beyond the model's reach."""
        ...


def read_image_form(path: Path) -> ImageForm | None:
    """Of a model folder or a workspace; None for a model that takes no pictures.

    Raises CheckpointError for files that are missing or broken, or that ask for what is not implemented.
    """
    if path.parts[-2:] == ("triton_models", "weights"):  # LMDeploy's name of a workspace
        path = path.parents[1]
    if not path.is_dir():
        return None
    config = _config(path)
    architecture = _architecture(config)
    if architecture in llava_config.OF_TRANSFORMERS:
        return llava_config.of_transformers(path, config, _processor(path))
    if architecture in llava_config.ORIGINALS:
        return _of_original(path, config)
    return None


def picture_files(folder: Path) -> list[Path]:
    """The files beside config.json in which a model's folder, or a workspace, says how pictures are cut: for whoever
    makes another folder of that model. Raises CheckpointError as `read_image_form` does."""
    config = _config(folder)
    if _architecture(config) in llava_config.ORIGINALS and config.get("vision_config") is None:
        folder = tower_folder(folder, _tower_name(config)) or folder
    return [folder / name for name in (PREPROCESSOR, PROCESSOR) if (folder / name).exists()]


def _of_original(folder: Path, config: dict[str, Any]) -> ImageForm:
    """An original LLaVA 1.5 only says of which CLIP model its tower is. What was made of it here has the tower within,
    and beside its own config.json the processor's file of that CLIP model."""
    if config.get("vision_config") is not None:
        return llava_config.of_original(folder, config, _json(folder / PREPROCESSOR))
    tower = tower_folder(folder, _tower_name(config))  # else it is one that everybody knows
    if tower is None:
        return llava_config.of_original(folder, config, {})
    stated = _json(tower / "config.json")
    whole = config | {"vision_config": stated.get("vision_config", stated)}
    return llava_config.of_original(folder, whole, _json(tower / PREPROCESSOR))


def tower_folder(folder: Path, name: str) -> Path | None:
    """Where the tower that an original LLaVA names lies: in the model's folder, beside it, or where the name says.

    None: in none of these.
    """
    last = name.rstrip("/").rpartition("/")[2]
    places = (folder / last, folder.parent / last, Path(os.path.expanduser(name)))
    return next((place for place in places if last and (place / "config.json").exists()), None)


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / MANIFEST).get("config") or json_object(folder / "config.json", CheckpointError)


def _tower_name(config: Mapping[str, Any]) -> str:
    return str(config.get("mm_vision_tower") or "")


def _architecture(config: Mapping[str, Any]) -> str | None:
    return next(iter(config.get("architectures") or ()), None)


def _processor(folder: Path) -> Mapping[str, Any]:
    """What newer releases of transformers write goes before what older ones wrote."""
    found = _json(folder / PROCESSOR).get("image_processor") or json_object(folder / PREPROCESSOR, CheckpointError)
    if not found:
        raise CheckpointError(f"{folder} has no {PREPROCESSOR}", "download it: it says how pictures are cut")
    return found
