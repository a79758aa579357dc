"""The registry of message numbers and the codec: what may not be said cannot be encoded, and is refused when it comes in."""

from __future__ import annotations

import dataclasses
import random
import tracemalloc
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest

from protocol import blobs, cargo_news, direct, hold, limits, messages, stage_messages
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.registry import Registry, Struct, body
from tests.protocol import samples


@dataclass(frozen=True)
class Inner:
    count: int


@dataclass(frozen=True)
class Mixed:
    number: int
    share: float
    name: str
    raw: bytes
    flag: bool
    perhaps: int | None
    inner: Inner
    pair: tuple[int, float]
    many: tuple[str, ...]


MIXED = Struct(Mixed)
SAMPLE = Mixed(1, 0.5, "a", b"b", True, None, Inner(3), (4, 5.0), ("x", "y"))
VALUES: list[Any] = [1, 0.5, "a", b"b", True, None, [3], [4, 5.0], ["x", "y"]]


def test_every_message_survives_the_way_there_and_back() -> None:
    for registry, samples_of in samples.REGISTRIES:
        assert [type(m) for m in samples_of] == list(registry.numbers().values()), "a sample for each message"
        for message in samples_of:
            assert registry.decode(*registry.encode(message)) == message


def test_numbers_are_frozen() -> None:
    """Numbers are the wire: changing one needs a new protocol version."""
    names = {number: cls.__name__ for number, cls in messages.JOB.numbers().items()}
    assert names == {
        1: "Hello",
        2: "JobOpen",
        3: "JobAccepted",
        4: "JobChunk",
        5: "JobDone",
        6: "JobFailed",
        7: "JobCancel",
        8: "RouteBroken",
        9: "RouteMended",
        10: "JobCount",
        11: "JobAlive",
        12: "JobLines",
        13: "JobMore",
    }
    names = {number: cls.__name__ for number, cls in messages.ADS.numbers().items()}
    assert names == {1: "Hello", 2: "Announce", 3: "AdAck", 4: "BookRequest", 5: "Coordinators"}
    names = {number: cls.__name__ for number, cls in stage_messages.STAGE.numbers().items()}
    assert names == {
        1: "Hello",
        2: "StageOpen",
        3: "StageOpened",
        4: "StageRows",
        5: "SequenceOpen",
        6: "SequenceEnd",
        7: "RowsWanted",
        8: "StageProbe",
        9: "StageReport",
        10: "StageFault",
    }
    names = {number: cls.__name__ for number, cls in hold.HOLD.numbers().items()}
    assert names == {
        1: "Hello",
        2: "HoldShard",
        3: "HoldProgress",
        4: "ShardHeld",
        5: "HoldRefused",
        6: "DropShard",
        7: "SetAsk",
        8: "AskSet",
    }
    names = {number: cls.__name__ for number, cls in direct.SETTLE.numbers().items()}
    assert names == {1: "Hello", 2: "Claim", 3: "ClaimAnswer"}
    names = {number: cls.__name__ for number, cls in direct.DESK.numbers().items()}
    assert names == {
        1: "Hello",
        2: "TicketWanted",
        3: "TicketGranted",
        4: "DeskRefused",
        5: "PlaceFreed",
        6: "JobSettled",
        7: "JobDropped",
        8: "JobBilled",
        9: "ModelsWanted",
        10: "Models",
        11: "RequestWithdrawn",
        12: "MendWanted",
    }
    names = {number: cls.__name__ for number, cls in blobs.BLOB.numbers().items()}
    assert names == {
        1: "Hello",
        2: "TreeWanted",
        3: "Tree",
        4: "HaveWanted",
        5: "Have",
        6: "ChunksWanted",
        7: "Chunk",
        8: "BlobRefused",
    }
    names = {number: cls.__name__ for number, cls in cargo_news.CARGOS.numbers().items()}
    assert names == {1: "Hello", 2: "CargosWanted", 3: "CargosKnown", 4: "CargoNews"}


def test_a_number_is_used_once() -> None:
    registry = Registry("test")
    registry.message(1)(Inner)
    with pytest.raises(LocalProtocolError, match="taken"):
        registry.message(1)(Mixed)
    with pytest.raises(LocalProtocolError, match="taken"):
        registry.message(2)(Inner)


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (0, 1), (-1, 1)])
def test_numbers_start_at_one_and_have_no_gap(numbers: tuple[int, ...]) -> None:
    registry = Registry("test")
    for number, cls in zip(numbers, (Inner, Mixed), strict=False):
        registry.message(number)(cls)
    with pytest.raises(LocalProtocolError, match="gap"):
        registry.seal()


def test_a_sealed_registry_takes_no_more() -> None:
    registry = Registry("test")
    registry.message(1)(Inner)
    registry.seal()
    with pytest.raises(LocalProtocolError, match="sealed"):
        registry.message(2)(Mixed)
    assert repr(registry) == "<Registry test: 1 messages, sealed>"


def test_a_class_without_a_number_cannot_be_sent() -> None:
    with pytest.raises(LocalProtocolError, match="no message"):
        messages.JOB.encode(Inner(1))


def test_types_that_have_no_wire_form_are_refused_at_registration() -> None:
    for hint in (dict[str, int], int | str, list[int], object):
        cls = dataclasses.make_dataclass("Odd", [("field", hint)], frozen=True)
        with pytest.raises(LocalProtocolError):
            Struct(cls)


def test_struct_round_trip() -> None:
    assert MIXED.decode(MIXED.encode(SAMPLE)) == SAMPLE
    assert msgpack.unpackb(MIXED.encode(SAMPLE)) == VALUES


WRONG: list[tuple[int, Any]] = [
    *((0, wrong) for wrong in (True, 1.0, "1", b"1", None, [1], 2**64 - 1.0)),
    *((1, wrong) for wrong in (1, True, float("nan"), float("inf"), float("-inf"), "0.5", None)),
    *((2, wrong) for wrong in (b"a", 1, None, ["a"])),
    *((3, wrong) for wrong in ("b", 1, None)),
    *((4, wrong) for wrong in (1, 0, None, "true")),
    *((5, wrong) for wrong in (True, 0.0, "")),
    *((6, wrong) for wrong in (3, [3, 4], [True], {1: 2}, None)),
    *((7, wrong) for wrong in ([4], [4, 5], [4, 5.0, 6], [5.0, 4], "ab", None)),
    *((8, wrong) for wrong in ([1], ["x", b"y"], "xy", None)),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG, ids=repr)
def test_a_wrong_type_is_refused(field: int, wrong: Any) -> None:
    values = [*VALUES]
    values[field] = wrong
    with pytest.raises(RemoteProtocolError, match="malformed Mixed"):
        MIXED.decode(msgpack.packb(values))


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": True},
        {"number": 1.0},
        {"number": 2**64},
        {"share": float("nan")},
        {"share": float("inf")},
        {"name": b"a"},
        {"name": "\ud800"},
        {"raw": "b"},
        {"flag": 1},
        {"many": (1,)},
    ],
    ids=repr,
)
def test_what_the_peer_would_refuse_is_not_sent(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        MIXED.encode(dataclasses.replace(SAMPLE, **wrong))


def test_extra_and_missing_fields_are_refused() -> None:
    for values in ([], VALUES[:-1], [*VALUES, 1], [VALUES]):
        with pytest.raises(RemoteProtocolError):
            MIXED.decode(msgpack.packb(values))


def test_anything_but_one_array_is_refused() -> None:
    data = MIXED.encode(SAMPLE)
    for wrong in (
        b"",
        data + b"\xc0",
        data + data,
        data[:-1],
        msgpack.packb(1),
        msgpack.packb({}),
        b"\xc1",
        b"\x81\x01\x02",
    ):
        with pytest.raises(RemoteProtocolError):
            MIXED.decode(wrong)


def test_maps_and_extension_types_are_refused() -> None:
    for position in range(len(VALUES)):
        for wrong in ({1: 2}, {}, msgpack.ExtType(5, b""), msgpack.ExtType(5, b"xy"), msgpack.Timestamp(1, 2)):
            values = [*VALUES]
            values[position] = wrong
            with pytest.raises(RemoteProtocolError):
                MIXED.decode(msgpack.packb(values))


def test_text_that_is_no_utf8_is_refused() -> None:
    for raw in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"):  # no start byte, over-long, half a surrogate pair
        data = msgpack.packb(VALUES).replace(msgpack.packb("a"), bytes([0xA0 + len(raw)]) + raw)
        with pytest.raises(RemoteProtocolError):
            MIXED.decode(data)


def test_one_value_has_one_encoding() -> None:
    """Longer forms of the same integers, strings and arrays decode to the same value, and would give a signed thing a second hash."""
    data = MIXED.encode(SAMPLE)
    assert data[:2] == b"\x99\x01"
    for longer in (b"\x99\xcc\x01", b"\x99\xcd\x00\x01", b"\xdc\x00\x09\x01", b"\xdd\x00\x00\x00\x09\x01"):
        with pytest.raises(RemoteProtocolError, match="shortest"):
            MIXED.decode(longer + data[2:])
    with pytest.raises(RemoteProtocolError, match="shortest"):
        MIXED.decode(data.replace(msgpack.packb("a"), b"\xd9\x01a"))
    with pytest.raises(RemoteProtocolError, match="shortest"):
        MIXED.decode(data.replace(msgpack.packb(0.5), msgpack.packb(0.5, use_single_float=True)))


@pytest.mark.parametrize("depth", [3, 9, 100, 1000, 5000, 200_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(RemoteProtocolError):
        Struct(Mixed, 2**20).decode(b"\x91" * depth + b"\xc0")
    with pytest.raises(RemoteProtocolError):
        messages.JOB.decode(b"\x92\x01" + b"\x91" * depth + b"\xc0")


@pytest.mark.parametrize(
    "prefix", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_a_huge_declared_length_allocates_nothing(prefix: bytes) -> None:
    assert _peak_of_decoding(b"\x92\x01" + prefix) < 100_000


def test_nested_declared_lengths_allocate_little() -> None:
    """250,000 entries are declared 500 times, each inside the other: a gigabyte of list slots if the decoder believed it."""
    header = (b"\xdd" + (250_000).to_bytes(4, "big")) * 500
    header += b"\xc0" * (limits.FRAME_HEADER_BYTES_MAX - len(header))
    assert _peak_of_decoding(header) < 20_000_000
    within = (b"\xdd" + limits.ARRAY_ENTRIES_MAX.to_bytes(4, "big")) * 500
    assert _peak_of_decoding(within + b"\xc0" * (limits.FRAME_HEADER_BYTES_MAX - len(within))) < 40_000_000


def _peak_of_decoding(header: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            messages.JOB.decode(header)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_unknown_and_odd_numbers_are_refused() -> None:
    for number in (0, 10, -1, 2**63, True, 1.0, "1", None, [1]):
        with pytest.raises(RemoteProtocolError):
            messages.JOB.decode(msgpack.packb([number, 1]))
    with pytest.raises(RemoteProtocolError):
        messages.JOB.decode(msgpack.packb([]))


def test_a_body_without_a_field_for_it_is_refused() -> None:
    header, _ = messages.JOB.encode(messages.JobCancel(1))
    assert messages.JOB.decode(header, b"") == messages.JobCancel(1)
    with pytest.raises(RemoteProtocolError, match="no body"):
        messages.JOB.decode(header, b"x")


def test_the_body_is_not_copied_into_the_header() -> None:
    header, raw = messages.JOB.encode(messages.JobOpen(1, b"t", input=b"i" * 1000))
    assert len(header) < 20 and len(raw) == 1000


def test_only_one_field_may_be_the_body() -> None:
    @dataclass(frozen=True)
    class TwoBodies:
        left: bytes = body()
        right: bytes = body()

    with pytest.raises(LocalProtocolError, match="one body"):
        Struct(TwoBodies)


def test_an_envelope_sized_limit_holds_both_ways() -> None:
    small = Struct(Mixed, 64)
    with pytest.raises(LocalProtocolError, match="over 64"):
        small.encode(dataclasses.replace(SAMPLE, raw=bytes(64)))
    with pytest.raises(RemoteProtocolError, match="over 64"):
        small.decode(MIXED.encode(dataclasses.replace(SAMPLE, raw=bytes(64))))


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_refused_or_is_a_message(seed: int) -> None:
    """Random changes to valid headers either fail as RemoteProtocolError or give a message that encodes again; nothing else escapes."""
    chance = random.Random(seed)
    valid = [(m, *messages.JOB.encode(m)) for m in samples.JOB_MESSAGES]
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        _, header, raw = chance.choice(valid)
        noisy = bytearray(header)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(noisy) + 1)
            match chance.randrange(3):
                case 0 if place < len(noisy):
                    noisy[place] = chance.randrange(256)
                case 1:
                    noisy[place:place] = chance.randbytes(chance.randint(1, 3))
                case _:
                    del noisy[place : place + chance.randint(1, 3)]
        try:
            message = messages.JOB.decode(bytes(noisy), raw)
        except RemoteProtocolError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert messages.JOB.decode(*messages.JOB.encode(message)) == message
    assert min(outcomes.values()) > 100, outcomes
