"""pydantic's findings about a body, as one refusal that names the field as OpenAI does: messages[0].content."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError

from lmtool.server.errors import Refusal
from lmtool.server.protocol import SENTENCES

_MOST_CHARS = 80  # of what a client sent that are told back
_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt}",
    "string_too_short": "at least {min_length} characters",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "literal_error": "{expected}",
}


def of_validation(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong."""
    found = _meant([_at_its_type(one) for one in error.errors()], error.body)
    one = found[0]
    kind = one["type"]
    if kind == "value_error":  # of a validator of ours
        return Refusal(400, str(one["ctx"]["error"]))
    path = _path(one, error.body)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    what = param[:_MOST_CHARS] or "the body"
    sentence = SENTENCES.get(_name(path, one))
    if sentence:
        cause = what + (_value(one) if kind == "literal_error" else " is not taken")
        return Refusal(400, cause, sentence, param=param)
    if kind == "extra_forbidden":
        return Refusal(400, f"there is no field {what}", "leave it out; /docs lists the fields", param=param)
    if kind == "missing":
        return Refusal(400, f"{what} is missing", "give it", param=param or None)
    wanted = " or ".join(dict.fromkeys(_wanted(other) for other in found))
    return Refusal(400, what + _value(one), f"give {wanted}", param=param or None)


def _at_its_type(found: Any) -> Any:
    """What is wrong with an object whose type says its kind is wrong with its type."""
    if found["type"] == "union_tag_not_found":
        return {**found, "type": "missing", "loc": (*found["loc"], "type")}
    if found["type"] == "union_tag_invalid":
        context = {"expected": found["ctx"]["expected_tags"].replace(", ", " or ")}
        loc, given = (*found["loc"], "type"), found["ctx"]["tag"]
        return {**found, "type": "literal_error", "loc": loc, "input": given, "ctx": context}
    return found


def _meant(errors: Sequence[Any], body: Any) -> list[Any]:
    """Of a value that may be of several kinds, each kind complains: those that read furthest meant it, and among them
    those that it is one of."""
    same = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    depth = max(len(_path(one, body)) for one in same)
    deepest = [one for one in same if len(_path(one, body)) == depth]
    return [one for one in deepest if one["type"] not in _KINDS] or deepest


def _path(found: Any, body: Any) -> list[str | int]:
    """Where in the body it is. pydantic's loc also names the kinds of a union, which are nowhere."""
    path: list[str | int] = []
    loc = found["loc"][1:]
    for i, part in enumerate(loc):
        missing = found["type"] == "missing" and i == len(loc) - 1
        if isinstance(body, dict) and i and isinstance(loc[i - 1], int) and part == body.get("type"):
            continue  # the kind of an object in a list, and not a field of the same name
        if isinstance(body, dict) and isinstance(part, str) and (part in body or missing):
            body = body.get(part)
            path.append(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
            path.append(part)
    return path


def _name(path: Sequence[str | int], found: Any) -> str:
    """The field; of one that says the kind of an object, the kind that was given."""
    last = str(path[-1]) if path else ""
    return str(found["input"]) if last == "type" else last


def _value(found: Any) -> str:
    """What was sent, where that is short."""
    value = found["input"]
    if isinstance(value, list):
        return f" has {len(value)} items" if found["type"] in ("too_short", "too_long") else " is a list"
    if isinstance(value, dict):
        return " is an object"
    shown = msgspec.json.encode(value).decode()
    return f" is {shown}" if len(shown) <= _MOST_CHARS else " is not that"


def _wanted(found: Any) -> str:
    kind, known = found["type"], found.get("ctx", {})
    if kind in _BOUNDS:
        return _BOUNDS[kind].format(**known)
    return _KINDS.get(kind) or re.sub(r"^Input should be (a )?", "", found["msg"])
