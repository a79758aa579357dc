"""Whose books a database holds, and which run of which Coordinator keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from coordinator.books.database import Database
from coordinator.books.presence import (
    Superseded,
    beat,
    claim_books,
    enter,
    leave,
    live_coordinators,
    salt_print,
    seen_at_ms,
)
from protocol.errors import ConfigError

NETWORK, OTHER_NETWORK = "a" * 32, "b" * 32
SALT = bytes(32)


@pytest.fixture
def books(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as database:
        yield database


def claim(books: Database, network: str = NETWORK, salt: bytes = SALT) -> None:
    with books.writing() as connection:
        claim_books(connection, network, salt_print(salt))


def test_books_are_of_the_network_that_claimed_them_first(books: Database) -> None:
    claim(books)
    claim(books)  # every start of a Coordinator does
    with pytest.raises(ConfigError, match=f"of network {NETWORK}, and this Coordinator is of {OTHER_NETWORK}"):
        claim(books, OTHER_NETWORK)
    with pytest.raises(ConfigError, match=r"another salt\.key"):
        claim(books, salt=bytes([1]) * 32)
    claim(books)  # who was refused has changed nothing


def test_the_print_of_a_secret_says_nothing_about_it() -> None:
    prints = {salt_print(bytes([number]) * 32) for number in range(100)}
    assert len(prints) == 100 and all(len(each) == 32 for each in prints)
    assert SALT.hex()[:8] not in salt_print(SALT)


def test_each_run_has_a_greater_number_whatever_the_clock_says(books: Database) -> None:
    with books.writing() as connection:
        first = enter(connection, "peer", 1000)
        second = enter(connection, "peer", 500)  # the clock was put back
        third = enter(connection, "peer", 2000)
    assert (first, second, third) == (1000, 1001, 2000)


def test_a_newer_run_puts_an_older_one_out(books: Database) -> None:
    with books.writing() as connection:
        old = enter(connection, "peer", 1000)
        beat(connection, "peer", old, "http://old", 1500)
        new = enter(connection, "peer", 2000)
        with pytest.raises(Superseded, match="a data folder of its own"):
            beat(connection, "peer", old, "http://old", 2500)
        beat(connection, "peer", new, "http://new", 3000)
        assert live_coordinators(connection, 3000) == {"peer": new}


def test_who_says_nothing_or_goodbye_does_not_live(books: Database) -> None:
    with books.writing() as connection:
        for peer, now_ms in (("silent", 1000), ("left", 5000), ("alive", 5000)):
            beat(connection, peer, enter(connection, peer, 100), "", now_ms)
        leave(connection, "left", 100)
        leave(connection, "alive", 99)  # an earlier run's goodbye comes too late to count
        assert live_coordinators(connection, 4000) == {"alive": 100}
        assert [seen_at_ms(connection, peer) for peer in ("silent", "left", "alive", "unknown")] == [1000, 0, 5000, 0]


def test_a_beat_comes_back_after_the_books_were_restored_from_before_the_run(books: Database) -> None:
    with books.writing() as connection:
        beat(connection, "peer", 1000, "http://here", 2000)
        assert live_coordinators(connection, 2000) == {"peer": 1000}
