"""The output of a file batch: a line for each answer in one file, a line for each error in another, in the order of the input.

Theory of operation. Both are written at the end, from the answers that the jobs have left in the books, some at a time. Their ids follow
from the batch's, so a Coordinator that takes a batch over in the middle of writing begins these files anew, and one that is whole
already is left as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from coordinator.batches.file_lines import LineFault, read_line, to_line
from coordinator.batches.file_requests import Endpoint, Tokens
from coordinator.batches.progress import BatchProgress, Item, ItemState
from coordinator.books.errors import BooksRefused, Why
from coordinator.files import Files, FileWriter
from coordinator.http.errors import ApiError, from_books, from_refusal
from coordinator.jobs import Event
from coordinator.runs.board import RunContext
from protocol.errors import Code, Refused

PURPOSE = "batch_output"
OUTPUT, ERRORS = "output", "error"  # the two files
LINES_AT_ONCE = 16  # an answer of 2,048 vectors has 3 MB, and 16 MB as numbers
_ID_CHARS = 24
_CODES = {code.value: code for code in Code}
_WHYS = {why.value: why for why in Why}


def output_id(run_id: str, which: str) -> str:
    """Of the OUTPUT or ERRORS file of a batch."""
    return f"file-{hashlib.sha256(f'{run_id}/{which}'.encode()).hexdigest()[:_ID_CHARS]}"


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line of the input as its output needs it. ``fault``: it is no request; ``refused``: its body was refused, status and envelope."""

    index: int
    data: bytes
    item: Item
    fault: LineFault | None
    refused: tuple[int, bytes] | None

    @property
    def had_its_turn(self) -> bool:
        return self.fault is not None or bool(self.item.error_code) or self.item.state is not ItemState.CANCELLED


@dataclass(frozen=True, slots=True)
class OutputLine:
    """``is_error``: for the error file."""

    data: bytes
    is_error: bool
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True, slots=True)
class Written:
    """Ids are None where there was nothing to write."""

    output_file_id: str | None
    error_file_id: str | None
    tokens: Tokens
    completed: int
    failed: int


class OutputWriter:
    """Of one batch. ``never_ran``: code and message for lines that had no turn; ``expires_after_s``: how long the files are kept."""

    def __init__(
        self,
        context: RunContext,
        files: Files,
        endpoint: Endpoint,
        endpoint_name: str,
        never_ran: tuple[str, str],
        expires_after_s: float,
    ) -> None:
        self._context, self._files, self._endpoint, self._endpoint_name = context, files, endpoint, endpoint_name
        self._never_ran, self._expires_after_s = never_ran, expires_after_s
        self._writers: dict[str, FileWriter] = {}
        self._whole: set[str] = set()

    async def write(
        self,
        progress: BatchProgress,
        read: Callable[[int], Awaitable[bytes]],
        fault_of: Callable[[int], LineFault | None],
        refused: Mapping[int, tuple[int, bytes]],
    ) -> Written:
        """Both files. ``progress``: what became of each line, all of them ended; ``read(index)`` gives a line of the input,
        ``fault_of(index)`` and ``refused`` say what is wrong with it. Raises BooksUnavailable, FileRefused, SealBroken."""
        run = self._context.run
        for which in (OUTPUT, ERRORS):
            if await self._files.find_any(output_id(run.id, which), run.account) is not None:
                self._whole.add(which)
        tokens, completed, failed = Tokens(), 0, 0
        for start in range(0, len(progress), LINES_AT_ONCE):
            lines = []
            for index in range(start, min(start + LINES_AT_ONCE, len(progress))):
                fault = fault_of(index)
                data = b"" if fault is not None else await read(index)
                lines.append(InputLine(index, data, progress[index], fault, refused.get(index)))
            wanted = [line.item.job_id for line in lines if line.item.state is ItemState.SUCCEEDED]
            events = await self._context.outputs(wanted) if wanted else {}
            written = await trio.to_thread.run_sync(self._lines, lines, events)
            for line, made in zip(lines, written, strict=True):
                tokens += made.tokens
                completed += not made.is_error
                failed += made.is_error and line.had_its_turn
                await self._put(ERRORS if made.is_error else OUTPUT, made.data)
        ids = [await self._finish(which) for which in (OUTPUT, ERRORS)]
        return Written(ids[0], ids[1], tokens, completed, failed)

    def _lines(self, lines: Sequence[InputLine], events: Mapping[str, list[Event]]) -> list[OutputLine]:
        return [self._line(line, events.get(line.item.job_id)) for line in lines]

    def _line(self, line: InputLine, events: Sequence[Event] | None) -> OutputLine:
        """One line of output. Nothing that is wrong with one may keep the others."""
        run_id, item = self._context.run.id, line.item
        plain: dict[str, Any] = {"id": f"batch_req_{run_id.removeprefix('batch_')}_{line.index}"}
        if line.fault is not None:
            plain |= {"custom_id": line.fault.custom_id or None, "response": None, "error": line.fault.as_json()}
            return OutputLine(to_line(plain), True)
        request = read_line(line.data, self._endpoint_name)  # it has no fault, so this goes well
        plain["custom_id"] = request.custom_id
        if line.refused is not None:
            return _answered(plain, line.refused[0], item.job_id, line.refused[1])
        if item.state is ItemState.SUCCEEDED:
            if events is None:
                return _not_answered(plain, "output_expired", "the answer is not kept any more")
            try:
                body, tokens = self._endpoint.answer(item.job_id, item.ended_ms // 1000, request.body, events)
            except (ApiError, Refused) as error:
                api = error if isinstance(error, ApiError) else from_refusal(error)
                return _answered(plain, api.status, item.job_id, api.body())
            return _answered(plain, 200, item.job_id, body, tokens)
        told = _told(item)
        if told is not None:
            return _answered(plain, told.status, item.job_id, told.body())
        if item.error_code:
            return _not_answered(plain, item.error_code, item.error_message)
        return _not_answered(plain, *self._never_ran)

    async def _put(self, which: str, data: bytes) -> None:
        if which in self._whole:
            return
        if which not in self._writers:
            run = self._context.run
            self._writers[which] = await self._files.begin_output(run.account, output_id(run.id, which))
        await self._writers[which].write(data)

    async def _finish(self, which: str) -> str | None:
        run = self._context.run
        if which in self._writers:
            await self._writers[which].finish(PURPOSE, f"{run.id}_{which}.jsonl", self._expires_after_s)
        return output_id(run.id, which) if which in self._whole or which in self._writers else None


def _told(item: Item) -> ApiError | None:
    """The endpoint's own words for a job that failed; None where it has none."""
    if item.error_code in _CODES:
        return from_refusal(Refused(_CODES[item.error_code], item.error_message))
    if item.error_code in _WHYS:
        return from_books(BooksRefused(_WHYS[item.error_code], item.error_message))
    return None


def _answered(plain: dict[str, Any], status: int, job_id: str, body: bytes, tokens: Tokens | None = None) -> OutputLine:
    """What the endpoint itself would have said. ``body`` is JSON and goes in as it is."""
    head = to_line(plain).rstrip()[:-1]
    response = json.dumps({"status_code": status, "request_id": job_id}, separators=(",", ":")).encode()[:-1]
    return OutputLine(b'%b,"response":%b,"body":%b},"error":null}\n' % (head, response, body), status != 200, tokens or Tokens())


def _not_answered(plain: dict[str, Any], code: str, message: str) -> OutputLine:
    return OutputLine(to_line({**plain, "response": None, "error": {"code": code, "message": message}}), True)
