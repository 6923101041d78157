"""Names of special tokens in what people say, kept apart from those that a template writes.

A template puts messages into a prompt, and only there are names made into tokens: so each name inside a message is put
between two marks first, and the prompt is cut at the marks. Knows neither templates nor ids.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmtool.errors import RequestError

# Unicode's noncharacters: never part of text, so they can mark a place in it
NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


class Fence:
    """Of one conversation and its template's options; ``names`` are those that must not become tokens."""

    def __init__(self, names: set[str], messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        """Raises RequestError where the texts leave no character to mark places with."""
        self._names = names
        self._begin, self._end = _unused_marks([*messages, options])

    def around(self, value: Any) -> Any:
        """The same message or option with each name between two marks.

        Only names are fenced: any other text reaches the tokenizer in one piece, as the model was trained.
        """
        if isinstance(value, str):
            return self._around_names(value)
        if isinstance(value, Mapping):
            if value.get("type") == "text" and isinstance(value.get("text"), str):
                return {**value, "text": self._around_end(self._around_names(value["text"]))}
            return {key: self.around(item) for key, item in value.items()}
        return [self.around(item) for item in value] if isinstance(value, list | tuple) else value

    def cut(self, prompt: str) -> Iterator[tuple[str, bool]]:
        """Its pieces in order, and whether the template wrote them (and people what has no names)."""
        begin, end = self._begin, self._end
        for i, piece in enumerate(re.split(f"{begin}([^{begin}{end}]*){end}", prompt)):
            # a template that cuts a message in the middle of a fence leaves one mark, and no whole name
            yield piece.replace(begin, "").replace(end, ""), i % 2 == 0

    def _around_names(self, text: str) -> str:
        found = [name for name in self._names if name in text]
        if not found:
            return text
        pattern = "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))
        return re.sub(pattern, lambda match: self._begin + match[0] + self._end, text)

    def _around_end(self, text: str) -> str:
        """Templates put parts of a message side by side: one may end with the beginning of a name, the next go on."""
        sizes = range(max(map(len, self._names), default=1) - 1, 0, -1)
        for size in sizes:
            if any(len(name) > size and text.endswith(name[:size]) for name in self._names):
                return text[:-size] + self._begin + text[-size:] + self._end
        return text


def _strings(value: Any) -> list[str]:
    """Every text inside a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _unused_marks(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    used = set().union(*(set(text) for message in messages for text in _strings(message)))
    free = [mark for mark in NONCHARACTERS if mark not in used]
    if len(free) < 2:
        raise RequestError("the messages use every Unicode noncharacter", "take out U+FDD0 to U+FDEF")
    return free[0], free[1]
