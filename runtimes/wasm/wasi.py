"""WASI preview1 for a command that has stdin, stdout and stderr, and nothing else.

No files, no sockets, no environment. Time is a counter that starts at a fixed date and goes on by a millisecond each time that it is
asked, so that a loop that waits for the clock ends; sleeping sets it forward. Chance comes from a seed. All that asks for files says
ENOSYS, so that programs of languages whose libraries import these functions still run; sockets are not there at all.

Each function is bounded: what a module asks for in one call costs the host no more than a copy of 64 KiB, or it is output, which is
counted. The structures are those of wasi_snapshot_preview1.witx.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from protocol import limits

MODULE = "wasi_snapshot_preview1"
_EPOCH_NS = 1_577_836_800 * 10**9  # 2020-01-01
_TICK_NS = 10**6
_PIECE_BYTES = 64 * 1024
_VECTORS_MAX = 1024  # IOV_MAX of Linux
_SUBSCRIPTIONS_MAX = 64
_CHARACTER_DEVICE = 2
_RIGHT_READ, _RIGHT_WRITE = 1 << 1, 1 << 6


class Errno(IntEnum):
    SUCCESS = 0
    BADF = 8
    FAULT = 21
    INVAL = 28
    NOSYS = 52
    SPIPE = 70


class Exit(Exception):
    """The module has called proc_exit."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit {code}")
        self.code = code


class OutputLimit(Exception):
    """The module has written more than it may."""


class Fault(Exception):
    """A pointer of the module leads out of its memory."""


class Memory(Protocol):
    """The module's memory as it is now: its address in the host, and its size in bytes."""

    def span(self) -> tuple[int, int]: ...


@dataclass(slots=True)
class Job:
    """What one run has read, written and asked for. ``emit`` takes output and may wait; ``output_bytes_max`` of it are taken."""

    input: bytes
    emit: Callable[[bytes], None]
    output_bytes_max: int
    seed: bytes
    memory: Memory | None = None
    read_bytes: int = 0
    output_bytes: int = 0
    stderr: bytearray = field(default_factory=bytearray)
    clock_ns: int = _EPOCH_NS
    draws: int = 0
    closed: set[int] = field(default_factory=set)

    def _place(self, pointer: int, size: int) -> int:
        """The host's address of a range of the module's memory. Raises Fault where it is not all inside."""
        if self.memory is None:
            raise Fault
        base, end = self.memory.span()
        pointer &= 0xFFFFFFFF
        if pointer + size > end:
            raise Fault
        return base + pointer

    def load(self, pointer: int, size: int) -> bytes:
        return ctypes.string_at(self._place(pointer, size), size)

    def store(self, pointer: int, data: bytes) -> None:
        ctypes.memmove(self._place(pointer, len(data)), data, len(data))

    def store_u32(self, pointer: int, value: int) -> None:
        self.store(pointer, value.to_bytes(4, "little"))

    def store_u64(self, pointer: int, value: int) -> None:
        self.store(pointer, value.to_bytes(8, "little"))

    def now_ns(self) -> int:
        self.clock_ns += _TICK_NS
        return self.clock_ns


def _vectors(job: Job, pointer: int, count: int) -> list[tuple[int, int]]:
    """Pointers and sizes of an array of (c)iovec."""
    flat = struct.unpack(f"<{2 * count}I", job.load(pointer, 8 * count))
    return list(zip(flat[::2], flat[1::2], strict=True))


def _args_sizes_get(job: Job, count: int, size: int) -> int:
    job.store_u32(count, 0)
    job.store_u32(size, 0)
    return Errno.SUCCESS


def _nothing(job: Job, *_: int) -> int:
    """args_get and environ_get of empty lists; sched_yield."""
    return Errno.SUCCESS


def _fd_read(job: Job, fd: int, vectors: int, count: int, read: int) -> int:
    if fd != 0 or fd in job.closed:
        return Errno.BADF
    if not 0 <= count <= _VECTORS_MAX:
        return Errno.INVAL
    total = 0
    for pointer, size in _vectors(job, vectors, count):
        piece = job.input[job.read_bytes : job.read_bytes + size]
        job.store(pointer, piece)
        job.read_bytes += len(piece)
        total += len(piece)
        if len(piece) < size:
            break
    job.store_u32(read, total)
    return Errno.SUCCESS


def _fd_write(job: Job, fd: int, vectors: int, count: int, written: int) -> int:
    if fd not in (1, 2) or fd in job.closed:
        return Errno.BADF
    if not 0 <= count <= _VECTORS_MAX:
        return Errno.INVAL
    total = 0
    for pointer, size in _vectors(job, vectors, count):
        if fd == 1:
            _to_stdout(job, pointer, size)
        else:
            job.stderr += job.load(pointer, min(size, limits.WASM_STDERR_BYTES_MAX - len(job.stderr)))
        total += size
    job.store_u32(written, total & 0xFFFFFFFF)
    return Errno.SUCCESS


def _to_stdout(job: Job, pointer: int, size: int) -> None:
    if job.output_bytes + size > job.output_bytes_max:
        raise OutputLimit
    for start in range(0, size, _PIECE_BYTES):
        piece = job.load(pointer + start, min(_PIECE_BYTES, size - start))
        job.output_bytes += len(piece)
        job.emit(piece)


def _fd_close(job: Job, fd: int) -> int:
    if not 0 <= fd <= 2 or fd in job.closed:
        return Errno.BADF
    job.closed.add(fd)
    return Errno.SUCCESS


def _fd_seek(job: Job, fd: int, *_: int) -> int:
    return Errno.SPIPE if 0 <= fd <= 2 and fd not in job.closed else Errno.BADF


def _fd_fdstat_get(job: Job, fd: int, stat: int) -> int:
    if not 0 <= fd <= 2 or fd in job.closed:
        return Errno.BADF
    # A character device, so that a C library writes each line as soon as it is whole
    job.store(stat, struct.pack("<BxHxxxxQQ", _CHARACTER_DEVICE, 0, _RIGHT_READ if fd == 0 else _RIGHT_WRITE, 0))
    return Errno.SUCCESS


def _bad_descriptor(job: Job, *_: int) -> int:
    """fd_prestat_get: there are no folders, which a C library takes as the end of their list."""
    return Errno.BADF


def _not_here(job: Job, *_: int) -> int:
    return Errno.NOSYS


def _proc_exit(job: Job, code: int) -> None:
    raise Exit(code & 0xFFFFFFFF)


def _clock_res_get(job: Job, clock: int, resolution: int) -> int:
    if not 0 <= clock <= 3:
        return Errno.INVAL
    job.store_u64(resolution, _TICK_NS)
    return Errno.SUCCESS


def _clock_time_get(job: Job, clock: int, precision: int, time: int) -> int:
    if not 0 <= clock <= 3:
        return Errno.INVAL
    job.store_u64(time, job.now_ns())
    return Errno.SUCCESS


def _random_get(job: Job, pointer: int, size: int) -> int:
    if not 0 <= size <= _PIECE_BYTES:
        return Errno.INVAL
    job.draws += 1
    job.store(pointer, hashlib.shake_256(b"archipelag/wasm/random/1" + job.seed + job.draws.to_bytes(8, "big")).digest(size))
    return Errno.SUCCESS


def _poll_oneoff(job: Job, subscriptions: int, events: int, count: int, happened: int) -> int:
    """All that is waited for has happened: clocks are set forward, stdin and stdout are always ready."""
    if not 1 <= count <= _SUBSCRIPTIONS_MAX:
        return Errno.INVAL
    out = b""
    for at in range(count):
        userdata, tag, _, timeout, _, flags = struct.unpack("<QB7xI4xQQH6x", job.load(subscriptions + 48 * at, 48))
        if tag == 0:
            until = timeout if flags & 1 else min(job.clock_ns + timeout, 2**63)
            job.clock_ns = max(job.clock_ns, until)
        out += struct.pack("<QHB5xQH6x", userdata, Errno.SUCCESS, tag, 0 if tag == 0 else 1, 0)
    job.store(events, out)
    job.store_u32(happened, count)
    return Errno.SUCCESS


Call = Callable[..., int | None]

# Name: parameters (i: i32, I: i64), and what it does. All but proc_exit give an errno as i32.
FUNCTIONS: dict[str, tuple[str, Call]] = {
    "args_get": ("ii", _nothing),
    "args_sizes_get": ("ii", _args_sizes_get),
    "environ_get": ("ii", _nothing),
    "environ_sizes_get": ("ii", _args_sizes_get),
    "clock_res_get": ("ii", _clock_res_get),
    "clock_time_get": ("iIi", _clock_time_get),
    "fd_close": ("i", _fd_close),
    "fd_fdstat_get": ("ii", _fd_fdstat_get),
    "fd_prestat_get": ("ii", _bad_descriptor),
    "fd_prestat_dir_name": ("iii", _bad_descriptor),
    "fd_read": ("iiii", _fd_read),
    "fd_seek": ("iIii", _fd_seek),
    "fd_tell": ("ii", _fd_seek),
    "fd_write": ("iiii", _fd_write),
    "poll_oneoff": ("iiii", _poll_oneoff),
    "proc_exit": ("i", _proc_exit),
    "random_get": ("ii", _random_get),
    "sched_yield": ("", _nothing),
    "fd_advise": ("iIIi", _not_here),
    "fd_allocate": ("iII", _not_here),
    "fd_datasync": ("i", _not_here),
    "fd_fdstat_set_flags": ("ii", _not_here),
    "fd_fdstat_set_rights": ("iII", _not_here),
    "fd_filestat_get": ("ii", _not_here),
    "fd_filestat_set_size": ("iI", _not_here),
    "fd_filestat_set_times": ("iIIi", _not_here),
    "fd_pread": ("iiiIi", _not_here),
    "fd_pwrite": ("iiiIi", _not_here),
    "fd_readdir": ("iiiIi", _not_here),
    "fd_renumber": ("ii", _not_here),
    "fd_sync": ("i", _not_here),
    "path_create_directory": ("iii", _not_here),
    "path_filestat_get": ("iiiii", _not_here),
    "path_filestat_set_times": ("iiiiIIi", _not_here),
    "path_link": ("iiiiiii", _not_here),
    "path_open": ("iiiiiIIii", _not_here),
    "path_readlink": ("iiiiii", _not_here),
    "path_remove_directory": ("iii", _not_here),
    "path_rename": ("iiiiii", _not_here),
    "path_symlink": ("iiiii", _not_here),
    "path_unlink_file": ("iii", _not_here),
}


def call(function: Call, job: Job, arguments: tuple[int, ...]) -> int | None:
    """What a module sees of a function: a pointer that leads nowhere is EFAULT. Raises Exit and OutputLimit, and what ``emit`` raises."""
    try:
        result = function(job, *arguments)
    except Fault:
        return int(Errno.FAULT)
    return None if result is None else int(result)
