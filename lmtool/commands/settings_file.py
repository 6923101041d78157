"""`--config FILE.toml` and `LMTOOL_*`: where a command's flags may come from as well. Flags > environment > file.

A file holds flags' names without the dashes, `server-port = 8000` or `server_port = 8000`; Click reads what it says as
it reads flags, so that ranges and types are checked in one place.
"""

import tomllib
from pathlib import Path
from typing import Any

import typer

from lmtool.errors import ConfigError

PREFIX = "LMTOOL_"


def read_settings(ctx: typer.Context, path: Path | None) -> Path | None:
    """The callback of an eager ``--config`` option. Raises ConfigError for a name that is no flag of the command."""
    _let_environment_speak(ctx)
    if path is None:
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}", "give a TOML file") from error
    known = {name: param for param in ctx.command.params for name in _names(param)}
    settings: dict[str, Any] = {}
    for key, value in found.items():
        param = known.get(key.replace("_", "-"))
        if param is None or param.name == "config":
            names = ", ".join(sorted(name for name in known if name != "config"))
            raise ConfigError(f"--config {path}: {key!r} is no setting", f"one of {names}")
        if isinstance(value, dict):
            raise ConfigError(f"--config {path}: {key!r} is a table", "settings are not in tables")
        settings[str(param.name)] = value
    ctx.default_map = settings
    return path


def _names(param: Any) -> list[str]:
    """Of a flag its long spellings, of an argument its own name; without dashes in front."""
    if param.param_type_name == "argument":
        return [param.name]
    return [word.removeprefix("--") for word in (*param.opts, *param.secondary_opts) if word.startswith("--")]


def _let_environment_speak(ctx: typer.Context) -> None:
    for param in ctx.command.params:
        if param.envvar is None and param.name not in ("config", "help", "verbose"):
            param.envvar = [PREFIX + name.upper().replace("-", "_") for name in _names(param)]
