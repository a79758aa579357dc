"""One call of a container engine's command line: no shell, a time limit, an environment that has nothing of the node's secrets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from protocol.errors import ArchipelagError

_ANSWER_BYTES_MAX = 4 * 1024 * 1024  # what inspect says of an image, which its maker can make long; the rest is dropped
_READ_BYTES = 64 * 1024
_COMPLAINT_CHARS_MAX = 300
# Where an engine looks for its socket, its storage and, without root, its helpers.
_KEPT = frozenset({"PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS"})
_KEPT_PREFIXES = ("XDG_", "DOCKER_", "CONTAINERS_", "CONTAINER_")

Feed = Callable[[int], None]
"""Writes to a descriptor and closes it, in a thread. BrokenPipeError means that the engine has heard enough."""


class EngineFailed(ArchipelagError):
    """The container engine did not do what it was asked. The text says what it said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended, and what was said."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def complaint(self) -> str:
        """The engine's own words, in one short line. Only for calls in which no Cargo speaks."""
        words = " ".join(self.stderr.decode("utf-8", "replace").split())
        return words[-_COMPLAINT_CHARS_MAX:] or f"it ended with code {self.code} and said nothing"


def client_environment(whole: Mapping[str, str]) -> dict[str, str]:
    """What of the node's environment an engine's client gets. Containers get none of it."""
    return {name: value for name, value in whole.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


async def open_client(command: Sequence[str], stdin: int, stderr: int = subprocess.PIPE) -> trio.Process:
    """The engine's client in a session of its own, so that Ctrl-C at the node's terminal is not for it. Raises EngineFailed."""
    try:
        return await trio.lowlevel.open_process(
            list(command),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=client_environment(os.environ),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise EngineFailed(f"{command[0]} cannot be started: {error.strerror}") from error


async def call_program(command: Sequence[str], timeout_s: float, feed: Feed | None = None) -> Answer:
    """Its answer, whatever the code. ``feed`` writes its stdin. Raises EngineFailed where it cannot be started or takes too long."""
    with trio.move_on_after(timeout_s):
        return await _Call(command).run(feed)
    raise EngineFailed(f"{command[0]} took more than {timeout_s:g} s; look at what the engine is doing")


@dataclass
class _Call:
    command: Sequence[str]
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)

    async def run(self, feed: Feed | None) -> Answer:
        if feed is None:
            return await self._finish(await open_client(self.command, subprocess.DEVNULL), None)
        reading, writing = os.pipe()
        try:
            process = await open_client(self.command, reading)
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        return await self._finish(process, lambda: _fed(feed, writing))

    async def _finish(self, process: trio.Process, feed: Callable[[], None] | None) -> Answer:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(collect, process.stdout, self.stdout, _ANSWER_BYTES_MAX)
                nursery.start_soon(collect, process.stderr, self.stderr, _ANSWER_BYTES_MAX)
                if feed is not None:  # its pipe breaks when the process is killed
                    await trio.to_thread.run_sync(feed, abandon_on_cancel=True)
            return Answer(await process.wait(), bytes(self.stdout), bytes(self.stderr))
        finally:
            await end_client(process)


def _fed(feed: Feed, writing: int) -> None:
    try:
        feed(writing)
    except BrokenPipeError:
        pass  # the engine's code says whether it had enough


def text_writer(text: str) -> Feed:
    """Feeds this."""

    def write(descriptor: int) -> None:
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(text)

    return write


async def collect(stream: trio.abc.ReceiveStream | None, kept: bytearray, kept_bytes_max: int) -> None:
    """Reads to the end, keeps the beginning."""
    if stream is None:
        return
    try:
        while data := await stream.receive_some(_READ_BYTES):
            kept += data[: max(0, kept_bytes_max - len(kept))]
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # nobody wants the rest


async def close_pipes(process: trio.Process) -> None:
    """Our ends of them. Not cancelled."""
    with trio.CancelScope(shield=True):
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()


async def end_client(process: trio.Process) -> None:
    """Closes its pipes; kills it where it still runs. Its container is another matter."""
    await close_pipes(process)
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.kill()
        await process.wait()
