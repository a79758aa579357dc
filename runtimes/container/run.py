"""One job: a container from its creation to its removal.

The engine's client stands between us and the container; its stdout is the container's through two or three pipes, so a Cargo that nobody
reads is held up after some hundred KB. Removing goes by the container's name. Our ends of the pipes are closed first: a client or a
monitor that is stuck in writing would not notice that its container was killed (podman waits 5 s for it, then gives up).
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import trio

from protocol.cargo_io import ErrorLine, Line, LineReader
from protocol.errors import ArchipelagError, Code, LocalProtocolError, Refused, RemoteProtocolError
from runtimes.container.client import (
    Answer,
    EngineFailed,
    call_program,
    close_pipes,
    collect,
    end_client,
    open_client,
    text_writer,
)
from runtimes.container.command import Container, create_command, remove_command, start_command, state_command
from runtimes.container.engines import ContainerEngine
from runtimes.container.verdict import ENDED_WELL, State, judge, not_started, parse_state, timed_out
from runtimes.error_groups import only_error

STDERR_BYTES_MAX = 16 * 1024  # of what a Cargo writes there; the rest is dropped
_READ_BYTES = 64 * 1024
_CREATE_S = 60.0  # 0.1 s when nothing else runs
_ASK_S = 30.0
_REMOVE_S = 30.0  # 0.1 s; for the kernel to tear down a tree with 8 GB of memory a second more
_REMOVE_TRIES = 3
_START_S = 5.0  # beyond the Cargo's own time, for the engine to start it; podman counts exactly by itself


class ContainerLeft(ArchipelagError):
    """A container could not be removed. Its limits still hold; the Island should take no more of them until somebody has looked."""


@dataclass(eq=False)
class ContainerRun:
    """A running job: iterate it once. ``stderr``: its beginning, for the publisher's own eyes; it may hold the input."""

    engine: ContainerEngine
    container: Container
    client: trio.Process
    reader: LineReader
    refusal: Refused | None = None
    stderr: bytearray = field(default_factory=bytearray)
    _stopped: trio.Event = field(default_factory=trio.Event)
    _stderr_ended: trio.Event = field(default_factory=trio.Event)

    def __repr__(self) -> str:
        state = "failed" if self.refusal else "running" if self.client.returncode is None else "over"
        return f"<ContainerRun {self.container.name} {state}>"

    async def __aiter__(self) -> AsyncIterator[Line]:
        while data := await self._receive():
            for line in self._read(data):
                if line is not self.reader.last:
                    yield line
            if isinstance(self.reader.last, ErrorLine):
                raise Refused(Code.CARGO_FAILED, self.reader.last.message)
        yield await self._ended()

    async def _receive(self) -> bytes:
        """Nothing where the output is over, or was ended."""
        try:
            return bytes(await _there(self.client.stdout).receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    def _read(self, data: bytes) -> list[Line]:
        try:
            return self.reader.feed(data)
        except RemoteProtocolError as error:
            raise Refused(Code.CARGO_FAILED, str(error)) from None

    async def _ended(self) -> Line:
        code = await self.client.wait()
        if self.refusal is not None:
            raise self.refusal
        state = ENDED_WELL if code == 0 else await self._state()
        if not state.was_started:
            await self._stderr_ended.wait()
            raise not_started(Answer(code, b"", bytes(self.stderr)).complaint)
        return judge(self.reader, state, self.container.limits)

    async def _state(self) -> State:
        """Raises Refused."""
        try:
            answer = await call_program(state_command(self.engine, self.container.name), _ASK_S)
            return parse_state(answer.stdout)
        except (ValueError, EngineFailed):
            raise Refused(Code.WORKER_DIED, "the container engine has lost the job's container") from None

    def stop_nowait(self, refusal: Refused) -> None:
        """Ends the job for this reason."""
        self.refusal = self.refusal or refusal
        self._stopped.set()

    async def watch(self) -> None:
        """Ends the container when it was stopped or its time is over, whether anybody reads its output or not."""
        with trio.move_on_after(self.container.limits.time_s + _START_S):
            await self._stopped.wait()
        self.stop_nowait(timed_out(self.container.limits))
        await _there(self.client.stdout).aclose()
        await remove_containers(self.engine, (self.container.name,))

    async def write(self, data: bytes) -> None:
        """A Cargo need not read its input."""
        stdin = self.client.stdin
        if stdin is None:
            raise LocalProtocolError("the client was opened without stdin")
        try:
            await stdin.send_all(data)
            await stdin.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return  # it has ended; how, its output says

    async def collect_stderr(self) -> None:
        await collect(self.client.stderr, self.stderr, STDERR_BYTES_MAX)
        self._stderr_ended.set()


def _there(stream: trio.abc.ReceiveStream | None) -> trio.abc.ReceiveStream:
    if stream is None:
        raise LocalProtocolError("the client was opened without stdout")
    return stream


@asynccontextmanager
async def open_run(
    engine: ContainerEngine, container: Container, data: bytes, reader: LineReader
) -> AsyncIterator[ContainerRun]:
    """The job, started. When this is left, nothing of it is left. Raises Refused where the engine does not start it, and ContainerLeft
    where it does not remove it."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(remove_containers, engine, (container.name,))
        await _create(engine, container)
        client = await _start(engine, container.name)
        stack.pop_all()  # from here on the client ends last, see _leave
        run = ContainerRun(engine, container, client, reader)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.write, data)
                nursery.start_soon(run.collect_stderr)
                nursery.start_soon(run.watch)
                yield run
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            await _leave(run)


async def _leave(run: ContainerRun) -> None:
    """The container goes first: a client that is killed while it starts one leaves a half of it, which the engine does not know of. It
    holds the container's lock until it is started, so removing waits for that."""
    try:
        await close_pipes(run.client)
        await remove_containers(run.engine, (run.container.name,))
    finally:
        await end_client(run.client)


async def _create(engine: ContainerEngine, container: Container) -> None:
    """Whole or not at all: an engine whose client is killed in the middle may keep half a container."""
    try:
        with trio.CancelScope(shield=True):
            feed = text_writer(engine.seccomp) if engine.seccomp else None
            answer = await call_program(create_command(engine, container), _CREATE_S, feed)
    except EngineFailed as error:
        raise Refused(Code.WORKER_DIED, f"the container engine does not work: {error}") from None
    await trio.lowlevel.checkpoint_if_cancelled()
    if answer.code:
        raise Refused(Code.WORKER_DIED, f"the container engine made no container: {answer.complaint}")


async def _start(engine: ContainerEngine, name: str) -> trio.Process:
    try:
        return await open_client(start_command(engine, name), subprocess.PIPE)
    except EngineFailed as error:
        raise Refused(Code.WORKER_DIED, f"the container engine does not work: {error}") from None


async def remove_containers(engine: ContainerEngine, names: tuple[str, ...]) -> None:
    """Kills and removes them with all that runs in them. Those that are not there are no error. Not cancelled. Raises ContainerLeft."""
    complaint = ""
    with trio.CancelScope(shield=True):
        for _ in range(_REMOVE_TRIES):
            try:
                answer = await call_program(remove_command(engine, names), _REMOVE_S)
            except EngineFailed as error:
                complaint = str(error)
                continue
            if not answer.code or is_gone(answer.complaint):
                return
            complaint = answer.complaint
    raise ContainerLeft(
        f"{engine.kind} did not remove {names[0]}: {complaint}; `{engine.kind} rm --force {names[0]}` does it by hand"
    )


def is_gone(complaint: str) -> bool:
    """Whether an engine refuses to remove a container since there is none."""
    return "no such container" in complaint.lower() or "no container with name or id" in complaint.lower()
