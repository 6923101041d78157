"""A LLaVA's checkpoint in its two parts: the language model, as a checkpoint like any other, and what it sees with.

Whatever loads, quantizes or converts a language model takes the first and never knows. Knows no modules.
"""

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from lmtool.checkpoint.formats import Checkpoint, PackedInt4, PackedInt8, StoredW4
from lmtool.checkpoint.llava_config import VisionSettings, language_config, stated_tower, vision_settings
from lmtool.checkpoint.llava_names import POSITIONS, NameForm, is_vision, our_names, wanted_shapes
from lmtool.checkpoint.llava_tower import Tower, find_tower, open_tower
from lmtool.checkpoint.staging import StoredTensor
from lmtool.errors import CheckpointError
from lmtool.images.form import picture_files

_MOST_NAMES_SHOWN = 6
_NOT_ONE_MODEL = "config.json and the weights are not of one model"


class VisionPart:
    """The tower, the projector and the newline of a LLaVA, under our names (`llava_names`).

    config         the model's whole config.json
    tower_config   the tower's settings as transformers' CLIPVisionConfig takes them, none left out
    feature_layer  of the tower's hidden states, of which features are taken
    form           what the checkpoint calls the tensors of both parts: for whoever writes such a checkpoint
    tower_path     the folder of a tower that is not in the checkpoint; None: it is
    where          the checkpoint, for messages
    """

    def __init__(
        self,
        config: dict[str, Any],
        tower_config: dict[str, Any],
        places: Mapping[str, tuple[Checkpoint, str]],
        form: NameForm,
        where: Path,
        tower_path: Path | None = None,
    ) -> None:
        """places: our name → a checkpoint, and its name there. Raises CheckpointError for tensors that are missing, too
        many or of another shape."""
        settings = vision_settings(config)
        self.config = config
        self.tower_config = tower_config
        self.settings = settings
        self.feature_layer = settings.feature_layer
        self.form = form
        self.tower_path = tower_path
        self.where = where
        self._places = {name: place for name, place in places.items() if name != POSITIONS}
        self._check(tower_config, settings, language_config(config)["hidden_size"])

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        checkpoint, stored = self._at(name)
        return checkpoint.shape(stored)

    def dtype(self, name: str) -> str:
        checkpoint, stored = self._at(name)
        return checkpoint.dtype(stored)

    def tensor(self, name: str) -> Tensor:
        checkpoint, stored = self._at(name)
        return checkpoint.tensor(stored)

    def stored(self, name: str) -> StoredTensor | None:
        """Where what `tensor` returns lies in a file, byte for byte; None where it is made from what lies there."""
        checkpoint, stored = self._at(name)
        return checkpoint.stored(stored)

    @property
    def num_parameters(self) -> int:
        return sum(prod(self.shape(name)) for name in self._places)

    @property
    def num_bytes(self) -> int:
        """Of what `tensor` returns."""
        return sum(self.num_bytes_of(name) for name in self._places)

    def num_bytes_of(self, name: str) -> int:
        return prod(self.shape(name)) * _dtype(self.dtype(name)).itemsize

    @property
    def written_config(self) -> dict[str, Any]:
        """The whole config.json of a checkpoint with all of this in it: it says the shape of what it took in."""
        return self.config | ({"vision_config": self.tower_config} if self.tower_path else {})

    def _at(self, name: str) -> tuple[Checkpoint, str]:
        if name not in self._places:
            raise CheckpointError(f"{self.where} holds no tensor {name}")
        return self._places[name]

    def _check(self, tower: Mapping[str, Any], settings: VisionSettings, hidden_size: int) -> None:
        num_layers = tower["num_hidden_layers"]
        if not -num_layers <= settings.feature_layer <= num_layers or settings.feature_layer == 0:
            raise CheckpointError(
                f"{self.where}: features of layer {settings.feature_layer}, the vision tower has {num_layers}",
                "config.json is damaged",
            )
        wanted = wanted_shapes(tower, settings, hidden_size)
        missing, unexpected = sorted(wanted.keys() - self._places), sorted(self._places.keys() - wanted)
        said = [f"{len(missing)} tensors are missing ({self._some(missing)})"] if missing else []
        said += [f"{len(unexpected)} are unexpected ({self._some(unexpected)})"] if unexpected else []
        if said:
            raise CheckpointError(f"{self.where}: of what it sees with " + " and ".join(said), _NOT_ONE_MODEL)
        for name, shape in wanted.items():
            if self.shape(name) != shape:
                found = f"{self.form.stored(name)} is {list(self.shape(name))}, not {list(shape)}"
                raise CheckpointError(f"{self.where}: {found}", _NOT_ONE_MODEL)

    def _some(self, names: list[str]) -> str:
        shown = ", ".join(self.form.stored(name) for name in names[:_MOST_NAMES_SHOWN])
        return shown + (", …" if len(names) > _MOST_NAMES_SHOWN else "")


class LanguagePart:
    """`Checkpoint` of a LLaVA's language model, under the names and with the config.json that it would have alone."""

    def __init__(self, inner: Checkpoint, names: Mapping[str, str], vision: VisionPart) -> None:
        """names: ours → inner's."""
        self.path = inner.path
        self.format = inner.format
        self.config = language_config(vision.config)
        self.generation_config = inner.generation_config
        self.vision: VisionPart | None = vision
        self._inner = inner
        self._names = names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._stored_name(name))

    def dtype(self, name: str) -> str:
        return self._inner.dtype(self._stored_name(name))

    def tensor(self, name: str) -> Tensor:
        return self._inner.tensor(self._stored_name(name))

    def stored(self, name: str) -> StoredTensor | None:
        return self._inner.stored(self._stored_name(name))

    def stored_w4(self, name: str) -> StoredW4 | None:
        return self._inner.stored_w4(self._stored_name(name))

    def packed_int4(self, name: str, device: torch.device | None = None) -> PackedInt4 | None:
        return self._inner.packed_int4(self._stored_name(name), device)

    def packed_int8(self, name: str) -> PackedInt8 | None:
        return self._inner.packed_int8(self._stored_name(name))

    def close(self) -> None:
        self._inner.close()

    def _stored_name(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self._names[name]


def split(inner: Checkpoint, tower: Path | None = None) -> LanguagePart:
    """A LLaVA's checkpoint, whatever its format, in its two parts.

    tower: the folder of a tower that is neither in the checkpoint nor where it says. Raises CheckpointError for what is
    missing, with where to get it.
    """
    names, form = our_names(inner.names(), inner.path)
    places = {name: (inner, stored) for name, stored in names.items() if is_vision(name)}
    found = None
    if not any(name.startswith("tower.") for name in places):
        found = _tower_elsewhere(inner, tower)
        places |= {name: (found.checkpoint, stored) for name, stored in found.names.items()}
    tower_config = found.config if found else stated_tower(inner.config)
    if tower_config is None:
        raise CheckpointError(
            f"{inner.path}: config.json does not say what shape its vision tower has",
            "add vision_config, as the config.json of that tower has it",
        )
    path = found.checkpoint.path if found else None
    vision = VisionPart(inner.config, tower_config, places, form, inner.path, path)
    return LanguagePart(inner, _without(names, places), vision)


def copy_picture_files(source: Path, folder: Path) -> None:
    """What a model's folder or workspace says of pictures, into the folder of a model made of it."""
    for file in picture_files(source):
        copyfile(file, folder / file.name)


def _tower_elsewhere(inner: Checkpoint, given: Path | None) -> Tower:
    name = vision_settings(inner.config).tower_name
    if name is None:
        raise CheckpointError(f"{inner.path} holds no vision tower", "download the model again")
    return open_tower(given or find_tower(inner.path, name), name)


def _dtype(name: str) -> torch.dtype:
    """Codes are read as float32."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _without(names: Mapping[str, str], taken: Iterable[str]) -> dict[str, str]:
    left = set(taken)
    return {name: stored for name, stored in names.items() if name not in left}
