"""``architectures[0]`` of a config.json → the family's module, imported when it is needed. Knows no torch."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from lmtool.checkpoint import llava_config
from lmtool.errors import CheckpointError

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "InternLMForCausalLM": "internlm",
    "InternLM2ForCausalLM": "internlm2",
    "QWenLMHeadModel": "qwen",
}
# those that take pictures, too: `open_checkpoint` takes their language models out, one of the above
SUPPORTED = (*ARCHITECTURES, *llava_config.ARCHITECTURES)


def family(config: Mapping[str, Any]) -> ModuleType:
    """The module (``NAMES``, ``read_config``, perhaps ``TRANSFORMS``) that reads this config.json."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise CheckpointError("config.json names no architecture", "the model folder is damaged")
    if named[0] not in ARCHITECTURES:
        raise CheckpointError(f"architecture {named[0]} is not supported", "supported: " + ", ".join(sorted(SUPPORTED)))
    return import_module(f"lmtool.models.{ARCHITECTURES[named[0]]}")
