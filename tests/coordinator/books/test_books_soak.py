"""Thousands of random changes by a process that is killed again and again, on both databases, against a shadow: no difference.

With the counts of the bar (`make soak`): 1,000 accounts and 200,000 changes. Otherwise the same with fewer.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from coordinator.books.database import sqlite_url
from tests.coordinator.books.shadow import Tables
from tests.coordinator.books.soak_parent import Difference, Plan, Soak
from tests.coordinator.books.torn import commit_ends, tear
from tests.coordinator.books.workload import Scale
from tests.postgres import PostgresServer, require_server

SEED = 4
# No other transactions than ours: ids of those that a crash took back are given out again, and must not go to an autovacuum.
# To flush the file system as a whole before a recovery, and not file by file, takes 0.2 s instead of 3.
_SERVER = {"autovacuum": "off", "recovery_init_sync_method": "syncfs"}


class Place(NamedTuple):
    url: str
    folder: Path
    server: PostgresServer | None


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    require_server()
    with PostgresServer(_SERVER) as server:
        server.start()
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield Place(sqlite_url(tmp_path), tmp_path, None)
        return
    server: PostgresServer = request.getfixturevalue("own_server")
    url = server.new_database()
    yield Place(url, tmp_path, server)
    server.drop(url)


@pytest.fixture
def sqlite(tmp_path: Path) -> Place:
    return Place(sqlite_url(tmp_path), tmp_path, None)


def soak_of(place: Place, scale: Scale, threads: int) -> Soak:
    return Soak(place.url, place.folder, SEED, scale, threads, place.server)


# Statements of a group, by their first words. A child may die before and after each.
STATEMENTS = (
    "SELECT balances",
    "SELECT transfers",
    "INSERT INTO balances",
    "INSERT INTO holds",
    "INSERT INTO jobs",
    "INSERT INTO receipts",
    "INSERT INTO transfers",
    "UPDATE balances SET",
    "UPDATE holds SET",
    "UPDATE islands SET",
    "UPDATE jobs SET",
    "COMMIT",
)


def plans(scale: Scale, points: int, kills: int, by_server: bool) -> Iterator[tuple[Plan, int]]:
    """What becomes of each child, and how many torn copies are looked at afterwards. Endless: the last kind is repeated.

    A child dies at each statement once, and at each of so many write points by number: all that a group has. Its first groups say again
    what the last child was not told of, and may change nothing.
    """
    rng = random.Random(SEED)
    share = max(30, (scale.units - scale.accounts) // (2 * len(STATEMENTS) + points + 4 * kills))
    yield Plan(scale.accounts + 5 * share), 0
    for where in (f"{when} {statement}" for statement in STATEMENTS for when in ("before", "after")):
        yield Plan(5 * share, die_after_commits=rng.randint(2, 3), die_at_point=1, die_where=where), 1
    for point in range(1, points + 1):
        yield Plan(2 * share, die_after_commits=rng.randint(0, 1 + share // 64), die_at_point=point), 1
    for _ in range(kills):
        yield Plan(5 * share, die_after_commits=3, die_at_point=1, die_where="before COMMIT"), 1
        yield Plan(5 * share, die_after_commits=3, die_at_point=1, die_where="after COMMIT"), 3
        yield Plan(2 * share, kill_after=rng.randint(1, share)), 1
        if by_server:
            yield Plan(2 * share, kill_server_after=rng.randint(1, share)), 0
            yield Plan(2 * share, kill_after=share, kill_server_after=rng.randint(share // 2, share)), 0
    while True:
        yield Plan(4 * share, kill_after=rng.randint(share, 2 * share)), 1


def soak(place: Place, scale: Scale, threads: int, points: int, kills: int, record: Callable[[str, object], None]) -> None:
    with soak_of(place, scale, threads) as soak:
        for plan, torn in plans(scale, points, kills, place.server is not None):
            soak.run(plan)
            soak.compare(torn)
            if soak.is_done:
                break
    for name, count in sorted(soak.counts.items()):
        record(name, count)
    record("points", len(soak.points))
    assert {f"{when} {statement}" for statement in STATEMENTS for when in ("before", "after")} <= set(soak.points)
    assert soak.counts["killed"] >= 2 * len(STATEMENTS) + points + kills
    assert soak.counts["largest group"] > 1
    assert soak.counts["not told, and there"] and soak.counts["not told, and not there"]
    if place.server is not None:
        assert soak.counts["server killed"] >= kills
    else:
        assert any(soak.counts[f"{way}: lost"] for way in ("cut", "zeros", "noise", "sectors", "bit"))


def test_no_crash_makes_a_difference(place: Place, record_property: Callable[[str, object], None]) -> None:
    soak(place, Scale(accounts=60, units=1_500), threads=16, points=0, kills=2, record=record_property)


@pytest.mark.soak
def test_no_crash_makes_a_difference_with_the_counts_of_the_bar(
    place: Place, record_property: Callable[[str, object], None]
) -> None:
    soak(place, Scale(accounts=1_000, units=200_000), threads=64, points=150, kills=25, record=record_property)


def make_and_kill(place: Place, step: int) -> None:
    """The opening of an empty database, killed at every ``step``-th write point, until there are no more."""
    point = 1
    with soak_of(place, Scale(accounts=5, units=30), threads=2) as soak:
        while soak.run(Plan(0, die_after_commits=-1, die_at_point=point)):
            point += step
        assert soak.counts["killed"] >= 5
        soak.run(Plan(30))
        assert soak.is_done
        soak.compare()


def test_a_database_whose_making_is_killed_is_made(place: Place) -> None:
    make_and_kill(place, step=17)


@pytest.mark.soak
def test_a_database_whose_making_is_killed_at_every_point_is_made(place: Place) -> None:
    make_and_kill(place, step=1)


# The soak itself: it can fail


def test_a_change_that_nobody_made_is_found(sqlite: Place) -> None:
    with soak_of(sqlite, Scale(accounts=5, units=60), threads=2) as soak:
        soak.run(Plan(60))
        soak.compare()
        with sqlite3.connect(sqlite.folder / "coordinator.db") as connection:
            connection.execute("UPDATE accounts SET rate_limit_per_minute = 77 WHERE name = 'a1'")
        connection.close()
        with pytest.raises(Difference, match=", 77, "):
            soak.compare()


def test_a_loss_of_what_was_told_is_found(sqlite: Place) -> None:
    log = sqlite.folder / "coordinator.db-wal"
    with soak_of(sqlite, Scale(accounts=20, units=40), threads=1) as soak:
        assert soak.run(Plan(40, die_after_commits=20, die_at_point=1))
        soak.compare(torn=5)
        ends = commit_ends(log.read_bytes())
        log.write_bytes(log.read_bytes()[: ends[-1] - 1])
        with pytest.raises(Difference, match="None instead of"):
            soak.compare()


def test_a_change_that_happens_twice_is_found(sqlite: Place) -> None:
    """A child that is told to begin anew finds its accounts there, which its shadow does not expect."""
    scale = Scale(accounts=5, units=200)
    with soak_of(sqlite, scale, threads=2) as soak:
        soak.run(Plan(200))
    with soak_of(sqlite, scale, threads=2) as soak, pytest.raises(Difference, match="the shadow says"):
        soak.run(Plan(200))


@pytest.fixture
def log_of_ten(tmp_path: Path) -> Path:
    """A database with ten commits of a row each in its log, as a killed process leaves it."""
    live, dead = tmp_path / "live.db", tmp_path / "dead.db"
    connection = sqlite3.connect(live, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE numbers (n INTEGER, filling TEXT)")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(10):
        connection.execute("INSERT INTO numbers VALUES (?, ?)", (number, "x" * 900 * number))
    for end in ("", "-wal"):
        Path(f"{dead}{end}").write_bytes(Path(f"{live}{end}").read_bytes())
    connection.close()
    return dead


def _rows(database: Path) -> int:
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return int(connection.execute("SELECT count(*) FROM numbers").fetchone()[0])
    finally:
        connection.close()


def test_the_ends_of_commits_are_where_sqlite_sees_them(log_of_ten: Path) -> None:
    file, log = Path(f"{log_of_ten}-wal"), Path(f"{log_of_ten}-wal").read_bytes()
    whole = log_of_ten.read_bytes()
    ends = commit_ends(log)
    assert len(ends) == 10 and ends[-1] == len(log)
    for number, end in enumerate(ends):
        for at, rows in ((end, number + 1), (end - 1, number)):
            log_of_ten.write_bytes(whole)
            file.write_bytes(log[:at])
            Path(f"{log_of_ten}-shm").unlink(missing_ok=True)
            assert commit_ends(log[:at]) == ends[:rows]
            assert _rows(log_of_ten) == rows


@pytest.mark.parametrize("may_lose_last", [False, True])
def test_what_is_torn_is_only_what_may_be(log_of_ten: Path, may_lose_last: bool) -> None:
    file, log = Path(f"{log_of_ten}-wal"), Path(f"{log_of_ten}-wal").read_bytes()
    whole = log_of_ten.read_bytes()
    found: dict[str, set[int]] = {}
    rng = random.Random(SEED)
    for _ in range(150):
        log_of_ten.write_bytes(whole)
        file.write_bytes(log)
        Path(f"{log_of_ten}-shm").unlink(missing_ok=True)
        found.setdefault(tear(log_of_ten, rng, may_lose_last), set()).add(_rows(log_of_ten))
    assert len(found) == 7
    assert set.union(*found.values()) == ({9, 10} if may_lose_last else {10})
    assert found["pages"] == {10}


def test_the_tables_of_the_shadow_are_those_of_the_books(sqlite: Place) -> None:
    with soak_of(sqlite, Scale(accounts=20, units=1_500), threads=4) as soak:
        soak.run(Plan(1_500))
        soak.compare()
        tables: Tables = soak._shadow.tables
    assert all(tables.values()), {name: len(rows) for name, rows in tables.items()}
