"""Counters of A/B tests: what counts, that they equal a recount of the jobs, and that no kill takes anything from them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sql

from coordinator.abtests.plan import Metric
from coordinator.books import ab_tests, schema
from coordinator.books.ab_units import (
    CACHE_SOURCE,
    GIVEN_UP,
    SAYS_NOTHING,
    SAYS_NOTHING_UNPLACED,
    AbUnit,
    AddCached,
    added,
    counts,
    is_abandoned,
    speed_milli,
)
from coordinator.books.accounts import CreateAccount
from coordinator.books.audit import audit
from coordinator.books.database import Database
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import Adopt, Job, JobState, OpenJob, Outcome, Placed, RecordJob, SettleJob, WantCancel
from coordinator.books.ratings import RateJob
from coordinator.books.stored import apply_together
from coordinator.books.writer import Writer
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask

ACCOUNT, OWNER = "ann", "me"
FOREVER_MS = 2**52
PLACED = Placed("island", "eu", Ask())


def job(id: str, unit: str = "u1", arm: str = "new", **more: Any) -> Job:
    values = {"ab_test": "t1", "ab_arm": arm, "ab_unit": unit, **more}
    return Job(id, ACCOUNT, "talk", "chat", JobState.SUBMITTED, 0, 1000, "market", OWNER, 1, 1, **values)


def settled(one: Job, state: JobState = JobState.SUCCEEDED, **more: Any) -> SettleJob:
    outcome = Outcome(state, **{"completion_tokens": 11, "latency_us": 600_000, "first_word_us": 100_000, **more})
    return SettleJob(one.id, ACCOUNT, "talk", OWNER, 1, outcome, unit=f"{one.ab_test}/{one.ab_arm}/{one.ab_unit}" if one.ab_test else "")


def apply(database: Database, *operations: Any) -> list[Any]:
    with database.writing() as connection:
        return apply_together(connection, operations, 1000)


def same(database: Database, test: str = "t1") -> dict[str, AbUnit]:
    """The counters, which equal a recount but for what came from the cache; the audit says so too."""
    with database.reading() as connection:
        counted, again = ab_tests.counted(connection, test), ab_tests.recount(connection, test)
    assert {id: replace(unit, cached=0) for id, unit in counted.items() if id in again or not unit.cached} == again
    with database.snapshot() as connection:
        assert audit(connection) == []
    return counted


@pytest.fixture
def database(database_url: str) -> Any:
    database = Database(database_url)
    apply(database, CreateAccount(ACCOUNT))
    yield database
    database.close()


def run(database: Database, one: Job, state: JobState = JobState.SUCCEEDED, **more: Any) -> None:
    apply(database, OpenJob(one, FOREVER_MS))
    apply(database, settled(one, state, **more))


def test_jobs_are_counted_once_where_they_are_settled(database: Database) -> None:
    run(database, job("1"))
    run(database, job("2"), latency_us=1_600_000)
    run(database, job("3"), JobState.FAILED, error_code="cargo_failed")
    apply(database, settled(job("1")))  # said again
    (unit,) = same(database).values()
    assert (unit.jobs, unit.succeeded, unit.tokens, unit.latency_us, unit.first_word_us) == (3, 2, 22, 2_200_000, 200_000)
    assert (unit.speeds, unit.speed_milli) == (2, 20_000 + 6_666)


def test_a_job_that_opens_and_settles_in_one_change_counts(database: Database) -> None:
    one = job("1")
    apply(database, OpenJob(one, FOREVER_MS), settled(one))
    assert next(iter(same(database).values())).jobs == 1


# What a version can be at fault for; of every other code somebody has decided that it cannot.
OF_THE_VERSION = {Code.WORKER_DIED, Code.LINK_LOST, Code.LEASE_LOST, Code.TIMEOUT, Code.CARGO_FAILED, Code.INTERNAL}


def test_each_code_speaks_of_the_version_or_does_not() -> None:
    assert set(map(str, Code)) == set(map(str, OF_THE_VERSION)) | (SAYS_NOTHING & set(map(str, Code))) | SAYS_NOTHING_UNPLACED
    assert not {str(code) for code in OF_THE_VERSION} & (SAYS_NOTHING | SAYS_NOTHING_UNPLACED)
    for code in (*Code, *SAYS_NOTHING):
        for island in ("", "island"):
            failed = replace(job("1"), state=JobState.FAILED, error_code=str(code), island=island)
            assert counts(failed) == (code in OF_THE_VERSION or (code == Code.NO_ISLAND and island != ""))


def test_the_audit_counts_as_the_books_do(database: Database) -> None:
    """Every end that a job may have; one unit each, so that no two mistakes cancel out."""
    codes = ("", *sorted({*map(str, Code), *SAYS_NOTHING}))
    ends = itertools.product((JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED), codes, (None, PLACED), (1, 2))
    operations: list[Any] = []
    for number, (state, code, placed, tries) in enumerate(ends):
        one = job(str(number), f"u{number}", tries=tries)
        operations += [OpenJob(one, FOREVER_MS), settled(one, state, error_code=code, placed=placed)]
    apply(database, *operations)
    units = same(database).values()
    assert len(units) == len(operations) / 2
    assert (sum(unit.succeeded for unit in units), sum(unit.abandoned for unit in units)) == (2 * len(codes), 1)
    assert sum(unit.jobs - unit.succeeded for unit in units) == 2 * (1 + len(OF_THE_VERSION)) + 1, "the empty code is one, too"


@pytest.mark.parametrize("code", sorted(SAYS_NOTHING))
def test_what_is_not_the_versions_fault_does_not_count(database: Database, code: str) -> None:
    run(database, job("1"), JobState.FAILED, error_code=code, placed=PLACED)
    run(database, job("2"), JobState.CANCELLED)
    (unit,) = same(database).values()
    assert unit == AbUnit("t1/new/u1", "t1", "new", "u1"), "but that the unit was given this arm"
    with database.reading() as connection:
        assert ab_tests.counts_of(connection, "t1")["new"].units == 1


def test_a_version_that_leaves_no_island_is_at_fault(database: Database) -> None:
    """One Island has it, its worker dies, and nobody is left: that is no absence."""
    run(database, job("1"), JobState.FAILED, error_code="no_island")
    assert [unit.jobs for unit in same(database).values()] == [0], "nobody has tried it"
    for number, code in enumerate(("no_island", *sorted(OF_THE_VERSION))):
        run(database, job(f"broken {number}"), JobState.FAILED, error_code=str(code), placed=PLACED)
    assert [(unit.jobs, unit.succeeded) for unit in same(database).values()] == [(1 + len(OF_THE_VERSION), 0)]


def test_jobs_that_consumers_give_up_are_counted_beside_the_others(database: Database) -> None:
    for number in range(3):
        run(database, job(f"given up {number}"), JobState.CANCELLED, error_code=GIVEN_UP, placed=PLACED)
    run(database, job("waits for an Island"), JobState.CANCELLED, error_code=GIVEN_UP)
    run(database, job("we went down"), JobState.CANCELLED, error_code="coordinator_lost", placed=PLACED)
    run(database, job("all"))
    run(database, job("failed"), JobState.FAILED, error_code="cargo_failed", placed=PLACED)
    run(database, job("hangs", "u2"), JobState.CANCELLED, error_code=GIVEN_UP, placed=PLACED)
    units = same(database)
    assert {unit.unit: (unit.jobs, unit.abandoned) for unit in units.values()} == {"u1": (2, 3), "u2": (0, 1)}
    with database.reading() as connection:
        tally = ab_tests.counts_of(connection, "t1")["new"].tally(Metric.ABANDONED)
    assert (tally.units, tally.count, tally.total) == (2, 6, 4), "also of a unit that has seen nothing else"
    assert (tally.total_squares, tally.count_squares, tally.cross) == (10, 26, 16)


@pytest.mark.parametrize("code", ["expired", "coordinator_lost", "books_unavailable"])
def test_a_unit_is_known_that_has_nothing_else(database: Database, code: str) -> None:
    run(database, job("1"), JobState.FAILED, error_code=code)
    with database.writing() as connection:
        connection.execute(schema.ab_units.delete())
    with database.snapshot() as connection:
        assert audit(connection) == ["job 1 of an A/B test has ended, and its unit t1/new/u1 is not known"]


@pytest.mark.parametrize("change", [{"jobs": 2}, {"abandoned": 1}, {"tokens": 12}])
def test_the_audit_sees_what_does_not_add_up(database: Database, change: dict[str, int]) -> None:
    run(database, job("1"))
    with database.writing() as connection:
        connection.execute(schema.ab_units.update().values(**change))
    with database.snapshot() as connection:
        (complaint,) = audit(connection)
    assert "t1/new/u1" in complaint


def test_a_job_that_its_coordinator_left_does_not_count_until_it_is_done(database: Database) -> None:
    apply(database, OpenJob(job("1"), FOREVER_MS), OpenJob(job("2", can_rerun=True), FOREVER_MS))
    lost, again = (apply(database, Adopt(id, ACCOUNT, OWNER, 1, "other", 2))[0] for id in "12")
    assert (lost.error_code, again.state) == ("coordinator_lost", JobState.SUBMITTED)
    bare = AbUnit("t1/new/u1", "t1", "new", "u1")
    assert same(database) == {bare.id: bare}
    apply(database, replace(settled(job("2")), owner="other", owner_boot=2))
    assert same(database) == {bare.id: bare}, "its times are of the second try"
    apply(database, RateJob("2", ACCOUNT, 1))
    assert same(database) == {bare.id: bare}, "and so is what its Consumer thinks of it"


def test_who_gives_up_on_a_job_whose_coordinator_is_gone_does_not_give_up_on_the_version(database: Database) -> None:
    apply(database, OpenJob(job("1", can_rerun=True, island="island"), FOREVER_MS), WantCancel("1", ACCOUNT))
    (ended,) = apply(database, Adopt("1", ACCOUNT, OWNER, 1, "other", 2))
    assert ended.state is JobState.CANCELLED and ended.island and not is_abandoned(ended)
    assert [(unit.jobs, unit.abandoned) for unit in same(database).values()] == [(0, 0)]


def test_jobs_of_no_test_count_nowhere(database: Database) -> None:
    plain = job("1", ab_test="", ab_arm="")
    run(database, plain)
    with database.reading() as connection:
        assert ab_tests.counted(connection, "") == {}


def test_answers_from_the_cache_are_counted_apart(database: Database) -> None:
    run(database, job("1"))
    hit = replace(job("2"), bid_source=CACHE_SOURCE, state=JobState.SUCCEEDED)
    apply(database, RecordJob(hit))
    apply(database, AddCached("t1", "new", "u1", 3), AddCached("t1", "new", "u2", 1))
    units = same(database)
    assert {unit.unit: (unit.jobs, unit.cached) for unit in units.values()} == {"u1": (1, 3), "u2": (0, 1)}
    with database.reading() as connection:
        counts = ab_tests.counts_of(connection, "t1")["new"]
    assert (counts.units, counts.jobs, counts.cached, counts.tally(Metric.LATENCY).units) == (2, 1, 4, 1)


def test_thumbs(database: Database) -> None:
    for id in "123":
        run(database, job(id))
    apply(database, RateJob("1", ACCOUNT, 1), RateJob("2", ACCOUNT, -1), RateJob("3", ACCOUNT, 1))
    apply(database, RateJob("3", ACCOUNT, -1), RateJob("2", ACCOUNT, 0), RateJob("1", ACCOUNT, 1))
    (unit,) = same(database).values()
    assert (unit.ups, unit.rated) == (1, 2)
    hit = replace(job("4"), bid_source=CACHE_SOURCE, state=JobState.SUCCEEDED)
    apply(database, RecordJob(hit))
    assert apply(database, RateJob("4", ACCOUNT, 1))[0].rating == 1
    (unit,) = same(database).values()
    assert (unit.ups, unit.rated) == (1, 2), "a kept answer says nothing about the version's"


@pytest.mark.parametrize(("id", "account", "why"), [("1", "bo", Why.NO_JOB), ("9", ACCOUNT, Why.NO_JOB), ("2", ACCOUNT, Why.STATE)])
def test_who_may_not_rate(database: Database, id: str, account: str, why: Why) -> None:
    run(database, job("1"))
    apply(database, OpenJob(job("2"), FOREVER_MS))
    with pytest.raises(BooksRefused) as caught:
        apply(database, RateJob(id, account, 1))
    assert caught.value.why is why


def test_speed_needs_two_tokens_and_a_first_word() -> None:
    assert speed_milli(job("1", completion_tokens=11, latency_us=1_100_000, first_word_us=100_000)) == 10_000
    for more in ({"completion_tokens": 1}, {"first_word_us": 0}, {"latency_us": 100_000}, {"latency_us": 50_000}):
        values: dict[str, Any] = {"completion_tokens": 11, "latency_us": 1_100_000, "first_word_us": 100_000, **more}
        assert speed_milli(job("1", **values)) == 0


def test_sums_of_an_arm_are_those_of_its_units(database: Database) -> None:
    rng = random.Random(5)
    jobs = [(job(str(number), f"u{rng.randrange(7)}", rng.choice(["old", "new"])), rng.randrange(1, 10**7)) for number in range(60)]
    for one, latency_us in jobs:
        run(database, one, latency_us=latency_us, first_word_us=latency_us // 2)
    units = list(same(database).values())
    with database.reading() as connection:
        counts = ab_tests.counts_of(connection, "t1")
    for arm in ("old", "new"):
        mine = [unit for unit in units if unit.arm == arm]
        tally = counts[arm].tally(Metric.LATENCY)
        assert (tally.units, tally.count) == (len(mine), sum(unit.jobs for unit in mine))
        assert tally.total == pytest.approx(sum(unit.latency_us for unit in mine))
        assert tally.total_squares == pytest.approx(sum(unit.latency_us**2 for unit in mine))
        assert tally.count_squares == sum(unit.succeeded**2 for unit in mine)
        assert tally.cross == pytest.approx(sum(unit.latency_us * unit.succeeded for unit in mine))


def test_sums_of_squares_do_not_overflow(database: Database) -> None:
    """Two jobs of 100 minutes each: 3.6·10^19 square microseconds are more than a BIGINT holds."""
    for id in "12":
        run(database, job(id, f"u{id}"), latency_us=6_000_000_000)
    with database.reading() as connection:
        tally = ab_tests.counts_of(connection, "t1")["new"].tally(Metric.LATENCY)
    assert tally.total_squares == pytest.approx(2 * 6_000_000_000.0**2)


def test_adding_in_any_order_gives_the_same() -> None:
    rng = random.Random(9)
    ended = [
        replace(
            job(str(n)),
            state=rng.choice([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]),
            completion_tokens=rng.randrange(30),
            latency_us=rng.randrange(10**6),
            first_word_us=rng.randrange(10**5),
            rating=rng.choice([-1, 0, 1]),
            island=rng.choice(["", "island"]),
            error_code=rng.choice(["", GIVEN_UP, "cargo_failed", "no_island"]),
        )
        for n in range(40)
    ]
    sums = set()
    for _ in range(5):
        rng.shuffle(ended)
        sums.add(_sum(ended))
    assert len(sums) == 1


def _sum(ended: Sequence[Job]) -> AbUnit:
    unit = AbUnit("t1/new/u1", "t1", "new", "u1")
    for one in ended:
        unit = added(unit, one)
    return unit


def test_names_fit_into_their_columns() -> None:
    longest = f"{'t' * 16}/{'n' * limits.AB_NAME_CHARS_MAX}/{'u' * 24}"
    assert len(longest) <= 160


def test_a_units_row_is_read_once(database: Database) -> None:
    """As long as nobody else writes: reading it anew for each job costs a chat half a millisecond."""
    read: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        if statement.startswith("SELECT") and "ab_units" in statement:
            read.append(statement)

    writer = Writer(database)
    sql.event.listen(sql.Engine, "before_cursor_execute", listen)
    try:
        for id in "1234":
            writer.do(OpenJob(job(id), FOREVER_MS))
            writer.do(settled(job(id)))
    finally:
        sql.event.remove(sql.Engine, "before_cursor_execute", listen)
        writer.close()
    assert len(read) == 1 and next(iter(same(database).values())).jobs == 4
