"""The conversation as data: a system prompt and turns; saved to and loaded from a JSON file.

Knows neither terminal, engine nor templates.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmtool.chat.backend import Message
from lmtool.chat.pictures import Picture, content
from lmtool.errors import InputError

FORMAT = "lmtool-chat"
VERSION = 2  # 1: without pictures
OLDEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user said, with which pictures, and what the model answered; ``partial`` when the answer was stopped."""

    user: str
    assistant: str
    partial: bool = False
    pictures: tuple[Picture, ...] = ()


@dataclass(slots=True)
class Session:
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str | None = None, pictures: tuple[Picture, ...] = ()) -> list[Message]:
        """The conversation as chat messages, with a new question behind it."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            messages.append({"role": "user", "content": content(turn.user, turn.pictures)})
            messages.append({"role": "assistant", "content": turn.assistant})
        if question is not None:
            messages.append({"role": "user", "content": content(question, pictures)})
        return messages

    def undo(self) -> Turn:
        """Take the last turn off and return it."""
        if not self.turns:
            raise InputError("there is no turn to take back", "ask something first")
        return self.turns.pop()

    def drop_oldest(self, num_turns: int) -> None:
        del self.turns[:num_turns]

    def clear(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns.clear()

    def save(self, path: Path, **notes: str) -> None:
        """Write the conversation whole, or not at all. ``notes`` (such as the model) are kept beside it.

        Raises InputError when the file cannot be written or is something other than a saved chat.
        """
        if path.exists():
            _read(path)  # /save must not destroy a file that is no chat
        has_pictures = any(turn.pictures for turn in self.turns)
        version = VERSION if has_pictures else OLDEST_VERSION
        turns = [_plain(turn) for turn in self.turns]
        data = {"format": FORMAT, "version": version, **notes, "system": self.system, "turns": turns}
        try:
            _write_whole(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}", "choose a folder you may write to") from error

    @classmethod
    def load(cls, path: Path) -> "Session":
        """Read a saved chat. Raises InputError, naming the first thing in the file that is wrong."""
        data = _read(path)
        known = data.get("version") in range(OLDEST_VERSION, VERSION + 1)
        _want(path, known, "version", f"not {OLDEST_VERSION} to {VERSION}; it needs another lmtool")
        system = data.get("system")
        _want(path, system is None or isinstance(system, str), "system", "neither text nor null")
        turns = data.get("turns")
        _want(path, isinstance(turns, list), "turns", "not a list")
        return cls(system, [_turn(path, index, turn) for index, turn in enumerate(turns or [])])


def _turn(path: Path, index: int, data: object) -> Turn:
    where = f"turns[{index}]"
    if not isinstance(data, dict):
        raise _bad(path, where, "not an object")
    for name in ("user", "assistant"):
        _want(path, isinstance(data.get(name), str), f"{where}.{name}", "missing or not text")
    partial = data.get("partial", False)
    _want(path, isinstance(partial, bool), f"{where}.partial", "neither true nor false")
    pictures = data.get("pictures", [])
    _want(path, isinstance(pictures, list), f"{where}.pictures", "not a list")
    found = tuple(_picture(path, f"{where}.pictures[{i}]", one) for i, one in enumerate(pictures))
    return Turn(data["user"], data["assistant"], partial, found)


def _picture(path: Path, where: str, data: object) -> Picture:
    if not isinstance(data, dict):
        raise _bad(path, where, "not an object")
    name, url, width, height = (data.get(key) for key in ("name", "url", "width", "height"))
    _want(path, isinstance(name, str), f"{where}.name", "missing or not text")
    _want(path, isinstance(url, str) and url.startswith("data:image/"), f"{where}.url", "no data URL of a picture")
    for key, pixels in (("width", width), ("height", height)):
        _want(path, isinstance(pixels, int) and pixels > 0, f"{where}.{key}", "missing or no number of pixels")
    return Picture(**{key: data[key] for key in ("name", "url", "width", "height")})


def _plain(turn: Turn) -> dict[str, Any]:
    """Without what it does not have: whoever knows no pictures reads conversations that have none."""
    plain = asdict(turn)
    return plain if turn.pictures else {key: value for key, value in plain.items() if key != "pictures"}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "give a file that /save wrote") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a saved chat: it is not JSON", "choose another file") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path} is not a saved chat", "choose another file")
    return data


def _want(path: Path, ok: bool, where: str, problem: str) -> None:
    if not ok:
        raise _bad(path, where, problem)


def _bad(path: Path, where: str, problem: str) -> InputError:
    return InputError(f"{path}: {where} is {problem}", "mend the file or choose another")


def _write_whole(path: Path, text: str) -> None:
    """Through a temporary file beside it and a rename: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
