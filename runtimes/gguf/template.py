"""A model file's chat template, rendered in a sandbox: it is a program that a stranger wrote.

jinja2's immutable sandbox keeps it from Python's insides; what it may spend is limited here, without clocks and signals. A rendering ends
after TEMPLATE_STEPS_MAX steps or when it has made four times TEMPLATE_OUTPUT_CHARS_MAX characters, wherever it runs:

- a round of a loop and a call of a macro cost a step, and one more for every 16 nodes of their body;
- whatever else takes time or memory passes a gate that looks at the size of its values first: calls, operators, comparisons, slices,
  filters, tests and what is printed. A gate counts a value as often as it stands there: ``[a, a]`` of ``[b, b]`` of ``[c, c]`` … is
  short to write and endless to print, to compare and to hash;
- nothing is computed while the template is compiled: a filter that takes the context is never folded into a constant.

Filters, tests and methods are those that chat templates use, and those that could make much of little are ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from jinja2 import nodes, pass_context
from jinja2.filters import do_int, do_round
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from protocol import limits
from protocol.errors import Code, ConfigError, Refused
from protocol.generation import ChatMessage, Tool
from runtimes.gguf.tool_syntax import ToolSyntax, as_templates_take_them, syntax_of

_FILTERS_LAZY = frozenset(  # their time does not depend on the size of what they are given, or they are generators
    "attr count d default first items last length list map reject rejectattr reverse safe select selectattr".split()
)
_FILTERS = _FILTERS_LAZY | frozenset(
    "abs capitalize dictsort e escape float groupby lower max min slice sort string title unique upper".split()
)
_TESTS_LAZY = frozenset(
    "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none number odd sameas sequence "
    "string test true undefined".split()
)
_STR_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper lower "
    "lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper".split()
)
_SLOW_METHODS = frozenset("lstrip rfind rindex rpartition rsplit rstrip strip".split())  # product of both lengths at worst
_SPLITS = frozenset({"split", "rsplit", "splitlines"})
_COLLECTION_METHODS = frozenset({"get", "items", "keys", "values", "copy", "count", "index"})
_LOOP_METHODS = frozenset({"cycle", "changed"})
_CALLERS_OWN = frozenset({"_loop_vars", "_block_vars"})  # jinja2 adds them to each call in a loop and takes them away again
_NUMBER_MAX = 2**64
_DIGITS_MAX = 1000  # of a text that becomes a number
_PLACES_MAX = 15
_SHORT_ID_CHARS = 9
_INDENT_MAX = 16
_REASON_CHARS_MAX = 200
_DEPTH_MAX = 32  # of a value that is printed, compared or hashed
_NODES_PER_STEP = 16
_CHARS_PER_STEP = 1024  # read or copied; they take less time than a step
_ITEM_CHARS = 8  # an entry of a list takes as much memory as so many characters
_PIECE_CHARS = 64  # and a text of its own at least as many

_Node = TypeVar("_Node", nodes.Macro, nodes.CallBlock, nodes.Block)


class _TooMuch(Exception):
    """The template spent more than it may."""


class _Refusal(Exception):
    """The template itself says that these messages do not fit."""


class _Budget:
    """What one rendering has spent."""

    def __init__(self) -> None:
        self.steps, self.chars = 0, 0

    def step(self, count: int = 1) -> None:
        self.steps += max(1, count)
        if self.steps > limits.TEMPLATE_STEPS_MAX:
            raise _TooMuch(f"more than {limits.TEMPLATE_STEPS_MAX} steps")

    def read(self, size: int) -> None:
        """So many characters are looked at."""
        self.step(1 + size // _CHARS_PER_STEP)

    def text(self, size: int) -> None:
        """So many characters are made."""
        self.read(size)
        self.chars += size
        if self.chars > 4 * limits.TEMPLATE_OUTPUT_CHARS_MAX:
            raise _TooMuch(f"more than {limits.TEMPLATE_OUTPUT_CHARS_MAX} characters")

    def weigh(self, value: object) -> int:
        """Reads a value and all values in it. Returns its size: characters and entries."""
        size, level = 0, [value]
        for _ in range(_DEPTH_MAX):
            if not level:
                return size
            below: list[object] = []
            for item in level:
                if isinstance(item, str):
                    size += len(item)
                    self.read(len(item))
                elif isinstance(item, list | tuple | dict | range | KeysView | ValuesView | ItemsView):
                    size += _ITEM_CHARS * len(item)
                    self.step(len(item))
                    below += _entries(item)
                elif isinstance(item, Namespace):
                    raise _TooMuch("a namespace as a value")  # may hold itself
            level = below
        raise _TooMuch(f"a value nested deeper than {_DEPTH_MAX}")


class _Metered(NodeTransformer):
    """Sends what could take long through our filters, which count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise _TooMuch("a recursive loop")
        price = nodes.Const(_price(node))
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [price], [], None, None, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._charge_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Block:
        return self._charge_body(node)

    def _charge_body(self, node: _Node) -> _Node:
        price = nodes.Const(_price(node), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("paid", price), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter("sliced", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        for operand in node.ops:  # what stands first is looked at only as far as these go
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _weighed(node.key)
        return node


class _Sandbox(ImmutableSandboxedEnvironment):
    """One per template; ``budget`` is replaced for each rendering, which no other thread may share."""

    intercepted_binops = frozenset({"+", "*", "%", "**", "//", "/", "-"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], cache_size=0)
        self.budget = _Budget()
        self.concat = self._concat  # type: ignore[method-assign]
        self.finalize = self._printed
        self.filters = {name: self._gate(self.filters[name], name in _FILTERS_LAZY) for name in _FILTERS}
        self.filters |= self._own_filters()
        tests: Mapping[str, Callable[..., Any]] = self.tests  # type: ignore[assignment]  # jinja2 calls some of them "function"
        self.tests = {name: self._gate(test, name in _TESTS_LAZY) for name, test in (*tests.items(), *_OWN_TESTS.items())}
        self.globals = {
            "range": _short_range,
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _own_filters(self) -> dict[str, Callable[..., Any]]:
        return {
            "counted": self._counted,
            "indent": self._gate(self._indent, pays=True),
            "int": self._gate(_int),
            "join": self._gate(self._join, lazy=True, pays=True),
            "paid": self._paid,
            "replace": self._gate(self._replace, pays=True),
            "round": self._gate(_round),
            "sliced": self._gate(_sliced, lazy=True),
            "sum": self._gate(self._sum),
            "tojson": self._gate(self._tojson, pays=True),
            "trim": self._gate(self._trim),
            "weighed": self._weighed,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return tree

    def _gate(self, function: Callable[..., Any], lazy: bool = False, pays: bool = False) -> Callable[..., Any]:
        """A filter or test that pays for what it reads, unless it is lazy, and for what it makes, unless it pays itself."""
        wants = _PassArg.from_obj(function)

        @pass_context
        def gated(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            self.budget.step(1 + len(args) + len(kwargs))
            if not lazy:
                value = list(self._steps(value)) if isinstance(value, Iterator) else value
                for each in (value, *args, *kwargs.values()):
                    size = self.budget.weigh(each)
                    self.budget.text(0 if isinstance(each, str) else size)  # it may have to become a text
            first = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx, _PassArg.environment: self}
            result = function(*([first[wants]] if wants else []), value, *args, **kwargs)
            return result if pays or result is value else self._made(result)

        return gated

    def _made(self, result: Any) -> Any:
        """Pays for something new."""
        if isinstance(result, Iterator):
            return self._steps(result)
        if isinstance(result, str):
            self.budget.text(len(result))
        elif isinstance(result, list | tuple | dict):
            self.budget.text(_ITEM_CHARS * len(result))
        return result

    def _steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.step()
            yield value

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.step(1 + len(args) + len(kwargs))
        if isinstance(obj, Macro | BlockReference | Undefined):
            return super().call(context, obj, *args, **kwargs)
        for value in (*args, *(value for name, value in kwargs.items() if name not in _CALLERS_OWN)):
            self.budget.weigh(value)
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            return self._call_on_text(context, owner, name, obj, args, kwargs)
        if isinstance(owner, dict | list | tuple) and name in _COLLECTION_METHODS:
            if name in ("count", "index"):
                self.budget.weigh(owner)
        elif not (isinstance(owner, LoopContext) and name in _LOOP_METHODS) and all(obj is not ours for ours in self.globals.values()):
            raise _TooMuch(f"a call of {name or type(obj).__name__}")
        return self._made(super().call(context, obj, *args, **kwargs))

    def _call_on_text(self, context: Any, owner: str, name: str, obj: Any, args: Any, kwargs: Any) -> Any:
        self.budget.text(len(owner))
        if name == "replace":
            return super().call(context, self._replace, owner, *args, **kwargs)
        if name == "join":
            return super().call(context, partial(self._join, separator=owner), *args, **kwargs)
        if name not in _STR_METHODS:
            raise _TooMuch(f"the method {name} of a text")
        sought = args[0] if args else kwargs.get("sep")
        if name in _SLOW_METHODS and isinstance(sought, str):
            self.budget.read(len(owner) * len(sought))
        if name in _SPLITS:  # without a separator a word is taken to have 8 characters
            self.budget.text(_PIECE_CHARS * (owner.count(sought) if isinstance(sought, str) else len(owner) // 8))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.step()
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self.budget.text(len(left) + len(right))
        elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.budget.text((len(left) + len(right)) * _ITEM_CHARS)
        elif not _is_number(left) or not _is_number(right) or operator == "**":
            raise _TooMuch(f"the operator {operator} on {type(left).__name__} and {type(right).__name__}")
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            self.budget.weigh(argument)  # it is hashed
        return super().getitem(obj, argument)

    def _concat(self, parts: Iterable[str]) -> str:
        return "".join(self._texts(parts))

    def _texts(self, parts: Iterable[str]) -> Iterator[str]:
        for part in parts:
            self.budget.text(len(part))
            yield part

    @pass_context
    def _printed(self, _: Context, value: Any) -> Any:
        self._text(value)
        return value

    def _text(self, value: Any) -> Any:
        """Pays for turning a value into a text."""
        size = self.budget.weigh(value)
        if not isinstance(value, str):
            self.budget.text(size)
        return value

    @pass_context
    def _counted(self, _: Context, values: Iterable[Any], price: int) -> list[Any]:
        """What a loop goes over. It stays a list, since templates ask ``loop.last``."""
        items = []
        for item in values:
            self.budget.step(price)
            items.append(item)
        return items

    @pass_context
    def _paid(self, _: Context, price: int) -> None:
        self.budget.step(price)

    @pass_context
    def _weighed(self, _: Context, value: Any) -> Any:
        self.budget.weigh(value)
        return value

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        picked = [value if attribute is None else self.getitem(value, attribute) for value in self._steps(values)]
        texts = [str(self._text(value)) for value in picked]
        self.budget.text(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def _trim(self, text: Any, chars: str | None = None) -> str:
        whole = str(text)
        self.budget.read(len(whole) * len(chars or ""))
        return whole.strip(chars)

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        whole, old, new = str(text), str(old), str(new)
        found = whole.count(old) if count is None or count < 0 else min(count, whole.count(old))
        self.budget.text(len(whole) + found * len(new))
        return whole.replace(old, new, found)

    def _indent(self, text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
        lines = str(text).split("\n")
        self.budget.text(len(text) + len(lines) * min(abs(int(width)), 10**9))
        pad = " " * int(width)
        return "\n".join(pad + line if (line or blank) and (i or first) else line for i, line in enumerate(lines))

    def _sum(self, values: Iterable[Any], attribute: str | None = None, start: Any = 0) -> Any:
        for value in values:
            start = self.call_binop(None, "+", start, value if attribute is None else self.getitem(value, attribute))
        return start

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Plain JSON with the arguments that transformers has here; chat templates do not want jinja2's escapes for HTML."""
        if not 0 <= (indent or 0) <= _INDENT_MAX or any(len(separator) > _INDENT_MAX for separator in separators or ()):
            raise _TooMuch(f"JSON with an indent or a separator over {_INDENT_MAX}")
        self.budget.text(self.budget.weigh(value) * (indent or 1))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A template, compiled once. Raises ConfigError when it cannot be: the model file is then of no use for chats."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source.encode("utf-8", "replace")) > limits.TEMPLATE_BYTES_MAX:
            raise ConfigError(f"the model's chat template is over {limits.TEMPLATE_BYTES_MAX} bytes; use another model file")
        self._sandbox, self._bos, self._eos = _Sandbox(), bos, eos
        try:
            self._template = self._sandbox.from_string(source)
            has_tools = any(name.name == "tools" for name in self._sandbox.parse(source).find_all(nodes.Name))
        except Exception as error:  # jinja2 makes Python of a stranger's text and Python may refuse that in any way
            reason = str(error)[:_REASON_CHARS_MAX] or type(error).__name__
            raise ConfigError(f"the model's chat template cannot be used ({reason}); use another model file") from error
        self.tools = syntax_of(source) if has_tools else ToolSyntax.NONE
        self._shows_calls = "tool_calls" in source

    def __repr__(self) -> str:
        return "<ChatTemplate>"

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
        """The prompt for these messages. Raises Refused: bad_input where the template forbids them or spends too much, tools_not_supported
        where it would leave something out."""
        if tools and self.tools is ToolSyntax.NONE:
            raise Refused(Code.NO_TOOLS, "this model has no tools: its chat template has no place for them, or an unknown one")
        if not self._shows_calls and any(message.tool_calls for message in messages):
            raise Refused(Code.NO_TOOLS, "this model's chat template has no place for the tool_calls of messages")
        short_ids = self.tools is ToolSyntax.MISTRAL
        plain = [_plain(message, short_ids) for message in messages]
        offered = as_templates_take_them(tools)
        self._sandbox.budget = _Budget()
        pieces: list[str] = []
        size = 0
        try:
            values = {"messages": plain, "bos_token": self._bos, "eos_token": self._eos, "add_generation_prompt": True, "tools": offered}
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
        except Exception as error:  # jinja2: "other exceptions may occur … the caller has to ensure that all exceptions are caught"
            raise Refused(Code.BAD_INPUT, f"the model's chat template failed on these messages ({type(error).__name__})") from None
        return "".join(pieces)


def _plain(message: ChatMessage, short_ids: bool) -> dict[str, Any]:
    """As templates take a message. ``short_ids``: Mistral's want 9 letters or digits."""

    def shown(call_id: str) -> str:
        return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID_CHARS] if short_ids else call_id

    fields: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.name:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": shown(call.id), "type": "function", "function": {"name": call.name, "arguments": _arguments(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        fields["tool_call_id"] = shown(message.tool_call_id)
    return fields


def _arguments(text: str) -> Any:
    """An object, which templates write as JSON; the text itself where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < _NUMBER_MAX


def _is_odd(value: object) -> bool:
    return _is_divisible(value, 2, 1)


def _is_even(value: object) -> bool:
    return _is_divisible(value, 2)


def _is_divisible(value: object, number: object, rest: int = 0) -> bool:
    """jinja2's own would format a text with the number: ``"%999999999d" is odd``."""
    if not isinstance(value, int | float) or not isinstance(number, int | float):
        raise _TooMuch(f"dividing a {type(value).__name__}")
    return value % number == rest


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    if isinstance(value, str) and len(value) > _DIGITS_MAX:
        raise _TooMuch(f"a number of more than {_DIGITS_MAX} digits")
    return do_int(value, default, base)


def _sliced(values: Any, start: int | None, stop: int | None, step: int | None) -> Any:
    return values[start:stop:step]


def _round(value: Any, precision: int = 0, method: str = "common") -> float:
    if not _is_number(value) or not 0 <= precision <= _PLACES_MAX:
        raise _TooMuch(f"rounding a {type(value).__name__} to {precision} places")
    return do_round(value, precision, method)  # type: ignore[arg-type]


def _short_range(*bounds: int) -> range:
    values = range(*bounds)
    if len(values) > limits.TEMPLATE_RANGE_MAX:
        raise _TooMuch(f"a range over {limits.TEMPLATE_RANGE_MAX}")
    return values


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message)[:_REASON_CHARS_MAX])


def _strftime_now(form: str) -> str:
    if len(form) > 100:
        raise _TooMuch("a date format over 100 characters")
    return datetime.now().strftime(form)


def _filter(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    """The expression, behind the gate where it is not written out as a constant."""
    parts = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    return node if all(isinstance(part, nodes.Const) for part in parts) else _filter("weighed", node)


def _price(node: nodes.Node) -> int:
    """Steps of one round of a loop or one call of a macro."""
    return 1 + sum(1 for _ in node.find_all(nodes.Node)) // _NODES_PER_STEP


def _entries(item: Any) -> list[object]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return [] if isinstance(item, range) else list(item)


_OWN_TESTS: Mapping[str, Callable[..., Any]] = {"odd": _is_odd, "even": _is_even, "divisibleby": _is_divisible}
