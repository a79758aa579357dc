"""What the tests of the cache share: vectors as a test wants them, and a Coordinator with a cache in front of scripted Islands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import trio

from coordinator.cache.policy import CacheConfig
from coordinator.cache.service import AnswerCache
from protocol.errors import ArchipelagError
from tests.coordinator.clients import http
from tests.coordinator.desks import CHAT, opened
from tests.coordinator.fakes import FakeIsland, Running

DIMENSIONS = 16
STATS = "/api/v1/cache/stats"
CACHE = "/api/v1/cache"


@dataclass
class FakeEmbedding:
    """Texts in ``alike`` have the direction of what they are mapped to, others one of their own. ``gate``: what is asked waits for it."""

    alike: dict[str, str] = field(default_factory=dict)
    state: str = "on"
    fails: bool = False
    asked: list[str] = field(default_factory=list)
    calls: int = 0
    gate: trio.Event | None = None

    async def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        self.calls += 1
        self.asked += texts
        if self.gate is not None:
            await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise ArchipelagError("as the test wants it")
        return [direction(self.alike.get(text, text)) for text in texts]


@dataclass
class OneDirection(FakeEmbedding):
    """All texts mean the same: what keeps them apart is words and guards."""

    async def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        await super().embed(texts)
        return [direction("all")] * len(texts)


def direction(text: str) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIMENSIONS)
    return [float(number) for number in vector / np.linalg.norm(vector)]


@asynccontextmanager
async def cached(
    database_url: str, *islands: FakeIsland, embedding: FakeEmbedding | None = None, cache: CacheConfig | None = None, **settings: Any
) -> AsyncIterator[Running]:
    """A Coordinator with a cache that checks no hits unless the test says so."""
    config = cache or CacheConfig(shadow_share=0.0)
    async with opened(database_url, *islands, embedding=embedding, cache=config, **settings) as running:
        yield running


def cache_of(running: Running) -> AnswerCache:
    return running.server._parts.cache


def body(text: str, **changes: Any) -> dict[str, Any]:
    return {"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": text}], **changes}


async def ask(running: Running, text: str, key: str | None = None, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    async with http(running, key) as client:
        return await client.post(CHAT, json=body(text, **changes), headers=headers)


def said(response: httpx.Response) -> str:
    """The words of a chat's answer."""
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def strategy(response: httpx.Response) -> str | None:
    """How the cache has answered; None for a miss. Header and metadata have to agree."""
    assert response.status_code == 200, response.text
    metadata = response.json()["metadata"]
    is_hit = response.headers["x-archipelag-cache"] == "hit"
    assert metadata["cache_hit"] is is_hit
    assert response.headers.get("x-archipelag-cache-strategy") == metadata["cache_strategy"]
    found: str | None = metadata["cache_strategy"]
    return found


async def stats(running: Running, key: str | None = None) -> dict[str, Any]:
    async with http(running, key) as client:
        response = await client.get(STATS)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = json.loads(response.text)
    return found
