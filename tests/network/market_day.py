"""A seeded discrete-event simulator of one day of the market: Islands that join and leave, jobs that bid, wait, run, fail and are paid.

Theory of operation. What decides is the code that runs in production: bids and rates (coordinator/exchange), facts and choice (columns,
matching), standing, affinity, charges, and the operations of the books, so every job has its hold, its chain of transfers and its karma.
What is modelled is the world outside: ``market_trace`` says who comes when, ``market_island`` how fast Islands compute. Time is a number
and events are a heap. Only the way of choosing an Island differs from run to run (``market_places``).

Rules as in production: a job whose Island fails goes on elsewhere behind its tokens, a second failure ends it; chats wait for
CAPACITY_WAIT_S, submitted jobs as long as they may run; a chat that no Island would do for its bid is refused at once. An Island that
drains has DRAIN_S; one that crashes is given jobs until somebody notices. Once in the day the Coordinator is replaced by another, which
adopts its open jobs; what the old one says afterwards the books have to refuse.

Different from production: the line is settled at the very moment when a cooling is over instead of within PLACE_RETRY_S, an Island with a
free slot never says that it is full, and nothing takes time but Islands and notices.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coordinator.affinity import Affinity
from coordinator.books.accounts import ISLANDS, CreateAccount, IslandRecord, PairIsland, SetPublisher
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import Adopt, Earned, Job, JobState, OpenJob, Outcome, SettleJob, StartJob
from coordinator.columns import Candidate, Columns, Known
from coordinator.dispatch import Verdict, verdict
from coordinator.exchange.amounts import ONE_PPM, scaled_ask
from coordinator.exchange.bids import AskPrices, Bid, BidSource, StandingAsk, Work, resolve_bid
from coordinator.exchange.hardware import suggested_ask
from coordinator.exchange.markets import Markets
from coordinator.exchange.quotes import charge
from coordinator.exchange.rates import Clearing
from coordinator.exchange.snapshots import SNAPSHOT_INTERVAL_MS, Facts, Snapshot, slot_end, take_snapshot
from coordinator.market import UNKNOWN_BID_MICROS
from coordinator.matching import Refusal
from coordinator.placement import MEASURED_STEP, PRIORITY_PER_WAITED_S
from coordinator.standing import Standing
from coordinator.upkeep import SWEEP_S
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask
from tests.network.market_books import DayBooks
from tests.network.market_figures import End, Figures, Tally
from tests.network.market_island import Run, Site, offer_of, wish_of
from tests.network.market_places import PICKERS, Line, Prices, Waiter, is_full
from tests.network.market_trace import CARGOS, IslandPlan, JobPlan, Session, Trace

MIDNIGHT_MS = 20_000 * 86_400_000  # UTC; it is in the middle of the day, so that the daily refill comes then
REPLACED_AT = 0.55  # when on the day another Coordinator takes over
HOLD_MS = 3 * 3_600_000
OWNER = "coordinator"
_EVERYTHING = 2**60  # the books cut a bid to what the account has
_SLOT_S = SNAPSHOT_INTERVAL_MS / 1000


class Day:
    """One day by one way of placing jobs; ``run`` is for once."""

    def __init__(self, trace: Trace, policy: str, books: DayBooks | None = None) -> None:
        self.trace, self.policy = trace, policy
        self.books = books if books is not None else DayBooks()
        self.tally = Tally(len(trace.jobs))
        self.now_s = 0.0
        self._start_ms = slot_end(MIDNIGHT_MS - int(trace.config.day_s * 500))
        self.markets, self.standing, self.affinity = Markets(), Standing(), Affinity(bytes(32))
        self.snapshots: list[Snapshot] = []
        self.lines: list[Line[Run]] = [Line() for _ in CARGOS]
        self.facts = [Columns(kind.name) for kind in CARGOS]
        self._prices = Prices(self.facts)
        self.sites = {plan.peer: Site(plan, offer_of(plan)) for plan in trace.islands}
        self.runs: dict[int, Run] = {}
        self.owed_micros = self.cleared = self.adopted = self.late_words_refused = 0
        self._boot = 1
        self._versions = [0 for _ in CARGOS]  # of rows and asks in the columns
        self._pick = PICKERS[policy]
        self._rng = random.Random(f"{trace.config.seed} {policy}")
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._event = 0
        self._clearings: list[Clearing] = []  # since the last snapshot
        self._owners: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Day by {self.policy}: {self.now_s:.0f} s, {len(self.runs)} jobs open>"

    def run(self) -> Figures:
        """The whole day, until its last job has ended and is in the market's history."""
        self._begin()
        events, jobs = self._events, self.trace.jobs
        for number, at_s in enumerate(jobs.at_s):
            while events[0][0] <= at_s:
                self._step()
            self.now_s = at_s
            self._arrive(jobs[number])
        while self.runs or self._clearings:
            self._step()
        sites = list(self.sites.values())
        islands = self.books.all_of(ISLANDS)
        return self.tally.figures(self.policy, sites, [islands[site.plan.peer].earned_micros for site in sites])

    @property
    def now_ms(self) -> int:
        return self._start_ms + int(self.now_s * 1000)

    def _at(self, time_s: float, event: Callable[..., None], *arguments: Any) -> None:
        self._event += 1
        heapq.heappush(self._events, (time_s, self._event, event, arguments))

    def _step(self) -> None:
        self.now_s, _, event, arguments = heapq.heappop(self._events)
        event(*arguments)

    def _begin(self) -> None:
        books, now_ms = self.books, self.now_ms
        for number in range(self.trace.config.accounts):
            books.do(CreateAccount(account_name(number)), now_ms)
        for kind in CARGOS:
            if kind.publisher_ppm:
                books.do(CreateAccount(f"publisher-{kind.name}", grant_micros=0), now_ms)
                books.do(SetPublisher(kind.name, f"publisher-{kind.name}", kind.publisher_ppm), now_ms)
        plans = self.trace.islands
        books.start_with([IslandRecord(plan.peer, karma_milli=plan.karma_milli, first_seen_ms=now_ms) for plan in plans])
        for plan in plans:
            if plan.owner >= 0:
                self._at(plan.paired_s, self._pair, plan)
            for session in plan.sessions:
                self._at(session.start_s, self._join, self.sites[plan.peer], session)
        self._at(self.trace.config.day_s * REPLACED_AT, self._replace_coordinator)
        self._at(_SLOT_S, self._snapshot)
        self._at(0.0, self._sweep)

    # -- Islands come and go

    def _pair(self, plan: IslandPlan) -> None:
        self.books.do(PairIsland(plan.peer, account_name(plan.owner)), self.now_ms)

    def _join(self, site: Site, session: Session) -> None:
        if site.is_listed:
            self._vanish(site)  # nobody has noticed yet that it had gone
        site.advance(self.now_s)
        site.is_alive, site.visit = True, site.visit + 1
        site.prefixes.clear()
        self._list(site)
        for death in session.deaths:
            self._at(death.at_s, self._worker_dies, site, site.visit, death.restart_s)
        for at_s, factor in session.reprices:
            self._at(at_s, self._reprice, site, site.visit, factor)
        if session.end_s < self.trace.config.day_s:
            self._at(session.end_s, self._crash if session.crashes else self._drain, site, session)

    def _list(self, site: Site) -> None:
        """A new ad."""
        plan, facts = site.plan, self.facts[site.plan.cargo]
        self._versions[plan.cargo] += 1
        site.sequence = max(site.sequence + 1, self.now_ms)
        busy = len(site.runs), site.busy_kv()
        facts.put(Candidate(plan.peer, site.visit, site.sequence, site.drains, site.offer, *busy), self._known(site, 0.0))
        if not site.is_listed:
            site.is_listed = True
            facts.set_round_trips({peer: self.sites[peer].plan.round_trip_s for peer in facts.islands})
        self._settle(plan.cargo)

    def _known(self, site: Site, measured_before: float) -> Known:
        """As ``Placer`` knows it."""
        peer, offer, standing = site.plan.peer, site.offer, self.standing
        measured = standing.tokens_per_s(peer, offer.name, self.now_s)
        if abs(measured - measured_before) <= MEASURED_STEP * measured_before:
            measured = measured_before
        return Known(
            region=site.plan.region,
            memory_offered_bytes=(offer.weights_bytes + offer.kv_tokens_total * offer.kv_bytes_per_token) * 5 // 4,
            memory_other_bytes=offer.weights_bytes,
            measured_tokens_per_s=measured,
            cool_until_s=standing.cool_until_s(peer),
            karma_milli=standing.karma_milli(peer),
        )

    def _read_standing(self) -> None:
        for peer in self.standing.take_changed():
            site = self.sites[peer]
            if site.is_listed:
                facts = self.facts[site.plan.cargo]
                before = facts.known(facts.row_of(peer))
                known = self._known(site, before.measured_tokens_per_s)
                if known != before:
                    facts.know(peer, known)

    def _unlist(self, site: Site) -> None:
        if site.is_listed:
            site.is_listed = False
            self._versions[site.plan.cargo] += 1
            self.facts[site.plan.cargo].drop(site.plan.peer)

    def _is_up(self, site: Site, visit: int) -> bool:
        return site.visit == visit and site.is_alive and not site.drains

    def _reprice(self, site: Site, visit: int, factor: float) -> None:
        """Asks anew: what the exchange suggests, or what it always did, times a mood."""
        if not self._is_up(site, visit):
            return
        rate = self.markets.rate(site.offer.name, self.now_ms)
        ask = suggested_ask(rate, site.plan.tier) if rate is not None and site.plan.follows else site.plan.ask
        site.offer = replace(site.offer, ask=scaled_ask(ask, int(factor * ONE_PPM)))
        if site.is_listed:
            self._list(site)

    def _drain(self, site: Site, session: Session) -> None:
        site.drains = True
        if site.is_listed:
            self._list(site)
        self._at(self.now_s + limits.DRAIN_S, self._leave, site, site.visit)

    def _leave(self, site: Site, visit: int) -> None:
        if site.visit == visit and site.is_alive:
            self._vanish(site)

    def _crash(self, site: Site, session: Session) -> None:
        """Its plug is pulled: nothing more comes from it, and nobody knows."""
        site.advance(self.now_s)
        site.is_alive = False
        site.version += 1
        self._at(self.now_s + session.notice_s, self._notice, site, site.visit)

    def _notice(self, site: Site, visit: int) -> None:
        if site.visit == visit:
            self._vanish(site)

    def _vanish(self, site: Site) -> None:
        """It is out of the book, its jobs have lost it."""
        site.advance(self.now_s)
        site.is_alive = site.drains = False
        self._lose(site, Code.LINK_LOST)

    def _worker_dies(self, site: Site, visit: int, restart_s: float) -> None:
        """All its jobs fail; the Island takes its offer back until there is another worker."""
        if not self._is_up(site, visit) or not site.is_listed:
            return
        site.advance(self.now_s)
        site.prefixes.clear()
        self._at(self.now_s + restart_s, self._restart, site, visit)
        self._lose(site, Code.WORKER_DIED)

    def _restart(self, site: Site, visit: int) -> None:
        if self._is_up(site, visit):
            self._list(site)

    def _lose(self, site: Site, code: Code) -> None:
        self._unlist(site)
        lost, site.runs = site.runs, []
        site.version += 1
        for run in lost:
            self._judge(run, site, code)
        self._settle(site.plan.cargo)

    def _judge(self, run: Run, site: Site, code: Code) -> None:
        """Its Island has failed: elsewhere, or not at all. As ``Dispatcher`` judges."""
        peer = site.plan.peer
        run.delivered += site.tokens_of(run)
        run.failed.append(peer)
        self.tally.failures += 1
        self.standing.failed(peer, self.now_s)
        self._at(self.standing.cool_until_s(peer), self._settle, site.plan.cargo)
        if verdict(code, len(run.failed), run.attempts) is not Verdict.ELSEWHERE:
            self._fail(run, End.LOST)
            return
        self.tally.requeue(run.plan.number)
        run.wish = replace(run.wish, excluded={**run.wish.excluded, peer: max(run.sequence, site.sequence)})
        if run.delivered and not run.wish.content_hash:
            run.wish = replace(run.wish, content_hash=site.offer.content_hash, engine=site.offer.engine)
        self._place(run)

    # -- jobs: bid, hold, place

    def _arrive(self, plan: JobPlan) -> None:
        bid, floor = self._bid(plan, Work(plan.prompt_tokens, plan.max_tokens))
        self.tally.bid(plan.number, bid.source)
        try:
            job = self.books.do(OpenJob(self._job(plan, bid), self.now_ms + HOLD_MS, floor), self.now_ms)
        except BooksRefused as refused:
            if refused.why is not Why.NO_CREDIT:
                raise
            self.tally.end(plan.number, End.NO_CREDIT, 0.0)
            return
        chain = self.affinity.chain(b"", job.cargo, (("user", str(plan.conversation)),))
        run = Run(plan, job, wish_of(plan, job, self.affinity.find(chain)), chain, self.now_s)
        self.runs[plan.number] = run
        self._place(run)

    def _job(self, plan: JobPlan, bid: Bid) -> Job:
        return Job(
            id=f"j{plan.number}",
            account=account_name(plan.account),
            cargo=CARGOS[plan.cargo].name,
            kind="job" if plan.waits else "chat",
            state=JobState.SUBMITTED,
            priority=plan.priority,
            bid_micros=bid.micros,
            bid_source=bid.source.value,
            owner=OWNER,
            owner_boot=self._boot,
            created_at_ms=self.now_ms,
            can_rerun=plan.waits,
        )

    def _bid(self, plan: JobPlan, work: Work) -> tuple[Bid, int | None]:
        """As ``MarketShell`` bids; what Islands ask is looked at only where it makes a difference."""
        kind = CARGOS[plan.cargo]
        usual = Ask(per_1k_output=kind.ask_per_1k)
        saved = self.trace.saved_factor.get(plan.account)
        if plan.bid_factor:
            return Bid(int(work.price_max(usual, 0.0) * plan.bid_factor), BidSource.EXPLICIT), None
        if saved is not None:
            return Bid(int(usual.price(limits.COMPLETION_TOKENS_DEFAULT, 0) * saved), BidSource.SAVED), None
        there = self._prices.price_range(kind.name, work.prompt_tokens, work.output_tokens, work.job_s_max)
        prices = AskPrices(there.cheapest, there.median)
        market = self.markets.market(kind.name, None, len(self.lines[plan.cargo]), there.slots, self.now_ms)
        bid = resolve_bid(work, market, prices, available_micros=_EVERYTHING)
        if bid is None:
            return Bid(UNKNOWN_BID_MICROS, BidSource.DEFAULT), 0
        return bid, min(prices.cheapest if prices.cheapest is not None else bid.micros, bid.micros)

    def _place(self, run: Run) -> None:
        """A place now, or one in the line. As ``Placer.place``."""
        line = self.lines[run.plan.cargo]
        waiter = Waiter(run, run.wish, self.now_s * PRIORITY_PER_WAITED_S - run.wish.priority, self.now_s)
        if not line.waiters:
            waiter.refusal = refusal = self._take(waiter)
            if refusal is None:
                return
            if refusal.by_price and not run.wish.waits_for_price:
                self._fail(run, End.PRICE)
                return
        if sum(map(len, self.lines)) >= limits.WAITING_JOBS_MAX:
            self._fail(run, End.GAVE_UP)
            return
        line.add(waiter)
        self._settle(run.plan.cargo)
        if waiter.is_here:
            self._wait(waiter)

    def _wait(self, waiter: Waiter[Run]) -> None:
        due_s = self.now_s + limits.PLACE_RETRY_S  # where it was not tried: so many are before it
        if waiter.refusal is not None:
            due_s = waiter.since_s + self._patience_s(waiter, waiter.refusal)
        self._at(due_s, self._wait_on, waiter)

    def _wait_on(self, waiter: Waiter[Run]) -> None:
        """Its patience may be at an end; then it looks once more."""
        if waiter.is_here:
            self._settle(waiter.job.plan.cargo)
        refusal = waiter.refusal
        if not waiter.is_here:
            return
        if refusal is None or self.now_s < waiter.since_s + self._patience_s(waiter, refusal):
            self._wait(waiter)
        else:
            self._give_up(waiter, refusal)

    def _patience_s(self, waiter: Waiter[Run], refusal: Refusal) -> float:
        if waiter.job.plan.waits:
            return max(0.0, waiter.job.deadline_s - waiter.since_s)
        return limits.CAPACITY_WAIT_S if is_full(refusal) else limits.ISLAND_WAIT_S

    def _give_up(self, waiter: Waiter[Run], refusal: Refusal) -> None:
        self.lines[waiter.job.plan.cargo].leave(waiter)
        self._fail(waiter.job, End.PRICE if refusal.by_price else End.GAVE_UP)

    def _settle(self, cargo: int) -> None:
        line = self.lines[cargo]
        if not line.waiters:
            return
        self._read_standing()
        for waiter, refusal in line.settle(self.facts[cargo], self._versions[cargo], self._take):
            if not waiter.wish.waits_for_price:
                self._give_up(waiter, refusal)

    def _take(self, waiter: Waiter[Run]) -> Refusal | None:
        """A place for the job now, or why there is none."""
        self._read_standing()
        run, facts = waiter.job, self.facts[waiter.job.plan.cargo]
        outcome = self._pick(facts, waiter.wish, self.now_s, self._rng)
        if isinstance(outcome, Refusal):
            if outcome.code is Code.UNKNOWN_CARGO:  # there are Islands with it on every day: one may be on its way
                return Refusal(Code.NO_ISLAND, outcome.message)
            return outcome
        site, run.placed_s = self.sites[outcome.island], self.now_s
        site.begin(run, outcome.sequence)
        self._changed(site)
        self.tally.start(run.plan.number, self.now_s - run.plan.at_s)
        if run.plan.waits:
            self.books.do(StartJob(run.job.id, OWNER, self._boot, site.placed()), self.now_ms)
        return None

    def _changed(self, site: Site) -> None:
        """A job came or went there."""
        if site.is_listed:
            self.facts[site.plan.cargo].set_busy(site.plan.peer, len(site.runs), site.busy_kv())
        site.version += 1
        if site.runs and site.is_alive:
            self._at(max(self.now_s, site.next_end_s()), self._end_next, site, site.version)

    # -- jobs: end

    def _end_next(self, site: Site, version: int) -> None:
        if version != site.version:
            return  # something came between
        site.advance(self.now_s)
        run, is_late = site.take_ended()
        if is_late:
            self._fail(run, End.TOO_SLOW)
        else:
            self._pay(run, site)
        self._changed(site)
        self._settle(site.plan.cargo)

    def _pay(self, run: Run, site: Site) -> None:
        """It has ended well, or its Consumer has left. As ``charging`` reckons, with an honest receipt for what was done here."""
        elapsed_ms = int((self.now_s - run.placed_s) * 1000) + 1
        here = run.tokens_left
        run.delivered += here
        if run.is_cancelled:
            amount = min(run.ask.price(run.delivered, elapsed_ms), run.job.bid_micros) if run.delivered else 0
        else:
            amount = charge(run.ask, run.job.bid_micros, run.delivered, elapsed_ms, run.ask.price(here, elapsed_ms))
        earned = Earned(site.plan.peer, amount, elapsed_ms)
        state = JobState.CANCELLED if run.is_cancelled else JobState.SUCCEEDED
        outcome = Outcome(state, run.plan.prompt_tokens, run.delivered, elapsed_ms, placed=site.placed())
        settled = self._end(run, outcome, (earned,) if run.delivered else ())
        end = End.CANCELLED if run.is_cancelled else End.SERVED
        self.tally.end(run.plan.number, end, self.now_s - run.plan.at_s, settled.price_micros, run.delivered)
        site.remember(run.plan.conversation)
        if not run.is_cancelled:
            self._learn(run, site, here, Clearing(run.job.cargo, self.now_ms, run.ask, amount, run.delivered, elapsed_ms))

    def _learn(self, run: Run, site: Site, here: int, clearing: Clearing) -> None:
        peer = site.plan.peer
        decode_us = int(1e6 * (self.now_s - run.placed_s) * here / max(1.0, here + run.prefill))
        self.standing.served(peer, run.job.cargo, here, decode_us, self.now_s)
        self.affinity.served(run.chain, peer)
        if self._owners.get(peer) != run.job.account:
            self.markets.add(clearing)
            self._clearings.append(clearing)
            self.cleared += 1

    def _fail(self, run: Run, end: End) -> None:
        self._end(run, Outcome(JobState.FAILED, error_code=end.name.lower()), ())
        self.tally.end(run.plan.number, end, self.now_s - run.plan.at_s)

    def _end(self, run: Run, outcome: Outcome, earned: tuple[Earned, ...]) -> Job:
        job = run.job
        for each in earned:
            cut = each.amount * CARGOS[run.plan.cargo].publisher_ppm // ONE_PPM
            is_own = self.books.all_of(ISLANDS)[each.island].account == job.account
            self.owed_micros += cut if is_own else each.amount
        settling = SettleJob(job.id, job.account, job.cargo, OWNER, self._boot, outcome, earned, tuple(run.failed))
        settled = self.books.do(settling, self.now_ms)
        del self.runs[run.plan.number]
        return settled

    # -- beside the jobs

    def _replace_coordinator(self) -> None:
        """The Coordinator is gone, another takes over. Streams end: chats have failed, submitted jobs run again. What it had seen of
        Islands is forgotten, the market's window is read from the books."""
        old, self._boot = self._boot, self._boot + 1
        self.standing, self.affinity = Standing(), Affinity(bytes([1]) * 32)
        self._read_islands()
        for line in self.lines:
            line.clear()
        for site in self.sites.values():
            site.advance(self.now_s)
            site.runs, site.version = [], site.version + 1
            if site.is_listed:
                self._list(site)
        for run in list(self.runs.values()):
            self._adopt(run, old)

    def _adopt(self, run: Run, old_boot: int) -> None:
        job, number = run.job, run.plan.number
        adopted = self.books.do(Adopt(job.id, job.account, OWNER, old_boot, OWNER, self._boot), self.now_ms)
        self.adopted += 1
        self._late_word(job, old_boot)
        if adopted.state is not JobState.SUBMITTED:
            del self.runs[number]
            self.tally.end(number, End.REPLACED, self.now_s - run.plan.at_s)
            return
        self.tally.requeue(number)
        self.runs[number] = again = Run(run.plan, adopted, wish_of(run.plan, adopted, ""), run.chain, self.now_s)
        self._place(again)

    def _late_word(self, job: Job, old_boot: int) -> None:
        """The old one was only asleep, and says that the job went well."""
        earned = Earned(self.trace.islands[0].peer, job.bid_micros, 1)
        late = SettleJob(job.id, job.account, job.cargo, OWNER, old_boot, Outcome(JobState.SUCCEEDED), (earned,))
        try:
            self.books.do(late, self.now_ms)
        except BooksRefused as refused:
            self.late_words_refused += refused.why in (Why.NOT_OWNER, Why.NO_JOB)

    def _sweep(self) -> None:
        self._read_islands()
        self._at(self.now_s + SWEEP_S, self._sweep)

    def _read_islands(self) -> None:
        """What the books say of Islands reaches placement and market, as upkeep brings it."""
        islands = self.books.all_of(ISLANDS)
        self.standing.set_karma({peer: record.karma_milli for peer, record in islands.items()})
        self._owners = {peer: record.account for peer, record in islands.items() if record.account}

    def _snapshot(self) -> None:
        over = [clearing for clearing in self._clearings if clearing.at_ms < self.now_ms]
        self._clearings = self._clearings[len(over) :]
        for cargo, kind in enumerate(CARGOS):
            self.snapshots.append(take_snapshot(kind.name, self.now_ms, self._facts_now(cargo), over))
        self.tally.sample(self.sites.values(), self.now_s)
        self._at(self.now_s + _SLOT_S, self._snapshot)

    def _facts_now(self, cargo: int) -> Facts:
        name, line, book = CARGOS[cargo].name, self.lines[cargo], self.facts[cargo].order_book()
        asks = [StandingAsk(peer, ask, speed, total) for peer, ask, speed, _, total in book]
        slots = sum(standing.slots for standing in asks)
        return Facts(
            asks=asks,
            bids=[waiter.wish.price_max_micros or 0 for waiter in line.waiters],
            running=sum(total - free for _, _, _, free, total in book),
            rate=self.markets.rate(name, self.now_ms),
            tokens_per_s=self.markets.tokens_per_s(name, self.now_ms),
            surge=self.markets.surge(name, len(line), slots, self.now_ms).active,
        )

    def audit(self) -> list[str]:
        """What does not add up after ``run``: in the books, and between them, the simulator's own count and the market's history."""
        found, charged = self.books.audit(), self.books.charged_micros()
        recorded = sum(each.jobs_cleared for each in self.snapshots)
        for what, amount, expected in (
            ("micro-credits were charged and owed", charged, self.owed_micros),
            ("micro-credits were charged and are the prices of jobs", charged, self.tally.paid_micros),
            ("micro-credits are there in all and should be", sum(self.books.totals().values()), 0),
            ("jobs are in the market's history and cleared", recorded, self.cleared),
            ("jobs have not ended once and should", self.tally.ended_otherwise(), 0),
            ("late words of a Coordinator that was replaced were refused and said", self.late_words_refused, self.adopted),
        ):
            if amount != expected:
                found.append(f"{amount} / {expected} {what}")
        return found


def account_name(number: int) -> str:
    return f"account-{number}"
