"""What every runtime looks like from the node: a Cargo is loaded, says what it offers, runs jobs, and is closed.

A run is an async context manager that yields a stream of events: any number of ``Chunk``, then exactly one ``Finished``. Leaving the
context cancels what still runs and frees its slot at once. Every failure is a ``protocol.errors.Refused`` with a code:
``bad_input``, ``context_length_exceeded``, ``no_capacity``, ``worker_died``, …, raised on entering or from the stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from protocol.activations import Activations
from protocol.cargo_io import Line
from protocol.errors import Code
from protocol.generation import FinishReason, GenerationRequest
from protocol.stage_messages import Span


@dataclass(frozen=True, slots=True)
class CargoFacts:
    """What a loaded Cargo says of itself; the node puts it into the ad. Sizes in bytes, rooms in tokens (KV cells)."""

    name: str
    content_hash: str  # SHA-256 of the model file, or of the runtime's name and version where there is none
    runtime: str  # "gguf", "echo"
    engine: str  # build and quantisation: answers are spliced only between equal engines
    context_tokens: int  # longest prompt + completion of one job
    kv_tokens_total: int
    kv_tokens_free: int
    slots_total: int
    slots_free: int
    weights_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int  # measured, not claimed
    tokens_per_s: float  # measured by a short run at load time, then an average of real jobs; 0.0: unknown


class JobRoute(Protocol):
    """The pipeline that a job runs on, as the node keeps it; ``stages`` is how many Islands it has."""

    @property
    def stages(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One job as a runtime sees it. ``cache_salt``: a prefix is reused only among requests with the same salt. ``route``: for Cargos that
    are the last stage of a pipeline."""

    job_id: str
    generation: GenerationRequest
    cache_salt: bytes
    route: JobRoute | None = None


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A job of a Cargo that takes one JSON object and gives JSON lines (protocol/cargo_io.py).

    ``input``: the object's JSON. ``seed``: 16 bytes, of whatever the Cargo draws; the same input and seed give the same lines.
    """

    job_id: str
    input: bytes
    seed: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """``tokens``: int32 little-endian ids since the last chunk, at least one; ``text``: what they add to the answer.

    ``text`` may lag behind the tokens (an incomplete character, a possible stop string) but never runs ahead of them. ``logprobs``:
    JSON bytes of OpenAI's ``content`` entries for these tokens, or empty.
    """

    tokens: bytes
    text: str
    logprobs: bytes = b""


@dataclass(frozen=True, slots=True)
class Finished:
    """``completion_tokens`` counts resumed tokens too; ``cached_tokens`` are prompt tokens taken from the prefix cache."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    text: str = ""  # what was held back and is now certain
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compute_s: float = 0.0  # of this Island's engine alone, in steps that held rows of the job


class StageEngine(Protocol):
    """A loaded range of layers that are not the last. What is given is done in order; answers come to the listener."""

    def compute(self, batch: int, spans: tuple[Span, ...], kind: Activations, rows: bytes) -> None:
        """Answered by ``computed`` or ``failed`` with the batch's number. ``kind``: of hidden states, in and out. Sequences are counted
        from 1, as in protocol.stages."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Sequences counted from 0 here."""
        ...

    def cut(self, sequence: int, length: int) -> None: ...


class StageListener(Protocol):
    """Who hears of a StageEngine. Nothing is called from within the engine's own methods."""

    def computed(self, batch: int, rows: bytes, compute_us: int, together: int) -> None:
        """``together``: how many batches were computed in one call."""
        ...

    def failed(self, batch: int, code: Code, message: str) -> None: ...

    def engine_lost(self) -> None:
        """Its cells are gone; what was given and not answered will not be."""
        ...

    def engine_back(self) -> None:
        """It can compute again."""
        ...


class RingPort(Protocol):
    """The other stages, as the engine of a pipeline's last stage reaches them."""

    def job_began(self, job: int, route: JobRoute) -> None: ...

    def job_over(self, job: int) -> None: ...

    def open_sequence(self, sequence: int, job: int, declared: int, keep: int, source: int, shared: int) -> None: ...

    def end_sequences(self, sequences: tuple[int, ...]) -> None: ...

    def launch(self, step: int, spans: tuple[Span, ...], rows: bytes) -> None:
        """Rows of token ids; their hidden states come to the engine by ``arrived``."""
        ...

    def refused(self, step: int, code: Code, message: str) -> None:
        """What came round of this step is of no use: the stage before is at fault."""
        ...

    def engine_lost(self) -> None: ...


class Run(Protocol):
    """A running job: iterate it."""

    prompt_tokens: int
    cached_tokens: int

    def __aiter__(self) -> AsyncIterator[Chunk | Finished]: ...


class LineRun(Protocol):
    """A running job of lines: iterate it, once. ``DoneLine`` comes last, and only when everything has ended well.

    Lines are made as they are read: who does not read holds the Cargo up. Every failure is a Refused: ``cargo_failed`` with the Cargo's own
    words or with what it did wrong, ``bad_input``, ``worker_died``, ``no_capacity``, ….
    """

    def __aiter__(self) -> AsyncIterator[Line]: ...


class Loaded(Protocol):
    """What all Cargos have that are ready to run jobs."""

    def facts(self) -> CargoFacts: ...

    async def wait_changed(self) -> None:
        """Returns when ``facts()`` differs from what it was (rooms, speed), or the Cargo died."""
        ...

    @property
    def alive(self) -> bool: ...

    async def aclose(self) -> None: ...


@runtime_checkable
class LoadedCargo(Loaded, Protocol):
    """A Cargo that writes text."""

    def run(self, request: RunRequest) -> AbstractAsyncContextManager[Run]:
        """Entering returns once the job is admitted. Raises Refused."""
        ...


@runtime_checkable
class LineCargo(Loaded, Protocol):
    """A Cargo that gives lines."""

    def run_lines(self, request: LineRequest) -> AbstractAsyncContextManager[LineRun]:
        """Entering returns once the job is admitted. Raises Refused. Leaving ends the job at once, with all that it has started."""
        ...
