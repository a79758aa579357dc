"""Publishers and their A/B tests, and what becomes of the tests by themselves: every change of a test is made here.

Theory of operation. Every LOOK_S one Coordinator looks at each active test (``look``): it adds the time that has passed, sums the counters
up, lets ``decision.judge`` say what they mean, and does what follows in one transaction: a promotion and the end of its test are both on
disk or neither. What the base stands for is asked in that transaction too; where it has moved since the start, by a release or another
promotion, the test is about something that is gone, and stops.

Rules. Time is added in steps of at most STEP_MAX_MS, none for a clock that goes back, so a clock that jumps neither ends a test nor keeps
it from ending. Whoever changes a test does so at the revision that he has read. What goes wrong with one test concerns no other.

Runs on trio.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import sqlalchemy as sql
import trio

from coordinator.abtests.assignment import exposure_percent
from coordinator.abtests.decision import WORDS, Report, Verdict, judge
from coordinator.abtests.definition import CargoFacts, facts_of, read_plan
from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.plan import AbState, Arm, ArmCounts
from coordinator.abtests.results import Results
from coordinator.abtests.service import AbTests
from coordinator.books import ab_tests as rows
from coordinator.books.ab_tests import AbEvent, AbTest, Outrun
from coordinator.books.books import Books
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.books.ratings import RateJob
from coordinator.cargo_rules import RegistryRefused
from coordinator.registry import Entry
from protocol import limits

log = logging.getLogger(__name__)

LOOK_S = 10.0
BUSY_SHARE = 20  # a test that takes a second to sum up is looked at every 20 s at most
STEP_MAX_MS = 60_000  # of running time, that one look may add
CHANGES_MAX = 8  # times that a change by hand is tried while others change the test
HELD, BLOCKED = "held", "blocked"  # why an active test stands still; those of a paused one stand in _follow
_TICK_S = 0.5
_MS_PER_HOUR = 3_600_000


class Names(Protocol):
    """Of the registry, what decisions need."""

    def find(self, reference: str) -> Entry | None: ...

    def current(self, name: str) -> Entry | None:
        """What a name stands for."""
        ...

    def may_run(self, address: str) -> bool: ...

    def current_within(self, connection: sql.Connection, name: str) -> str:
        """The address that a name stands for, in a transaction; empty where none of it may run."""
        ...

    def promote_within(self, connection: sql.Connection, name: str, address: str, origin: str) -> Any:
        """In a writer's transaction. Raises RegistryRefused."""
        ...

    async def refresh(self) -> None: ...


class AbDecisions:
    """``clock``: seconds, only forward; ``now_ms``: the database's clock, Unix milliseconds."""

    def __init__(
        self,
        books: Books,
        registry: Names,
        tests: AbTests,
        clock: Callable[[], float],
        now_ms: Callable[[], Awaitable[int]],
        new_id: Callable[[], str],
    ) -> None:
        self._books, self._registry, self._tests = books, registry, tests
        self._clock, self._now_ms, self._new_id = clock, now_ms, new_id
        self._due_s: dict[str, float] = {}  # by test
        self.looks = 0

    def __repr__(self) -> str:
        return f"<AbDecisions {self.looks} looks>"

    # ---- what publishers do

    async def create(self, account: str, body: Mapping[str, Any]) -> AbTest:
        """A draft. Raises AbRefused or BooksUnavailable."""

        def find(reference: str) -> CargoFacts | None:
            entry = self._registry.current(reference) or self._registry.find(reference)
            return None if entry is None else facts_of(entry, self._registry.may_run(entry.cargo.address))

        plan = read_plan(body, find, account)
        now_ms = await self._now_ms()
        test = AbTest(self._new_id(), account, plan, AbState.DRAFT, created_at_ms=now_ms)

        def write(connection: sql.Connection) -> AbTest | None:
            made = rows.create(connection, test, limits.AB_TESTS_MAX)
            if made is not None:
                rows.log_event(connection, made.id, AbEvent(now_ms, "created", account, {}))
            return made

        made = await self._books.change(write)
        if made is None:
            raise AbRefused(AbFault.TOO_MANY, f"an account has at most {limits.AB_TESTS_MAX} tests that have not ended; roll some back")
        return made

    async def find(self, account: str, id: str) -> AbTest:
        """Raises AbRefused(UNKNOWN) or BooksUnavailable."""
        test = await self._books.ask(rows.test_of, id)
        if test is None or test.account != account:
            raise AbRefused(AbFault.UNKNOWN, "there is no such A/B test; see GET /api/v1/ab-tests")
        return test

    async def list(self, account: str, limit: int, offset: int) -> tuple[Sequence[AbTest], int]:
        return await self._books.ask(rows.tests_of, account, limit, offset)

    async def events(self, account: str, id: str) -> Sequence[AbEvent]:
        test = await self.find(account, id)
        return await self._books.ask(rows.events_of, test.id)

    async def results(self, account: str, id: str) -> Results:
        """What is known now. Raises AbRefused or BooksUnavailable."""
        test = await self.find(account, id)
        await self._tests.flush()
        counts = await self._books.ask(rows.counts_of, test.id)
        held = self._tests.why_still(test.plan.arms) if test.state is AbState.ACTIVE else ""
        if not held:
            test = _run_on(test, await self._now_ms())
        exposure = exposure_percent(test.plan.ramp, test.active_ms) if test.state is AbState.ACTIVE else 0.0
        return Results(test, counts, await _judged(test, counts, held), exposure, held)

    async def activate(self, account: str, id: str) -> AbTest:
        """Starts a draft, or goes on with a test that was paused. Raises AbRefused or BooksUnavailable."""
        test = await self.find(account, id)
        if test.state in (AbState.DRAFT, AbState.PAUSED) and (why := self._tests.why_still(test.plan.arms)):
            raise AbRefused(AbFault.NOT_OFFERED, why)
        if test.state is AbState.PAUSED:
            report = await _judged(test, await self._books.ask(rows.counts_of, test.id))
            if report.verdict is Verdict.HARMFUL:
                text = f"{_words(report.blocked)}; what was counted stays, so the test would stop again: roll it back"
                raise AbRefused(AbFault.BLOCKED, text)

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.ACTIVE:
                return test
            if test.state.ended:
                raise AbRefused(AbFault.STATE, f"the test has ended ({_told(test.state)}); create another one")
            if other := rows.active_on(connection, test.plan.base_cargo):
                text = f"the test {other} is active on {test.plan.base_cargo} already; pause it, or end it, first"
                raise AbRefused(AbFault.BUSY, text, "base_cargo")
            base = self._base_within(connection, test)
            begun = replace(
                test,
                state=AbState.ACTIVE,
                started_at_ms=test.started_at_ms or now_ms,
                seen_at_ms=now_ms,
                base_address=base,
                note="",
                reason="",
            )
            return rows.change(connection, begun, [AbEvent(now_ms, "activated", account, {"base": base})])

        return await self._write(id, write)

    def _base_within(self, connection: sql.Connection, test: AbTest) -> str:
        """What the base stands for, if a test may run on that. Raises AbRefused."""
        plan, base = test.plan, self._registry.current_within(connection, test.plan.base_cargo)
        started_on = test.base_address
        if not base:
            raise AbRefused(AbFault.UNKNOWN_CARGO, f"no release of {plan.base_cargo} may run any more", "base_cargo")
        if not started_on and plan.auto_promote and (control := plan.arm(plan.control)) is not None:
            started_on = control.address
        if base != (started_on or base):
            text = f"{plan.base_cargo} stands for another version by now than when the test was made; create another one"
            raise AbRefused(AbFault.STATE, text, "base_cargo")
        return base

    async def pause(self, account: str, id: str) -> AbTest:
        """All units get the base again; what was counted is kept. Raises AbRefused or BooksUnavailable."""
        await self.find(account, id)

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.PAUSED:
                return test
            if test.state is not AbState.ACTIVE:
                fault = AbFault.NOT_STARTED if test.state is AbState.DRAFT else AbFault.STATE
                raise AbRefused(fault, f"the test is {_told(test.state)}; only an active one can be paused")
            paused = replace(_run_on(test, now_ms), state=AbState.PAUSED)
            return rows.change(connection, paused, [AbEvent(now_ms, "paused", account, {})])

        return await self._write(id, write)

    async def promote(self, account: str, id: str, variant: str, force: bool) -> AbTest:
        """Ends a test and makes a variant what the base stands for: the winner; or, where there is none yet, the one that is named, or with
        ``force`` the only one on trial.

        Raises AbRefused: NOT_STARTED, BLOCKED, STATE, INVALID; RegistryRefused; BooksUnavailable.
        """
        for _ in range(CHANGES_MAX):
            try:
                return await self._promote_by_hand(await self.find(account, id), account, variant, force)
            except Outrun:
                continue  # it was looked at meanwhile
        raise AbRefused(AbFault.STATE, "the test is being changed by others all the time; look at it again")

    async def _promote_by_hand(self, test: AbTest, account: str, variant: str, force: bool) -> AbTest:
        if test.state is AbState.DRAFT:
            raise AbRefused(AbFault.NOT_STARTED, "the test was never started; there is nothing to promote by. Activate it first")
        if test.state is AbState.PROMOTED and variant in ("", test.winner):
            return test
        if test.state.ended:
            raise AbRefused(AbFault.STATE, f"the test has ended ({_told(test.state)}); create another one")
        if held := self._tests.why_still(test.plan.arms):
            raise AbRefused(AbFault.BLOCKED, f"the test is held: {held}", "variant")
        counts = await self._books.ask(rows.counts_of, test.id)
        report = await _judged(test, counts)
        arm = _chosen(test, report, variant, force)
        return await self._promote(test, arm, account, {"is_conclusive": report.winner == arm.name, **_evidence(report)})

    async def rollback(self, account: str, id: str) -> AbTest:
        """Ends a test; of one that was promoted, the base stands again for what it stood for at its start. Raises AbRefused,
        RegistryRefused or BooksUnavailable."""
        await self.find(account, id)

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.ROLLED_BACK:
                return test
            detail = {}
            if test.state is AbState.PROMOTED:
                detail = {"base": test.base_address, "from": self._take_back(connection, test)}
            ended = replace(_run_on(test, now_ms), state=AbState.ROLLED_BACK, ended_at_ms=now_ms, note="", reason="")
            return rows.change(connection, ended, [AbEvent(now_ms, "rolled_back", account, detail)])

        changed = await self._write(id, write)
        await self._registry.refresh()
        return changed

    def _take_back(self, connection: sql.Connection, test: AbTest) -> str:
        """What the base stood for until now. Raises AbRefused, RegistryRefused."""
        base, winner = test.plan.base_cargo, test.plan.arm(test.winner)
        current = self._registry.current_within(connection, base)
        if current not in ("", test.base_address) and winner is not None and current != winner.address:
            text = f"{base} stands for another version by now than the one that this test promoted; a new test may promote another"
            raise AbRefused(AbFault.STATE, text)
        if current != test.base_address:
            self._registry.promote_within(connection, base, test.base_address, f"rollback:{test.id}")
        return current

    async def rate(self, account: str, job_id: str, rating: int) -> Job:
        """Raises BooksRefused or BooksUnavailable."""
        return await self._books.do(RateJob(job_id, account, rating))

    async def _write(self, id: str, write: Callable[[sql.Connection, AbTest, int], AbTest]) -> AbTest:
        """A change of a test as it is in the same transaction."""
        now_ms = await self._now_ms()

        def change(connection: sql.Connection) -> AbTest:
            test = rows.test_of(connection, id)
            if test is None:
                raise AbRefused(AbFault.UNKNOWN, "there is no such A/B test")
            return write(connection, test, now_ms)

        changed = await self._books.change(change)
        await self._tests.refresh()
        return changed

    async def _promote(self, test: AbTest, arm: Arm, account: str, detail: Mapping[str, Any]) -> AbTest:
        """Raises Outrun where the test has changed since it was read; AbRefused, RegistryRefused."""
        now_ms = await self._now_ms()

        def write(connection: sql.Connection) -> AbTest:
            base = self._base_within(connection, test)
            ended = replace(_run_on(test, now_ms), state=AbState.PROMOTED, ended_at_ms=now_ms, winner=arm.name, note="", reason="")
            told = {"variant": arm.name, "address": arm.address, "before": base, **detail}
            changed = rows.change(connection, ended, [AbEvent(now_ms, "promoted", account, told)])
            if base != arm.address:
                self._registry.promote_within(connection, test.plan.base_cargo, arm.address, f"ab:{test.id}")
            return changed

        changed = await self._books.change(write)
        await self._registry.refresh()
        await self._tests.refresh()
        log.info("A/B test %s: %s stands for %s %s now", test.id, test.plan.base_cargo, arm.cargo, arm.release)
        return changed

    # ---- looking

    async def run(self) -> None:
        """Looks at all that is active. Runs until cancelled."""
        while True:
            await trio.sleep(min(_TICK_S, LOOK_S))
            active = {test.id for test in self._tests.active()}
            self._due_s = {id: self._due_s.get(id, self._clock() + LOOK_S) for id in active}
            for id in active:
                if self._clock() >= self._due_s[id]:
                    await self._look_safely(id)

    async def _look_safely(self, id: str) -> None:
        """What goes wrong concerns this look at this test only."""
        begun_s = self._clock()
        try:
            await self.look(id)
        except (AbRefused, RegistryRefused, BooksUnavailable) as error:
            log.warning("A/B test %s was not looked at: %s", id, error)
        except Exception as error:  # a bug, or a row that nobody here can read
            log.error("A/B test %s: %s\n%s", id, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        self._due_s[id] = self._clock() + max(LOOK_S, BUSY_SHARE * (self._clock() - begun_s))

    async def look(self, id: str) -> Report | None:
        """Adds the time that has passed, decides, and does what follows. None where another Coordinator is faster, or the test is not
        active. Raises AbRefused, RegistryRefused, BooksUnavailable; ValueError for sums that are none."""
        test = await self._books.ask(rows.test_of, id)
        now_ms = await self._now_ms()
        if test is None or test.state is not AbState.ACTIVE or 0 <= now_ms - test.seen_at_ms < LOOK_S * 1000 / 2:
            return None
        self.looks += 1
        held = self._tests.why_still(test.plan.arms)
        counts = await self._books.ask(rows.counts_of, test.id)
        test = _run_on(test, now_ms) if not held else replace(test, seen_at_ms=now_ms)
        report = await _judged(test, counts, held)
        try:
            await self._follow(test, report, held, now_ms)
        except Outrun:
            return None
        await self._tests.refresh()
        return report

    async def _follow(self, test: AbTest, report: Report, held: str, now_ms: int) -> None:
        if unfit := self._tests.unfit_of(test.plan.arms):
            await self._stop(test, now_ms, "variant_not_runnable", unfit, {})
        elif moved := self._moved(test):
            await self._stop(test, now_ms, "base_changed", moved, {})
        elif report.verdict is Verdict.HARMFUL:
            await self._stop(test, now_ms, "harmful", _words(report.blocked), _evidence(report))
        elif report.verdict is Verdict.PROMOTE and report.winner and test.plan.auto_promote and not held:
            arm = test.plan.arm(report.winner)
            assert arm is not None
            try:
                await self._promote(test, arm, "", {"is_conclusive": True, **_evidence(report)})
            except (AbRefused, RegistryRefused) as refused:
                await self._stop(test, now_ms, "promotion_refused", str(refused), _evidence(report))
        else:
            note = (held or _words(report.blocked))[: limits.TEXT_CHARS_MAX]
            reason = HELD if held else BLOCKED if note else ""
            events = [AbEvent(now_ms, reason or "resumed", "", {"why": note} if note else {})] if reason != test.reason else []
            await self._books.change(rows.change, replace(test, note=note, reason=reason), events)

    def _moved(self, test: AbTest) -> str:
        """Why a test is about something that is gone; empty: it is not."""
        current = self._registry.current(test.plan.base_cargo)
        if current is not None and current.cargo.address == test.base_address:
            return ""
        stands = f"stands for {current.cargo.manifest.release}" if current is not None else "has no release that may run"
        return f"{test.plan.base_cargo} {stands} by now, which is not what this test was started on; roll it back, and create another one"

    async def _stop(self, test: AbTest, now_ms: int, reason: str, why: str, detail: Mapping[str, Any]) -> None:
        log.warning("A/B test %s is paused: %s", test.id, why)
        paused = replace(test, state=AbState.PAUSED, note=why[: limits.TEXT_CHARS_MAX], reason=reason)
        await self._books.change(rows.change, paused, [AbEvent(now_ms, "paused", "", {"reason": reason, "why": why, **detail})])


def _run_on(test: AbTest, now_ms: int) -> AbTest:
    """With the time that has passed since it was looked at, as far as that can be believed."""
    if test.state is not AbState.ACTIVE:
        return test
    step_ms = min(max(0, now_ms - test.seen_at_ms), STEP_MAX_MS)
    return replace(test, active_ms=test.active_ms + step_ms, seen_at_ms=now_ms)


async def _judged(test: AbTest, counts: Mapping[str, ArmCounts], held: str = "") -> Report:
    """In a thread: the first time scipy is loaded."""
    return await trio.to_thread.run_sync(judge, test.plan, counts, test.active_ms / _MS_PER_HOUR, held)


def _chosen(test: AbTest, report: Report, variant: str, force: bool) -> Arm:
    """Raises AbRefused."""
    plan = test.plan
    if variant and plan.arm(variant) is None:
        names = ", ".join(arm.name for arm in plan.arms)
        raise AbRefused(AbFault.INVALID, f"the test has no variant of that name; it has {names}", "variant")
    if report.blocked:
        raise AbRefused(AbFault.BLOCKED, f"the test is blocked: {_words(report.blocked)}; roll it back, and begin anew")
    name = variant or report.winner or ""
    if not name and force and len(plan.arms) == 2:
        name = next(arm.name for arm in plan.arms if arm.name != plan.control)
    if not name:
        text = f"the test has no winner yet ({_words(report.waiting) or report.verdict}); name the variant to promote it all the same"
        raise AbRefused(AbFault.NO_WINNER, text, "variant")
    arm = plan.arm(name)
    assert arm is not None
    return arm


def _evidence(report: Report) -> dict[str, Any]:
    """What a decision was made by, for the audit log."""
    return {"verdict": str(report.verdict), "waiting": list(report.waiting), "blocked": list(report.blocked)}


def _words(codes: Sequence[str]) -> str:
    return "; ".join(WORDS.get(code, code) for code in codes)


def _told(state: AbState) -> str:
    return {AbState.DRAFT: "a draft", AbState.ROLLED_BACK: "rolled back"}.get(state, str(state))
