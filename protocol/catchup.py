"""Catching up: how two neighbours find out what one of them has missed.

Gossip brings news fast but not surely: a node that was cut off, or has just come, has missed some. So every CATCHUP_INTERVAL_S each
node sends one neighbour, chosen at random, a ``BookRequest`` with what it knows, and gets back an ``Announce`` with what is newer:
ads, and notices of loss, without which a node that slept through an Island's death would keep it until its ad expires.

A book that is larger than BOOK_REQUEST_PEERS_MAX is compared a part at a time: peer ids are sorted, cut into blocks, and one block
is drawn; the ranges of all blocks together cover every possible id, so a peer that the asker never heard of falls into one of them.

An answer is bounded (BOOK_REPLY_ENVELOPES_MAX, BOOK_REPLY_BYTES_MAX). The asker asks the same neighbour again at once while the
answers change its book, and stops when one does not; a neighbour that sends the same things for ever therefore gets no second round.

    ask:     request = next_request(book, chance)
    answer:  Announce(answer(request, book, now_ms))
    take in: every envelope as if gossip had brought it; ask again if any of them changed the book
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from protocol import limits
from protocol.book import Book
from protocol.messages import BookRequest, Known


def next_request(book: Book, chance: Random) -> BookRequest:
    """What to ask the next neighbour: all of a small book, one random part of a large one."""
    known = sorted(_known(book), key=lambda item: item.peer)
    size = limits.BOOK_REQUEST_PEERS_MAX
    start = chance.randrange(0, max(1, len(known)), size)
    part = known[start : start + size]
    after = known[start - 1].peer if start else ""
    until = part[-1].peer if start + size < len(known) else ""
    return BookRequest(tuple(part), after, until)


def answer(request: BookRequest, book: Book, now_ms: int) -> tuple[bytes, ...]:
    """Envelopes for an ``Announce``: losses first, for they are small and urgent, then ads, the newest first."""
    known = {item.peer: (item.sequence, item.lost) for item in request.known}
    return _bounded([*_losses(request, book, known, now_ms), *_ads(request, book, known, now_ms)])


def _known(book: Book) -> Iterable[Known]:
    """A peer stands in the entries or in the tombstones, never in both."""
    for peer, entry in book.entries.items():
        yield Known(peer, entry.ad.sequence)
    for peer, stone in book.tombstones.items():
        yield Known(peer, stone.sequence, lost=True)


def _wanted(request: BookRequest, peer: str) -> bool:
    return request.after < peer and (not request.until or peer <= request.until)


def _losses(request: BookRequest, book: Book, known: dict[str, tuple[int, bool]], now_ms: int) -> list[bytes]:
    # Notices that have reached the age at which a peer with another clock may refuse them are not worth sending.
    worth_ms = now_ms + 2 * limits.CLOCK_SKEW_S * 1000
    return [
        stone.envelope
        for peer, stone in book.tombstones.items()
        if stone.envelope
        and stone.until_ms > worth_ms
        and _wanted(request, peer)
        and (stone.sequence, True) > known.get(peer, (0, False))
    ]


def _ads(request: BookRequest, book: Book, known: dict[str, tuple[int, bool]], now_ms: int) -> list[bytes]:
    newer = [
        (entry.ad.sequence, entry.envelope)
        for peer, entry in book.entries.items()
        if entry.ad.expires_at_ms > now_ms
        and _wanted(request, peer)
        and (entry.ad.sequence, False) > known.get(peer, (0, False))
    ]
    return [envelope for _, envelope in sorted(newer, reverse=True)]


def _bounded(envelopes: list[bytes]) -> tuple[bytes, ...]:
    """As many from the front as one answer may carry."""
    size, count = 0, 0
    for envelope in envelopes[: limits.BOOK_REPLY_ENVELOPES_MAX]:
        size += len(envelope)
        if size > limits.BOOK_REPLY_BYTES_MAX:
            break
        count += 1
    return tuple(envelopes[:count])
