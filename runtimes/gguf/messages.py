"""What passes between a node and its GGUF worker over their socket pair.

The node sends Load once, then Start and Cancel; the worker answers Ready or LoadFailed, and for each job Admitted or Rejected, then
Step after every step of the engine (all sequences in one frame, where it can carry them), then Ended or Rejected. Room comes when it has
changed, and now and then from a worker that computes and has nothing else to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import checks, limits
from protocol.errors import Code
from protocol.generation import FinishReason
from protocol.registry import Registry, body

GGUF_WORKER = Registry("gguf-worker")


@GGUF_WORKER.message(1)
@dataclass(frozen=True, slots=True)
class Load:
    """``memory_limit_bytes``, ``context_tokens``: 0 lets the worker choose. ``gpu_layers``: -1 lets it choose by free VRAM.

    ``plain``: weights as they are in the file, after a build's repacked kernels have crashed.
    """

    name: str
    path: str
    content_hash: str
    memory_limit_bytes: int
    threads: int
    gpu_layers: int
    context_tokens: int
    slots: int
    plain: bool = False

    def __post_init__(self) -> None:
        checks.in_range("memory_limit_bytes", self.memory_limit_bytes, 0, 2**62)
        checks.in_range("threads", self.threads, 1, 1024)
        checks.in_range("gpu_layers", self.gpu_layers, -1, 10_000)
        checks.in_range("context_tokens", self.context_tokens, 0, 2**31 - 1)
        checks.in_range("slots", self.slots, 1, limits.ENGINE_SLOTS_MAX)


@GGUF_WORKER.message(2)
@dataclass(frozen=True, slots=True)
class Start:
    """``generation``: bytes of protocol.generation.GENERATION. ``grammar``: GBNF that a throw-away process has accepted, or empty."""

    job: int
    salt: bytes
    grammar: str
    generation: bytes = body()


@GGUF_WORKER.message(3)
@dataclass(frozen=True, slots=True)
class Cancel:
    job: int


@GGUF_WORKER.message(4)
@dataclass(frozen=True, slots=True)
class Ready:
    """Sizes in bytes, rooms in KV cells; measured after loading."""

    engine: str
    context_tokens: int
    kv_tokens: int
    slots: int
    weights_bytes: int
    kv_bytes_per_token: int
    compute_bytes: int
    tokens_per_s: float
    gpu_layers: int


@GGUF_WORKER.message(5)
@dataclass(frozen=True, slots=True)
class LoadFailed:
    """``message`` says what to do."""

    message: str


@GGUF_WORKER.message(6)
@dataclass(frozen=True, slots=True)
class Admitted:
    job: int
    prompt_tokens: int
    cached_tokens: int


@GGUF_WORKER.message(7)
@dataclass(frozen=True, slots=True)
class Rejected:
    """The job is over: refused, or failed on the way."""

    job: int
    code: Code
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """What one step gave one job: ``count`` tokens of the frame's body, the text that is now certain, logprobs as JSON bytes or empty."""

    job: int
    count: int
    text: str
    logprobs: bytes


@GGUF_WORKER.message(8)
@dataclass(frozen=True, slots=True)
class Step:
    """``tokens``: int32 little-endian ids of all outputs, one after the other."""

    outputs: tuple[Output, ...]
    tokens: bytes = body()


@GGUF_WORKER.message(9)
@dataclass(frozen=True, slots=True)
class Ended:
    job: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    text: str
    prefill_s: float
    decode_s: float


@GGUF_WORKER.message(10)
@dataclass(frozen=True, slots=True)
class Room:
    """Sent at the end of a step, when it has changed or nothing was said for long: silence means that the worker hangs."""

    kv_tokens_free: int
    slots_free: int
    waiting: int
    tokens_per_s: float


GGUF_WORKER.seal()
