"""What the tests of hostile Cargos share: their manifests, a healthy Cargo beside them, and what there is to win on this machine."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

from node.cargo_runtimes import Grants, Runtimes, open_cargo
from protocol.blobs import BlobTree, leaf_hash
from protocol.cargo_io import DoneLine, Line, encode_input
from protocol.cargos import CachePolicy, CargoFile, CargoManifest, Needs, Runtime, address_of, canonical_json
from protocol.errors import Code, Refused
from protocol.limits import BLOB_CHUNK_BYTES
from protocol.prices import Ask
from runtimes.base import LineCargo, LineRequest
from runtimes.lines.cargo import LineWorkers
from runtimes.wasm import modules

SECRET = "very-secret-word"
MIB = 1024**2
PATIENCE_S = 60.0
_PUBLISHER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
_IN_ACCESS, _IN_MODIFY, _IN_OPEN = 1, 2, 0x20
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def root_of(data: bytes) -> str:
    leaves = [leaf_hash(data[at : at + BLOB_CHUNK_BYTES]) for at in range(0, len(data), BLOB_CHUNK_BYTES)]
    return BlobTree(len(data), b"".join(leaves)).root() if data else ""


def needs(**changes: int) -> Needs:
    return Needs(**({"memory_bytes": 64 * MIB, "time_s": 10, "output_bytes": 9 * MIB, "disk_bytes": 8 * MIB} | changes))


def manifest_of(name: str, runtime: Runtime, entry: str, files: Mapping[str, Path], most: Needs) -> CargoManifest:
    """As its publisher would make it of these files."""
    listed = []
    for path, place in files.items():
        data = place.read_bytes()
        listed.append(CargoFile(path, hashlib.sha256(data).hexdigest(), len(data), (), root_of(data)))
    return CargoManifest(
        version=1,
        name=name,
        release="1.0.0",
        publisher=_PUBLISHER,
        runtime=runtime,
        entry=entry,
        files=tuple(listed),
        needs=most,
        ask=Ask(1000, 0, 0),
        trust_level=0,
        licence="Apache-2.0",
        description="is up to no good",
        options=canonical_json({}),
        input_schema="{}",
        output_schema="{}",
        cache=CachePolicy(),
        published_at_ms=1_795_000_000_000,
    )


@asynccontextmanager
async def opened(
    name: str, runtime: Runtime, entry: str, files: Mapping[str, Path], runtimes: Runtimes, **changes: int
) -> AsyncIterator[LineCargo]:
    """A Cargo as an Island opens it."""
    made = manifest_of(name, runtime, entry, files, needs(**changes))
    with trio.fail_after(PATIENCE_S):
        async with open_cargo(made, address_of(made), files, runtimes, Grants()) as cargo:
            assert isinstance(cargo, LineCargo)
            yield cargo


async def lines_of(cargo: LineCargo, **fields: object) -> list[Line]:
    async with cargo.run_lines(LineRequest("job", encode_input(fields), bytes(16))) as run:
        return [line async for line in run]


async def result_of(cargo: LineCargo, **fields: object) -> dict[str, Any]:
    """What its done line says."""
    last = (await lines_of(cargo, **fields))[-1]
    assert isinstance(last, DoneLine)
    result: dict[str, Any] = json.loads(last.result)
    return result


async def asked_again(cargo: LineWorkers, **fields: object) -> dict[str, Any]:
    """The same once the Cargo has a worker again; again, where its old worker was about to end, as a Coordinator would."""
    while True:
        while not cargo.slots_free:
            await cargo.wait_changed()
        try:
            return await result_of(cargo, **fields)
        except Refused as refusal:
            if refusal.code is not Code.WORKER_DIED:
                raise


class Bystander:
    """A healthy Cargo that is open all the time, in a loop of its own, and is asked after each attack."""

    def __init__(self, runtimes: Runtimes, folder: Path) -> None:
        self._runtimes, self._folder = runtimes, folder
        self._cargo: LineWorkers | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._is_open, self._over = threading.Event(), trio.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._keep,), name="bystander")

    async def _keep(self) -> None:
        module = modules.load("text_stats")
        place = self._folder / "module.wasm"
        place.write_bytes(module.wasm)
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            async with opened_for_long("bystander", place, self._runtimes) as self._cargo:
                self._is_open.set()
                await self._over.wait()
            nursery.cancel_scope.cancel()

    def __enter__(self) -> Bystander:
        self._thread.start()
        assert self._is_open.wait(PATIENCE_S)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._over.set)
        self._thread.join()

    @property
    def pids(self) -> tuple[int, ...]:
        assert self._cargo is not None
        return self._cargo.worker_pids

    def answers(self) -> bool:
        """Whether it says what it always says, by the worker that it has always had."""
        module = modules.load("text_stats")

        async def ask() -> dict[str, Any]:
            assert self._cargo is not None
            with trio.fail_after(PATIENCE_S):
                return await result_of(self._cargo, **module.example_input)

        expected = {name: value for name, value in module.example_output[-1].items() if name != "type"}
        assert self._cargo is not None
        return trio.from_thread.run(ask, trio_token=self._token) == expected and self._cargo.restarts == 0


@asynccontextmanager
async def opened_for_long(name: str, module: Path, runtimes: Runtimes) -> AsyncIterator[LineWorkers]:
    made = manifest_of(name, Runtime.WASM, "module.wasm", {"module.wasm": module}, needs())
    async with open_cargo(made, address_of(made), {"module.wasm": module}, runtimes, Grants()) as cargo:
        assert isinstance(cargo, LineWorkers)
        yield cargo


class Watched:
    """A file of which the kernel tells whether anybody has opened, read or changed it, from any namespace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inotify = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._inotify >= 0
        assert _LIBC.inotify_add_watch(self._inotify, os.fsencode(path), _IN_ACCESS | _IN_MODIFY | _IN_OPEN) >= 0

    def was_touched(self) -> bool:
        try:
            return bool(os.read(self._inotify, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._inotify)


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to win. ``victim`` is a process that an attack may hurt in the node's stead; ``data`` the node's folder."""

    data: Path
    key: Watched
    victim: subprocess.Popen[bytes]
    port: int
    socket: str
    bystander: Bystander
    scratch: Path

    def survivors(self) -> list[psutil.Process]:
        """Processes below this one, or left to it, that are neither the bystander's nor the victim."""
        ours = {self.victim.pid}
        for pid in self.bystander.pids:
            first = psutil.Process(pid)
            ours |= {pid, first.ppid(), *(child.pid for child in first.children(recursive=True))}
        below = psutil.Process().children(recursive=True)
        return [process for process in below if process.pid not in ours and _runs(process)]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.data)) for path in self.data.rglob("*"))


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def staged(bystander: Bystander, folder: Path) -> Iterator[Scene]:
    """A node's folder with its key and another Cargo's files, a server, a local socket and a process of this machine."""
    data, scratch = folder / "node", folder / "scratch"
    for place in (data, data / "store", scratch):
        place.mkdir()
    for path in (data / "key", data / "store" / "other.onnx"):
        path.write_text(SECRET)
    name = f"hostile-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0{name}")
        local.listen()
        victim = subprocess.Popen(["sleep", "600"])
        key = Watched(data / "key")
        try:
            yield Scene(data, key, victim, server.getsockname()[1], name, bystander, scratch)
        finally:
            key.close()
            victim.kill()
            victim.wait()


@contextmanager
def orphans_come_to_us() -> Iterator[None]:
    """Processes whose parent has ended become ours, so that none that is left is overlooked."""
    assert _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


