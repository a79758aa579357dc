"""Manifests and jobs for the tests of containers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from protocol.cargo_io import DoneLine, Line
from protocol.cargos import CachePolicy, CargoManifest, Needs, Runtime
from protocol.prices import Ask
from runtimes.base import LineRequest
from runtimes.container.cargo import ContainerCargo, open_container_cargo
from tests.runtimes.container.conftest import Port

MIB = 1024**2
PUBLISHER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
ADDRESS = "ab" * 32
SEED = bytes(range(16))


def needs(**changes: Any) -> Needs:
    plain: dict[str, Any] = {"memory_bytes": 64 * MIB, "time_s": 10, "disk_bytes": 8 * MIB}
    return Needs(**(plain | changes))


def manifest(entry: str, **changes: Any) -> CargoManifest:
    plain: dict[str, Any] = {
        "version": 1,
        "name": "hostile",
        "release": "1.0.0",
        "publisher": PUBLISHER,
        "runtime": Runtime.CONTAINER,
        "entry": entry,
        "files": (),
        "needs": needs(),
        "ask": Ask(1000, 0, 0),
        "trust_level": 0,
        "licence": "Apache-2.0",
        "description": "does what it is told",
        "options": "{}",
        "input_schema": "{}",
        "output_schema": "{}",
        "cache": CachePolicy(),
        "published_at_ms": 1_795_000_000_000,
    }
    return CargoManifest(**(plain | changes))


def request(mode: str, **fields: str) -> LineRequest:
    data = json.dumps({"mode": mode, **fields}, separators=(",", ":")).encode()
    return LineRequest("job", data, SEED)


@asynccontextmanager
async def opened(port: Port, slots: int = 1, **changes: Any) -> AsyncIterator[ContainerCargo]:
    made = manifest(port.entry, **changes)
    async with open_container_cargo(
        made, ADDRESS, port.engine, node=port.node, slots=slots, source=port.source
    ) as cargo:
        yield cargo


async def lines_of(cargo: ContainerCargo, mode: str, **fields: str) -> list[Line]:
    async with cargo.run_lines(request(mode, **fields)) as run:
        return [line async for line in run]


async def result_of(cargo: ContainerCargo, mode: str, **fields: str) -> dict[str, Any]:
    """What the Cargo's done line says."""
    last = (await lines_of(cargo, mode, **fields))[-1]
    assert isinstance(last, DoneLine)
    result: dict[str, Any] = json.loads(last.result)
    return result
