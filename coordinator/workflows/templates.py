"""Templates: read and checked here, computed in a process of their own.

Theory of operation. A template is jinja2's syntax, less all that reaches outside it: what is not in our lists of syntax, filters, tests and
methods is refused when the definition is submitted. Reading runs none of it: the environment here knows the names of filters and not
one filter. Most templates only name things (``Dear {{ a.output.name }}``); those are looked up here. All others go to a template worker
(template_worker.py), a process with hard limits, which is ended and replaced when it takes too long.

A template that is exactly one ``{{ expression }}`` gives that JSON value, any other a text, in which values that are no texts stand as
compact JSON. ``.name`` reads a field of an object before anything else; there are no attributes but those of data.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import trio
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.environment import Environment
from jinja2.exceptions import TemplateSyntaxError
from jinja2.meta import TrackingCodeGenerator
from jinja2.parser import Parser

from coordinator.workflows import template_worker
from coordinator.workflows.errors import FlowError
from coordinator.workflows.pointers import MISSING
from coordinator.workflows.template_worker import FILTERS, METHODS, TESTS, Bounds, only_expression
from protocol import limits

RESERVED = frozenset("and or not in is if else true false none True False None loop range self super caller varargs kwargs".split())
_FORBIDDEN_NAMES = frozenset("self super caller varargs kwargs".split())
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(nodes.Filter, nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Sub, nodes.Mul),
    *(nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow, nodes.Neg, nodes.Pos, nodes.Concat, nodes.CondExpr, nodes.List, nodes.Tuple),
    *(nodes.Dict, nodes.Pair, nodes.Keyword, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock, nodes.FilterBlock, nodes.With),
    nodes.Call,
)
_PARSED_KEPT_MAX = 512
_REASON_CHARS_MAX = 200
_LENGTH = struct.Struct(">I")
_READ_BYTES = 64 * 1024
_REPLY_SLACK_BYTES = 1024
_BOUNDS = Bounds(
    limits.FLOW_RENDER_BYTES_MAX, limits.FLOW_RENDER_RANGE_MAX, limits.FLOW_RENDER_MEMORY_BYTES_MAX, limits.FLOW_RENDER_CPU_S
)
_TOO_LONG = f"the template takes too long: more than {limits.FLOW_RENDER_CPU_S:g} s"

Key = str | int


@dataclass(frozen=True, slots=True)
class Lookup:
    """``name.key[0]``: a variable and what to follow from there."""

    name: str
    keys: tuple[Key, ...]

    def find(self, variables: Mapping[str, Any]) -> Any:
        """Raises FlowError where nothing is there."""
        value = variables.get(self.name, MISSING)
        for depth, key in enumerate((None, *self.keys)):
            if key is not None:
                value = _entry(value, key)
            if value is MISSING:
                shown = "".join(f".{each}" if isinstance(each, str) else f"[{each}]" for each in self.keys[:depth])
                raise FlowError("", f"the template looks at something that is not there: {self.name}{shown}")
        return value


@dataclass(frozen=True, slots=True)
class Template:
    """A template that has passed all checks. ``names``: steps and variables that it looks at; ``parts``: texts and lookups, of one that
    only names things, None: a worker has to compute it; ``is_value``: it is one expression; ``paths``: what a worker needs to know."""

    source: str
    names: frozenset[str] = field(compare=False)
    parts: tuple[str | Lookup, ...] | None = field(compare=False, repr=False)
    is_value: bool = field(compare=False)
    paths: Mapping[str, Any] = field(compare=False, repr=False)

    def looked_up(self, variables: Mapping[str, Any]) -> Any:
        """What a template with ``parts`` gives. Raises FlowError."""
        assert self.parts is not None
        if self.is_value:
            only = self.parts[0]
            return only if isinstance(only, str) else only.find(variables)
        texts, room = [], limits.FLOW_RENDER_BYTES_MAX
        for part in self.parts:
            text = part if isinstance(part, str) else _printed(part.find(variables), room)
            room -= len(text)
            if room < 0:
                raise _too_large()
            texts.append(text)
        return "".join(texts)

    def picked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Of the variables only what the template can look at."""
        return {name: _picked(variables[name], below) for name, below in self.paths.items() if name in variables}


def compile_check(template: str) -> frozenset[str]:
    """The steps and variables that a template names. Raises FlowError: wrong syntax, too long, or something that templates may not do."""
    return parse_template(template).names


@functools.lru_cache(_PARSED_KEPT_MAX)
def parse_template(source: str) -> Template:
    """Raises FlowError."""
    if len(source) > limits.FLOW_TEMPLATE_CHARS_MAX:
        raise FlowError("", f"the template has {len(source)} characters; at most {limits.FLOW_TEMPLATE_CHARS_MAX} are allowed")
    if "\0" in source:
        raise FlowError("", "the template holds a zero character")
    tree = _parsed(source)
    _check(tree)
    is_value = only_expression(tree) is not None
    parts = _parts(tree)
    if parts is not None:
        names = frozenset(part.name for part in parts if isinstance(part, Lookup))
        return Template(source, names, parts, is_value, {})
    names = _names(tree)
    return Template(source, names, None, is_value, _paths(tree, names))


def _syntax() -> Environment:
    """An environment to read with: it knows names of filters and tests, and can run none of them. ``finalize`` takes the context, so that
    nothing is computed while names are looked for."""

    @pass_context
    def never(*_: Any) -> Any:
        raise AssertionError("templates are not run here")

    environment = Environment(finalize=never, keep_trailing_newline=True, cache_size=0)
    environment.filters = dict.fromkeys(FILTERS, never)
    environment.tests = dict.fromkeys(TESTS, never)
    environment.globals = {"range": never}
    return environment


_SYNTAX = _syntax()


class _Tracker(TrackingCodeGenerator):
    """As ``meta.find_undeclared_variables`` uses it, but without the optimiser, which would compute ``10 ** 10 ** 10`` here and now."""

    def __init__(self, environment: Environment) -> None:
        CodeGenerator.__init__(self, environment, "<template>", "<template>", optimized=False)
        self.undeclared_identifiers: set[str] = set()


def _names(tree: nodes.Template) -> frozenset[str]:
    """Names that a template does not give a meaning itself. Raises FlowError for what has passed so far and means nothing all the same."""
    tracker = _Tracker(_SYNTAX)
    try:
        tracker.visit(tree)
    except TemplateSyntaxError as error:
        raise _unreadable(error) from None
    return frozenset(tracker.undeclared_identifiers)


def _parsed(source: str) -> nodes.Template:
    try:
        return Parser(_SYNTAX, source).parse()
    except TemplateSyntaxError as error:
        raise _unreadable(error) from None
    except (RecursionError, ValueError, OverflowError, UnicodeError):
        raise FlowError("", "the template cannot be read: it is nested too deeply, or has a number or text that is none") from None


def _unreadable(error: TemplateSyntaxError) -> FlowError:
    reason = (error.message or "wrong syntax")[:_REASON_CHARS_MAX]
    return FlowError("", f"the template cannot be read: {reason} (line {error.lineno})")


def _check(tree: nodes.Template) -> None:
    """Raises FlowError for what templates may not do. Goes by levels: what it has let pass can be walked recursively."""
    level: list[nodes.Node] = [tree]
    for _ in range(limits.FLOW_TEMPLATE_DEPTH_MAX):
        if not level:
            return
        for node in level:
            _check_node(node)
        level = [child for node in level for child in node.iter_child_nodes()]
    raise FlowError("", f"the template is nested deeper than {limits.FLOW_TEMPLATE_DEPTH_MAX}")


def _check_node(node: nodes.Node) -> None:
    wrong = ""
    if not isinstance(node, _NODES):
        wrong = f"{type(node).__name__.lower()} is not allowed"
    elif isinstance(node, nodes.For) and node.recursive:
        wrong = "a recursive loop is not allowed"
    elif isinstance(node, nodes.Name) and (node.name in _FORBIDDEN_NAMES or node.name.startswith("_")):
        wrong = f"the name {node.name!r} is not allowed"
    elif isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        wrong = f"the attribute {node.attr!r} is not allowed"
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and str(node.arg.value).startswith("__"):
        wrong = "an entry that begins with __ is not allowed"
    elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
        wrong = f"there is no filter {node.name!r}"
    elif isinstance(node, nodes.Test) and node.name not in TESTS:
        wrong = f"there is no test {node.name!r}"
    elif isinstance(node, nodes.Call) and not _may_call(node):
        wrong = "only range and methods such as split, strip and items can be called"
    elif isinstance(node, nodes.Const) and isinstance(node.value, str) and not _is_text(node.value):
        wrong = "it holds half of a surrogate pair"
    if wrong:
        raise FlowError("", f"the template cannot be used: {wrong[:2 * _REASON_CHARS_MAX]} (line {node.lineno})")


def _may_call(node: nodes.Call) -> bool:
    callee = node.node
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return False
    if isinstance(callee, nodes.Getattr):
        return callee.attr in METHODS
    return isinstance(callee, nodes.Name) and callee.name == "range"


def _parts(tree: nodes.Template) -> tuple[str | Lookup, ...] | None:
    """Of a template that only names things."""
    if not tree.body:
        return ()
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output):
        return None
    parts: list[str | Lookup] = []
    for node in tree.body[0].nodes:
        part = node.data if isinstance(node, nodes.TemplateData) else _lookup(node)
        if part is None:
            return None
        parts.append(part)
    return tuple(parts)


def _lookup(node: nodes.Node) -> str | Lookup | None:
    """``a.b["c"][0]``, or a text that is written out; None for anything else."""
    if isinstance(node, nodes.Const):
        return node.value if isinstance(node.value, str) else None
    chain = _chain(node)
    return None if chain is None else Lookup(chain[0], chain[1:])


def _chain(node: nodes.Node) -> tuple[Any, ...] | None:
    """A name and the constant keys after it; None where it is something else."""
    keys: list[Key] = []
    while True:
        if isinstance(node, nodes.Getattr):
            keys.append(node.attr)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and type(node.arg.value) in (str, int):
            keys.append(node.arg.value)
        elif isinstance(node, nodes.Name):
            return (node.name, *reversed(keys))
        else:
            return None
        node = node.node


def _paths(tree: nodes.Template, names: frozenset[str]) -> dict[str, Any]:
    """What of the variables is looked at, as a tree of keys; an empty branch means all below. Names that are hidden by a loop or a ``set``
    count as well, which only makes it more."""
    paths: dict[str, Any] = {}
    for name, *keys in _chains(tree):
        if name in names:
            _add_path(paths, (name, *keys[: next((i for i, key in enumerate(keys) if not isinstance(key, str)), None)]))
    return paths


def _chains(node: nodes.Node) -> Iterator[tuple[Any, ...]]:
    chain = _chain(node)
    if chain is not None:
        yield chain
        return
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):  # a method is no field
        yield from _chains(node.node.node)
        below = [*node.args, *node.kwargs]
    else:
        below = list(node.iter_child_nodes())
    for child in below:
        yield from _chains(child)


def _add_path(paths: dict[str, Any], path: tuple[Any, ...]) -> None:
    branch = paths
    for depth, key in enumerate(path):
        if depth == len(path) - 1:
            branch[key] = {}
        elif key in branch and not branch[key]:
            return  # all of it is there already
        branch = branch.setdefault(key, {})


def _picked(value: Any, below: Mapping[str, Any]) -> Any:
    if not below or not isinstance(value, Mapping):
        return value
    return {key: _picked(value[key], further) for key, further in below.items() if key in value}


def _entry(value: Any, key: Key) -> Any:
    if isinstance(value, Mapping):
        return value.get(key, MISSING) if isinstance(key, str) else MISSING
    if isinstance(value, list | str) and isinstance(key, int) and key < len(value):
        return value[key]
    return MISSING


def _printed(value: Any, room: int) -> str:
    """As it stands in a text of which so many characters are left. Raises FlowError."""
    if isinstance(value, str):
        if not _is_text(value):
            raise FlowError("", "the template gives half of a surrogate pair")
        return value
    if _weight(value, room) > room:
        raise _too_large()
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise FlowError("", "the template gives something that is no JSON, or too deep") from None


def _weight(value: Any, enough: int) -> int:
    """Characters that a value has at least; stops looking where it has enough."""
    weight, waiting = 0, [value]
    while waiting and weight <= enough:
        value = waiting.pop()
        weight += len(value) if isinstance(value, str | Mapping | list) else 1
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
    return weight


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_large() -> FlowError:
    return FlowError("", f"the template gives over {limits.FLOW_RENDER_BYTES_MAX} bytes")


class _WorkerGone(Exception):
    """The worker has ended. ``was_slow``: its timer ended it."""

    def __init__(self, was_slow: bool) -> None:
        super().__init__()
        self.was_slow = was_slow


class _Worker:
    """One template worker. Started by trio's own thread: the kernel ends it together with the thread that started it."""

    def __init__(self, bounds: Bounds) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _spawn(theirs.fileno(), bounds)
            except OSError:
                ours.close()
                raise
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self._reply_bytes_max = bounds.bytes_max + _REPLY_SLACK_BYTES

    def __repr__(self) -> str:
        return f"<template worker {self._process.pid}>"

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    async def ask(self, frame: bytes) -> tuple[bool, Any]:
        """Raises _WorkerGone."""
        try:
            await self._stream.send_all(_LENGTH.pack(len(frame)) + frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise await self._gone() from None
        return await self.reply()

    async def reply(self) -> tuple[bool, Any]:
        """Raises _WorkerGone, also where it says nonsense."""
        (size,) = _LENGTH.unpack(await self._exactly(_LENGTH.size))
        if size > self._reply_bytes_max:
            raise await self._gone()
        data = await self._exactly(size)
        try:
            is_good, value = msgpack.unpackb(data)
        except (ValueError, TypeError, msgpack.UnpackException):
            raise await self._gone() from None
        return is_good is True, value

    async def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                piece = await self._stream.receive_some(min(size - len(data), _READ_BYTES))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                piece = b""
            if not piece:
                raise await self._gone()
            data += piece
        return bytes(data)

    async def _gone(self) -> _WorkerGone:
        return _WorkerGone(await self.end() == -signal.SIGPROF)

    async def end(self) -> int:
        """Its exit code. One that its timer has ended is dead before its socket is closed, so killing it does not hide that."""
        with trio.CancelScope(shield=True):
            self._process.kill()
            await self._stream.aclose()
            code = await trio.to_thread.run_sync(self._process.wait)
        return code


def _spawn(descriptor: int, bounds: Bounds) -> subprocess.Popen[bytes]:
    """Raises OSError."""
    command = [sys.executable, "-I", template_worker.__file__, str(descriptor), str(os.getpid()), *bounds.words()]
    return subprocess.Popen(
        command,
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,  # signals to the Coordinator's group are for the Coordinator
    )


class Templates:
    """Renders templates, a few at a time. Used with ``async with`` on trio; workers start when they are first needed."""

    def __init__(self, at_once: int = limits.FLOW_RENDERS_AT_ONCE, bounds: Bounds = _BOUNDS) -> None:
        self._bounds = bounds
        self._limiter = trio.CapacityLimiter(at_once)
        self._idle: list[_Worker] = []
        self.started = 0

    def __repr__(self) -> str:
        return f"<Templates {self._limiter.borrowed_tokens} rendering, {len(self._idle)} workers idle>"

    async def __aenter__(self) -> Templates:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Once nobody renders any more."""
        while self._idle:
            await self._idle.pop().end()

    async def render(self, template: str | Template, variables: Mapping[str, Any]) -> Any:
        """JSON. Raises FlowError: no template, a variable that is not there, too much of something; ``is_transient`` where the fault is
        ours."""
        parsed = template if isinstance(template, Template) else parse_template(template)
        if parsed.parts is not None:
            return parsed.looked_up(variables)
        frame = _packed(parsed, variables)
        if self._limiter.statistics().tasks_waiting >= limits.FLOW_RENDERS_WAITING_MAX:
            raise FlowError("", "too many templates wait to be rendered", is_transient=True)
        async with self._limiter:
            try:
                is_good, value = await self._rendered(frame)
            except _WorkerGone:  # somebody else has ended it, or the template has found a way: another one will tell
                is_good, value = await self._rendered_again(frame)
        if not is_good:
            raise FlowError("", f"the template {value}")
        return value

    async def _rendered_again(self, frame: bytes) -> tuple[bool, Any]:
        """Raises FlowError."""
        try:
            return await self._rendered(frame)
        except _WorkerGone:
            return False, "could not be rendered"

    async def _rendered(self, frame: bytes) -> tuple[bool, Any]:
        """Raises FlowError where it takes too long, _WorkerGone where the worker has ended otherwise."""
        worker = await self._worker()
        reply = None
        try:
            with trio.move_on_after(limits.FLOW_RENDER_WALL_S):
                reply = await worker.ask(frame)
        except _WorkerGone as gone:
            if gone.was_slow:
                raise FlowError("", _TOO_LONG) from None
            raise
        finally:
            if reply is not None:
                self._idle.append(worker)
            else:
                await worker.end()
        if reply is None:  # it did not even get the time that it may take
            raise FlowError("", "this machine is too busy to render the template", is_transient=True)
        return reply

    async def _worker(self) -> _Worker:
        """One that is ready. Raises FlowError where none can be started."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await worker.end()
        try:
            worker = _Worker(self._bounds)
        except OSError:
            raise FlowError("", "no process for templates can be started", is_transient=True) from None
        self.started += 1
        is_ready = False
        try:
            with trio.move_on_after(limits.FLOW_RENDER_START_S):
                await worker.reply()
                is_ready = True
        except _WorkerGone:
            pass  # said below
        finally:
            if not is_ready:
                await worker.end()
        if not is_ready:
            raise FlowError("", "the process for templates does not start", is_transient=True)
        return worker


def _packed(template: Template, variables: Mapping[str, Any]) -> bytes:
    """Raises FlowError for variables that are too large, or no JSON."""
    try:
        frame: bytes = msgpack.packb([template.source, template.picked(variables)], unicode_errors="surrogatepass")
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise FlowError("", "the template looks at something that is nested too deeply, or no JSON") from None
    if len(frame) > limits.FLOW_VARIABLES_BYTES_MAX:
        raise FlowError("", f"the template looks at more than {limits.FLOW_VARIABLES_BYTES_MAX} bytes")
    return frame
