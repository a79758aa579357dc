"""Gossip of ads: what the book accepts is passed on by GossipSub, what it refuses goes no further."""

from __future__ import annotations

import logging
from typing import Any

import trio

from node.bookkeeper import BookKeeper
from node.net.gossip import Gossip
from node.net.host import Host
from protocol.book import Outcome

log = logging.getLogger(__name__)

_WAITING_MAX = 256


def topic_of(network: str) -> str:
    return f"archipelag/ads/1/{network}"


class Spreader:
    """Between the book and GossipSub. ``run`` must be running."""

    def __init__(self, host: Host, network: str, keeper: BookKeeper) -> None:
        self._keeper = keeper
        self.gossip = self._gossip = Gossip(host, topic_of(network), self._may_pass)
        self._send, self._receive = trio.open_memory_channel[bytes](_WAITING_MAX)
        self.dropped_total = 0

    def publish_nowait(self, envelope: bytes) -> None:
        """Never blocks; when too much waits the envelope is dropped and counted: the next refresh or catch-up carries it."""
        try:
            self._send.send_nowait(envelope)
        except trio.WouldBlock:
            self.dropped_total += 1

    def statistics(self) -> dict[str, Any]:
        return {**self._gossip.statistics_json(), "dropped_before_sending": self.dropped_total}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._gossip.run)
            nursery.start_soon(self._hear)
            async for envelope in self._receive:
                await self._gossip.publish(envelope)

    async def _hear(self) -> None:
        async for _, envelope in self._gossip.received:
            self._keeper.hear(envelope)

    def _may_pass(self, envelope: bytes) -> bool:
        return self._keeper.hear(envelope) is not Outcome.REFUSED
