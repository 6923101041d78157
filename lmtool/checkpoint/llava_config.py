"""What the config.json of a LLaVA says: of its language model, of its tower, and of what lies between them.

Two forms are out there: llava-hf's, with a table for each part (transformers' LlavaConfig and LlavaNextConfig), and the
original's, where everything is in one table (github.com/haotian-liu/LLaVA). Knows no tensors and imports no torch: a
server's HTTP process reads it, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lmtool.errors import CheckpointError
from lmtool.images.llava_config import OF_TRANSFORMERS, ORIGINALS

T = TypeVar("T")

HUB_ARCHITECTURES = OF_TRANSFORMERS
# of the original form → what transformers calls the language model
ORIGINAL_ARCHITECTURES = dict(zip(ORIGINALS, ("llama", "mistral"), strict=True))
ARCHITECTURES = (*HUB_ARCHITECTURES, *ORIGINAL_ARCHITECTURES)

LANGUAGE_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# What transformers' config classes take where config.json leaves a key out, as llava-hf's do of most: a test compares.
LANGUAGE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    },
}
TOWER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# of the original form, by the last word of mm_vision_tower; llava-hf's takes the first where it has no vision_config
KNOWN_TOWERS = {
    "clip-vit-large-patch14-336": TOWER_DEFAULTS | _LARGE | {"image_size": 336},
    "clip-vit-large-patch14": TOWER_DEFAULTS | _LARGE | {"image_size": 224},
}
_MOST_LAYERS = 1000  # of a tower: each is asked for by name
_ANOTHER = "lmtool runs LLaVA 1.5 and 1.6: give another model"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSettings:
    """What lies between the tower and the language model. (How a picture becomes tiles and rows: `lmtool.images`.)

    tower_name     mm_vision_tower of the original form, a hub id or a folder; None: the tower is in the checkpoint
    feature_layer  of the tower's hidden states; -2: what the last layer but one gives
    has_newline    a learned row stands behind each row of patches
    """

    tower_name: str | None
    feature_layer: int
    has_newline: bool
    projector_bias: bool = True


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """A LLaVA's architecture; None for a config.json of anything else."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if first in ARCHITECTURES else None


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the language model would have alone. Raises CheckpointError where there is none to be had.

    Of dtype and quantization the outer table goes before the inner one, as in transformers.
    """
    architecture = architecture_of(config)
    if architecture in ORIGINAL_ARCHITECTURES:
        kind = ORIGINAL_ARCHITECTURES[architecture]
        text = {key: value for key, value in config.items() if not key.startswith("mm_") and key != "vision_config"}
    else:
        text = dict(_table(config, "text_config"))
        kind = text.get("model_type", "llama")
    if not isinstance(kind, str) or kind not in LANGUAGE_ARCHITECTURES:
        raise CheckpointError(
            f"config.json: the language model is of type {kind!r}", "supported: " + ", ".join(LANGUAGE_ARCHITECTURES)
        )
    outer = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id")
    above = {key: config[key] for key in outer[:3] if config.get(key) is not None}
    if above.keys() & {"dtype", "torch_dtype"}:
        text = {key: value for key, value in text.items() if key not in ("dtype", "torch_dtype")}
    below = {key: config[key] for key in outer[3:] if key in config}
    made = LANGUAGE_DEFAULTS[kind] | below | text | above
    if made.get("quantization_config") is None:
        made.pop("quantization_config", None)
    tied = config.get("tie_word_embeddings") is True or text.get("tie_word_embeddings") is True
    names = {"architectures": [LANGUAGE_ARCHITECTURES[kind]], "model_type": kind}
    return made | names | {"tie_word_embeddings": tied}


def stated_tower(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tower's settings as transformers' CLIPVisionConfig takes them, none left out; None: the tower's own folder
    has them. Raises CheckpointError for a tower that is no CLIP."""
    stated = config.get("vision_config")
    if stated is None:
        if architecture_of(config) in HUB_ARCHITECTURES:
            return dict(KNOWN_TOWERS["clip-vit-large-patch14-336"])
        name = str(config.get("mm_vision_tower", "")).rstrip("/").rpartition("/")[2]
        return dict(KNOWN_TOWERS[name]) if name in KNOWN_TOWERS else None
    return tower_settings(_table(config, "vision_config"), "config.json: vision_config")


def tower_settings(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tower's own table, none of CLIPVisionConfig's settings left out. where: it stands, for messages."""
    kind = stated.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise CheckpointError(f"{where} is of type {kind!r}", "lmtool has CLIP towers only: give another model")
    made = {key: stated.get(key, default) for key, default in TOWER_DEFAULTS.items()}
    for key, value in made.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if isinstance(TOWER_DEFAULTS[key], int) and not is_whole:
            raise CheckpointError(f"{where}: {key} is {value!r}", "a whole number above 0 is expected")
    if made["num_hidden_layers"] > _MOST_LAYERS:
        raise CheckpointError(f"{where}: num_hidden_layers is {made['num_hidden_layers']}", "the file is damaged")
    return made


def vision_settings(config: Mapping[str, Any]) -> VisionSettings:
    """Raises CheckpointError for what no LLaVA 1.5 or 1.6 has, by name."""
    if architecture_of(config) in HUB_ARCHITECTURES:
        _one_of(config, "projector_hidden_act", {"gelu": None}, "gelu")
        return VisionSettings(
            tower_name=None,
            feature_layer=_layer(config, "vision_feature_layer"),
            has_newline=architecture_of(config) == "LlavaNextForConditionalGeneration",
            projector_bias=_one_of(config, "multimodal_projector_bias", {True: True, False: False}, True),
        )
    _one_of(config, "mm_projector_type", {"mlp2x_gelu": None}, "linear")
    return VisionSettings(
        tower_name=_text(config, "mm_vision_tower"),
        feature_layer=_layer(config, "mm_vision_select_layer"),
        has_newline=_one_of(config, "mm_patch_merge_type", {"flat": False, "spatial_unpad": True}, "flat"),
    )


def _one_of(config: Mapping[str, Any], key: str, known: Mapping[Any, T], default: Any) -> T:
    value = config.get(key, default)
    for name, meaning in known.items():
        if value is name or (isinstance(value, str) and value == name):
            return meaning
    raise CheckpointError(f"config.json: {key} is {value!r}", _ANOTHER)


def _layer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key, -2)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}", "lmtool takes the features of one layer: " + _ANOTHER)
    return value


def _text(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key)
    if not isinstance(value, str) or not value:
        raise CheckpointError(f"config.json: {key} is {value!r}", "the model folder is damaged")
    return value


def _table(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} is {value!r}", "a table is expected: the file is damaged")
    return value
