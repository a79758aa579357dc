"""Catching up: two books become one, in few and bounded answers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from protocol import limits
from protocol.ads import read_ad, read_lost, sign_ad, sign_lost
from protocol.book import AdHeard, Book, LostHeard, Outcome, apply
from protocol.catchup import answer, next_request
from protocol.errors import SignatureError
from protocol.framing import FrameDecoder, encode_frame
from protocol.messages import ADS, Announce, BookRequest, Known
from tests.protocol import samples
from tests.protocol.samples import COORDINATOR, NETWORK, NOW_MS

EMPTY = Book(NETWORK, coordinators=frozenset({COORDINATOR.peer_id}))
LATER_MS = NOW_MS + 1000


def with_ad(book: Book, number: int, sequence: int = NOW_MS) -> Book:
    key = samples.key(number)
    ad = samples.ad(key, sequence=sequence)
    return apply(AdHeard(ad, sign_ad(ad, key)), book, NOW_MS)[0]


def with_loss(book: Book, number: int, sequence: int = NOW_MS, witness: str = COORDINATOR.peer_id) -> Book:
    lost = samples.lost(samples.key(number).peer_id, sequence)
    envelope = sign_lost(lost, COORDINATOR) if witness else b""
    return apply(LostHeard(witness, lost, envelope), book, NOW_MS)[0]


def take(envelopes: tuple[bytes, ...], book: Book, now_ms: int = LATER_MS) -> tuple[Book, bool]:
    """As a node does: read each envelope, apply it, note whether anything changed."""
    changed = False
    for envelope in envelopes:
        event: AdHeard | LostHeard
        try:
            event = AdHeard(read_ad(envelope, now_ms), envelope)
        except SignatureError:
            event = LostHeard(*read_lost(envelope, now_ms), envelope)
        book, outcome = apply(event, book, now_ms)
        changed |= outcome is Outcome.CHANGED
    return book, changed


def ask(asker: Book, neighbour: Book, chance: random.Random) -> tuple[Book, int]:
    """One round of the protocol over real frames; the book of the asker and the number of answers that it took."""
    for count in range(1, 1000):
        request = FrameDecoder(ADS).feed(encode_frame(ADS, next_request(asker, chance)))
        reply = Announce(answer(next(request), neighbour, LATER_MS))
        asker, changed = take(next(FrameDecoder(ADS).feed(encode_frame(ADS, reply))).envelopes, asker)
        if not changed:
            return asker, count
    raise AssertionError("no end of it")


def same_news(left: Book, right: Book) -> bool:
    return left.entries == right.entries and left.tombstones == right.tombstones


def test_a_newcomer_learns_everything() -> None:
    book = EMPTY
    for number in range(300):
        book = with_ad(book, 100 + number)
    for number in range(40):
        book = with_loss(book, 100 + number)
    newcomer, rounds = ask(EMPTY, book, random.Random(1))
    assert same_news(newcomer, book)
    assert rounds == 4  # 40 losses and 260 ads, at most 128 in an answer, and a last one that is empty


def test_equal_books_say_nothing() -> None:
    book = with_loss(with_ad(with_ad(EMPTY, 100), 101), 101)
    assert answer(next_request(book, random.Random(1)), book, LATER_MS) == ()


def test_both_have_something_the_other_lacks() -> None:
    left = with_ad(with_ad(with_ad(EMPTY, 100, NOW_MS + 5), 101), 102)
    right = with_loss(with_ad(with_ad(EMPTY, 100), 103), 102)
    chance = random.Random(1)
    left_after, _ = ask(left, right, chance)
    right_after, _ = ask(right, left_after, chance)
    assert same_news(left_after, right_after)
    assert [len(left_after.entries), len(left_after.tombstones)] == [3, 1]


def test_a_node_that_slept_through_a_death_is_told() -> None:
    asleep = with_ad(EMPTY, 100)
    awake = with_loss(asleep, 100)
    assert not ask(asleep, awake, random.Random(1))[0].entries


def test_the_dead_are_not_brought_back_by_a_neighbour_that_missed_it() -> None:
    asleep = with_ad(EMPTY, 100)
    awake = with_loss(asleep, 100)
    assert answer(next_request(awake, random.Random(1)), asleep, LATER_MS) == ()


def test_a_stranger_is_warned_of_the_dead() -> None:
    """It never heard of the peer, but may yet be given one of its old ads."""
    grave = with_loss(with_ad(EMPTY, 100), 100)
    warned, _ = ask(EMPTY, grave, random.Random(1))
    assert not with_ad(warned, 100).entries


def test_what_a_node_saw_alone_is_its_own_affair() -> None:
    alone = with_loss(with_ad(EMPTY, 100), 100, witness="")
    assert answer(BookRequest(()), alone, LATER_MS) == ()


def test_expired_ads_and_old_notices_are_not_sent() -> None:
    book = with_loss(with_ad(with_ad(EMPTY, 100), 101), 101)
    lifetime_ms = int(limits.AD_LIFETIME_S * 1000)
    assert len(answer(BookRequest(()), book, NOW_MS + lifetime_ms - 1)) == 2
    assert answer(BookRequest(()), book, NOW_MS + lifetime_ms) == ()


def test_what_is_sent_is_believed_by_a_clock_that_differs() -> None:
    book = with_loss(with_ad(with_ad(EMPTY, 100), 101), 101)
    skew_ms, last_ms = int(limits.CLOCK_SKEW_S * 1000), NOW_MS + int(limits.AD_LIFETIME_S * 1000) - 1
    for asked_ms in (NOW_MS, last_ms):
        for clock_ms in (asked_ms - skew_ms, asked_ms + skew_ms):
            take(answer(BookRequest(()), book, asked_ms), EMPTY, clock_ms)  # raises when one is refused


def test_losses_come_first_then_the_newest_ads() -> None:
    book = EMPTY
    for number in range(200):
        book = with_ad(book, 100 + number, NOW_MS + number)
    book = with_loss(book, 100)
    sent = answer(BookRequest(()), book, LATER_MS)
    assert len(sent) == limits.BOOK_REPLY_ENVELOPES_MAX
    assert sent[0] == book.tombstones[samples.key(100).peer_id].envelope
    assert [read_ad(e, LATER_MS).sequence - NOW_MS for e in sent[1:]] == list(range(199, 72, -1))


def test_an_answer_fits_into_a_frame_however_large_the_ads_are() -> None:
    book = EMPTY
    offers = tuple(samples.offer(name=f"cargo-{n}-" + "n" * 60) for n in range(60))
    for number in range(40):
        key = samples.key(100 + number)
        ad = samples.ad(key, offers=offers)
        book, _ = apply(AdHeard(ad, sign_ad(ad, key)), book, NOW_MS)
    sent = answer(BookRequest(()), book, LATER_MS)
    assert 1 < len(sent) < 40
    encode_frame(ADS, Announce(sent))
    newcomer, _ = ask(EMPTY, book, random.Random(1))
    assert same_news(newcomer, book)


def test_a_large_book_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges cover every id, so whatever the asker lacks is found after a few draws."""
    monkeypatch.setattr(limits, "BOOK_REQUEST_PEERS_MAX", 16)
    full = EMPTY
    for number in range(120):
        full = with_ad(full, 100 + number)
    asker = replace(full, entries={p: e for n, (p, e) in enumerate(sorted(full.entries.items())) if n % 5})
    chance, rounds = random.Random(3), 0
    while not same_news(asker, full):
        assert len(next_request(asker, chance).known) <= 16
        asker, _ = ask(asker, full, chance)
        rounds += 1
    assert 3 < rounds < 60
    parts = {(r.after, r.until): r for r in (next_request(full, chance) for _ in range(200))}
    ends = sorted(parts, key=lambda part: part[0])
    assert ends[0][0] == "" and ends[-1][1] == "" and len(ends) == 8
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ends)), "no gap between two parts"


def test_the_request_is_a_function_of_book_and_chance() -> None:
    book = with_ad(with_ad(EMPTY, 100), 101)
    assert next_request(book, random.Random(1)) == next_request(book, random.Random(1))


def test_a_neighbour_that_repeats_itself_gets_no_second_round() -> None:
    stale = with_ad(EMPTY, 100)
    current = with_ad(EMPTY, 100, NOW_MS + 1)
    reply = answer(BookRequest(()), stale, LATER_MS)
    assert reply and take(reply, current) == (current, False)


def test_a_request_checks_itself() -> None:
    low, high = sorted(samples.key(n).peer_id for n in (100, 101))
    BookRequest((Known(low, 1), Known(high, 1)), "", high)
    for known, after, until in (
        ((Known(high, 1), Known(low, 1)), "", ""),
        ((Known(low, 1), Known(low, 2)), "", ""),
        ((Known(low, 1),), low, ""),
        ((Known(high, 1),), "", low),
        ((), "not a peer id", ""),
        ((Known(low, 1),) * 513, "", ""),
    ):
        with pytest.raises(ValueError):
            BookRequest(known, after, until)
    for peer, sequence in (("nobody", 1), (low, 0), (low, 2**53 + 1)):
        with pytest.raises(ValueError):
            Known(peer, sequence)
