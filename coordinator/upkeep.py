"""What the books need while the Coordinator runs: a sign of life, jobs of Coordinators that have gone, answers whose time is over.

Theory of operation. Coordinators that share a database tell that they live by a row each, by the database's clock. A job whose owner has
not been seen for ``DEAD_S``, or is another run of the same Coordinator by now, is taken over by whoever comes first; the books decide who
that is. A Coordinator that was only asleep finds out when it settles: the job is not its own any more. One that ends in good order says
goodbye, and what it had to leave is taken over at the next beat.

A job that the books say is ours and that nobody here runs is a *stray*: its opening or its taking over went through although we were told
that the database was away. Seen so in two rounds in a row it is run again, once, or ended; nobody else would.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

import sqlalchemy as sql
import trio

from coordinator.books import direct_queries, job_queries, market_queries, presence
from coordinator.books.ab_units import unit_of
from coordinator.books.books import Books
from coordinator.books.database import database_now_ms
from coordinator.books.direct import EndDirectJob, SettleTicket
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.jobs import Adopt, Job, JobState, Outcome, SettleJob
from coordinator.desk import Desk
from coordinator.job_board import JobBoard
from coordinator.market import MarketShell
from coordinator.runs.board import RunBoard
from coordinator.standing import Standing
from protocol import limits
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

BEAT_S = 2.0
DEAD_S = 10.0
SWEEP_S = 30.0
_JOBS_AT_ONCE = 500
_QUOTES_KEPT_MS = 3_600_000  # so long a quote that is over is told from one that never was

BRIDGE_LOST_S = limits.TICKET_LIFETIME_S + 60.0  # after its newest ticket was issued: a bridge may still say how its job ended

_SILENT_S = 2 * BEAT_S + 0.5  # who says nothing for so long does not run
_LOOK_S = 0.25

assert 3 * BEAT_S < DEAD_S, "a beat or two may be late"


async def begin_run(books: Books, network: str, salt_secret: bytes, peer: str) -> int:
    """Makes sure that these books are our network's and that nobody else keeps them by our name; the boot of this run.

    Raises ConfigError or BooksUnavailable.
    """
    await books.change(presence.claim_books, network, presence.salt_print(salt_secret))
    if not books.database.is_sqlite:  # there the data folder's lock says so
        await _wait_silent(books, peer)

    def enter(connection: sql.Connection) -> int:
        return presence.enter(connection, peer, database_now_ms(connection, books.database.is_sqlite))

    return await books.change(enter)


async def _wait_silent(books: Books, peer: str) -> None:
    """An earlier run that was killed says nothing more; one that lives is another's, who has copied our identity."""
    seen_ms = await books.ask(presence.seen_at_ms, peer)
    with trio.move_on_after(_SILENT_S):
        while await books.now_ms() - seen_ms < _SILENT_S * 1000:
            await trio.sleep(_LOOK_S)
            if await books.ask(presence.seen_at_ms, peer) > seen_ms:
                raise ConfigError(
                    f"a Coordinator with this one's identity ({peer}) runs already; each needs a data folder of its own: "
                    "delete identity.key in the copied one"
                )


class Vigil:
    """Whether we may call others dead: only who has seen the database all along may, for as long as they have to be silent.

    After an outage all others look silent, and after a jump of the database's clock too; whoever came back first would take all jobs of
    the others, which run.
    """

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._last_s, self._last_ms = 0.0, 0

    def seen(self, now_s: float, database_ms: int) -> bool:
        """At a beat, by a clock that only goes forward and by the database's."""
        passed_s = now_s - self._last_s
        off_s = abs((database_ms - self._last_ms) / 1000 - passed_s)
        if self._since_s is None or max(passed_s, off_s) > DEAD_S / 2:
            self._since_s = now_s
        self._last_s, self._last_ms = now_s, database_ms
        return now_s - self._since_s >= DEAD_S

    def lost(self) -> None:
        """The database was away."""
        self._since_s = None


class Upkeep:
    """Runs on trio."""

    def __init__(
        self,
        desk: Desk,
        board: JobBoard,
        standing: Standing,
        market: MarketShell,
        url: Callable[[], str],
        runs: RunBoard | None = None,
    ) -> None:
        self._desk, self._board, self._standing, self._market, self._url = desk, board, standing, market, url
        self._runs = runs
        self._books = desk.books
        self._healthy = True
        self._beaten_s = float("-inf")  # when the last sign of life was on disk, by trio's clock
        self._approved: set[str] = set()
        self._strays: set[str] = set()  # seen in the last round
        self._rerun: set[str] = set()  # strays that were run again
        self._vigil = Vigil()
        self.forgetting: list[Callable[[int], Awaitable[None]]] = []  # more to be done at a sweep; Unix milliseconds
        self.draining = False  # what others leave is not for us any more
        self.adopted = self.failed_over = 0

    def __repr__(self) -> str:
        return f"<Upkeep {self.adopted} adopted, {self.failed_over} of them ended>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once the first sign of life is in the books. Runs until cancelled. Raises Superseded: then we have to end."""
        await self._books.change(self._beat, trio.current_time())
        self._beaten_s = trio.current_time()
        await self._read_islands()
        task_status.started()
        sweep_s = trio.current_time()
        while True:
            try:
                await self._round(sweep=trio.current_time() >= sweep_s)
                if trio.current_time() >= sweep_s:
                    sweep_s = trio.current_time() + SWEEP_S
                self._say_health(None)
            except BooksUnavailable as error:
                self._vigil.lost()
                self._say_health(error)
            await trio.sleep(BEAT_S)

    def _say_health(self, error: BooksUnavailable | None) -> None:
        """Once for each change."""
        if error is not None and self._healthy:
            log.error("%s; requests are answered with 503 until it can be", error)
        elif error is None and not self._healthy:
            log.info("the database can be used again")
        self._healthy = error is None

    @property
    def healthy(self) -> bool:
        """Whether the database could be used a moment ago. One that just says nothing counts as gone when others count us as dead."""
        return self._healthy and trio.current_time() - self._beaten_s < DEAD_S

    async def leave(self) -> None:
        """The last word, when nothing runs here any more."""
        me = self._desk.me
        try:
            await self._books.change(presence.leave, me.owner, me.boot)
        except BooksUnavailable as error:
            log.warning("no goodbye: %s", error)

    async def _round(self, sweep: bool) -> None:
        live = await self._books.change(self._beat, trio.current_time())
        self._beaten_s = trio.current_time()
        if not self.draining:
            for job in await self._books.ask(job_queries.orphaned_jobs, live, _JOBS_AT_ONCE):
                if job.id not in self._desk.live:  # taken from us while we slept: that run has still to find out
                    await self._adopt(job)
        await self._tend_own()
        if self._runs is not None:
            await self._runs.tend(live)
        if sweep:
            await self._sweep(live)
        await self._desk.settle_again()

    def _beat(self, connection: sql.Connection, now_s: float) -> dict[str, int]:
        """Tells that we live; who else does, as far as we can judge."""
        me, now_ms = self._desk.me, database_now_ms(connection, self._books.database.is_sqlite)
        presence.beat(connection, me.owner, me.boot, self._url(), now_ms)
        # whoever has not said goodbye, where we cannot judge
        return presence.live_coordinators(connection, now_ms - int(DEAD_S * 1000) if self._vigil.seen(now_s, now_ms) else 1)

    async def _adopt(self, job: Job) -> None:
        me = self._desk.me
        try:
            job = await self._books.do(Adopt(job.id, job.account, job.owner, job.owner_boot, me.owner, me.boot))
        except BooksRefused as refused:
            log.debug("job %s is not ours to take: %s", job.id, refused)
            return
        self.adopted += 1
        if job.state is JobState.SUBMITTED:
            log.info("job %s is taken over from a Coordinator that has gone, try %d", job.id, job.tries)
            await self._resume(job)
        else:
            self.failed_over += 1

    async def _resume(self, job: Job) -> None:
        quote = await self._market.promised(job.quote_id) if job.quote_id else None
        if not self._board.resume(job, quote):
            await self._end(job, Outcome(JobState.FAILED, error_code="coordinator_lost", error_message="it could not be run again"))

    async def _tend_own(self) -> None:
        """Ends our jobs that their accounts do not want any more, and finds strays."""
        me = self._desk.me
        own = await self._books.ask(job_queries.own_jobs, me.owner, me.boot)
        for job_id in (job_id for job_id, is_unwanted in own.items() if is_unwanted):
            self._desk.cancel(job_id)
        strays = own.keys() - self._desk.live.keys() - self._desk.unsettled
        for job_id in sorted(strays & self._strays):
            await self._take_up(job_id)
        self._strays, self._rerun = strays, self._rerun & own.keys()

    async def _take_up(self, job_id: str) -> None:
        job = await self._books.ask(job_queries.open_job, job_id)
        if job is None or job_id in self._desk.live:
            return
        if job.can_rerun and not job.cancel_wanted and job_id not in self._rerun:
            log.warning("job %s is ours and nobody runs it; it is begun again", job_id)
            self._rerun.add(job_id)
            await self._resume(job)
            return
        state = JobState.CANCELLED if job.cancel_wanted else JobState.FAILED
        await self._end(job, Outcome(state, error_code="books_unavailable", error_message="the database was away when it began"))

    async def _end(self, job: Job, outcome: Outcome) -> None:
        """A job that nobody runs; its hold is released."""
        try:
            await self._books.do(SettleJob(job.id, job.account, job.cargo, job.owner, job.owner_boot, outcome, unit=unit_of(job)))
        except BooksRefused as refused:
            log.debug("job %s has been settled meanwhile: %s", job.id, refused)

    async def _read_islands(self) -> None:
        """What the books say of Islands, for placement and market: pairing, approval and karma change by other hands too."""
        records = await self._books.ask(job_queries.island_records)
        self._standing.set_karma({record.peer: record.karma_milli for record in records})
        approved = {record.peer for record in records if record.approved}
        for peer in approved - self._approved:
            self._standing.approve(peer)
        for peer in self._approved - approved:
            self._standing.disapprove(peer)
        self._approved = approved
        self._market.owners = {record.peer: record.account for record in records if record.account}

    async def _sweep(self, live: Mapping[str, int]) -> None:
        await self._read_islands()
        now_ms = await self._books.now_ms()
        await self._books.change(market_queries.forget_quotes, now_ms - _QUOTES_KEPT_MS)
        await self._books.change(job_queries.forget_results, now_ms)
        if self._runs is not None:
            await self._runs.forget(now_ms)
        for forget in self.forgetting:
            await forget(now_ms)
        await self._books.change(job_queries.forget_requests, now_ms)
        for job in await self._books.ask(job_queries.expired_holds, now_ms, _JOBS_AT_ONCE):
            if live.get(job.owner) != job.owner_boot:  # whoever lives settles his own, whatever a clock that jumped says
                await self._end(job, Outcome(JobState.FAILED, error_code="expired", error_message="nobody settled it in time"))
        await self._free_tickets(now_ms)
        await self._end_lost(now_ms)

    async def _free_tickets(self, now_ms: int) -> None:
        """Of the direct path: nobody has come for them, and nobody may any more."""
        for record in await self._books.ask(direct_queries.expired_tickets, now_ms, _JOBS_AT_ONCE):
            freeing = SettleTicket(record.id, record.job_id, record.account, record.cargo, (), 0, 0, succeeded=False)
            try:
                await self._books.do_all(freeing, EndDirectJob(record.job_id, record.account, "", JobState.FAILED, "expired"))
            except BooksRefused as refused:
                log.warning("ticket %s is over and was not freed: %s", record.id, refused)

    async def _end_lost(self, now_ms: int) -> None:
        """Of the direct path: jobs whose Islands have been paid and whose bridge has gone without a word."""
        before_ms = now_ms - int(BRIDGE_LOST_S * 1000)
        for job in await self._books.ask(direct_queries.lost_jobs, before_ms, _JOBS_AT_ONCE):
            text = "its bridge went away without saying how it ended"
            try:
                await self._books.do(EndDirectJob(job.id, job.account, "", JobState.FAILED, "bridge_lost", text))
            except BooksRefused as refused:
                log.warning("job %s has lost its bridge and was not ended: %s", job.id, refused)
