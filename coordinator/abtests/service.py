"""A/B tests at work: what each Coordinator knows of them, which arm a request gets, when they are looked at, and what follows.

Theory of operation. Tests are the database's; each Coordinator reads those that have changed every POLL_S, as it does Cargos, and assigns
requests by what it remembers (``assign``), which takes some microseconds. Jobs are counted where they are settled (books/ab_units.py), by
whichever Coordinator. Every LOOK_S one Coordinator looks at each active test (``look``): it adds the time that has passed, sums the
counters up, lets ``decision.judge`` say what they mean, and does what follows in one transaction: a promotion and the end of its test are
both on disk or neither.

Rules. While a version that is tried may not run, or no Island offers it, the whole test stands still: all units get the base, and neither
jobs nor time count, or the arms would not be alike. Time is added in steps of at most STEP_MAX_MS, none for a clock that goes back, so a
clock that jumps neither ends a test nor keeps it from ending. Whoever changes a test does so at the revision that he has read.

Runs on trio.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import sqlalchemy as sql
import trio

from coordinator.abtests.assignment import arm_of, exposure_percent, is_enrolled, unit_key
from coordinator.abtests.decision import WORDS, Report, Verdict, judge
from coordinator.abtests.definition import facts_of, read_plan
from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.plan import AbState, Arm, ArmCounts
from coordinator.abtests.results import Results
from coordinator.books import ab_tests as rows
from coordinator.books.ab_tests import AbEvent, AbTest, Outrun
from coordinator.books.ab_units import AddCached
from coordinator.books.books import Books
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.books.ratings import RateJob
from coordinator.cargo_rules import RegistryRefused
from coordinator.orders import AbArm, Order
from coordinator.registry import Entry
from protocol import limits

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 1.0
LOOK_S = 10.0
STEP_MAX_MS = 60_000  # of running time, that one look may add
CHANGES_MAX = 8  # times that a promotion by hand is tried while others change the test
PLAIN_CHARS_MAX = 4_000  # of a request without wishes that any version of a Cargo can take
HELD_S = 0.25  # what Islands offer is looked at so often
CACHED_AT_ONCE = 500  # counts of answers from the cache in one change
_MS_PER_HOUR = 3_600_000


class Names(Protocol):
    """Of the registry, what tests need."""

    def find(self, reference: str) -> Entry | None: ...

    def current(self, name: str) -> Entry | None:
        """What a name stands for."""
        ...

    def may_run(self, address: str) -> bool: ...

    def promote_within(self, connection: sql.Connection, name: str, address: str, origin: str) -> Any:
        """In a writer's transaction. Raises RegistryRefused."""
        ...

    async def refresh(self) -> None: ...


@dataclass(slots=True)
class _Live:
    """An active test, and why it stands still (empty: it does not), as it was a moment ago."""

    test: AbTest
    held: str = ""
    held_until_s: float = 0.0


class AbTests:
    """``offered(cargo)``: content hashes that Islands offer under a name now; ``secret``: keys the hashes of units, the same at all
    Coordinators of a database; ``clock``: seconds, only forward; ``now_ms``: the database's clock, Unix milliseconds.

    ``fits(order, arm, micros)``: whether some Island could ever run an order in an arm, for so much at most (None: anything);
    ``saved_bid(account, cargo)``: what an account bids where a request says nothing. Raises BooksUnavailable.
    """

    def __init__(
        self,
        books: Books,
        registry: Names,
        offered: Callable[[str], Collection[str]],
        secret: bytes,
        clock: Callable[[], float],
        now_ms: Callable[[], Awaitable[int]],
        new_id: Callable[[], str],
        fits: Callable[[Order, Arm, int | None], bool],
        saved_bid: Callable[[str, str], Awaitable[int | None]],
    ) -> None:
        self._books, self._registry, self._offered, self._secret = books, registry, offered, secret
        self._fits, self._saved_bid = fits, saved_bid
        self._clock, self._now_ms, self._new_id = clock, now_ms, new_id
        self._active: dict[str, _Live] = {}  # by the base's name
        self._tests: dict[str, AbTest] = {}  # that have begun and not ended
        self._cached: Counter[AbArm] = Counter()
        self._seq = 0
        self._lock, self._flushing = trio.Lock(), trio.Lock()
        self.assigned = 0
        self.unfit = 0  # requests that got the base because not every arm could run them
        self.held = 0  # requests that got the base because their test stood still
        self.looks = 0

    def __repr__(self) -> str:
        return f"<AbTests {len(self._active)} active, {self.assigned} assigned>"

    # ---- requests

    async def assign(self, order: Order) -> Order:
        """The order for the version that it is to get: of its arm where it is in a test, else of what the name stands for.

        A request that a quote has promised to an Island stays what it is. One that not every arm could run, for its bid, its policy or its
        length, is in none: it must not fail for the test, and the arms must get the same kinds of requests. Raises BooksUnavailable.
        """
        live = self._active.get(order.spec.cargo)
        if live is None or order.arm is not None or order.spec.content_hash or order.quote_id or order.spec.island:
            return self.resolved(order)
        if self._why_held(live):
            self.held += 1
            return self.resolved(order)
        test, plan = live.test, live.test.plan
        if not await self._fits_all(order, plan.arms):
            self.unfit += 1
            return self.resolved(order)
        unit = unit_key(self._secret, plan.unit, test.id, order.account, order.user, order.spec.job_id)
        if not is_enrolled(test.id, unit, exposure_percent(plan.ramp, test.active_ms)):
            return self.resolved(order)
        arm = arm_of(plan, test.id, unit)
        self.assigned += 1
        return replace(_pinned(order, arm.cargo, arm.address), arm=AbArm(test.id, arm.name, unit))

    async def _fits_all(self, order: Order, arms: tuple[Arm, ...]) -> bool:
        bid = order.bid_micros if order.bid_micros is not None else await self._saved_bid(order.account, order.spec.cargo)
        is_plain = bid is None and order.spec.policy is None and not order.spec.avoid
        if is_plain and max(choice.input_chars for choice in order.spec.choices) <= PLAIN_CHARS_MAX:
            return True
        return all(self._fits(order, arm, bid) for arm in arms)

    def resolved(self, order: Order) -> Order:
        """A name may stand for a Cargo of another name, since a promotion."""
        cargo = order.spec.cargo
        if order.spec.content_hash or order.quote_id:
            return order
        entry = self._registry.current(cargo)
        if entry is None or entry.cargo.manifest.name == cargo:
            return order
        return _pinned(order, entry.cargo.manifest.name, entry.cargo.address)

    def restored(self, order: Order, job: Job) -> Order:
        """The order of a job that another run of a Coordinator had accepted, in the arm that it had."""
        test = self._tests.get(job.ab_test) if job.ab_test else None
        arm = test.plan.arm(job.ab_arm) if test is not None else None
        if arm is None:
            return order
        return replace(_pinned(order, arm.cargo, arm.address), arm=AbArm(job.ab_test, job.ab_arm, job.ab_unit))

    def note_cached(self, arm: AbArm) -> None:
        """An answer of a test came from the cache."""
        self._cached[arm] += 1

    def _why_held(self, live: _Live) -> str:
        now_s = self._clock()
        if now_s >= live.held_until_s:
            live.held, live.held_until_s = self._look_for(live.test.plan.arms), now_s + HELD_S
        return live.held

    def _look_for(self, arms: tuple[Arm, ...]) -> str:
        """What is wrong with the versions on trial; empty: nothing."""
        if unfit := self._unfit(arms):
            return unfit
        for arm in arms:
            if arm.address not in self._offered(arm.cargo):
                return f"no Island offers {arm.cargo} {arm.release} at the moment, the version of the variant {arm.name}"
        return ""

    def _unfit(self, arms: tuple[Arm, ...]) -> str:
        for arm in arms:
            if not self._registry.may_run(arm.address):
                return f"{arm.cargo} {arm.release}, the version of the variant {arm.name}, was suspended or revoked, or its time is over"
        return ""

    # ---- what publishers do

    async def create(self, account: str, body: Mapping[str, Any]) -> AbTest:
        """A draft. Raises AbRefused or BooksUnavailable."""

        def find(reference: str) -> Any:
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
        await self.flush()
        counts = await self._books.ask(rows.counts_of, test.id)
        held = self._look_for(test.plan.arms) if not test.state.ended else ""
        if not held:
            test = _run_on(test, await self._now_ms())
        exposure = exposure_percent(test.plan.ramp, test.active_ms) if test.state is AbState.ACTIVE else 0.0
        return Results(test, counts, await _judged(test, counts), exposure, held)

    async def activate(self, account: str, id: str) -> AbTest:
        """Starts a draft, or goes on with a test that was paused. Raises AbRefused or BooksUnavailable."""

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.ACTIVE:
                return test
            if test.state.ended:
                raise AbRefused(AbFault.STATE, f"the test has ended ({test.state}); create another one")
            if other := rows.active_on(connection, test.plan.base_cargo):
                text = f"the test {other} is active on {test.plan.base_cargo} already; pause it, or end it, first"
                raise AbRefused(AbFault.BUSY, text, "base_cargo")
            base = test.base_address or self._base_address(test)
            begun = replace(
                test,
                state=AbState.ACTIVE,
                started_at_ms=test.started_at_ms or now_ms,
                seen_at_ms=now_ms,
                base_address=base,
                note="",
            )
            return rows.change(connection, begun, [AbEvent(now_ms, "activated", account, {"base": base})])

        def check(test: AbTest) -> None:
            if test.state in (AbState.DRAFT, AbState.PAUSED) and (why := self._look_for(test.plan.arms)):
                raise AbRefused(AbFault.NOT_OFFERED, f"{why}; start an Island with it: archipelag-node start --cargo NAME@RELEASE")

        return await self._write(account, id, write, check)

    async def pause(self, account: str, id: str) -> AbTest:
        """All units get the base again; what was counted is kept. Raises AbRefused or BooksUnavailable."""

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.PAUSED:
                return test
            if test.state is not AbState.ACTIVE:
                fault = AbFault.NOT_STARTED if test.state is AbState.DRAFT else AbFault.STATE
                raise AbRefused(fault, f"the test is {_told(test.state)}; only an active one can be paused")
            paused = replace(_run_on(test, now_ms), state=AbState.PAUSED)
            return rows.change(connection, paused, [AbEvent(now_ms, "paused", account, {})])

        return await self._write(account, id, write)

    async def promote(self, account: str, id: str, variant: str, force: bool) -> AbTest:
        """Ends a test and makes a variant what the base stands for: the winner, or, where there is none yet, the one that is named.

        Raises AbRefused: NOT_STARTED, BLOCKED, STATE, INVALID; BooksUnavailable.
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
        counts = await self._books.ask(rows.counts_of, test.id)
        report = await _judged(test, counts)
        arm = _chosen(test, report, variant, force)
        if unfit := self._unfit((arm,)):
            raise AbRefused(AbFault.BLOCKED, unfit, "variant")
        is_shown = report.winner == arm.name
        return await self._promote(test, arm, account, {"is_conclusive": is_shown, **_evidence(report)})

    async def rollback(self, account: str, id: str) -> AbTest:
        """Ends a test, and has the base stand for what it stood for when the test was started; a draft just ends. Raises AbRefused or
        BooksUnavailable."""

        def write(connection: sql.Connection, test: AbTest, now_ms: int) -> AbTest:
            if test.state is AbState.ROLLED_BACK:
                return test
            if test.state is AbState.DRAFT:
                ended = replace(test, state=AbState.ROLLED_BACK, ended_at_ms=now_ms)
                return rows.change(connection, ended, [AbEvent(now_ms, "rolled_back", account, {})])
            base, current = test.plan.base_cargo, self._base_address(test)
            winner = test.plan.arm(test.winner)
            if winner is not None and current not in (winner.address, test.base_address):
                text = f"{base} stands for another version by now than the one that this test promoted; a new test may promote another"
                raise AbRefused(AbFault.STATE, text)
            if current != test.base_address:
                self._registry.promote_within(connection, base, test.base_address, f"rollback:{test.id}")
            ended = replace(_run_on(test, now_ms), state=AbState.ROLLED_BACK, ended_at_ms=now_ms, note="")
            detail = {"base": test.base_address, "from": current}
            return rows.change(connection, ended, [AbEvent(now_ms, "rolled_back", account, detail)])

        def check(test: AbTest) -> None:
            if test.base_address and not self._registry.may_run(test.base_address):
                raise AbRefused(AbFault.STATE, "the version before the test may not run any more; publish another release")

        changed = await self._write(account, id, write, check)
        await self._registry.refresh()
        return changed

    async def rate(self, account: str, job_id: str, rating: int) -> Job:
        """Raises BooksRefused or BooksUnavailable."""
        return await self._books.do(RateJob(job_id, account, rating))

    def _base_address(self, test: AbTest) -> str:
        entry = self._registry.current(test.plan.base_cargo)
        if entry is None:
            raise AbRefused(AbFault.UNKNOWN_CARGO, f"no release of {test.plan.base_cargo} may run any more", "base_cargo")
        return entry.cargo.address

    async def _write(
        self,
        account: str,
        id: str,
        write: Callable[[sql.Connection, AbTest, int], AbTest],
        check: Callable[[AbTest], None] = lambda test: None,
    ) -> AbTest:
        """A change of a test as it is in the same transaction. ``check``: before that, on trio."""
        check(await self.find(account, id))
        now_ms = await self._now_ms()

        def change(connection: sql.Connection) -> AbTest:
            test = rows.test_of(connection, id)
            if test is None:
                raise AbRefused(AbFault.UNKNOWN, "there is no such A/B test")
            return write(connection, test, now_ms)

        changed = await self._books.change(change)
        await self.refresh()
        return changed

    async def _promote(self, test: AbTest, arm: Arm, account: str, detail: Mapping[str, Any]) -> AbTest:
        """Raises Outrun where the test has changed since it was read."""
        now_ms = await self._now_ms()

        def write(connection: sql.Connection) -> AbTest:
            base = test.plan.base_cargo
            ended = replace(
                _run_on(test, now_ms), state=AbState.PROMOTED, ended_at_ms=now_ms, winner=arm.name, note=""
            )
            told = {"variant": arm.name, "address": arm.address, "before": self._base_address(test), **detail}
            changed = rows.change(connection, ended, [AbEvent(now_ms, "promoted", account, told)])
            if told["before"] != arm.address:
                self._registry.promote_within(connection, base, arm.address, f"ab:{test.id}")
            return changed

        changed = await self._books.change(write)
        await self._registry.refresh()
        await self.refresh()
        log.info("A/B test %s: %s stands for %s %s now", test.id, test.plan.base_cargo, arm.cargo, arm.release)
        return changed

    # ---- looking

    async def look(self, id: str) -> Report | None:
        """Adds the time that has passed, decides, and does what follows. None where another Coordinator is faster, or the test is not
        active. Raises BooksUnavailable."""
        test = await self._books.ask(rows.test_of, id)
        now_ms = await self._now_ms()
        if test is None or test.state is not AbState.ACTIVE or 0 <= now_ms - test.seen_at_ms < LOOK_S * 1000 / 2:
            return None
        self.looks += 1
        held = self._look_for(test.plan.arms)
        counts = await self._books.ask(rows.counts_of, test.id)
        test = _run_on(test, now_ms) if not held else replace(test, seen_at_ms=now_ms)
        report = await _judged(test, counts, held)
        try:
            await self._follow(test, report, self._unfit(test.plan.arms), held, now_ms)
        except Outrun:
            return None
        await self.refresh()
        return report

    async def _follow(self, test: AbTest, report: Report, unfit: str, held: str, now_ms: int) -> None:
        if unfit:
            await self._stop(test, now_ms, "variant_not_runnable", unfit, {})
        elif report.verdict is Verdict.HARMFUL:
            await self._stop(test, now_ms, "guardrail_violated", _words(report.blocked), _evidence(report))
        elif report.verdict is Verdict.PROMOTE and report.winner and test.plan.auto_promote and not held:
            arm = test.plan.arm(report.winner)
            assert arm is not None
            await self._promote(test, arm, "", {"is_conclusive": True, **_evidence(report)})
        else:
            note = (held or _words(report.blocked))[: limits.TEXT_CHARS_MAX]
            begins = bool(note) and not test.note  # the words hold figures, which change at each look
            events = [AbEvent(now_ms, "held" if held else "blocked", "", {"why": note})] if begins else []
            await self._books.change(rows.change, replace(test, note=note), events)

    async def _stop(self, test: AbTest, now_ms: int, reason: str, why: str, detail: Mapping[str, Any]) -> None:
        log.warning("A/B test %s is paused: %s", test.id, why)
        paused = replace(test, state=AbState.PAUSED, note=why[: limits.TEXT_CHARS_MAX])
        await self._books.change(rows.change, paused, [AbEvent(now_ms, "paused", "", {"reason": reason, "why": why, **detail})])

    # ---- keeping up

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once everything is read. Runs until cancelled; then what is counted of the cache is written down."""
        await self.refresh()
        task_status.started()
        look_at_s = self._clock() + LOOK_S
        try:
            while True:
                await trio.sleep(POLL_S)
                try:
                    await self.refresh()
                    await self.flush()
                    if self._clock() >= look_at_s:
                        look_at_s = self._clock() + LOOK_S
                        for live in list(self._active.values()):
                            await self._look_safely(live.test.id)
                except BooksUnavailable as error:
                    log.debug("A/B tests cannot be read at the moment: %s", error)
        finally:
            with trio.move_on_after(limits.HELLO_TIMEOUT_S, shield=True):
                await self._last_flush()

    async def _look_safely(self, id: str) -> None:
        """What is refused here concerns this test only."""
        try:
            await self.look(id)
        except (AbRefused, RegistryRefused) as refused:
            log.warning("A/B test %s: %s", id, refused)

    async def _last_flush(self) -> None:
        try:
            await self.flush()
        except BooksUnavailable as error:
            log.warning("answers from the cache of the last second are not counted: %s", error)

    async def refresh(self) -> None:
        """Takes in what has changed in the database. Raises BooksUnavailable."""
        async with self._lock:
            for test in await self._books.ask(rows.tests_after, self._seq):
                self._seq = max(self._seq, test.seq)
                self._take_in(test)

    def _take_in(self, test: AbTest) -> None:
        base = test.plan.base_cargo
        live = self._active.get(base)
        if test.state is AbState.ACTIVE:
            if live is not None and live.test.id == test.id:
                live.test = test
            else:
                self._active[base] = _Live(test)
        elif live is not None and live.test.id == test.id:
            del self._active[base]
        if test.state in (AbState.ACTIVE, AbState.PAUSED):
            self._tests[test.id] = test
        else:
            self._tests.pop(test.id, None)

    async def flush(self) -> None:
        """Writes down which answers came from the cache; what others are writing is written when this returns. Raises BooksUnavailable;
        then it is tried again."""
        async with self._flushing:
            while self._cached:
                part = Counter(dict(self._cached.most_common(CACHED_AT_ONCE)))
                self._cached -= part
                changes = [AddCached(arm.test, arm.variant, arm.unit, count) for arm, count in part.items()]
                try:
                    with trio.CancelScope(shield=True):  # broken off, it would not be known whether they count
                        await self._books.do_all(*changes)
                except BooksUnavailable:
                    self._cached += part
                    raise

    def gauges(self) -> dict[str, float]:
        """For /metrics; any thread may read them."""
        return {
            "ab_tests_active": len(self._active),
            "ab_assigned": self.assigned,
            "ab_held": self.held,
            "ab_unfit": self.unfit,
            "ab_looks": self.looks,
        }


def _pinned(order: Order, cargo: str, address: str) -> Order:
    """The same order for one version."""
    cache = order.cache.pinned(cargo, address) if order.cache is not None else None
    return replace(order, spec=replace(order.spec, cargo=cargo, content_hash=address), cache=cache)


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
        raise AbRefused(AbFault.BLOCKED, text, "variant")
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


