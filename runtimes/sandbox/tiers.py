"""What a program may use, by the trust level of its Cargo. Pure data.

mission.md: "restricted 256 MB, 60 s, 1 CPU, no network, no GPU; standard 1 GB, 300 s, 2 CPU, no network; elevated 8 GB, 600 s, 4 CPU,
network and GPU", and "gguf, onnx, wasm and diffusers never have the network".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from protocol.errors import ConfigError

_MIB = 1024**2
CONTAINER = "container"
RUNTIMES = frozenset({"gguf", "onnx", "wasm", "diffusers", CONTAINER})


@dataclass(frozen=True, slots=True)
class Tier:
    """Limits of one program with all its children.

    ``wall_s`` is infinite for an engine that outlives its jobs. ``processes_max`` counts threads too, as the kernel does.
    ``scratch_bytes_max`` is the size of its private /tmp, which lives in memory and is counted apart from ``memory_bytes_max``.
    """

    name: str
    memory_bytes_max: int
    wall_s: float
    cpus: int
    network: bool
    gpu: bool
    processes_max: int
    open_files_max: int
    file_bytes_max: int
    scratch_bytes_max: int

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that fit into the wall-clock time. Infinite where that is."""
        return self.wall_s * self.cpus

    def lasting(self) -> Tier:
        """The same without an end, for an engine that is shared by jobs: there the job is cancelled, not the worker."""
        return replace(self, wall_s=math.inf)


RESTRICTED = Tier(
    name="restricted",
    memory_bytes_max=256 * _MIB,
    wall_s=60.0,
    cpus=1,
    network=False,
    gpu=False,
    processes_max=32,
    open_files_max=128,
    file_bytes_max=32 * _MIB,
    scratch_bytes_max=64 * _MIB,
)
STANDARD = Tier(
    name="standard",
    memory_bytes_max=1024 * _MIB,
    wall_s=300.0,
    cpus=2,
    network=False,
    gpu=False,
    processes_max=64,
    open_files_max=256,
    file_bytes_max=128 * _MIB,
    scratch_bytes_max=256 * _MIB,
)
ELEVATED = Tier(
    name="elevated",
    memory_bytes_max=8192 * _MIB,
    wall_s=600.0,
    cpus=4,
    network=True,
    gpu=True,
    processes_max=256,
    open_files_max=1024,
    file_bytes_max=512 * _MIB,
    scratch_bytes_max=1024 * _MIB,
)
TIERS = (RESTRICTED, STANDARD, ELEVATED, ELEVATED)
"""By trust level, as granted to a container."""


def tier_of(trust_level: int, runtime: str) -> Tier:
    """What a Cargo of this trust level may use in this runtime. Raises ConfigError for a level or a runtime that is none.

    Only containers have the network and, by the tier, a GPU; a native runtime gets a GPU as a grant of its own (``Program.devices``).
    """
    if not 0 <= trust_level < len(TIERS):
        raise ConfigError(f"trust level {trust_level} is none of 0 to {len(TIERS) - 1}")
    if runtime not in RUNTIMES:
        raise ConfigError(f"{runtime!r} is no runtime; there are {', '.join(sorted(RUNTIMES))}")
    tier = TIERS[trust_level]
    return tier if runtime == CONTAINER else replace(tier, network=False, gpu=False)
