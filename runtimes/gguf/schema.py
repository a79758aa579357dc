"""JSON schemas: is this one that an answer can be held to (``parse``), and the grammar of its answers (``gbnf``). Pure; no native code.

What an answer cannot be held to is refused, with a sentence for the schema's author, and not silently left out. Where a schema leaves a
choice, the grammar makes the narrower one, so that what it lets through is valid for any reader:

- properties come in the order of the schema; others only where ``additionalProperties`` asks for them, and never under a name that the
  schema has;
- strings hold no raw control character and no half of a surrogate pair; numbers have at most 15 digits before and behind the point;
- white space is at most one space, or one line break with its indentation, and none stands behind the whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from protocol import limits

ANY_OBJECT = '{"type":"object"}'
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_KINDS_OF = {  # keywords that speak of one kind of value only
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": _BOUNDS,
}
_RESTRICTING = frozenset(
    {"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"}.union(*(frozenset(keys) for keys in _KINDS_OF.values()))
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
_VISITS_MAX = 20_000  # parts of a schema, references and combinations followed
_DIGITS = 15  # every number of so many digits is the same in all languages
_NUMBER_MAX = 10**_DIGITS - 1


class NoSchema(ValueError):
    """The text is no usable schema; the message says why in a sentence for its author."""


class _Contradiction(NoSchema):
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
    if not kinds or not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
        raise NoSchema("a type in the JSON schema is unknown")
    for key in _NO_PROMISE:
        if key in part:
            raise NoSchema(f"{key} in the JSON schema is nothing that an answer can be held to; leave it out")
    if part and not part.keys() & (_RESTRICTING | _ANNOTATIONS):
        raise NoSchema("the JSON schema has no type, properties, enum or reference")
    for key in _COUNTS:
        _check_count(key, part.get(key, 0))
    for key in _BOUNDS:
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
        target = _target(schema, pointer)
        if id(target) in known:  # there are many ways to write one pointer
            continue
        known.add(id(target))
        for part in _parts(target):
            _check(part)
            if "$ref" in part:
                waiting.append(part["$ref"])


def _target(schema: dict[str, Any], pointer: str) -> Any:
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


# The grammar


def gbnf(schema: dict[str, Any]) -> str:
    """The grammar of all texts that are valid for a parsed schema, in llama.cpp's notation. Raises NoSchema."""
    try:
        return _Writer(schema).grammar()
    except RecursionError:
        raise NoSchema("the JSON schema refers to itself without end, or is nested too deeply") from None


def _literal(text: str) -> str:
    """A text in a grammar."""
    return '"' + "".join(c if c.isalnum() or c in " _-.,:;{}()+*/?!" else _escape(ord(c)) for c in text) + '"'


def _escape(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _json(value: object) -> str:
    """A literal that is this value's JSON."""
    text = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= c <= "\udfff" for c in text):
        text = json.dumps(value)
    return _literal(text)


class _Rules:
    """Named rules of one grammar. Equal ones become one."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._bodies: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of a rule with this body."""
        if body in self._bodies:  # it is a name already
            return body
        if body not in self._names:
            self._names[body] = self.reserve()
            self._bodies[self._names[body]] = body
        return self._names[body]

    def reserve(self) -> str:
        """A name whose rule comes later, for what refers to itself."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def set(self, name: str, body: str) -> None:
        self._bodies[name] = body

    def any_of(self, parts: list[str]) -> str:
        """One of these. None at all: nothing fits."""
        if not parts:
            raise _Contradiction("the JSON schema contradicts itself: no value fits it")
        return self.add(" | ".join(dict.fromkeys(parts)))

    def text(self, root: str) -> str:
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {body}" for name, body in self._bodies.items())]) + "\n"


_SPACE = r'( " " | "\n" [ \t]{0,20} )?'
_CHAR = (
    r'[^"\\\x00-\x1F\x7F] | "\\" ["\\/bfnrt] | "\\u" ( [0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2} )'
    r' | "\\u" [dD] [89abAB] [0-9a-fA-F]{2} "\\u" [dD] [c-fC-F] [0-9a-fA-F]{2}'
)
_NUMBER = r'"-"? ( "0" | [1-9] [0-9]{0,14} ) ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,2} )?'
_DATE = (
    r'[0-9]{4} "-" ( "02-" ( "0" [1-9] | "1" [0-9] | "2" [0-8] ) | ( "0" [13-9] | "1" [0-2] ) "-" ( "0" [1-9] | [12] [0-9] | "30" )'
    r' | ( "0" [13578] | "1" [02] ) "-31" )'
)
_HOUR = r'( [01] [0-9] | "2" [0-3] ) ":" [0-5] [0-9]'
_TIME = rf'{_HOUR} ":" [0-5] [0-9] ( "." [0-9]{{1,6}} )? ( "Z" | [-+] {_HOUR} )'
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}


class _Writer:
    """Writes the rules of one schema. A value's rule is found by what the schema says of it, from the outside in."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._rules = _Rules()
        self._numbers = _Numbers(self._rules)
        self._by_pointer: dict[str, str] = {}
        self._visits = 0
        self._space, self._char = self._rules.add(_SPACE), self._rules.add(_CHAR)

    def grammar(self) -> str:
        return self._rules.text(self._value(self._schema))

    def _value(self, schema: Any) -> str:
        """The rule of all values that fit a schema."""
        self._visit()
        if schema is False:
            raise _Contradiction("the JSON schema contradicts itself: no value fits it")
        if schema is True or not schema.keys() & _RESTRICTING:
            return self._anything()
        if "$ref" in schema and len(schema.keys() & _RESTRICTING) == 1:
            return self._reference(schema["$ref"])
        plain = self._plain(schema)
        for key in ("anyOf", "oneOf"):
            if key in plain:
                return self._choice({k: v for k, v in plain.items() if k != key}, plain[key])
        if "const" in plain or "enum" in plain:
            return self._constants(plain)
        return self._rules.any_of([self._of_kind(kind, plain) for kind in _kinds(plain)])

    def _visit(self, count: int = 1) -> None:
        self._visits += count
        if self._visits > _VISITS_MAX:
            raise NoSchema("the JSON schema has too many combinations; make it smaller")

    def _reference(self, pointer: str) -> str:
        if pointer not in self._by_pointer:
            name = self._by_pointer[pointer] = self._rules.reserve()
            self._rules.set(name, self._value(_target(self._schema, pointer)))
        return self._by_pointer[pointer]

    def _anything(self) -> str:
        pointer = "anything"
        if pointer not in self._by_pointer:
            name = self._by_pointer[pointer] = self._rules.reserve()
            self._rules.set(name, " | ".join(self._of_kind(kind, {}) for kind in _TYPES if kind != "integer"))
        return self._by_pointer[pointer]

    def _choice(self, base: dict[str, Any], options: list[Any]) -> str:
        """One of the options, each together with what stands beside them. An option that contradicts it is none."""
        rules, reason = [], _Contradiction("the JSON schema offers a choice of nothing")
        for option in options:
            try:
                rules.append(self._value(self._both(base, option) if base.keys() & _RESTRICTING else option))
            except _Contradiction as error:
                reason = error
        if not rules:
            raise reason
        return self._rules.any_of(rules)

    def _constants(self, schema: dict[str, Any]) -> str:
        values = schema.get("enum", [schema.get("const")])
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        kinds = schema.get("type", list(_TYPES))
        return self._rules.any_of([_json(value) for value in values if any(_is_kind(value, kind) for kind in _listed(kinds))])

    def _of_kind(self, kind: str, schema: dict[str, Any]) -> str:
        writers: dict[str, Callable[[dict[str, Any]], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._numbers.number,
            "integer": self._numbers.integer,
            "boolean": lambda _: '"true" | "false"',
            "null": lambda _: '"null"',
        }
        return self._rules.add(writers[kind](schema))

    # Combining

    def _plain(self, schema: Any) -> dict[str, Any]:
        """The same without $ref and allOf."""
        self._visit()
        if schema is True:
            return {}
        if schema is False:
            raise _Contradiction("the JSON schema contradicts itself: no value fits it")
        rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        if "$ref" in schema:
            rest = self._both(_target(self._schema, schema["$ref"]), rest)
        for part in schema.get("allOf", ()):
            rest = self._both(rest, part)
        return rest

    def _both(self, one: Any, other: Any) -> dict[str, Any]:
        """A schema for what fits both."""
        one, other = self._plain(one), self._plain(other)
        properties = self._shared_properties(one, other) | self._shared_properties(other, one)
        added = {key: self._both_say(key, one[key], value) if key in one else value for key, value in other.items()}
        together: dict[str, Any] = one | added
        return together | ({"properties": properties} if properties or "properties" in together else {})

    def _shared_properties(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Properties of ``one`` that ``other`` lets stand, as it wants them."""
        shared = {}
        for name, schema in one.get("properties", {}).items():
            said = other.get("properties", {}).get(name, other.get("additionalProperties", True))
            if said is not False:
                shared[name] = schema if said is True else self._both(schema, said)
        return shared

    def _both_say(self, key: str, one: Any, other: Any) -> Any:
        if key not in _RESTRICTING or one == other or key == "properties":
            return one
        if key == "type":
            return [kind for kind in _TYPES if _has_kind(one, kind) and _has_kind(other, kind)]
        if key == "required":
            return [*one, *other]
        if key == "enum":
            return [value for value in one if any(_same(value, known) for known in other)]
        if key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            return max(one, other)
        if key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            return min(one, other)
        if key in ("items", "additionalProperties", "additionalItems") and not isinstance(one, list) and not isinstance(other, list):
            return False if one is False or other is False else self._both(one, other)
        if key in ("anyOf", "oneOf"):
            self._visit(len(one) * len(other))
            return [{"allOf": [a, b]} for a in one for b in other]
        raise NoSchema(f"the JSON schema says two things about {key} in one place, which cannot be combined here")

    # Kinds of values

    def _string(self, schema: dict[str, Any]) -> str:
        low, high = _counts(schema, "minLength", "maxLength")
        if "pattern" in schema:
            if low or high is not None:
                raise NoSchema("pattern in the JSON schema cannot stand beside minLength or maxLength; write the length into the pattern")
            return rf'"\"" {_Pattern(self._rules, self._char, schema["pattern"]).rule()} "\""'
        if not low and high is None and isinstance(schema.get("format"), str) and schema["format"] in _FORMATS:
            return rf'"\"" {self._rules.add(_FORMATS[schema["format"]])} "\""'
        return rf'"\"" {_repeated(self._char, low, high)} "\""'

    def _array(self, schema: dict[str, Any]) -> str:
        low, high = _counts(schema, "minItems", "maxItems")
        first = schema.get("prefixItems", [])
        more = schema.get("items", True)
        if isinstance(more, list):  # as it was before 2020-12
            first, more = more, schema.get("additionalItems", True)
        if more is False:
            high = len(first) if high is None else min(high, len(first))
        elif first and "items" not in schema and "additionalItems" not in schema:  # what is not described comes only where it must
            high = max(low, len(first)) if high is None else min(high, max(low, len(first)))
        if high is not None and low > high:
            raise _Contradiction("the JSON schema contradicts itself: minItems is more than there can be")
        fixed = [self._value(item) for item in (first if high is None else first[:high])]
        comma = f'"," {self._space} '
        if fixed:
            items = f" {comma}".join(fixed)
            if high is None or high > len(fixed):
                items += " " + _repeated(f"( {comma}{self._value(more)} )", max(0, low - len(fixed)), high and high - len(fixed))
        elif high == 0:
            return f'"[" {self._space} "]"'
        else:
            item = self._value(more)
            items = f"{item} " + _repeated(f"( {comma}{item} )", max(0, low - 1), high and high - 1)
        whole = f"{items} {self._space}"
        return f'"[" {self._space} {whole if low or fixed else f"( {whole} )?"} "]"'

    def _object(self, schema: dict[str, Any]) -> str:
        properties = dict(schema.get("properties", {}))
        others = schema.get("additionalProperties", "properties" not in schema)
        required = set(schema.get("required", ()))
        for name in schema.get("required", ()):
            if name not in properties:
                if schema.get("additionalProperties", True) is False:
                    raise _Contradiction(f"the JSON schema requires {name[:100]!r}, which is none of the properties")
                properties[name] = others or True
        low, high = _other_counts(schema, properties, required, others)
        comma = f'"," {self._space} '
        rest, start = "", ""  # what may follow a property, and what may be the first with what follows it
        if others is not False and high != 0:
            pair = self._rules.add(f'{self._other_name(list(properties))} ":" " "? {self._value(others)}')
            rest = self._rules.add(_repeated(f"( {comma}{pair} )", low, high))
            start = f"{pair} " + _repeated(f"( {comma}{pair} )", max(0, low - 1), high and high - 1)
        for name, value in reversed(properties.items()):
            pair = self._rules.add(f'{_json(name)} ":" " "? {self._value(value)}')
            first = f"{pair} {rest}".rstrip()
            start = self._rules.add(first if name in required or not start else f"{first} | {start}")
            rest = self._rules.add(f"( {comma}{pair} ){'' if name in required else '?'} {rest}".rstrip())
        inside = f"{start} {self._space}" if start else ""
        return f'"{{" {self._space} {inside if required or low or not start else f"( {inside} )?"} "}}"'

    def _other_name(self, names: list[str]) -> str:
        """The rule of a JSON string that is none of these names. It has no escapes, so that there is one way to write each."""
        if not names:
            return self._rules.add(rf'"\"" {self._char}* "\""')
        return self._rules.add(rf'"\"" {self._none_of(sorted(set(names)))} "\""')

    def _none_of(self, names: list[str]) -> str:
        """The rule of characters that are none of these sorted texts."""
        by_first: dict[str, list[str]] = {}
        for name in names:
            if name:
                by_first.setdefault(name[0], []).append(name[1:])
        tail = r'[^"\\\x00-\x1F\x7F]*'
        options = [] if "" in names else [_EMPTY]
        firsts = "".join(_escape(ord(c)) for c in by_first if not "\ud800" <= c <= "\udfff")
        options.append(rf'[^"\\\x00-\x1F\x7F{firsts}] {tail}')
        for first, rests in by_first.items():
            if first not in '"\\\x7f' and first >= " " and not "\ud800" <= first <= "\udfff":
                options.append(f"{_literal(first)} {self._none_of(rests)}")
        return self._rules.any_of(options)


_EMPTY = '""'


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kinds(schema: dict[str, Any]) -> list[str]:
    """The kinds of values that a schema speaks of; those it does not mention are left out even where it would let them through."""
    if "type" in schema:
        kinds = _listed(schema["type"])
        return [kind for kind in kinds if kind != "integer" or "number" not in kinds]
    return [kind for kind, keys in _KINDS_OF.items() if schema.keys() & set(keys)]


def _has_kind(kinds: Any, kind: str) -> bool:
    """Whether a ``type`` lets a kind through."""
    return kind in _listed(kinds) or (kind == "integer" and "number" in _listed(kinds))


def _is_kind(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == int(value))
    kinds: dict[str, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[kind])


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON; Python takes True for 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _counts(schema: dict[str, Any], lowest: str, highest: str) -> tuple[int, int | None]:
    low, high = schema.get(lowest, 0), schema.get(highest)
    if high is not None and low > high:
        raise _Contradiction(f"the JSON schema contradicts itself: {lowest} is over {highest}")
    return low, high


def _other_counts(schema: dict[str, Any], properties: dict[str, Any], required: set[str], others: Any) -> tuple[int, int | None]:
    """How many properties there may be that the schema does not name."""
    low, high = _counts(schema, "minProperties", "maxProperties")
    low, high = max(0, low - len(required)), None if high is None else high - len(properties)
    may_lack = len(required) < len(properties)
    if low > 1 or (low and may_lack) or (high is not None and high < 0 and may_lack):  # a name may come twice, so two are not two
        raise NoSchema("minProperties and maxProperties in the JSON schema are nothing that an answer can be held to here; leave them out")
    if (high is not None and high < low) or (low and others is False):
        raise _Contradiction("the JSON schema contradicts itself: it does not leave room for its properties")
    return low, high


def _repeated(rule: str, low: int, high: int | None) -> str:
    if high is None:
        return f"{rule}*" if low == 0 else f"{rule}{{{low},}}"
    return f"{rule}{{{low},{high}}}" if high else _EMPTY


class _Numbers:
    """Rules of the numbers between two bounds."""

    def __init__(self, rules: _Rules) -> None:
        self._rules = rules

    def integer(self, schema: dict[str, Any]) -> str:
        low, low_open, high, high_open = _bounds(schema)
        first = -_NUMBER_MAX if low is None else math.floor(low) + 1 if low_open else math.ceil(low)
        last = _NUMBER_MAX if high is None else math.ceil(high) - 1 if high_open else math.floor(high)
        return self._rules.any_of([f'"-" {n}' for n in self._whole(max(1, -last), -first)] + self._whole(max(0, first), last))

    def number(self, schema: dict[str, Any]) -> str:
        low, low_open, high, high_open = _bounds(schema)
        if low is None and high is None:
            return _NUMBER
        options = []
        if low is None or low < 0:  # the bounds change places; zero has no sign
            nearest, is_open = (_ZERO, True) if high is None or high >= 0 else (-high, high_open)
            options += [f'"-" {n}' for n in self._decimals(nearest, is_open, None if low is None else -low, low_open)]
        if high is None or high >= 0:
            nearest, is_open = (_ZERO, False) if low is None or low < 0 else (low, low_open)
            options += self._decimals(nearest, is_open, high, high_open)
        return self._rules.any_of(options)

    def _whole(self, low: int, high: int) -> list[str]:
        """Whole numbers between two that are not negative."""
        options = ['"0"'] if low == 0 <= high else []
        low = max(1, low)
        if high == _NUMBER_MAX and low == 1:
            return [*options, f"[1-9] [0-9]{{0,{_DIGITS - 1}}}"]
        while low <= high:
            last = min(high, 10 ** len(str(low)) - 1)
            options.append(self._digits(_Between(str(low), str(last)), len(str(low)), whole=True) or "")
            low = last + 1
        return options

    def _decimals(self, low: Decimal, low_open: bool, high: Decimal | None, high_open: bool) -> list[str]:
        """Numbers with or without a point between two that are not negative."""
        a, from_ = _split(low)
        if high is None:
            parts = [(f'"{a}"', _Between(from_, None, low_open))]
            parts += [(whole, _Between()) for whole in self._whole(a + 1, _NUMBER_MAX)]
        elif (b_to := _split(high))[0] == a:
            parts = [(f'"{a}"', _Between(from_, b_to[1], low_open, high_open))]
        else:
            b, to = b_to
            parts = [(f'"{a}"', _Between(from_, None, low_open)), (f'"{b}"', _Between(None, to, False, high_open))]
            parts += [(whole, _Between()) for whole in self._whole(a + 1, b - 1)]
        fractions = [(whole, self._fraction(between)) for whole, between in parts]
        return [f"{whole} {fraction}" for whole, fraction in fractions if fraction is not None]

    def _fraction(self, between: _Between) -> str | None:
        """The point and what is behind it, or nothing where that is enough. None: nothing fits."""
        places = max(_DIGITS, len(between.low or "") + 1, len(between.high or "") + 1)
        digits = self._digits(between, places, whole=False)
        if digits is None:
            return _EMPTY if between.may_end() else None
        return f'( "." {digits} )' + ("?" if between.may_end() else "")

    def _digits(self, between: _Between, places: int, whole: bool) -> str | None:
        """The rule of one digit or more. ``whole``: exactly ``places``, else up to so many. None: nothing fits."""
        if between == _Between():
            return f"[0-9]{{{places}}}" if whole else f"[0-9]{{1,{places}}}"
        groups: dict[_Between, str] = {}
        for digit in "0123456789":
            after = between.after(digit)
            if after is not None:
                groups[after] = groups.get(after, "") + digit
        options = []
        for after, digits in groups.items():
            more = self._digits(after, places - 1, whole) if places > 1 else None
            if after.may_end() and (places == 1 or not whole):
                options.append(f"[{digits}] ( {more} )?" if more else f"[{digits}]")
            elif more:
                options.append(f"[{digits}] {more}")
        return self._rules.any_of(options) if options else None


_ZERO = Decimal(0)


@dataclass(frozen=True)
class _Between:
    """Bounds for a row of digits, as rows of digits; None for one that can no longer be passed. A row that has ended goes on in zeros."""

    low: str | None = None
    high: str | None = None
    low_open: bool = False
    high_open: bool = False

    def after(self, digit: str) -> _Between | None:
        """The bounds for what follows this digit; None where the digit is not between them."""
        low, high = self.low, self.high
        if low is not None:
            first = low[:1] or "0"
            if digit < first:
                return None
            low = low[1:] if digit == first else None
        if high is not None:
            first = high[:1] or "0"
            if digit > first:
                return None
            high = high[1:] if digit == first else None
        return _Between(low, high, self.low_open and low is not None, self.high_open and high is not None)

    def may_end(self) -> bool:
        is_above = self.low is None or not (self.low.strip("0") or self.low_open)
        return is_above and (self.high is None or bool(self.high.strip("0")) or not self.high_open)


def _bounds(schema: dict[str, Any]) -> tuple[Decimal | None, bool, Decimal | None, bool]:
    """Lowest number and whether it is out itself, highest number and whether it is out itself."""
    exact = {key: Decimal(repr(schema[key])) for key in _BOUNDS if key in schema}
    low, low_open = max(_bound(exact, "minimum", False) + _bound(exact, "exclusiveMinimum", True), default=(None, False))
    high, high_open = min(_bound(exact, "maximum", True) + _bound(exact, "exclusiveMaximum", False), default=(None, True))
    if (low or 0) > _NUMBER_MAX or (high or 0) < -_NUMBER_MAX:
        raise NoSchema(f"a bound in the JSON schema is beyond {_NUMBER_MAX}")
    low = None if low is not None and low < -_NUMBER_MAX else low
    high = None if high is not None and high > _NUMBER_MAX else high
    if low is not None and high is not None and low > high:
        raise _Contradiction("the JSON schema contradicts itself: no number is between its bounds")
    return low, low_open, high, not high_open


def _bound(exact: dict[str, Decimal], key: str, rank: bool) -> list[tuple[Decimal, bool]]:
    return [(exact[key], rank)] if key in exact else []


def _split(number: Decimal) -> tuple[int, str]:
    """The whole part and the digits behind the point."""
    whole, _, rest = format(number, "f").partition(".")
    return int(whole), rest.rstrip("0")


_Set = list[tuple[int, int]]  # code points, from and to
_LAST = 0x10FFFF
_SETS: dict[str, _Set] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [
        *((9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)),
        *((0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
    ],
}
_LINE_ENDS: _Set = [(10, 10), (13, 13), (0x2028, 0x2029)]
_NEVER_RAW: _Set = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
_ESCAPED = {0x22: r"\"", 0x5C: r"\\", 8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r"}  # how JSON writes them
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}


class _Pattern:
    """A regular expression (ECMA-262) as the rule of what stands between the quotes of a JSON string. Raises NoSchema."""

    def __init__(self, rules: _Rules, char: str, text: str) -> None:
        self._rules, self._char, self._text = rules, char, text
        self._at = self._depth = 0

    def rule(self) -> str:
        options = self._options(is_top=True)
        if self._at < len(self._text):
            raise self._wrong("a bracket that was not opened")
        return self._rules.any_of(options)

    def _wrong(self, what: str) -> NoSchema:
        return NoSchema(f"a pattern in the JSON schema has {what}, which cannot be used here (character {self._at})")

    def _eat(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self._at == len(self._text):
            raise self._wrong("an end that comes too early")
        self._at += 1
        return self._text[self._at - 1]

    def _options(self, is_top: bool) -> list[str]:
        options = [self._sequence(is_top)]
        while self._eat("|"):
            options.append(self._sequence(is_top))
        return options

    def _sequence(self, is_top: bool) -> str:
        """Pieces up to the end of an option. A pattern may match anywhere, so what is not anchored has any characters around it."""
        parts = [f"{self._char}*"] if is_top and not self._eat("^") else []
        is_anchored = False
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if is_anchored:
                raise self._wrong("an anchor in its middle")
            is_anchored = is_top and self._eat("$")
            if not is_anchored:
                parts.append(self._piece())
        if is_top and not is_anchored:
            parts.append(f"{self._char}*")
        return " ".join(parts) or _EMPTY

    def _piece(self) -> str:
        atom = self._atom()
        for sign in "*+?":
            if self._eat(sign):
                return self._quantified(f"{atom}{sign}")
        if found := re.compile(r"\{(\d+)(,(\d*))?\}").match(self._text, self._at):
            self._at = found.end()
            low = int(found[1])
            high = low if not found[2] else int(found[3]) if found[3] else None
            if high is not None and low > high:
                raise self._wrong("a repetition whose least is over its most")
            return self._quantified(_repeated(atom, low, high))
        return atom

    def _quantified(self, piece: str) -> str:
        self._eat("?")  # fewest first: the same texts fit
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            raise self._wrong("a repetition of a repetition")
        return piece

    def _atom(self) -> str:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._characters(self._class())
        if char == ".":
            return self._characters(_complement(_LINE_ENDS))
        if char == "\\":
            return self._characters(self._escaped())
        if char in "*+?{}^$)]":
            raise self._wrong(f"{char} at an unusual place")
        return self._characters([(ord(char), ord(char))])

    def _group(self) -> str:
        if self._eat("?") and not self._eat(":"):
            raise self._wrong("a group that begins with (?")
        self._depth += 1
        if self._depth > limits.SCHEMA_DEPTH_MAX:
            raise self._wrong(f"groups nested deeper than {limits.SCHEMA_DEPTH_MAX}")
        options = self._options(is_top=False)
        if not self._eat(")"):
            raise self._wrong("a group without an end")
        self._depth -= 1
        return self._rules.any_of(options)

    def _class(self) -> _Set:
        is_negated = self._eat("^")
        found: _Set = []
        while not self._eat("]"):
            low = self._member()
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._member()
                if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] != high[0][1] or low[0][0] > high[0][0]:
                    raise self._wrong("a range without two ends")
                low = [(low[0][0], high[0][0])]
            found += low
        if not found:
            raise self._wrong("an empty class")
        return _complement(found) if is_negated else found

    def _member(self) -> _Set:
        char = self._next()
        if char == "\\":
            return [(8, 8)] if self._eat("b") else self._escaped()
        return [(ord(char), ord(char))]

    def _escaped(self) -> _Set:
        char = self._next()
        if char.lower() in _SETS:
            return _SETS[char] if char in _SETS else _complement(_SETS[char.lower()])
        if char in _CONTROLS:
            code = _CONTROLS[char]
        elif char in "xu":
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            if not re.fullmatch("[0-9a-fA-F]{2}|[0-9a-fA-F]{4}", digits):
                raise self._wrong("an escape without its digits")
            self._at += len(digits)
            code = int(digits, 16)
        elif char.isalnum():
            raise self._wrong(f"\\{char}")
        else:
            code = ord(char)
        return [(code, code)]

    def _characters(self, wanted: _Set) -> str:
        """The rule of one character of a set, written as JSON writes it."""
        raw = _complement(_complement(wanted) + _NEVER_RAW)
        spans = "".join(f"{_escape(low)}-{_escape(high)}" if low < high else _escape(low) for low, high in raw)
        options = [f"[{spans}]"] if raw else []
        options += [_literal(text) for code, text in _ESCAPED.items() if any(low <= code <= high for low, high in wanted)]
        return self._rules.any_of(options)


def _complement(codes: _Set) -> _Set:
    """All other code points, in order."""
    others, at = [], 0
    for low, high in sorted(codes):
        if low > at:
            others.append((at, low - 1))
        at = max(at, high + 1)
    return [*others, (at, _LAST)] if at <= _LAST else others
