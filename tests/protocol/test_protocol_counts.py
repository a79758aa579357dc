"""Counts: who signs what, and how much may leave an Island unsigned."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from protocol import counts, limits
from protocol.counts import EMPTY_HASH, Count, CountGuard, CountSigner, read_count, sign_count
from protocol.envelope import Label, seal
from protocol.errors import LocalProtocolError, RemoteProtocolError, SignatureError
from protocol.tickets import sign_ticket
from tests.protocol import samples
from tests.protocol.samples import COORDINATOR, HOLDER, ISLAND, OTHER, output_hash

ALTERED: dict[str, Any] = {
    "version": 2,
    "network": "elsewhere",
    "holder": OTHER.peer_id,
    "ticket_hash": b"\x12" * 32,
    "tokens": 6,
    "output_hash": b"\x23" * 32,
}


def ends(every: int = 8) -> tuple[CountGuard, CountSigner]:
    """Both ends of one job."""
    ticket = samples.ticket(count_every=every)
    sealed = sign_ticket(ticket, COORDINATOR)
    return CountGuard(ticket, sealed), CountSigner(ticket, sealed, HOLDER)


def send(guard: CountGuard, tokens: int) -> None:
    guard.sent(tokens, output_hash(tokens))


def signed(signer: CountSigner, tokens: int) -> bytes:
    count = signer.sign(tokens, output_hash(tokens))
    assert count is not None
    return count


def test_a_good_count() -> None:
    assert read_count(sign_count(samples.count(), HOLDER)) == samples.count()
    assert len(sign_count(samples.count(tokens=limits.COMPLETION_TOKENS_MAX), HOLDER)) <= limits.COUNT_BYTES_MAX


def test_the_table_names_every_field() -> None:
    assert list(ALTERED) == [field.name for field in fields(Count)]


@pytest.mark.parametrize("name", ALTERED)
def test_a_field_altered_on_the_way_breaks_the_signature(name: str) -> None:
    envelope = msgpack.unpackb(sign_count(samples.count(), HOLDER))
    payload = msgpack.unpackb(envelope[2])
    payload[[field.name for field in fields(Count)].index(name)] = ALTERED[name]
    envelope[2] = msgpack.packb(payload)
    with pytest.raises(SignatureError):
        read_count(msgpack.packb(envelope))


@pytest.mark.parametrize("name", [name for name in ALTERED if name != "version"])
def test_a_holder_that_signs_something_else_than_what_came(name: str) -> None:
    sealed = sign_ticket(samples.ticket(), COORDINATOR)
    guard = CountGuard(samples.ticket(), sealed)
    send(guard, 5)
    signer = OTHER if name == "holder" else HOLDER
    with pytest.raises(RemoteProtocolError):
        guard.hear(sign_count(samples.count(**{name: ALTERED[name]}), signer))
    assert guard.signed_tokens == -1 and not guard.count
    guard.hear(sign_count(samples.count(), HOLDER))
    assert guard.signed_tokens == 5, "what was refused has changed nothing"


def test_only_the_holder_signs() -> None:
    with pytest.raises(SignatureError, match="was signed by"):
        read_count(sign_count(samples.count(), ISLAND))
    with pytest.raises(SignatureError):
        read_count(seal(Label.RECEIPT, b"\x90", HOLDER))


def test_exactly_so_many_leave_unsigned() -> None:
    guard, signer = ends(every=4)
    assert guard.room == 4
    send(guard, 3)
    assert guard.room == 1
    with pytest.raises(LocalProtocolError):
        send(guard, 5)
    send(guard, 4)
    assert guard.room == 0
    guard.hear(signed(signer, 3))
    assert guard.room == 3
    guard.hear(signed(signer, 4))
    assert guard.room == 4 and guard.is_settled


def test_a_count_of_nothing_says_that_nothing_came() -> None:
    guard, signer = ends()
    assert not guard.is_settled
    guard.hear(signed(signer, 0))
    assert guard.is_settled and guard.room == 8
    assert read_count(guard.count).output_hash == EMPTY_HASH


def test_replayed_and_older_counts() -> None:
    guard, signer = ends()
    send(guard, 3)
    first = signed(signer, 3)
    send(guard, 5)
    second = signed(signer, 5)
    guard.hear(second)
    for replayed in (second, first):
        with pytest.raises(RemoteProtocolError, match="signed before"):
            guard.hear(replayed)
    assert guard.count == second


def test_a_count_for_more_than_was_sent() -> None:
    guard, _ = ends()
    send(guard, 5)
    with pytest.raises(RemoteProtocolError, match="5 were sent"):
        guard.hear(sign_count(samples.count(tokens=6, output_hash=output_hash(6), ticket_hash=guard._hash), HOLDER))


def test_a_count_that_ends_inside_a_chunk() -> None:
    guard, _ = ends()
    send(guard, 5)
    with pytest.raises(RemoteProtocolError, match="no chunk ended there"):
        guard.hear(sign_count(samples.count(tokens=4, output_hash=output_hash(4), ticket_hash=guard._hash), HOLDER))


def test_a_ticket_that_wants_no_counts_has_no_guard() -> None:
    ticket = samples.ticket(holder=COORDINATOR.peer_id, count_every=0)
    with pytest.raises(LocalProtocolError):
        CountGuard(ticket, b"ticket")


def test_a_ticket_of_somebody_else_is_not_signed_for() -> None:
    with pytest.raises(LocalProtocolError, match="belongs to"):
        CountSigner(samples.ticket(), b"ticket", OTHER)


@pytest.mark.parametrize(("every", "due_at"), [(1, 1), (2, 1), (3, 1), (8, 4), (32, 16)])
def test_the_holder_signs_before_the_island_has_to_stop(every: int, due_at: int) -> None:
    _, signer = ends(every)
    assert [signer.is_due(tokens) for tokens in range(due_at + 1)] == [False] * due_at + [True]
    signed(signer, due_at)
    assert not signer.is_due(2 * due_at - 1) and signer.is_due(2 * due_at)


def test_nothing_is_signed_twice() -> None:
    _, signer = ends()
    newest = signed(signer, 5)
    assert signer.sign(5, output_hash(5)) is None and signer.sign(3, output_hash(3)) is None
    assert signer.count == newest


@pytest.mark.parametrize("every", [1, 2, 7, 32])
def test_what_the_guard_remembers_is_bounded(every: int) -> None:
    guard, signer = ends(every)
    chance, sent = random.Random(every), 0
    while sent < samples.ticket().token_limit:
        if guard.room and chance.random() < 0.7:
            sent = min(sent + chance.randint(1, guard.room), samples.ticket().token_limit)
            send(guard, sent)
        elif sent > max(0, guard.signed_tokens):
            guard.hear(signed(signer, sent))
        assert len(guard._unsigned) <= every + 1 and guard.room <= every


@pytest.mark.parametrize("seed", range(20))
def test_counts_that_come_late_never_stop_an_answer_for_good(seed: int) -> None:
    """Both ends with a wire of any delay between them: every honest answer gets through, and ends signed for."""
    chance = random.Random(seed)
    guard, signer = ends(every := chance.choice([1, 2, 5, 16]))
    total = chance.randint(0, samples.ticket().token_limit)
    down: list[int] = []
    up: list[bytes] = []
    received = 0
    while received < total or up:
        moves = [len(down) > 0, len(up) > 0, guard.room > 0 and guard.sent_tokens < total]
        assert any(moves), "nobody can go on"
        move = chance.choice([index for index, possible in enumerate(moves) if possible])
        if move == 0:
            received = down.pop(0)
            if signer.is_due(received) or received == total:
                up.extend(filter(None, [signer.sign(received, output_hash(received))]))
        elif move == 1:
            guard.hear(up.pop(0))
        else:
            sent = min(total, guard.sent_tokens + chance.randint(1, guard.room))
            send(guard, sent)
            down.append(sent)
            assert sent - max(0, guard.signed_tokens) <= every
    if not total:
        guard.hear(signed(signer, 0))
    assert guard.is_settled and guard.count == signer.count


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"network": ""},
        {"holder": "x"},
        {"ticket_hash": b""},
        {"tokens": -1},
        {"tokens": limits.COMPLETION_TOKENS_MAX + 1},
        {"output_hash": b"\x22" * 31},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_count_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.count(**change)


def test_only_an_issuer_may_hold_a_ticket_without_counts() -> None:
    assert replace(samples.ticket(), holder=COORDINATOR.peer_id, count_every=0).count_every == 0
    with pytest.raises(ValueError, match="signs"):
        samples.ticket(count_every=0)


def test_repr_shows_how_it_stands() -> None:
    guard, signer = ends()
    send(guard, 5)
    guard.hear(signed(signer, 5))
    send(guard, 7)
    assert repr(guard) == "<CountGuard 7 sent, 5 signed>" and repr(signer) == "<CountSigner 5 tokens signed>"
    assert counts.COUNT_VERSION == 1
