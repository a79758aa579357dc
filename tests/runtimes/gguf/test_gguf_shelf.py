"""Prefixes outside the cells: whose they are, which one is found, which ones go first."""

from __future__ import annotations

import numpy as np

from runtimes.gguf.kv import Ints
from runtimes.gguf.shelf import TOKENS_MIN, Shelf, State

SALT, OTHER = b"account one", b"account two"


def tokens(*values: int) -> Ints:
    """TOKENS_MIN equal ones, then these."""
    return np.array([7] * TOKENS_MIN + list(values), np.int32)


def state(size: int) -> State:
    return np.zeros(size, np.uint8)


def test_the_longest_beginning_under_the_same_salt_is_found() -> None:
    shelf = Shelf(1000)
    shelf.put(SALT, tokens(1, 2, 3), state(10))
    shelf.put(SALT, tokens(1, 2, 4, 5), state(11))
    shelf.put(OTHER, tokens(1, 2, 4, 5, 6), state(12))
    found = shelf.find(SALT, tokens(1, 2, 4, 9))
    assert found is not None and len(found[0].state) == 11 and found[1] == TOKENS_MIN + 3
    assert shelf.find(b"", tokens(1, 2, 3)) is None and shelf.find(b"third", tokens(1, 2, 3)) is None
    assert shelf.find(SALT, np.array([8] * 50, np.int32)) is None


def test_what_is_worth_keeping() -> None:
    shelf = Shelf(1000)
    assert shelf.wants(SALT, tokens()) and not shelf.wants(b"", tokens())
    assert not shelf.wants(SALT, tokens()[:-1]), "a few tokens are computed as fast"
    assert not Shelf(0).wants(SALT, tokens())
    shelf.put(SALT, tokens(1, 2), state(10))
    assert not shelf.wants(SALT, tokens(1)) and not shelf.wants(SALT, tokens(1, 2)) and shelf.wants(SALT, tokens(1, 2, 3))


def test_a_longer_one_takes_the_place_of_its_beginning() -> None:
    shelf = Shelf(1000)
    shelf.put(SALT, tokens(1), state(10))
    shelf.put(OTHER, tokens(1), state(10))
    shelf.put(SALT, tokens(1, 2), state(20))
    assert shelf.statistics().entries == 2 and shelf.statistics().bytes == 30


def test_the_least_recently_used_goes_first_and_the_bound_holds() -> None:
    shelf = Shelf(30)
    for value in (1, 2, 3):
        shelf.put(SALT, tokens(value), state(10))
    found = shelf.find(SALT, tokens(1))
    assert found is not None
    shelf.taken(found[0])
    shelf.put(SALT, tokens(4), state(15))
    kept = [value for value in (1, 2, 3, 4) if (hit := shelf.find(SALT, tokens(value))) and hit[1] > TOKENS_MIN]
    assert kept == [1, 4] and shelf.statistics().bytes == 25
    shelf.put(SALT, tokens(5), state(31))
    assert shelf.statistics().entries == 2, "what does not fit at all pushes nothing out"
    assert shelf.statistics().found_total == 1


def test_what_was_pushed_out_since_it_was_found_can_still_be_used() -> None:
    """Making room for a job puts other prefixes on the shelf before the job's own is taken from it."""
    shelf = Shelf(10)
    shelf.put(SALT, tokens(1), state(10))
    found = shelf.find(SALT, tokens(1))
    assert found is not None
    shelf.put(OTHER, tokens(2), state(10))
    shelf.taken(found[0])
    assert len(found[0].state) == 10 and shelf.statistics().found_total == 1
