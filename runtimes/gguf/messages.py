"""What passes between a node and its GGUF worker over their socket pair.

The node sends Load once, then Start and Cancel; the worker answers Ready or LoadFailed, and for each job Admitted or Rejected, then
Step after every step of the engine (all sequences in one frame, where it can carry them), then Ended or Rejected. Room comes when it has
changed, and now and then from a worker that computes and has nothing else to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import checks, limits
from protocol.activations import Activations
from protocol.errors import Code
from protocol.generation import FinishReason
from protocol.registry import Registry, body
from protocol.shards import LayerRange
from protocol.stage_messages import Span, StageTime
from runtimes.gguf.tool_syntax import ToolSyntax

GGUF_WORKER = Registry("gguf-worker")


@GGUF_WORKER.message(1)
@dataclass(frozen=True, slots=True)
class Load:
    """``memory_limit_bytes``, ``context_tokens``: 0 lets the worker choose. ``gpu_layers``: -1 lets it choose by free VRAM.

    ``plain``: weights as they are in the file, after a build's repacked kernels have crashed. ``layers``: of the ``total_layers`` of the
    model with ``content_hash``, where the file is a shard; ``cells``: KV cells to allocate, then.
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
    layers: LayerRange | None = None
    total_layers: int = 0
    cells: int = 0

    def __post_init__(self) -> None:
        checks.in_range("memory_limit_bytes", self.memory_limit_bytes, 0, 2**62)
        checks.in_range("threads", self.threads, 1, 1024)
        checks.in_range("gpu_layers", self.gpu_layers, -1, 10_000)
        checks.in_range("context_tokens", self.context_tokens, 0, 2**31 - 1)
        checks.in_range("slots", self.slots, 1, limits.ENGINE_SLOTS_MAX)
        checks.in_range("total_layers", self.total_layers, 0, limits.LAYERS_MAX)
        checks.in_range("cells", self.cells, 0, 2**31)

    @property
    def is_driver(self) -> bool:
        """Whether the engine gets hidden states from other stages."""
        return self.layers is not None and self.layers.low > 0 and self.layers.high == self.total_layers

    @property
    def is_stage(self) -> bool:
        """Whether the layers are not the last ones, so that hidden states come out."""
        return self.layers is not None and self.layers.high < self.total_layers


@GGUF_WORKER.message(2)
@dataclass(frozen=True, slots=True)
class Start:
    """``generation``: bytes of protocol.generation.GENERATION. ``grammar``: GBNF that a throw-away process has accepted, or empty.
    ``stages``: of the route that the job runs on."""

    job: int
    salt: bytes
    grammar: str
    stages: int = 1
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
    width: int
    process_bytes: int  # beside weights, KV cache and compute buffers
    tools: ToolSyntax = ToolSyntax.NONE
    embedding_tokens: int = 0  # of the longest text that can be embedded; 0: none can
    writes_text: bool = True


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
    compute_us: int = 0  # by this engine, in steps that held rows of the job


@GGUF_WORKER.message(10)
@dataclass(frozen=True, slots=True)
class Room:
    """Sent at the end of a step, when it has changed or nothing was said for long: silence means that the worker hangs."""

    kv_tokens_free: int
    slots_free: int
    waiting: int
    tokens_per_s: float


# A stage that is not the last: batches in, hidden states out, in order.


@GGUF_WORKER.message(11)
@dataclass(frozen=True, slots=True)
class Batch:
    """``spans``: sequences are the engine's, counted from 1. ``rows``: int32 token ids for the first stage, else hidden states."""

    batch: int
    spans: tuple[Span, ...]
    activations: Activations
    rows: bytes = body()


@GGUF_WORKER.message(12)
@dataclass(frozen=True, slots=True)
class BatchDone:
    """``together``: how many batches were computed in one call."""

    batch: int
    compute_us: int
    together: int
    rows: bytes = body()


@GGUF_WORKER.message(13)
@dataclass(frozen=True, slots=True)
class BatchFailed:
    """BAD_INPUT: its rows are at fault, and so whoever sent them."""

    batch: int
    code: Code
    message: str


@GGUF_WORKER.message(14)
@dataclass(frozen=True, slots=True)
class CopyCells:
    source: int
    target: int
    length: int


@GGUF_WORKER.message(15)
@dataclass(frozen=True, slots=True)
class CutCells:
    sequence: int
    length: int


# The last stage of a pipeline, whose engine drives the others.


@GGUF_WORKER.message(16)
@dataclass(frozen=True, slots=True)
class Launch:
    """Worker to node: rows for the first stage, int32 token ids. ``spans``: sequences as in OpenSequence."""

    step: int
    spans: tuple[Span, ...]
    rows: bytes = body()


@GGUF_WORKER.message(17)
@dataclass(frozen=True, slots=True)
class Arrived:
    """Node to worker: what came round of a step, as it travels; ``times`` of the stages."""

    step: int
    times: tuple[StageTime, ...]
    activations: Activations
    rows: bytes = body()


@GGUF_WORKER.message(18)
@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Worker to node: a job's sequence; fields as in protocol.stage_messages.SequenceOpen."""

    sequence: int
    job: int
    declared: int
    keep: int
    source: int
    shared: int


@GGUF_WORKER.message(19)
@dataclass(frozen=True, slots=True)
class EndSequences:
    sequences: tuple[int, ...]


# Embeddings, by a whole model.


@GGUF_WORKER.message(20)
@dataclass(frozen=True, slots=True)
class Embed:
    """``input``: JSON as runtimes.gguf.embed_input reads it. Answered by Embedded or Rejected; Cancel ends it."""

    job: int
    input: bytes = body()


@GGUF_WORKER.message(21)
@dataclass(frozen=True, slots=True)
class Embedded:
    """``result``: JSON of a DoneLine."""

    job: int
    prompt_tokens: int
    result: bytes = body()


GGUF_WORKER.seal()
