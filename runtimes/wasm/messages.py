"""What passes between a node and its WASM worker over their socket pair.

The node sends Load once; the worker answers Loaded or LoadFailed. Then one job at a time: Run, answered by Output as the module writes,
then Ended. A worker that has sent WASM_WINDOW_BYTES more than was taken waits for Taken. Cancel ends a job early; Ended comes all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol import checks, limits
from protocol.registry import Registry, body

WASM_WORKER = Registry("wasm-worker")


class Outcome(StrEnum):
    """How a run has ended."""

    EXITED = "exited"
    TRAPPED = "trapped"
    OUT_OF_FUEL = "out_of_fuel"
    OUT_OF_STACK = "out_of_stack"
    OUTPUT_LIMIT = "output_limit"
    INTERRUPTED = "interrupted"
    TIMED_OUT = "timed_out"


@WASM_WORKER.message(1)
@dataclass(frozen=True, slots=True)
class Load:
    """A module, with the SHA-256 that it must have."""

    name: str
    content_hash: str
    module: bytes = body()

    def __post_init__(self) -> None:
        checks.content_hash("content_hash", self.content_hash)


@WASM_WORKER.message(2)
@dataclass(frozen=True, slots=True)
class Loaded:
    """``engine``: answers are equal between equal engines."""

    engine: str


@WASM_WORKER.message(3)
@dataclass(frozen=True, slots=True)
class LoadFailed:
    message: str


@WASM_WORKER.message(4)
@dataclass(frozen=True, slots=True)
class Run:
    job: int
    fuel: int
    timeout_ms: int
    output_bytes_max: int
    seed: bytes
    input: bytes = body()

    def __post_init__(self) -> None:
        checks.in_range("timeout_ms", self.timeout_ms, 1, int(1000 * limits.WASM_TIMEOUT_S))


@WASM_WORKER.message(5)
@dataclass(frozen=True, slots=True)
class Cancel:
    job: int


@WASM_WORKER.message(6)
@dataclass(frozen=True, slots=True)
class Taken:
    """So many bytes more of the output have been read."""

    job: int
    count: int


@WASM_WORKER.message(7)
@dataclass(frozen=True, slots=True)
class Output:
    """The next bytes of stdout."""

    job: int
    data: bytes = body()


@WASM_WORKER.message(8)
@dataclass(frozen=True, slots=True)
class Ended:
    """Fields as in engine.RunResult; the body is the beginning of stderr."""

    job: int
    outcome: Outcome
    message: str
    exit_code: int
    fuel_used: int
    stderr: bytes = body()


WASM_WORKER.seal()
