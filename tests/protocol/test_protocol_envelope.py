"""Signed envelopes: unsigned, forged, for another purpose, by somebody else, or with any one bit turned."""

from __future__ import annotations

import random

import msgpack
import pytest
from nacl.signing import SigningKey

from protocol import limits
from protocol.envelope import Label, open_envelope, seal
from protocol.errors import LocalProtocolError, RemoteProtocolError, SignatureError
from protocol.identity import peer_id_of, public_key_of
from tests.protocol import samples

PAYLOAD = b"what is said"
DATA = seal(Label.TICKET, PAYLOAD, samples.COORDINATOR)


def parts(data: bytes = DATA) -> list[object]:
    values = msgpack.unpackb(data)
    assert isinstance(values, list)
    return values


def test_a_sealed_payload_opens() -> None:
    envelope = open_envelope(Label.TICKET, DATA)
    assert (envelope.payload, envelope.signer) == (PAYLOAD, samples.COORDINATOR.peer_id)


def test_the_signature_covers_label_and_payload_as_the_spec_says() -> None:
    signed = b"archipelag-envelope/1\0archipelag/ticket/1\0" + PAYLOAD
    assert parts()[3] == SigningKey(samples.COORDINATOR.seed).sign(signed).signature


@pytest.mark.parametrize("label", [label for label in Label if label is not Label.TICKET])
def test_a_signature_for_one_purpose_serves_no_other(label: Label) -> None:
    with pytest.raises(SignatureError, match="expected"):
        open_envelope(label, DATA)
    relabelled = parts()
    relabelled[0] = str(label)
    with pytest.raises(SignatureError, match="wrong"):
        open_envelope(label, msgpack.packb(relabelled))


def test_labels_have_no_nul_so_parts_cannot_be_shifted() -> None:
    assert all("\0" not in label for label in Label)
    assert len({str(label) for label in Label}) == len(Label)


def test_unsigned_bytes_are_refused() -> None:
    for data in (b"", PAYLOAD, msgpack.packb(PAYLOAD), msgpack.packb(["archipelag/ticket/1", PAYLOAD])):
        with pytest.raises(SignatureError):
            open_envelope(Label.TICKET, data)
    for signature in (b"", bytes(64), bytes(63), bytes(65)):
        values = parts()
        values[3] = signature
        with pytest.raises(SignatureError):
            open_envelope(Label.TICKET, msgpack.packb(values))


def test_another_signer_cannot_take_over_a_signature() -> None:
    values = parts()
    values[1] = samples.OTHER.public_key
    with pytest.raises(SignatureError, match="wrong"):
        open_envelope(Label.TICKET, msgpack.packb(values))


def test_keys_that_sign_anything_are_refused() -> None:
    """Points of small order verify forged signatures in careless libraries."""
    for weak in (bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"):
        values = parts()
        values[1], values[3] = weak, weak + bytes(32)
        with pytest.raises(SignatureError):
            open_envelope(Label.TICKET, msgpack.packb(values))


def test_a_signature_has_one_form() -> None:
    """Adding the group's order to S gives the same equation; RFC 8032 asks for S below the order."""
    order = 2**252 + 27742317777372353535851937790883648493
    values = parts()
    signature = values[3]
    assert isinstance(signature, bytes)
    values[3] = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    with pytest.raises(SignatureError, match="wrong"):
        open_envelope(Label.TICKET, msgpack.packb(values))


def test_every_bit_counts() -> None:
    for place in range(len(DATA)):
        for bit in range(8):
            altered = bytearray(DATA)
            altered[place] ^= 1 << bit
            with pytest.raises(RemoteProtocolError):
                open_envelope(Label.TICKET, bytes(altered))


@pytest.mark.parametrize("seed", range(3))
def test_random_cuts_and_splices_are_refused(seed: int) -> None:
    chance = random.Random(seed)
    other = seal(Label.TICKET, b"something else", samples.OTHER)
    for _ in range(500):
        left, right = chance.randrange(len(DATA)), chance.randrange(len(other))
        spliced = DATA[:left] + other[right:]
        if spliced not in (DATA, other):
            with pytest.raises(RemoteProtocolError):
                open_envelope(Label.TICKET, spliced)


def test_the_bytes_of_an_envelope_cannot_be_rewritten() -> None:
    """A holder that re-encodes its ticket would give it another hash, and the Island's receipt would name no ticket that was issued."""
    longer = DATA[:1] + b"\xda" + len("archipelag/ticket/1").to_bytes(2, "big") + DATA[2:]
    assert msgpack.unpackb(longer) == parts()
    with pytest.raises(SignatureError, match="shortest"):
        open_envelope(Label.TICKET, longer)


def test_too_large_is_refused_both_ways() -> None:
    with pytest.raises(LocalProtocolError):
        seal(Label.TICKET, bytes(limits.ENVELOPE_BYTES_MAX), samples.COORDINATOR)
    with pytest.raises(SignatureError, match="over"):
        open_envelope(Label.TICKET, bytes(limits.ENVELOPE_BYTES_MAX + 1))


def test_peer_ids_hold_their_key() -> None:
    # The same name as libp2p gives the key: specs/peer-ids.
    assert samples.COORDINATOR.peer_id.startswith("12D3KooW")
    assert public_key_of(samples.COORDINATOR.peer_id) == samples.COORDINATOR.public_key
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(b"short")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Qm" + "a" * 44,
        "12D3KooW",
        samples.ISLAND.peer_id + " ",
        " " + samples.ISLAND.peer_id,
        "0" * 52,
        "é" * 52,
        "a" * 10_000_000,
    ],
    ids=lambda text: f"{text[:12]}-{len(text)}",
)
def test_what_is_no_peer_id_has_no_key(text: str) -> None:
    with pytest.raises(ValueError):
        public_key_of(text)
