"""`response_format` → the grammar that an answer must follow, as a text for xgrammar. Knows neither it nor tokens.

Spelled as OpenAI and LMDeploy do: {"type": "json_schema", "json_schema": {"name": …, "schema": {…}, "strict": …}},
{"type": "json_object"}, {"type": "regex_schema", "regex_schema": "…"}, {"type": "choice", "choice": ["…", …]},
{"type": "grammar", "grammar": "…"} (GBNF), {"type": "structural_tag", "format": {…}} (xgrammar's: text with such parts
in it, as calls of tools are) and {"type": "text"}: nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lmtool.engine.grammar_schema import check_schema
from lmtool.errors import RequestError

MAX_BYTES = 128 * 1024
MAX_DEPTH = 100  # of JSON, in which one more object in an object is two levels
MAX_PROPERTIES = 2000
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """kind: 'schema', 'regex', 'ebnf' or 'tag'. closed: an object has no properties but those that its schema names."""

    kind: str
    text: str
    closed: bool = True


def grammar_source(response_format: Mapping[str, Any]) -> GrammarSource | None:
    """None: free text. Raises RequestError for what is malformed or larger than the bounds above."""
    kind = response_format.get("type")
    if not isinstance(kind, str) or kind not in _MAKERS:
        _refuse(f"type is {kind!r}", "give " + ", ".join(_MAKERS))
    field = "format" if kind == "structural_tag" else kind
    content = response_format.get(field)
    allowed = {"type"} if kind in ("text", "json_object") else {"type", field}
    _check_names(response_format, allowed, "")
    source = _MAKERS[kind](content)
    if source is not None and len(source.text.encode()) > MAX_BYTES:
        _refuse(f"is {len(source.text.encode())} bytes", f"give at most {MAX_BYTES}")
    return source


def _refuse(cause: str, fix: str) -> NoReturn:
    raise RequestError(f"response_format: {cause}", fix)


def _check_names(given: Mapping[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(str(name) for name in given if name not in allowed)
    if unknown:
        _refuse(f"{where}{unknown[0]!r} is not known here", "give " + ", ".join(sorted(allowed)))


def _schema(content: Any) -> GrammarSource:
    if not isinstance(content, Mapping):
        _refuse("json_schema is missing", 'give {"type": "json_schema", "json_schema": {"schema": {…}}}')
    _check_names(content, _SCHEMA_FIELDS, "json_schema: ")
    schema, strict = content.get("schema"), content.get("strict")
    if not isinstance(schema, Mapping):
        _refuse(f"json_schema.schema is {_kind_of(schema)}", "give a JSON schema, an object")
    if strict is not None and not isinstance(strict, bool):
        _refuse(f"json_schema.strict is {_kind_of(strict)}", "give true or false")
    text = _json(schema)
    if strict is not False:
        check_schema(schema)
    return GrammarSource("schema", text, closed=strict is not False)


def _tag(content: Any) -> GrammarSource:
    if not isinstance(content, Mapping):
        _refuse(f"format is {_kind_of(content)}", "give an object, as xgrammar's structural tags have it")
    return GrammarSource("tag", _json({"type": "structural_tag", "format": content}))


def _text(kind: str, name: str) -> Callable[[Any], GrammarSource]:
    def made(content: Any) -> GrammarSource:
        if not isinstance(content, str) or not content:
            _refuse(f"{name} is {_kind_of(content)}", "give a text that is not empty")
        return GrammarSource(kind, content)

    return made


def _choice(content: Any) -> GrammarSource:
    if not isinstance(content, list | tuple) or not content:
        _refuse(f"choice is {_kind_of(content)}", "give a list of texts")
    if not all(isinstance(text, str) and text for text in content):
        _refuse("choice has something else than texts in it", "give texts that are not empty")
    return GrammarSource("ebnf", "root ::= " + " | ".join(map(_literal, content)))


def _literal(text: str) -> str:
    """A text in GBNF."""
    escaped = (
        f"\\u{ord(letter):04x}" if ord(letter) < 32 or ord(letter) == 127 else "\\" * (letter in '"\\') + letter
        for letter in text
    )
    return '"' + "".join(escaped) + '"'


def _json(value: Any) -> str:
    """As JSON, where it is neither too deep nor too large."""
    _check_size(value)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"response_format is not JSON: {error}", "give plain JSON values") from None


def _check_size(value: Any) -> None:
    """Without recursion: what is too deep must not end in Python's own error."""
    num_properties = 0
    level, depth = [value], 0  # level: what holds others, so deep
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            _refuse(f"is nested more than {MAX_DEPTH} levels deep", "make it flatter")
        below: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                properties = item.get("properties")
                num_properties += len(properties) if isinstance(properties, Mapping) else 0
                below += item.values()
            else:
                below += item
        level = [item for item in below if isinstance(item, Mapping | list | tuple)]
    if num_properties > MAX_PROPERTIES:
        _refuse(f"names {num_properties} properties", f"give at most {MAX_PROPERTIES}")


def _kind_of(value: Any) -> str:
    names = {type(None): "missing", str: "a text", dict: "an object", list: "a list", bool: "true or false"}
    return "empty" if value in ("", []) else names.get(type(value), "a number")


_MAKERS: dict[str, Callable[[Any], GrammarSource | None]] = {
    "text": lambda _: None,
    "json_object": lambda _: GrammarSource("schema", '{"type": "object", "additionalProperties": true}'),
    "json_schema": _schema,
    "regex_schema": _text("regex", "regex_schema"),
    "choice": _choice,
    "grammar": _text("ebnf", "grammar"),
    "structural_tag": _tag,
}
