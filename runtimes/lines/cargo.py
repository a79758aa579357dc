"""The node's side of a Cargo of lines: jobs over one or more lanes, each a worker process that runs one job at a time.

    async with open_line_cargo(LineKind(…), order, lanes=…) as cargo:
        async with cargo.run_lines(request) as run:
            async for line in run: ...

Lines come as the Cargo writes them; one that writes faster than they are read waits. Its ``done`` is handed out only when it has ended
well, so a run that gave a ``done`` is a good one. Every failure is a Refused: cargo_failed where the Cargo is at fault (by its own word, by
what it wrote, or since it took too long or too much), bad_input, worker_died, no_capacity.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from protocol import checks, limits
from protocol.cargo_io import ErrorLine, Line, LineReader, OutputLimits, decode_input
from protocol.errors import Code, ConfigError, LocalProtocolError, Refused, RemoteProtocolError
from runtimes.base import CargoFacts, LineRequest
from runtimes.error_groups import only_error
from runtimes.lines.engine import LoadOrder
from runtimes.lines.messages import Cancel, Ended, Load, Outcome, Output, PlacedFile, Run, Taken
from runtimes.lines.process import Lane, Start

_GIVE_BACK_BYTES = limits.LINE_WINDOW_BYTES // 2
_CONTEXT_TOKENS = 2**22  # no bound of its own; inputs and outputs are bounded by their bytes
_CODES = {Outcome.BAD_INPUT: Code.BAD_INPUT}  # who was interrupted by us is not heard any more; by whom else it was, is its own fault


@dataclass(frozen=True, slots=True)
class LineLimits:
    """Of one job. ``fuel``: of runtimes that count instructions; 0 elsewhere."""

    timeout_s: float
    output_bytes: int = limits.CARGO_OUTPUT_BYTES_DEFAULT
    fuel: int = 0

    def __post_init__(self) -> None:
        checks.in_range("timeout_s", self.timeout_s, 0.001, limits.CARGO_TIME_S_MAX)
        checks.in_range("output_bytes", self.output_bytes, 1, limits.CARGO_OUTPUT_BYTES_MAX)
        checks.in_range("fuel", self.fuel, 0, limits.WASM_FUEL_MAX)


@dataclass(frozen=True, slots=True)
class LineKind:
    """What all Cargos of a runtime have in common. ``load_s``: how long loading may take; None: LINE_LOAD_TIMEOUT_S."""

    runtime: str
    start: Start
    load_s: float | None = None


@dataclass(eq=False)
class WorkerRun:
    """A running job: iterate it once. ``fuel_used`` and ``stderr`` (its beginning) are known at the end."""

    number: int
    lane: Lane
    reader: LineReader
    timeout_s: float
    changed: trio.Event = field(default_factory=trio.Event)
    lines: deque[Line] = field(default_factory=deque)
    untold_bytes: int = 0  # read, and not yet given back to the worker
    is_over: bool = False
    refusal: Refused | None = None
    fuel_used: int = 0
    stderr: bytes = b""

    def __repr__(self) -> str:
        state = "failed" if self.refusal else "over" if self.is_over else "running"
        return f"<WorkerRun {self.number} {state}, {len(self.lines)} lines waiting>"

    async def __aiter__(self) -> AsyncIterator[Line]:
        while True:
            while self.lines:
                line = self.lines.popleft()
                self._give_back()
                yield line
            if self.refusal is not None:
                raise self.refusal
            if self.is_over:
                return
            self.changed = trio.Event()
            await self.changed.wait()

    def _give_back(self) -> None:
        """Lets the worker send more, once nothing waits here."""
        if not self.lines and not self.is_over and self.untold_bytes >= _GIVE_BACK_BYTES:
            self.lane.send_nowait(Taken(self.number, self.untold_bytes))
            self.untold_bytes = 0

    def hear(self, data: bytes) -> None:
        """The next bytes of the output."""
        if self.untold_bytes + len(data) > limits.LINE_WINDOW_BYTES:  # a worker of ours waits; else it would fill our memory
            self.fail(Refused(Code.CARGO_FAILED, f"it wrote more than {limits.LINE_WINDOW_BYTES} bytes before it was taken"))
            return
        try:
            lines = self.reader.feed(data)
        except RemoteProtocolError as error:
            self.fail(Refused(Code.CARGO_FAILED, str(error)))
            return
        self.untold_bytes += len(data)
        self.lines.extend(line for line in lines if line is not self.reader.last)
        self._give_back()
        if self.lines:
            self.changed.set()

    def hear_end(self, message: Ended) -> None:
        text = checks.made_printable(message.message)  # the worker's word, which is not to be trusted
        self.fuel_used, self.stderr = message.fuel_used, bytes(message.stderr)
        try:
            if message.outcome is Outcome.EXITED:
                self.reader.finish()
            last = self.reader.last
            is_good = message.outcome is Outcome.EXITED and message.exit_code == 0
            if isinstance(last, ErrorLine):  # after its own error a Cargo may end as it likes
                self.fail(Refused(Code.CARGO_FAILED, last.message))
                return
            if last is None or not is_good:
                raise RemoteProtocolError(text or "it ended before it was done, and did not say why")
            self.lines.append(last)
            self.finish()
        except RemoteProtocolError as error:
            code = _CODES.get(message.outcome, Code.CARGO_FAILED)
            self.fail(Refused(code, text or str(error)))

    def fail(self, refusal: Refused) -> None:
        self.refusal = self.refusal or refusal
        self.finish()

    def finish(self) -> None:
        self.is_over = True
        self.changed.set()


@dataclass(eq=False, slots=True)
class _Turn:
    """Somebody who waits for a lane."""

    come: trio.Event = field(default_factory=trio.Event)
    lane: Lane | None = None


class LineWorkers:
    """A Cargo in its workers. Made by ``open_line_cargo``. Implements runtimes.base.LineCargo."""

    def __init__(self, kind: LineKind, order: LoadOrder, lanes: int, most: LineLimits, memory_bytes: int) -> None:
        self._kind, self._name, self._most, self._memory_bytes = kind, order.name, most, memory_bytes
        files = tuple(PlacedFile(path, place) for path, place in order.files.items())
        options = json.dumps(dict(order.options))
        load = Load(order.name, order.content_hash, order.entry, files, options, order.threads, order.code)
        self._lanes = [Lane(load, kind.start, self._hear, self._lane_changed, kind.load_s) for _ in range(lanes)]
        self._idle: deque[Lane] = deque()
        self._runs: dict[Lane, WorkerRun] = {}
        self._waiting: deque[_Turn] = deque()
        self._numbers = 0
        self._changed = trio.Event()
        self.content_hash = order.content_hash

    def __repr__(self) -> str:
        return f"<LineWorkers {self._name}, {len(self._idle)} of {len(self._lanes)} lanes idle, {len(self._waiting)} jobs waiting>"

    @property
    def alive(self) -> bool:
        return any(lane.alive for lane in self._lanes)

    @property
    def engine(self) -> str:
        """Build of the engine. Raises ConfigError before it is known."""
        for lane in self._lanes:
            if lane.loaded is not None:
                return lane.loaded.engine
        raise ConfigError(f"{self._name} was never loaded")

    @property
    def slots_free(self) -> int:
        """Jobs that would run at once."""
        return len(self._idle)

    @property
    def slots_total(self) -> int:
        return len(self._lanes)

    @property
    def restarts(self) -> int:
        return sum(lane.restarts for lane in self._lanes)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        return tuple(lane.worker_pid for lane in self._lanes if lane.alive)

    async def wait_changed(self) -> None:
        """Returns when ``facts()`` may differ from what it was."""
        await self._changed.wait()

    def facts(self) -> CargoFacts:
        """Raises ConfigError before the Cargo is loaded."""
        return CargoFacts(
            name=self._name,
            content_hash=self.content_hash,
            runtime=self._kind.runtime,
            engine=self.engine,
            context_tokens=_CONTEXT_TOKENS,
            kv_tokens_total=0,
            kv_tokens_free=0,
            slots_total=len(self._lanes),
            slots_free=len(self._idle),
            weights_bytes=self._memory_bytes,
            kv_bytes_per_token=0,
            compute_bytes=0,
            tokens_per_s=0.0,
        )

    async def aclose(self) -> None:
        """``open_line_cargo`` ends the workers."""
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def run_lines(self, request: LineRequest) -> AsyncIterator[WorkerRun]:
        """See runtimes.base.LineCargo."""
        async with self.run_input(request.input, seed=request.seed) as run:
            yield run

    @asynccontextmanager
    async def run_input(self, data: bytes, *, most: LineLimits | None = None, seed: bytes = b"") -> AsyncIterator[WorkerRun]:
        """One job; entering returns when it runs. ``data``: one JSON object. ``seed``: of what random_get gives. Leaving ends the job at
        once. Raises Refused."""
        try:
            decode_input(data)
        except RemoteProtocolError as error:
            raise Refused(Code.BAD_INPUT, str(error)) from None
        lane = await self._admitted()
        run = self._begin(lane, data, most or self._most, seed)
        try:
            yield run
        finally:
            self._leave(run)

    async def _admitted(self) -> Lane:
        """An idle lane, in the order of arrival. Raises Refused where too many wait."""
        while True:
            lane = self._idle.popleft() if self._idle else await self._handed()
            if lane.alive:
                return lane

    async def _handed(self) -> Lane:
        if len(self._waiting) >= limits.LINE_JOBS_WAITING_MAX:
            raise Refused(Code.NO_CAPACITY, f"{len(self._waiting)} jobs wait for {self._name} already")
        turn = _Turn()
        self._waiting.append(turn)
        try:
            await turn.come.wait()
        except trio.Cancelled:
            if turn.lane is not None:
                self._release(turn.lane)
            else:
                self._waiting.remove(turn)
            raise
        if turn.lane is None:
            raise LocalProtocolError("a turn came without a lane")
        return turn.lane

    def _release(self, lane: Lane) -> None:
        """To who waits longest; idle where nobody does, so lanes are idle or jobs wait, never both."""
        if self._waiting:
            turn = self._waiting.popleft()
            turn.lane = lane
            turn.come.set()
        elif lane.alive:
            self._idle.append(lane)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _begin(self, lane: Lane, data: bytes, most: LineLimits, seed: bytes) -> WorkerRun:
        self._numbers += 1
        reader = LineReader(OutputLimits(output_bytes=most.output_bytes))
        run = self._runs[lane] = WorkerRun(self._numbers, lane, reader, most.timeout_s)
        lane.send_nowait(Run(run.number, most.fuel, max(1, int(1000 * most.timeout_s)), most.output_bytes, seed, data))
        lane.expect_by(trio.current_time() + most.timeout_s + limits.LINE_OVERRUN_S)
        return run

    def _leave(self, run: WorkerRun) -> None:
        """Nobody reads it any more. The lane is idle again when its worker says so, or is ended if it does not."""
        run.refusal = run.refusal or (None if run.is_over else Refused(Code.CANCELLED, "the job was cancelled"))
        run.finish()
        run.lines.clear()
        if self._runs.get(run.lane) is run:
            run.lane.send_nowait(Cancel(run.number))
            run.lane.expect_by(trio.current_time() + limits.LINE_OVERRUN_S)

    def _hear(self, lane: Lane, message: Any) -> None:
        run = self._runs.get(lane)
        if run is None or not isinstance(message, Output | Ended) or message.job != run.number:
            raise RemoteProtocolError(f"a worker does not say {type(message).__name__} now")
        if isinstance(message, Ended):
            del self._runs[lane]
            lane.expect_by(math.inf)
            if not run.is_over:
                run.hear_end(message)
            self._release(lane)
        elif not run.is_over:
            run.hear(message.data)
            if run.is_over:
                self._stop(run)

    def _stop(self, run: WorkerRun) -> None:
        """What it wrote has broken the contract."""
        run.lane.send_nowait(Cancel(run.number))
        run.lane.expect_by(trio.current_time() + limits.LINE_OVERRUN_S)

    def _lane_changed(self, lane: Lane) -> None:
        if lane.alive:
            self._release(lane)
        else:
            self._bury(lane)
            self._notify()

    def _bury(self, lane: Lane) -> None:
        if lane in self._idle:
            self._idle.remove(lane)
        run = self._runs.pop(lane, None)
        if run is not None and not run.is_over:
            if lane.has_overrun:
                run.fail(Refused(Code.CARGO_FAILED, f"it ran for more than {run.timeout_s:g} s, and its worker had to be ended"))
            elif lane.used_too_much:
                run.fail(Refused(Code.CARGO_FAILED, f"it used more {lane.used_too_much} than its trust level grants"))
            else:
                run.fail(Refused(Code.WORKER_DIED, f"the worker of {self._name} has ended"))

    async def supervise(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the workers alive until cancelled. Raises ConfigError where the Cargo cannot be loaded."""
        async with trio.open_nursery() as nursery:
            for lane in self._lanes:
                await nursery.start(lane.supervise)
            task_status.started()


@asynccontextmanager
async def open_line_cargo(
    kind: LineKind, order: LoadOrder, *, most: LineLimits, lanes: int = 1, memory_bytes: int = 0
) -> AsyncIterator[LineWorkers]:
    """A loaded Cargo in a nursery of its own; its workers are ended when this is left.

    ``lanes``: jobs at a time, each with a worker of its own. ``memory_bytes``: what is advertised as its size. Raises ConfigError with a
    sentence that says what to do when it cannot be loaded.
    """
    if not 1 <= lanes <= limits.LINE_LANES_MAX:
        raise LocalProtocolError(f"a Cargo has between 1 and {limits.LINE_LANES_MAX} lanes, not {lanes}")
    cargo = LineWorkers(kind, order, lanes, most, memory_bytes)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(cargo.supervise)
            yield cargo
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise only_error(group) from None
