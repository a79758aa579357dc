"""The node's side of the GGUF engine: spawns the worker, watches it, hands each job its events.

    async with open_gguf_cargo(name=…, path=…, content_hash=…) as cargo:
        async with cargo.run(request) as run:
            async for event in run: ...

A worker that ends takes its running jobs with it (Refused worker_died) and is started again, each time after a longer pause while it
keeps ending early. Events that wait for a slow reader are joined into larger chunks; a job makes at most max_tokens of them, so this
room is bounded and one slow reader never holds up the others.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from protocol import limits
from protocol.errors import ArchipelagError, Code, ConfigError, Refused, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from protocol.generation import GENERATION, OutputFormat
from runtimes.base import CargoFacts, Chunk, Finished, RunRequest
from runtimes.gguf.grammar_check import GrammarShop
from runtimes.gguf.messages import (
    GGUF_WORKER,
    Admitted,
    Cancel,
    Ended,
    Load,
    LoadFailed,
    Ready,
    Rejected,
    Room,
    Start,
    Step,
)

_READ_BYTES = 256 * 1024
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
_KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "GGML_", "VK_", "HIP_", "ROCR_", "HSA_", "OMP_", "GOMP_")
_HEALTHY_S = 10.0  # a worker that served so long starts the pauses anew


def default_threads() -> int:
    """Cores that this process may use, less one for the node itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def worker_environment() -> dict[str, str]:
    """What native code needs to find its drivers, and no secret of the node."""
    kept = {k: v for k, v in os.environ.items() if k in _KEPT_ENVIRONMENT or k.startswith(_KEPT_PREFIXES)}
    root = str(Path(__file__).resolve().parents[2])
    # ggml answers a failed assertion by starting gdb on itself, which is slow and would print what is in memory
    return kept | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1", "GGML_NO_BACKTRACE": "1"}


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


class _Worker:
    """One life of the worker process."""

    def __init__(self, process: subprocess.Popen[bytes], stream: trio.SocketStream) -> None:
        self.process, self._stream = process, stream
        self._decoder = FrameDecoder(GGUF_WORKER)
        self._outgoing: deque[bytes] = deque()
        self._outgoing_changed = trio.Event()
        self.heard_s = trio.current_time()
        self.ready_s = math.inf
        self.has_stalled = False

    def __repr__(self) -> str:
        return f"<worker {self.process.pid}>"

    def send_nowait(self, message: object) -> None:
        self._outgoing.append(encode_frame(GGUF_WORKER, message))
        self._outgoing_changed.set()

    async def write(self) -> None:
        """Sends what was put, until cancelled or the worker is gone."""
        while True:
            while self._outgoing:
                data = b"".join(self._outgoing)
                self._outgoing.clear()
                await self._stream.send_all(data)
            self._outgoing_changed = trio.Event()
            await self._outgoing_changed.wait()

    async def messages(self) -> AsyncIterator[Any]:
        """What the worker says, until it ends."""
        while data := await self._read():
            self.heard_s = trio.current_time()
            for message in self._decoder.feed(data):
                yield message

    async def _read(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def end(self) -> int:
        """Ends the process, at once where it does not end by itself, and returns its code."""
        with trio.CancelScope(shield=True):
            await self._stream.aclose()
            if self.has_stalled:
                self.process.kill()
            with trio.move_on_after(limits.WORKER_EXIT_S):
                while self.process.poll() is None:
                    await trio.sleep(0.01)
            self.process.kill()
            code: int = await trio.to_thread.run_sync(self.process.wait)
        return code


def worker_command(descriptor: int) -> list[str]:
    """The program that is given this end of the socket pair."""
    return [sys.executable, "-P", "-m", "runtimes.gguf.worker", str(descriptor), str(os.getpid())]


def _spawn() -> _Worker:
    """Starts a worker. Not in a thread: the kernel ends a worker together with the thread that started it. Raises OSError."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        try:
            process = subprocess.Popen(
                worker_command(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=worker_environment(),
                cwd="/",
            )
        except OSError:
            ours.close()
            raise
    return _Worker(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))


def pause_after(pause_s: float, served_s: float) -> float:
    """Seconds to wait before the next start: twice the last pause, unless the worker that ended has served well in between."""
    if served_s >= _HEALTHY_S:
        return limits.WORKER_RESTART_MIN_S
    return min(max(2 * pause_s, limits.WORKER_RESTART_MIN_S), limits.WORKER_RESTART_MAX_S)


class GgufCargo:
    """A model in a worker process; implements runtimes.base.LoadedCargo. Made by ``open_gguf_cargo``."""

    def __init__(self, order: Load) -> None:
        self._order = order
        self._worker: _Worker | None = None
        self._ready: Ready | None = None
        self._room = Room(0, 0, 0, 0.0)
        self._runs: dict[int, _Run] = {}
        self._numbers = 0
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._closed = trio.Event()
        self._grammars = GrammarShop(order.path, worker_environment())
        self.restarts = 0

    def __repr__(self) -> str:
        return f"<GgufCargo {self._order.name}, {'alive' if self.alive else 'down'}, {len(self._runs)} runs>"

    @property
    def alive(self) -> bool:
        return self._worker is not None

    @property
    def worker_pid(self) -> int:
        """Process id of the worker; 0 while there is none."""
        return self._worker.process.pid if self._worker is not None else 0

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

    async def wait_changed(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @asynccontextmanager
    async def run(self, request: RunRequest) -> AsyncIterator[_Run]:
        """Enters once the job is admitted. Raises Refused."""
        grammar = await self._grammar(request)
        worker = self._worker
        if worker is None:
            raise Refused(Code.NO_CAPACITY, "the engine is being restarted")  # not this job's doing: it has ended no worker
        if not self._is_busy():
            worker.heard_s = trio.current_time()  # what was silent so far had nothing to say
        self._numbers += 1
        run = self._runs[self._numbers] = _Run(self._numbers)
        try:
            worker.send_nowait(Start(run.number, request.cache_salt, grammar, GENERATION.encode(request.generation)))
            await run.admitted.wait()
            if run.refusal is not None and not run.chunks:
                raise run.refusal
            yield run
        finally:
            del self._runs[run.number]
            if not run.is_over and worker is self._worker:
                worker.send_nowait(Cancel(run.number))

    async def _grammar(self, request: RunRequest) -> str:
        generation = request.generation
        if generation.output_format is OutputFormat.TEXT:
            return ""
        return await self._grammars.gbnf(generation.schema)

    async def aclose(self) -> None:
        """Ends the worker and the jobs that still run. Idempotent."""
        self._scope.cancel()
        await self._closed.wait()

    async def supervise(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a worker alive until closed. Raises ConfigError when the first one cannot load the model."""
        pause_s = 0.0
        try:
            with self._scope:
                while True:
                    served_s = await self._live(task_status if self._ready is None else None)
                    pause_s = pause_after(pause_s, served_s)
                    await trio.sleep(pause_s)
                    self.restarts += 1
        finally:
            self._closed.set()

    async def _live(self, task_status: trio.TaskStatus[None] | None) -> float:
        """One life of a worker: spawn, load, serve, bury. Returns the seconds in which it served.

        ``task_status`` is given until one has served; a failure before that is the caller's.
        """
        try:
            worker = _spawn()
        except OSError as error:
            if task_status is None:
                return 0.0
            raise ConfigError(f"the engine's process could not be started ({error}); free memory or end other processes") from error
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, worker, nursery.cancel_scope)
                nursery.start_soon(self._watch, worker, nursery.cancel_scope)
                await self._serve(worker, task_status)
                nursery.cancel_scope.cancel()
        finally:
            self._worker = None
            code = await worker.end()
            self._bury(code)
        if self._ready is None:
            self._try_plain(code, worker.has_stalled)
        return max(0.0, trio.current_time() - worker.ready_s)

    def _try_plain(self, code: int, has_stalled: bool) -> None:
        """The first load ended without a word: by a crash, the build's kernels may be at fault, so the next one does without them.

        Raises ConfigError where that is no help.

        Seen: llama.cpp built by GCC 12 on a CPU with AMX crashes at its first batch of two rows, since the compiler drops the stores of
        the tile configuration.
        """
        path = self._order.path
        if has_stalled:
            raise ConfigError(f"{path} was not loaded after {limits.WORKER_LOAD_TIMEOUT_S:.0f} s; use a faster disk or a smaller model")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            raise ConfigError(f"the engine was killed while it loaded {path}, as for want of memory; free some or use a smaller model")
        if code >= 0:
            raise ConfigError(f"the engine gave up with code {code} while it loaded {path}; what it wrote says why; try `make setup`")
        if self._order.plain:
            raise ConfigError(f"the engine crashed twice ({_signal_name(code)}) on {path}; it may be damaged: delete it and fetch it again")
        self._order = replace(self._order, plain=True)

    async def _write(self, worker: _Worker, scope: trio.CancelScope) -> None:
        try:
            await worker.write()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()

    async def _watch(self, worker: _Worker, scope: trio.CancelScope) -> None:
        """Ends a worker that has jobs, or is loading, and says nothing."""
        while True:
            await trio.sleep(limits.WORKER_STALL_S / 10)
            is_loading = self._worker is not worker
            limit_s = limits.WORKER_LOAD_TIMEOUT_S if is_loading else limits.WORKER_STALL_S
            if (is_loading or self._is_busy()) and trio.current_time() - worker.heard_s > limit_s:
                worker.has_stalled = True
                scope.cancel()
                return

    def _is_busy(self) -> bool:
        """Whether the worker owes someone an answer. A reader that is slow to fetch a finished one is not waiting for it."""
        return any(not run.is_over for run in self._runs.values())

    async def _serve(self, worker: _Worker, task_status: trio.TaskStatus[None] | None) -> None:
        worker.send_nowait(self._order)
        try:
            async for message in worker.messages():
                if isinstance(message, LoadFailed):
                    if task_status is not None:
                        raise ConfigError(message.message)
                    return
                self._hear(worker, message)
                if isinstance(message, Ready) and task_status is not None:
                    task_status.started()
        except RemoteProtocolError:
            return  # a worker that talks nonsense is replaced

    def _hear(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, Step):
            self._hand_out(message)
        elif isinstance(message, Room):
            self._room = message
            self._notify()
        elif isinstance(message, Ready):
            self._ready, self._worker, worker.ready_s = message, worker, trio.current_time()
            self._room = Room(message.kv_tokens, message.slots, 0, message.tokens_per_s)
            self._notify()
        elif not isinstance(message, Admitted | Ended | Rejected):
            raise RemoteProtocolError(f"a worker does not say {type(message).__name__}")
        elif (run := self._runs.get(message.job)) is not None:
            self._tell(run, message)

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
            )
            run.wake()
        else:
            run.refusal = Refused(message.code, message.message)
            run.wake()

    def _bury(self, code: int) -> None:
        """Tells all running jobs that their worker has ended."""
        self._room = replace(self._room, kv_tokens_free=0, slots_free=0)
        for run in self._runs.values():
            if not run.is_over:
                run.refusal = Refused(Code.WORKER_DIED, f"the engine's worker ended with code {code}")
                run.wake()
        self._notify()


def _signal_name(code: int) -> str:
    """Of a process that a signal has ended."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


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
) -> AsyncIterator[GgufCargo]:
    """A loaded Cargo in a nursery of its own. Raises ConfigError with a sentence that says what to do when it cannot be loaded."""
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
    cargo = GgufCargo(order)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(cargo.supervise)
            try:
                yield cargo
            finally:
                with trio.CancelScope(shield=True):
                    await cargo.aclose()
    except BaseExceptionGroup as group:
        raise _only(group) from None


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a group of one: our nursery is not the caller's business."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


__all__ = ["ArchipelagError", "GgufCargo", "default_threads", "open_gguf_cargo", "worker_environment"]
