"""Loads the Cargos an Island offers: the built-in echo, or a model file that the store fetches and a GGUF worker opens."""

from __future__ import annotations

import logging
import threading
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from node.hardware import usable_cpus, usable_ram_bytes
from protocol.errors import ConfigError
from runtimes.base import LoadedCargo
from runtimes.echo import EchoCargo
from runtimes.store import ConsoleProgress, ModelStore

log = logging.getLogger(__name__)

ECHO = "echo"


@dataclass(frozen=True, slots=True)
class CargoSettings:
    """``memory_limit_bytes`` holds for all Cargos together: weights, KV cache and compute buffers."""

    names: tuple[str, ...]
    memory_limit_bytes: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    context_tokens: int | None = None
    cache_dir: Path | None = None
    echo_delay_s: float = 0.0
    takes_shards: bool = True
    shard_dirs: tuple[Path, ...] = ()

    def shard_memory_bytes(self) -> int:
        """What is offered for shards of models that a Coordinator plans: all of the limit where no model is named; without a limit, half
        of the memory, and only where no Cargo is named at all. 0: none."""
        if not self.takes_shards or any(name != ECHO for name in self.names):
            return 0
        if self.memory_limit_bytes is not None:
            return self.memory_limit_bytes
        return 0 if self.names else usable_ram_bytes() // 2


def engine_threads(asked: int | None, engines: int) -> int:
    """Threads for each engine. Engines that spin on the same cores slow each other by ten times, so they share the cores out."""
    if asked is not None:
        return max(1, asked)
    return max(1, (usable_cpus() - 1) // max(1, engines))


async def load_cargos(settings: CargoSettings, stack: AsyncExitStack) -> dict[str, LoadedCargo]:
    """Cargos by name, closed with the stack. Raises ConfigError with what to do when a model cannot be had or does not fit."""
    cargos: dict[str, LoadedCargo] = {}
    models = [name for name in settings.names if name != ECHO]
    for name in dict.fromkeys(settings.names):
        if name == ECHO:
            cargos[ECHO] = EchoCargo(settings.echo_delay_s)
        else:
            cargo = await _load_model(name, settings, len(models), stack)
            cargos[cargo.facts().name] = cargo
    return cargos


async def _load_model(source: str, settings: CargoSettings, engines: int, stack: AsyncExitStack) -> LoadedCargo:
    from runtimes.gguf.cargo import open_gguf_cargo  # heavy, and absent where the gguf extra is not installed

    store = ModelStore(settings.cache_dir)
    with ConsoleProgress() as progress:
        cancelled = threading.Event()
        try:
            fetch = partial(store.fetch, source, progress, cancelled.is_set)
            model = await trio.to_thread.run_sync(fetch, abandon_on_cancel=True)
        finally:
            cancelled.set()  # after a Ctrl-C the thread stops at its next piece; what it has is kept and resumed
    stack.enter_context(store.hold(model))
    limit = settings.memory_limit_bytes // engines if settings.memory_limit_bytes is not None else None
    log.info("loading Cargo %s (%.0f MB)", model.name, model.path.stat().st_size / 1e6)
    cargo = await stack.enter_async_context(
        open_gguf_cargo(
            name=model.name,
            path=model.path,
            content_hash=model.sha256,
            memory_limit_bytes=limit,
            threads=engine_threads(settings.threads, engines),
            gpu_layers=settings.gpu_layers,
            context_tokens=settings.context_tokens,
        )
    )
    facts = cargo.facts()
    if facts.kv_tokens_total == 0:
        raise ConfigError(f"Cargo {model.name} has no room for a KV cache within its memory; raise --memory-limit")
    return cargo
