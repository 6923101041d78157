"""Reads what a cluster is to serve, from a TOML file or from ``--model`` texts.

Both name a model's settings as flags do, without the dashes, and all in one row: its own (`ModelSpec`), those of
`EngineConfig`, and the limits of `ServerConfig` that are a model's affair.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lmtool.cluster.spec import SERVER_KEYS, ClusterSpec, ModelSpec
from lmtool.config import EngineConfig
from lmtool.errors import ConfigError

_OWN_KEYS = tuple(one.name for one in fields(ModelSpec) if one.name not in ("engine", "server"))
_ENGINE_KEYS = tuple(one.name for one in fields(EngineConfig) if one.init and one.name != "rank_hosts")  # Ray's affair


def read_spec(path: Path) -> ClusterSpec:
    """A TOML file of ``[[models]]`` tables. Raises ConfigError that names the file and the model."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}", "give a TOML file") from error
    for key in found:
        if key != "models":
            raise ConfigError(f"--config {path}: {key!r} is no setting", "a file of models has [[models]] only")
    tables = found.get("models", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"--config {path}: models is no list of tables", "begin each model with [[models]]")
    return ClusterSpec(
        tuple(_model(table, f"--config {path}: model {number}") for number, table in enumerate(tables, 1))
    )


def parse_models(texts: Sequence[str]) -> ClusterSpec:
    """Of ``--model A,replicas=2,cache-gb=4`` each. Raises ConfigError that names the text."""
    return ClusterSpec(tuple(_model(_settings(text), f"--model {text}") for text in texts))


def _settings(text: str) -> dict[str, Any]:
    model, *pairs = text.split(",")
    settings: dict[str, Any] = {"model": model}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--model {text}: {pair!r} has no value", "give key=value, as in replicas=2")
        if key in settings:
            raise ConfigError(f"--model {text}: {key!r} is there twice", "give it once")
        settings[key] = _value(value)
    return settings


def _value(text: str) -> Any:
    """A number, true or false, as TOML writes them; whatever is none of these is a text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _model(settings: Mapping[str, Any], where: str) -> ModelSpec:
    own: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("-", "_")
        if name in _OWN_KEYS:
            place = own
        elif name in _ENGINE_KEYS:
            place = engine
        elif name in SERVER_KEYS:
            place, name = server, SERVER_KEYS[name]
            value = _hosts(value) if name == "allowed_image_hosts" else value
        else:
            known = ", ".join(sorted(one.replace("_", "-") for one in (*_OWN_KEYS, *_ENGINE_KEYS, *SERVER_KEYS)))
            raise ConfigError(f"{where}: {key!r} is no setting", f"one of {known}")
        if name in place:
            raise ConfigError(f"{where}: {key!r} is there twice", "give it once")
        place[name] = value
    if "model" not in own:
        raise ConfigError(f"{where} has no model", "give model = a folder, a file or a name")
    try:
        return ModelSpec(**{"name": _short(own["model"]), **own}, engine=engine, server=server)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.cause}", error.fix) from None


def _hosts(value: Any) -> Any:
    """Of one or of a list."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _short(model: Any) -> Any:
    """What a model is called where nobody named it: of a path its last part."""
    return Path(model).name if isinstance(model, str) and Path(model).exists() else model
