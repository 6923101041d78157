"""What the tensors of a LLaVA are called: ours of its vision part, and the forms in which files name all of it.

Ours are those of the language model alone (``model.layers.…``, ``lm_head.weight``), ``tower.`` before what
transformers' CLIPVisionModel calls its own, ``projector.linear_1.weight`` and its like, ``newline``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmtool.checkpoint.llava_config import VisionSettings
from lmtool.errors import CheckpointError

# our beginning of a name → the forms of it that are out there: llava-hf's, with the tower as all saved it before
# transformers 5 and as that does; transformers 4.52's, with everything but the head under "model."; the original's last
_FORMS: dict[str, tuple[str, ...]] = {
    "model.": ("language_model.model.", "model.language_model.", "model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
    "tower.": (
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.vision_tower.vision_tower.",
    ),
    "projector.linear_1.": ("multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_1.")
    + ("model.mm_projector.0.",),
    "projector.linear_2.": ("multi_modal_projector.linear_2.", "model.multi_modal_projector.linear_2.")
    + ("model.mm_projector.2.",),
    "newline": ("image_newline", "model.image_newline"),
}
# the longest that fits is meant: "model." fits everything of the original's
_BEGINNINGS = sorted(((theirs, ours) for ours, forms in _FORMS.items() for theirs in forms), key=lambda p: -len(p[0]))
_ORIGINAL = {ours: forms[-1] for ours, forms in _FORMS.items()} | {"tower.": _FORMS["tower."][4]}
VISION = ("tower.", "projector.", "newline")
POSITIONS = "tower.embeddings.position_ids"  # older files have these numbers 0, 1, 2, …; nobody needs them


@dataclass(frozen=True, slots=True)
class NameForm:
    """What one checkpoint calls its parts. beginnings: ours → its."""

    beginnings: Mapping[str, str]

    def stored(self, name: str) -> str:
        """Its name of one of ours; a name that begins as none of ours is its own."""
        for ours, theirs in self.beginnings.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    @property
    def is_whole(self) -> bool:
        return self.beginnings.keys() == _FORMS.keys()

    @property
    def vision_modules(self) -> list[str]:
        """The modules of the vision part, for lists of what is not quantized: transformers compares such names from
        the beginning of its own, which have been under "model." since 4.52, vLLM and SGLang look for them anywhere."""
        is_original = "mm_projector" in self.beginnings["projector.linear_1."]
        modules = ("vision_tower", "mm_projector" if is_original else "multi_modal_projector")
        return [*modules, *(f"model.{module}" for module in modules)]


def our_names(stored: Iterable[str], where: object) -> tuple[dict[str, str], NameForm]:
    """Ours → stored, of every tensor; what is nobody's keeps its name. Raises CheckpointError for two forms in one.

    where: the checkpoint, for messages. A form without a tower gets the original's name of it.
    """
    names: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in stored:
        theirs, ours = next(((t, o) for t, o in _BEGINNINGS if name.startswith(t)), ("", ""))
        if ours and found.setdefault(ours, theirs) != theirs:
            raise CheckpointError(
                f"{where} names its tensors in two ways: {found[ours]}… and {theirs}…",
                "leave the files of one model in the folder",
            )
        names[ours + name.removeprefix(theirs)] = name
    return names, NameForm({ours: found.get(ours, _ORIGINAL[ours]) for ours in _FORMS})


def is_vision(name: str) -> bool:
    """Whether one of our names is of the vision part."""
    return name.startswith(VISION)


def wanted_shapes(tower: Mapping[str, Any], settings: VisionSettings, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Our name → shape of every tensor of a vision part. hidden_size: of the language model."""
    width, grid = tower["hidden_size"], tower["image_size"] // tower["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "tower.embeddings.class_embedding": (width,),
        "tower.embeddings.patch_embedding.weight": (width, tower["num_channels"], *[tower["patch_size"]] * 2),
        "tower.embeddings.position_embedding.weight": (grid * grid + 1, width),
        **_affine("tower.pre_layrnorm", (width,)),
    }
    for i in range(tower["num_hidden_layers"]):
        shapes |= dict(_layer_shapes(f"tower.encoder.layers.{i}", width, tower["intermediate_size"]))
    shapes |= _affine("tower.post_layernorm", (width,))
    for name, num_in in (("projector.linear_1", width), ("projector.linear_2", hidden_size)):
        projector = _affine(name, (hidden_size, num_in))
        shapes |= projector if settings.projector_bias else {f"{name}.weight": projector[f"{name}.weight"]}
    if settings.has_newline:
        shapes["newline"] = (hidden_size,)
    return shapes


def _layer_shapes(layer: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm in ("layer_norm1", "layer_norm2"):
        yield from _affine(f"{layer}.{norm}", (width,)).items()
    for matrix in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _affine(f"{layer}.self_attn.{matrix}", (width, width)).items()
    yield from _affine(f"{layer}.mlp.fc1", (inner, width)).items()
    yield from _affine(f"{layer}.mlp.fc2", (width, inner)).items()


def _affine(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
