"""The worker process of WASM Cargos (runtimes/lines/worker.py says how one is talked to)."""

from __future__ import annotations

import hashlib

from protocol.errors import ConfigError
from runtimes.lines.engine import LoadOrder
from runtimes.lines.messages import Ended
from runtimes.lines.worker import Job, serve_computing
from runtimes.wasm.engine import ENGINE_NAME, Compiled, RunLimits, WasmEngine, run_module

# The interpreter and its libraries have 0.3 GB of addresses, a memory 256 MiB; the rest is for compiling a large module.
_ADDRESS_BYTES_MAX = 2 * 1024**3


class WasmComputing:
    """Runs a module. Implements runtimes.lines.worker.Computing."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    @property
    def label(self) -> str:
        return ENGINE_NAME

    def run(self, job: Job) -> Ended:
        order = job.order
        result = run_module(self._compiled, order.input, job.emit, RunLimits(order.fuel, order.output_bytes_max), order.seed)
        return Ended(order.job, result.outcome, result.message, result.exit_code, result.fuel_used, result.stderr)

    def interrupt(self) -> None:
        self._compiled.engine.interrupt()


def load(order: LoadOrder) -> WasmComputing:
    """Raises ConfigError."""
    try:
        return WasmComputing(WasmEngine().compile(order.code, hashlib.sha256(order.code).hexdigest()))
    except MemoryError:
        raise ConfigError("the module needs too much memory to compile") from None


if __name__ == "__main__":
    serve_computing(load, _ADDRESS_BYTES_MAX)
