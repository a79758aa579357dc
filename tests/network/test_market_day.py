"""A simulated day of the market: every credit is accounted for, whoever chooses the Islands, and waiting is by production's rules."""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from coordinator.books.accounts import ISLANDS, CreateAccount
from coordinator.books.audit import audit
from coordinator.books.database import Database
from coordinator.books.jobs import JOBS, JobState
from coordinator.books.ledger import BALANCES, HOLDS, TRANSFERS, HoldState, TransferKind
from coordinator.books.schema import KINDS
from coordinator.books.stored import Stored
from coordinator.columns import Candidate, Columns
from coordinator.exchange.bids import BidSource
from coordinator.matching import Choice, Refusal, Wish, choose
from coordinator.placement import PRIORITY_PER_WAITED_S, Placer
from coordinator.regions import EU
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.fakes import FakePort, island, offer
from tests.coordinator.plain_matching import HASHES, judge, pool
from tests.network.market_books import DayBooks
from tests.network.market_day import Day, account_name
from tests.network.market_figures import End, Figures, jain, table
from tests.network.market_island import Run, Site, offer_of
from tests.network.market_places import PICKERS, Line, Waiter, at_random, cheapest, eligible, ours
from tests.network.market_trace import CARGOS, CURVE_STEPS, Config, Trace, demand_curve, make_trace

JOBS_OF_TEST = 3_000
CREDIT = 1_000_000
POLICIES = list(PICKERS)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(Config.scaled(JOBS_OF_TEST))


@pytest.fixture(scope="module")
def days(trace: Trace) -> dict[str, tuple[Day, Figures]]:
    """The same day by each way of placing jobs."""
    done = {policy: Day(trace, policy) for policy in POLICIES}
    return {policy: (day, day.run()) for policy, day in done.items()}


def small_day(jobs: int = 500, policy: str = "ours", seed: int = 1, keep: bool = False) -> Day:
    day = Day(make_trace(Config.scaled(jobs, seed)), policy, DayBooks(keep))
    day.run()
    return day


# -- the books


@pytest.mark.parametrize("policy", POLICIES)
def test_every_credit_is_accounted_for(days: dict[str, tuple[Day, Figures]], policy: str) -> None:
    day, figures = days[policy]
    assert day.audit() == []
    assert sum(figures.ends.values()) == figures.jobs == JOBS_OF_TEST
    assert day.books.opened == JOBS_OF_TEST - figures.ends[End.NO_CREDIT]
    totals = day.books.totals()
    assert sum(totals.values()) == 0
    assert totals["publishers"] > 0 and totals["escrow"] > 0 and totals["system"] < 0
    assert day.books.charged_micros() == day.owed_micros > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_everything_has_happened(days: dict[str, tuple[Day, Figures]], policy: str) -> None:
    """Or the audit would have had nothing to find."""
    day, figures = days[policy]
    for end in (End.SERVED, End.CANCELLED, End.REPLACED, End.GAVE_UP, End.PRICE):
        assert figures.ends[end] > 0, end
    assert figures.failures > figures.ends[End.LOST] > 0 and figures.requeued > 0
    assert day.adopted == day.late_words_refused > figures.ends[End.REPLACED]
    kinds = set(day.books.transfers["kind"].tolist())
    assert {list(TransferKind)[kind] for kind in kinds} >= {
        TransferKind.GRANT,
        TransferKind.REFILL,
        TransferKind.CHARGE,
        TransferKind.ESCROW,
    }
    assert min(day.books.karma_milli.values()) < 0 < sum(record.compute_ms for record in day.books.all_of(ISLANDS).values())
    assert {snapshot.cargo for snapshot in day.snapshots if snapshot.jobs_cleared} == {kind.name for kind in CARGOS}
    assert 0.0 < figures.waited_share < 1.0 and figures.utilisation < figures.utilisation_peak <= 1.0
    states = day.books.jobs["hold_state"]
    assert set(np.unique(states).tolist()) == {1, 2}, "some holds were posted, some released, none is pending"


def test_who_has_no_credit_is_refused_until_the_refill() -> None:
    day = Day(make_trace(Config.scaled(800)), "ours")
    for number in range(day.trace.config.accounts):
        day.books.do(CreateAccount(account_name(number), grant_micros=CREDIT), day.now_ms)
    figures = day.run()
    assert day.audit() == []
    refused = [number for number, code in enumerate(day.tally.end_code) if list(End)[code] is End.NO_CREDIT]
    assert len(refused) == figures.ends[End.NO_CREDIT] > 50
    assert day.trace.jobs.at_s[refused[-1]] <= day.trace.config.day_s / 2 + 300, "the refill came"
    assert any(day.tally.source_code[number] == list(BidSource).index(BidSource.EXPLICIT) for number in refused)


@pytest.fixture(scope="module")
def sound_books() -> DayBooks:
    day = small_day(300)
    assert day.audit() == []
    return day.books


def _put(kind: Any, index: int, **fields: Any) -> Callable[[DayBooks], None]:
    def change(books: DayBooks) -> None:
        key, row = list(books.all_of(kind).items())[index]
        books.tables[kind.name][key] = replace(row, **fields)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_put(BALANCES, 3, posted=1), "its transfers add up to"),
        (_put(BALANCES, 3, held=1), "held, and no job is left"),
        (lambda books: books.transfers.change(-1, "amount", 12_345), "its transfers add up to"),
        (lambda books: books.transfers.change(-1, "number", 7), "its charges add up to"),
        (lambda books: books.transfers.change(-1, "amount", 0), "moves nothing"),
        (lambda books: books.jobs.change(5, "hold_state", 0), "its hold is pending"),
        (lambda books: books.jobs.change(5, "posted", 10**15), "more was posted than held"),
        (lambda books: books.jobs.change(5, "bid", 1), "its hold is not its bid"),
        (lambda books: books.jobs.change(5, "price", 10**15), "its price is not what its hold was posted with"),
        (lambda books: books.jobs.change(5, "number", int(books.jobs["number"][6])), "has ended twice"),
        (lambda books: setattr(books, "opened", books.opened + 1), "1 jobs have not ended"),
        (_put(ISLANDS, 0, earned_micros=-1), "earned by Islands"),
        (_put(ISLANDS, 0, karma_milli=10**9), "its events add up to"),
    ],
)
def test_the_audit_finds(sound_books: DayBooks, change: Callable[[DayBooks], None], says: str) -> None:
    books = deepcopy(sound_books)
    change(books)
    assert says in "; ".join(books.audit())


def test_a_charge_twice_is_found(sound_books: DayBooks) -> None:
    books = deepcopy(sound_books)
    last = [int(books.transfers[name][-1]) for name in ("number", "part", "debit", "credit", "amount", "kind")]
    books.transfers.add(*last)
    assert "a part of a charge was taken twice" in books.audit()


def test_the_databases_own_audit_agrees(tmp_path: Path) -> None:
    """The rows of a day, in real tables: nothing to complain of; and one micro-credit too many is."""
    day = small_day(600, keep=True)
    assert day.audit() == []
    database = Database(f"sqlite:///{tmp_path / 'day.db'}")
    with contextlib.closing(database):
        with database.writing() as connection:
            for kind in KINDS:
                if rows := list(day.books.all_of(kind).values()):
                    Stored(kind).insert(connection, rows)
        assert {JOBS.name, HOLDS.name, TRANSFERS.name} <= {kind.name for kind in KINDS if day.books.all_of(kind)}
        with database.snapshot() as connection:
            assert audit(connection) == []
        with database.writing() as connection:
            first = "(SELECT MIN(id) FROM transfers WHERE kind = 'charge')"
            connection.exec_driver_sql(f"UPDATE transfers SET amount = amount + 1 WHERE id = {first}")
        with database.snapshot() as connection:
            assert len(audit(connection)) >= 3


def test_jobs_and_holds_that_are_kept_are_as_the_journal_has_them() -> None:
    books = small_day(keep=True).books
    assert len(books.jobs) == len(books.all_of(JOBS)) == len(books.all_of(HOLDS)) == books.opened
    assert sum(job.price_micros for job in books.all_of(JOBS).values()) == int(books.jobs["price"].sum())
    assert all(hold.state is not HoldState.PENDING for hold in books.all_of(HOLDS).values())
    assert all(job.ended for job in books.all_of(JOBS).values())
    succeeded = [job for job in books.all_of(JOBS).values() if job.state is JobState.SUCCEEDED]
    assert all(job.price_micros <= job.bid_micros and job.island for job in succeeded)


# -- the same day


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_is_a_day(policy: str) -> None:
    first, second = small_day(policy=policy), small_day(policy=policy)
    assert first.tally.finish_s == second.tally.finish_s
    assert first.books.all_of(BALANCES) == second.books.all_of(BALANCES)
    assert small_day(policy=policy, seed=2).tally.finish_s != first.tally.finish_s


def test_all_policies_have_the_same_day(days: dict[str, tuple[Day, Figures]]) -> None:
    """Who bids for himself bids the same, and the ways of choosing differ."""
    sources = {policy: np.array(day.tally.source_code) for policy, (day, _) in days.items()}
    said = sources["ours"] < 2  # explicit or saved
    assert all((source[said] == sources["ours"][said]).all() for source in sources.values())
    assert len({figures.price_mean for _, figures in days.values()}) == 3
    text = table([figures for _, figures in days.values()])
    assert all(policy in text for policy in POLICIES) and len({len(line) for line in text.splitlines()}) == 1


def test_the_trace_is_as_busy_as_it_should_be() -> None:
    for jobs, off in ((20_000, 0.03), (200_000, 0.02)):
        trace = make_trace(Config.scaled(jobs))
        assert len(trace.jobs) == jobs
        assert abs(trace.load - trace.config.load) < off
        assert (np.diff(np.array(trace.jobs.at_s)) >= 0.0).all()
        assert trace.jobs.at_s[0] >= 0.0 and trace.jobs.at_s[-1] <= trace.config.day_s
    assert Config.scaled(1_000_000) == Config()
    curve = demand_curve(np.random.default_rng(1))
    assert len(curve) == CURVE_STEPS and curve.mean() == pytest.approx(1.0)
    assert curve.max() * Config().load > 1.0 > curve.min() * Config().load


def test_all_islands_come_and_go(trace: Trace) -> None:
    sessions = [session for plan in trace.islands for session in plan.sessions]
    assert all(plan.sessions for plan in trace.islands) and len(trace.islands) == trace.config.islands
    assert any(session.crashes for session in sessions) and any(session.deaths for session in sessions)
    for plan in trace.islands:
        assert all(session.start_s < session.end_s <= trace.config.day_s for session in plan.sessions)
        assert all(a.end_s < b.start_s for a, b in zip(plan.sessions, plan.sessions[1:], strict=False))


# -- an Island


def _run(plan_changes: dict[str, Any], trace: Trace) -> Run:
    plain = {"prompt_tokens": 0, "output_tokens": 100, "cancel_share": 1.0, "at_s": 0.0, "conversation": 1}
    plan = replace(trace.jobs[0], **{**plain, **plan_changes})
    run = Run(plan, None, Wish("m", 100), (), 0.0)  # type: ignore[arg-type]
    run.placed_s = plan.at_s
    return run


def _site(trace: Trace, **changes: Any) -> Site:
    plain = {"tokens_per_s": 50.0, "slots": 4, "round_trip_s": 0.0}
    plan = replace(trace.islands[0], **{**plain, **changes})
    site = Site(plan, offer_of(plan))
    site.is_alive = True
    return site


def test_streams_share_an_island(trace: Trace) -> None:
    """50 tokens/s alone, 50 / 1.35 each for two: 100 tokens and, 1 s later, 50 more."""
    site, first, second = _site(trace), _run({}, trace), _run({"at_s": 1.0, "output_tokens": 50}, trace)
    site.begin(first, 1)
    assert site.next_end_s() == pytest.approx(2.0)
    site.begin(second, 1)
    each = 50.0 / 1.35
    assert site.next_end_s() == pytest.approx(1.0 + 50 / each)
    site.advance(1.0 + 50 / each)
    assert site.tokens_of(first) in (99, 100) and site.tokens_of(second) in (49, 50)
    assert site.busy_s == pytest.approx(1.0 + 2 * 50 / each) and site.online_s == pytest.approx(4 * (1.0 + 50 / each))
    assert not site.take_ended()[1] and len(site.runs) == 1


def test_a_prompt_costs_an_eighth_and_its_prefix_next_to_nothing(trace: Trace) -> None:
    site, run = _site(trace), _run({"prompt_tokens": 800}, trace)
    site.begin(run, 1)
    assert run.prefill == pytest.approx(100.0)
    site.remember(1)
    again = _run({"prompt_tokens": 800}, trace)
    site.begin(again, 1)
    assert again.prefill == pytest.approx(5.0)
    for conversation in range(2, 100):
        site.remember(conversation)
    assert 1 not in site.prefixes and len(site.prefixes) == 16


def test_nothing_comes_from_a_dead_island_and_a_job_has_its_time(trace: Trace) -> None:
    site, run = _site(trace, tokens_per_s=0.1), _run({"output_tokens": 4000}, trace)
    site.begin(run, 1)
    assert site.next_end_s() == 600.0
    site.advance(600.0)
    assert site.take_ended() == (run, True)
    site.is_alive = False
    pace = site.pace
    site.advance(900.0)
    assert site.pace == pace


def test_fairness() -> None:
    assert jain([3, 3, 3]) == pytest.approx(1.0)
    assert jain([5, 0, 0, 0]) == pytest.approx(0.25)
    assert jain([0, 0]) == 1.0


# -- choosing and waiting, beside production's


def _wish(rng: Random, names: list[str]) -> Wish:
    some = {name: rng.randrange(20) for name in names if rng.random() < 0.2}
    return Wish(
        cargo="m",
        tokens=rng.choice((10, 500, 3000, 9000)),
        content_hash=rng.choice(("", "", HASHES[0])),
        engine=rng.choice(("", "e1")),
        context_over=rng.choice((0, 0, 512)),
        excluded=some if rng.random() < 0.5 else {},
        resting=dict.fromkeys(some, rng.choice((100.0, 101.0))) if rng.random() < 0.3 else {},
        prompt_tokens=rng.randrange(2000),
        output_tokens=rng.randrange(2000),
        price_max_micros=rng.choice((None, 10**6, 60_000, 1000)),
        policy=rng.choice((None, EU)),
    )


def test_all_choose_from_the_same_islands() -> None:
    rng = Random(3)
    chosen = refused = 0
    for _ in range(400):
        islands = pool(rng.choice((1, 3, 12)), rng, full=0.4)
        facts = islands.columns()
        wish = _wish(rng, facts.islands)
        found, outcome = eligible(facts, wish, 100.0), choose(facts, wish, 100.0, rng)
        if isinstance(found, Refusal):
            refused += 1
            assert isinstance(outcome, Refusal)
            assert (found.code, found.by_price, found.cheapest_micros) == (outcome.code, outcome.by_price, outcome.cheapest_micros)
            assert isinstance(at_random(facts, wish, 100.0, rng), Refusal)
            continue
        chosen += 1
        names = {facts.islands[row] for row in np.flatnonzero(found[0])}
        assert isinstance(outcome, Choice) and outcome.candidate.island in names
        judged = judge(islands, wish, 100.0)
        assert names == {one.island for one in judged.considered}
        least = cheapest(facts, wish, 100.0, rng)
        assert isinstance(least, Candidate)
        assert judged.prices[least.island] == min(judged.prices[name] for name in names)
        drawn = {picked.island for picked in (at_random(facts, wish, 100.0, rng) for _ in range(60)) if isinstance(picked, Candidate)}
        assert drawn <= names and (len(drawn) > 1 or len(names) == 1)
    assert chosen > 50 and refused > 50


Script = list[tuple[float, Wish, float]]  # when a job comes, what it wants, how long it takes
Served = list[tuple[int, str]]  # job and Island, in the order of service


def _script(rng: Random, count: int) -> Script:
    """Jobs of all priorities; a third can pay the dear Island."""
    jobs: Script = []
    for number in range(count):
        most = 5_000 if rng.random() < 0.3 else 1_500
        wish = Wish("echo", 10, price_max_micros=most, priority=rng.choice((0, 0, 10, 100)), waits_for_price=True)
        jobs.append((number * 0.73 + rng.random() / 10, wish, 1.0 + 4 * rng.random()))
    return jobs


_OFFERS = (
    offer(slots_total=2, slots_free=2, ask=Ask(per_job=1_000), tokens_per_s=50.0),
    offer(slots_total=1, slots_free=1, ask=Ask(per_job=4_000), tokens_per_s=90.0),
)


async def _by_placer(script: Script) -> Served:
    islands = [island(number) for number in (1, 2)]
    for each, its in zip(islands, _OFFERS, strict=True):
        each.offers = (its,)
    placer = Placer(FakePort(*islands).book, Random(1))
    served: Served = []

    async def one(number: int, at_s: float, wish: Wish, takes_s: float) -> None:
        await trio.sleep_until(start_s + at_s)
        placement = await placer.place(wish, 10_000, 10_000)
        served.append((number, placement.island))
        await trio.sleep(takes_s)
        placer.release(placement)

    start_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number, (at_s, wish, takes_s) in enumerate(script):
            nursery.start_soon(one, number, at_s, wish, takes_s)
    return served


def _by_line(script: Script) -> Served:
    names = [island(number).peer for number in (1, 2)]
    facts = Columns.of("echo", [Candidate(name, 1, 1, False, its, 0, 0) for name, its in zip(names, _OFFERS, strict=True)])
    line: Line[int] = Line()
    served: Served = []
    busy = dict.fromkeys(names, 0)
    events: list[tuple[float, int, str]] = [(at_s, number, "") for number, (at_s, _, _) in enumerate(script)]
    now_s = 0.0

    def take(waiter: Waiter[int]) -> Refusal | None:
        outcome = ours(facts, waiter.wish, now_s, Random(1))
        if isinstance(outcome, Refusal):
            return outcome
        count(outcome.island, 1)
        served.append((waiter.job, outcome.island))
        heapq.heappush(events, (now_s + script[waiter.job][2], waiter.job, outcome.island))
        return None

    def count(name: str, jobs: int) -> None:
        busy[name] += jobs
        facts.set_busy(name, busy[name], 0)

    while events:
        now_s, number, name = heapq.heappop(events)
        if name:
            count(name, -1)
        else:
            wish = script[number][1]
            line.add(Waiter(number, wish, now_s * PRIORITY_PER_WAITED_S - wish.priority, now_s))
        line.settle(facts, 1, take)
    assert len(line) == 0
    return served


@pytest.mark.parametrize("seed", range(3))
async def test_the_line_serves_as_the_placer_does(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    script = _script(Random(seed), 120)
    served = _by_line(script)
    assert [number for number, _ in served] != sorted(number for number, _ in served), "somebody was passed"
    assert len({name for _, name in served}) == 2
    assert served == await _by_placer(script)


def test_whom_the_line_passes_over_choose_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same day with everybody tried every time, as production does."""
    quick = small_day(1_000)

    def look(waiter: Waiter[Any], facts: Columns, version: int) -> None:
        waiter.version, waiter.reach = version, -1

    monkeypatch.setattr(Waiter, "look", look)
    slow = small_day(1_000)
    assert slow.tally.wait_s == quick.tally.wait_s and slow.tally.end_code == quick.tally.end_code


def test_nobody_waits_for_a_cargo_that_is_not_there() -> None:
    line: Line[int] = Line()
    waiter = Waiter(1, Wish("m", 1), 0.0, 0.0)
    line.add(waiter)
    assert line.settle(Columns("m"), 1, lambda _: Refusal(Code.NO_ISLAND, "")) == []
    assert waiter.is_here and not waiter.is_tried and len(line) == 1
    line.clear()
    assert not waiter.is_here and len(line) == 0


# -- the full counts


@pytest.fixture(scope="module")
def full_trace() -> Iterator[Trace]:
    yield make_trace(Config())


@pytest.mark.soak
@pytest.mark.parametrize("policy", POLICIES)
def test_a_million_jobs_of_a_thousand_islands(
    full_trace: Trace, policy: str, record_property: Callable[[str, object], None]
) -> None:
    started_s = time.process_time()
    day = Day(full_trace, policy)
    figures = day.run()
    print(f"\n{table([figures])}\n{time.process_time() - started_s:.0f} s of CPU time")
    for name, value in asdict(figures).items():
        record_property(name, value)
    assert day.audit() == []
    assert sum(figures.ends.values()) == 1_000_000
    assert len(full_trace.islands) == 1_000 and all(site.visit for site in day.sites.values())
    assert day.adopted == day.late_words_refused > 0 and figures.requeued > 0
