"""A Coordinator with a Cargo in two releases, each on an Island of its own, for tests of A/B tests as they run."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio

from coordinator.abtests import deciding, service
from coordinator.abtests.deciding import AbDecisions
from coordinator.abtests.service import AbTests
from coordinator.books import ab_tests as rows
from coordinator.books.ab_units import AbUnit
from protocol.cargos import Runtime, SignedCargo
from protocol.prices import Ask
from tests.coordinator.clients import http
from tests.coordinator.desks import opened
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.protocol.cargo_samples import cargo

NAME = "talk"
AB = "/api/v1/ab-tests"
CHAT = "/v1/chat/completions"
OLD, NEW = (cargo(NAME, release, runtime=Runtime.GGUF) for release in ("1.0.0", "2.0.0"))
VARIANTS = [
    {"name": "control", "cargo": f"{NAME}@1.0.0", "traffic_percent": 50},
    {"name": "new", "cargo": f"{NAME}@2.0.0", "traffic_percent": 50},
]
BODY: dict[str, Any] = {
    "name": "is it cheaper",
    "base_cargo": NAME,
    "variants": VARIANTS,
    "primary_metric": "cost",
    "minimum_samples": 100,
    "minimum_hours": 0,
}
# what a token costs, micro-credits a thousand
OLD_ASK, NEW_ASK = Ask(per_1k_output=40_000), Ask(per_1k_output=20_000)


def offering(release: SignedCargo, number: int, ask: Ask, *scripts: Script) -> FakeIsland:
    return island(number, *scripts, name=release.manifest.name, runtime="gguf", content_hash=release.address, ask=ask)


def islands() -> tuple[FakeIsland, FakeIsland]:
    return offering(OLD, 1, OLD_ASK), offering(NEW, 2, NEW_ASK)


def service_of(running: Running) -> AbTests:
    return running.server.ab_tests


def decisions_of(running: Running) -> AbDecisions:
    return running.server.ab_decisions


async def call(running: Running, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
    async with http(running, key) as client:
        return await client.request(method, path, **more)


async def ok(running: Running, method: str, path: str, body: Mapping[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
    more = {"json": dict(body or {})} if method == "POST" else {}
    answer = await call(running, method, path, key, **more)
    assert answer.status_code in (200, 201), answer.text
    value: dict[str, Any] = answer.json()
    return value


async def publish(running: Running, *releases: SignedCargo, candidate: bool = False, key: str | None = None) -> None:
    for one in releases:
        path = "/api/v1/cargos" + ("?candidate=true" if candidate else "")
        answer = await call(running, "POST", path, key, content=one.envelope, headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 201, answer.text


async def create(running: Running, **changes: Any) -> str:
    return str((await ok(running, "POST", AB, {**BODY, **changes}))["id"])


async def started(running: Running, **changes: Any) -> str:
    id = await create(running, **changes)
    assert (await ok(running, "POST", f"{AB}/{id}/activate"))["state"] == "active"
    return id


async def chat(running: Running, user: str = "", text: str = "one two three", client: httpx.AsyncClient | None = None, **more: Any) -> Any:
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], **({"user": user} if user else {}), **more}
    if client is not None:
        return await client.post(CHAT, json=body)
    async with http(running) as own:
        return await own.post(CHAT, json=body)


async def variants_of(running: Running, users: Iterable[str], **more: Any) -> dict[str, str | None]:
    """The arm of each user's chat, by what its metadata says."""
    found = {}
    async with http(running) as client:
        for number, user in enumerate(users):
            answer = await chat(running, user, " ".join(["word"] * (1 + number % 9)), client, **more)
            assert answer.status_code == 200, answer.text
            found[user] = answer.json()["metadata"].get("ab_variant_name")
    return found


async def reaches(running: Running, id: str, state: str) -> dict[str, Any]:
    """The test, once it is in this state. Raises trio.TooSlowError."""
    with trio.fail_after(20):
        while (test := await ok(running, "GET", f"{AB}/{id}"))["state"] != state:
            await trio.sleep(0.01)
    return test


async def units_of(running: Running, id: str) -> dict[str, AbUnit]:
    """The counters, which have to equal a recount of the jobs."""

    def read(connection: Any) -> tuple[dict[str, AbUnit], dict[str, AbUnit]]:
        return rows.counted(connection, id), rows.recount(connection, id)

    counted, again = await running.server.books.ask(read)
    assert {key: unit for key, unit in counted.items() if key in again or not unit.cached} == {
        key: AbUnit(**{**_fields(unit), "cached": counted[key].cached}) for key, unit in again.items()
    }
    return counted


def _fields(unit: AbUnit) -> dict[str, Any]:
    return {name: getattr(unit, name) for name in AbUnit.__dataclass_fields__}


def name_tests(running: Running) -> None:
    """Tests get the same ids each time, so each user is in the same arm whenever this runs."""
    numbers = itertools.count(1)
    running.server.ab_decisions._new_id = lambda: f"test{next(numbers)}"


@asynccontextmanager
async def talking(database_url: str, *some: FakeIsland, candidate: bool = True, **settings: Any) -> AsyncIterator[Running]:
    """Both releases are published; the name stands for 1.0.0, and Islands offer both."""
    async with opened(database_url, *(some or islands()), **settings) as running:
        name_tests(running)
        await publish(running, OLD)
        await publish(running, NEW, candidate=candidate)
        yield running


def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are read and looked at all the time."""
    monkeypatch.setattr("coordinator.registry.POLL_S", 0.02)
    monkeypatch.setattr(service, "POLL_S", 0.02)
    monkeypatch.setattr(deciding, "LOOK_S", 0.02)
    monkeypatch.setattr(deciding, "BUSY_SHARE", 0)
    monkeypatch.setattr(service, "HELD_S", 0.0)

