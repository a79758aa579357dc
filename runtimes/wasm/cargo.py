"""A WASM Cargo on the node's side: what is its own beside all Cargos of lines (runtimes/lines/cargo.py)."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from protocol import limits
from protocol.errors import ConfigError
from runtimes.lines.cargo import LineKind, LineLimits, LineWorkers, open_line_cargo
from runtimes.lines.engine import LoadOrder
from runtimes.lines.process import starts
from runtimes.worker_process import Walls

WORKER = "runtimes.wasm.worker"
MOST = LineLimits(limits.WASM_TIMEOUT_S, fuel=limits.WASM_FUEL_MAX)


@asynccontextmanager
async def open_wasm_cargo(
    *,
    name: str,
    module: bytes,
    content_hash: str,
    module_hash: str,
    lanes: int = 1,
    most: LineLimits = MOST,
    walls: Walls | None = None,
    options: Mapping[str, Any] | None = None,
) -> AsyncIterator[LineWorkers]:
    """A compiled module in its workers. ``content_hash``: the Cargo's address; ``module_hash``: SHA-256 that the module must have.

    Raises ConfigError with a sentence that says what to do when it cannot be loaded.
    """
    if len(module) > limits.WASM_MODULE_BYTES_MAX:
        raise ConfigError(f"{name}: the module has {len(module)} bytes; at most {limits.WASM_MODULE_BYTES_MAX} are allowed")
    if hashlib.sha256(module).hexdigest() != module_hash:
        raise ConfigError(f"{name}: the module is not the one that was signed: its SHA-256 is not {module_hash:.16}…; fetch it again")
    order = LoadOrder(name, content_hash, entry="", options=options or {}, code=module)
    async with open_line_cargo(LineKind("wasm", starts(WORKER, walls)), order, most=most, lanes=lanes, memory_bytes=len(module)) as cargo:
        yield cargo
