"""The kernel's limits of one process, from a tier. Pure.

Memory is limited by RLIMIT_DATA rather than RLIMIT_AS: a mapped model costs nothing of it, and engines reserve far more addresses than
they use (wasmtime 4 GiB for each memory). It counts private writable memory, so shared memory is left to the supervisor.
"""

from __future__ import annotations

import math

from runtimes.sandbox.tiers import Tier

_STACK_BYTES = (
    8 * 1024**2
)  # of the first thread, and by default of each other: Linux' own default, for where it was raised
_KILL_DELAY_S = 1  # between the signal that a program may catch (SIGXCPU) and the one that it may not

Limits = tuple[tuple[str, int, int], ...]
"""Name without RLIMIT_, soft, hard."""


def limits_for(tier: Tier, has_user_namespace: bool) -> Limits:
    """``has_user_namespace``: RLIMIT_NPROC counts all processes of the user in the namespace, so outside one it would count the node's."""
    same = {
        "CORE": 0,
        "DATA": tier.memory_bytes_max,
        "FSIZE": tier.file_bytes_max,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "NICE": 0,
        "NOFILE": tier.open_files_max,
        "RTPRIO": 0,
        "SIGPENDING": tier.processes_max,
        "STACK": _STACK_BYTES,
    }
    if has_user_namespace:
        same["NPROC"] = tier.processes_max
    limits = tuple((name, value, value) for name, value in same.items())
    if math.isfinite(tier.cpu_s):
        seconds = math.ceil(tier.cpu_s)
        limits += (("CPU", seconds, seconds + _KILL_DELAY_S),)
    return limits
