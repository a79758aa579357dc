"""What a definition says a step shall get: JSON with templates and JSON pointers in it.

A *value* is a constant, a template, a pointer into the variables, or a list or object of values. Texts with ``{{`` or ``{%`` are
templates, ``{% raw %}`` keeps braces as they are; all other texts stand for themselves. A pointer is
``{"pointer": "/translate/output/text", "default": …}`` and begins with the name of a step or a variable; without a default it is an error
where nothing stands there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.workflows.errors import FlowError
from coordinator.workflows.pointers import MISSING, Pointer, parse_pointer
from coordinator.workflows.templates import Template, parse_template
from protocol import limits

_POINTER_FIELDS = {"pointer", "default"}


class Renders(Protocol):
    """Whoever renders templates: templates.Templates."""

    async def render(self, template: str | Template, variables: Mapping[str, Any]) -> Any:
        """Raises FlowError."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """JSON without any template in it."""

    value: Any


@dataclass(frozen=True, slots=True)
class Reference:
    """What stands at a pointer into the variables. ``default``: MISSING where it is an error that nothing does."""

    pointer: Pointer
    default: Any = MISSING

    @property
    def name(self) -> str:
        return self.pointer.tokens[0]


@dataclass(frozen=True, slots=True)
class Items:
    """A list of values."""

    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Object:
    """An object of values."""

    fields: tuple[tuple[str, Value], ...]


Value = Constant | Template | Reference | Items | Object


def parse_value(value: Any, where: str, pointers: bool, depth: int = 0) -> Value:
    """``pointers``: whether objects may be pointers. Raises FlowError for what is no JSON, too deep, or no template."""
    if depth > limits.FLOW_DEPTH_MAX:
        raise FlowError(where, f"is nested deeper than {limits.FLOW_DEPTH_MAX}")
    if isinstance(value, str):
        return _parse_text(value, where)
    if isinstance(value, Mapping):
        if pointers and "pointer" in value and value.keys() <= _POINTER_FIELDS:
            return parse_reference(value, where)
        for name in value:
            _parse_name(name, where)
        fields = tuple((name, parse_value(part, f"{where}.{name}", pointers, depth + 1)) for name, part in value.items())
        is_constant = all(isinstance(part, Constant) for _, part in fields)
        return Constant(dict(value)) if is_constant else Object(fields)
    if isinstance(value, list | tuple):
        items = tuple(parse_value(part, f"{where}[{index}]", pointers, depth + 1) for index, part in enumerate(value))
        return Constant(list(value)) if all(isinstance(part, Constant) for part in items) else Items(items)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return Constant(value)
    raise FlowError(where, "is no JSON value")


def parse_reference(value: Mapping[str, Any], where: str) -> Reference:
    """``{"pointer": TEXT, "default"?: JSON}``. Raises FlowError."""
    text = value["pointer"]
    if not isinstance(text, str):
        raise FlowError(f"{where}.pointer", "must be a string")
    try:
        pointer = parse_pointer(text)
    except FlowError as error:
        raise error.at(f"{where}.pointer") from None
    if not pointer.tokens:
        raise FlowError(f"{where}.pointer", "must name a step or a variable first, as in /translate/output/text")
    if "default" not in value:
        return Reference(pointer)
    default = parse_value(value["default"], f"{where}.default", pointers=False)
    if not isinstance(default, Constant):
        raise FlowError(f"{where}.default", "must not be a template")
    return Reference(pointer, default.value)


def names_in(value: Value, where: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Names of steps and variables that a value looks at, each with where it does."""
    if isinstance(value, Template):
        yield where, value.names
    elif isinstance(value, Reference):
        yield f"{where}.pointer", frozenset({value.name})
    elif isinstance(value, Items):
        for index, item in enumerate(value.items):
            yield from names_in(item, f"{where}[{index}]")
    elif isinstance(value, Object):
        for name, field in value.fields:
            yield from names_in(field, f"{where}.{name}")


def written(value: Value) -> Any:
    """The JSON that ``parse_value`` has read."""
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, Template):
        return value.source
    if isinstance(value, Reference):
        default = {} if value.default is MISSING else {"default": value.default}
        return {"pointer": str(value.pointer), **default}
    if isinstance(value, Items):
        return [written(item) for item in value.items]
    return {name: written(field) for name, field in value.fields}


async def evaluate(value: Value, variables: Mapping[str, Any], renders: Renders, where: str = "") -> Any:
    """The JSON that a value stands for. Raises FlowError: a template that fails, a pointer to nothing."""
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, Items):
        return [await evaluate(item, variables, renders, f"{where}[{index}]") for index, item in enumerate(value.items)]
    if isinstance(value, Object):
        return {name: await evaluate(field, variables, renders, f"{where}.{name}") for name, field in value.fields}
    if isinstance(value, Template):
        try:
            return await renders.render(value, variables)
        except FlowError as error:
            raise error.at(where) from None
    found = value.pointer.find(variables)
    if found is not MISSING:
        return found
    if value.default is MISSING:
        raise FlowError(f"{where}.pointer", f"nothing stands at {value.pointer}")
    return value.default


def _parse_text(text: str, where: str) -> Value:
    _check_text(text, where)
    if "{{" not in text and "{%" not in text:
        return Constant(text)
    try:
        return parse_template(text)
    except FlowError as error:
        raise error.at(where) from None


def _parse_name(name: Any, where: str) -> None:
    if not isinstance(name, str):
        raise FlowError(where, "has a field whose name is no string")
    _check_text(name, where)


def _check_text(text: str, where: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FlowError(where, "holds half of a surrogate pair") from None
