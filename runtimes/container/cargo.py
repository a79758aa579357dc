"""The node's side of a container Cargo: jobs over a number of slots, each job in a container of its own.

    async with open_container_cargo(manifest, address, engine, node=…) as cargo:
        async with cargo.run_lines(request) as run:
            async for line in run: ...

Nothing runs between jobs, so a Cargo costs no memory while it is idle; a job costs the engine some 0.4 s.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from protocol import limits
from protocol.cargo_io import LineReader, OutputLimits, decode_input
from protocol.cargos import TRUST_LEVEL_MAX, CargoManifest, Runtime
from protocol.errors import Code, ConfigError, LocalProtocolError, Refused, RemoteProtocolError
from runtimes.base import CargoFacts, LineRequest
from runtimes.container.client import EngineFailed, call_program
from runtimes.container.command import Container, leftovers_command, limits_of, name_for
from runtimes.container.engines import ContainerEngine
from runtimes.container.image import ImageSource, bring_image, digest_of
from runtimes.container.run import ContainerLeft, ContainerRun, open_run, remove_containers

SLOTS_MAX = 64
_CONTEXT_TOKENS = 2**22  # no bound of its own; inputs and outputs are bounded by their bytes
_NAME_BYTES = 16
_LABEL_CHARS = 32  # of the image's digest
_ASK_S = 30.0


class ContainerCargo:
    """Implements runtimes.base.LineCargo. Made by ``open_container_cargo``."""

    def __init__(
        self,
        manifest: CargoManifest,
        address: str,
        engine: ContainerEngine,
        image: str,
        *,
        node: str,
        slots: int,
        trust_level: int,
    ) -> None:
        self._manifest, self._address, self._engine, self._image = manifest, address, engine, image
        self._node = node
        self._limits = limits_of(manifest.needs, trust_level)
        self._slots_total = slots
        self._slots = trio.Semaphore(slots)
        self._runs: set[ContainerRun] = set()
        self._changed = trio.Event()
        self._is_closed = False

    def __repr__(self) -> str:
        waiting = self._slots.statistics().tasks_waiting
        return f"<ContainerCargo {self._manifest.name}, {self._slots.value} of {self._slots_total} slots free, {waiting} jobs waiting>"

    def facts(self) -> CargoFacts:
        return CargoFacts(
            name=self._manifest.name,
            content_hash=self._address,
            runtime=Runtime.CONTAINER,
            engine=f"{self._engine.kind}:{digest_of(self._manifest.entry)[:_LABEL_CHARS]}",
            context_tokens=_CONTEXT_TOKENS,
            kv_tokens_total=0,
            kv_tokens_free=0,
            slots_total=self._slots_total,
            slots_free=self._slots.value if self.alive else 0,
            weights_bytes=0,
            kv_bytes_per_token=0,
            compute_bytes=0,
            tokens_per_s=0.0,
        )

    @property
    def alive(self) -> bool:
        """Until it is closed, or a container could not be removed."""
        return not self._is_closed

    async def wait_changed(self) -> None:
        await self._changed.wait()

    @asynccontextmanager
    async def run_lines(self, request: LineRequest) -> AsyncIterator[ContainerRun]:
        """Entering returns when the container is made and being started. Raises Refused; on leaving ContainerLeft, after which the Cargo
        is no longer alive."""
        try:
            decode_input(request.input)
        except RemoteProtocolError as error:
            raise Refused(Code.BAD_INPUT, str(error)) from None
        await self._admit()
        try:
            async with open_run(self._engine, self._container(request), request.input, self._reader()) as run:
                self._runs.add(run)
                try:
                    yield run
                finally:
                    self._runs.discard(run)
        except ContainerLeft:
            self._is_closed = True
            raise
        finally:
            self._slots.release()
            self._notify()

    async def _admit(self) -> None:
        """Takes a slot, in the order of arrival. Raises Refused."""
        waiting = self._slots.statistics().tasks_waiting
        if waiting >= limits.LINE_JOBS_WAITING_MAX:
            raise Refused(Code.NO_CAPACITY, f"{waiting} jobs wait for {self._manifest.name} already")
        await self._slots.acquire()
        self._notify()
        if not self.alive:
            self._slots.release()
            raise Refused(Code.DRAINING, f"{self._manifest.name} takes no more jobs here")

    def _container(self, request: LineRequest) -> Container:
        name = name_for(secrets.token_bytes(_NAME_BYTES))
        return Container(self._image, name, self._node, self._address, request.seed, self._limits)

    def _reader(self) -> LineReader:
        return LineReader(OutputLimits(output_bytes=self._manifest.needs.output_bytes))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def close_nowait(self) -> None:
        """Takes no more jobs, and ends those that run."""
        self._is_closed = True
        self._notify()
        for run in self._runs:
            run.stop_nowait(Refused(Code.CANCELLED, "the Cargo was closed"))

    async def aclose(self) -> None:
        """Returns when all jobs are left and their containers removed."""
        self.close_nowait()
        while self._slots.value < self._slots_total:
            await self._changed.wait()


@asynccontextmanager
async def open_container_cargo(
    manifest: CargoManifest,
    address: str,
    engine: ContainerEngine,
    *,
    node: str,
    slots: int = 1,
    source: ImageSource | None = None,
    trust_level_max: int = TRUST_LEVEL_MAX,
) -> AsyncIterator[ContainerCargo]:
    """A Cargo whose image the engine has. ``address``: its content address; ``node``: this node's id, for the label by which leftovers
    are found; ``slots``: jobs at a time; ``trust_level_max``: what the operator grants at most, 1 for never a network. Raises ConfigError
    with a sentence that says what to do."""
    if not 1 <= slots <= SLOTS_MAX:
        raise LocalProtocolError(f"a Cargo has between 1 and {SLOTS_MAX} slots, not {slots}")
    if manifest.runtime is not Runtime.CONTAINER:
        raise LocalProtocolError(f"{manifest.name} is a Cargo for {manifest.runtime}")
    if manifest.needs.gpu_memory_bytes:
        raise ConfigError(
            f"{manifest.name} needs a GPU, which containers do not get here; gguf, onnx and diffusers have it"
        )
    try:
        image = await bring_image(engine, manifest.entry, source or ImageSource())
    except ConfigError as error:
        raise ConfigError(f"{manifest.name}: {error}") from None
    trust_level = min(manifest.trust_level, trust_level_max)
    cargo = ContainerCargo(manifest, address, engine, image, node=node, slots=slots, trust_level=trust_level)
    try:
        yield cargo
    finally:
        cargo.close_nowait()


async def remove_leftovers(engine: ContainerEngine, node: str) -> int:
    """Removes what an earlier life of this node has left behind, as after a power cut. Returns how many containers. To be called before
    the first job. Raises ConfigError where the engine does not work, ContainerLeft where it does not remove them."""
    try:
        answer = await call_program(leftovers_command(engine, node), _ASK_S)
    except EngineFailed as error:
        raise ConfigError(f"the container engine does not work: {error}") from None
    if answer.code:
        raise ConfigError(f"{engine.kind} does not say which containers there are: {answer.complaint}")
    names = tuple(answer.stdout.decode().split())
    if names:
        await remove_containers(engine, names)
    return len(names)
