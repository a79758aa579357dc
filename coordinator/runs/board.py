"""The board of runs: begins them, takes over those of Coordinators that are gone, cancels and ends them.

Theory of operation. A run is a row with a sealed specification (books/runs.py). The Coordinator that owns it has a task for it, in which
its kind's *runner* decides what is next and asks for jobs; each is an order with an id that follows from the run's. When a Coordinator
dies, upkeep of another one adopts the run: the jobs that were under way there end as lost, the runner is begun again with all jobs of
the run that are in the books, and goes on from there. A job that succeeded is never run again.

Rules. While the Coordinator drains no job begins; those that run may end. A run that is left is nobody's until somebody adopts it.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import trio

from coordinator.books import run_queries
from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job
from coordinator.books.runs import AdoptRun, EndRun, OpenRun, Run, RunKind, RunState, WantRunCancel
from coordinator.jobs import Event
from coordinator.orders import Identity, Order
from privacy.sealed_rows import NONCE_BYTES, RowSealer, SealBroken
from protocol import checks, limits

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.25
_ADOPTED_AT_ONCE = 50


class Working(Protocol):
    """Whoever runs a job: the desk, or the cache in front of it."""

    async def collect(self, order: Order) -> list[Event]:
        """Raises Refused, BooksRefused or BooksUnavailable."""
        ...


class Bell:
    """Wakes all who wait for the next change."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. ``value`` is plain JSON, kept with it."""

    state: RunState
    value: Mapping[str, Any] = field(default_factory=dict)
    error_code: str = ""
    error_message: str = ""


class RunContext:
    """A run as its runner sees it. ``done``: its jobs that were in the books when it was begun here, by id, all of them ended; empty for a
    new run."""

    def __init__(self, run: Run, spec: bytes, done: Mapping[str, Job], board: RunBoard) -> None:
        self.run, self.spec, self.done, self._board = run, spec, done, board

    def __repr__(self) -> str:
        return f"<RunContext {self.run.kind} {self.run.id}>"

    async def job(self, order: Order) -> list[Event]:
        """Everything that a job of this run said. Raises Refused, BooksRefused, QuoteRefused or BooksUnavailable; waits for ever while we
        drain."""
        if self._board.draining:
            await trio.sleep_forever()
        return await self._board.worker.collect(order)

    async def outputs(self, job_ids: list[str]) -> dict[str, list[Event]]:
        """What jobs of this run have said, as far as it is kept."""
        return await self._board.outputs(job_ids)


class Runner(Protocol):
    """What one kind of run does. Runs on trio."""

    async def run(self, context: RunContext) -> RunResult:
        """To its end; it is cancelled where the account does not want it, or where we go down. Raises BooksUnavailable: it is begun again
        when the books are back."""
        ...

    async def cancelled(self, context: RunContext) -> RunResult:
        """What to keep of a run that its account has cancelled; its jobs have ended."""
        ...


@dataclass(slots=True)
class _LiveRun:
    run: Run
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class RunBoard:
    """Runs on trio; ``run`` owns the tasks. ``keep_s``: how long specification and result of a run that has ended are kept."""

    def __init__(
        self,
        books: Books,
        worker: Working,
        kept: Callable[[Job], list[Event] | None],
        sealer: RowSealer,
        me: Identity,
        clock_ms: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        keep_s: float,
        retry_window_s: float = limits.RETRY_WINDOW_S,
    ) -> None:
        self.books, self.worker, self._kept, self._sealer, self._me = books, worker, kept, sealer, me
        self._clock_ms, self._random_bytes, self._keep_s = clock_ms, random_bytes, keep_s
        self._retry_window_s = retry_window_s
        self.runners: dict[RunKind, Runner] = {}
        self._live: dict[str, _LiveRun] = {}
        self._nursery: trio.Nursery | None = None
        self.draining = False
        self.adopted = 0

    def __repr__(self) -> str:
        return f"<RunBoard {len(self._live)} running, {self.adopted} adopted>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None  # a change of the books that is on its way still ends: nothing begins behind it

    # ---- what accounts do

    async def submit(
        self,
        run_id: str,
        account: str,
        kind: RunKind,
        name: str,
        total: int,
        spec: bytes,
        *,
        fingerprint: str = "",
        is_retry: bool = False,
        origin: str = "",
    ) -> tuple[Run, bool]:
        """A run that goes on by itself from now on, and whether it is new: not where a request came again, by its id or by being a retry.

        Raises BooksRefused or BooksUnavailable.
        """
        now_ms = self._clock_ms()
        if is_retry:
            since_ms = now_ms - int(self._retry_window_s * 1000)
            earlier = await self.books.ask(run_queries.run_by_fingerprint, account, fingerprint, since_ms)
            if earlier is not None:
                return earlier, False
        run = Run(
            id=run_id,
            account=account,
            kind=kind,
            name=name,
            state=RunState.RUNNING,
            owner=self._me.owner,
            owner_boot=self._me.boot,
            created_at_ms=now_ms,
            total=total,
            fingerprint=fingerprint,
            origin=origin,
            spec=self._sealer.seal(spec, run_id, self._random_bytes(NONCE_BYTES)),
        )
        opened = await self.books.do(OpenRun(run))
        if opened is run:
            self._start(run, spec)
        return opened, opened is run

    async def find(self, run_id: str, account: str, kind: RunKind) -> Run:
        """Raises BooksRefused(NO_JOB)."""
        run = await self.books.ask(run_queries.run_of, run_id, account)
        if run is None or run.kind is not kind:
            raise BooksRefused(Why.NO_JOB, f"there is no such {kind}")
        return run

    def is_live(self, run_id: str) -> bool:
        """Whether it runs here."""
        return run_id in self._live

    async def cancel(self, run_id: str, account: str, kind: RunKind) -> Run:
        """Ends a run, here or at the Coordinator that has it; gives it as it is then. Raises BooksRefused(NO_JOB)."""
        await self.find(run_id, account, kind)
        run = await self.books.do(WantRunCancel(run_id, account))
        live = self._live.get(run_id)
        if live is not None and not run.ended:
            live.scope.cancel()
            await live.ended.wait()
        return await self.find(run_id, account, kind)

    def spec_of(self, run: Run) -> bytes:
        """Raises SealBroken; empty where it is not kept any more."""
        return self._sealer.open(run.spec, run.id) if run.spec else b""

    def result_of(self, run: Run) -> dict[str, Any]:
        """What its runner kept of it; empty before its end, and when its time is over."""
        return dict(json.loads(self._sealer.open(run.result, run.id))) if run.result else {}

    async def outputs(self, job_ids: list[str]) -> dict[str, list[Event]]:
        """What jobs have said, as far as it is kept. Raises BooksUnavailable."""
        sealed = await self.books.ask(run_queries.outputs_of, job_ids, self._clock_ms())

        def open_all() -> dict[str, list[Event]]:
            found = {}
            for job in sealed:
                events = self._kept(job)
                if events is not None:
                    found[job.id] = events
            return found

        return await trio.to_thread.run_sync(open_all) if len(sealed) > 8 else open_all()

    # ---- running

    def _start(self, run: Run, spec: bytes | None) -> None:
        """``spec``: of a new run; None for one that begins again."""
        if self._nursery is None:
            return  # we go down; whoever comes next takes it up
        live = self._live[run.id] = _LiveRun(run)
        if run.cancel_wanted:
            live.scope.cancel()
        self._nursery.start_soon(self._work, live, spec)

    async def _work(self, live: _LiveRun, spec: bytes | None) -> None:
        run, runner = live.run, self.runners[live.run.kind]
        try:
            with live.scope:
                result = await self._guarded(run, spec, True, runner.run)
            if live.scope.cancelled_caught:
                with trio.CancelScope(shield=True):
                    result = await self._guarded(run, spec, False, runner.cancelled)
            with trio.CancelScope(shield=True):
                await self._end(run, result)
        except BooksUnavailable as error:
            log.warning("%s %s rests until the books can be used: %s", run.kind, run.id, error)  # upkeep begins it again
        except BooksRefused as refused:
            log.warning("%s %s goes on elsewhere: %s", run.kind, run.id, refused)
        finally:
            del self._live[run.id]
            live.ended.set()

    async def _guarded(
        self, run: Run, spec: bytes | None, waits: bool, part: Callable[[RunContext], Awaitable[RunResult]]
    ) -> RunResult:
        """A bug ends this run, and nobody else's. ``waits``: until the jobs of an earlier life have ended."""
        try:
            if spec is not None:
                return await part(RunContext(run, spec, {}, self))
            return await part(RunContext(run, self.spec_of(run), await self._settled(run, waits), self))
        except (BooksUnavailable, BooksRefused):
            raise
        except SealBroken as error:
            log.warning("%s %s is lost: %s", run.kind, run.id, error)
            return RunResult(RunState.FAILED, {}, "run_lost", "what it was to do cannot be read any more")
        except Exception as error:
            trace = "".join(traceback.format_tb(error.__traceback__))  # no message: a foreign error's may quote the input
            log.error("%s %s: %s\n%s", run.kind, run.id, type(error).__name__, trace)
            return RunResult(RunState.FAILED, {}, "internal_error", "the Coordinator failed; its log says where")

    async def _end(self, run: Run, result: RunResult) -> None:
        value = json.dumps(result.value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        ending = EndRun(
            run.id,
            self._me.owner,
            self._me.boot,
            result.state,
            self._sealer.seal(value, run.id, self._random_bytes(NONCE_BYTES)),
            self._clock_ms() + int(self._keep_s * 1000),
            result.error_code,
            checks.made_printable(result.error_message),
        )
        await self.books.do(ending)

    # ---- what upkeep asks for

    async def tend(self, live: Mapping[str, int]) -> None:
        """Takes over the runs of Coordinators that are gone (``live``: those that are not, peer id -> boot), begins ours again that rest,
        and ends those that their accounts do not want. Raises BooksUnavailable."""
        own = await self.books.ask(run_queries.own_runs, self._me.owner, self._me.boot)
        for run_id, is_unwanted in own.items():
            if is_unwanted and run_id in self._live:
                self._live[run_id].scope.cancel()
        if self.draining:
            return
        for run_id in own.keys() - self._live.keys():
            await self._begin_again(run_id)
        for run in await self.books.ask(run_queries.orphaned_runs, live, _ADOPTED_AT_ONCE):
            try:
                await self.books.do(AdoptRun(run.id, run.owner, run.owner_boot, self._me.owner, self._me.boot))
            except BooksRefused as refused:
                log.debug("%s %s is not ours to take: %s", run.kind, run.id, refused)
                continue
            self.adopted += 1
            log.info("%s %s is taken over from a Coordinator that has gone", run.kind, run.id)
            await self._begin_again(run.id)

    async def _begin_again(self, run_id: str) -> None:
        run = await self.books.ask(run_queries.any_run, run_id)
        if run is None or run.ended or run_id in self._live or self._nursery is None:
            return
        self._start(run, None)

    async def _settled(self, run: Run, waits: bool) -> dict[str, Job]:
        """Its jobs by id that have ended. Those of a Coordinator that is gone end when upkeep has adopted them."""
        while True:
            jobs = await self.books.ask(run_queries.children_of, run.id)
            if not waits or all(job.ended for job in jobs):
                return {job.id: job for job in jobs if job.ended}
            await trio.sleep(_POLL_S)

    async def forget(self, now_ms: int) -> None:
        """Empties what has been kept long enough. Raises BooksUnavailable."""
        await self.books.change(run_queries.forget_runs, now_ms)
