"""The grammar of an answer that may or must call functions: xgrammar's structural tags, as `response_format` takes
them (https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmtool.server.tools_format import ToolFormat
from lmtool.tokenizer import Tokenizer

Grammar = dict[str, Any]
_ANY_OBJECT = {"type": "object", "additionalProperties": True}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
MOST_WHITESPACE = 20  # in a row: a model that is not sure would go on with it


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], form: ToolFormat, tokenizer: Tokenizer, *, required: bool, parallel: bool
) -> Grammar | None:
    """Free text until a call begins, or, ``required``, nothing but calls; arguments by their schema.

    ``strict: false`` of a tool lets its arguments be any object; one without parameters takes none. The result is None
    where free text could not be told from a call by its first letters (Llama 3's bare objects).
    """
    if form.bare and not required:
        return None
    calls = [_call(tool["function"], form) for tool in tools]
    inside = calls[0] if len(calls) == 1 else {"type": "or", "elements": calls}
    if form.between is not None and parallel:
        inside = _sequence(inside, {"type": "star", "content": _sequence(_text(form.between), inside)})
    if form.bare:
        return _whole(inside)
    begin = [_marker(text, tokenizer) for text in form.begin]
    end = [_marker(text, tokenizer) for text in form.end]
    space = form.padding if end else ""
    last = end.pop() if end else _text(form.closing)
    content = _sequence(*begin[1:], _text(form.padding + form.opening), inside, _text(space), *end)
    tag = {"type": "tag", "begin": _edge(begin[0]), "content": content, "end": _edge(last)}
    once = not parallel or form.between is not None
    several = {"tags": [tag], "at_least_one": required, "stop_after_first": once}
    if required:
        return _whole({"type": "tags_with_separator", "separator": space, **several})
    if begin[0]["type"] == "token":
        return _whole({"type": "token_triggered_tags", "trigger_tokens": [begin[0]["token"]], **several})
    return _whole({"type": "triggered_tags", "triggers": [begin[0]["value"]], **several})


def _call(function: Mapping[str, Any], form: ToolFormat) -> Grammar:
    schema = _ANY_OBJECT if function.get("strict") is False else function.get("parameters") or _NO_ARGUMENTS
    begin = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
    arguments = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MOST_WHITESPACE}
    return _sequence(_text(begin), arguments, _text("}"))


def _whole(inner: Grammar) -> Grammar:
    return {"type": "structural_tag", "format": inner}


def _text(value: str) -> Grammar:
    return {"type": "const_string", "value": value}


def _marker(text: str, tokenizer: Tokenizer) -> Grammar:
    """A special token has no text in a grammar: it is meant by its id."""
    token_id = tokenizer.token_id(text)
    special = token_id is not None and tokenizer.is_special(token_id)
    return {"type": "token", "token": token_id} if special else _text(text)


def _edge(marker: Grammar) -> Any:
    """As a tag's begin and end want it."""
    return marker if marker["type"] == "token" else marker["value"]


def _sequence(*elements: Grammar) -> Grammar:
    """Without texts that are empty."""
    found = [one for one in elements if one.get("value") != ""]
    return found[0] if len(found) == 1 else {"type": "sequence", "elements": found}
