"""Asks neighbours, one at a time and chosen at random, for what this node's book lacks; see protocol.catchup for the rules."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import trio

from node.bookkeeper import BookKeeper
from node.greeting import exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from protocol import limits
from protocol.book import Outcome
from protocol.catchup import next_request
from protocol.errors import LinkLost, RemoteProtocolError
from protocol.messages import ADS, ADS_PROTOCOL, Announce, Coordinators, Hello

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0
_STREAMS_KEPT_MAX = 8
_ROUNDS_MAX = 64  # at once with one neighbour; a larger gap is closed at the next turns


class CatchUp:
    """``run`` must be running. Streams to the neighbours asked last are kept, so a round costs one round trip."""

    def __init__(self, host: Host, keeper: BookKeeper, hello: Callable[[], Hello], rng: random.Random) -> None:
        self._host, self._keeper, self._hello, self._rng = host, keeper, hello, rng
        self._streams: dict[str, FrameStream] = {}
        self.rounds_total = 0
        self.learned_total = 0

    def __repr__(self) -> str:
        return f"<CatchUp, {self.rounds_total} rounds, {self.learned_total} learned>"

    async def run(self) -> None:
        while True:
            await trio.sleep(limits.CATCHUP_INTERVAL_S * self._rng.uniform(0.8, 1.2))
            peers = self._host.connected_peers()
            if peers:
                await self.ask(self._rng.choice(peers))

    async def ask(self, peer: str) -> int:
        """Catches up with one neighbour; returns how many envelopes changed the book. A neighbour that fails is asked again later."""
        learned = 0
        try:
            with trio.fail_after(_ANSWER_TIMEOUT_S):
                for _ in range(_ROUNDS_MAX):
                    fresh = await self._round(peer)
                    learned += fresh
                    if not fresh:
                        break
        except (LinkLost, RemoteProtocolError, trio.TooSlowError) as error:
            log.debug("catching up with %s: %s", peer, str(error) or "time-out")
            self._drop(peer)
        self.learned_total += learned
        return learned

    async def _round(self, peer: str) -> int:
        stream = await self._stream(peer)
        await stream.send(next_request(self._keeper.book, self._rng))
        reply = await stream.receive()
        while isinstance(reply, Coordinators):  # what an Island says to newcomers
            reply = await stream.receive()
        if not isinstance(reply, Announce):
            raise RemoteProtocolError(f"{peer} answers a question for its book with {type(reply).__name__}")
        self.rounds_total += 1
        return sum(self._keeper.hear(envelope) is Outcome.CHANGED for envelope in reply.envelopes)

    async def _stream(self, peer: str) -> FrameStream:
        stream = self._streams.pop(peer, None)
        if stream is None:
            stream = await self._host.open(peer, ADS_PROTOCOL, ADS)
            await exchange_hello(stream, self._hello())
        self._streams[peer] = stream  # newest last
        while len(self._streams) > _STREAMS_KEPT_MAX:
            self._drop(next(iter(self._streams)))
        return stream

    def _drop(self, peer: str) -> None:
        stream = self._streams.pop(peer, None)
        if stream is not None:
            stream.abort()
