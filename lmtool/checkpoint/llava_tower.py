"""The vision tower of an original LLaVA 1.5, whose checkpoint only says of which CLIP model it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtool.checkpoint.formats import Checkpoint
from lmtool.checkpoint.hub import HUB_ID, cached_model
from lmtool.checkpoint.llava_config import ORIGINAL_ARCHITECTURES, architecture_of, tower_settings, vision_settings
from lmtool.checkpoint.manifest import PICKLE_SUFFIXES
from lmtool.checkpoint.reader import HfCheckpoint, read_json
from lmtool.errors import CheckpointError
from lmtool.images.form import tower_folder

_IN_CLIP = "vision_model."  # a whole CLIP model holds a text tower, too
_OF_CLIP_ALONE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_GIVE_HUB_FORM = "or give the model's llava-hf form"


@dataclass(frozen=True, slots=True)
class Tower:
    """A CLIP model's folder as a tower. config: of CLIPVisionConfig; names: ours (``tower.…``) → the folder's."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    names: dict[str, str]


def missing_tower(folder: Path) -> str | None:
    """mm_vision_tower of an original LLaVA's folder whose files hold no tower; None for any other folder."""
    config = folder / "config.json"
    if not config.exists() or architecture_of(read_json(config)) not in ORIGINAL_ARCHITECTURES:
        return None
    checkpoint = HfCheckpoint(folder)
    has_one = any("vision_tower." in name for name in checkpoint.names())
    checkpoint.close()
    return None if has_one else vision_settings(checkpoint.config).tower_name


def find_tower(model: Path, name: str) -> Path:
    """The folder of the tower that a model names: in the model's folder, beside it, where the name says, or in the
    hub's cache. Raises CheckpointError with where to get it."""
    found = tower_folder(model, name)
    if found is not None:
        return found
    is_hub_id = HUB_ID.fullmatch(name) is not None and not name.startswith(".")
    cached = cached_model(name) if is_hub_id else None
    if cached is not None:
        return cached
    get = (
        f"download it (`hf download {name}`)"
        if is_hub_id
        else f"put that folder beside the model as {name.rstrip('/').rpartition('/')[2]}"
    )
    raise CheckpointError(
        f"{model} needs the vision tower {name}, which is not on this machine", f"{get} {_GIVE_HUB_FORM}"
    )


def open_tower(folder: Path, name: str) -> Tower:
    """Reads headers only. Raises CheckpointError where the folder is no CLIP model."""
    if not any(folder.glob("*.safetensors")):
        pickled = any(file.suffix in PICKLE_SUFFIXES for file in folder.iterdir())
        raise CheckpointError(
            f"{folder}, the vision tower, has no *.safetensors" + (", only pickled weights" if pickled else ""),
            f"{'lmtool convert --allow-bin the model' if pickled else f'download {name} again'} {_GIVE_HUB_FORM}",
        )
    checkpoint = HfCheckpoint(folder)
    stated = checkpoint.config.get("vision_config", checkpoint.config)
    if not isinstance(stated, dict):
        raise CheckpointError(f"{folder / 'config.json'}: vision_config is {stated!r}", "a table is expected")
    names = {}
    for stored in checkpoint.names():
        if not stored.startswith(_OF_CLIP_ALONE):
            names["tower." + stored.removeprefix(_IN_CLIP)] = stored
    return Tower(checkpoint, tower_settings(stated, str(folder / "config.json")), names)
