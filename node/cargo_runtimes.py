"""Opens a Cargo by its manifest in the runtime that it names, inside the walls of its trust level; the same for an Island that serves it
and for its publisher who tries it (``cargo run``).

    runtimes = await find_runtimes(node_id)
    async with open_cargo(manifest, address, files, runtimes, grants) as cargo: ...
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from protocol import limits
from protocol.cargos import CargoManifest, Runtime
from protocol.errors import ConfigError
from runtimes.base import Loaded
from runtimes.container.engines import ContainerEngine
from runtimes.lines.cargo import LineKind, LineLimits, open_line_cargo
from runtimes.lines.engine import LoadOrder
from runtimes.lines.process import starts
from runtimes.sandbox.command import Bind
from runtimes.sandbox.probe import Level, Sandbox, probe
from runtimes.sandbox.tiers import Tier, tier_of
from runtimes.worker_process import Walls

log = logging.getLogger(__name__)

_INTERPRETER_BYTES = 128 * 1024**2
_GPU_DEVICES = ("nvidiactl", "nvidia0", "kfd", "dri")
_OWN_TIER = replace(
    tier_of(3, "gguf"), name="own", memory_bytes_max=2**50, cpus=4096, processes_max=4096, file_bytes_max=2**30, network=False, gpu=False
)
_INSIDE = "/cargo"  # where a worker finds the files of its Cargo
_LOAD_S = 600.0  # of models; SDXL takes minutes from a slow disk
_WORKERS = {Runtime.ONNX: "runtimes.onnx.worker", Runtime.DIFFUSERS: "runtimes.diffusers.worker"}
_NEEDS_MODULE = {Runtime.ONNX: "onnxruntime", Runtime.DIFFUSERS: "diffusers", Runtime.WASM: "wasmtime", Runtime.GGUF: "llama_cpp"}


@dataclass(frozen=True, slots=True)
class Grants:
    """What this node gives a Cargo. ``lanes``: jobs of a small one at a time; ``trust_level_max``: no Cargo is granted more."""

    threads: int = 1
    lanes: int = 1
    memory_limit_bytes: int | None = None
    gpu_layers: int | None = None
    context_tokens: int | None = None
    trust_level_max: int = 3


@dataclass(frozen=True, slots=True)
class Runtimes:
    """What this machine can run, found by trying. ``container`` is None where no engine works, and ``why_no_container`` says why."""

    sandbox: Sandbox
    container: ContainerEngine | None = None
    why_no_container: str = ""
    node_id: str = ""


def _is_installed(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


async def find_runtimes(node_id: str, with_containers: bool = True, sandbox: Sandbox | None = None) -> Runtimes:
    """Tries the sandbox, where it is not known, and looks for a container engine, which takes some tenths of a second."""
    if sandbox is None:
        sandbox = await trio.to_thread.run_sync(probe)
    if not with_containers:
        return Runtimes(sandbox, node_id=node_id)
    from runtimes.container.cargo import remove_leftovers
    from runtimes.container.engines import find_engine

    found = await find_engine()
    if found.engine is not None:
        await remove_leftovers(found.engine, node_id)
    return Runtimes(sandbox, found.engine, found.reason if found.engine is None else "", node_id)


def open_cargo(
    manifest: CargoManifest, address: str, files: Mapping[str, Path], runtimes: Runtimes, grants: Grants
) -> AbstractAsyncContextManager[Loaded]:
    """``files``: path in the manifest -> where it lies, already checked. Raises ConfigError that says what to do."""
    runtime = manifest.runtime
    if runtime in _NEEDS_MODULE and not _is_installed(_NEEDS_MODULE[runtime]):
        brings = "make setup-images" if runtime is Runtime.DIFFUSERS else "make setup"
        raise ConfigError(f"{manifest.name} needs the runtime {runtime}, which is not installed here; `{brings}` brings it")
    if manifest.trust_level > grants.trust_level_max:
        log.warning(
            "Cargo %s asks for trust level %d and is granted %d; `start --trust-level-max %d` grants more",
            *(manifest.name, manifest.trust_level, grants.trust_level_max, manifest.trust_level),
        )
    match runtime:
        case Runtime.WASM:
            return _open_wasm(manifest, address, files, runtimes, grants)
        case Runtime.ONNX | Runtime.DIFFUSERS:
            return _open_lines(manifest, address, files, runtimes, grants)
        case Runtime.CONTAINER:
            return _open_container(manifest, address, files, runtimes, grants)
        case Runtime.GGUF:
            return _open_gguf(manifest, address, files, runtimes, grants)


def tier_for(manifest: CargoManifest, grants: Grants) -> Tier:
    """Of what the Cargo asks for, as much as is granted."""
    return tier_of(min(manifest.trust_level, grants.trust_level_max), manifest.runtime)


def limits_for(manifest: CargoManifest, tier: Tier) -> LineLimits:
    """Of one job."""
    timeout_s = min(float(manifest.needs.time_s), tier.wall_s)
    if manifest.runtime is Runtime.WASM:
        return LineLimits(min(timeout_s, limits.WASM_TIMEOUT_S), manifest.needs.output_bytes, limits.WASM_FUEL_MAX)
    return LineLimits(timeout_s, manifest.needs.output_bytes)


@asynccontextmanager
async def _open_wasm(
    manifest: CargoManifest, address: str, files: Mapping[str, Path], runtimes: Runtimes, grants: Grants
) -> AsyncIterator[Loaded]:
    from runtimes.wasm.cargo import open_wasm_cargo

    granted = tier_for(manifest, grants)
    # the module's own memory is bounded by the engine, the same everywhere; the interpreter round it must not take any of that
    room = max(granted.memory_bytes_max, limits.WASM_MEMORY_BYTES_MAX + _INTERPRETER_BYTES)
    tier = replace(granted, memory_bytes_max=room)
    module = await trio.Path(files[manifest.entry]).read_bytes()
    module_hash = next(file.sha256 for file in manifest.files if file.path == manifest.entry)
    opened = open_wasm_cargo(
        name=manifest.name,
        module=module,
        content_hash=address,
        module_hash=module_hash,
        lanes=grants.lanes,
        most=limits_for(manifest, tier),
        walls=Walls(runtimes.sandbox, tier) if runtimes.sandbox.level is not Level.NONE else None,
    )
    async with opened as cargo:
        yield cargo


@asynccontextmanager
async def _open_lines(
    manifest: CargoManifest, address: str, files: Mapping[str, Path], runtimes: Runtimes, grants: Grants
) -> AsyncIterator[Loaded]:
    sandbox = runtimes.sandbox
    if sandbox.level is Level.NONE:
        raise ConfigError(f"{manifest.name}: {manifest.runtime} runs only inside a sandbox, and there is none here: {sandbox.reason}")
    tier = tier_for(manifest, grants)
    places = {path: str(place.resolve()) for path, place in files.items()}
    inside: Mapping[str, str] = places
    reads: tuple[Bind, ...] = ()
    if sandbox.level is Level.NAMESPACES:  # else nothing can be shown elsewhere than it is
        inside = {path: f"{_INSIDE}/{path}" for path in places}
        reads = tuple(Bind(place, inside[path]) for path, place in places.items())
    threads = min(grants.threads, tier.cpus)
    order = LoadOrder(manifest.name, address, manifest.entry, inside, json.loads(manifest.options), threads)
    environment = (("OMP_NUM_THREADS", str(threads)),)
    kind = LineKind(
        manifest.runtime, starts(_WORKERS[manifest.runtime], Walls(sandbox, tier, reads, environment=environment)), _LOAD_S
    )
    async with open_line_cargo(kind, order, most=limits_for(manifest, tier), memory_bytes=manifest.size_bytes) as cargo:
        yield cargo


@asynccontextmanager
async def _open_container(
    manifest: CargoManifest, address: str, files: Mapping[str, Path], runtimes: Runtimes, grants: Grants
) -> AsyncIterator[Loaded]:
    from runtimes.container.archive import ARCHIVE_PATH
    from runtimes.container.cargo import open_container_cargo
    from runtimes.container.image import ImageSource

    engine = runtimes.container
    if engine is None:
        why = runtimes.why_no_container or "no engine was looked for"
        raise ConfigError(f"{manifest.name} is a container, and this machine runs none: {why}")
    source = ImageSource(archive=files.get(ARCHIVE_PATH))
    opened = open_container_cargo(
        manifest, address, engine, node=runtimes.node_id, slots=grants.lanes, source=source, trust_level_max=grants.trust_level_max
    )
    async with opened as cargo:
        yield cargo


def engine_walls(sandbox: Sandbox, model: Path, gpu_layers: int | None, tier: Tier | None = None) -> Walls | None:
    """For a worker of llama.cpp; None where it works without: where there is no sandbox, and where a GPU may be used, whose drivers read
    more of a machine than can be told beforehand. ``tier``: of a stranger's Cargo; what the owner names has no bound but his own."""
    if sandbox.level is Level.NONE or (gpu_layers != 0 and has_gpu_devices()):
        return None
    path = str(model.resolve())
    reads = (Bind(path),) if sandbox.level is Level.NAMESPACES else ()
    return Walls(sandbox, tier or _OWN_TIER, reads)


def has_gpu_devices() -> bool:
    return any(Path("/dev", name).exists() for name in _GPU_DEVICES)


@asynccontextmanager
async def _open_gguf(
    manifest: CargoManifest, address: str, files: Mapping[str, Path], runtimes: Runtimes, grants: Grants
) -> AsyncIterator[Loaded]:
    from runtimes.gguf.cargo import open_gguf_cargo

    gpu_layers = grants.gpu_layers
    if gpu_layers is None and has_gpu_devices():
        gpu_layers = 0  # a stranger's model gets a GPU, and with it an engine without namespaces, only where the owner says so
    walls = engine_walls(runtimes.sandbox, files[manifest.entry], gpu_layers, tier_for(manifest, grants))
    if walls is None and not gpu_layers:
        raise ConfigError(f"{manifest.name}: gguf runs only inside a sandbox, and there is none here: {runtimes.sandbox.reason}")
    opened = open_gguf_cargo(
        name=manifest.name,
        path=files[manifest.entry],
        content_hash=address,
        memory_limit_bytes=grants.memory_limit_bytes,
        threads=grants.threads,
        gpu_layers=gpu_layers,
        context_tokens=grants.context_tokens,
        walls=walls,
    )
    async with opened as cargo:
        yield cargo

