"""Which GPUs this machine offers, asked of llama.cpp in a process of its own: a driver that crashes must not take the node along."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass

from protocol.ads import Gpu

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_QUESTION = """
import json
from runtimes.gguf import gpu
rows = [[d.description or d.name, d.backend.lower(), d.memory_total_bytes, d.memory_free_bytes] for d in gpu.gpus()]
print(json.dumps({"gpus": rows, "offload": gpu.supports_offload()}))
"""


@dataclass(frozen=True, slots=True)
class GpuReport:
    """``offload``: whether this build of llama.cpp can use a GPU at all. ``problem``: why nothing is known, empty where all is well."""

    gpus: tuple[Gpu, ...] = ()
    free_bytes: tuple[int, ...] = ()
    offload: bool = False
    problem: str = ""


def detect_gpus(question: str = _QUESTION) -> GpuReport:
    """Blocks for about a second. Never raises: an Island without a GPU is an Island."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", question],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        facts = json.loads(answer.stdout.splitlines()[-1])
        gpus = tuple(Gpu(str(name)[:128], str(backend), int(total)) for name, backend, total, _ in facts["gpus"])
        return GpuReport(gpus, tuple(int(free) for *_, free in facts["gpus"]), bool(facts["offload"]))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError, TypeError) as error:
        return GpuReport(problem=_reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        return f"asking llama.cpp ended with status {error.returncode}: {last[0]}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"llama.cpp did not answer within {_TIMEOUT_S:.0f} s; a GPU driver may hang"
    return f"llama.cpp gave no list of devices ({type(error).__name__})"
