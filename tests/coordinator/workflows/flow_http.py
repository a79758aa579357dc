"""Workflows over HTTP, as tests ask for them."""

from __future__ import annotations

from typing import Any

import httpx

from tests.coordinator.clients import http
from tests.coordinator.desks import Event, events_of, get, until
from tests.coordinator.fakes import Running

RUNS, SAVED = "/api/v1/workflows", "/api/v1/workflow-definitions"
ENDED = ("succeeded", "failed", "cancelled")


def step(key: str, prompt: str = "", **more: Any) -> dict[str, Any]:
    return {"key": key, "cargo": "echo", "input": {"prompt": prompt or f"from {key}"}, **more}


CHAIN = {
    "steps": [
        step("first", "{{ input.text }}"),
        step("second", "got {{ first.output.text }}"),
        step("third", "then {{ second.output.text }}"),
    ]
}


async def send(running: Running, path: str, body: Any, method: str = "POST", headers: Any = None, key: str | None = None) -> httpx.Response:
    async with http(running, key) as client:
        return await client.request(method, path, json=body, headers=headers)


async def begin(running: Running, *steps: dict[str, Any], headers: Any = None, body: dict[str, Any] | None = None, **more: Any) -> str:
    """A run's id; ``more``: fields of the definition, ``body``: of the request."""
    asked = {"name": "test", "definition": {"steps": list(steps), **more}, **(body or {})}
    answer = await send(running, RUNS, asked, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def shown(running: Running, run_id: str) -> dict[str, Any]:
    answer = await get(running, f"{RUNS}/{run_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def ended(running: Running, run_id: str, timeout_s: float = 20.0) -> dict[str, Any]:
    """A run as its account sees it, once it has ended."""
    found: dict[str, Any] = {}

    async def look() -> bool:
        found.clear()
        found.update(await shown(running, run_id))
        return found["state"] in ENDED

    await until(look, timeout_s)
    return found


def states(run: dict[str, Any]) -> dict[str, str]:
    return {step["key"]: step["state"] for step in run["steps"]}


def by_key(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["key"]: step for step in run["steps"]}


async def watch(running: Running, run_id: str, found: list[Event] | None = None) -> list[Event]:
    found = [] if found is None else found
    async with http(running) as client, client.stream("GET", f"{RUNS}/{run_id}/stream") as response:
        assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
        await events_of(response, found)
    return found
