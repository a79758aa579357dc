"""Nodes that tell one another of Cargos: real hosts on loopback, each with its news on disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from node.cargo_links import CargoLinks
from node.cargo_news import CargoNews
from node.greeting import exchange_hello
from node.jobs_served import island_hello
from node.net.frames import FrameStream
from node.net.gossip import Gossip
from node.net.host import Host, open_host
from protocol.cargo_news import CARGOS, CARGOS_PROTOCOL
from protocol.cargos import SignedCargo
from protocol.messages import Hello
from tests.protocol.samples import NETWORK

HEARD_S_MAX = 5.0  # the mission's 15 s, and a busy machine; it takes some milliseconds


@dataclass
class Node:
    """``ended``: addresses of which its Island was told that they may not run any more."""

    host: Host
    news: CargoNews
    links: CargoLinks
    folder: Path
    gossip: Gossip | None = None
    ended: list[str] = field(default_factory=list)

    async def connect(self, other: Node) -> None:
        await self.host.connect(other.host.addresses()[0])

    async def wait_has(self, one: SignedCargo) -> None:
        await until(lambda: self.news.cargo(one.address) is not None)

    async def wait_ended(self, one: SignedCargo) -> None:
        await until(lambda: one.address in self.ended and self.news.cargo(one.address) is None)


async def until(what: Callable[[], bool], timeout_s: float = HEARD_S_MAX) -> None:
    with trio.fail_after(timeout_s):
        while not what():
            await trio.sleep(0.005)


def hello() -> Hello:
    return island_hello(NETWORK, "test")


def open_news(folder: Path) -> CargoNews:
    folder.mkdir(exist_ok=True)
    return CargoNews(folder, NETWORK)


@asynccontextmanager
async def open_node(number: int, folder: Path, gossips: bool = False) -> AsyncIterator[Node]:
    """With the identity of this number, and what lies in ``folder``."""
    async with open_host(number.to_bytes(32, "big")) as host:
        gossip = Gossip(host, "ads", lambda data: True) if gossips else None
        news = open_news(folder)
        links = CargoLinks(host, news, NETWORK, hello, lambda hello, peer: None, random.Random(number), gossip)
        node = Node(host, news, links, folder, gossip)
        news.on_revoked.append(node.ended.append)
        async with trio.open_nursery() as nursery:
            if gossip is not None:
                await nursery.start(gossip.run)
            nursery.start_soon(links.run)
            yield node
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_stranger(to: Node, number: int = 200, said: Hello | None = None) -> AsyncIterator[FrameStream]:
    """A peer that says on the stream whatever a test wants, past the hellos."""
    async with open_host(number.to_bytes(32, "big")) as host:
        await host.connect(to.host.addresses()[0])
        stream = await host.open(to.host.peer_id, CARGOS_PROTOCOL, CARGOS)
        try:
            await exchange_hello(stream, said or hello())
            stream.opener = host  # type: ignore[attr-defined]
            yield stream
        finally:
            stream.abort()


async def receive(stream: FrameStream) -> Any:
    with trio.fail_after(HEARD_S_MAX):
        return await stream.receive()
