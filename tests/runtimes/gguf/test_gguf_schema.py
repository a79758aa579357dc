"""Which schemas are taken, what the others are told, and which texts the grammars let through: asked of llama.cpp's own parser."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from protocol import limits
from runtimes.gguf.gbnf import gbnf
from runtimes.gguf.grammar import TokenGrammar
from runtimes.gguf.llama import Model
from runtimes.gguf.schema import ANY_OBJECT, NoSchema, parse

Fits = Callable[[Any, str], bool]

DAY = {"type": "object", "properties": {"high": {"type": "number"}, "sky": {"enum": ["sun", "rain"]}}, "required": ["high"]}
TREE = {
    "$ref": "#/$defs/a_node",
    "$defs": {
        "a_node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/or_null"}}, "required": ["v"]}
    }
    | {"or_null": {"anyOf": [{"$ref": "#/$defs/a_node"}, {"type": "null"}]}},
}


def deep(levels: int) -> dict[str, Any]:
    """A schema of so many objects in each other."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


# Which are taken


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": ["string", "null"]},
        {"title": "anything", "description": "at all"},
        {"properties": {"a": True, "b": {}, "c": {"description": "any"}}},
        {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "array", "items": {"type": "string"}, "minItems": 1000, "maxItems": 1000, "uniqueItems": False},
        {"type": "array", "prefixItems": [{"type": "string"}, True], "items": False},
        {"type": "array", "items": [{"type": "string"}], "additionalItems": False},
        {"type": "string", "minLength": 0, "maxLength": 1000},
        {"type": "string", "pattern": "^[a-z]{1000}(x{1,}|y{0,1000})$"},
        {"type": "string", "format": "no such format"},
        {"type": "integer", "minimum": -1, "exclusiveMaximum": 2.5},
        {"enum": [1, "a", None, [1], {"a": 2}]},
        {"const": None},
        {"anyOf": [{"type": "string"}, False]},
        {"oneOf": [{"type": "string"}], "allOf": [{"maxLength": 3}]},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "type": "string", "examples": ["x"], "deprecated": True},
        {"$ref": "#"},
        {"type": "object", "x-unknown": 1},
        TREE,
        deep(limits.SCHEMA_DEPTH_MAX),
        {"enum": ["x" * (limits.SCHEMA_BYTES_MAX - 30)]},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_good_schemas(schema: dict[str, Any]) -> None:
    assert parse(json.dumps(schema)) == schema


def test_any_object_is_a_good_schema() -> None:
    assert parse(ANY_OBJECT) == {"type": "object"}


BAD = [
    ("", "no valid JSON"),
    ("{", "no valid JSON"),
    ("{'type': 'string'}", "no valid JSON"),
    ('{"enum": [NaN]}', "no valid JSON"),
    ('{"enum": [-Infinity]}', "no valid JSON"),
    ('{"enum": [1e999]}', "no valid JSON"),
    ('{"const": %s}' % ("9" * 5000), "no valid JSON"),
    ('{"const": "\ud800"}', "no valid JSON"),
    ("[]", "is an object"),
    ("true", "is an object"),
    ('"string"', "is an object"),
    ("null", "is an object"),
    ('{"enum": ["%s"]}' % ("x" * limits.SCHEMA_BYTES_MAX), f"over {limits.SCHEMA_BYTES_MAX} bytes"),
    ('{"enum": ["%s"]}' % ("é" * (limits.SCHEMA_BYTES_MAX // 2)), f"over {limits.SCHEMA_BYTES_MAX} bytes"),
    (json.dumps(deep(limits.SCHEMA_DEPTH_MAX + 1)), "nested deeper than 32 levels"),
    ('{"enum": ' + "[" * 32 + "]" * 32 + "}", "nested deeper than 32 levels"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested deeper than 32 levels"),
    ("[" * 65_000, "nested deeper than 32 levels"),
    ('{"foo": 1}', "has no type, properties, enum or reference"),
    ('{"properties": {"a": {"foo": 1}}}', "has no type, properties, enum or reference"),
    ('{"type": "text"}', "a type in the JSON schema is unknown"),
    ('{"type": ["string", "any"]}', "a type in the JSON schema is unknown"),
    ('{"type": []}', "a type in the JSON schema is unknown"),
    ('{"type": 1}', "a type in the JSON schema is unknown"),
    ('{"type": null}', "a type in the JSON schema is unknown"),
    ('{"type": {"a": 1}}', "a type in the JSON schema is unknown"),
    ('{"properties": []}', "properties in the JSON schema must be an object"),
    ('{"properties": {"a": 1}}', "should be a schema is none"),
    ('{"properties": {"a": "string"}}', "should be a schema is none"),
    ('{"properties": {"a": null}}', "should be a schema is none"),
    ('{"$defs": 1, "type": "string"}', r"\$defs in the JSON schema must be an object"),
    ('{"items": 1}', "should be a schema is none"),
    ('{"items": [1]}', "should be a schema is none"),
    ('{"additionalProperties": [true]}', "should be a schema is none"),
    ('{"additionalProperties": "no"}', "should be a schema is none"),
    ('{"prefixItems": {}}', "prefixItems in the JSON schema must be a list"),
    ('{"anyOf": []}', "anyOf in the JSON schema must be a list that is not empty"),
    ('{"oneOf": {"type": "string"}}', "oneOf in the JSON schema must be a list"),
    ('{"allOf": [3]}', "should be a schema is none"),
    ('{"enum": []}', "enum in the JSON schema must be a list that is not empty"),
    ('{"enum": "a"}', "enum in the JSON schema must be a list"),
    ('{"required": "a", "type": "object"}', "required in the JSON schema must be a list of names"),
    ('{"required": [1], "type": "object"}', "required in the JSON schema must be a list of names"),
    ('{"type": "string", "maxLength": 1001}', "maxLength in the JSON schema may be at most 1000"),
    ('{"type": "string", "maxLength": 20000}', "maxLength in the JSON schema may be at most 1000"),
    ('{"type": "string", "minLength": -1}', "minLength in the JSON schema must be a whole number"),
    ('{"type": "string", "minLength": 1.5}', "minLength in the JSON schema must be a whole number"),
    ('{"type": "array", "minItems": true}', "minItems in the JSON schema must be a whole number"),
    ('{"type": "array", "maxItems": "1"}', "maxItems in the JSON schema must be a whole number"),
    ('{"type": "object", "maxProperties": 1001}', "maxProperties in the JSON schema may be at most 1000"),
    ('{"type": "number", "minimum": "1"}', "minimum in the JSON schema must be a number"),
    ('{"type": "number", "exclusiveMaximum": true}', "exclusiveMaximum in the JSON schema must be a number"),
    ('{"type": "string", "pattern": 1}', "pattern in the JSON schema must be a text"),
    ('{"type": "string", "pattern": "a{1001}"}', "may repeat at most 1000 times"),
    ('{"type": "string", "pattern": "a{0,1001}"}', "may repeat at most 1000 times"),
    ('{"type": "string", "pattern": "(a{9999999999,})"}', "may repeat at most 1000 times"),
    ('{"$ref": "https://example.org/x"}', "must stay inside it and begin with #"),
    ('{"$ref": "other.json#/a"}', "must stay inside it and begin with #"),
    ('{"$ref": 1}', "must stay inside it and begin with #"),
    ('{"$ref": "#/$defs/a"}', r"leads nowhere: '#/\$defs/a'"),
    ('{"$ref": "#/anyOf/2", "anyOf": [{"type": "string"}]}', "leads nowhere"),
    ('{"$ref": "#/anyOf/-1", "anyOf": [{"type": "string"}]}', "leads nowhere"),
    ('{"$ref": "#name"}', "does not lead to a schema"),
    ('{"$ref": "#/x", "x": "text"}', "does not lead to a schema"),
    ('{"$ref": "#/x", "x": {"type": "nonsense"}}', "a type in the JSON schema is unknown"),
    ('{"$ref": "#/x/y", "x": {"y": {"$ref": "#/z"}}, "z": {"maxItems": 5000}}', "maxItems in the JSON schema may be at most 1000"),
    ('{"type": "array", "uniqueItems": true}', "uniqueItems in the JSON schema is nothing that an answer can be held to"),
    ('{"not": {"type": "string"}}', "not in the JSON schema is nothing that an answer can be held to"),
    ('{"type": "integer", "multipleOf": 5}', "multipleOf in the JSON schema is nothing that an answer can be held to"),
    ('{"properties": {"a": {"patternProperties": {}}}}', "patternProperties in the JSON schema is nothing that"),
    ('{"if": {"type": "string"}, "then": {}}', "if in the JSON schema is nothing that"),
    (
        '{"type": "object", "unevaluatedProperties": {"type": "string"}}',
        "unevaluatedProperties in the JSON schema can only be true or false",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=[text[:40] for text, _ in BAD])
def test_bad_schemas(text: str, sentence: str) -> None:
    with pytest.raises(NoSchema, match=sentence) as caught:
        parse(text)
    assert len(str(caught.value)) < 300


def test_many_ways_to_write_one_reference_cost_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's own loop reads the schema, so this must not take a square of its size."""
    checked: list[object] = []
    monkeypatch.setattr("runtimes.gguf.schema._check", checked.append)
    big = {f"p{n}": {"type": "null"} for n in range(1000)}
    ways = ["#/" + "".join(f"%{ord(c):02X}" if bits >> i & 1 else c for i, c in enumerate("$defs/big")) for bits in range(512)]
    parse(json.dumps({"anyOf": [{"$ref": way} for way in ways if "%2F" not in way], "$defs": {"big": {"properties": big}}}))
    assert len(checked) < 3000


CONTRADICTIONS = [
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength is over maxLength"),
    ({"type": "array", "items": {}, "minItems": 3, "maxItems": 2}, "minItems is over maxItems"),
    ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "minItems is more than there can be"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no number is between its bounds"),
    ({"type": "integer", "minimum": 2.1, "maximum": 2.9}, "no value fits it"),
    ({"type": "number", "exclusiveMinimum": 2, "maximum": 2}, "no value fits it"),
    ({"type": "string", "enum": [1, None]}, "no value fits it"),
    ({"properties": {"a": False}, "required": ["a"]}, "no value fits it"),
    ({"properties": {"a": {}}, "required": ["b"], "additionalProperties": False}, "requires 'b', which is none of the properties"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no value fits it"),
    ({"anyOf": [False, {"type": "string", "enum": [1]}]}, "no value fits it"),
    ({"type": "object", "properties": {}, "minProperties": 1}, "does not leave room for its properties"),
    ({"type": "number", "minimum": 10**16}, "a bound in the JSON schema is beyond"),
    ({"allOf": [{"$ref": "#"}]}, "refers to itself without end"),
    ({"$ref": "#/$defs/a", "description": "x", "type": "string", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "refers to itself"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "write the length into the pattern"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "says two things about pattern"),
    (
        {"type": "object", "additionalProperties": True, "minProperties": 2},
        "minProperties and maxProperties in the JSON schema are nothing",
    ),
    ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, "minProperties and maxProperties in the JSON schema are nothing"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "minProperties and maxProperties in the JSON schema are nothing"),
    ({"allOf": [{"anyOf": [{"maxLength": n + m} for n in range(99)]} for m in range(2)]}, "too many combinations"),
]


@pytest.mark.parametrize(("schema", "sentence"), CONTRADICTIONS, ids=[json.dumps(schema)[:60] for schema, _ in CONTRADICTIONS])
def test_schemas_that_no_answer_can_follow(schema: dict[str, Any], sentence: str) -> None:
    with pytest.raises(NoSchema, match=sentence):
        gbnf(parse(json.dumps(schema)))


def test_combinations_are_counted_before_they_are_made() -> None:
    schema = parse(json.dumps({"allOf": [{"anyOf": [{"maxLength": n + m} for n in range(99)]} for m in range(3)]}))
    tracemalloc.start()
    with pytest.raises(NoSchema):
        gbnf(schema)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "a)", "[a", "[]", "[z-a]", "[\\d-z]", "*a", "a**", "a{2}{3}", "a{3,2}", "a++", "(?=a)", "(?<!a)b", "(?<n>a)", "\\bword"),
        *("(a)\\1", "\\k<n>", "\\p{L}", "\\u12", "\\x1", "a^b", "a$b", "(^a)", "(a$)", "a\\", "[\\", "{", "a{,3}", "[\\u0001]"),
        "(" * 33 + ")" * 33,
    ],
)
def test_patterns_that_cannot_be_followed(pattern: str) -> None:
    with pytest.raises(NoSchema, match=r"a pattern in the JSON schema has|no value fits"):
        gbnf(parse(json.dumps({"type": "string", "pattern": pattern})))


def test_a_grammar_grows_with_its_schema_only() -> None:
    """Repetitions stay repetitions, and what is said twice is written once."""
    once = {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000}
    assert len(gbnf(once)) < 1500
    often = {"type": "object", "properties": {f"p{n}": DAY for n in range(500)}}
    assert len(gbnf(often)) < 100 * 500
    chain = {"$defs": {f"a{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}}
    assert len(gbnf(chain | {"$ref": "#/$defs/a0", "$defs": chain["$defs"] | {"a60": {"type": "null"}}})) < 10_000


# What the grammars let through


@pytest.fixture(scope="module")
def fits(smollm2_path: Path) -> Iterator[Fits]:
    """Whether a grammar takes a whole text, token by token."""
    model = Model(str(smollm2_path), vocabulary_only=True)
    ends = model.end_tokens()

    def ask(schema: Any, text: str) -> bool:
        grammar = TokenGrammar(model, schema if isinstance(schema, str) else gbnf(parse(json.dumps(schema))), ends)
        for token in model.tokenize(text, add_special=False, parse_special=False):
            if not grammar.allows(token):
                return False
            grammar.accept(token)
        return grammar.allows(min(ends))

    yield ask
    model.close()


LANGUAGES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {},
        ["1", '"a"', "[]", "{}", "null", "true", '[{"a": [1.5e3]}]', "-0"],
        ["", "01", "[1,]", "tru", "{1: 2}", "1 ", "'a'", "+1", ".5", "1."],
    ),
    (
        {"type": "object"},
        ["{}", "{ }", '{"a":1}', '{"a": {"b": []}}', '{\n  "a": 1,\n  "b": 2\n}'],
        ["[]", '{"a"}', '{"a":1,}', "{} ", " {}"],
    ),
    ({"type": "null"}, ["null"], ["nul", "Null", '""']),
    ({"type": "boolean"}, ["true", "false"], ["1", "True"]),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    ({"type": ["object", "null"], "properties": {"a": {"type": "null"}}, "required": ["a"]}, ["null", '{"a":null}'], ["{}", '{"b":1}']),
    ({"type": ["string", "null"], "enum": ["a", None, 3]}, ['"a"', "null"], ["3", '"b"']),
    ({"const": {"a": [1, "é"]}}, ['{"a": [1, "é"]}'], ['{"a": [1]}']),
    ({"enum": ['a"b', "c\\d", "e\nf", "é😀", ""]}, ['"a\\"b"', '"c\\\\d"', '"e\\nf"', '"é😀"', '""'], ['"a"', '"e\nf"']),
    ({"enum": [True, 1], "const": 1}, ["1"], ["true"]),
    # strings
    (
        {"type": "string"},
        ['""', '"a é 😀 \\" \\\\ \\/ \\n \\u00e9 \\ud83d\\ude00"'],
        ['"', '"\n"', '"\t"', '"\x01"', '"\\x"', '"\\u12"', '"a""'],
    ),
    ({"type": "string"}, ['"\\uFFFF"', '"\\ud7ff"', '"\\uE000"'], ['"\\ud83d"', '"\\ude00"', '"\\ud83d\\n"', '"\\uD83Dx"', '"\x7f"']),
    (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"\\n\\u00e9😀"', '"\\ud83d\\ude00x"'],
        ['"a"', '"\\ud83d\\ude00"', '"abcd"'],
    ),
    ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    (
        {"type": "string", "format": "date"},
        ['"2024-02-28"', '"1999-12-31"', '"2024-04-30"'],
        ['"2024-02-30"', '"2024-04-31"', '"2024-13-01"', '"24-1-1"'],
    ),
    ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"01:02:03.25+02:00"'], ['"24:00:00Z"', '"12:00Z"', '"12:00:00"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-28T10:00:00Z"'], ['"2024-02-28 10:00:00Z"', '"2024-02-28"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567"']),
    ({"type": "string", "format": "date", "maxLength": 3}, ['"abc"'], ['"2024-02-28"']),
    # arrays
    ({"type": "array"}, ["[]", "[ ]", '[1, "a"]', "[[]]"], ["[1 2]", "[,]", "]"]),
    ({"type": "array", "minItems": 2, "maxItems": 3}, ["[1,2]", "[1,2,3]"], ["[]", "[1]", "[1,2,3,4]"]),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 0}, ["[]"], ["[null]"]),
    ({"items": False}, ["[]"], ["[1]"]),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, ["[]", "[null]"], ["[null,null]", "[1]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}, {"const": 1}]}, ["[null, 1]"], ["[]", "[null]", "[null,1,1]", "[1,null]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"const": 1}}, ["[null]", "[null,1,1]"], ["[]", "[1]", "[null,null]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 3}, ["[null,1,[]]"], ["[null]", "[null,1]", "[null,1,2,3]"]),
    (
        {"type": "array", "items": [{"type": "null"}], "additionalItems": {"const": 1}, "maxItems": 2},
        ["[null]", "[null,1]"],
        ["[null,1,1]"],
    ),
    # objects
    (
        DAY,
        ['{"high": 1.5, "sky": "sun"}', '{"high":1}'],
        ["{}", '{"sky":"sun"}', '{"sky":"sun","high":1}', '{"high":1,"x":2}', '{"high":"1"}'],
    ),
    (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
        ["{}", '{"b":2}', '{"a":1,"c":3}'],
        ['{"c":3,"a":1}', '{"a":1,}', '{,"a":1}'],
    ),
    (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"]},
        ['{"b":2}', '{"a":1,"b":2}'],
        ['{"a":1}', '{"b":2,"a":1}', "{}"],
    ),
    ({"properties": {"a": True}, "required": ["a"]}, ['{"a":[1]}', '{"a":{}}'], ["{}"]),
    ({"type": "object", "required": ["a b"]}, ['{"a b":1}', '{"a b":1,"c":2}'], ["{}", '{"c":2}']),
    ({"type": "object", "required": ["a"], "additionalProperties": {"const": 1}}, ['{"a":1,"b":1}'], ['{"a":2}', '{"a":1,"b":2}']),
    ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
    ({"type": "object", "additionalProperties": {"type": "null"}}, ["{}", '{"x":null,"y":null}'], ['{"x":1}']),
    (
        {"properties": {"ab": {"const": 1}, "ac": {"const": 1}, "": {"const": 1}}, "additionalProperties": {"const": 2}},
        ['{"ab":1}', '{"a":2}', '{"abc":2}', '{"ab":1,"b":2,"ad":2}', '{"é":2}'],
        ['{"ab":2}', '{"ac":2}', '{"":2}', '{"a":1}', '{"x":2,"ab":1}', '{"\\u0061b":2}', '{"x":2,"ab":2}'],
    ),
    (
        {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": True, "maxProperties": 2},
        ['{"a":1}', '{"a":1,"b":[]}'],
        ['{"a":1,"b":1,"c":1}'],
    ),
    ({"type": "object", "minProperties": 1, "maxProperties": 2}, ['{"a":1}', '{"a":1,"b":1}'], ["{}", '{"a":1,"b":1,"c":1}']),
    ({"properties": {'q"\\\né': {"const": 1}}}, ['{"q\\"\\\\\\né":1}'], ['{"q":1}']),
    (
        {"properties": {"a-b": {"const": 1}, "a b": {"const": 2}, "a_b": {"const": 3}}},
        ['{"a-b":1,"a b":2,"a_b":3}'],
        ['{"a-b":2}', '{"a b":3}'],
    ),
    (
        {"properties": {"root": {"enum": ["x"]}, "string": {"enum": ["y"]}, "r0": {"type": "string"}}},
        ['{"root":"x","string":"y","r0":"z"}'],
        ['{"string":"x"}'],
    ),
    (
        {"properties": {"a": {"properties": {"b": {"const": 1}}}, "a-b": {"const": 2}}},
        ['{"a":{"b":1},"a-b":2}'],
        ['{"a-b":1}', '{"a":{"b":2}}'],
    ),
    # references
    (TREE, ['{"v":1}', '{"v":1,"next":null}', '{"v":1,"next":{"v":2,"next":{"v":3}}}'], ["null", "{}", '{"v":1,"next":{}}']),
    (
        {"properties": {"c": {"enum": ["red"]}, "o": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"type": "null"}}},
        ['{"c":"red","o":null}'],
        ['{"o":"red"}'],
    ),
    ({"$ref": "#/properties/a~1b/items", "properties": {"a/b": {"items": {"const": 7}}}}, ["7"], ["[7]"]),
    ({"$ref": "#/$defs/a%20%7E0", "$defs": {"a ~": {"const": 7}}}, ["7"], ["8"]),
    ({"$ref": "#/$defs/a", "description": "x", "$defs": {"a": {"const": 7}}}, ["7"], ["8"]),
    ({"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"'], ['"abc"']),
    ({"type": "array", "items": {"$ref": "#"}}, ["[]", "[[],[[]]]"], ["[1]"]),
    ({"definitions": {"a": {"$ref": "#/definitions/b"}, "b": {"const": 1}}, "$ref": "#/definitions/a"}, ["1"], ["2"]),
    # combinations
    ({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "null"}], "description": "x"}, ['"a"', "null"], ['"ab"']),
    ({"type": "string", "anyOf": [{"maxLength": 1}, {"type": "null"}, {"enum": ["abc"]}]}, ['"a"', '"abc"'], ["null", '"ab"']),
    (
        {"properties": {"a": {"const": 1}}, "required": ["a"], "oneOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}, {}]},
        ['{"a":1,"b":2}', '{"a":1}'],
        ['{"b":2}'],
    ),
    (
        {
            "allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {"const": 2}}, "required": ["b"]}],
            "$defs": {"a": {"properties": {"a": {"const": 1}}}},
        },
        ['{"a":1,"b":2}', '{"b":2}'],
        ['{"a":1}'],
    ),
    ({"allOf": [{"type": "number", "minimum": 2}, {"type": "integer", "maximum": 4}, {"minimum": 3}]}, ["3", "4"], ["2", "5", "3.5"]),
    (
        {"allOf": [{"properties": {"a": {"type": ["null", "string"]}}}, {"properties": {"a": {"type": ["null", "number"]}}}]},
        ['{"a":null}'],
        ['{"a":1}', '{"a":"x"}'],
    ),
    (
        {"allOf": [{"properties": {"a": {"const": 1}}, "additionalProperties": False}, {"properties": {"b": {"const": 2}}}]},
        ['{"a":1}', "{}"],
        ['{"b":2}'],
    ),
    ({"allOf": [{"enum": [1, 2, True]}, {"enum": [2, 3, 1]}]}, ["1", "2"], ["true", "3"]),
    (
        {"allOf": [{"anyOf": [{"minimum": 3}, {"type": "null"}]}, {"anyOf": [{"maximum": 4}, {"type": "null"}]}]},
        ["3", "4", "null"],
        ["5", "2"],
    ),
    ({"allOf": [{"description": "any"}, {}, True]}, ["1", "[]"], ["x"]),
    ({"properties": {"a": {"const": 1}, "b": False}}, ['{"a":1}', "{}"], ['{"b":1}', '{"a":1,"b":null}']),
    ({"properties": {"b": False}, "additionalProperties": {"const": 1}}, ['{"a":1}', "{}"], ['{"b":1}']),
    (
        {
            "anyOf": [{"$ref": "#/$defs/none"}, {"const": 1}, {"items": {"$ref": "#/$defs/none"}}],
            "$defs": {"none": {"enum": [1], "type": "null"}},
        },
        ["1"],
        ["", "[]", "null", "[,]"],
    ),
    (
        {
            "anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}],
            "$defs": {"a": {"properties": {"a": False, "b": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
        },
        ["1"],
        ["{}", ""],
    ),
    ({"items": [{"type": "null"}]}, ["[null]"], ["[]", "[null,1]"]),
    ({"allOf": [{"items": {"minimum": 1}}, {"items": {"maximum": 2}, "maxItems": 2}]}, ["[]", "[1,2]"], ["[3]", "[0]", "[1,1,1]"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), LANGUAGES, ids=[json.dumps(schema)[:60] for schema, _, _ in LANGUAGES])
def test_texts_that_fit(fits: Fits, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = gbnf(parse(json.dumps(schema)))
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


def test_white_space_is_bounded(fits: Fits) -> None:
    """A greedy model would write it for ever."""
    assert fits({"type": "array"}, "[\n" + " " * 20 + "1,\n\t2\n]")
    assert not fits({"type": "array"}, "[\n" + " " * 21 + "1]")
    assert not any(fits({"type": "array"}, text) for text in ("[  1]", "[\n\n1]", "[1 ,2]", "[1] ", "[1]\n", "[  ]"))
    assert not any(fits({"type": "object"}, text) for text in ('{"a" :1}', '{"a":  1}', "{  }", '{"a":1}\n'))


def decimals(chance: random.Random, places: int) -> Decimal:
    return Decimal(chance.randrange(-3000, 3000)).scaleb(-chance.randint(0, places))


@pytest.mark.parametrize("seed", range(30))
def test_numbers_are_between_their_bounds(fits: Fits, seed: int) -> None:
    chance = random.Random(seed)
    kind, places = ("integer", 0) if seed % 2 else ("number", 3)
    low, high = sorted((decimals(chance, places), decimals(chance, places)))
    high = low + 1 if seed % 5 == 0 else high
    keys = (chance.choice(["minimum", "exclusiveMinimum", "nothing"]), chance.choice(["maximum", "exclusiveMaximum", "nothing"]))
    schema = {"type": kind} | {key: json.loads(str(bound)) for key, bound in zip(keys, (low, high), strict=True) if key != "nothing"}
    grammar = gbnf(parse(json.dumps(schema)))
    near = [bound + Decimal(step).scaleb(-scale) for bound in (low, high) for step in range(-11, 12) for scale in range(places + 1)]
    for number in [*near, *(decimals(chance, places) for _ in range(100)), Decimal(0)]:
        is_above = keys[0] == "nothing" or (number >= low if keys[0] == "minimum" else number > low)
        is_below = keys[1] == "nothing" or (number <= high if keys[1] == "maximum" else number < high)
        text = format(number, "f").replace("-0", "0") if number == 0 else format(number, "f")
        if kind == "integer" and "." in text:
            continue
        assert fits(grammar, text) == (is_above and is_below), (schema, text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, ["0", "-1", "999999999999999"], ["00", "01", "1.0", "1e3", "1000000000000000", "-"]),
        (
            {"type": "number"},
            ["0", "-0.5", "1e10", "1.25E-7", "0.123456789012345"],
            ["1.", ".1", "1e", "1e999", "0.1234567890123456", "Infinity"],
        ),
        (
            {"type": "number", "minimum": 0, "maximum": 1},
            ["0", "1", "0.0", "1.000", "0.999999999999999"],
            ["1.0001", "-0", "-0.1", "1e0", "2"],
        ),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.001", "7", "999999999999999.5"], ["0", "0.0", "-1"]),
        ({"type": "number", "exclusiveMaximum": 0}, ["-0.001", "-7"], ["0", "-0", "-0.0", "1"]),
        ({"type": "number", "minimum": 1e-7}, ["0.0000001", "0.00000011", "1"], ["0", "0.00000009"]),
        ({"type": "integer", "minimum": -5, "maximum": 12}, ["-5", "-1", "0", "9", "12"], ["-6", "-0", "13", "20", "012"]),
        ({"type": "integer", "minimum": 0}, ["0", "10", "999999999999999"], ["-1", "00"]),
        ({"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 2}, ["1"], ["0", "2"]),
        ({"type": "integer", "minimum": -(10**30), "maximum": 10**30}, ["-999999999999999", "0"], ["00"]),
        ({"minimum": 3, "maximum": 3}, ["3", "3.0"], ["2", "3.01"]),
        ({"type": "integer", "minimum": 95, "maximum": 1105}, ["95", "99", "100", "999", "1000", "1105"], ["94", "1106", "1110", "9"]),
    ],
)
def test_numbers_by_hand(fits: Fits, schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not fits(schema, text)] == []
    assert [text for text in bad if fits(schema, text)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "^a+$",
            "b",
            "^a|b$",
            "^(a|bc?)*$",
            "^[ab\\n]{2,3}$",
            "^[^a]$",
            "^.{1,2}$",
            "^\\w-\\d$",
            "^(?:a|)b$",
            '^["\\\\]+$',
            "a.b",
            "^\\s*$",
            "^\\S+$",
        ),
        *(
            "^[a-c]+?$",
            "^\\x61\\u0062$",
            "^[\\]\\-b]$",
            "^\\.\\*$",
            "^[a-]+$",
            "^a{2}$",
            "^(ab){2,}$",
            "^a{0}b$",
            "^é|😀$",
            "\\\\",
            "^$",
            "",
            "^[.$^|]$",
        ),
        *("^\\D\\W$", "^[\\t\\b]$", "^((a|b)c){1,2}$"),
    ],
)
def test_patterns_take_what_python_takes(fits: Fits, pattern: str) -> None:
    grammar = gbnf(parse(json.dumps({"type": "string", "pattern": pattern})))
    chance = random.Random(1)
    texts = ["", "a_", *("".join(chance.choices('aabbc1-_.*$|"\\\n\t é😀]', k=chance.randint(1, 4))) for _ in range(150))]
    texts += ["".join(chance.choices("abc", k=chance.randint(1, 6))) for _ in range(50)]
    for text in texts:
        expected = re.search(pattern.replace("$", "\\Z") if pattern != "^[.$^|]$" else pattern, text, re.ASCII) is not None
        assert fits(grammar, json.dumps(text, ensure_ascii=False)) == expected, text


def test_strings_of_a_pattern_are_json_all_the_same(fits: Fits) -> None:
    """What a pattern lets through may be a quote, which ends the string unless it is escaped."""
    for pattern in ("^.*$", "^[^a]*$", "^\\S*$", "x", '^["]$'):
        grammar = gbnf(parse(json.dumps({"pattern": pattern})))
        assert not any(fits(grammar, text) for text in ('"x""', '"x"x"', '"\n"', '"\\"', '"x\x02"', '"""'))
