"""A model file's chat template, rendered in a sandbox: it is a program that a stranger wrote.

jinja2's immutable sandbox keeps it from Python's insides; what it may spend is limited here. Every round of a loop, every call and every
joined piece of text is counted against a budget, so a template ends after TEMPLATE_STEPS_MAX steps or TEMPLATE_OUTPUT_CHARS_MAX
characters wherever it runs, without clocks and signals. Filters and string methods are those that chat templates use, and those that
could make much of little are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from protocol import limits
from protocol.errors import Code, ConfigError, Refused
from protocol.generation import ChatMessage

_FILTERS = (
    "abs attr capitalize count d default dictsort first float groupby int items last length list lower map max min reject rejectattr "
    "reverse round safe select selectattr slice sort string sum title trim unique upper e escape"
).split()
_STR_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper lower "
    "lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper".split()
)
_COLLECTION_METHODS = frozenset({"get", "items", "keys", "values", "copy", "count", "index"})
_NUMBER_MAX = 2**64


class _TooMuch(Exception):
    """The template spent more than it may."""


class _Refusal(Exception):
    """The template itself says that these messages do not fit."""


class _Budget:
    """What one rendering has spent."""

    def __init__(self) -> None:
        self.steps, self.chars = 0, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > limits.TEMPLATE_STEPS_MAX:
            raise _TooMuch(f"more than {limits.TEMPLATE_STEPS_MAX} steps")

    def text(self, size: int) -> None:
        self.step()
        self.chars += size
        if self.chars > 4 * limits.TEMPLATE_OUTPUT_CHARS_MAX:
            raise _TooMuch(f"more than {limits.TEMPLATE_OUTPUT_CHARS_MAX} characters")


class _Counted(NodeTransformer):
    """Sends every loop and every ``~`` through a filter that counts."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise _TooMuch("a recursive loop")
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """One per template; ``budget`` is replaced for each rendering, which no other thread may share."""

    intercepted_binops = frozenset({"+", "*", "%", "**", "//", "/", "-"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0)
        self.budget = _Budget()
        self.concat = self._concat  # type: ignore[method-assign]
        builtin = dict(self.filters)
        self.filters = {name: builtin[name] for name in _FILTERS if name in builtin}
        self.filters |= {"counted": self._counted, "join": self._join_filter, "replace": self._replace, "tojson": _to_json, "indent": self._indent}
        self.globals = {
            "range": _short_range,
            "dict": dict,
            "namespace": jinja2.utils.Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counted().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            return self._call_on_text(context, owner, name, obj, args, kwargs)
        if isinstance(owner, dict | list | tuple) and name not in _COLLECTION_METHODS:
            raise _TooMuch(f"the method {name} of a collection")
        return super().call(context, obj, *args, **kwargs)

    def _call_on_text(self, context: Any, owner: str, name: str, obj: Any, args: Any, kwargs: Any) -> Any:
        self.budget.text(len(owner))
        if name == "replace":
            return self._replace(owner, *args, **kwargs)
        if name == "join":
            return self._join(args[0] if args else (), owner)
        if name not in _STR_METHODS:
            raise _TooMuch(f"the method {name} of a text")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.budget.text(len(left) + len(right))
        elif not _is_number(left) or not _is_number(right) or operator == "**":
            raise _TooMuch(f"the operator {operator} on {type(left).__name__} and {type(right).__name__}")
        return super().call_binop(context, operator, left, right)

    def _concat(self, parts: Iterable[str]) -> str:
        return "".join(self._measured(parts))

    def _measured(self, parts: Iterable[str]) -> Iterator[str]:
        for part in parts:
            self.budget.text(len(part))
            yield part

    @pass_context  # keeps jinja2 from folding a constant list at compile time, which would then not be counted
    def _counted(self, _: Context, values: Iterable[Any]) -> list[Any]:
        """What a loop goes over, one step a round. It stays a list, since templates ask ``loop.last``."""
        items = []
        for item in values:
            self.budget.step()
            items.append(item)
        return items

    @pass_context
    def _join_filter(self, _: Context, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        return self._join(values, separator, attribute)

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        picked = [value if attribute is None else self.getitem(value, attribute) for value in values]
        texts = [str(value) for value in picked]
        self.budget.text(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        text = str(text)
        found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        self.budget.text(len(text) + found * len(new))
        return text.replace(old, new, found)

    def _indent(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        lines = str(text).split("\n")
        self.budget.text(len(text) + len(lines) * min(abs(int(width)), 10**9))
        pad = " " * int(width)
        return "\n".join(pad + line if (line or blank) and (i or first) else line for i, line in enumerate(lines))


class ChatTemplate:
    """A template, compiled once. Raises ConfigError when it cannot be: the model file is then of no use for chats."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source.encode()) > limits.TEMPLATE_BYTES_MAX:
            raise ConfigError(f"the model's chat template is over {limits.TEMPLATE_BYTES_MAX} bytes; use another model file")
        self._sandbox, self._bos, self._eos = _Sandbox(), bos, eos
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, _TooMuch, RecursionError) as error:
            raise ConfigError(f"the model's chat template cannot be used ({error}); use another model file") from error

    def __repr__(self) -> str:
        return "<ChatTemplate>"

    def render(self, messages: Iterable[ChatMessage]) -> str:
        """The prompt for these messages. Raises Refused(bad_input) where the template forbids them or spends too much."""
        plain = [{"role": str(m.role), "content": m.content} | ({"name": m.name} if m.name else {}) for m in messages]
        self._sandbox.budget = _Budget()
        pieces: list[str] = []
        size = 0
        try:
            values = {"messages": plain, "bos_token": self._bos, "eos_token": self._eos, "add_generation_prompt": True, "tools": None}
            for piece in self._template.generate(values):
                size += len(piece)
                self._sandbox.budget.step()
                if size > limits.TEMPLATE_OUTPUT_CHARS_MAX:
                    raise _TooMuch(f"more than {limits.TEMPLATE_OUTPUT_CHARS_MAX} characters")
                pieces.append(piece)
        except _Refusal as error:
            raise Refused(Code.BAD_INPUT, f"the model's chat template refuses these messages: {error}") from None
        except _TooMuch as error:
            raise Refused(Code.BAD_INPUT, f"the model's chat template was stopped: {error}") from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
            raise Refused(Code.BAD_INPUT, f"the model's chat template failed on these messages ({type(error).__name__})") from None
        return "".join(pieces)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _NUMBER_MAX


def _short_range(*bounds: int) -> range:
    values = range(*bounds)
    if len(values) > limits.TEMPLATE_RANGE_MAX:
        raise _TooMuch(f"a range over {limits.TEMPLATE_RANGE_MAX}")
    return values


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message)[:200])


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise _TooMuch("a date format over 100 characters")
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON: chat templates do not want jinja2's escapes for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise _TooMuch("an indent over 16")
    return json.dumps(value, ensure_ascii=False, indent=indent)
