"""Small things about files: locks between processes, atomic writes, hashes.

A lock is ``flock`` on an open file: the kernel drops it when its process ends, however it ends. Lock files are never deleted, since a
process could then hold a lock on a file that no other can see.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtimes.store.errors import DiskFull, FetchCancelled
from runtimes.store.progress import Progress

Cancelled = Callable[[], bool]

CHUNK_BYTES = 1024 * 1024
LOCK_POLL_S = 0.1
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def never() -> bool:
    """A ``cancelled`` for callers that do not cancel."""
    return False


def try_lock(descriptor: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, cancelled: Cancelled = never, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold ``path`` alone among all processes and threads of this machine. Raises FetchCancelled while waiting."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        told = False
        while not try_lock(descriptor, shared=False):
            if cancelled():
                raise FetchCancelled("cancelled while another process had the lock")
            if on_wait is not None and not told:
                on_wait()
                told = True
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """All or nothing, also through a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_is_clear(path.parent), open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """What stands in ``path``; empty where nothing readable does, since all we keep in JSON can be found out again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, stage: str, progress: Progress, cancelled: Cancelled) -> str:
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if cancelled():
                raise FetchCancelled(f"cancelled while {path} was checked")
            digest.update(chunk)
            done += len(chunk)
            progress(stage, done, total)
    return digest.hexdigest()


@contextmanager
def disk_full_is_clear(folder: Path) -> Iterator[None]:
    """Turn the kernel's "no space" into a sentence that says what to do. Raises DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise disk_full(folder) from error


def disk_full(folder: Path) -> DiskFull:
    return DiskFull(
        f"The disk that holds {folder} is full. Free some room there, or set ARCHIPELAG_CACHE_DIR to a folder on another disk, "
        "and start again."
    )
