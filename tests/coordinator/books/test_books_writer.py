"""The writer on both databases: groups, order, all or nothing, and what a broken change or an unsure commit does to the others."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sql
import trio

from coordinator.books import writer as writer_module
from coordinator.books.accounts import CreateAccount, PairIsland, SetPublisher
from coordinator.books.database import Database
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Earned, JobState, OpenJob, Outcome, SettleJob
from coordinator.books.ledger import Balance, PlaceHold, PostHold, ReleaseHold, Share
from coordinator.books.writer import TrioWriter, Writer
from tests.coordinator.books.book_operations import operation_of, told
from tests.coordinator.books.live_books import (
    WAIT_S,
    Answers,
    Bug,
    Gate,
    Nothing,
    balances_of,
    complaints,
    fund,
    in_threads,
    move,
    one_group,
    opened,
    tables_of,
)
from tests.coordinator.books.plain_books import CREDIT, job
from tests.coordinator.books.shadow import Answer, Shadow, with_balances
from tests.coordinator.books.workload import START_MS, UNIT_MS, Scale, Unit, make_units

NEVER_MS = 2**50
Flake = Callable[[Callable[[], None]], None]


@pytest.fixture
def writer(database_url: str) -> Iterator[Writer]:
    """Account a has 1,000 micro-credits; at the end the books add up."""
    with opened(database_url) as writer:
        fund(writer, "user:a", 1000)
        yield writer
        assert complaints(writer._database) == []


def database_of(writer: Writer) -> Database:
    return writer._database


# Groups


def test_what_waits_is_written_together(writer: Writer) -> None:
    groups = writer.statistics.groups
    with one_group(writer) as answers:
        in_threads([lambda n=n: answers.submit(f"m{n}", move(f"m{n}")) for n in range(64)])  # type: ignore[misc]
    assert set(answers.words().values()) == {"ok"}
    assert writer.statistics.groups == groups + 2, "the gate's, and one for 64 units"
    assert writer.statistics.largest_group == 64
    assert balances_of(database_of(writer))["user:b"] == (64, 0)


def test_clients_who_wait_for_their_answers_share_commits(writer: Writer) -> None:
    groups = writer.statistics.groups

    def client(number: int) -> None:
        for turn in range(10):
            writer.do(move(f"{number}.{turn}"))

    in_threads([lambda n=n: client(n) for n in range(16)])  # type: ignore[misc]
    assert balances_of(database_of(writer))["user:b"] == (160, 0)
    assert writer.statistics.largest_group > 1
    assert writer.statistics.groups - groups < 160


def test_a_group_has_so_many_units_and_no_more(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "GROUP_MAX", 10)
    groups = writer.statistics.groups
    with one_group(writer) as answers:
        for number in range(25):
            answers.submit(str(number), move(str(number)))
    assert writer.statistics.groups - groups == 1 + 3
    assert writer.statistics.largest_group == 10


def test_submit_order_is_apply_order_and_telling_order(writer: Writer) -> None:
    turns: list[str] = []
    with one_group(writer) as answers:
        for number in range(300):  # more than one group
            answers.submit(str(number), Nothing(str(number), turns))
    assert turns == [str(number) for number in range(300)]
    assert list(answers.all()) == ["gate", *turns]


def test_a_change_sees_those_before_it_in_its_group(writer: Writer) -> None:
    with one_group(writer) as answers:
        answers.submit("early", move("t0", 5, "user:b", "user:c"))
        answers.submit("a to b", move("t1", 5))
        answers.submit("b to c", move("t2", 5, "user:b", "user:c"))
        answers.submit("once more", move("t3", 1, "user:b", "user:c"))
    assert answers.words() == {
        "gate": "ok",
        "early": "insufficient_credits",
        "a to b": "ok",
        "b to c": "ok",
        "once more": "insufficient_credits",
    }
    assert balances_of(database_of(writer)) == {"system:issue": (-1000, 0), "user:a": (995, 0), "user:c": (5, 0)}


def test_nobody_spends_more_than_there_is_from_many_threads(writer: Writer) -> None:
    """1,000 micro-credits, 64 threads that each want 8 holds of 10 of them."""
    answers = Answers(writer)

    def client(number: int) -> None:
        for turn in range(8):
            answers.submit(f"{number}.{turn}", PlaceHold(f"{number}.{turn}", "user:a", 10, NEVER_MS))

    in_threads([lambda n=n: client(n) for n in range(64)])  # type: ignore[misc]
    words = list(answers.words().values())
    assert (words.count("ok"), words.count("insufficient_credits")) == (100, 412)
    assert balances_of(database_of(writer))["user:a"] == (1000, 1000)


# All or nothing


def test_a_refused_unit_leaves_the_others_alone(writer: Writer) -> None:
    with one_group(writer) as answers:
        answers.submit("before", move("t1", 10))
        answers.submit("too much", move("t2", 1000))
        answers.submit("after", move("t3", 20))
    assert answers.words() == {"gate": "ok", "before": "ok", "too much": "insufficient_credits", "after": "ok"}
    assert balances_of(database_of(writer))["user:b"] == (30, 0)
    assert writer.statistics.refused == 1


def test_a_unit_happens_as_a_whole_or_not_at_all(writer: Writer) -> None:
    with pytest.raises(BooksRefused) as refused:
        writer.do_all(move("t1", 10), PlaceHold("h1", "user:a", 10, NEVER_MS), move("t2", 1000))
    assert refused.value.why is Why.NO_CREDIT
    assert balances_of(database_of(writer))["user:a"] == (1000, 0)
    moved, held = writer.do_all(move("t1", 10), PlaceHold("h1", "user:a", 10, NEVER_MS))
    assert (moved.amount, held.amount) == (10, 10)
    assert balances_of(database_of(writer))["user:a"] == (990, 10)


def test_a_refused_unit_takes_its_first_changes_back_in_its_group(writer: Writer) -> None:
    with one_group(writer) as answers:
        answers.submit("all", PlaceHold("h1", "user:a", 1000, NEVER_MS), move("t1", 1, "user:b", "user:a"))
        answers.submit("later", PlaceHold("h1", "user:a", 600, NEVER_MS))
    assert answers.words() == {"gate": "ok", "all": "insufficient_credits", "later": "ok"}
    assert balances_of(database_of(writer))["user:a"] == (1000, 600)


# Saying it again


def test_a_hold_that_is_there_is_given_though_the_credits_would_not_suffice_for_another(writer: Writer) -> None:
    """Whoever calls an id new may be wrong: he says it again after a crash."""
    hold = writer.do(PlaceHold("h1", "user:a", 600, NEVER_MS))
    assert writer.do(PlaceHold("h1", "user:a", 600, NEVER_MS)) == hold
    with pytest.raises(BooksRefused) as refused:
        writer.do(PlaceHold("h1", "user:a", 601, NEVER_MS))
    assert refused.value.why is Why.DIFFERS
    writer.do(PostHold("h1", "user:a", (Share("user:b", 600),)))
    assert writer.do(PlaceHold("h1", "user:a", 600, NEVER_MS)).posted == 600


def test_a_job_that_is_there_is_given_though_the_credits_would_not_suffice_for_another(writer: Writer) -> None:
    writer.do(CreateAccount("ada"))
    opening = OpenJob(job("j1", bid=9_000 * CREDIT), NEVER_MS)
    opened_ = writer.do(opening)
    assert writer.do(opening) == opened_
    keyed = OpenJob(job("j2", bid=1_000 * CREDIT, can_rerun=True, fingerprint="f"), NEVER_MS, None, "k", NEVER_MS)
    assert [writer.do(keyed).id for _ in range(2)] == ["j2", "j2"]


# Broken changes


def test_rows_that_only_a_change_before_it_names_are_found(writer: Writer) -> None:
    """Who is paid changes inside the group: what was read for the settlement is not enough, and it is done by itself."""
    writer.do_all(CreateAccount("ada"), CreateAccount("bob"), CreateAccount("eve"))
    for number in range(4):
        writer.do(OpenJob(job(f"j{number}"), NEVER_MS))

    def settle(number: int, hours: int = 0) -> SettleJob:
        earned = Earned("p1", 10 * CREDIT, hours * 3_600_000)
        return SettleJob(f"j{number}", "ada", "echo", "c1", 1, Outcome(JobState.SUCCEEDED), (earned,))

    with one_group(writer) as answers:
        answers.submit("first job", settle(0, hours=1))
        answers.submit("publisher", SetPublisher("echo", "eve", 100_000))
        answers.submit("second job", settle(1))
        answers.submit("pairing", PairIsland("p1", "bob"))
        answers.submit("job with karma", settle(2, hours=20))
        answers.submit("paid at once", settle(3))
    assert set(answers.words().values()) == {"ok"}
    balances = balances_of(database_of(writer))
    assert balances["user:eve"][0] == 10_003 * CREDIT
    assert balances["user:bob"][0] == 10_037 * CREDIT
    assert "escrow:p1" not in balances


def broken(name: str) -> Any:
    overdrawn = Balance("user:poor", posted=-5, held=0)
    return {
        "KeyError": Bug("apply"),
        "ZeroDivisionError": Bug("apply", ZeroDivisionError),
        "in reads": Bug("reads"),
        "a constraint": Bug("store", row=overdrawn),
        "64 bits": Bug("store", row=Balance("user:rich", posted=2**63)),
        "long text": PlaceHold("x" * 400, "user:a", 1, NEVER_MS),
        "zero byte": PlaceHold("a\0b", "user:a", 1, NEVER_MS),
        "half a character": PlaceHold("a\ud800b", "user:a", 1, NEVER_MS),
    }[name]


FINE_IN_SQLITE = ("long text", "zero byte")


BROKEN = ("KeyError", "ZeroDivisionError", "in reads", "a constraint", "64 bits", "half a character")


@pytest.mark.parametrize("name", [*BROKEN, *FINE_IN_SQLITE])
def test_a_change_that_breaks_breaks_alone(writer: Writer, name: str) -> None:
    with one_group(writer) as answers:
        answers.submit("before", move("t1", 10))
        answers.submit("broken", broken(name))
        answers.submit("after", move("t2", 20))
    works = database_of(writer).is_sqlite and name in FINE_IN_SQLITE
    assert answers.words() == {"gate": "ok", "before": "ok", "broken": "ok" if works else "BooksUnavailable", "after": "ok"}
    assert writer.statistics.retries == 0, "it is not the database's fault, so it is not tried for seconds"
    writer.do(move("t3", 30))
    assert balances_of(database_of(writer))["user:b"] == (60, 0)


def test_a_broken_change_says_nothing_of_itself(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    """Values in logs are nobody's business."""
    with pytest.raises(BooksUnavailable) as unavailable:
        writer.do(Bug("store", row=Balance("user:hidden", posted=-4711)))
    shown = f"{caplog.text} {unavailable.value}"
    assert "broke" in caplog.text and "4711" not in shown and "hidden" not in shown


# Commits of which nobody knows whether they went through


@contextmanager
def flaky(writer: Writer, flake: Flake) -> Iterator[None]:
    """``flake(commit)`` stands in for each commit of the database; it may call it, and raise OSError for a lost connection."""
    dialect: Any = database_of(writer).engine.dialect
    plain = dialect.do_commit

    def do_commit(connection: Any) -> None:
        try:
            flake(lambda: plain(connection))
        except OSError as error:
            raise dialect.loaded_dbapi.OperationalError("lost") from error

    dialect.do_commit = do_commit
    try:
        yield
    finally:
        dialect.do_commit = plain


def failing(*fates: str) -> Flake:
    """Of each commit in turn: lost "before" it happened, or "after"; all later ones are fine."""
    left = list(fates)

    def flake(commit: Callable[[], None]) -> None:
        fate = left.pop(0) if left else ""
        if fate != "before":
            commit()
        if fate:
            raise OSError

    return flake


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_PAUSE_S", 0.0)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("fates", [("before",), ("after",), ("after", "before", "after"), ("before",) * 5])
def test_an_unsure_commit_is_tried_again_and_happens_once(writer: Writer, fates: tuple[str, ...]) -> None:
    with flaky(writer, failing(*fates)), one_group(writer) as answers:
        answers.submit("move", move("t1", 10))
        answers.submit("hold", PlaceHold("h1", "user:a", 900, NEVER_MS))
        answers.submit("post", PostHold("h1", "user:a", (Share("user:b", 7),)))
        answers.submit("hold 2", PlaceHold("h2", "user:a", 900, NEVER_MS))
        answers.submit("hold 3", PlaceHold("h3", "user:a", 900, NEVER_MS))
        answers.submit("release", ReleaseHold("h2", "user:a"))
    words = answers.words()
    assert words.pop("hold 3") == "insufficient_credits" or fates[-1] == "after"
    assert set(words.values()) == {"ok"}
    assert writer.statistics.retries == len(fates)
    assert balances_of(database_of(writer))["user:b"] == (17, 0)


@pytest.mark.usefixtures("quick_retries")
def test_books_that_stay_away_are_unavailable_and_nothing_is_half_done(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "RETRY_S", 0.0)
    with flaky(writer, failing("before")), pytest.raises(BooksUnavailable):
        writer.do(move("t1", 10))
    assert balances_of(database_of(writer))["user:a"] == (1000, 0)
    assert writer.statistics.failed == 1
    assert writer.do(move("t1", 10)).amount == 10


SCALE = Scale(accounts=30, units=600)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("seed", range(2))
def test_every_change_may_be_committed_unsurely(database_url: str, seed: int) -> None:
    """The shadow foretells what the last try answers, and what all tries together leave."""
    rng, shadow = random.Random(seed), Shadow()
    unit: Unit = ()
    expected: Answer = []
    now_ms, unsure = START_MS, 0

    def flake(commit: Callable[[], None]) -> None:
        """One unit is in each commit: it happens or not, and is then told of or not."""
        nonlocal expected, unsure
        fate = rng.choices(["", "before", "after"], [6, 1, 2])[0]
        mark = shadow.mark
        expected = shadow.apply(unit, now_ms)
        if fate == "before":
            shadow.undo(mark)
        else:
            commit()
        if fate:
            unsure += 1
            raise OSError

    with opened(database_url, lambda: now_ms) as writer, flaky(writer, flake):
        for number, unit in enumerate(make_units(seed, SCALE)):
            now_ms = START_MS + number * 20 * UNIT_MS
            assert _answer(writer, unit) == expected, (number, unit)
    with opened(database_url) as writer:
        assert tables_of(database_of(writer)) == with_balances(shadow.tables)
        assert complaints(database_of(writer)) == []
    assert unsure > 100


def _answer(writer: Writer, unit: Unit) -> Answer:
    try:
        return ["ok", *(told(result) for result in writer.do_all(*(operation_of(command) for command in unit)))]
    except BooksRefused as refused:
        return ["no", refused.why.value]


# The end, and too much


def test_closing_writes_what_waits(database_url: str) -> None:
    with opened(database_url) as writer:
        fund(writer, "user:a", 1000)
        gate, answers = Gate(), Answers(writer)
        answers.submit("gate", gate)
        assert gate.reached.wait(WAIT_S)
        for number in range(600):
            answers.submit(str(number), move(str(number)))
        closing = threading.Thread(target=writer.close)
        closing.start()
        while not writer._closing:
            closing.join(0.001)
        with pytest.raises(BooksUnavailable, match="closed"):
            writer.do(move("late"))
        gate.open.set()
        closing.join()
        assert set(answers.words().values()) == {"ok"}
        assert balances_of(database_of(writer))["user:b"] == (600, 0)
        writer.close()


def test_only_so_many_changes_may_wait(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "WAITING_MAX", 3)
    with one_group(writer) as answers:
        for number in range(5):
            answers.submit(str(number), move(str(number)))
        assert set(answers.by_name) == {"3", "4"}, "these are told at once"
    words = answers.words()
    assert [words[str(number)] for number in range(5)] == ["ok", "ok", "ok", "BooksUnavailable", "BooksUnavailable"]
    assert writer.do(move("5")).amount == 1


# From trio


async def test_trio_tasks_share_commits(writer: Writer) -> None:
    from_trio, done = TrioWriter(writer), []

    async def client(number: int) -> None:
        done.append(await from_trio.do(move(str(number))))

    groups = writer.statistics.groups
    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(client, number)
    assert len(done) == 100
    assert writer.statistics.groups - groups < 100 and writer.statistics.largest_group > 1


async def test_whoever_is_cancelled_still_hears_what_became_of_it(writer: Writer) -> None:
    from_trio, gate, heard = TrioWriter(writer), Gate(), []

    async def client(scope: trio.CancelScope) -> None:
        with scope:
            heard.append((await from_trio.do_all(gate, move("t1", 10)))[1].amount)
            heard.append("goes on")
            await trio.lowlevel.checkpoint()
            heard.append("and is not cancelled")

    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client, scope)
        assert await trio.to_thread.run_sync(gate.reached.wait, WAIT_S)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert heard == [], "it waits for the books, whatever happens"
        gate.open.set()
    assert heard == [10, "goes on"]


async def test_trio_tasks_hear_refusals(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    from_trio = TrioWriter(writer)
    with pytest.raises(BooksRefused) as refused:
        await from_trio.do_all(move("t1", 10), move("t2", 1000))
    assert refused.value.why is Why.NO_CREDIT
    monkeypatch.setattr(writer_module, "WAITING_MAX", 0)
    with pytest.raises(BooksUnavailable):
        await from_trio.do(move("t1", 10))


def test_the_writer_outlives_trio(writer: Writer) -> None:
    """Whoever is told after his trio has ended does not end the writer's thread."""

    async def main() -> TrioWriter:
        return TrioWriter(writer)

    from_trio = trio.run(main)
    with one_group(writer) as answers:
        writer.submit([move("t1", 10)], lambda results, error: from_trio._call(lambda: None))
        answers.submit("t2", move("t2", 20))
    assert answers.words()["t2"] == "ok"


def test_a_status_line(writer: Writer) -> None:
    assert "0 waiting" in repr(writer)
    assert isinstance(database_of(writer).engine, sql.Engine)
