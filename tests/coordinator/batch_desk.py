"""Batches at a Coordinator with fake Islands: what a test sends, and what it looks at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio

from coordinator import upkeep
from protocol import limits
from protocol.prices import Ask
from tests.coordinator.clients import http
from tests.coordinator.desks import CREDIT, JOBS, Event, Headers, events_of, get, until
from tests.coordinator.fakes import FakeIsland, Running, Script, island

BATCH = f"{JOBS}/batch"
ALL = 10_000 * CREDIT
ASK = Ask(per_job=100)
OVER = ("succeeded", "failed", "cancelled")


def lane(number: int, *scripts: Script, slots: int = 1, ask: Ask = ASK, **changes: Any) -> FakeIsland:
    """An Island that does one job at a time."""
    return island(number, *scripts, ask=ask, slots_total=slots, slots_free=slots, **changes)


def paced(token_s: float) -> Script:
    return Script(token_s=token_s)


def inputs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"input {number}"} for number in range(count)]


def texts(count: int) -> list[str]:
    return [f"input {number}" for number in range(count)]


async def post(running: Running, body: object, headers: Headers = None, key: str | None = None) -> httpx.Response:
    async with http(running, key) as client:
        return await client.post(BATCH, content=body if isinstance(body, bytes) else json.dumps(body), headers=headers)


async def begin(running: Running, count: int = 4, headers: Headers = None, **changes: Any) -> str:
    """A batch's id."""
    answer = await post(running, {"cargo": "echo", "inputs": inputs(count), **changes}, headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def status(running: Running, batch_id: str) -> dict[str, Any]:
    answer = await get(running, f"{JOBS}/{batch_id}/batch-status")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert sum(found["child_states"].values()) == found["chunk_count"] == len(found["children"])
    assert Counter(child["state"] for child in found["children"]) == found["child_states"]
    return found


async def over(running: Running, batch_id: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """The status of a batch once it has ended."""
    found: dict[str, Any] = {}

    async def look() -> bool:
        found.update(await status(running, batch_id))
        return found["parent_state"] in OVER

    await until(look, timeout_s)
    return found


async def paid(running: Running, batch_id: str, count: int) -> None:
    """Waits until so many inputs have succeeded: the Island has the next one before the last is paid."""

    async def look() -> bool:
        states: dict[str, int] = (await status(running, batch_id))["child_states"]
        return states.get("succeeded", 0) == count

    await until(look)


async def output(running: Running, batch_id: str) -> dict[str, Any]:
    answer = await get(running, f"{JOBS}/{batch_id}/output")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def said(found: dict[str, Any]) -> list[str | None]:
    """Of an output: the text of each input."""
    return [each["text"] if each is not None else None for each in found["outputs"]]


def asked(*islands: FakeIsland) -> Counter[str]:
    """How often each input came to an Island."""
    return Counter(request.prompt for one in islands for request in one.requests)


async def watched(running: Running, batch_id: str, found: list[Event]) -> None:
    """Hears a batch to its end; ``found`` is what has been heard meanwhile."""
    async with http(running) as client, client.stream("GET", f"{JOBS}/{batch_id}/stream") as response:
        assert response.status_code == 200 and response.headers["x-archipelag-job"] == batch_id
        await events_of(response, found)


@asynccontextmanager
async def watching(running: Running, batch_id: str) -> AsyncIterator[list[Event]]:
    """What a watcher hears; leaving waits for the end of the batch."""
    found: list[Event] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watched, running, batch_id, found)
        yield found


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats of 40 ms; who is silent for 0.4 s is dead."""
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "DEAD_S", 0.4)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.runs.board._POLL_S", 0.01)
    monkeypatch.setattr("coordinator.batches.board._POLL_S", 0.01)


assert limits.BATCH_INPUTS_MAX == 100
