"""What a JSON schema asks for and a grammar cannot promise: refused by name, because xgrammar ignores it.

Each rule was tried with xgrammar 0.2.8: it lets an answer through that the schema does not. Annotations (title, format
of an unknown name, …) promise nothing by the standard (JSON Schema 2020-12) and stay.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lmtool.errors import RequestError

_IGNORED = (
    "uniqueItems",
    "contains",
    "not",
    "if",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "$dynamicRef",
    "$recursiveRef",
)
_BRANCHES = ("anyOf", "oneOf", "allOf")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_ONE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
# they say something of the value: beside a $ref or branches they are not looked at
_ASSERTIONS = (
    {"type", "enum", "const", "multipleOf", "maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum"}
    | {"maxLength", "minLength", "pattern", "items", "prefixItems", "maxItems", "minItems", "required", "properties"}
    | {"patternProperties", "additionalProperties", "minProperties", "maxProperties", "propertyNames"}
)


def check_schema(schema: Any) -> None:
    """Raises RequestError for what an answer would not be held to. The schema has been checked to be of finite size."""
    todo = [schema]
    while todo:
        one = todo.pop()
        if isinstance(one, Mapping):
            _check(one)
            todo += _parts(one)


def _parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in _OF_NAMES:
        named = schema.get(name)
        yield from named.values() if isinstance(named, Mapping) else ()
    for name in (*_BRANCHES, "prefixItems"):
        listed = schema.get(name)
        yield from listed if isinstance(listed, list | tuple) else ()
    for name in _OF_ONE:
        yield schema.get(name)


def _check(schema: Mapping[str, Any]) -> None:
    for name in _IGNORED:
        if schema.get(name, False) is not False:
            _refuse(f"{name} cannot be promised", f"leave {name} out")
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        _refuse(f"$ref {reference!r} is not in the schema", "give its content under $defs")
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        _refuse("pattern and a length cannot be promised together", "put the length into the pattern")
    if len(schema.get("allOf") or ()) > 1:
        _refuse("allOf of several schemas cannot be promised", "write them as one schema")
    for name in ("$ref", *_BRANCHES):
        beside = sorted(_ASSERTIONS & schema.keys()) if name in schema else []
        if beside:
            _refuse(f"{beside[0]} beside {name} cannot be promised", f"put {beside[0]} into what {name} names")
    _check_required(schema)


def _check_required(schema: Mapping[str, Any]) -> None:
    required, properties = schema.get("required"), schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    missing = [name for name in required if name not in known] if isinstance(required, list | tuple) else []
    if missing:
        _refuse(f"{missing[0]!r} is required and no property", "add it to properties")


def _refuse(cause: str, fix: str) -> None:
    raise RequestError(f"response_format: {cause}", f"{fix}, or give strict: false")
