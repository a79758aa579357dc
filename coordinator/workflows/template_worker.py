"""The process that renders templates: ``python -I template_worker.py FD PARENT BYTES_MAX RANGE_MAX MEMORY_BYTES CPU_S``.

Theory of operation. A template is a program that a stranger wrote. What it can *reach* is decided by ``Sandbox``: plain data, a few
methods of texts and objects, filters from a list; attributes are never looked up on anything else, so there is no way to Python's insides
that one would have to guard. What it can *spend* is the kernel's business: this process has little memory, may open no file, and each
rendering is ended by a timer of CPU time, whatever it computes (a signal without a handler needs nobody's cooperation). Whoever started it
starts another then.

Frames go both ways: ``u32 length | MessagePack``. In come ``[template, variables]``; out go ``[True, value]`` or ``[False, why]``, and one
``[True, None]`` when it is ready. Messages quote names out of the template and never a value. It ends with its parent, also on kill -9.

Run as a file: nothing of ours is imported here, and nothing but the standard library, jinja2 and MessagePack. A template must give the
same each time, so there are neither clock nor chance.
"""

from __future__ import annotations

import ctypes
import html
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import textwrap  # noqa: F401  # jinja2 imports it when a template wraps words; then no file can be opened any more
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any

import msgpack
from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.runtime import LoopContext, StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

FILTERS_PLAIN = frozenset(  # jinja2's own: they do not escape, know no clock and no chance, and look up attributes through us alone
    "abs batch capitalize center count d default dictsort filesizeformat first float format groupby indent int items last length list "
    "lower map max min reject rejectattr replace reverse round select selectattr slice sort sum title trim truncate unique upper urlencode "
    "wordcount wordwrap".split()
)
FILTERS_OWN = frozenset("e escape fromjson join lines split string tojson".split())
FILTERS = FILTERS_PLAIN | FILTERS_OWN
TESTS = frozenset(
    "boolean defined divisibleby eq equalto even false float ge greaterthan gt in integer iterable le lessthan lower lt mapping ne none "
    "number odd sequence string true undefined upper".split()
) | frozenset({"==", "!=", "<", "<=", ">", ">="})
TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find isalnum isalpha isdigit islower isspace isupper join lower lstrip partition removeprefix "
    "removesuffix replace rfind rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
)
OBJECT_METHODS = frozenset({"get", "items", "keys", "values"})
LOOP_METHODS = frozenset({"changed", "cycle"})
METHODS = TEXT_METHODS | OBJECT_METHODS | LOOP_METHODS
_LOOP_FIELDS = LOOP_METHODS | frozenset("depth depth0 first index index0 last length nextitem previtem revindex revindex0".split())
_GROUP_FIELDS = frozenset({"grouper", "list"})
DEPTH_MAX = 64  # of what a template gives
_TEMPLATES_KEPT_MAX = 64
_RESULT = "result"
_LENGTH = struct.Struct(">I")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_WARM_UP = (
    r"""{{ "\u00e9"|upper }}{% for a in range(2) %}{{ loop.index ~ [1.5, none]|tojson }}{% endfor %}""",
    "{{ {'a': 1}.items()|list }}",
)


class NoValue(Exception):
    """A template did not give anything that can be used; the text says why and quotes no data."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """``bytes_max``: of what a template gives, as MessagePack; ``range_max``: of one ``range``; ``cpu_s``: for one rendering."""

    bytes_max: int
    range_max: int
    memory_bytes: int
    cpu_s: float

    def words(self) -> list[str]:
        return [str(self.bytes_max), str(self.range_max), str(self.memory_bytes), str(self.cpu_s)]

    @classmethod
    def of_words(cls, words: list[str]) -> Bounds:
        bytes_max, range_max, memory_bytes, cpu_s = words
        return cls(int(bytes_max), int(range_max), int(memory_bytes), float(cpu_s))


class _Shown(NodeTransformer):
    """Has ``~`` write values as all else does, and not as Python would."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        line = node.lineno
        return nodes.Filter(nodes.List(node.nodes, lineno=line), "join", [], [], None, None, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Plain data in, plain data out."""

    def __init__(self, range_max: int) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=printed, cache_size=0)
        self.filters = {name: self.filters[name] for name in FILTERS_PLAIN}
        self.filters |= {"e": _escape, "escape": _escape, "fromjson": _fromjson, "join": self._join, "lines": _lines}
        self.filters |= {"split": _split, "string": printed, "tojson": _tojson}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: tests[name] for name in TESTS}
        self._range_max = range_max
        self.globals = {"range": self._range}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Shown().visit(super()._parse(source, name, filename))
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, dict):
            if attribute in obj:  # what the data says comes before what Python says: ``output.items``
                return obj[attribute]
            if attribute in OBJECT_METHODS:
                return getattr(obj, attribute)
        elif (
            (isinstance(obj, str) and attribute in TEXT_METHODS)
            or (isinstance(obj, LoopContext) and attribute in _LOOP_FIELDS)
            or (isinstance(obj, tuple) and hasattr(obj, "_fields") and attribute in _GROUP_FIELDS)
        ):
            return getattr(obj, attribute)
        elif isinstance(obj, Undefined):
            return getattr(obj, attribute)  # raises that the first one is not there
        return self.undefined(hint=f"there is no {attribute!r}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, dict):
            if isinstance(argument, str) and argument in obj:
                return obj[argument]
        elif isinstance(obj, list | tuple | str) and type(argument) is int:
            if -len(obj) <= argument < len(obj):
                return obj[argument]
        elif isinstance(obj, tuple) and isinstance(argument, str):
            return self.getattr(obj, argument)
        elif isinstance(obj, Undefined):
            return obj[argument]  # raises
        return self.undefined(hint="there is no such entry")  # its name may be data

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if not (
            obj == self._range
            or (isinstance(owner, str) and name in TEXT_METHODS)
            or (isinstance(owner, dict) and name in OBJECT_METHODS)
            or (isinstance(owner, LoopContext) and name in LOOP_METHODS)
        ):
            raise SecurityError("nothing that can be called")
        return super().call(context, obj, *args, **kwargs)

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        if len(values) > self._range_max:
            raise NoValue(f"a range over {self._range_max}")
        return values

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        picked = values if attribute is None else (self.getitem(value, attribute) for value in values)
        return str(separator).join(str(printed(value)) for value in picked)


class Renderer:
    """Templates by their source, compiled once while they are in use."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds, self._sandbox = bounds, Sandbox(bounds.range_max)
        self._kept: dict[str, tuple[Template, bool]] = {}

    def render(self, source: str, variables: dict[str, Any]) -> Any:
        """JSON: the value of a template that is one expression, of any other a text. Raises NoValue, and whatever jinja2 raises."""
        if source not in self._kept:
            while len(self._kept) >= _TEMPLATES_KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[source] = self._compile(source)
        template, is_value = self._kept[source]
        context = template.new_context(variables)
        pieces, size = [], 0
        for piece in template.root_render_func(context):  # not by render(), which imports more when it fails
            size += len(piece)
            if size > self._bounds.bytes_max:
                raise NoValue(f"over {self._bounds.bytes_max} bytes")
            pieces.append(piece)
        return plain(context.vars[_RESULT]) if is_value else "".join(pieces)

    def _compile(self, source: str) -> tuple[Template, bool]:
        tree = self._sandbox.parse(source)
        expression = only_expression(tree)
        if expression is not None:
            name = nodes.Name(_RESULT, "store", lineno=1)
            tree = nodes.Template([nodes.Assign(name, expression, lineno=1)], lineno=1)
        return self._sandbox.from_string(tree), expression is not None


def only_expression(tree: nodes.Template) -> nodes.Expr | None:
    """Of a template that is ``{{ EXPRESSION }}`` and nothing else."""
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output) or len(tree.body[0].nodes) != 1:
        return None
    only = tree.body[0].nodes[0]
    return None if isinstance(only, nodes.TemplateData) else only


def printed(value: Any) -> Any:
    """A value as it stands in a text: texts as they are, all else as compact JSON. Raises UndefinedError, NoValue."""
    if isinstance(value, str | Undefined):
        return str(value)  # raises for what is not there
    return _tojson(value)


def plain(value: Any, depth: int = 0) -> Any:
    """As JSON has it. Raises NoValue for what it has not, UndefinedError."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str | Undefined):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth >= DEPTH_MAX:
        raise NoValue(f"a value nested deeper than {DEPTH_MAX}")
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise NoValue("an object with a name that is no text")
        return {name: plain(part, depth + 1) for name, part in value.items()}
    if isinstance(value, list | tuple | range | Iterator | KeysView | ValuesView | ItemsView) and not isinstance(value, LoopContext):
        return [plain(part, depth + 1) for part in value]
    raise NoValue("something that is no JSON")


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(plain(value), ensure_ascii=False, indent=indent, separators=None if indent else (",", ":"))


def _fromjson(text: Any) -> Any:
    try:
        return json.loads(str(text), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise NoValue("fromjson of a text that is no JSON") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _lines(text: Any) -> list[str]:
    return str(text).splitlines()


def _split(text: Any, separator: str | None = None, count: int = -1) -> list[str]:
    return str(text).split(separator, count)


def _escape(text: Any) -> str:
    return html.escape(str(printed(text)))


def answer(renderer: Renderer, frame: bytes, bytes_max: int) -> tuple[bytes, bool]:
    """The reply to a frame, and whether the process can go on."""
    try:
        source, variables = msgpack.unpackb(frame, strict_map_key=False, unicode_errors="surrogatepass")
        data = msgpack.packb([True, renderer.render(source, variables)])
        if len(data) > bytes_max:
            raise NoValue(f"over {bytes_max} bytes")
        return data, True
    except MemoryError:  # what else did not get its memory nobody knows
        return msgpack.packb([False, "needs too much memory"]), False
    except Exception as error:  # jinja2: "other exceptions may occur … the caller has to ensure that all exceptions are caught"
        return msgpack.packb([False, _why(error)]), True


def _why(error: Exception) -> str:
    if isinstance(error, NoValue):
        return f"gives {error}" if not str(error).startswith("fromjson") else f"uses {error}"
    if isinstance(error, UndefinedError):
        return f"looks at something that is not there: {error.message}"
    if isinstance(error, SecurityError):
        return "calls what may not be called"
    if isinstance(error, UnicodeEncodeError):
        return "gives half of a surrogate pair"
    if isinstance(error, RecursionError):
        return "goes too deep"
    if isinstance(error, OverflowError):
        return "gives a number that is too large"
    return f"failed ({'TemplateError' if isinstance(error, TemplateError) else type(error).__name__})"


def serve(sock: socket.socket, bounds: Bounds) -> None:
    """Until the other end closes."""
    renderer = Renderer(bounds)
    for source in _WARM_UP:  # what is imported only when it is needed has to come before the walls
        renderer.render(source, {})
    _stop_files(bounds.memory_bytes)
    _send(sock, msgpack.packb([True, None]))
    goes_on = True
    while goes_on:
        frame = _receive(sock)
        signal.setitimer(signal.ITIMER_PROF, bounds.cpu_s)
        reply, goes_on = answer(renderer, frame, bounds.bytes_max)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sock, reply)


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _receive(sock: socket.socket) -> bytes:
    return _exactly(sock, _LENGTH.unpack(_exactly(sock, _LENGTH.size))[0])


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return bytes(data)


def confine(parent: int) -> None:
    """No core dumps, no new rights, and an end together with the parent; where that has ended already, at once."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    if sys.platform == "linux":
        control: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
        control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        control(_PR_SET_DUMPABLE, 0)
        control(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _stop_files(memory_bytes: int) -> None:
    """From now on: nothing is written, opened or started, and memory is little."""
    for kind, most in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(kind, (most, most))
    if sys.platform == "linux":  # macOS takes no limit of addresses
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = memory_bytes if hard == resource.RLIM_INFINITY else min(hard, memory_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(words: list[str]) -> None:
    confine(int(words[1]))
    serve(socket.socket(fileno=int(words[0])), Bounds.of_words(words[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
