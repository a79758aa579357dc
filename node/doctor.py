"""What ``archipelag-node doctor`` looks at. Each check returns findings; none changes anything but the data folder it is given."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import trio

from node import VERSION
from node.datadir import DataDir
from node.gpus import GpuReport, detect_gpus
from node.hardware import usable_cpus, usable_ram_bytes
from node.trust import Pins, resolve_coordinator
from protocol.errors import ArchipelagError, ConfigError
from runtimes.container.engines import find_engine
from runtimes.sandbox.probe import Level, probe

_DISK_WANTED_BYTES = 2 * 1024**3
_RAM_WANTED_BYTES = 1024**3
_LIBP2P_WANTED = "0.8.1"
_DESCRIPTORS_WANTED = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    state: str  # "ok", "note" or "fail"
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.state:<5} {self.what}" + (f"\n      -> {self.advice}" if self.advice else "")


def examine(data_dir: str, coordinator: str = "") -> list[Finding]:
    """All findings, in an order that reads from the machine up to the network."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _machine,
        _python,
        _engine,
        _runtimes,
        _walls,
        _alike,
        lambda: _folder(data_dir),
        _cache,
    ]
    if coordinator:
        checks.append(lambda: _coordinator(data_dir, coordinator))
    return [finding for check in checks for finding in check()]


def _machine() -> Iterator[Finding]:
    cores, ram = usable_cpus(), usable_ram_bytes()
    yield Finding(
        "ok", f"{platform.system()} {platform.machine()}, {cores} usable cores, {ram / 1024**3:.1f} GiB memory"
    )
    if ram < _RAM_WANTED_BYTES:
        yield Finding("note", "less than 1 GiB of memory: only the smallest models fit")
    if cores == 1:
        yield Finding(
            "note", "one core: the engine and the network share it, so answers are slower", "give the node two cores"
        )
    others = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if others > cores:
        yield Finding(
            "note", f"the machine is busy (load {others:.1f}); engines that share cores slow down several times"
        )
    descriptors = (
        psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[0] if hasattr(psutil.Process, "rlimit") else _DESCRIPTORS_WANTED
    )
    if 0 <= descriptors < _DESCRIPTORS_WANTED:
        yield Finding(
            "note", f"at most {descriptors} open files: a Coordinator of many peers needs more", "ulimit -n 8192"
        )


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"archipelag-node {VERSION} on Python {platform.python_version()} ({sys.prefix})")
    found = metadata.version("libp2p")
    if found != _LIBP2P_WANTED:
        yield Finding("fail", f"libp2p {found} is installed, this node is made for {_LIBP2P_WANTED}", "make setup")
    else:
        yield Finding("ok", f"libp2p {found}")


def _engine() -> Iterator[Finding]:
    try:
        found = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        yield Finding("fail", "llama-cpp-python is not installed: no GGUF model can run", "make setup")
        return
    report = detect_gpus()
    if report.problem:
        yield Finding("fail", f"llama-cpp-python {found} does not work: {report.problem}", "make clean && make setup")
        return
    yield Finding("ok", f"llama-cpp-python {found}, {'can' if report.offload else 'cannot'} use a GPU")
    yield from _gpus(report)


def _gpus(report: GpuReport) -> Iterator[Finding]:
    for gpu, free_bytes in zip(report.gpus, report.free_bytes, strict=True):
        room = f"{free_bytes / 1024**3:.1f} of {gpu.vram_bytes / 1024**3:.1f} GiB free"
        yield Finding("ok", f"GPU {gpu.name} ({gpu.backend}): {room}")
    if not report.gpus:
        hints = {"nvidia-smi": "cuda", "vulkaninfo": "vulkan"}
        tool = next((name for name in hints if shutil.which(name)), None)
        backend = "metal" if sys.platform == "darwin" else hints.get(tool or "", "")
        advice = f"make setup GPU={backend}" if backend and not report.offload else ""
        yield Finding("note", "no GPU that this build can use; models run on the CPU", advice)


_RUNTIMES = (("onnx", "onnxruntime", "make setup"), ("wasm", "wasmtime", "make setup"), ("diffusers", "diffusers", "make setup-images"))


def _runtimes() -> Iterator[Finding]:
    """What of Cargos can run here beside language models."""
    for runtime, package, brings in _RUNTIMES:
        try:
            yield Finding("ok", f"runtime {runtime}: {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Finding("note", f"no {package}: Cargos of the runtime {runtime} do not run here", brings)
    found = trio.run(find_engine)
    if found.engine is not None:
        yield Finding("ok", f"runtime container: {found.engine}")
    else:
        yield Finding("note", f"no container runs here: {found.reason}", "apt-get install podman runc" if _is_debian() else "")


def _is_debian() -> bool:
    return Path("/etc/debian_version").exists()


def _walls() -> Iterator[Finding]:
    """Behind what native Cargos work."""
    sandbox = probe()
    yield Finding("ok" if sandbox.level is Level.NAMESPACES else "note", str(sandbox))


def _alike() -> Iterator[Finding]:
    """Whether a Coordinator here finds questions in its cache of answers that mean the same."""
    from node.answer_embedder import missing_modules
    from node.settings import CACHE_MODEL_DEFAULT
    from node.shipped import shipped
    from runtimes.store import ModelStore

    what = "a Coordinator here answers alike questions from its cache"
    if missing := missing_modules():
        yield Finding("note", f"{what} only where they are equal: {missing[0]} is not installed", "pip install archipelag[onnx]")
        return
    found = shipped(CACHE_MODEL_DEFAULT)
    assert found is not None, "it ships"
    here = {entry.model.sha256 for entry in ModelStore().list()}
    absent = [file for file in found.manifest.files if file.sha256 not in here]
    if absent:
        size = sum(file.size_bytes for file in absent)
        yield Finding("ok", f"{what}; it fetches {CACHE_MODEL_DEFAULT} first, {size / 1e6:.0f} MB")
    else:
        yield Finding("ok", f"{what}, by {CACHE_MODEL_DEFAULT}, which is in the model cache")


def _folder(data_dir: str) -> Iterator[Finding]:
    try:
        data = DataDir.open(data_dir)
        with data.locked():
            state = "no node runs on it"
    except ConfigError as error:
        if "already runs" not in str(error):
            yield Finding("fail", str(error))
            return
        data, state = DataDir.open(data_dir), "a node runs on it"
    try:
        yield Finding("ok", f"data folder {data.path}: {state}, identity {data.key('identity').peer_id}")
    except ConfigError as error:
        yield Finding("fail", str(error))


def _cache() -> Iterator[Finding]:
    from runtimes.store import ModelStore, default_cache_dir

    folder = default_cache_dir()
    existing = next((p for p in [folder, *folder.parents] if p.exists()), Path("/"))
    free = shutil.disk_usage(existing).free
    models = ModelStore().list() if folder.exists() else []
    yield Finding("ok", f"model cache {folder}: {len(models)} models, {free / 1024**3:.1f} GiB free on the disk")
    if free < _DISK_WANTED_BYTES:
        yield Finding(
            "note", "less than 2 GiB of disk left for models", "free some, or set ARCHIPELAG_CACHE_DIR to another disk"
        )


def _coordinator(data_dir: str, address: str) -> Iterator[Finding]:
    async def reach() -> str:
        target = await resolve_coordinator(address, Pins(DataDir.open(data_dir)))
        from node.net.host import open_host

        async with open_host(os.urandom(32), ["/ip4/127.0.0.1/tcp/0"]) as host:
            host.remember(target.peer, target.addresses)
            return await host.connect(target.peer)

    try:
        yield Finding("ok", f"Coordinator {trio.run(reach)} answers")
    except (ArchipelagError, OSError) as error:
        yield Finding(
            "fail",
            f"the Coordinator at {address} cannot be reached: {error}",
            "check the address, and that its port is open",
        )
