"""The job stream as a state table, for both ends of it.

Theory of operation. ``TRANSITIONS`` says which message may follow which; it does not know which end we are. ``JobStreams`` keeps one
state per job of a stream, checks every message that is sent (a breach is our bug) and received (a breach is the peer's), and counts
tokens so that repeated, lost or reordered chunks show. It does no IO: the shell sends and receives, this decides.

Rules: job numbers grow; a job that has ended stays ended; ``JobCancel``, ``RouteMended`` and ``JobCount`` may cross the Island's last
message on the wire, so they are legal after the end, where the first two do nothing (a count of all tokens still counts). A cancel
before the Island has accepted (WITHDRAWN) and one after it (CANCELLING) are two states, so that a second ``JobAccepted`` or an answer to
a job that was never accepted shows even then.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from protocol import limits
from protocol.cargo_jobs import counted_tokens
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import (
    JobAccepted,
    JobAlive,
    JobCancel,
    JobChunk,
    JobCount,
    JobDone,
    JobFailed,
    JobLines,
    JobMore,
    JobOpen,
    RouteBroken,
    RouteMended,
)


class JobState(Enum):
    IDLE = auto()
    OPENING = auto()
    RUNNING = auto()
    WITHDRAWN = auto()
    CANCELLING = auto()
    ENDED = auto()


class Side(Enum):
    HOLDER = auto()
    ISLAND = auto()


SENT_BY: dict[type[Any], Side] = {
    JobOpen: Side.HOLDER,
    JobCancel: Side.HOLDER,
    JobAccepted: Side.ISLAND,
    JobChunk: Side.ISLAND,
    JobDone: Side.ISLAND,
    JobFailed: Side.ISLAND,
    RouteBroken: Side.ISLAND,
    RouteMended: Side.HOLDER,
    JobCount: Side.HOLDER,
    JobAlive: Side.ISLAND,
    JobLines: Side.ISLAND,
    JobMore: Side.HOLDER,
}

TRANSITIONS: dict[tuple[JobState, type[Any]], JobState] = {
    (JobState.IDLE, JobOpen): JobState.OPENING,
    (JobState.OPENING, JobAccepted): JobState.RUNNING,
    (JobState.OPENING, JobFailed): JobState.ENDED,
    (JobState.OPENING, JobCancel): JobState.WITHDRAWN,
    (JobState.RUNNING, JobChunk): JobState.RUNNING,
    (JobState.RUNNING, JobLines): JobState.RUNNING,
    (JobState.RUNNING, JobMore): JobState.RUNNING,
    (JobState.RUNNING, JobDone): JobState.ENDED,
    (JobState.RUNNING, JobFailed): JobState.ENDED,
    (JobState.RUNNING, JobCancel): JobState.CANCELLING,
    (JobState.WITHDRAWN, JobAccepted): JobState.CANCELLING,
    (JobState.WITHDRAWN, JobFailed): JobState.ENDED,
    (JobState.CANCELLING, JobChunk): JobState.CANCELLING,
    (JobState.CANCELLING, JobLines): JobState.CANCELLING,
    (JobState.CANCELLING, JobMore): JobState.CANCELLING,
    (JobState.CANCELLING, JobDone): JobState.ENDED,
    (JobState.CANCELLING, JobFailed): JobState.ENDED,
    (JobState.ENDED, JobCancel): JobState.ENDED,
    **{
        (state, kind): state
        for state in (JobState.OPENING, JobState.RUNNING, JobState.WITHDRAWN, JobState.CANCELLING)
        for kind in (RouteBroken, RouteMended)
    },
    (JobState.ENDED, RouteMended): JobState.ENDED,
    **{(state, kind): state for state in (JobState.RUNNING, JobState.CANCELLING) for kind in (JobCount, JobAlive)},
    (JobState.ENDED, JobCount): JobState.ENDED,
    (JobState.ENDED, JobMore): JobState.ENDED,
}


@dataclass(slots=True)
class _Job:
    state: JobState = JobState.IDLE
    has_lines: bool = False
    tokens: int = 0
    line_bytes: int = 0
    room_bytes: int = limits.JOB_LINES_ROOM_BYTES
    digest: Any = field(default_factory=hashlib.sha256)


class JobStreams:
    """All jobs of one stream, seen from one side."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._jobs: dict[int, _Job] = {}
        self._highest = 0

    def __repr__(self) -> str:
        return f"<JobStreams {self.side.name}: {len(self._jobs)} open, highest {self._highest}>"

    def __len__(self) -> int:
        return len(self._jobs)

    def next_number(self) -> int:
        """Number for the next job that the holder opens."""
        return self._highest + 1

    def state(self, job: int) -> JobState:
        if job in self._jobs:
            return self._jobs[job].state
        return JobState.ENDED if 0 < job <= self._highest else JobState.IDLE

    def counted(self, job: int) -> tuple[int, bytes]:
        """Tokens that passed in this job so far, and the SHA-256 of their ids, or of the lines. Ask before the job ends."""
        entry = self._jobs[job]
        return counted_tokens(entry.tokens), entry.digest.digest()

    def room(self, job: int) -> int:
        """Bytes of lines that may be sent before more are taken; 0 and less: none. Of a job that has ended none may."""
        return self._jobs[job].room_bytes if job in self._jobs else 0

    def line_bytes(self, job: int) -> int:
        """Bytes of lines that passed in this job so far. Ask before the job ends."""
        return self._jobs[job].line_bytes

    def send(self, message: Any) -> None:
        """Raises LocalProtocolError when we must not say this now."""
        try:
            self._step(message, self.side)
        except ValueError as error:
            raise LocalProtocolError(str(error)) from error

    def receive(self, message: Any) -> None:
        """Raises RemoteProtocolError when the peer must not say this now."""
        try:
            self._step(message, Side.ISLAND if self.side is Side.HOLDER else Side.HOLDER)
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from error

    def _step(self, message: Any, speaker: Side) -> None:
        kind = type(message)
        if SENT_BY.get(kind) is not speaker:
            raise ValueError(f"{kind.__name__} is not for the {speaker.name.lower()} to say")
        state = self.state(message.job)
        following = TRANSITIONS.get((state, kind))
        if following is None:
            raise ValueError(f"{kind.__name__} for job {message.job} in state {state.name}")
        if kind is JobOpen:
            self._open(message)
        elif kind is JobChunk:
            self._count(message)
        elif kind is JobLines:
            self._count_lines(message)
        elif kind is JobMore and message.job in self._jobs:
            self._give_room(message)
        if following is JobState.ENDED:
            self._jobs.pop(message.job, None)
        else:
            self._jobs[message.job].state = following

    def _open(self, opened: JobOpen) -> None:
        if len(self._jobs) >= limits.JOBS_PER_LINK_MAX:
            raise ValueError(f"more than {limits.JOBS_PER_LINK_MAX} jobs at once on one stream")
        self._highest = opened.job
        self._jobs[opened.job] = _Job(has_lines=bool(opened.seed))

    def _count_lines(self, lines: JobLines) -> None:
        entry = self._jobs[lines.job]
        if not entry.has_lines:
            raise ValueError(f"lines for job {lines.job}, which asks for text")
        if lines.step != entry.line_bytes:
            raise ValueError(f"lines at byte {lines.step} of job {lines.job} where byte {entry.line_bytes} was due")
        if entry.room_bytes <= 0:
            raise ValueError(f"lines of job {lines.job} beyond what its holder has room for")
        entry.line_bytes += len(lines.lines)
        entry.room_bytes -= len(lines.lines)
        entry.tokens += lines.tokens
        entry.digest.update(lines.lines)

    def _give_room(self, more: JobMore) -> None:
        entry = self._jobs[more.job]
        entry.room_bytes += more.taken
        if entry.room_bytes > limits.JOB_LINES_ROOM_BYTES:
            raise ValueError(f"more bytes of job {more.job} are taken than were sent")

    def _count(self, chunk: JobChunk) -> None:
        entry = self._jobs[chunk.job]
        if entry.has_lines:
            raise ValueError(f"text for job {chunk.job}, which asks for lines")
        if chunk.step != entry.tokens:
            raise ValueError(f"chunk at step {chunk.step} of job {chunk.job} where step {entry.tokens} was due")
        tokens = entry.tokens + len(chunk.tokens) // 4
        if tokens > limits.COMPLETION_TOKENS_MAX:
            raise ValueError(f"job {chunk.job} sent more than {limits.COMPLETION_TOKENS_MAX} tokens")
        entry.tokens = tokens
        entry.digest.update(chunk.tokens)
