"""`response_format` as it is written: what each form means, and what is refused by name before anything is compiled."""

import json
from typing import Any

import pytest

from lmtool.config import GenerationConfig
from lmtool.engine.grammar_source import MAX_BYTES, MAX_DEPTH, MAX_PROPERTIES, GrammarSource, grammar_source
from lmtool.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def with_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def test_each_form() -> None:
    assert grammar_source({"type": "text"}) is None
    closed = grammar_source(with_schema(SCHEMA, description="what is wanted", strict=True))
    assert closed == GrammarSource("schema", json.dumps(SCHEMA))
    assert grammar_source(with_schema(SCHEMA)) == closed
    assert grammar_source(with_schema(SCHEMA, strict=False)) == GrammarSource(
        "schema", json.dumps(SCHEMA), closed=False
    )
    assert grammar_source({"type": "regex_schema", "regex_schema": "a+"}) == GrammarSource("regex", "a+")
    assert grammar_source({"type": "grammar", "grammar": "root ::= x"}) == GrammarSource("ebnf", "root ::= x")
    choice = grammar_source({"type": "choice", "choice": ["yes", 'a "b"\\\n', "é"]})
    assert choice == GrammarSource("ebnf", 'root ::= "yes" | "a \\"b\\"\\\\\\u000a" | "é"')
    tag = grammar_source({"type": "structural_tag", "format": {"type": "any_text"}})
    assert tag == GrammarSource("tag", '{"type": "structural_tag", "format": {"type": "any_text"}}')
    whatever = grammar_source({"type": "json_object"})
    assert whatever is not None
    assert json.loads(whatever.text)["type"] == "object"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "type is None; give text, json_object"),
        ({"type": ["json_object"]}, r"type is \['json_object'\]; give text"),
        ({"type": "xml"}, "type is 'xml'"),
        ({"type": "json_object", "schema": {}}, "'schema' is not known here; give type"),
        ({"type": "json_schema"}, "json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema is missing; give a JSON schema"),
        (with_schema("{}"), "json_schema.schema is a text"),
        (with_schema({}, strict="yes"), "json_schema.strict is a text; give true or false"),
        (with_schema({}, schemas={}), "json_schema: 'schemas' is not known here"),
        (with_schema({"maximum": float("nan")}), "is not JSON"),
        (with_schema({"const": {1, 2}}), "is not JSON"),
        ({"type": "regex_schema", "regex_schema": ""}, "regex_schema is empty"),
        ({"type": "regex_schema", "regex_schema": 3}, "regex_schema is a number"),
        ({"type": "choice", "choice": "yes"}, "choice is a text; give a list of texts"),
        ({"type": "choice", "choice": []}, "choice is empty"),
        ({"type": "choice", "choice": ["a", 1]}, "choice has something else than texts"),
        ({"type": "grammar"}, "grammar is missing"),
        ({"type": "structural_tag", "format": []}, "format is empty"),
        (with_schema(deep(MAX_DEPTH)), "nested more than 100 levels deep; make it flatter"),
        (with_schema(deep(20_000)), "nested more than 100 levels deep"),
        (with_schema({"enum": ["x" * 100] * 2000}), f"bytes; give at most {MAX_BYTES}"),
        (with_schema({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}), "names 2001 properties"),
        ({"type": "grammar", "grammar": "a" * (MAX_BYTES + 1)}, "is 131073 bytes"),
    ],
)
def test_what_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        grammar_source(given)
    assert str(caught.value).startswith("response_format")
    assert "\n" not in str(caught.value)


INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "array", "items": INTEGER, "uniqueItems": True},
            "uniqueItems cannot be promised; leave uniqueItems out",
        ),
        ({"type": "array", "contains": {"const": 5}}, "contains cannot be promised"),
        ({"type": "integer", "not": {"const": 3}}, "not cannot be promised"),
        ({"if": {"const": 3}, "then": {"const": 4}}, "if cannot be promised"),
        ({"properties": {"a": {"dependentRequired": {"a": ["b"]}}}}, "dependentRequired cannot be promised"),
        ({"$ref": "http://example.com/x.json"}, "is not in the schema; give its content under"),
        ({"type": "string", "pattern": "a*", "maxLength": 3}, "pattern and a length cannot be promised together"),
        ({"allOf": [INTEGER, {"minimum": 3}]}, "allOf of several schemas"),
        ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": INTEGER}}, r"minimum beside \$ref cannot be promised"),
        ({"type": "object", "anyOf": [{"required": []}]}, "type beside anyOf cannot be promised"),
        ({"items": {"anyOf": [{"required": ["z"]}]}}, "'z' is required and no property; add it to properties"),
        ({"prefixItems": [{"additionalProperties": {"not": {}}}]}, "not cannot be promised"),
    ],
)
def test_what_a_grammar_cannot_promise_is_refused_unless_it_need_not(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        grammar_source(with_schema(schema))
    assert str(caught.value).endswith("or give strict: false")
    loose = grammar_source(with_schema(schema, strict=False))
    assert loose is not None
    assert not loose.closed


def test_names_and_values_are_no_keywords() -> None:
    schema = {
        "type": "object",
        "title": "if",
        "properties": {"not": INTEGER, "contains": {"enum": [{"uniqueItems": True}]}, "if": {"uniqueItems": False}},
        "required": ["not", "if"],
        "$defs": {"required": {"description": "of no use", "$ref": "#/properties/not"}},
    }
    assert grammar_source(with_schema(schema)) is not None


def test_the_bounds_themselves_are_allowed() -> None:
    assert grammar_source(with_schema(deep(MAX_DEPTH - 1))) is not None
    assert grammar_source(with_schema({"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES)}})) is not None
    assert grammar_source({"type": "grammar", "grammar": "a" * MAX_BYTES}) is not None


def test_a_config_takes_a_mapping_only() -> None:
    assert GenerationConfig(response_format={"type": "json_object"}).response_format == {"type": "json_object"}
    with pytest.raises(RequestError, match="--response-format is 'json'; give a mapping with a type or None"):
        GenerationConfig(response_format="json")  # type: ignore[arg-type]
