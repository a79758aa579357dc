"""OpenAI's batches: a file of requests, worked through line by line, and a file of answers.

Theory of operation. A batch is a run (runs/board.py) that bears its input file's id as its name. The file is scanned once for where its
lines are and what is wrong with them; then the scheduler asks for one line at a time, which is read from the stored pieces when its turn
comes, so neither requests nor answers are ever in memory together. What is wrong with a line is that line's error; the others run. Each
line is a job, so what is finished stands in the books: another Coordinator that takes the batch over does the rest. At its end, however it
comes, what the jobs have said is written into the output file, by index.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Any

import trio

from coordinator.batches.file_lines import LineFault, LineIndex, LineWrong, TooManyLines, read_line
from coordinator.batches.file_output import OutputWriter, Written
from coordinator.batches.file_requests import JOBS, Endpoint, Tokens, Whose, endpoint_of
from coordinator.batches.progress import BatchProgress, ItemState
from coordinator.batches.scheduler import BatchTerms, ItemRefused, work_through
from coordinator.books import file_rows, run_queries
from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.file_rows import FileRefused, FileRow
from coordinator.books.runs import Run, RunState
from coordinator.files import Files
from coordinator.http.child_orders import ChildOrders
from coordinator.http.errors import ApiError
from coordinator.orders import Order
from coordinator.runs.board import RunContext, RunResult
from privacy.sealed_rows import SealBroken
from protocol import limits

log = logging.getLogger(__name__)

INPUT_PURPOSE = "batch"
_PIECES_KEPT = 4  # decrypted, of one batch: 4 MiB
_IN_THREAD_BYTES = 64 * 1024  # a longer line is parsed in a thread


class Status(StrEnum):
    """As OpenAI calls them."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


_NEVER_RAN = {
    Status.COMPLETED: ("cancelled", "the job of this line was cancelled"),
    Status.EXPIRED: ("batch_expired", "this request could not be executed before the completion window expired"),
    Status.CANCELLED: ("batch_cancelled", "this request was not executed because the batch was cancelled"),
}
_RUN_STATES = {Status.COMPLETED: RunState.SUCCEEDED, Status.EXPIRED: RunState.FAILED, Status.CANCELLED: RunState.CANCELLED}


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """What its account asked for; kept sealed with the run. ``metadata``: the account's own; ``max_parallelism``: lines that run at once at
    most, None: as many as there is room for."""

    input_file_id: str
    endpoint: str
    completion_window: str
    output_expires_after_s: float
    metadata: dict[str, str] | None = None
    max_parallelism: int | None = None

    def pack(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def read(cls, data: bytes) -> BatchSpec:
        return cls(**json.loads(data))


class BatchFault(Exception):
    """Why a whole batch failed. ``faults``: of its lines, where it is those."""

    def __init__(self, code: str, message: str, param: str | None = None, faults: tuple[LineFault, ...] = ()) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.faults = code, message, param, faults

    def shown(self) -> list[dict[str, Any]]:
        if self.faults:
            return _shown(self.faults)
        return [{"code": self.code, "line": None, "message": self.message, "param": self.param}]


def _shown(faults: Iterable[LineFault]) -> list[dict[str, Any]]:
    return [fault.as_json() for fault in islice(faults, limits.FILE_BATCH_ERRORS_SHOWN_MAX)]


@dataclass(slots=True)
class LiveBatch:
    """A batch that runs here. Times in Unix milliseconds, 0: not yet. ``refused``: index -> status and envelope, of bodies that the
    endpoint would refuse."""

    status: Status = Status.VALIDATING
    in_progress_at_ms: int = 0
    finalizing_at_ms: int = 0
    row: FileRow | None = None
    index: LineIndex | None = None
    progress: BatchProgress | None = None
    refused: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def errors(self) -> list[dict[str, Any]]:
        return _shown(self.index.faults.values() if self.index is not None else ())


@dataclass(frozen=True, slots=True)
class LineTerms:
    """How the jobs of lines are ordered. ``slots(cargo)``: how many jobs of a Cargo run at once; ``remember(cargos)``: they are not
    unknown, even while nobody offers them; ``is_there(island)``: whether it is in the book (all three of trio); ``keep_s``: how long what a
    job has said is kept, from its end: to the end of any batch, at least."""

    orders: ChildOrders
    slots: Callable[[str], int]
    remember: Callable[[Iterable[str]], None]
    is_there: Callable[[str], bool]
    keep_s: float
    job_timeout_s: float


class FileBatches:
    """The runner of FILE_BATCH runs. Runs on trio. ``window_s``: how long a batch may take."""

    def __init__(
        self,
        books: Books,
        files: Files,
        terms: LineTerms,
        clock_ms: Callable[[], int],
        window_s: float = limits.FILE_BATCH_WINDOW_S,
    ) -> None:
        self._books, self._files, self._terms, self._clock_ms = books, files, terms, clock_ms
        self.window_s = window_s
        self.live: dict[str, LiveBatch] = {}

    def __repr__(self) -> str:
        return f"<FileBatches {len(self.live)} running>"

    async def run(self, context: RunContext) -> RunResult:
        """Raises BooksUnavailable, BooksRefused. Where it is cancelled ``live`` stays, for ``cancelled``."""
        run = context.run
        batch = self.live[run.id] = LiveBatch()
        try:
            result = await self._run(context, batch)
        except (BooksUnavailable, BooksRefused):
            del self.live[run.id]
            raise
        except BatchFault as fault:
            result = _failed(fault, batch)
        except FileRefused as refused:
            result = _failed(BatchFault(refused.fault.value, refused.message, "input_file_id"), batch)
        except SealBroken:
            result = _failed(BatchFault("input_file_lost", "the file cannot be read any more; send it again", "input_file_id"), batch)
        del self.live[run.id]
        return result

    async def _run(self, context: RunContext, batch: LiveBatch) -> RunResult:
        run, spec = context.run, BatchSpec.read(context.spec)
        row, index = await self._scan(run, spec, batch)
        _check_any(index)
        progress = batch.progress = BatchProgress.of_jobs(run.id, len(index), context.done.values())
        began_ms = min((item.started_ms for item in progress if item.started_ms), default=self._clock_ms())
        batch.status, batch.in_progress_at_ms = Status.IN_PROGRESS, began_ms
        if run.tries > 1 or context.done:  # it was served before: its Islands may still be on their way to us
            self._terms.remember(index.models)
        items = _Lines(self._files, row, index, endpoint_of(spec.endpoint), spec.endpoint, self._whose(run), batch.refused)
        left_s = self.window_s - (self._clock_ms() - run.created_at_ms) / 1000
        with trio.move_on_after(max(0.0, left_s)) as window:
            terms, slots = BatchTerms(spec.max_parallelism), lambda: sum(map(self._terms.slots, index.models))
            await work_through(context, items, terms, slots, progress, self._clock_ms, self._terms.is_there)
        return await self._write(context, spec, batch, Status.EXPIRED if window.cancelled_caught else Status.COMPLETED)

    async def cancelled(self, context: RunContext) -> RunResult:
        """Raises BooksUnavailable: then another try is made."""
        run, spec = context.run, BatchSpec.read(context.spec)
        batch = self.live.setdefault(run.id, LiveBatch())
        try:
            if batch.index is None:
                await self._scan(run, spec, batch)
            return await self._write(context, spec, batch, Status.CANCELLED)
        except (BatchFault, FileRefused, SealBroken) as error:  # nothing of it can have run
            log.info("file_batch %s was cancelled and has no output: %s", run.id, type(error).__name__)
            return RunResult(RunState.CANCELLED, _value(Status.CANCELLED, batch, [], None, 0))
        finally:
            self.live.pop(run.id, None)

    def _whose(self, run: Run) -> Whose:
        return Whose(run, self._terms.orders, self._terms.keep_s, self._terms.job_timeout_s)

    async def _scan(self, run: Run, spec: BatchSpec, batch: LiveBatch) -> tuple[FileRow, LineIndex]:
        """Raises BatchFault, FileRefused, SealBroken, BooksUnavailable."""
        row = await self._files.find_any(spec.input_file_id, run.account)
        if row is None:
            text = f"there is no file {spec.input_file_id}; send one with POST /v1/files and the purpose {INPUT_PURPOSE}"
            raise BatchFault("file_not_found", text, "input_file_id")
        if row.purpose != INPUT_PURPOSE:
            text = f"the file has the purpose {row.purpose}; send it again with the purpose {INPUT_PURPOSE}"
            raise BatchFault("invalid_file_purpose", text, "input_file_id")
        index = LineIndex(spec.endpoint)
        try:
            async for piece in self._files.pieces(row):
                await trio.to_thread.run_sync(index.feed, piece)
            index.end()
        except TooManyLines:
            text = f"the file has more than {limits.FILE_LINES_MAX} lines; send it as several batches"
            raise BatchFault("too_many_tasks", text, "input_file_id") from None
        if not len(index):
            raise BatchFault("empty_file", "the file has no lines", "input_file_id")
        batch.row, batch.index = row, index
        await self._books.change(file_rows.set_total, run.id, len(index))
        return row, index

    async def _write(self, context: RunContext, spec: BatchSpec, batch: LiveBatch, status: Status) -> RunResult:
        """The end: what is done is written down."""
        assert batch.index is not None and batch.row is not None
        run = context.run
        batch.status = Status.CANCELLING if status is Status.CANCELLED else Status.FINALIZING
        batch.finalizing_at_ms = self._clock_ms()
        progress = batch.progress
        if progress is None or not progress.is_over:
            progress = await self._ended(run, len(batch.index), progress)
        lines = _Lines(self._files, batch.row, batch.index, endpoint_of(spec.endpoint), spec.endpoint, self._whose(run), batch.refused)
        writer = OutputWriter(context, self._files, lines.endpoint, spec.endpoint, _NEVER_RAN[status], spec.output_expires_after_s)
        written = await writer.write(progress, lines.read, batch.index.faults.get, batch.refused)
        price = await self._books.ask(run_queries.spent_by, run.id)
        value = _value(status, batch, batch.errors(), written, price)
        if status is Status.EXPIRED:
            text = "the batch did not end within its completion window; what was done is in the output file"
            return RunResult(_RUN_STATES[status], value, "batch_expired", text)
        return RunResult(_RUN_STATES[status], value)

    async def view(self, run: Run, spec: BatchSpec, result: Mapping[str, Any], is_live: bool) -> BatchView:
        """A batch as its account sees it. ``result``: of one that has ended; ``is_live``: it runs here. Raises BooksUnavailable."""
        if run.ended:
            return _ended_view(run, spec, result)
        batch = self.live.get(run.id)
        if batch is not None and batch.progress is not None:
            counts = batch.progress.counts
            done, failed = counts[ItemState.SUCCEEDED], counts[ItemState.FAILED]
            price = sum(item.price_micros for item in batch.progress)
        else:  # another Coordinator's, or one that is about to begin or to end
            done, failed = await self._books.ask(file_rows.succeeded_of, run.id), 0
            price = await self._books.ask(run_queries.spent_by, run.id)
        if batch is None:
            status = Status.VALIDATING if not run.total else Status.FINALIZING if is_live and done else Status.IN_PROGRESS
        else:
            status = batch.status
        batch = batch if batch is not None else LiveBatch(status)
        if run.cancel_wanted:
            status = Status.CANCELLING
        total = len(batch.index) if batch.index is not None else run.total
        stamps = (batch.in_progress_at_ms or (run.created_at_ms if run.total else 0), batch.finalizing_at_ms)
        return BatchView(run, spec, status, (total, done, failed), tuple(batch.errors()), *stamps, price_micros=price)

    async def _ended(self, run: Run, total: int, seen: BatchProgress | None) -> BatchProgress:
        """What became of each line of a batch that was ended from outside, by the books: a job may have succeeded in the last moment. What
        had no job, since its line was refused, only ``seen`` knows."""
        progress = BatchProgress.of_jobs(run.id, total, await self._books.ask(run_queries.children_of, run.id))
        for index, item in enumerate(seen or ()):
            if item.state is ItemState.FAILED and not progress[index].ended:
                progress.fail(index, item.error_code, item.error_message, item.ended_ms)
        progress.cancel_rest(self._clock_ms())
        return progress


def _check_any(index: LineIndex) -> None:
    """Raises BatchFault where no line is a request."""
    if len(index.faults) == len(index):
        raise BatchFault("invalid_input_file", "no line of the file is a request", "input_file_id", tuple(index.faults.values()))


def _failed(fault: BatchFault, batch: LiveBatch) -> RunResult:
    return RunResult(RunState.FAILED, _value(Status.FAILED, batch, fault.shown(), None, 0), fault.code, fault.message)


def _value(status: Status, batch: LiveBatch, errors: list[dict[str, Any]], written: Written | None, price_micros: int) -> dict[str, Any]:
    """What is kept of a batch that has ended."""
    total = len(batch.index) if batch.index is not None else 0
    tokens = written.tokens if written is not None else None
    return {
        "status": status.value,
        "in_progress_at_ms": batch.in_progress_at_ms,
        "finalizing_at_ms": batch.finalizing_at_ms,
        "errors": errors,
        "output_file_id": written.output_file_id if written is not None else None,
        "error_file_id": written.error_file_id if written is not None else None,
        "counts": [total, written.completed if written is not None else 0, written.failed if written is not None else 0],
        "tokens": [tokens.prompt, tokens.cached, tokens.completion] if tokens is not None else [0, 0, 0],
        "price_micros": price_micros,
    }


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch as it is now. ``counts``: all lines, those with an answer, those with an error; ``errors``: as OpenAI shows them."""

    run: Run
    spec: BatchSpec
    status: Status
    counts: tuple[int, int, int]
    errors: tuple[dict[str, Any], ...]
    in_progress_at_ms: int = 0
    finalizing_at_ms: int = 0
    price_micros: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    tokens: Tokens | None = None


def _ended_view(run: Run, spec: BatchSpec, result: Mapping[str, Any]) -> BatchView:
    """One that was ended by a bug, or lost, has no result of ours."""
    if "status" not in result:
        status = Status.CANCELLED if run.state is RunState.CANCELLED else Status.FAILED
        error = {"code": run.error_code or "internal_error", "line": None, "message": run.error_message, "param": None}
        return BatchView(run, spec, status, (run.total, 0, 0), (error,))
    total, done, failed = result["counts"]
    return BatchView(
        run,
        spec,
        Status(result["status"]),
        (total, done, failed),
        tuple(result["errors"]),
        result["in_progress_at_ms"],
        result["finalizing_at_ms"],
        result["price_micros"],
        result["output_file_id"],
        result["error_file_id"],
        Tokens(*result["tokens"]),
    )


class _Lines:
    """The lines of a file as the inputs of a batch, each read when it is its turn."""

    def __init__(
        self,
        files: Files,
        row: FileRow,
        index: LineIndex,
        endpoint: Endpoint,
        endpoint_name: str,
        whose: Whose,
        refused: dict[int, tuple[int, bytes]],
    ) -> None:
        self._files, self._row, self._index, self._endpoint_name = files, row, index, endpoint_name
        self.endpoint, self._whose, self._refused = endpoint, whose, refused
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self._reading = trio.Lock()

    @property
    def total(self) -> int:
        return len(self._index)

    async def read(self, index: int) -> bytes:
        """A line as it was sent. Raises FileRefused, SealBroken, BooksUnavailable."""
        start, end = self._index.place(index)
        size = limits.FILE_PIECE_BYTES
        parts = []
        for number in range(start // size, (end - 1) // size + 1):
            piece = await self._piece(number)
            parts.append(piece[max(0, start - number * size) : end - number * size])
        return b"".join(parts)

    async def _piece(self, number: int) -> bytes:
        async with self._reading:
            found = self._pieces.get(number)
            if found is None:
                found = self._pieces[number] = await self._files.piece(self._row, number)
                if len(self._pieces) > _PIECES_KEPT:
                    self._pieces.popitem(last=False)
            self._pieces.move_to_end(number)
            return found

    async def order(self, index: int, job_id: str, avoid: frozenset[str]) -> Order:
        """Raises ItemRefused, BooksUnavailable."""
        fault = self._index.faults.get(index)
        if fault is not None:
            raise ItemRefused(fault.code, fault.message)
        try:
            data = await self.read(index)
            if len(data) > _IN_THREAD_BYTES and self._endpoint_name != JOBS:  # those ask trio what a Cargo is
                order = await trio.to_thread.run_sync(self._order, data, job_id)
            else:
                order = self._order(data, job_id)
        except (FileRefused, SealBroken):
            raise ItemRefused("input_file_lost", "the input file cannot be read any more") from None
        except ApiError as error:
            self._refused[index] = error.status, error.body()
            raise ItemRefused(error.code or "invalid_value", error.message) from None
        except LineWrong as wrong:
            raise ItemRefused(wrong.code, str(wrong)) from None
        return replace(order, spec=replace(order.spec, avoid=avoid))

    def _order(self, data: bytes, job_id: str) -> Order:
        return self.endpoint.order(job_id, read_line(data, self._endpoint_name).body, self._whose)
