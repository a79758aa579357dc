"""The messages of the desk and of settlement check themselves, and keep the API key to themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol import limits
from protocol.direct import CLAIM, DESK, SETTLE, Attempt, Claim, JobSettled, ModelsWanted, TicketWanted, Verdict
from protocol.errors import Code, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from tests.protocol import samples
from tests.protocol.samples import API_KEY, DESK_MESSAGES, ISLAND, JOB_ID, SETTLE_MESSAGES

SAID: dict[str, Any] = {type(message).__name__: message for message in (*DESK_MESSAGES, *SETTLE_MESSAGES)}

BAD: list[tuple[str, dict[str, Any]]] = [
    ("TicketWanted", {"request": 0}),
    ("TicketWanted", {"api_key": ""}),
    ("TicketWanted", {"api_key": "x" * 129}),
    ("TicketWanted", {"api_key": "ak_\n"}),
    ("TicketWanted", {"job_id": "short"}),
    ("TicketWanted", {"job_id": JOB_ID.upper()}),
    ("TicketWanted", {"kind": ""}),
    ("TicketWanted", {"choices": limits.COMPLETION_CHOICES_MAX + 1}),
    ("TicketWanted", {"cargo": "no name"}),
    ("TicketWanted", {"prompt_tokens": -1}),
    ("TicketWanted", {"output_tokens": 0}),
    ("TicketWanted", {"output_tokens": limits.COMPLETION_TOKENS_MAX + 1}),
    ("TicketWanted", {"content_hash": "x"}),
    ("TicketWanted", {"affinity": "x"}),
    ("TicketWanted", {"excluded": (samples.DESK_MESSAGES[1].excluded[0],) * (limits.DESK_ISLANDS_MAX + 1)}),
    ("TicketWanted", {"bid": "1\n"}),
    ("TicketWanted", {"policy": "x" * (limits.DESK_POLICY_BYTES_MAX + 1)}),
    ("TicketWanted", {"priority": 101}),
    ("TicketGranted", {"addresses": ("a",) * (limits.AD_ADDRESSES_MAX + 1)}),
    ("TicketGranted", {"price_max_micros": -1}),
    ("TicketGranted", {"region": "\x1b[2J"}),
    ("TicketGranted", {"placement": "x" * (limits.DESK_PLACEMENT_BYTES_MAX + 1)}),
    ("MendWanted", {"index": limits.ROUTE_STAGES_MAX}),
    ("DeskRefused", {"code": "out_of_luck"}),
    ("DeskRefused", {"status": 200}),
    ("DeskRefused", {"message": "two\nlines"}),
    ("PlaceFreed", {"ticket_hash": b""}),
    ("PlaceFreed", {"outcome": "lucky"}),
    ("PlaceFreed", {"count": bytes(limits.COUNT_BYTES_MAX + 1)}),
    ("JobSettled", {"attempts": (samples.ATTEMPT,) * (limits.DESK_ATTEMPTS_MAX + 1)}),
    ("JobSettled", {"attempts": (Attempt(bytes(60_000), b"", b""),) * 4}),
    ("JobBilled", {"price_micros": -1}),
    ("Models", {"islands": -1}),
    ("Claim", {"count": bytes(limits.COUNT_BYTES_MAX + 1)}),
    ("ClaimAnswer", {"ticket_hash": bytes(31)}),
    ("ClaimAnswer", {"paid_micros": -1}),
    ("RequestWithdrawn", {"request": 2**53 + 1}),
]


@pytest.mark.parametrize(("name", "change"), BAD, ids=lambda value: value if isinstance(value, str) else next(iter(value)))
def test_a_message_checks_itself(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(SAID[name], **change)


@pytest.mark.parametrize("message", [SAID["TicketWanted"], SAID["ModelsWanted"]], ids=["TicketWanted", "ModelsWanted"])
def test_no_repr_shows_the_key(message: TicketWanted | ModelsWanted) -> None:
    assert API_KEY not in repr(message) and API_KEY not in str(message)


@pytest.mark.parametrize("key", ["secret\n" + "x" * 40, "secret" + "x" * 200, "secret\u00e9"])
def test_no_error_shows_the_key(key: str) -> None:
    with pytest.raises(ValueError) as caught:
        ModelsWanted(1, key)
    assert "secret" not in str(caught.value)
    frame = bytearray(encode_frame(DESK, SAID["ModelsWanted"]))
    frame[frame.index(b"ak_")] = 0x0A
    with pytest.raises(RemoteProtocolError) as refused:
        list(FrameDecoder(DESK).feed(frame))
    assert "AAAA" not in str(refused.value)


def test_the_largest_of_each_fits_into_a_frame() -> None:
    ticket = bytes((limits.DESK_ATTEMPTS_BYTES_MAX // limits.DESK_ATTEMPTS_MAX) - 10)
    encode_frame(DESK, JobSettled(1, JOB_ID, (Attempt(ticket, b"", b""),) * limits.DESK_ATTEMPTS_MAX))
    envelope = bytes(limits.ENVELOPE_BYTES_MAX)
    addresses, placement = ("a" * limits.TEXT_CHARS_MAX,) * limits.AD_ADDRESSES_MAX, "x" * limits.DESK_PLACEMENT_BYTES_MAX
    encode_frame(DESK, replace(SAID["TicketGranted"], ticket=envelope, addresses=addresses, placement=placement))
    claim = Claim(envelope, envelope, bytes(limits.COUNT_BYTES_MAX))
    encode_frame(SETTLE, claim)
    assert CLAIM.decode(CLAIM.encode(claim)) == claim
    models = replace(SAID["Models"], models=(replace(SAID["Models"].models[0], name="m" * limits.NAME_CHARS_MAX),) * limits.DESK_MODELS_MAX)
    encode_frame(DESK, models)


def test_the_words_of_verdicts_and_codes() -> None:
    assert [str(verdict) for verdict in Verdict] == ["settled", "refused", "later"]
    assert replace(SAID["PlaceFreed"], outcome="").outcome == "" and replace(SAID["PlaceFreed"], outcome=Code.LEASE_LOST)
    assert SAID["TicketWanted"].affinity == ISLAND.peer_id
