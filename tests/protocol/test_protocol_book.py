"""The book: one final state whatever the order, and bounds that hold whoever speaks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import reduce

import pytest

from protocol import limits
from protocol.ads import Ad
from protocol.book import AdHeard, Book, CoordinatorTrusted, Event, LostHeard, Outcome, Tick, apply, must_refute
from tests.protocol import samples
from tests.protocol.samples import COORDINATOR, ISLAND, NETWORK, NOW_MS, OTHER

SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)
LIFETIME_MS = int(limits.AD_LIFETIME_S * 1000)
EMPTY = Book(NETWORK, coordinators=frozenset({COORDINATOR.peer_id}))


def heard(ad: Ad) -> AdHeard:
    return AdHeard(ad, f"{ad.peer} {ad.sequence}".encode())


def gone(peer: str, sequence: int, witness: str = COORDINATOR.peer_id) -> LostHeard:
    envelope = f"{peer} lost {sequence}".encode() if witness else b""
    return LostHeard(witness, samples.lost(peer, sequence, seen_at_ms=max(NOW_MS, sequence)), envelope)


def after(*events: Event, book: Book = EMPTY, now_ms: int = NOW_MS) -> Book:
    return reduce(lambda state, event: apply(event, state, now_ms)[0], events, book)


def outcome(event: Event, book: Book, now_ms: int = NOW_MS) -> Outcome:
    return apply(event, book, now_ms)[1]


def test_a_newer_ad_replaces_an_older_one() -> None:
    book = after(heard(samples.ad()), heard(samples.ad(sequence=NOW_MS + 1)))
    assert [ad.sequence for ad in book.ads()] == [NOW_MS + 1]
    for sequence in (NOW_MS, NOW_MS + 1):
        assert outcome(heard(samples.ad(sequence=sequence)), book) is Outcome.STALE
    assert outcome(heard(samples.ad(sequence=NOW_MS + 2)), book) is Outcome.CHANGED
    assert repr(book) == f"<Book {NETWORK}: 1 Islands, 0 lost>"


def test_apply_changes_nothing_in_place() -> None:
    book = after(heard(samples.ad()))
    before = (dict(book.entries), dict(book.tombstones))
    after(
        gone(ISLAND.peer_id, NOW_MS), heard(samples.ad(sequence=NOW_MS + 5)), Tick(), book=book, now_ms=NOW_MS + 10**9
    )
    assert (dict(book.entries), dict(book.tombstones)) == before


def test_the_dead_stay_dead() -> None:
    book = after(heard(samples.ad()), gone(ISLAND.peer_id, NOW_MS))
    assert book.ads() == []
    for sequence in (NOW_MS, NOW_MS - 1, NOW_MS - 50_000):
        assert outcome(heard(samples.ad(sequence=sequence)), book) is Outcome.STALE


def test_a_newer_ad_takes_the_word_back() -> None:
    book = after(heard(samples.ad()), gone(ISLAND.peer_id, NOW_MS), heard(samples.ad(sequence=NOW_MS + 1)))
    assert [ad.sequence for ad in book.ads()] == [NOW_MS + 1] and not book.tombstones
    assert outcome(gone(ISLAND.peer_id, NOW_MS), book) is Outcome.STALE


def test_who_has_to_speak_up() -> None:
    assert must_refute(samples.lost(), ISLAND.peer_id, NOW_MS)
    assert not must_refute(samples.lost(), ISLAND.peer_id, NOW_MS + 1)
    assert not must_refute(samples.lost(), OTHER.peer_id, NOW_MS)


def test_only_coordinators_notices_count() -> None:
    book = after(heard(samples.ad()))
    for witness in (OTHER.peer_id, ISLAND.peer_id):
        assert outcome(gone(ISLAND.peer_id, NOW_MS, witness), book) is Outcome.REFUSED
    assert outcome(gone(ISLAND.peer_id, NOW_MS, ""), book) is Outcome.CHANGED
    trusting = after(CoordinatorTrusted(OTHER.peer_id), book=book)
    assert outcome(gone(ISLAND.peer_id, NOW_MS, OTHER.peer_id), trusting) is Outcome.CHANGED


def test_other_networks_are_refused() -> None:
    assert outcome(heard(samples.ad(network="elsewhere")), EMPTY) is Outcome.REFUSED
    lost = replace(samples.lost(), network="elsewhere")
    assert outcome(LostHeard(COORDINATOR.peer_id, lost, b"x"), EMPTY) is Outcome.REFUSED


def test_a_notice_that_can_be_passed_on_supersedes_what_one_saw_alone() -> None:
    alone = after(heard(samples.ad()), gone(ISLAND.peer_id, NOW_MS, ""))
    assert alone.tombstones[ISLAND.peer_id].envelope == b""
    told = after(gone(ISLAND.peer_id, NOW_MS), book=alone)
    assert told.tombstones[ISLAND.peer_id].envelope
    for again in (gone(ISLAND.peer_id, NOW_MS), gone(ISLAND.peer_id, NOW_MS, "")):
        assert outcome(again, told) is Outcome.STALE


def test_ads_expire() -> None:
    book = after(heard(samples.ad()))
    end_ms = NOW_MS + LIFETIME_MS + SKEW_MS
    assert outcome(Tick(), book, end_ms) is Outcome.STALE
    assert apply(Tick(), book, end_ms + 1) == (EMPTY, Outcome.CHANGED)


@pytest.mark.parametrize("skew_ms", [-SKEW_MS, 0, SKEW_MS])
def test_a_tombstone_outlives_every_ad_that_it_keeps_out(skew_ms: int) -> None:
    """The Island's clock may be off by one skew: its last ad is believed here until its own expiry and one skew more."""
    last = samples.ad(sequence=NOW_MS + skew_ms)
    book = after(heard(last), gone(last.peer, last.sequence))
    believed_until_ms = last.expires_at_ms + SKEW_MS
    book = after(Tick(), book=book, now_ms=believed_until_ms)
    assert outcome(heard(last), book, believed_until_ms) is Outcome.STALE
    assert not after(Tick(), book=book, now_ms=NOW_MS + LIFETIME_MS + 3 * SKEW_MS + 1).tombstones


def _events(chance: random.Random) -> list[Event]:
    peers = [samples.key(number) for number in (10, 11, 12)]
    events: list[Event] = []
    for _ in range(chance.randint(3, 12)):
        peer, sequence = chance.choice(peers), NOW_MS + chance.randint(0, 4)
        if chance.random() < 0.6:
            events.append(heard(samples.ad(peer, sequence=sequence)))
        else:
            events.append(gone(peer.peer_id, sequence, chance.choice([COORDINATOR.peer_id, COORDINATOR.peer_id, ""])))
    return events


@pytest.mark.parametrize("seed", range(60))
def test_the_order_does_not_matter(seed: int) -> None:
    """Shuffled and with duplicates, the same events give the same book; nobody is both alive and dead."""
    chance = random.Random(seed)
    events = _events(chance)
    book = after(*events)
    assert not set(book.entries) & set(book.tombstones)
    for _ in range(20):
        again = [*events, *chance.choices(events, k=chance.randint(0, 8))]
        chance.shuffle(again)
        assert after(*again) == book


def test_all_orders_of_a_short_story() -> None:
    story: list[Event] = [
        heard(samples.ad()),
        gone(ISLAND.peer_id, NOW_MS),
        heard(samples.ad(sequence=NOW_MS + 1)),
        gone(ISLAND.peer_id, NOW_MS + 1, ""),
        gone(ISLAND.peer_id, NOW_MS + 1),
    ]
    books = {repr(after(*order)) + repr(after(*order).tombstones) for order in itertools.permutations(story)}
    assert len(books) == 1 and "1 lost" in books.pop()


def test_two_books_that_swap_what_changed_them_agree() -> None:
    """What an event did not change need not be passed on: the other side loses nothing by it."""
    chance = random.Random(5)
    for _ in range(100):
        events = _events(chance)
        book, passed_on = EMPTY, []
        for event in events:
            book, did = apply(event, book, NOW_MS)
            if did is Outcome.CHANGED:
                passed_on.append(event)
        assert after(*passed_on) == book


def test_the_book_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BOOK_PEERS_MAX", 3)
    keys = [samples.key(number) for number in range(20, 30)]
    book = after(*(heard(samples.ad(key)) for key in keys))
    assert len(book.entries) == 3
    assert outcome(heard(samples.ad(keys[9])), book) is Outcome.REFUSED
    assert outcome(heard(samples.ad(keys[0], sequence=NOW_MS + 1)), book) is Outcome.CHANGED


def test_the_tombstones_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes and goes under ever new names fills neither the entries nor the graveyard; the oldest grave makes room."""
    monkeypatch.setattr(limits, "BOOK_PEERS_MAX", 3)
    book = EMPTY
    for number in range(30, 40):
        key = samples.key(number)
        book = after(heard(samples.ad(key)), gone(key.peer_id, NOW_MS + number, ""), book=book)
        assert len(book.tombstones) <= 3 and not book.entries
    assert {stone.sequence for stone in book.tombstones.values()} == {NOW_MS + 37, NOW_MS + 38, NOW_MS + 39}
    assert outcome(gone(OTHER.peer_id, NOW_MS), book) is Outcome.REFUSED, (
        "a stranger's loss has no room to push others out"
    )
