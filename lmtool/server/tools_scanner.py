"""The JSON object that is a call of a function, while it is being written. Knows no markers around it."""

import json
from typing import NoReturn

_FIELDS = ("name", "arguments", "parameters", "id", "type")  # that a call's object may have


class CallScanner:
    """One JSON object with a name and arguments, letter by letter; says where it ends and what its fields are so far.

    It is no check of JSON: `called` is, once the object is `complete`. bad: it cannot become a call.
    """

    def __init__(self) -> None:
        self.bad = False
        self.complete = False
        self.name: str | None = None
        self._letters: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._string_start = 0
        self._key: str | None = None  # of the member whose value is being read
        self._keys: set[str] = set()
        self._arguments: tuple[int, int | None] | None = None  # where they begin and end

    @property
    def text(self) -> str:
        return "".join(self._letters)

    def arguments_from(self, start: int) -> str:
        """What is there of the arguments, as they were written, without their first characters."""
        if self._arguments is None:
            return ""
        first, last = self._arguments
        return "".join(self._letters[first + start : last])

    def push(self, text: str) -> int:
        """How many characters belong to the object, or were read until it turned out to be none."""
        for count, letter in enumerate(text, 1):
            self._take(letter)
            if self.bad or self.complete:
                return count
        return len(text)

    def called(self) -> str | None:
        """The function's name; None where the object is no call."""
        try:
            whole = json.loads(self.text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        arguments = whole.get("arguments", whole.get("parameters", {}))
        return whole["name"] if isinstance(whole.get("name"), str) and isinstance(arguments, dict) else None

    def _take(self, letter: str) -> None:
        position = len(self._letters)
        self._letters.append(letter)
        if self._in_string:
            if self._escaped or letter == "\\":
                self._escaped = not self._escaped
            elif letter == '"':
                self._in_string = False
                self._end_string(position)
        elif letter == '"':
            self._in_string, self._string_start = True, position
        elif letter in "{[":
            self._depth += 1
            if self._depth == 2 and self._key in ("arguments", "parameters"):
                self._arguments = (position, None)
        elif letter in "}]":
            self._depth -= 1
            self.complete = self._depth == 0
            if self._depth == 1 and self._key in ("arguments", "parameters") and self._arguments is not None:
                self._arguments = (self._arguments[0], position + 1)
        elif letter == "," and self._depth == 1:
            self._key = None

    def _end_string(self, position: int) -> None:
        """A string directly in the object is a field's name, or "name"'s value."""
        if self._depth != 1 or (self._key is not None and self._key != "name"):
            return
        try:
            string = json.loads("".join(self._letters[self._string_start : position + 1]))
        except ValueError:
            self.bad = True
            return
        if self._key == "name":
            self.name = string
            return
        one_too_many = {"arguments", "parameters"} <= {string, *self._keys}
        self.bad = string not in _FIELDS or string in self._keys or one_too_many
        self._key = string
        self._keys.add(string)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
