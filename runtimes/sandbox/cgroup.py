"""A control group (v2) for one program, where we may make one: the kernel then counts and limits the whole tree, shared memory too.

We never rearrange the groups that we find. A group can be made below our own or beside it, if that folder is ours to write (as systemd
does for a service with ``Delegate=yes``) and hands memory and pids down. Elsewhere the supervisor polls.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from runtimes.sandbox.tiers import Tier

_NEEDED = frozenset({"memory", "pids"})
_CPU_PERIOD_US = 100_000
_OVERHEAD_PROCESSES = 2  # bubblewrap itself and its first process inside
_GONE_WAIT_S = 2.0  # between the end of the last process and its leaving the group
_GONE_POLL_S = 0.01


def own_group(cgroup: str, mounts: str) -> Path | None:
    """The folder of our own group, from the texts of /proc/self/cgroup and /proc/self/mounts. None without version 2."""
    paths = [line[3:] for line in cgroup.splitlines() if line.startswith("0::")]
    points = [fields[1] for fields in map(str.split, mounts.splitlines()) if len(fields) > 2 and fields[2] == "cgroup2"]
    if not paths or not points:
        return None
    return Path(points[0]) / paths[0].lstrip("/")


def usable_parent(own: Path) -> Path | None:
    """Where a group can be made: below our own, or beside it."""
    for folder in (own, own.parent):
        try:
            handed_down = set((folder / "cgroup.subtree_control").read_text().split())
        except OSError:
            continue
        if handed_down >= _NEEDED and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    return None


def find_parent() -> Path | None:
    """``usable_parent`` of this process."""
    try:
        own = own_group(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    except OSError:
        return None
    return usable_parent(own) if own is not None else None


def settings(tier: Tier, has_cpu: bool) -> dict[str, str]:
    """File names with what to write into them. ``/tmp`` of the program is memory too, so the group may have both."""
    values = {
        "memory.max": str(tier.memory_bytes_max + tier.scratch_bytes_max),
        "memory.oom.group": "1",
        "pids.max": str(tier.processes_max + _OVERHEAD_PROCESSES),
    }
    return values | ({"cpu.max": f"{tier.cpus * _CPU_PERIOD_US} {_CPU_PERIOD_US}"} if has_cpu else {})


@dataclass(frozen=True, slots=True)
class Group:
    """One program's group."""

    folder: Path

    def join(self, process: int) -> None:
        """Raises OSError."""
        (self.folder / "cgroup.procs").write_text(str(process))

    def kill(self) -> None:
        """The whole tree at once, where the kernel can (Linux 5.14)."""
        kill = self.folder / "cgroup.kill"
        if kill.exists():
            kill.write_text("1")

    def is_out_of_memory(self) -> bool:
        """Whether the kernel has ended the program for its memory."""
        try:
            events = (self.folder / "memory.events").read_text()
        except OSError:
            return False
        return any(line.split() != ["oom_kill", "0"] for line in events.splitlines() if line.startswith("oom_kill "))

    def remove(self) -> bool:
        """Whether it was empty and is gone. Blocks for up to two seconds."""
        until_s = time.monotonic() + _GONE_WAIT_S
        while True:
            try:
                self.folder.rmdir()
                return True
            except FileNotFoundError:
                return True
            except OSError:
                if time.monotonic() > until_s:
                    return False
                time.sleep(_GONE_POLL_S)


def make_group(parent: Path, name: str, tier: Tier) -> Group:
    """Raises OSError where the kernel refuses; nothing is left then."""
    folder = parent / name
    folder.mkdir()
    try:
        has_cpu = "cpu" in (parent / "cgroup.subtree_control").read_text().split()
        for file, value in settings(tier, has_cpu).items():
            (folder / file).write_text(value)
        swap = folder / "memory.swap.max"
        if swap.exists():  # absent where the kernel does not count swap
            swap.write_text("0")
    except OSError:
        folder.rmdir()
        raise
    return Group(folder)
