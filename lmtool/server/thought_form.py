"""The form of an answer whose thought the chat template has begun: the thought comes first, and is free."""

from collections.abc import Mapping
from typing import Any

from lmtool.server.tools_grammar import MOST_WHITESPACE
from lmtool.tokenizer.thinking import CLOSE

Form = Mapping[str, Any]  # as `GenerationConfig.response_format` has it
_FREE = ("triggered_tags", "token_triggered_tags")  # kinds of structural tags that begin with free text as they are


def after_thought(form: Form | None) -> Form | None:
    """The same form behind a thought. What is free, or malformed, stays as it is: the latter is refused elsewhere."""
    inner = None if form is None else _tag_of(form)
    if inner is None or inner.get("type") in _FREE:
        return form
    thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": CLOSE}
    gap = {"type": "regex", "pattern": r"\n{0,2}"}
    return {"type": "structural_tag", "format": {"type": "sequence", "elements": [thought, gap, inner]}}


def _tag_of(form: Form) -> Form | None:
    """As a part of one of xgrammar's structural tags."""
    match form:
        case {"type": "json_object"}:
            return _json({"type": "object", "additionalProperties": True})
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            return _json(schema)
        case {"type": "regex_schema", "regex_schema": str(pattern)}:
            return {"type": "regex", "pattern": pattern}
        case {"type": "grammar", "grammar": str(grammar)}:
            return {"type": "grammar", "grammar": grammar}
        case {"type": "choice", "choice": [_, *_] as texts}:
            return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}
        case {"type": "structural_tag", "format": Mapping() as inner}:
            return inner
    return None


def _json(schema: Form) -> Form:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MOST_WHITESPACE}
