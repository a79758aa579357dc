"""One registry of message numbers, and the codec between messages and MessagePack.

Theory of operation. A message is a frozen dataclass. Registering it compiles, once, a function that reads its fields and a checker
for each field's type; so decoding needs no reflection and nothing on the wire is a loose dict. On the wire a message is the array
``[number, field, field, …]`` in the order of its fields; a nested dataclass is an array of its fields. A field marked with
``body()`` is left out of the array and travels behind it as raw bytes, so tensors and token batches are never re-encoded.

Rules: a number is used once, numbers start at 1 and have no gaps (``seal``), the count of fields is exact, an int is never a bool,
a float is finite, on the way out as on the way in. What the type cannot say the dataclass checks in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

import msgpack

from protocol import limits
from protocol.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")
Reader = Callable[[object], Any]
Writer = Callable[[Any], object]


def body() -> Any:
    """Marks the one field of a message that travels as raw bytes behind the header."""
    return dataclasses.field(default=b"", metadata={"body": True}, repr=False)


class _Plan:
    """How one dataclass goes to an array of plain values and back."""

    def __init__(self, cls: type[Any]) -> None:
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        self.cls = cls
        bodies = [f.name for f in fields if f.metadata.get("body")]
        if len(bodies) > 1:
            raise LocalProtocolError(f"{cls.__name__} may have one body, not {len(bodies)}")
        self.body_name = bodies[0] if bodies else None
        self.names = tuple(f.name for f in fields if f.name != self.body_name)
        pairs = [_converter(hints[name], f"{cls.__name__}.{name}") for name in self.names]
        self.readers = tuple(reader for reader, _ in pairs)
        self.writers = tuple(writer for _, writer in pairs)

    def to_list(self, value: Any) -> list[object]:
        return [write(getattr(value, name)) for name, write in zip(self.names, self.writers, strict=True)]

    def from_list(self, values: list[object], raw_body: bytes | memoryview | None = None) -> Any:
        if len(values) != len(self.readers):
            raise ValueError(f"{self.cls.__name__} has {len(self.readers)} fields, not {len(values)}")
        arguments = {name: read(v) for name, read, v in zip(self.names, self.readers, values, strict=True)}
        if self.body_name is not None:
            arguments[self.body_name] = raw_body if raw_body is not None else b""
        elif raw_body:
            raise ValueError(f"{self.cls.__name__} has no body, but {len(raw_body)} bytes came with it")
        return self.cls(**arguments)


def _scalar(kind: type[Any], where: str) -> tuple[Reader, Writer]:
    allowed = (bytes, bytearray, memoryview) if kind is bytes else (kind,)

    def read(value: object) -> Any:
        if type(value) is not kind:  # exact: a bool is no int
            raise ValueError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
        return value

    def write(value: Any) -> object:
        if not isinstance(value, allowed) or (kind is int and type(value) is bool):
            raise TypeError(f"{where} must be {kind.__name__}, not {type(value).__name__}")
        return value

    return read, write


def _finite_float(where: str) -> tuple[Reader, Writer]:
    def read(value: object) -> float:
        if type(value) is not float or not math.isfinite(value):
            raise ValueError(f"{where} must be a finite float")
        return value

    def write(value: Any) -> float:
        if not math.isfinite(value):
            raise ValueError(f"{where} must be finite, not {value!r}")
        return float(value)

    return read, write


def _enum(kind: type[StrEnum], where: str) -> tuple[Reader, Writer]:
    def read(value: object) -> StrEnum:
        if type(value) is not str:
            raise ValueError(f"{where} must be one of {', '.join(kind)}")
        return kind(value)

    return read, str


def _optional(inner: tuple[Reader, Writer]) -> tuple[Reader, Writer]:
    read, write = inner
    return (lambda v: None if v is None else read(v)), (lambda v: None if v is None else write(v))


def _sequence(items: tuple[tuple[Reader, Writer], ...], variadic: bool, where: str) -> tuple[Reader, Writer]:
    def read(value: object) -> tuple[Any, ...]:
        if type(value) is not list:
            raise ValueError(f"{where} must be an array")
        if variadic:
            return tuple(map(items[0][0], value))
        if len(value) != len(items):
            raise ValueError(f"{where} must have {len(items)} entries")
        return tuple(item[0](v) for item, v in zip(items, value, strict=True))

    def write(value: tuple[Any, ...]) -> list[object]:
        if variadic:
            return list(map(items[0][1], value))
        return [item[1](v) for item, v in zip(items, value, strict=True)]

    return read, write


def _nested(cls: type[Any], where: str) -> tuple[Reader, Writer]:
    plan = _Plan(cls)

    def read(value: object) -> Any:
        if type(value) is not list:
            raise ValueError(f"{where} must be an array")
        return plan.from_list(value)

    return read, plan.to_list


def _converter(hint: Any, where: str) -> tuple[Reader, Writer]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not types.NoneType]
        if len(inner) != 1 or len(arguments) != 2:
            raise LocalProtocolError(f"{where}: only X | None may be a union on the wire")
        return _optional(_converter(inner[0], where))
    if origin is tuple:
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        items = tuple(_converter(a, where) for a in (arguments[:1] if variadic else arguments))
        return _sequence(items, variadic, where)
    if hint is float:
        return _finite_float(where)
    if hint in (int, str, bytes, bool):
        return _scalar(hint, where)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum(hint, where)
    if dataclasses.is_dataclass(hint):
        return _nested(typing.cast("type[Any]", hint), where)
    raise LocalProtocolError(f"{where}: {hint!r} cannot stand on the wire")


def _unpack(data: bytes | memoryview) -> object:
    """One MessagePack value and nothing behind it.

    The limits stop a small frame from asking for a large allocation: msgpack makes room for an array as soon as it reads its declared
    length, and arrays inside arrays multiply, so the length of the data alone is no bound (256 KiB could ask for 1 GB).
    """
    size = len(data)
    return msgpack.unpackb(
        data,
        raw=False,
        strict_map_key=True,
        max_array_len=min(size, limits.ARRAY_ENTRIES_MAX),
        max_map_len=0,
        max_ext_len=0,
        max_str_len=size,
        max_bin_len=size,
    )


def _pack(plan: _Plan, to_list: Callable[[Any], list[object]], value: object) -> bytes:
    try:
        return typing.cast("bytes", msgpack.packb(to_list(value)))
    except (ValueError, TypeError, OverflowError) as error:
        raise LocalProtocolError(f"{plan.cls.__name__} cannot be encoded: {error}") from error


class Struct(typing.Generic[T]):
    """Codec of one dataclass that stands alone, such as the payload of an envelope: a canonical array of its fields.

    >>> plan = Struct(Ticket); plan.decode(plan.encode(ticket)) == ticket
    """

    def __init__(self, cls: type[T], bytes_max: int = limits.ENVELOPE_BYTES_MAX) -> None:
        self._plan = _Plan(cls)
        self._bytes_max = bytes_max

    def encode(self, value: T) -> bytes:
        """Raises LocalProtocolError for a value that the other side would refuse."""
        data = _pack(self._plan, self._plan.to_list, value)
        if len(data) > self._bytes_max:
            raise LocalProtocolError(f"{self._plan.cls.__name__} of {len(data)} bytes is over {self._bytes_max}")
        return data

    def decode(self, data: bytes) -> T:
        """Raises RemoteProtocolError for anything but exactly one valid value in its canonical encoding.

        One value has one encoding: otherwise whoever passes a signed thing on could change its bytes, and so its hash, without
        touching its signature (receipts name the ticket by its hash, gossip tells messages apart by theirs).
        """
        if len(data) > self._bytes_max:
            raise RemoteProtocolError(f"{self._plan.cls.__name__} of {len(data)} bytes is over {self._bytes_max}")
        try:
            values = _unpack(data)
            if type(values) is not list:
                raise ValueError("not an array")
            value = typing.cast("T", self._plan.from_list(values))
            if msgpack.packb(values) != data:
                raise ValueError("not the shortest encoding")
            return value
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"malformed {self._plan.cls.__name__}: {error}") from error


class Registry:
    """The message numbers of one protocol."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._by_number: dict[int, _Plan] = {}
        self._by_class: dict[type[Any], tuple[int, _Plan]] = {}
        self._sealed = False

    def __repr__(self) -> str:
        return f"<Registry {self.name}: {len(self._by_number)} messages{', sealed' if self._sealed else ''}>"

    def message(self, number: int) -> Callable[[type[T]], type[T]]:
        """Class decorator: gives a frozen dataclass its number. Raises LocalProtocolError for a double or a late one."""

        def register(cls: type[T]) -> type[T]:
            if self._sealed:
                raise LocalProtocolError(f"{self.name} is sealed; {cls.__name__} came too late")
            if number in self._by_number or cls in self._by_class:
                raise LocalProtocolError(f"{self.name}: number {number} or class {cls.__name__} is taken")
            plan = _Plan(cls)
            self._by_number[number] = plan
            self._by_class[cls] = (number, plan)
            return cls

        return register

    def seal(self) -> None:
        """Ends registration. Raises LocalProtocolError when the numbers are not 1..n."""
        if sorted(self._by_number) != list(range(1, len(self._by_number) + 1)):
            raise LocalProtocolError(f"{self.name}: the numbers {sorted(self._by_number)} have a gap")
        self._sealed = True

    def numbers(self) -> dict[int, type[Any]]:
        return {number: plan.cls for number, plan in sorted(self._by_number.items())}

    def encode(self, message: object) -> tuple[bytes, bytes | memoryview]:
        """Header and raw body of a message. Raises LocalProtocolError for a class without a number."""
        try:
            number, plan = self._by_class[type(message)]
        except KeyError:
            raise LocalProtocolError(f"{type(message).__name__} is no message of {self.name}") from None
        raw = getattr(message, plan.body_name) if plan.body_name is not None else b""
        return _pack(plan, lambda value: [number, *plan.to_list(value)], message), raw

    def decode(self, header: bytes | memoryview, raw_body: bytes | memoryview = b"") -> Any:
        """The message of a frame. Raises RemoteProtocolError for anything that is not one."""
        try:
            values = _unpack(header)
            if type(values) is not list or not values or type(values[0]) is not int:
                raise ValueError("a header is an array that starts with the message number")
            plan = self._by_number.get(values[0])
            if plan is None:
                raise ValueError(f"unknown message number {values[0]}")
            return plan.from_list(values[1:], raw_body or None)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"{self.name}: {error}") from error
