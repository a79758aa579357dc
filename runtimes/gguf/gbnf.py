"""The grammar of all texts that are valid for a parsed JSON schema; schema.py says how a choice is made where one is left open. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from runtimes.gguf.gbnf_numbers import Numbers
from runtimes.gguf.gbnf_pattern import Pattern
from runtimes.gguf.gbnf_rules import EMPTY, Rules, escape, json_literal, literal, repeated
from runtimes.gguf.schema import KINDS_OF, RESTRICTING, TYPES, VISITS_MAX, Contradiction, NoSchema, target

_SPACE = r'( " " | "\n" [ \t]{0,20} )?'
_CHAR = (
    r'[^"\\\x00-\x1F\x7F] | "\\" ["\\/bfnrt] | "\\u" ( [0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2} )'
    r' | "\\u" [dD] [89abAB] [0-9a-fA-F]{2} "\\u" [dD] [c-fC-F] [0-9a-fA-F]{2}'
)
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


def gbnf(schema: dict[str, Any]) -> str:
    """The grammar of all texts that are valid for a parsed schema, in llama.cpp's notation. Raises NoSchema."""
    try:
        return _Writer(schema).grammar()
    except RecursionError:
        raise NoSchema("the JSON schema refers to itself without end, or is nested too deeply") from None


class _Writer:
    """Writes the rules of one schema. A value's rule is found by what the schema says of it, from the outside in."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._rules = Rules()
        self._numbers = Numbers(self._rules)
        self._by_pointer: dict[str, str] = {}
        self._visits = 0
        self._space, self._char = self._rules.add(_SPACE), self._rules.add(_CHAR)

    def grammar(self) -> str:
        return self._rules.text(self._value(self._schema))

    def _value(self, schema: Any) -> str:
        """The rule of all values that fit a schema."""
        self._visit()
        if schema is False:
            raise Contradiction("the JSON schema contradicts itself: no value fits it")
        if schema is True or not schema.keys() & RESTRICTING:
            return self._anything()
        if "$ref" in schema and len(schema.keys() & RESTRICTING) == 1:
            return self._reference(schema["$ref"])
        plain = self._plain(schema)
        if not plain.keys() & RESTRICTING:
            return self._anything()
        for key in ("anyOf", "oneOf"):
            if key in plain:
                return self._choice({k: v for k, v in plain.items() if k != key}, plain[key])
        if "const" in plain or "enum" in plain:
            return self._constants(plain)
        return self._rules.any_of([self._of_kind(kind, plain) for kind in _kinds(plain)])

    def _visit(self, count: int = 1) -> None:
        self._visits += count
        if self._visits > VISITS_MAX:
            raise NoSchema("the JSON schema has too many combinations; make it smaller")

    def _reference(self, pointer: str) -> str:
        if pointer not in self._by_pointer:
            name = self._by_pointer[pointer] = self._rules.reserve()
            try:
                self._rules.set(name, self._value(target(self._schema, pointer)))
            except NoSchema:  # another option may do without it, and must not find half a rule
                del self._by_pointer[pointer]
                raise
        return self._by_pointer[pointer]

    def _anything(self) -> str:
        if _ANYTHING not in self._by_pointer:
            name = self._by_pointer[_ANYTHING] = self._rules.reserve()
            self._rules.set(name, " | ".join(self._of_kind(kind, {}) for kind in TYPES if kind != "integer"))
        return self._by_pointer[_ANYTHING]

    def _choice(self, base: dict[str, Any], options: list[Any]) -> str:
        """One of the options, each together with what stands beside them. An option that contradicts it is none."""
        rules, reason = [], Contradiction("the JSON schema offers a choice of nothing")
        for option in options:
            try:
                rules.append(self._value(self._both(base, option) if base.keys() & RESTRICTING else option))
            except Contradiction as error:
                reason = error
        if not rules:
            raise reason
        return self._rules.any_of(rules)

    def _constants(self, schema: dict[str, Any]) -> str:
        values = schema.get("enum", [schema.get("const")])
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        kinds = schema.get("type", list(TYPES))
        return self._rules.any_of([json_literal(value) for value in values if any(_is_kind(value, kind) for kind in _listed(kinds))])

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
            raise Contradiction("the JSON schema contradicts itself: no value fits it")
        rest = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
        if "$ref" in schema:
            rest = self._both(target(self._schema, schema["$ref"]), rest)
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
        if key not in RESTRICTING or one == other or key == "properties":
            return one
        if key == "type":
            return [kind for kind in TYPES if _has_kind(one, kind) and _has_kind(other, kind)]
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
            return rf'"\"" {Pattern(self._rules, self._char, schema["pattern"]).rule()} "\""'
        if not low and high is None and isinstance(schema.get("format"), str) and schema["format"] in _FORMATS:
            return rf'"\"" {self._rules.add(_FORMATS[schema["format"]])} "\""'
        return rf'"\"" {repeated(self._char, low, high)} "\""'

    def _array(self, schema: dict[str, Any]) -> str:
        low, high = _counts(schema, "minItems", "maxItems")
        first, more = schema.get("prefixItems", []), schema.get("items")
        if isinstance(more, list):  # as it was before 2020-12
            first, more = more, schema.get("additionalItems")
        if more is False or (more is None and first):  # what is not described comes only where it must
            most = len(first) if more is False else max(low, len(first))
            high = most if high is None else min(high, most)
        more = True if more is None else more
        if high is not None and low > high:
            raise Contradiction("the JSON schema contradicts itself: minItems is more than there can be")
        fixed = [self._value(item) for item in (first if high is None else first[:high])]
        comma = f'"," {self._space} '
        if fixed:
            items = f" {comma}".join(fixed)
            if high is None or high > len(fixed):
                items += " " + repeated(f"( {comma}{self._value(more)} )", max(0, low - len(fixed)), high and high - len(fixed))
        elif high == 0:
            return f'"[" {self._space} "]"'
        else:
            item = self._value(more)
            items = f"{item} " + repeated(f"( {comma}{item} )", max(0, low - 1), high and high - 1)
        whole = f"{items} {self._space}"
        return f'"[" {self._space} {whole if low or fixed else f"( {whole} )?"} "]"'

    def _object(self, schema: dict[str, Any]) -> str:
        properties = dict(schema.get("properties", {}))
        others = schema.get("additionalProperties", "properties" not in schema)
        required = set(schema.get("required", ()))
        for name in schema.get("required", ()):
            if name not in properties:
                if schema.get("additionalProperties", True) is False:
                    raise Contradiction(f"the JSON schema requires {name[:100]!r}, which is none of the properties")
                properties[name] = others or True
        low, high = _other_counts(schema, properties, required, others)
        comma = f'"," {self._space} '
        rest, start = "", ""  # what may follow a property, and what may be the first with what follows it
        if others is not False and high != 0:
            pair = self._rules.add(f'{self._other_name(list(properties))} ":" " "? {self._value(others)}')
            rest = self._rules.add(repeated(f"( {comma}{pair} )", low, high))
            start = f"{pair} " + repeated(f"( {comma}{pair} )", max(0, low - 1), high and high - 1)
        for name, value in reversed(properties.items()):
            try:
                pair = self._rules.add(f'{json_literal(name)} ":" " "? {self._value(value)}')
            except Contradiction:
                if name in required:
                    raise
                continue  # it may not be there
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
        options = [] if "" in names else [EMPTY]
        firsts = "".join(escape(ord(c)) for c in by_first if not "\ud800" <= c <= "\udfff")
        options.append(rf'[^"\\\x00-\x1F\x7F{firsts}] {tail}')
        for first, rests in by_first.items():
            if first not in '"\\\x7f' and first >= " " and not "\ud800" <= first <= "\udfff":
                options.append(f"{literal(first)} {self._none_of(rests)}")
        return self._rules.any_of(options)


_ANYTHING = "anything"  # stands among the pointers, which begin with #


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kinds(schema: dict[str, Any]) -> list[str]:
    """The kinds of values that a schema speaks of; those it does not mention are left out even where it would let them through."""
    if "type" in schema:
        kinds = _listed(schema["type"])
        return [kind for kind in kinds if kind != "integer" or "number" not in kinds]
    return [kind for kind, keys in KINDS_OF.items() if schema.keys() & set(keys)]


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
        raise Contradiction(f"the JSON schema contradicts itself: {lowest} is over {highest}")
    return low, high


def _other_counts(schema: dict[str, Any], properties: dict[str, Any], required: set[str], others: Any) -> tuple[int, int | None]:
    """How many properties there may be that the schema does not name."""
    low, high = _counts(schema, "minProperties", "maxProperties")
    low, high = max(0, low - len(required)), None if high is None else high - len(properties)
    may_lack = len(required) < len(properties)
    if low > 1 or (low and may_lack) or (high is not None and high < 0 and may_lack):  # a name may come twice, so two are not two
        raise NoSchema("minProperties and maxProperties in the JSON schema are nothing that an answer can be held to here; leave them out")
    if (high is not None and high < low) or (low and others is False):
        raise Contradiction("the JSON schema contradicts itself: it does not leave room for its properties")
    return low, high
