"""An answer's text as it arrives, told apart into content and calls of functions. Knows neither HTTP nor tokens."""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from lmtool.server.tools_format import ToolFormat
from lmtool.server.tools_scanner import CallScanner


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call, as OpenAI streams it: ``id`` and ``name`` with the first piece of call ``index``, then more
    text of its arguments, which all together are a JSON object."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Piece = str | CallDelta  # content, or a piece of a call


class _State(Enum):
    START = auto()  # nothing but whitespace has come
    TEXT = auto()
    BLOCK = auto()  # behind a begin marker, or behind a call
    CALL = auto()


class ToolReader:
    """Feed pieces of text; get content and calls back, the same ones however the text is cut.

    Nothing that may still become a marker is let through. What looks like a call and is none (no JSON, another name
    than ``names``, more than one where ``parallel`` is off) comes out as content, as it was written. Whitespace
    before a call, and an answer's last beside calls, is nobody's content.

    streams: a grammar sees to it that calls are well-formed, so arguments are given as they arrive; a call that the
    end of the answer cuts is then left incomplete. Else a call is given when it is whole.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, parallel: bool = True, streams: bool = False):
        self.num_calls = 0
        self._format = form
        self._names = names
        self._parallel = parallel and form.several
        self._streams = streams
        self._state = _State.START
        self._held = ""  # not yet understood
        self._block = ""  # of the block, since it began or since its last call
        self._calls_in_block = 0
        self._scan = CallScanner()
        self._given: int | None = None  # characters of the arguments that were given, once the call was announced

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, when nothing more comes."""
        rest, self._held = self._held, ""
        if self._state is _State.CALL:
            if self._given is not None:
                return []
            rest = self._block + self._scan.text + rest
        elif self._state is _State.BLOCK:
            cut_end = self._calls_in_block > 0 and self._format.end_text.startswith(rest)
            rest = "" if cut_end else self._block + rest
        self._state = _State.TEXT
        return [rest] if rest and not (self.num_calls and rest.isspace()) else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Understand some of what is held; False where more is needed."""
        if not self._held:
            return False
        match self._state:
            case _State.START:
                return self._start()
            case _State.TEXT:
                return self._text(pieces)
            case _State.BLOCK:
                return self._in_block(pieces)
            case _State.CALL:
                return self._in_call(pieces)

    def _start(self) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        self._state = _State.TEXT
        if self._format.bare and text.startswith("{"):
            self._begin_block(len(self._held) - len(text), 0)
        return True

    def _text(self, pieces: list[Piece]) -> bool:
        marker = self._format.begin_text
        found = self._held.find(marker)
        end = found if found >= 0 else len(self._held) - _overlap(self._held, marker)
        content = self._held[:end].rstrip()
        if content:
            pieces.append(content)
            self._held = self._held[len(content) :]
        if found >= 0:
            self._begin_block(found - len(content), len(marker))
        return found >= 0

    def _begin_block(self, num_space: int, num_marker: int) -> None:
        self._block, self._held = self._held[: num_space + num_marker], self._held[num_space + num_marker :]
        self._calls_in_block = 0
        self._state = _State.BLOCK

    # ------------------------------------------------------------------ in a block
    def _in_block(self, pieces: list[Piece]) -> bool:
        form = self._format
        letter = self._held[0]
        if letter == "{" and (not self._calls_in_block or form.between is not None):
            self._state, self._scan, self._given = _State.CALL, CallScanner(), None
            return True
        opens = letter == form.opening and self._block.strip() == form.begin_text
        separates = form.between is not None and self._calls_in_block > 0 and letter == form.between.strip()
        if letter.isspace() or opens or separates:
            return self._skip(1)
        for end in (form.closing, form.end_text):
            if end and self._calls_in_block and self._held.startswith(end):
                self._held = self._held[len(end) :]
                self._block, self._state = "", _State.TEXT
                return True
            if end and self._calls_in_block and end.startswith(self._held):
                return False
        self._leave(pieces, "")
        return True

    def _skip(self, num_chars: int) -> bool:
        self._block += self._held[:num_chars]
        self._held = self._held[num_chars:]
        return True

    def _in_call(self, pieces: list[Piece]) -> bool:
        self._held = self._held[self._scan.push(self._held) :]
        if self._scan.bad:
            self._leave(pieces, self._scan.text)
        elif self._scan.complete:
            self._end_call(pieces)
        elif self._streams and self._may_call(self._scan.name):
            self._give(pieces, self._scan.name, "")
        return bool(self._held)

    def _end_call(self, pieces: list[Piece]) -> None:
        name = self._scan.called()
        if name is None or not self._may_call(name):
            self._leave(pieces, self._scan.text)
            return
        self._give(pieces, name, "{}")
        self.num_calls += 1
        self._calls_in_block += 1
        self._block, self._state = "", _State.BLOCK

    def _may_call(self, name: str | None) -> bool:
        return name in self._names and (self._parallel or not self.num_calls)

    def _give(self, pieces: list[Piece], name: str | None, if_none: str) -> None:
        """The part of the call's arguments that is new; ``if_none`` where it has none."""
        new = self._scan.arguments_from(self._given or 0) or ("" if self._given else if_none)
        if self._given is None:
            pieces.append(CallDelta(self.num_calls, new, self._new_id(), name))
        elif new:
            pieces.append(CallDelta(self.num_calls, new))
        self._given = (self._given or 0) + len(new)

    def _leave(self, pieces: list[Piece], text: str) -> None:
        """It was no call: what was held for one is content, and is not searched again."""
        content = self._block + text
        if content and not (self._calls_in_block and content.isspace()):
            pieces.append(content)
        self._block, self._state = "", _State.TEXT

    def _new_id(self) -> str:
        return secrets.token_hex(5)[:9] if self._format.short_ids else f"call_{secrets.token_hex(12)}"


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters could be the beginning of the marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
