"""JSON schemas: is this one that an answer can be held to? Pure; no native code. gbnf.py writes the grammar of the answers.

What an answer cannot be held to is refused, with a sentence for the schema's author, and not silently left out. Where a schema leaves a
choice, the grammar makes the narrower one, so that what it lets through is valid for any reader:

- properties come in the order of the schema; others only where ``additionalProperties`` asks for them, and never under a name that the
  schema has; a list goes on behind its ``prefixItems`` only where it has to or ``items`` says how;
- where no ``type`` is given, it is one of those that the other keywords speak of; ``oneOf`` is taken for ``anyOf``;
- strings hold no raw control character and no half of a surrogate pair; numbers have at most 15 digits before and behind the point;
- white space is at most one space, or one line break with its indentation, and none stands behind the whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from protocol import limits

ANY_OBJECT = '{"type":"object"}'
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
KINDS_OF = {  # keywords that speak of one kind of value only
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": BOUNDS,
}
RESTRICTING = frozenset(
    {"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"}.union(*(frozenset(keys) for keys in KINDS_OF.values()))
)
_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default examples deprecated readOnly writeOnly uniqueItems "
    "unevaluatedProperties unevaluatedItems".split()
)
_NO_PROMISE = (
    "not if then else contains minContains maxContains patternProperties propertyNames dependentRequired dependentSchemas dependencies "
    "multipleOf $dynamicRef $recursiveRef"
).split()
_QUANTIFIER = re.compile(r"\{(\d+)?(,)?(\d+)?\}")
VISITS_MAX = 20_000  # parts of a schema, references and combinations followed
DIGITS = 15  # every number of so many digits is the same in all languages
NUMBER_MAX = 10**DIGITS - 1


class NoSchema(ValueError):
    """The text is no usable schema; the message says why in a sentence for its author."""


class Contradiction(NoSchema):
    """No value fits; where there is a choice, the other options remain."""


# Checks


def parse(text: str) -> dict[str, Any]:
    """The schema. Raises NoSchema."""
    schema = _load(text)
    if not isinstance(schema, dict):
        raise NoSchema("a JSON schema is an object")
    _check_depth(schema)
    for part in _parts(schema):
        _check(part)
    _check_references(schema)
    return schema


def _load(text: str) -> Any:
    try:
        if len(text.encode()) > limits.SCHEMA_BYTES_MAX:
            raise NoSchema(f"the JSON schema is over {limits.SCHEMA_BYTES_MAX} bytes")
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except NoSchema:
        raise
    except RecursionError:
        raise NoSchema(f"the JSON schema is nested deeper than {limits.SCHEMA_DEPTH_MAX} levels") from None
    except ValueError:
        raise NoSchema("the JSON schema is no valid JSON") from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _check_depth(schema: object) -> None:
    """Without recursion: the input may be as deep as its size allows."""
    level: list[object] = [schema]
    for _ in range(limits.SCHEMA_DEPTH_MAX):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise NoSchema(f"the JSON schema is nested deeper than {limits.SCHEMA_DEPTH_MAX} levels")


def _children(item: object) -> list[object]:
    if isinstance(item, dict):
        return [value for value in item.values() if isinstance(value, dict | list)]
    return [value for value in item if isinstance(value, dict | list)] if isinstance(item, list) else []


def _parts(schema: object) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it. ``True`` and ``False`` are schemas too, which say nothing here."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise NoSchema("a part of the JSON schema that should be a schema is none")
    yield schema
    for key in _SCHEMAS_BY_NAME:
        named = schema.get(key, {})
        if not isinstance(named, dict):
            raise NoSchema(f"{key} in the JSON schema must be an object")
        for child in named.values():
            yield from _parts(child)
    for key in _SCHEMA_LISTS:
        listed = schema.get(key, [{}])
        if not isinstance(listed, list) or not listed:
            raise NoSchema(f"{key} in the JSON schema must be a list that is not empty")
        for child in listed if key in schema else ():
            yield from _parts(child)
    for key in _SCHEMAS:
        inner = schema.get(key, True)
        for child in inner if key == "items" and isinstance(inner, list) else [inner]:
            yield from _parts(child)


def _check(part: dict[str, Any]) -> None:
    kinds = part.get("type", ["null"])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not kinds or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
        raise NoSchema("a type in the JSON schema is unknown")
    for key in _NO_PROMISE:
        if key in part:
            raise NoSchema(f"{key} in the JSON schema is nothing that an answer can be held to; leave it out")
    if part and not part.keys() & (RESTRICTING | _ANNOTATIONS):
        raise NoSchema("the JSON schema has no type, properties, enum or reference")
    for key in _COUNTS:
        _check_count(key, part.get(key, 0))
    for key in BOUNDS:
        if isinstance(part.get(key, 0), bool) or not isinstance(part.get(key, 0), int | float):
            raise NoSchema(f"{key} in the JSON schema must be a number")
    _check_values(part)
    _check_pattern(part.get("pattern", ""))


def _check_values(part: dict[str, Any]) -> None:
    if not isinstance(part.get("enum", [0]), list) or not part.get("enum", [0]):
        raise NoSchema("enum in the JSON schema must be a list that is not empty")
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise NoSchema("required in the JSON schema must be a list of names")
    if part.get("uniqueItems", False) is not False:
        raise NoSchema("uniqueItems in the JSON schema is nothing that an answer can be held to; leave it out")
    for key in ("unevaluatedProperties", "unevaluatedItems"):
        if not isinstance(part.get(key, False), bool):
            raise NoSchema(f"{key} in the JSON schema can only be true or false here")


def _check_count(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NoSchema(f"{key} in the JSON schema must be a whole number")
    if value > limits.SCHEMA_REPETITIONS_MAX:
        raise NoSchema(f"{key} in the JSON schema may be at most {limits.SCHEMA_REPETITIONS_MAX}")


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise NoSchema("pattern in the JSON schema must be a text")
    for found in _QUANTIFIER.finditer(pattern):
        if any(len(number) > 9 or int(number) > limits.SCHEMA_REPETITIONS_MAX for number in found.group(1, 3) if number):
            raise NoSchema(f"a pattern in the JSON schema may repeat at most {limits.SCHEMA_REPETITIONS_MAX} times")


def _check_references(schema: dict[str, Any]) -> None:
    """A reference may lead to a place that no keyword does; what stands there is then a part of the schema too."""
    known: set[int] = set()
    waiting = [part["$ref"] for part in _parts(schema) if "$ref" in part]
    while waiting:
        pointer = waiting.pop()
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise NoSchema("a reference in the JSON schema must stay inside it and begin with #")
        found = target(schema, pointer)
        if id(found) in known:  # there are many ways to write one pointer
            continue
        known.add(id(found))
        for part in _parts(found):
            _check(part)
            if "$ref" in part:
                waiting.append(part["$ref"])


def target(schema: dict[str, Any], pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) such as ``#/$defs/name`` leads to."""
    place: Any = schema
    for step in pointer[1:].split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and name in place:
            place = place[name]
        elif isinstance(place, list) and name.isdecimal() and len(name) < 6 and int(name) < len(place):
            place = place[int(name)]
        else:
            raise NoSchema(f"a reference in the JSON schema leads nowhere: {pointer[:100]!r}")
    if pointer[1:2] not in ("", "/") or not isinstance(place, dict | bool):
        raise NoSchema(f"a reference in the JSON schema does not lead to a schema: {pointer[:100]!r}")
    return place
