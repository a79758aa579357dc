"""Starts a program in its sandbox, watches it, and ends all of it.

Who holds whom: we start bubblewrap, which starts the first process of a new process namespace, which starts the program. When the first
process of a namespace ends, the kernel ends all others in it and only then reports its end. So one descriptor of that process (a pidfd)
kills the whole tree, and becoming readable is the proof that nothing is left. Without namespaces the filter lets the program have no
children, and the same holds for the program itself.

The program waits on a pipe until we hold that descriptor and its control group is made.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from protocol.errors import ArchipelagError, ConfigError
from runtimes.error_groups import only_error
from runtimes.sandbox.cgroup import Group, make_group
from runtimes.sandbox.command import (
    SCRATCH,
    Descriptors,
    Program,
    bwrap_command,
    cpus_for,
    environment_of,
    launch_command,
)
from runtimes.sandbox.host import host
from runtimes.sandbox.probe import Level, Sandbox, filled_pipe
from runtimes.sandbox.rlimits import limits_for
from runtimes.sandbox.seccomp import filter_program, policy_for
from runtimes.sandbox.tiers import Tier
from runtimes.sandbox.usage import Overrun, Usage, descendants, judge, read_parents, read_text, read_usage, stat_parent

_POLL_S = (
    0.025  # the tree may grow for so long before it is noticed: some 50 MB at the rate at which a core touches memory
)
_RESTING_POLL_S = 0.5
_START_S = 30.0  # for bubblewrap to build the walls: 10 ms when nothing else runs
_END_S = 30.0  # for the kernel to tear down a tree that it has killed: 8 GB of memory take a second
_INFO_BYTES = 4096
_turns = itertools.count()


class StillRunning(ArchipelagError):
    """A program was killed and did not go, as one that hangs in a device. Its limits still hold; the Island should take no more Cargos."""


@dataclass(slots=True)
class _Tree:
    """The processes. ``root`` is our child; ``first`` is the one with which all others end."""

    root: subprocess.Popen[bytes]
    first: int
    first_fd: int
    may_fork: bool
    group: Group | None = None
    scratch: Path | None = None
    _program: list[int] = field(default_factory=list)

    def kill(self) -> None:
        """Everything, at once. Idempotent."""
        try:
            signal.pidfd_send_signal(self.first_fd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended
        self.root.kill()
        if self.group is not None:
            self.group.kill()

    def usage(self) -> Usage:
        """Of the program with its children, without bubblewrap. Where it may have none, it is looked for only once."""
        if self.first == self.root.pid:
            return read_usage([self.first])
        if self.may_fork or not self._program:
            self._program = descendants(read_parents(), [self.first])
        return read_usage(self._program)


class Sandboxed:
    """A program in its sandbox. ``stream`` is our end of the socket pair; ``overrun`` says why we ended it, if we did."""

    def __init__(self, tree: _Tree, stream: trio.SocketStream, tier: Tier) -> None:
        self.stream, self.tier = stream, tier
        self.overrun: Overrun | None = None
        self.peak = Usage(0, 0)
        self._tree = tree
        self._ended = trio.Event()
        self._is_resting = False
        self._nap = trio.CancelScope()
        self._started_s = trio.current_time()

    def __repr__(self) -> str:
        return f"<sandboxed {self._tree.first} in {self.tier.name}>"

    @property
    def pid(self) -> int:
        """Of the process with which all others end."""
        return self._tree.first

    def kill_nowait(self) -> None:
        """Ends the whole tree. Idempotent."""
        self._tree.kill()

    def rest(self, is_resting: bool) -> None:
        """A program that has nothing to do, of an engine that waits for jobs, is looked at more seldom: a thousandth of a core instead of a
        hundredth."""
        self._is_resting = is_resting
        self._nap.deadline = trio.current_time() + self._poll_s  # wakes nobody: most jobs end before that

    @property
    def _poll_s(self) -> float:
        return _RESTING_POLL_S if self._is_resting else _POLL_S

    def poll(self) -> int | None:
        """Its exit code as ``wait`` gives it, None while it runs."""
        return self._tree.root.poll()

    async def wait(self) -> int:
        """Until the program has ended by itself or was ended. Its exit code; of one that a signal ended, 128 + the signal or minus it."""
        await self._ended.wait()
        return self._tree.root.wait()

    async def _watch_end(self) -> None:
        """The tree first, then our own child, whose end follows at once."""
        await trio.lowlevel.wait_readable(self._tree.first_fd)
        while self._tree.root.poll() is None:
            await trio.sleep(0.001)
        if self.overrun is None and self._tree.group is not None and self._tree.group.is_out_of_memory():
            self.overrun = Overrun.MEMORY
        self._ended.set()

    async def _supervise(self) -> None:
        """Ends the tree when it uses too much."""
        while not self._ended.is_set():
            usage = self._tree.usage()
            self.peak = Usage(
                max(self.peak.memory_bytes, usage.memory_bytes), max(self.peak.processes, usage.processes)
            )
            self.overrun = self.overrun or judge(self.tier, usage, trio.current_time() - self._started_s)
            if self.overrun is not None:
                self._tree.kill()
            with trio.move_on_after(self._poll_s) as self._nap:
                await self._ended.wait()


@asynccontextmanager
async def open_sandboxed(
    program: Program, tier: Tier, sandbox: Sandbox, stderr: int = subprocess.DEVNULL
) -> AsyncIterator[Sandboxed]:
    """The program, running, until the block is left; then the whole tree has ended, whatever it did. Must be called in trio's thread.

    ``stderr`` is a descriptor, or one of subprocess' constants but PIPE. Raises ConfigError where it cannot be started in this sandbox
    or not with what it asks for, and StillRunning where the kernel does not end it.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            tree = await _start(program, tier, sandbox, theirs.fileno(), stderr)
        try:
            ours.setblocking(False)
            box = Sandboxed(tree, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), tier)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(box._watch_end)
                nursery.start_soon(box._supervise)
                try:
                    yield box
                finally:
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            await _end(tree)



async def _start(program: Program, tier: Tier, sandbox: Sandbox, control: int, stderr: int) -> _Tree:
    """Raises ConfigError; nothing is left running then."""
    cpus = (
        cpus_for(sorted(os.sched_getaffinity(0)), tier.cpus, next(_turns)) if hasattr(os, "sched_getaffinity") else []
    )
    if missing := [bind.source for bind in program.reads if not os.path.exists(bind.source)]:
        raise ConfigError(f"{missing[0]} is not there for {program.command[0]} to read; fetch it again")
    try:
        if sandbox.level is Level.NAMESPACES:
            return await _start_in_namespaces(program, tier, sandbox, control, cpus, stderr)
        if sandbox.level is Level.RLIMITS:
            return _start_alone(program, tier, control, cpus, stderr)
    except OSError as error:
        raise ConfigError(
            f"{program.command[0]} could not be started in its sandbox ({error}); end other processes"
        ) from error
    raise ConfigError(f"there is no sandbox on this machine: {sandbox.reason}")


async def _start_in_namespaces(
    program: Program, tier: Tier, sandbox: Sandbox, control: int, cpus: Sequence[int], stderr: int
) -> _Tree:
    with ExitStack() as stack:
        info_read, info_write = os.pipe()
        _owned(stack, info_read)
        block_read, block_write = os.pipe()
        _owned(stack, block_write)
        with ExitStack() as theirs:
            seccomp = _owned(theirs, filled_pipe(filter_program(policy_for(tier.network, program.may_fork))))
            given = Descriptors(control, seccomp, _owned(theirs, info_write), _owned(theirs, block_read))
            command = bwrap_command(sandbox.bwrap, program, tier, host(), given)
            root = _spawn_bwrap(command, given, stderr)
        try:
            os.set_blocking(info_read, False)
            first = await _first_process(info_read, root.pid)
            tree = _Tree(root, first, _pidfd_of_child(first, root.pid), program.may_fork)
            try:
                for process in (root.pid, first) if cpus else ():
                    os.sched_setaffinity(process, cpus)  # the program is born of these
                tree.group = _join_group(sandbox.cgroup, tier, (root.pid, first))
                os.write(block_write, b"\n")
            except OSError:
                os.close(tree.first_fd)
                raise
            return tree
        except BaseException:
            root.kill()  # and with it what it has started
            root.wait()
            raise


def _spawn_bwrap(command: Sequence[str], given: Descriptors, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        pass_fds=(given.control, given.seccomp, given.info, given.block),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={},  # what bubblewrap has, the program could read from /proc/1/environ
        cwd="/",
        start_new_session=True,  # Ctrl-C and signals to a whole group are for the node, which ends it when its jobs are done
    )


def _owned(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


async def _first_process(info: int, root: int) -> int:
    """The process id, in our namespace, of the first one inside. Raises ConfigError where bubblewrap gave up."""
    said = b""
    with trio.move_on_after(_START_S):
        while not said.rstrip().endswith(b"}"):
            await trio.lowlevel.wait_readable(info)
            part = os.read(info, _INFO_BYTES)
            if not part:
                break
            said += part
    try:
        return int(json.loads(said)["child-pid"])
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"bubblewrap (process {root}) did not start its program; start the node again to see what works here"
        ) from error


def _pidfd_of_child(process: int, parent: int) -> int:
    """Raises ConfigError where it has gone, even if its number is already somebody else's."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError as error:
        raise ConfigError("bubblewrap ended before its program began") from error
    stat = read_text(f"/proc/{process}/stat")
    if not stat or stat_parent(stat) != parent:
        os.close(descriptor)
        raise ConfigError("bubblewrap ended before its program began")
    return descriptor


def _join_group(parent: Path | None, tier: Tier, processes: Sequence[int]) -> Group | None:
    """The program's own group, if groups can be made; its children are born into it. Raises OSError."""
    if parent is None:
        return None
    group = make_group(parent, f"archipelag-{secrets.token_hex(8)}", tier)
    try:
        for process in processes:
            group.join(process)
    except OSError:
        group.remove()
        raise
    return group


def _start_alone(program: Program, tier: Tier, control: int, cpus: Sequence[int], stderr: int) -> _Tree:
    """The weaker sandbox. Raises ConfigError for what it cannot give, and OSError."""
    if program.may_fork or program.devices or tier.network:
        raise ConfigError(
            "without bubblewrap a native program can have no children, devices or network; install bubblewrap"
        )
    if moved := [bind for bind in program.reads if bind.source != bind.target]:
        raise ConfigError(
            f"without bubblewrap {moved[0].source} cannot be shown as {moved[0].target}; install bubblewrap"
        )
    scratch = Path(tempfile.mkdtemp(prefix="archipelag-"))
    environment = {
        name: str(scratch) if value == SCRATCH else value for name, value in environment_of(program, host()).items()
    }
    try:
        root = subprocess.Popen(
            launch_command(program, host(), limits_for(tier, has_user_namespace=False), cpus, control, os.getpid()),
            pass_fds=(control,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            cwd=scratch if program.folder == SCRATCH else program.folder,
            start_new_session=True,
        )
    except OSError:
        shutil.rmtree(scratch)
        raise
    return _Tree(root, root.pid, os.pidfd_open(root.pid), False, scratch=scratch)


async def _end(tree: _Tree) -> None:
    """Kills the tree, waits until the kernel says that all of it is gone, and removes what it leaves. Raises StillRunning."""
    with trio.CancelScope(shield=True):
        tree.kill()
        with trio.move_on_after(_END_S) as scope:
            await trio.lowlevel.wait_readable(tree.first_fd)
            while tree.root.poll() is None:
                await trio.sleep(0.001)
        os.close(tree.first_fd)
        is_removed = tree.group is None or await trio.to_thread.run_sync(tree.group.remove)
        if tree.scratch is not None:
            await trio.to_thread.run_sync(
                shutil.rmtree, tree.scratch, True
            )  # a program may have made it hard to remove
        if scope.cancelled_caught or not is_removed:
            raise StillRunning(
                f"process {tree.first} was killed and is still there; restart this machine before it takes more Cargos"
            )
