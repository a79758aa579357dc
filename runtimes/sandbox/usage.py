"""What a tree of processes uses, read from /proc, and whether that is too much."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from runtimes.sandbox.tiers import Tier

_KIB = 1024
# Not RssFile: a model that is mapped from its file belongs to the page cache, and is shared by all who map it.
_COUNTED = ("RssAnon:", "RssShmem:", "VmSwap:")
_PARENT_FIELD = 1  # of /proc/PID/stat, counted after the name, which may hold any character


class Overrun(StrEnum):
    """Why the supervisor ended a program."""

    TIME = "time"
    MEMORY = "memory"
    PROCESSES = "processes"


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a whole tree: memory of its own, without mapped files, and processes with their threads."""

    memory_bytes: int
    processes: int


def judge(tier: Tier, usage: Usage, elapsed_s: float) -> Overrun | None:
    """What the program has overrun, if anything. Processes before memory, since many of them take much."""
    if elapsed_s > tier.wall_s:
        return Overrun.TIME
    if usage.processes > tier.processes_max:
        return Overrun.PROCESSES
    return Overrun.MEMORY if usage.memory_bytes > tier.memory_bytes_max else None


def status_usage(status: str) -> Usage:
    """Of one process, from the text of /proc/PID/status. A zombie has no memory."""
    memory_bytes, threads = 0, 0
    for line in status.splitlines():
        if line.startswith(_COUNTED):
            memory_bytes += int(line.split()[1]) * _KIB
        elif line.startswith("Threads:"):
            threads = int(line.split()[1])
    return Usage(memory_bytes, threads)


def stat_parent(stat: str) -> int:
    """The parent's process id, from the text of /proc/PID/stat."""
    return int(stat.rpartition(")")[2].split()[_PARENT_FIELD])


def descendants(parents: Iterable[tuple[int, int]], roots: Iterable[int]) -> list[int]:
    """All below the roots, without them. ``parents``: each process with its parent."""
    children = defaultdict(list)
    for process, parent in parents:
        children[parent].append(process)
    found, waiting = [], list(roots)
    while waiting:
        below = children.pop(waiting.pop(), [])
        found += below
        waiting += below
    return found


def read_text(path: str) -> str:
    """Empty where the process has gone."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def read_parents() -> list[tuple[int, int]]:
    """All processes that we see, each with its parent."""
    stats = ((int(name), read_text(f"/proc/{name}/stat")) for name in os.listdir("/proc") if name.isdecimal())
    return [(process, stat_parent(stat)) for process, stat in stats if stat]


def read_usage(processes: Iterable[int]) -> Usage:
    """The sum over these processes; those that have gone count nothing."""
    parts = [status_usage(read_text(f"/proc/{process}/status")) for process in processes]
    return Usage(sum(part.memory_bytes for part in parts), sum(part.processes for part in parts))
