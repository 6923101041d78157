"""``engine.toml``: what a workspace is run with where neither the command line nor the caller says otherwise.

Knows the names of the settings; `EngineConfig` knows which values can be.
"""

import logging
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from lmtool.checkpoint.kv_parameters import has_kv_parameters
from lmtool.checkpoint.manifest import workspace_of
from lmtool.config import EngineConfig
from lmtool.errors import ConfigError

_log = logging.getLogger(__name__)
ENGINE_FILE = "engine.toml"
SETTINGS = (
    "session_len",
    "max_batch_size",
    "max_batched_tokens",
    "max_image_tiles",
    "cache_max_entry_count",
    "cache_gb",
    "cache_host_gb",
    "prefix_caching",
    "quant_policy",
    "kv_dtype",
)


def engine_file_text(context: int) -> str:
    """As `lmtool convert` writes it: every setting there is, none of them set. context: the model's own, tokens."""
    return f"""# What this model is run with where the command line says nothing: take away a "#" and change the value.

# session_len = {context}             # longest prompt and answer together, tokens; the model's own is {context}
# max_batch_size = 256           # most requests computed in one step
# max_batched_tokens = 8192      # token budget of one step; longer prompts are computed in chunks of it
# max_image_tiles = 16           # tiles of pictures that one step encodes
# cache_max_entry_count = 0.8    # share of the free GPU memory for the K/V cache
# cache_gb = 4.0                 # size of the K/V cache in GiB instead; on a CPU this bounds it
# cache_host_gb = 16.0           # host memory in GiB for what the K/V cache has no room for; 0: none
# prefix_caching = true          # equal beginnings of prompts are computed once
# quant_policy = 8               # the K/V cache in int8, 4: in int4; static int8 after `lmtool lite kv_qparams`
"""


def under_engine_file(config: EngineConfig, model: Path) -> EngineConfig:
    """``config`` over a workspace's engine.toml; int8 is 'static' where parameters lie there. Raises ConfigError."""
    path = workspace_of(model) / ENGINE_FILE
    if path.exists():
        try:
            config = config.under(_read(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.cause}", error.fix) from error
    if config.quant_policy == 8 and config.kv_dtype is None and has_kv_parameters(model):
        return config.but(quant_policy=0, kv_dtype="static")
    if config.kv_choice == "static" and not has_kv_parameters(model):
        raise ConfigError(
            f"the K/V cache is to be static int8 and {model} brings no parameters for it",
            "write them into a workspace with `lmtool lite kv_qparams`, or give --kv-dtype int8, which needs none",
        )
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), "mend the file, or remove it: the defaults hold then") from error
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no setting", f"settings are {', '.join(SETTINGS)}")
    if settings.get("quant_policy") == 4 and has_kv_parameters(path.parent):
        _notice(f"{path}: quant_policy 4 is read as static int8, whose parameters are there (8 says the same)")
        settings |= {"quant_policy": 0, "kv_dtype": "static"}
    return settings


@cache
def _notice(text: str) -> None:
    """Once, however often the file is read."""
    _log.warning(text)
