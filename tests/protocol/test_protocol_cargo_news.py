"""What is told about Cargos: who may say it, how two nodes find out what one of them lacks, and how much a peer may say."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from protocol import cargo_news, limits
from protocol.cargo_news import (
    CARGOS,
    About,
    Allowance,
    CargosKnown,
    CargosWanted,
    Keyed,
    Listing,
    Notice,
    answer,
    batches,
    cargo_key,
    key_of,
    question,
    read_notice,
    revocation_key,
)
from protocol.cargo_shelf import CargoShelf, Standing
from protocol.cargos import peek_cargo, peek_revocation, read_revocation
from protocol.errors import RemoteProtocolError, SignatureError
from protocol.framing import encode_frame
from tests.protocol.cargo_samples import (
    PUBLISHER,
    cargo,
    killed,
    listed,
    listing,
    revocation,
    revoked,
    signed_delegation,
)
from tests.protocol.samples import COORDINATOR, NETWORK, NOW_MS, OTHER

YEAR_MS = int(limits.DELEGATION_LIFETIME_S * 1000)


def test_a_notice_says_whose_word_it_is() -> None:
    told = read_notice(listed(), NETWORK, NOW_MS)
    assert told.cargo is not None and told.revocation is None
    assert (told.key, told.coordinator) == (cargo_key(cargo().address), COORDINATOR.peer_id)
    told = read_notice(killed(), NETWORK, NOW_MS)
    assert told.revocation is not None and (told.cargo, told.coordinator) == (None, COORDINATOR.peer_id)
    told = read_notice(revoked(), NETWORK, NOW_MS)
    assert told.revocation is not None and told.coordinator == ""


def test_a_kill_switch_outlives_its_coordinators_delegation_and_no_backward_clock_helps() -> None:
    notice = killed()
    assert read_notice(notice, NETWORK, NOW_MS + 3 * YEAR_MS).coordinator == COORDINATOR.peer_id
    late = killed(at_ms=NOW_MS + 2 * 86_400_000)  # signed a day after the delegation had ended
    with pytest.raises(RemoteProtocolError, match="expired"):
        read_notice(late, NETWORK, NOW_MS + 3 * 86_400_000)
    endless = replace(notice, delegation=signed_delegation(expires_at_ms=NOW_MS + 3 * YEAR_MS))
    with pytest.raises(RemoteProtocolError, match="longer than the protocol allows"):
        read_notice(endless, NETWORK, NOW_MS)


@pytest.mark.parametrize("change", ["label", "forged", "network", "cargo", "coordinator"])
def test_a_listing_that_does_not_prove_it(change: str) -> None:
    good, other = listed(), cargo(release="2.0.0")
    bad = {
        "label": replace(good, listing=good.delegation),
        "forged": replace(good, listing=good.listing[:-1] + bytes([good.listing[-1] ^ 1])),
        "network": replace(good, listing=listing(cargo().address, network="0" * 32)),
        "cargo": replace(good, listing=listing(other.address)),
        "coordinator": replace(good, delegation=signed_delegation(OTHER)),
    }[change]
    with pytest.raises(SignatureError):
        read_notice(bad, NETWORK, NOW_MS)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": 2}, "version"), ({"network": ""}, "network"), ({"cargo": "xx"}, "cargo"), ({"at_ms": 0}, "at_ms")],
)
def test_a_listing_checks_itself(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(Listing(1, NETWORK, cargo().address, NOW_MS), **change)  # type: ignore[arg-type]


def test_who_says_the_same_has_the_same_key() -> None:
    one, key = cargo(), revocation_key(read_revocation(revocation()))
    assert revocation_key(read_revocation(revocation(reason="another", at_ms=NOW_MS + 1))) == key
    by_network = [read_revocation(killed(one, coordinator).envelope) for coordinator in (COORDINATOR, OTHER)]
    keys = {revocation_key(signed) for signed in by_network}
    assert len(keys) == 1 and keys != {key}, "any Coordinator's word is the network's, a publisher's is its own"
    whole = revocation_key(read_revocation(revocation(whole_key=True)))
    assert len({key, whole, *keys, cargo_key(one.address)}) == 4
    for notice in (listed(), revoked(), killed()):
        assert key_of(notice) == read_notice(notice, NETWORK, NOW_MS).key
    assert (peek_cargo(one.envelope), peek_revocation(revocation())) == (one, read_revocation(revocation()))


def test_messages_check_themselves() -> None:
    key = bytes(32)
    for wrong in (
        lambda: CargosWanted(About.CARGO, known=bytes(33)),
        lambda: CargosWanted(About.CARGO, known=key * 2),
        lambda: CargosWanted(About.CARGO, after=bytes(31)),
        lambda: CargosWanted(About.CARGO, known=bytes(32 * (limits.CARGO_KEYS_MAX + 1))),
        lambda: CargosKnown((), more=True),
        lambda: CargosKnown(tuple([revoked()] * (limits.CARGO_NOTICES_MAX + 1))),
        lambda: CargosKnown(tuple([Notice(About.CARGO, bytes(limits.ENVELOPE_BYTES_MAX))] * 4)),
        lambda: Notice(About.CARGO, bytes(limits.ENVELOPE_BYTES_MAX + 1)),
        lambda: Notice(About.CARGO, b"", bytes(limits.CARGO_PROOF_BYTES_MAX + 1)),
        lambda: Notice(About.REVOCATION, b"", b"listing"),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_the_largest_messages_fit_into_a_frame() -> None:
    proofs = bytes(limits.CARGO_PROOF_BYTES_MAX)
    largest = Notice(About.CARGO, bytes(limits.ENVELOPE_BYTES_MAX), proofs, proofs)
    small = Notice(About.CARGO, bytes(limits.CARGO_NOTICES_BYTES_MAX // limits.CARGO_NOTICES_MAX))
    encode_frame(CARGOS, CargosKnown((largest,), True))
    encode_frame(CARGOS, CargosKnown((small,) * limits.CARGO_NOTICES_MAX, True))
    keys = b"".join(number.to_bytes(32, "big") for number in range(limits.CARGO_KEYS_MAX))
    encode_frame(CARGOS, CargosWanted(About.CARGO, bytes(32), bytes(32), keys))


# -- comparing


def keyed(numbers: list[int]) -> Keyed:
    made = Keyed()
    for number in numbers:
        made.put(number.to_bytes(32, "big"), Notice(About.CARGO, b"%d" % number))
    return made


def numbers_of(notices: tuple[Notice, ...]) -> list[int]:
    return [int(notice.envelope) for notice in notices]


def test_keyed_keeps_order() -> None:
    made = keyed([5, 1, 9, 5])
    assert [int.from_bytes(key, "big") for key, _ in made.all()] == [1, 5, 9] and len(made) == 3
    made.drop((5).to_bytes(32, "big"))
    made.drop((5).to_bytes(32, "big"))
    assert len(made) == 2 and (5).to_bytes(32, "big") not in made


def catch_up(asker: Keyed, answerer: Keyed) -> int:
    """As cargo_links does it; the number of questions."""
    after, questions = b"", 0
    while True:
        questions += 1
        asked = question(About.CARGO, asker, after)
        told = answer(asked, {About.CARGO: answerer})
        for notice in told.notices:
            asker.put(int(notice.envelope).to_bytes(32, "big"), notice)
        after = int(told.notices[-1].envelope).to_bytes(32, "big") if told.more else asked.until
        if not after:
            return questions


@pytest.mark.parametrize("seed", range(20))
def test_after_catching_up_the_asker_lacks_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever both know, part by part and page by page."""
    chance = Random(seed)
    monkeypatch.setattr(limits, "CARGO_KEYS_MAX", chance.choice([3, 8]))
    monkeypatch.setattr(limits, "CARGO_NOTICES_MAX", chance.choice([2, 5]))
    mine, theirs = ([n for n in range(60) if chance.random() < share] for share in (chance.random(), chance.random()))
    asker, answerer = keyed(mine), keyed(theirs)
    questions = catch_up(asker, answerer)
    assert {int.from_bytes(key, "big") for key, _ in asker.all()} == {*mine, *theirs}
    assert questions <= len(theirs) + len(mine) + 2


def test_an_answer_is_bounded_and_says_that_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {About.CARGO: keyed(list(range(10)))}
    monkeypatch.setattr(limits, "CARGO_NOTICES_MAX", 4)
    told = answer(CargosWanted(About.CARGO), known)
    assert numbers_of(told.notices) == [0, 1, 2, 3] and told.more
    told = answer(CargosWanted(About.CARGO, after=(7).to_bytes(32, "big")), known)
    assert numbers_of(told.notices) == [8, 9] and not told.more
    monkeypatch.setattr(limits, "CARGO_NOTICES_BYTES_MAX", 2)
    assert numbers_of(answer(CargosWanted(About.CARGO), known).notices) == [0, 1]


def test_parts_begin_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARGO_KEYS_MAX", 3)
    made = keyed(list(range(8)))
    starts = {made.start(place / 100) for place in range(100)}
    assert starts == {b"", (2).to_bytes(32, "big"), (5).to_bytes(32, "big")}
    assert keyed([]).start(0.99) == b"" == keyed([1, 2]).start(0.99)


def test_batches_fit() -> None:
    assert batches([]) == []
    notices = [Notice(About.CARGO, bytes(60_000))] * 4 + [Notice(About.CARGO, b"x")] * 1000
    parts = batches(notices)
    assert [notice for part in parts for notice in part] == notices
    for part in parts:
        CargosKnown(part)


def test_an_allowance_fills_again() -> None:
    allowance = Allowance(2.0, 10.0, 100.0)
    assert allowance.take(10, 100.0) == 0.0
    assert allowance.take(5, 100.0) == 2.5
    assert not allowance.try_take(1, 101.0), "it has gone below what there was"
    assert allowance.try_take(1, 103.0) and not allowance.try_take(1, 103.0)
    assert allowance.try_take(10, 1000.0) and not allowance.try_take(1, 1000.0), "never more than the burst"


# -- what it means to a shelf


def test_a_shelf_says_what_a_revocation_would_do() -> None:
    shelf, one = CargoShelf(NETWORK, {COORDINATOR.peer_id}.__contains__), cargo()
    own, network = read_revocation(revocation(one)), read_revocation(killed(one).envelope)
    assert shelf.judge(own) is Standing.EARLY and shelf.judge(network) is Standing.COUNTS
    shelf.add(one)
    assert shelf.judge(own) is Standing.COUNTS and shelf.hit_by(own) == [one.address] == shelf.hit_by(network)
    assert not shelf.is_revoked(one.address) and shelf.has(one.address)
    shelf.revoke(own)
    assert shelf.judge(own) is Standing.KNOWN and shelf.judge(network) is Standing.COUNTS
    assert shelf.is_revoked(one.address) and not shelf.has(one.address) and shelf.hit_by(own) == []


def test_a_shelf_takes_up_what_counted_before() -> None:
    shelf, one = CargoShelf(NETWORK, lambda peer: False), cargo()
    shelf.add(one)
    shelf.restore(read_revocation(revocation(one)))
    assert shelf.is_revoked(one.address) and not shelf.has(one.address)
    shelf.restore(read_revocation(revocation(whole_key=True)))
    assert shelf.is_revoked("ab" * 32, PUBLISHER.peer_id) and not shelf.is_revoked("ab" * 32, OTHER.peer_id)


def test_words_that_keep_a_cargo_away_are_found() -> None:
    shelf, one = CargoShelf(NETWORK, {COORDINATOR.peer_id}.__contains__), cargo()
    shelf.add(one)
    for said in (revocation(one), revocation(one, whole_key=True), killed(one).envelope):
        shelf.revoke(read_revocation(said))
    found = {revocation_key(signed) for signed in shelf.revoking(one)}
    assert len(found) == 2, "the publisher's word on all came when nothing was left, and is early"
    assert cargo_news.topic_of(NETWORK) == f"archipelag/cargos/1/{NETWORK}"
