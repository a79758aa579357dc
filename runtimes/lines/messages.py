"""What passes between a node and a worker of lines over their socket pair.

The node sends Load once; the worker answers Loaded or LoadFailed. Then one job at a time: Run, answered by Output as the Cargo writes,
then Ended. A worker that has sent LINE_WINDOW_BYTES more than was taken waits for Taken. Cancel ends a job early; Ended comes all the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

from protocol import checks, limits
from protocol.registry import Registry, body
from runtimes.lines.engine import LoadOrder

LINE_WORKER = Registry("line-worker")


class Outcome(StrEnum):
    """How a run has ended."""

    EXITED = "exited"
    BAD_INPUT = "bad_input"
    BROKEN = "broken"
    TRAPPED = "trapped"
    OUT_OF_FUEL = "out_of_fuel"
    OUT_OF_STACK = "out_of_stack"
    OUTPUT_LIMIT = "output_limit"
    INTERRUPTED = "interrupted"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file of the Cargo, and where the worker finds it."""

    path: str
    place: str


@LINE_WORKER.message(1)
@dataclass(frozen=True, slots=True)
class Load:
    """A Cargo; fields as in engine.LoadOrder. ``options``: JSON of an object."""

    name: str
    content_hash: str
    entry: str
    files: tuple[PlacedFile, ...]
    options: str
    threads: int
    code: bytes = body()

    def __post_init__(self) -> None:
        checks.content_hash("content_hash", self.content_hash)
        checks.at_most("files", self.files, limits.CARGO_FILES_MAX)
        checks.in_range("threads", self.threads, 1, limits.CARGO_THREADS_MAX)

    def order(self) -> LoadOrder:
        places = {file.path: file.place for file in self.files}
        return LoadOrder(self.name, self.content_hash, self.entry, places, json.loads(self.options), self.threads, bytes(self.code))


@LINE_WORKER.message(2)
@dataclass(frozen=True, slots=True)
class Loaded:
    """``engine``: answers are equal between equal engines."""

    engine: str

    def __post_init__(self) -> None:
        checks.label("engine", self.engine, limits.NAME_CHARS_MAX)


@LINE_WORKER.message(3)
@dataclass(frozen=True, slots=True)
class LoadFailed:
    message: str


@LINE_WORKER.message(4)
@dataclass(frozen=True, slots=True)
class Run:
    """``fuel``: of runtimes that count instructions; 0: no limit but the time."""

    job: int
    fuel: int
    timeout_ms: int
    output_bytes_max: int
    seed: bytes
    input: bytes = body()

    def __post_init__(self) -> None:
        checks.in_range("timeout_ms", self.timeout_ms, 1, 1000 * limits.CARGO_TIME_S_MAX)


@LINE_WORKER.message(5)
@dataclass(frozen=True, slots=True)
class Cancel:
    job: int


@LINE_WORKER.message(6)
@dataclass(frozen=True, slots=True)
class Taken:
    """So many bytes more of the output have been read."""

    job: int
    count: int


@LINE_WORKER.message(7)
@dataclass(frozen=True, slots=True)
class Output:
    """The next bytes of stdout."""

    job: int
    data: bytes = body()


@LINE_WORKER.message(8)
@dataclass(frozen=True, slots=True)
class Ended:
    """``exit_code`` and ``stderr`` (its beginning) of a program; ``fuel_used`` where it is counted."""

    job: int
    outcome: Outcome
    message: str
    exit_code: int = 0
    fuel_used: int = 0
    stderr: bytes = body()


LINE_WORKER.seal()
