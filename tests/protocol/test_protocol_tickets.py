"""Tickets: an Island serves nothing without one, and each opens one job."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import limits
from protocol.envelope import Label, seal
from protocol.errors import Code, Refused, RemoteProtocolError, SignatureError
from protocol.tickets import (
    Delegation,
    TicketGuard,
    network_id_of,
    peek_ticket,
    read_delegation,
    read_ticket,
    sign_delegation,
    sign_ticket,
    ticket_hash,
)
from tests.protocol import samples
from tests.protocol.samples import BOOT_MS, COORDINATOR, HOLDER, ISLAND, NETWORK, NETWORK_KEY, NOW_MS, OTHER

SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)


def guard(**changes: Any) -> TicketGuard:
    made = TicketGuard(
        changes.get("peer", ISLAND.peer_id), changes.get("boot", BOOT_MS), changes.get("network", NETWORK)
    )
    if made._network == NETWORK:
        made.trust(samples.delegation())
    return made


def signed(signer: Any = COORDINATOR, **changes: Any) -> bytes:
    return sign_ticket(samples.ticket(**changes), signer)


def refusal(made: TicketGuard, data: bytes, sender: str = HOLDER.peer_id, now_ms: int = NOW_MS) -> str:
    with pytest.raises(Refused) as caught:
        made.admit(data, sender, now_ms)
    assert caught.value.code is Code.BAD_TICKET and caught.value.retryable
    assert made.admitted == 0 or made.refused
    return caught.value.message


def test_a_good_ticket_opens_one_job() -> None:
    made = guard()
    assert made.admit(signed(), HOLDER.peer_id, NOW_MS) == samples.ticket()
    assert "used before" in refusal(made, signed())
    assert (made.admitted, made.refused) == (1, 1)
    assert repr(made) == "<TicketGuard 1 admitted, 1 refused, 1 nonces>"


def test_a_nonce_counts_not_the_bytes_around_it() -> None:
    made = guard()
    made.admit(signed(), HOLDER.peer_id, NOW_MS)
    assert "used before" in refusal(made, signed(job_id="job-2"))
    made.admit(signed(nonce=b"\x02" * 16), HOLDER.peer_id, NOW_MS)


def test_a_refused_ticket_is_not_used_up() -> None:
    made = guard()
    assert "another peer" in refusal(made, signed(), OTHER.peer_id)
    made.admit(signed(), HOLDER.peer_id, NOW_MS)


def test_forged_tickets() -> None:
    made = guard()
    assert "no Coordinator" in refusal(made, signed(OTHER, issuer=OTHER.peer_id))
    assert "somebody else" in refusal(made, signed(OTHER))
    assert "somebody else" in refusal(made, signed(NETWORK_KEY))
    assert "signature" in refusal(made, signed()[:-1] + b"\x00")
    for data in (b"", b"\x00" * 200, samples.ticket().job_id.encode()):
        refusal(made, data)
    assert made.admitted == 0 and made.refused == 7


def test_every_bit_of_a_ticket_counts() -> None:
    made, data = guard(), signed()
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << (place % 8)
        refusal(made, bytes(altered))
    assert made.refused == len(data)
    made.admit(data, HOLDER.peer_id, NOW_MS)


def test_a_receipt_or_ad_is_no_ticket() -> None:
    payload = b"\x90"
    for label in Label:
        refusal(guard(), seal(label, payload, COORDINATOR))


def test_for_another_island() -> None:
    assert "another Island" in refusal(guard(), signed(route=(OTHER.peer_id,)))


def test_for_an_earlier_run() -> None:
    assert "earlier run" in refusal(guard(), signed(boots=(BOOT_MS - 1,)))
    assert "earlier run" in refusal(guard(boot=NOW_MS), signed())


def test_each_island_of_a_route_looks_at_its_own_boot() -> None:
    def pipeline(*boots: int) -> bytes:
        return sign_ticket(samples.pipeline_ticket(boots=boots), COORDINATOR)

    guard().admit(pipeline(5, 6, BOOT_MS), HOLDER.peer_id, NOW_MS)
    assert "earlier run" in refusal(guard(), pipeline(BOOT_MS, BOOT_MS, 5))


def test_of_another_holder() -> None:
    assert "another peer" in refusal(guard(), signed(), OTHER.peer_id)
    assert "another peer" in refusal(guard(), signed(), COORDINATOR.peer_id)


def test_of_another_network() -> None:
    elsewhere = network_id_of(OTHER.public_key)
    assert "another network" in refusal(guard(), signed(network=elsewhere))
    assert "no Coordinator" in refusal(guard(network=elsewhere), signed())


@pytest.mark.parametrize(("late_ms", "taken"), [(0, True), (1, False), (10**9, False)])
def test_expiry(late_ms: int, taken: bool) -> None:
    now_ms = samples.ticket().expires_at_ms + late_ms
    if taken:
        guard().admit(signed(), HOLDER.peer_id, now_ms)
    else:
        assert "expired" in refusal(_lasting_guard(), signed(), now_ms=now_ms)


def _lasting_guard() -> TicketGuard:
    made = guard()
    made.trust(samples.delegation(expires_at_ms=NOW_MS + 10**10))
    return made


@pytest.mark.parametrize(("ahead_ms", "taken"), [(SKEW_MS, True), (SKEW_MS + 1, False)])
def test_from_the_future(ahead_ms: int, taken: bool) -> None:
    issued_ms = NOW_MS + ahead_ms
    data = signed(issued_at_ms=issued_ms, expires_at_ms=issued_ms + 1000)
    if taken:
        guard().admit(data, HOLDER.peer_id, NOW_MS)
    else:
        assert "future" in refusal(guard(), data)


def test_a_clock_that_is_set_back_does_not_make_an_old_ticket_new() -> None:
    made = _lasting_guard()
    made.admit(signed(), HOLDER.peer_id, NOW_MS)
    later_ms = samples.ticket().expires_at_ms + SKEW_MS
    made.admit(
        signed(nonce=b"\x02" * 16, issued_at_ms=later_ms, expires_at_ms=later_ms + 1000), HOLDER.peer_id, later_ms
    )
    assert "used before" in refusal(made, signed(), now_ms=NOW_MS)


def test_an_issuer_whose_delegation_ran_out_is_refused() -> None:
    made = guard()
    end_ms = samples.delegation().expires_at_ms
    late = {"issued_at_ms": end_ms, "expires_at_ms": end_ms + 1000}
    assert "no Coordinator" in refusal(made, signed(**late), now_ms=end_ms + 1)
    made.trust(samples.delegation(expires_at_ms=end_ms + 10**6))
    made.admit(signed(**late), HOLDER.peer_id, end_ms + 1)


def test_a_shorter_delegation_takes_the_word_back() -> None:
    """The network's key has the last word: what it signed last, with an end that has passed, revokes."""
    made = guard()
    made.trust(samples.delegation(expires_at_ms=NOW_MS - 1))
    assert "no Coordinator" in refusal(made, signed())


def test_a_guard_trusts_its_own_network_only() -> None:
    with pytest.raises(SignatureError, match="belongs to network"):
        guard().trust(samples.delegation(network=network_id_of(OTHER.public_key)))


def test_nonces_are_forgotten_after_their_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _lasting_guard()
    for number in range(50):
        issued_ms = NOW_MS + number * 10_000
        data = signed(nonce=number.to_bytes(16, "big"), issued_at_ms=issued_ms, expires_at_ms=issued_ms + 20_000)
        made.admit(data, HOLDER.peer_id, issued_ms)
        assert len(made._nonces) <= 2 + (SKEW_MS + 10_000) // 10_000 + 2
    assert made.admitted == 50


def test_the_table_of_nonces_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full means busy, which another Island may help with; a live nonce is never forgotten to make room."""
    monkeypatch.setattr(limits, "NONCES_REMEMBERED_MAX", 5)
    made = guard()
    tickets = [signed(nonce=number.to_bytes(16, "big")) for number in range(6)]
    for data in tickets[:5]:
        made.admit(data, HOLDER.peer_id, NOW_MS)
    with pytest.raises(Refused) as caught:
        made.admit(tickets[5], HOLDER.peer_id, NOW_MS)
    assert caught.value.code is Code.NO_CAPACITY and caught.value.retryable
    assert "used before" in refusal(made, tickets[0])


BAD_TICKET: list[dict[str, Any]] = [
    {"version": 2},
    {"network": "a b"},
    {"issuer": "x"},
    {"holder": ""},
    {"job_id": "a\nb"},
    {"route": (), "boots": ()},
    {"route": (ISLAND.peer_id,) * 2, "boots": (1, 1)},
    {"route": tuple(samples.key(n).peer_id for n in range(9)), "boots": (1,) * 9},
    {"boots": ()},
    {"boots": (BOOT_MS, BOOT_MS)},
    {"boots": (0,)},
    {"boots": (-1,)},
    {"cargo": ""},
    {"content_hash": "00"},
    {"token_limit": 0},
    {"token_limit": limits.COMPLETION_TOKENS_MAX + 1},
    {"price_limit_micros": -1},
    {"price_limit_micros": limits.PRICE_MICROS_MAX + 1},
    {"cache_salt": b""},
    {"nonce": b"\x01" * 15},
    {"issued_at_ms": 0},
    {"expires_at_ms": NOW_MS},
    {"expires_at_ms": NOW_MS + int(limits.TICKET_LIFETIME_S * 1000) + 1},
    {"route": (OTHER.peer_id, ISLAND.peer_id), "boots": (1, 1)},
]


@pytest.mark.parametrize("change", BAD_TICKET, ids=lambda change: next(iter(change)))
def test_a_ticket_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.ticket(**change)


def test_delegations() -> None:
    made = samples.delegation()
    data = sign_delegation(made, NETWORK_KEY)
    assert read_delegation(data, NOW_MS) == made
    assert read_delegation(data, made.expires_at_ms) == made
    with pytest.raises(RemoteProtocolError, match="expired"):
        read_delegation(data, made.expires_at_ms + 1)
    with pytest.raises(SignatureError, match="own key"):
        read_delegation(sign_delegation(made, COORDINATOR), NOW_MS)
    with pytest.raises(SignatureError):
        read_delegation(signed(), NOW_MS)


def test_a_delegation_is_for_a_year_at_most() -> None:
    most_ms = NOW_MS + int(limits.DELEGATION_LIFETIME_S * 1000)
    read_delegation(sign_delegation(samples.delegation(expires_at_ms=most_ms), NETWORK_KEY), NOW_MS)
    for_ever = sign_delegation(samples.delegation(expires_at_ms=2**53), NETWORK_KEY)
    with pytest.raises(RemoteProtocolError, match="longer"):
        read_delegation(for_ever, NOW_MS)


def test_a_network_is_named_by_its_key() -> None:
    assert network_id_of(NETWORK_KEY.public_key) == NETWORK and len(NETWORK) == 32
    claimed = Delegation(NETWORK, OTHER.peer_id, NOW_MS + 1000)
    with pytest.raises(SignatureError):
        read_delegation(sign_delegation(claimed, OTHER), NOW_MS)


def test_the_hash_of_a_ticket_is_that_of_its_bytes() -> None:
    assert ticket_hash(b"") == bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    assert ticket_hash(signed()) != ticket_hash(signed(job_id="job-2"))


def test_a_look_without_the_signature_sees_the_same() -> None:
    sealed = signed()
    assert peek_ticket(sealed) == read_ticket(sealed)
    forged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    assert peek_ticket(forged) == read_ticket(sealed), "it is for what was checked before"
    with pytest.raises(RemoteProtocolError):
        peek_ticket(b"")
