"""Receipts: altered in any field, by anybody, they are refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from protocol import limits
from protocol.envelope import Label, seal
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.generation import FinishReason
from protocol.receipts import Receipt, check_receipt, check_receipt_of_ticket, read_receipt, sign_receipt
from tests.protocol import samples
from tests.protocol.samples import ISLAND, NOW_MS, OTHER

ALTERED: dict[str, Any] = {
    "version": 2,
    "network": "elsewhere",
    "island": OTHER.peer_id,
    "job_id": "job-2",
    "ticket_hash": b"\x12" * 32,
    "content_hash": "cd" * 32,
    "prompt_tokens": 31,
    "cached_tokens": 0,
    "sent_tokens": 9,
    "output_hash": b"\x23" * 32,
    "compute_ms": 7_000,
    "price_micros": 50_001,
    "finish_reason": FinishReason.LENGTH,
    "finished_at_ms": NOW_MS,
}


def check(receipt: Receipt) -> None:
    """What a holder of the ticket does with a receipt that came with JobDone."""
    check_receipt(
        receipt,
        island=ISLAND.peer_id,
        ticket_hash=b"\x11" * 32,
        sent_tokens=8,
        output_hash=b"\x22" * 32,
        price_max_micros=50_000,
    )
    check_receipt_of_ticket(receipt, samples.ticket())


def test_a_good_receipt() -> None:
    receipt = read_receipt(sign_receipt(samples.receipt(), ISLAND))
    assert receipt == samples.receipt()
    check(receipt)


def test_the_table_names_every_field() -> None:
    assert list(ALTERED) == [field.name for field in fields(Receipt)]


@pytest.mark.parametrize("name", ALTERED)
def test_a_field_altered_on_the_way_breaks_the_signature(name: str) -> None:
    envelope = msgpack.unpackb(sign_receipt(samples.receipt(), ISLAND))
    payload = msgpack.unpackb(envelope[2])
    payload[[field.name for field in fields(Receipt)].index(name)] = ALTERED[name]
    envelope[2] = msgpack.packb(payload)
    with pytest.raises(SignatureError):
        read_receipt(msgpack.packb(envelope))


@pytest.mark.parametrize(
    "name",
    ["network", "island", "job_id", "ticket_hash", "content_hash", "sent_tokens", "output_hash", "price_micros"],
)
def test_an_island_that_signs_something_else_than_what_was_seen(name: str) -> None:
    """The other fields are the Island's own account (time, cache, why it ended); the ticket's price limit bounds what they can cost."""
    with pytest.raises(RemoteProtocolError):
        check(samples.receipt(**{name: ALTERED[name]}))


def test_at_the_limits_of_the_ticket() -> None:
    ticket = samples.ticket()
    most = samples.receipt(sent_tokens=ticket.token_limit, price_micros=ticket.price_limit_micros)
    check_receipt_of_ticket(most, ticket)
    for over in ({"sent_tokens": ticket.token_limit + 1}, {"price_micros": ticket.price_limit_micros + 1}):
        with pytest.raises(RemoteProtocolError, match="more than the ticket"):
            check_receipt_of_ticket(replace(most, **over), ticket)  # type: ignore[arg-type]


def test_only_the_island_itself_signs() -> None:
    with pytest.raises(SignatureError, match="was signed by"):
        read_receipt(sign_receipt(samples.receipt(), OTHER))
    with pytest.raises(SignatureError):
        read_receipt(seal(Label.TICKET, b"\x90", ISLAND))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"network": ""},
        {"island": "x"},
        {"job_id": ""},
        {"ticket_hash": b""},
        {"content_hash": "g" * 64},
        {"prompt_tokens": -1},
        {"cached_tokens": 31},
        {"sent_tokens": limits.COMPLETION_TOKENS_MAX + 1},
        {"output_hash": b"\x22" * 31},
        {"compute_ms": -1},
        {"compute_ms": 2**40 + 1},
        {"price_micros": -1},
        {"finished_at_ms": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_receipt_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.receipt(**change)
