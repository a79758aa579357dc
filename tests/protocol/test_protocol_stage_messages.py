"""What stages and Coordinators say to Islands that hold layers: every field of every message, with what may not stand in it."""

from __future__ import annotations

import random
import struct
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from protocol import hold, limits, messages, stage_messages
from protocol.activations import INT8_BLOCK, TOKEN_BYTES, Activations
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from protocol.registry import Registry
from protocol.shards import LayerRange
from protocol.stage_messages import SESSION_BYTES, STAGE, Span, StageRows, StageTime
from tests.protocol import samples

REGISTRIES: dict[type[Any], Registry] = {
    **{type(message): STAGE for message in samples.STAGE_MESSAGES[1:]},
    **{type(message): hold.HOLD for message in samples.HOLD_MESSAGES[1:]},
    **{kind: messages.JOB for kind in (messages.RouteBroken, messages.RouteMended, messages.JobDone)},
}
GOOD: dict[str, Any] = {
    type(message).__name__: message
    for message in (*samples.STAGE_MESSAGES[1:], *samples.HOLD_MESSAGES[1:], *samples.JOB_MESSAGES)
    if type(message) in REGISTRIES
}
BIG, LONG = 2**53 + 1, "x" * (limits.TEXT_CHARS_MAX + 1)
SPAN, TIME, USE = [1, 0, 1], [0, 0], [samples.FIRST.peer_id, 0, 0]
NO_INT: tuple[Any, ...] = (True, 1.0, "1", b"1", None, [1])
NO_BYTES: tuple[Any, ...] = ("x", 1, None, [1])
NO_TEXT: tuple[Any, ...] = (b"x", 1, None, ["x"])
NO_ARRAY: tuple[Any, ...] = (None, 1, "x", b"x", True)
SEQUENCE = (*NO_INT, 0, -1, BIG)
COUNT = (*NO_INT, -1, BIG)
INDEX = (*NO_INT, -1, limits.ROUTE_STAGES_MAX)
TICKET = (*NO_BYTES, bytes(limits.ENVELOPE_BYTES_MAX + 1))
CODE = ("", "out_of_luck", b"internal", 1, None)
LINE = (*NO_TEXT, LONG, "a\nb", "\x1b[2J")
LAYERS = (*NO_ARRAY, [], [0], [0, 1, 2], [1, 1], [2, 1], [-1, 1], [0, limits.LAYERS_MAX + 1], [0, 1.0], [False, 1], ["0", "1"])
HASH = (*NO_TEXT, "", "ab", "AB" * 32, "ab" * 33, "zz" * 32)

# By message and field: values that it must not have on the wire.
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "StageOpen": {
        "session": (*NO_BYTES, b"", bytes(SESSION_BYTES - 1), bytes(SESSION_BYTES + 1)),
        "epoch": (*NO_INT, 0, -1, 2**31 + 1),
        "index": INDEX,
        "ticket": TICKET,
    },
    "StageOpened": {
        "engines": (*NO_ARRAY, ["gguf/1"] * (limits.ROUTE_STAGES_MAX + 1), [1], [b"gguf"], [""], ["a b"], ["a\n"], ["x" * 129]),
    },
    "StageRows": {
        "step": (*NO_INT, 0, -1, BIG),
        "spans": (
            *NO_ARRAY,
            [],
            [1],
            [SPAN[:2]],
            [[*SPAN, 1]],
            [SPAN, SPAN],
            [[0, 0, 1]],
            [[BIG, 0, 1]],
            [[1, -1, 1]],
            [[1, 2**31 + 1, 1]],
            [[1, 0, 0]],
            [[1, 0, limits.STAGE_ROWS_MAX + 1]],
            [[1, 0, limits.STAGE_ROWS_MAX], [2, 0, 1]],
            [[n + 1, 0, 1] for n in range(limits.STAGE_ROWS_MAX + 1)],
            [[True, 0, 1]],
            [[1, 0.0, 1]],
        ),
        "fill": (0, 1, None, "false", b""),
        "times": (*NO_ARRAY, [TIME] * (limits.ROUTE_STAGES_MAX + 1), [[0]], [[0, 0, 0]], [[-1, 0]], [[0, -1]], [[BIG, 0]], [[0, 0.5]]),
    },
    "SequenceOpen": {
        "sequence": SEQUENCE,
        "declared": (*NO_INT, 0, -1, 2**31 + 1, 11, 19),  # fewer than ``keep``, than ``shared``
        "keep": (*NO_INT, -1, 301),
        "source": (*NO_INT, -1, BIG, 0),  # 0: none, and yet rows are shared
        "shared": (*NO_INT, -1, 301),
        "ticket": TICKET,
    },
    "SequenceEnd": {
        "sequences": (*NO_ARRAY, [0], [-1], [BIG], [True], [1.0], ["1"], [1] * (limits.ARRAY_ENTRIES_MAX + 1)),
    },
    "RowsWanted": {
        "sequence": SEQUENCE,
        "low": (*NO_INT, -1, 30, 31, 2**31),
        "high": (*NO_INT, -1, 0, 2**31 + 1),
    },
    "StageProbe": {"probe": SEQUENCE},
    "StageReport": {"probe": SEQUENCE, "index": INDEX, "batches": COUNT, "waiting": COUNT, "busy_us": COUNT},
    "StageFault": {"index": INDEX, "sequence": COUNT, "code": CODE, "message": LINE},
    "HoldShard": {
        "manifest": (*NO_ARRAY, []),
        "layers": (*LAYERS, [0, 5], [4, 5]),  # the model has four
        "cells": (*NO_INT, 0, -1, 2**31 + 1),
        "boot": SEQUENCE,
        "expires_at_ms": SEQUENCE,
    },
    "HoldProgress": {
        "what": (*NO_TEXT, "x" * (limits.NAME_CHARS_MAX + 1), "a\nb"),
        "done": (*NO_INT, -1, 2**50 + 1),
        "total": (*NO_INT, -1, 2**50 + 1),
    },
    "ShardHeld": {"shard_hash": HASH, "sequence": SEQUENCE},
    "HoldRefused": {"code": CODE, "message": (*NO_TEXT, LONG)},
    "DropShard": {"content_hash": HASH, "layers": LAYERS},
    "SetAsk": {"cargo": (*NO_TEXT, "", "a b", "x" * (limits.NAME_CHARS_MAX + 1)), "ask": (*NO_ARRAY, [], [-1, 0, 0], [0, 0], [0, 0, BIG])},
    "AskSet": {"sequence": SEQUENCE},
    "RouteBroken": {"job": SEQUENCE, "index": INDEX, "boot": SEQUENCE, "code": CODE, "message": LINE},
    "RouteMended": {"job": SEQUENCE, "ticket": TICKET},
    "JobDone": {
        "stages": (
            *NO_ARRAY,
            [USE] * (limits.ROUTE_STAGES_MAX + 1),
            [["nobody", 0, 0]],
            [[USE[0], -1, 0]],
            [[USE[0], 0, BIG]],
            [[USE[0], 0]],
            [[USE[0], 0, True]],
        ),
        "wire_us": COUNT,
    },
}
CASES = [(name, field, value) for name, table in WRONG.items() for field, values in table.items() for value in values]


def test_the_table_names_every_field() -> None:
    assert WRONG.keys() == GOOD.keys()
    for name, message in GOOD.items():
        names = {field.name for field in fields(message) if not field.metadata.get("body")}
        if name != "JobDone":  # the older fields have a test of their own
            assert WRONG[name].keys() == names, name


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD)
def test_round_trip(message: Any) -> None:
    registry = REGISTRIES[type(message)]
    (heard,) = FrameDecoder(registry).feed(encode_frame(registry, message))
    assert heard == message and type(heard) is type(message)


def with_field(message: Any, name: str, value: Any) -> tuple[bytes, bytes | memoryview]:
    """Header and body as a hostile peer writes them: one field replaced in the packed array."""
    registry = REGISTRIES[type(message)]
    header, raw = registry.encode(message)
    values = msgpack.unpackb(header)
    names = [field.name for field in fields(message) if not field.metadata.get("body")]
    values[1 + names.index(name)] = value
    return msgpack.packb(values), raw


@pytest.mark.parametrize(("name", "field", "value"), CASES, ids=lambda value: repr(value)[:40])
def test_a_hostile_value_is_refused(name: str, field: str, value: Any) -> None:
    message = GOOD[name]
    header, raw = with_field(message, field, value)
    with pytest.raises(RemoteProtocolError):
        REGISTRIES[type(message)].decode(header, raw)


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD)
def test_fields_more_or_less_and_bodies_where_none_belongs(message: Any) -> None:
    registry = REGISTRIES[type(message)]
    header, raw = registry.encode(message)
    values = msgpack.unpackb(header)
    for wrong in (values[:-1], [*values, 0], [values[0]], [values[0], values[1:]]):
        with pytest.raises(RemoteProtocolError):
            registry.decode(msgpack.packb(wrong), raw)
    if not isinstance(message, StageRows):
        with pytest.raises(RemoteProtocolError, match="no body"):
            registry.decode(header, b"x")


EDGES: list[Any] = [
    replace(GOOD["StageOpen"], epoch=2**31, index=limits.ROUTE_STAGES_MAX - 1, ticket=b""),
    replace(GOOD["StageOpened"], engines=()),
    replace(GOOD["StageOpened"], engines=("x" * limits.NAME_CHARS_MAX,) * limits.ROUTE_STAGES_MAX),
    StageRows(0, (Span(1, 0, 1),), fill=True),
    StageRows(2**53, (Span(2**53, 2**31, limits.STAGE_ROWS_MAX),), times=(StageTime(2**53, 2**53),) * limits.ROUTE_STAGES_MAX),
    StageRows(1, tuple(Span(n + 1, 0, 1) for n in range(limits.STAGE_ROWS_MAX))),
    replace(GOOD["SequenceOpen"], keep=300, source=0, shared=0),
    replace(GOOD["SequenceOpen"], declared=2**31, keep=2**31, source=2**53, shared=2**31),
    replace(GOOD["SequenceEnd"], sequences=()),
    replace(GOOD["SequenceEnd"], sequences=tuple(range(1, limits.ARRAY_ENTRIES_MAX + 1))),
    replace(GOOD["RowsWanted"], low=2**31 - 1, high=2**31),
    replace(GOOD["StageReport"], batches=0, waiting=0, busy_us=0),
    replace(GOOD["StageFault"], index=limits.ROUTE_STAGES_MAX - 1, sequence=2**53, message=""),
    replace(GOOD["HoldShard"], layers=LayerRange(0, 4), cells=2**31),
    replace(GOOD["HoldProgress"], what="", done=2**50, total=0),
    replace(GOOD["DropShard"], layers=LayerRange(limits.LAYERS_MAX - 1, limits.LAYERS_MAX)),
    replace(GOOD["RouteBroken"], message="x" * limits.TEXT_CHARS_MAX),
    replace(GOOD["RouteMended"], ticket=bytes(limits.ENVELOPE_BYTES_MAX)),
    replace(GOOD["JobDone"], stages=(GOOD["JobDone"].stages[0],) * limits.ROUTE_STAGES_MAX, wire_us=2**53),
]


@pytest.mark.parametrize("message", EDGES, ids=lambda message: type(message).__name__)
def test_what_is_just_allowed(message: Any) -> None:
    registry = REGISTRIES[type(message)]
    assert registry.decode(*registry.encode(message)) == message


def test_a_step_is_counted_from_one_and_fill_has_none() -> None:
    for step, fill, is_good in ((0, False, False), (1, False, True), (0, True, True), (-1, True, False)):
        if is_good:
            StageRows(step, (Span(1, 0, 1),), fill)
        else:
            with pytest.raises(ValueError, match="step"):
                StageRows(step, (Span(1, 0, 1),), fill)


def test_spans_and_their_sum() -> None:
    assert Span(1, 5, 3).end == 8
    assert StageRows(1, (Span(1, 5, 3), Span(2, 0, 4))).count == 7


def test_rows_travel_in_the_body() -> None:
    rows = bytes(64 * 1024)
    header, raw = STAGE.encode(StageRows(1, (Span(1, 0, 16),), rows=rows))
    assert len(header) < 20 and raw is rows


def test_the_largest_frame_of_rows_fits_into_a_frame() -> None:
    """As many rows as a frame may have, of the widest models about, in the largest encoding; and as many spans in its header."""
    spans = tuple(Span(2**53 - n, 2**31 - 1, 1) for n in range(limits.STAGE_ROWS_MAX))
    header, _ = STAGE.encode(StageRows(2**53, spans, times=(StageTime(2**53, 2**53),) * limits.ROUTE_STAGES_MAX))
    assert len(header) <= limits.FRAME_HEADER_BYTES_MAX
    assert limits.STAGE_ROWS_MAX * Activations.F32.row_bytes(16_384) <= limits.FRAME_BODY_BYTES_MAX


@pytest.mark.parametrize(
    ("kind", "width", "size"),
    [
        (Activations.F32, 576, 2304),
        (Activations.F16, 576, 1152),
        (Activations.INT8, 576, 576 + 4 * 18),
        (Activations.INT8, INT8_BLOCK, INT8_BLOCK + 4),
        (Activations.INT8, INT8_BLOCK + 1, INT8_BLOCK + 1 + 8),
        (Activations.INT8, 1, 5),
        (Activations.F32, 1, 4),
        (Activations.F16, 1, 2),
    ],
)
def test_how_large_a_row_is(kind: Activations, width: int, size: int) -> None:
    assert kind.row_bytes(width) == size
    assert struct.calcsize("<i") == TOKEN_BYTES


def test_the_names_of_the_encodings_are_frozen() -> None:
    assert [str(kind) for kind in Activations] == ["f32", "f16", "int8"]


def test_a_manifest_too_large_for_a_header_is_our_own_error() -> None:
    """Each part may be there, all of them together do not fit into the header of a frame."""
    sources = ("https://models.example/" + "x" * 1000,) * limits.MODEL_PARTS_MAX
    order = replace(GOOD["HoldShard"], manifest=samples.manifest(model_sources=sources))
    with pytest.raises(LocalProtocolError, match="too large"):
        encode_frame(hold.HOLD, order)


def test_a_manifest_checks_itself_on_the_wire_too() -> None:
    """The manifest of an order is a stranger's: what its JSON may not say, the order may not either."""
    order = GOOD["HoldShard"]
    names = [field.name for field in fields(order.manifest)]
    for name, value in (("version", 2), ("width", 0), ("layer_bytes", [1, 2, 3]), ("compute_bytes", [1, 2]), ("shard_layers", [])):
        manifest = msgpack.unpackb(hold.HOLD.encode(order)[0])[1]
        manifest[names.index(name)] = value
        header, raw = with_field(order, "manifest", manifest)
        with pytest.raises(RemoteProtocolError):
            hold.HOLD.decode(header, raw)


@pytest.mark.parametrize("registry", [STAGE, hold.HOLD], ids=["stage", "hold"])
@pytest.mark.parametrize("seed", range(2))
def test_noise_is_refused_or_is_a_message(registry: Registry, seed: int) -> None:
    chance = random.Random(seed)
    valid = [registry.encode(m) for m in (samples.STAGE_MESSAGES if registry is STAGE else samples.HOLD_MESSAGES)]
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        header, raw = chance.choice(valid)
        noisy = bytearray(header)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(noisy) + 1)
            match chance.randrange(3):
                case 0 if place < len(noisy):
                    noisy[place] = chance.randrange(256)
                case 1:
                    noisy[place:place] = chance.randbytes(chance.randint(1, 3))
                case _:
                    del noisy[place : place + chance.randint(1, 3)]
        try:
            message = registry.decode(bytes(noisy), raw)
        except RemoteProtocolError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert registry.decode(*registry.encode(message)) == message
    assert min(outcomes.values()) > 30, outcomes


def test_names_of_the_protocols() -> None:
    assert stage_messages.STAGE_PROTOCOL == "/archipelag/stage/1"
    assert hold.HOLD_PROTOCOL == "/archipelag/hold/1"
