"""Random changes, with seeds: the books against their shadow, what always holds, and saying everything again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from coordinator.books.errors import BooksRefused
from coordinator.books.jobs import JOBS
from coordinator.books.ledger import HOLDS
from tests.coordinator.books.book_operations import operation_of, told
from tests.coordinator.books.plain_books import PlainBooks, check_books
from tests.coordinator.books.shadow import COLUMNS, Answer, Shadow, Tables, with_balances
from tests.coordinator.books.workload import DAY_MS, START_MS, UNIT_MS, Scale, Unit, make_units

SCALE = Scale(accounts=40, units=3000)
SEEDS = range(4)
# Verbs that only set something: the one who speaks last is right, so saying an earlier one again may change it back.
SETTING = {"pair", "unpair", "approve", "publish", "limit"}
# Verbs that, once they have succeeded, succeed for ever.
LASTING = {"create", "grant", "move", "hold", "post", "release", "refund", "empty", "open", "settle", "cancel"}


def answer(books: PlainBooks, unit: Unit) -> Answer:
    try:
        return ["ok", *(told(result) for result in books.do_all(*(operation_of(command) for command in unit)))]
    except BooksRefused as refused:
        return ["no", refused.why.value]


def tables(books: PlainBooks) -> Tables:
    found: Tables = {name: {} for name in COLUMNS}
    for (table, key), row in books.everything().items():
        if table == "ab_units":
            continue  # which the audit compares with the jobs
        found[table][key] = tuple(getattr(row, column) for column in COLUMNS[table])
    return with_balances(found)


def clock(number: int) -> int:
    """Goes on by a minute a unit, and is now and then days ahead or behind for a moment."""
    jumps = {7: 3, 11: -2, 13: 400} if number % 100 > 50 else {}
    return START_MS + number * UNIT_MS * 10 + jumps.get(number % 50, 0) * DAY_MS


@pytest.mark.parametrize("seed", SEEDS)
def test_the_books_do_what_their_shadow_foretells(seed: int) -> None:
    books, shadow = PlainBooks(), Shadow()
    answers: Counter[str] = Counter()
    for number, unit in enumerate(make_units(seed, SCALE)):
        books.now_ms = clock(number)
        expected = shadow.apply(unit, books.now_ms)
        assert answer(books, unit) == expected, (number, unit)
        answers[expected[0] if expected[0] == "ok" else expected[1]] += 1
        if number % 250 == 0:
            check_books(books)
    assert tables(books) == with_balances(shadow.tables)
    check_books(books)
    assert answers["ok"] > SCALE.units // 2
    assert len(answers) > 10, "refusals of nearly every kind"


@pytest.mark.parametrize("seed", SEEDS)
def test_saying_what_succeeded_again_changes_nothing(seed: int) -> None:
    """Any number of the last units, in their order: whoever does not know what became of them says them again."""
    books = PlainBooks()
    done: list[tuple[int, Unit]] = []
    for number, unit in enumerate(make_units(seed, SCALE)):
        books.now_ms = clock(number)
        if _has_happened(unit, answer(books, unit)):
            done.append((books.now_ms, unit))
        if number % 500 == 499:
            _say_again(books, done)
            _say_again(books, done[-100:])


def _has_happened(unit: Unit, its: Answer) -> bool:
    """It has changed something under its id: not only found that there was nothing to do, or another job under its key."""
    if its[0] == "no" or any(command.verb in SETTING for command in unit):
        return False
    return all(told_ != [0] for told_ in its[1:]) and (unit[0].verb != "open" or its[1][0] == unit[0].args["id"])


def _say_again(books: PlainBooks, done: list[tuple[int, Unit]]) -> None:
    before = books.everything()
    for at_ms, unit in done:
        books.now_ms = at_ms
        again = answer(books, unit)
        assert again[0] == "ok" or len(unit) > 1 or unit[0].verb not in LASTING, (unit, again)
    assert books.everything() == before


@pytest.mark.parametrize("seed", SEEDS)
def test_a_unit_that_is_undone_was_never_there(seed: int) -> None:
    """Of the shadow itself: the soak takes back what a crash took back."""
    shadow = Shadow()
    for number, unit in enumerate(make_units(seed, SCALE)[:1500]):
        shadow.apply(unit, clock(number))
        if number == 1000:
            before = {name: dict(rows) for name, rows in shadow.tables.items()}
            shadow.forget()
    assert shadow.tables != before
    shadow.undo(0)
    assert shadow.tables == before


def test_a_seed_gives_the_same_units() -> None:
    assert make_units(7, SCALE) == make_units(7, SCALE) != make_units(8, SCALE)


def test_the_units_reach_every_part_of_the_books() -> None:
    books, verbs = PlainBooks(), Counter[str]()
    for number, unit in enumerate(make_units(1, SCALE)):
        books.now_ms = clock(number)
        if answer(books, unit)[0] == "ok":
            verbs.update(command.verb for command in unit)
    found: dict[str, Any] = tables(books)
    assert len(verbs) == 19 and min(verbs.values()) > 5, verbs
    assert all(found.values()), "rows in every table"
    kinds = Counter(row[4] for row in found["transfers"].values())
    assert set(kinds) == {"grant", "refill", "charge", "refund", "escrow", "transfer"}, kinds
    assert any(id.endswith(":refund:loss") for id in found["transfers"])
    assert len({hold.state for hold in books.all_of(HOLDS)}) == 3
    assert {job.state.value for job in books.all_of(JOBS)} >= {"submitted", "running", "succeeded", "failed", "cancelled"}
