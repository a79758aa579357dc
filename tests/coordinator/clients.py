"""Ways to talk to a Coordinator: plain HTTP and OpenAI's own client."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import httpx
import openai
import trio

from tests.coordinator.fakes import Running

T = TypeVar("T")

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # a client of its own would load all authorities of this machine, for 20 to 80 ms

HELLO: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "one two three four five"}]}


def http(running: Running, key: str | None = None) -> httpx.AsyncClient:
    """A client with a key; ``""`` is none."""
    key = running.key if key is None else key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=running.url, headers=headers, timeout=60, verify=_NO_TLS)


async def with_openai(running: Running, work: Callable[[openai.OpenAI], T], **settings: Any) -> T:
    """Runs ``work`` with OpenAI's client in a thread, where it belongs."""

    def run() -> T:
        base_url = f"{running.url}/{settings.pop('prefix', 'v1')}"
        with openai.OpenAI(base_url=base_url, api_key=running.key, max_retries=0, **settings) as client:
            return work(client)

    return await trio.to_thread.run_sync(run)


async def lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """The ``data:`` of each event of a stream; anything that is neither data nor a comment is an error."""
    async for line in response.aiter_lines():
        assert not line or line.startswith((":", "data: ")), line
        if line.startswith("data: "):
            yield line[len("data: ") :]
