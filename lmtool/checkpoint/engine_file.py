"""``engine.toml``: what a workspace is run with where neither the command line nor the caller says otherwise.

Knows the names of the settings; `EngineConfig` knows which values can be.
"""

import tomllib
from pathlib import Path
from typing import Any

from lmtool.checkpoint.formats import workspace_of
from lmtool.config import EngineConfig
from lmtool.errors import ConfigError

ENGINE_FILE = "engine.toml"
SETTINGS = (
    "session_len",
    "max_batch_size",
    "max_batched_tokens",
    "cache_max_entry_count",
    "cache_gb",
    "prefix_caching",
)


def engine_file_text(context: int) -> str:
    """As `lmtool convert` writes it: every setting there is, none of them set. context: the model's own, tokens."""
    return f"""# What this model is run with where the command line says nothing: take away a "#" and change the value.

# session_len = {context}             # longest prompt and answer together, tokens; the model's own is {context}
# max_batch_size = 256           # most requests computed in one step
# max_batched_tokens = 8192      # token budget of one step; longer prompts are computed in chunks of it
# cache_max_entry_count = 0.8    # share of the free GPU memory for the K/V cache
# cache_gb = 4.0                 # size of the K/V cache in GiB instead; on a CPU this bounds it
# prefix_caching = true          # equal beginnings of prompts are computed once
"""


def under_engine_file(config: EngineConfig, model: Path) -> EngineConfig:
    """``config`` over the engine.toml of a workspace; itself for other models. Raises ConfigError."""
    path = workspace_of(model) / ENGINE_FILE
    if not path.exists():
        return config
    try:
        return config.under(_read(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.cause}", error.fix) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(error), "mend the file, or remove it: the defaults hold then") from error
    if settings.pop("quant_policy", 0) != 0:
        raise ConfigError("quant_policy: the K/V cache is not quantized yet", "set it to 0")
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise ConfigError(f"{unknown[0]} is no setting", f"settings are {', '.join(SETTINGS)}")
    return settings
