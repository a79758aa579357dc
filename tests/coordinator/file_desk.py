"""Files and file batches over HTTP: what is sent, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import trio

from tests.coordinator.clients import http
from tests.coordinator.fakes import Running

FILES, BATCHES = "/v1/files", "/v1/batches"
CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(custom_id: str, text: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": "echo", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def jsonl(lines: Iterable[Mapping[str, Any] | str]) -> bytes:
    """Texts are lines as they are."""
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


async def send(running: Running, data: bytes, key: str | None = None, **fields: str) -> httpx.Response:
    async with http(running, key) as client:
        form = {"purpose": "batch", **fields}
        return await client.post(FILES, data=form, files={"file": ("input.jsonl", data)})


async def file_of(running: Running, data: bytes, **fields: str) -> str:
    response = await send(running, data, **fields)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def begun(running: Running, file_id: str, headers: Mapping[str, str] | None = None, **changes: Any) -> httpx.Response:
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}
    async with http(running) as client:
        return await client.post(BATCHES, json=body, headers=headers)


async def batch_of(running: Running, lines: Iterable[Mapping[str, Any] | str] | bytes, **changes: Any) -> str:
    """A batch of these lines; its id."""
    file_id = await file_of(running, lines if isinstance(lines, bytes) else jsonl(lines))
    response = await begun(running, file_id, **changes)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def shown(running: Running, batch_id: str) -> dict[str, Any]:
    async with http(running) as client:
        return dict((await client.get(f"{BATCHES}/{batch_id}")).json())


async def over(running: Running, batch_id: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """A batch as it ended."""
    with trio.fail_after(timeout_s):
        while (found := await shown(running, batch_id))["status"] not in ENDED:
            await trio.sleep(0.03)
    return found


async def content(running: Running, file_id: str) -> bytes:
    async with http(running) as client:
        response = await client.get(f"{FILES}/{file_id}/content")
    assert response.status_code == 200, response.text
    return response.content


async def lines_in(running: Running, file_id: str | None) -> list[dict[str, Any]]:
    """Of an output or error file; none where there is none."""
    if file_id is None:
        return []
    return [json.loads(line) for line in (await content(running, file_id)).splitlines()]


def said(line: Mapping[str, Any]) -> str:
    """The text of an answer to a chat."""
    assert line["error"] is None and line["response"]["status_code"] == 200, line
    return str(line["response"]["body"]["choices"][0]["message"]["content"])
