"""Loads the Cargos an Island offers: the built-in echo, a model file that the store fetches and a GGUF worker opens, or a Cargo by its
manifest (node/local_cargos.py). What is none of these is looked for at the network, once that can be asked (``registered``)."""

from __future__ import annotations

import logging
import re
import threading
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from node.cargo_deck import Deck
from node.cargo_runtimes import Grants, engine_walls
from node.hardware import usable_cpus, usable_ram_bytes
from node.local_cargos import bring_files, find_local
from protocol.errors import ConfigError
from runtimes.base import Loaded
from runtimes.catalogue import CATALOGUE
from runtimes.echo import EchoCargo
from runtimes.store import ConsoleProgress, ModelStore

log = logging.getLogger(__name__)

ECHO = "echo"
_LANES_MAX = 4  # workers of one small Cargo, each 60 MB
_REFERENCE = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*(?:@[0-9]+\.[0-9]+\.[0-9]+)?\Z")


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
    trust_level_max: int = 1

    @property
    def grants(self) -> Grants:
        """What each Cargo with a manifest is given."""
        engines = max(1, len(self.names))
        return Grants(
            threads=engine_threads(self.threads, engines),
            lanes=max(1, min(_LANES_MAX, usable_cpus())),
            memory_limit_bytes=self.memory_limit_bytes // engines if self.memory_limit_bytes is not None else None,
            gpu_layers=self.gpu_layers,
            context_tokens=self.context_tokens,
            trust_level_max=self.trust_level_max,
        )

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


def is_reference(name: str) -> bool:
    """Whether it can only be the name, name and release, or address of a Cargo that the network lists."""
    return name not in CATALOGUE and bool(_REFERENCE.match(name)) and not name.endswith(".gguf") and not Path(name).exists()


async def load_cargos(settings: CargoSettings, deck: Deck, stack: AsyncExitStack, publisher: str) -> list[str]:
    """Puts Cargos on deck, closed with the stack, and gives the names that the network has to be asked for. ``publisher``: of folders.

    Raises ConfigError with what to do when a model cannot be had or does not fit.
    """
    models = [name for name in settings.names if name != ECHO]
    registered = []
    for name in dict.fromkeys(settings.names):
        local = find_local(name, publisher) if name != ECHO else None
        if name == ECHO:
            deck.put(ECHO, EchoCargo(settings.echo_delay_s))
        elif local is not None:
            held = stack.enter_context(ExitStack())
            files = await bring_files(local, ModelStore(settings.cache_dir), held)
            log.info("loading Cargo %s %s (%s)", local.manifest.name, local.manifest.release, local.manifest.runtime)
            await deck.load(local.manifest, local.address, files)
        elif is_reference(name):
            registered.append(name)
        else:
            cargo = await _load_model(name, settings, len(models), deck, stack)
            deck.put(cargo.facts().name, cargo)
    return registered


async def _load_model(source: str, settings: CargoSettings, engines: int, deck: Deck, stack: AsyncExitStack) -> Loaded:
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
            walls=engine_walls(await deck.sandbox(), model.path, settings.gpu_layers),
        )
    )
    facts = cargo.facts()
    if facts.kv_tokens_total == 0:
        raise ConfigError(f"Cargo {model.name} has no room for a KV cache within its memory; raise --memory-limit")
    return cargo
