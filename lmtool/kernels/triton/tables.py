"""Tuned launch configurations as data: a JSON file for each architecture, read when it is first asked for.

`tuned/sm_90.json` is package data. `lmtool bench kernels --tune` writes one of the same form into the user's cache
folder, and its entries go before the package's. Knows no kernel: the names and their fields are the caller's.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from lmtool.errors import ConfigError

FORMAT = "lmtool-tuned/1"
_FIELDS = {"kernel", "num_out", "num_in", "paired", "itemsize", "rows", "config"}
_OPTIONAL = {"us"}
_FIX = "delete it, or write it anew with `lmtool bench kernels --tune`"

Config = Any  # one of the caller's NamedTuples
Kinds = Mapping[str, type]  # the name of a kernel → the NamedTuple of its configuration


class Key(NamedTuple):
    """A matrix [num_out, num_in] (paired: two of them, gate and up) of ``itemsize`` bytes a number, and its kernel."""

    kernel: str
    num_out: int
    num_in: int
    paired: bool
    itemsize: int


class Entry(NamedTuple):
    """``rows``: the config serves up to so many rows of x; None: any number. ``us``: what was measured, for readers."""

    key: Key
    rows: int | None
    config: Config
    us: float | None = None


class Table:
    """Entries by key and number of rows. Of two entries for the same, the later one counts."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        by_key: dict[Key, dict[float, Config]] = {}
        for entry in entries:
            bucket = float("inf") if entry.rows is None else entry.rows
            by_key.setdefault(entry.key, {})[bucket] = entry.config
        self._buckets = {key: sorted(found.items(), key=lambda item: item[0]) for key, found in by_key.items()}

    def find(self, key: Key, num_rows: int = 1) -> Config | None:
        """The config of the smallest bucket that holds ``num_rows``; None where there is none."""
        for rows, config in self._buckets.get(key, ()):
            if num_rows <= rows:
                return config
        return None


# ---------------------------------------------------------------------- files
def packaged_path(capability: int) -> Path:
    return Path(__file__).parent / "tuned" / f"sm_{capability}.json"


def user_path(capability: int) -> Path:
    """In the user's cache folder, as the XDG base directory specification has it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lmtool" / "tuned" / f"sm_{capability}.json"


def load(capability: int, kinds: Kinds) -> Table:
    """The package's entries and the user's before them. Raises ConfigError for a file that is not a table."""
    entries: list[Entry] = []
    for path in (packaged_path(capability), user_path(capability)):
        if path.is_file():
            entries += read(path, capability, kinds)
    return Table(entries)


def read(path: Path, capability: int, kinds: Kinds) -> list[Entry]:
    """Raises ConfigError, which names the file and what is wrong in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the tuning table {path} cannot be read: {error}", _FIX) from None
    problem = _problem(values, capability)
    if problem is None:
        for i, entry in enumerate(values["entries"]):
            if wrong := _entry_problem(entry, kinds):
                problem = f"entry {i + 1}: {wrong}"
                break
    if problem is not None:
        raise ConfigError(f"the tuning table {path}: {problem}", _FIX)
    return [_entry(entry, kinds) for entry in values["entries"]]


def _entry(values: Mapping[str, Any], kinds: Kinds) -> Entry:
    key = Key(*(values[name] for name in Key._fields))
    return Entry(key, values["rows"], kinds[key.kernel](**values["config"]), values.get("us"))


def write(path: Path, capability: int, entries: Sequence[Entry], made_with: Mapping[str, str]) -> None:
    """Whole or not at all; one line an entry, in the order of their keys, so that two versions can be compared."""
    ordered = sorted(entries, key=lambda entry: (*entry.key, entry.rows or 0))
    lines = ",\n".join("  " + json.dumps(_values(entry)) for entry in ordered)
    head = json.dumps({"format": FORMAT, "capability": capability, "made_with": dict(made_with)}, indent=1)
    text = f'{head.removesuffix("}").rstrip()},\n "entries": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _values(entry: Entry) -> dict[str, Any]:
    values = {**entry.key._asdict(), "rows": entry.rows, "config": entry.config._asdict()}
    return values if entry.us is None else {**values, "us": round(entry.us, 2)}


# ---------------------------------------------------------------------- what can be wrong with one
def _problem(values: Any, capability: int) -> str | None:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return f'it must be an object with "format": "{FORMAT}"'
    if values.get("capability") != capability:
        return f"it is for compute capability {values.get('capability')}, not {capability}"
    if not isinstance(values.get("entries"), list):
        return "it has no list of entries"
    return None


def _entry_problem(values: Any, kinds: Kinds) -> str | None:
    if not isinstance(values, dict):
        return "is not an object"
    if missing := sorted(_FIELDS - set(values)):
        return f"lacks {', '.join(missing)}"
    if unknown := sorted(set(values) - _FIELDS - _OPTIONAL):
        return f"has {', '.join(unknown)}, which no entry has"
    if values["kernel"] not in kinds:
        return f"kernel {values['kernel']!r} is not known; there are {', '.join(kinds)}"
    if not isinstance(values["paired"], bool):
        return f"paired is {values['paired']!r}, not true or false"
    for name in ("num_out", "num_in", "itemsize", "rows"):
        if values[name] is None and name == "rows":
            continue
        if not _is_count(values[name]):
            return f"{name} is {values[name]!r}, not a positive whole number"
    return _config_problem(values["config"], kinds[values["kernel"]])


def _config_problem(config: Any, kind: type) -> str | None:
    """Tiles and warps are powers of two: Triton refuses others in many words."""
    hints = get_type_hints(kind)
    defaults = getattr(kind, "_field_defaults", {})
    if not isinstance(config, dict):
        return "config is not an object"
    if missing := sorted(set(hints) - set(defaults) - set(config)):
        return f"config lacks {', '.join(missing)}"
    for name, value in config.items():
        if name not in hints:
            return f"config has {name}, which a {kind.__name__} has not"
        if hints[name] is bool:
            if not isinstance(value, bool):
                return f"{name} is {value!r}, not true or false"
        elif not _is_count(value):
            return f"{name} is {value!r}, not a positive whole number"
        elif (name.startswith("block_") or name == "num_warps") and value & (value - 1):
            return f"{name} is {value}, not a power of two"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
