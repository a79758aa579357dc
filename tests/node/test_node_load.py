"""Many chats through real processes: none is lost, and afterwards the processes hold what they held before.

`make soak` runs the counts of the bars (1,000 one after the other, 200 at once, several times); `make test` fewer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest

from node.localnet import LocalNetwork

_WARM_UP = 200
_MEMORY_NOISE_BYTES = 6 * 1024 * 1024  # allocators round up; a leak of 1 KiB a chat over 10,000 chats would be 10 MiB
_DESCRIPTORS_NOISE = 2
_IDLE_DESCRIPTORS = 40


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path) as running:
        running.start_coordinator()
        running.start_island("one", "--cargo", "echo").wait_ready()
        yield running


class Client:
    def __init__(self, network: LocalNetwork) -> None:
        self._url, self._headers = (
            network.url + "/v1/chat/completions",
            {"Authorization": f"Bearer {network.make_key()}"},
        )

    async def chat(self, session: aiohttp.ClientSession, number: int) -> None:
        """Every second one streamed; asserts the whole answer."""
        text, streamed = f"chat number {number}", number % 2 == 0
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": streamed}
        async with session.post(self._url, json=body, headers=self._headers) as answer:
            assert answer.status == 200, await answer.text()
            said = await answer.text()
        if not streamed:
            assert json.loads(said)["choices"][0]["message"]["content"] == text
            return
        lines = [line[6:] for line in said.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert "".join(c["delta"].get("content") or "" for e in events for c in e["choices"]) == text

    def sequential(self, count: int) -> None:
        async def run() -> None:
            async with aiohttp.ClientSession() as session:
                for number in range(count):
                    await self.chat(session, number)

        asyncio.run(run())

    def concurrent(self, count: int) -> None:
        async def run() -> None:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                await asyncio.gather(*(self.chat(session, number) for number in range(count)))

        asyncio.run(run())


@dataclass(frozen=True)
class Held:
    name: str
    rss_bytes: int
    descriptors: int
    threads: int


def held(network: LocalNetwork) -> list[Held]:
    processes = [(node.name, psutil.Process(node.process.pid)) for node in network.nodes]
    return [Held(name, p.memory_info().rss, p.num_fds(), p.num_threads()) for name, p in processes]


def settled(network: LocalNetwork, enough: Callable[[Held], bool]) -> list[Held]:
    """What each node holds once that is little enough, or after 10 s: a server notices a moment later that its client has left."""
    deadline = time.monotonic() + 10
    while not all(map(enough, found := held(network))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def check(network: LocalNetwork, chats: int, waves: int) -> None:
    client = Client(network)
    client.sequential(_WARM_UP)
    client.concurrent(chats // 5)
    before = {one.name: one for one in settled(network, lambda one: one.descriptors < _IDLE_DESCRIPTORS)}
    for _ in range(waves):
        client.sequential(chats)
        client.concurrent(chats // 5)
    for now in settled(network, lambda one: one.descriptors <= before[one.name].descriptors + _DESCRIPTORS_NOISE):
        then = before[now.name]
        grown = now.rss_bytes - then.rss_bytes
        assert grown <= _MEMORY_NOISE_BYTES, f"{now.name} grew by {grown / 1024:.0f} KiB"
        assert now.descriptors <= then.descriptors + _DESCRIPTORS_NOISE, f"{now} left descriptors open, before: {then}"
        assert now.threads <= then.threads + 1, f"{now} left threads behind, before: {then}"


def test_chats_leave_nothing_behind(network: LocalNetwork) -> None:
    check(network, chats=250, waves=1)


@pytest.mark.soak
def test_a_thousand_chats_and_two_hundred_at_once_leave_nothing_behind(network: LocalNetwork) -> None:
    check(network, chats=1000, waves=10)
