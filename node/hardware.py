"""What this machine has, as far as this process may use it: cores by affinity and cgroup, memory by cgroup, disk of the data folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from protocol.ads import Gpu, Hardware

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Cores this process may run on: the smaller of its affinity and its cgroup's quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read(_CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return max(1, cores)


def usable_ram_bytes() -> int:
    """Memory that may be offered: the smaller of the machine's and the cgroup's limit."""
    total = int(psutil.virtual_memory().total)
    limit = _read(_CGROUP / "memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def detect(data_dir: Path, gpus: tuple[Gpu, ...] = ()) -> Hardware:
    return Hardware(
        cpus=usable_cpus(), ram_bytes=usable_ram_bytes(), disk_free_bytes=shutil.disk_usage(data_dir).free, gpus=gpus
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no cgroup v2 here: no limit from it
        return ""
