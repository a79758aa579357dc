"""A/B tests as requests meet them: what a Coordinator knows of them, and which arm a request gets. Decisions are deciding.py's.

Theory of operation. Tests are the database's; each Coordinator reads those that have changed every POLL_S, as it does Cargos, and assigns
requests by what it remembers (``assign``), which takes some microseconds. Jobs are counted where they are settled (books/ab_units.py), by
whichever Coordinator.

Rules. A test makes no request fail, and its arms get the same kinds of requests: what not every arm could run is in none. While a version
that is tried may not run, no Island offers it, or it costs far more than another, the whole test stands still: all units get the base, and
neither jobs nor time count.

Runs on trio.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace

import trio

from coordinator.abtests.assignment import arm_of, exposure_percent, is_enrolled, unit_key
from coordinator.abtests.plan import AbState, Arm
from coordinator.books import ab_tests as rows
from coordinator.books.ab_tests import AbTest
from coordinator.books.ab_units import AddCached
from coordinator.books.books import Books
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job
from coordinator.orders import AbArm, Order
from protocol import limits

log = logging.getLogger(__name__)

POLL_S = 1.0
PRICE_FACTOR_MAX = 3  # between what the versions of a test cost: the market's own bids reach 4 times the usual (exchange/bids.py)
PLAIN_CHARS_MAX = 4_000  # of a request without wishes that any version of a Cargo can take
HELD_S = 0.25  # what Islands offer is looked at so often
CACHED_AT_ONCE = 500  # counts of answers from the cache in one change
_UNKNOWN = -1  # in the place of a bid


@dataclass(slots=True)
class _Live:
    """An active test, and why it stands still (empty: it does not), as it was a moment ago."""

    test: AbTest
    held: str = ""
    held_until_s: float = 0.0


class AbTests:
    """``may_run(address)``: whether the registry lists it; ``offered(cargo)``: content hashes that Islands offer under a name now;
    ``secret``: keys the hashes of units, the same at all Coordinators of a database; ``clock``: seconds, only forward.

    ``fits(order, arm, micros)``: whether some Island could ever run an order in an arm, for so much at most (None: anything);
    ``price(arm)``: the least that a usual job costs there now, micro-credits, None where nobody offers it; ``saved_bid(account, cargo)``:
    what an account bids where a request says nothing, raises BooksUnavailable.
    """

    def __init__(
        self,
        books: Books,
        may_run: Callable[[str], bool],
        offered: Callable[[str], Collection[str]],
        secret: bytes,
        clock: Callable[[], float],
        fits: Callable[[Order, Arm, int | None], bool],
        price: Callable[[Arm], int | None],
        saved_bid: Callable[[str, str], Awaitable[int | None]],
    ) -> None:
        self._books, self._may_run, self._offered, self._secret = books, may_run, offered, secret
        self._fits, self._price, self._saved_bid = fits, price, saved_bid
        self._clock = clock
        self._active: dict[str, _Live] = {}  # by the base's name
        self._tests: dict[str, AbTest] = {}  # that have begun and not ended
        self._cached: Counter[AbArm] = Counter()
        self._seq = 0
        self._lock, self._flushing = trio.Lock(), trio.Lock()
        self.assigned = 0
        self.unfit = 0  # requests that got the base because not every arm could run them
        self.held = 0  # requests that got the base because their test stood still

    def __repr__(self) -> str:
        return f"<AbTests {len(self._active)} active, {self.assigned} assigned>"

    # ---- requests

    async def assign(self, order: Order) -> Order:
        """The order for the version of its arm where it is in a test, else as it is.

        A request that a quote has promised to an Island stays what it is. One that not every arm could run, for its bid, its policy or its
        length, is in none: it must not fail for the test, and the arms must get the same kinds of requests.
        """
        live = self._active.get(order.spec.cargo)
        if live is None or order.arm is not None or order.spec.content_hash or order.quote_id or order.spec.island:
            return order
        if self._why_held(live):
            self.held += 1
            return order
        test, plan = live.test, live.test.plan
        bid = await self._bid(order)
        if bid == _UNKNOWN or not self._fits_all(order, plan.arms, bid):
            self.unfit += 1
            return order
        unit = unit_key(self._secret, plan.unit, test.id, order.account, order.user, order.spec.job_id)
        if not is_enrolled(test.id, unit, exposure_percent(plan.ramp, test.active_ms)):
            return order
        arm = arm_of(plan, test.id, unit)
        self.assigned += 1
        chosen = _pinned(order, arm.cargo, arm.address, AbArm(test.id, arm.name, unit))
        # what is saved for the base holds for a version of another name too
        return chosen if arm.cargo == plan.base_cargo else replace(chosen, bid_micros=bid)

    async def _bid(self, order: Order) -> int | None:
        """What the order or its account says that it may cost; None: nothing; _UNKNOWN where the books are away."""
        if order.bid_micros is not None:
            return order.bid_micros
        try:
            return await self._saved_bid(order.account, order.spec.cargo)
        except BooksUnavailable:
            return _UNKNOWN

    def _fits_all(self, order: Order, arms: tuple[Arm, ...], bid: int | None) -> bool:
        is_plain = bid is None and order.spec.policy is None and not order.spec.avoid
        if is_plain and max(choice.input_chars for choice in order.spec.choices) <= PLAIN_CHARS_MAX:
            return True
        return all(self._fits(order, arm, bid) for arm in arms)

    def restored(self, order: Order, job: Job) -> Order:
        """The order of a job that another run of a Coordinator had accepted, in the arm that it had."""
        test = self._tests.get(job.ab_test) if job.ab_test else None
        arm = test.plan.arm(job.ab_arm) if test is not None else None
        if arm is None or self.unfit_of((arm,)):
            return order  # it counts for nothing any more (ab_units.counts)
        return _pinned(order, arm.cargo, arm.address, AbArm(job.ab_test, job.ab_arm, job.ab_unit))

    def note_cached(self, arm: AbArm) -> None:
        """An answer of a test came from the cache."""
        self._cached[arm] += 1

    def _why_held(self, live: _Live) -> str:
        now_s = self._clock()
        if now_s >= live.held_until_s:
            live.held, live.held_until_s = self.why_still(live.test.plan.arms), now_s + HELD_S
        return live.held

    def why_still(self, arms: tuple[Arm, ...]) -> str:
        """Why a test of these versions cannot run at the moment; empty: it can."""
        if unfit := self.unfit_of(arms):
            return unfit
        for arm in arms:
            if arm.address not in self._offered(arm.cargo):
                version = f"{arm.cargo}@{arm.release}"
                text = f"no Island offers {version} at the moment, the version of the variant {arm.name}"
                return f"{text}; archipelag-node start --cargo {version} makes one"
        prices = {arm.name: self._price(arm) or 0 for arm in arms}
        dearest = max(prices, key=prices.__getitem__)
        if prices[dearest] > PRICE_FACTOR_MAX * min(prices.values()):
            return f"the variant {dearest} costs more than {PRICE_FACTOR_MAX} times what another does, to which no Consumer has agreed"
        return ""

    def unfit_of(self, arms: tuple[Arm, ...]) -> str:
        """Which of these versions may not run any more, in words; empty: all may."""
        for arm in arms:
            if not self._may_run(arm.address):
                return f"{arm.cargo} {arm.release}, the version of the variant {arm.name}, was suspended or revoked, or its time is over"
        return ""

    # ---- keeping up

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once everything is read. Runs until cancelled; then what is counted of the cache is written down."""
        await self.refresh()
        task_status.started()
        try:
            while True:
                await trio.sleep(POLL_S)
                try:
                    await self.refresh()
                    await self.flush()
                except BooksUnavailable as error:
                    log.debug("A/B tests cannot be read at the moment: %s", error)
        finally:
            with trio.move_on_after(limits.HELLO_TIMEOUT_S, shield=True):
                await self._last_flush()

    async def _last_flush(self) -> None:
        try:
            await self.flush()
        except BooksUnavailable as error:
            log.warning("answers from the cache of the last second are not counted: %s", error)

    async def refresh(self) -> None:
        """Takes in what has changed in the database. Raises BooksUnavailable."""
        async with self._lock:
            tests, self._seq = await self._books.ask(rows.tests_after, self._seq)
            for test in tests:
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

    def active(self) -> list[AbTest]:
        """Tests that run now, as they were when they were read last."""
        return [live.test for live in self._active.values()]

    def gauges(self) -> dict[str, float]:
        """For /metrics; any thread may read them."""
        return {
            "ab_tests_active": len(self._active),
            "ab_assigned": self.assigned,
            "ab_held": self.held,
            "ab_unfit": self.unfit,
        }


def _pinned(order: Order, cargo: str, address: str, arm: AbArm | None = None) -> Order:
    """The same order for one version. In an arm its unit has cached answers of its own, so that shares of any size see the same jobs."""
    unit = f"{arm.test}/{arm.unit}" if arm is not None else ""
    cache = order.cache.pinned(cargo, address, unit) if order.cache is not None else None
    return replace(order, spec=replace(order.spec, cargo=cargo, content_hash=address), cache=cache, arm=arm)
