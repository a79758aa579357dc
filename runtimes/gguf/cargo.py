"""The node's side of the GGUF engine: spawns the worker, watches it, hands each job its events.

    async with open_gguf_cargo(name=…, path=…, content_hash=…) as cargo:
        async with cargo.run(request) as run:
            async for event in run: ...

A worker that ends takes its running jobs with it (Refused worker_died) and is started again (process.py). Events that wait for a slow
reader are joined into larger chunks; a job makes at most max_tokens of them, so this room is bounded and one slow reader never holds up
the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from protocol import limits
from protocol.activations import Activations
from protocol.cargo_io import DoneLine, Line, Usage
from protocol.errors import Code, ConfigError, Refused, RemoteProtocolError
from protocol.generation import GENERATION, OutputFormat
from protocol.stage_messages import StageTime
from runtimes.base import CargoFacts, Chunk, Finished, LineRequest, RingPort, RunRequest
from runtimes.gguf.grammar_check import GrammarShop
from runtimes.gguf.messages import (
    Admitted,
    Arrived,
    BatchFailed,
    Cancel,
    Embed,
    Embedded,
    Ended,
    EndSequences,
    Launch,
    Load,
    OpenSequence,
    Ready,
    Rejected,
    Room,
    Start,
    Step,
)
from runtimes.gguf.process import EngineProcess, default_threads, opened, worker_environment
from runtimes.gguf.tool_syntax import ToolSyntax, must_call, schema_of_call
from runtimes.worker_process import Walls, WorkerLink


@dataclass(eq=False)
class _Run:
    """A job on the node's side; see runtimes.base.Run."""

    number: int
    admitted: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)
    chunks: deque[Chunk] = field(default_factory=deque)
    finished: Finished | None = None
    refusal: Refused | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def __repr__(self) -> str:
        state = "failed" if self.refusal else "finished" if self.finished else "running"
        return f"<Run {self.number} {state}, {len(self.chunks)} chunks waiting>"

    @property
    def is_over(self) -> bool:
        return self.finished is not None or self.refusal is not None

    def wake(self) -> None:
        if self.is_over:
            self.admitted.set()
        self.changed.set()

    async def __aiter__(self) -> AsyncIterator[Chunk | Finished]:
        while True:
            while self.chunks:
                yield self._joined()
            if self.refusal is not None:
                raise self.refusal
            if self.finished is not None:
                yield self.finished
                return
            self.changed = trio.Event()
            await self.changed.wait()

    def _joined(self) -> Chunk:
        """The chunks that wait, as one; at most CHUNK_TOKENS_MAX tokens, and no more than a JobChunk can carry."""
        parts = [self.chunks.popleft()]
        sizes = _sizes(parts[0])
        while self.chunks:
            more = _sizes(self.chunks[0])
            sizes = (sizes[0] + more[0], sizes[1] + more[1], sizes[2] + more[2])
            if any(size > most for size, most in zip(sizes, _chunk_limits(), strict=True)):
                break
            parts.append(self.chunks.popleft())
        if len(parts) == 1:
            return parts[0]
        entries = [part.logprobs[1:-1] for part in parts if part.logprobs]
        return Chunk(
            tokens=b"".join(part.tokens for part in parts),
            text="".join(part.text for part in parts),
            logprobs=b"[" + b",".join(entries) + b"]" if entries else b"",
        )


def _sizes(chunk: Chunk) -> tuple[int, int, int]:
    """Bytes of tokens, text and logprobs."""
    return len(chunk.tokens), len(chunk.text.encode()), len(chunk.logprobs)


def _chunk_limits() -> tuple[int, int, int]:
    return 4 * limits.CHUNK_TOKENS_MAX, limits.JOB_CHUNK_TEXT_BYTES_MAX, limits.JOB_CHUNK_LOGPROBS_BYTES_MAX


@dataclass(eq=False)
class _EmbeddingRun:
    """A job of embeddings on the node's side; see runtimes.base.LineRun. It has one line."""

    number: int
    over: trio.Event = field(default_factory=trio.Event)
    done: DoneLine | None = None
    refusal: Refused | None = None

    def __repr__(self) -> str:
        return f"<EmbeddingRun {self.number} {'over' if self.over.is_set() else 'running'}>"

    def end(self, how: DoneLine | Refused) -> None:
        if isinstance(how, Refused):
            self.refusal = how
        else:
            self.done = how
        self.over.set()

    async def __aiter__(self) -> AsyncIterator[Line]:
        await self.over.wait()
        if self.done is None:
            raise self.refusal or Refused(Code.INTERNAL, "an embedding job ended without a word")
        yield self.done


class GgufCargo(EngineProcess):
    """A model in a worker process; implements runtimes.base.LoadedCargo, and LineCargo for embeddings. Made by ``open_gguf_cargo``."""

    def __init__(self, order: Load, walls: Walls | None = None) -> None:
        super().__init__(order, walls)
        self._room = Room(0, 0, 0, 0.0)
        self._runs: dict[int, _Run] = {}
        self._embeddings: dict[int, _EmbeddingRun] = {}
        self._numbers = 0
        self._grammars = GrammarShop(order.path, worker_environment())
        self.ring: RingPort | None = None  # set by the node where the model is the last stage of a pipeline

    def __repr__(self) -> str:
        return f"<GgufCargo {self._order.name}, {'alive' if self.alive else 'down'}, {len(self._runs)} runs>"

    def facts(self) -> CargoFacts:
        ready = self._ready
        if ready is None:
            raise ConfigError(f"{self._order.name} was never loaded")
        return CargoFacts(
            name=self._order.name,
            content_hash=self._order.content_hash,
            runtime="gguf",
            engine=ready.engine,
            context_tokens=ready.context_tokens,
            kv_tokens_total=ready.kv_tokens,
            kv_tokens_free=self._room.kv_tokens_free,
            slots_total=ready.slots,
            slots_free=self._room.slots_free,
            weights_bytes=ready.weights_bytes,
            kv_bytes_per_token=ready.kv_bytes_per_token,
            compute_bytes=ready.compute_bytes,
            tokens_per_s=self._room.tokens_per_s,
        )

    @asynccontextmanager
    async def run(self, request: RunRequest) -> AsyncIterator[_Run]:
        """Enters once the job is admitted. Raises Refused."""
        if self._ready is not None and not self._ready.writes_text:
            text = f"{self._order.name} makes embeddings and writes no text; ask it through /v1/embeddings"
            raise Refused(Code.BAD_INPUT, text)
        grammar = await self._grammar(request)
        worker = self._awake()
        run = self._runs[self._numbers] = _Run(self._numbers)
        stages = 1
        if self.ring is not None and request.route is not None:
            stages = request.route.stages
            self.ring.job_began(run.number, request.route)
        try:
            worker.send_nowait(Start(run.number, request.cache_salt, grammar, stages, GENERATION.encode(request.generation)))
            await run.admitted.wait()
            if run.refusal is not None and not run.chunks:
                raise run.refusal
            yield run
        finally:
            del self._runs[run.number]
            if not run.is_over and worker is self._worker:
                worker.send_nowait(Cancel(run.number))
            if self.ring is not None:
                self.ring.job_over(run.number)

    @asynccontextmanager
    async def run_lines(self, request: LineRequest) -> AsyncIterator[_EmbeddingRun]:
        """Embeddings; input and result as in runtimes.gguf.embed_input. Raises Refused."""
        if not self.ready.embedding_tokens:  # another Island may offer it more memory
            why = "it offers too little memory, or the model cannot"
            raise Refused(Code.UNKNOWN_CARGO, f"this Island makes no embeddings with {self._order.name}: {why}")
        if len(self._embeddings) >= limits.ENGINE_WAITING_MAX:
            raise Refused(Code.NO_CAPACITY, f"{len(self._embeddings)} embedding jobs are waiting already")
        worker = self._awake()
        run = self._embeddings[self._numbers] = _EmbeddingRun(self._numbers)
        try:
            worker.send_nowait(Embed(run.number, request.input))
            yield run
        finally:
            del self._embeddings[run.number]
            if not run.over.is_set() and worker is self._worker:
                worker.send_nowait(Cancel(run.number))

    def _awake(self) -> WorkerLink:
        """The worker, for one more job, whose number is the newest. Raises Refused(no_capacity)."""
        worker = self._worker
        if worker is None:
            raise Refused(Code.NO_CAPACITY, "the engine is being restarted")  # not this job's doing: it has ended no worker
        if not self._is_busy():
            worker.heard_s = trio.current_time()  # what was silent so far had nothing to say
        self._numbers += 1
        return worker

    async def _grammar(self, request: RunRequest) -> str:
        generation = request.generation
        if generation.tools and self.ready.tools is ToolSyntax.NONE:
            raise Refused(Code.NO_TOOLS, f"{self._order.name} has no tools: its chat template has no place for them")
        if must_call(generation):
            return await self._grammars.gbnf(schema_of_call(self.ready.tools, generation))
        if generation.output_format is OutputFormat.TEXT:
            return ""
        return await self._grammars.gbnf(generation.schema)

    def _is_busy(self) -> bool:
        """Whether the worker owes someone an answer. A reader that is slow to fetch a finished one is not waiting for it."""
        return any(not run.is_over for run in self._runs.values()) or any(not run.over.is_set() for run in self._embeddings.values())

    def _hear(self, worker: WorkerLink, message: Any) -> None:
        if isinstance(message, Step):
            self._hand_out(message)
        elif isinstance(message, Room):
            self._room = message
            self._notify()
        elif isinstance(message, Ready):
            self._ready, self._worker, worker.ready_s = message, worker, trio.current_time()
            self._room = Room(message.kv_tokens, message.slots, 0, message.tokens_per_s)
            self._notify()
        elif isinstance(message, Launch | OpenSequence | EndSequences | BatchFailed):
            self._to_stages(message)
        elif isinstance(message, Embedded):
            self._end_embedding(message.job, _done_line(message))
        elif not isinstance(message, Admitted | Ended | Rejected):
            raise RemoteProtocolError(f"a worker does not say {type(message).__name__}")
        elif (run := self._runs.get(message.job)) is not None:
            self._tell(run, message)
        elif isinstance(message, Rejected):
            self._end_embedding(message.job, Refused(message.code, message.message))

    def _end_embedding(self, number: int, how: DoneLine | Refused) -> None:
        run = self._embeddings.get(number)
        if run is not None:
            run.end(how)

    def _to_stages(self, message: Launch | OpenSequence | EndSequences | BatchFailed) -> None:
        ring = self.ring
        if ring is None:
            raise RemoteProtocolError(f"a whole model does not say {type(message).__name__}")
        if isinstance(message, Launch):
            ring.launch(message.step, message.spans, message.rows)
        elif isinstance(message, OpenSequence):
            ring.open_sequence(message.sequence, message.job, message.declared, message.keep, message.source, message.shared)
        elif isinstance(message, EndSequences):
            ring.end_sequences(message.sequences)
        else:
            ring.refused(message.batch, message.code, message.message)

    def arrived(self, step: int, times: tuple[StageTime, ...], kind: Activations, rows: bytes) -> None:
        """What came round of a step, for the engine of a pipeline's last stage."""
        if self._worker is not None:
            self._worker.send_nowait(Arrived(step, times, kind, rows))

    def _hand_out(self, step: Step) -> None:
        tokens, at = step.tokens, 0
        for output in step.outputs:
            end = at + 4 * output.count
            run = self._runs.get(output.job)
            if run is not None:
                run.chunks.append(Chunk(tokens[at:end], output.text, output.logprobs))
                run.wake()
            at = end

    def _tell(self, run: _Run, message: Admitted | Ended | Rejected) -> None:
        if isinstance(message, Admitted):
            run.prompt_tokens, run.cached_tokens = message.prompt_tokens, message.cached_tokens
            run.admitted.set()
        elif isinstance(message, Ended):
            run.prompt_tokens, run.cached_tokens = message.prompt_tokens, message.cached_tokens
            run.finished = Finished(
                reason=message.reason,
                prompt_tokens=message.prompt_tokens,
                completion_tokens=message.completion_tokens,
                cached_tokens=message.cached_tokens,
                text=message.text,
                prefill_s=message.prefill_s,
                decode_s=message.decode_s,
                compute_s=message.compute_us / 1e6,
            )
            run.wake()
        else:
            run.refusal = Refused(message.code, message.message)
            run.wake()

    def _bury(self, code: int) -> None:
        """Tells all running jobs that their worker has ended."""
        self._room = replace(self._room, kv_tokens_free=0, slots_free=0)
        for embedding in self._embeddings.values():
            if not embedding.over.is_set():
                embedding.end(Refused(Code.WORKER_DIED, f"the engine's worker ended with code {code}"))
        for run in self._runs.values():
            if not run.is_over:
                run.refusal = Refused(Code.WORKER_DIED, f"the engine's worker ended with code {code}")
                run.wake()
        if self.ring is not None:
            self.ring.engine_lost()
        self._notify()


def _done_line(message: Embedded) -> DoneLine:
    """Raises RemoteProtocolError."""
    try:
        return DoneLine(Usage(message.prompt_tokens, 0), None, bytes(message.result).decode())
    except ValueError as error:
        raise RemoteProtocolError(f"a worker's result is none ({error})") from None


@asynccontextmanager
async def open_gguf_cargo(
    *,
    name: str,
    path: str | Path,
    content_hash: str,
    memory_limit_bytes: int | None = None,
    threads: int | None = None,
    gpu_layers: int | None = None,
    context_tokens: int | None = None,
    slots: int = 64,
    walls: Walls | None = None,
) -> AsyncIterator[GgufCargo]:
    """A loaded Cargo in a nursery of its own; within ``walls`` the model has to be shown at its own path.

    Raises ConfigError with a sentence that says what to do when it cannot be loaded.
    """
    order = Load(
        name=name,
        path=str(Path(path).resolve()),
        content_hash=content_hash,
        memory_limit_bytes=memory_limit_bytes or 0,
        threads=threads or default_threads(),
        gpu_layers=-1 if gpu_layers is None else gpu_layers,
        context_tokens=context_tokens or 0,
        slots=slots,
    )
    async with opened(GgufCargo(order, walls)) as cargo:
        yield cargo


__all__ = ["GgufCargo", "default_threads", "open_gguf_cargo", "worker_environment"]
