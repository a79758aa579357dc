"""``/archipelag/cargos/1``, both ends, and the topic beside it: what is news about Cargos goes to every neighbour, who was away catches up.

Theory of operation. A node holds one stream to each of ``LINKS_MAX`` neighbours, to its Coordinators first, and serves as many as it gets.
Who opened it asks at once for all that it lacks, revocations first, and every CATCHUP_INTERVAL_S for a part; both push on it what they have
just heard from somebody else. So a revocation travels from neighbour to neighbour, over whoever is connected, and whoever comes back hears
of it in the first exchange. GossipSub carries the same notices to those who have more neighbours than links.

Rules. A stream that says nothing useful is read ever more slowly (``Allowance``), and that holds up nobody else. Pushes wait in bounded
numbers; what does not fit is left to catching up. An answer is read only where a question was asked, and goes forward only.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence

import trio

from node.cargo_news import CargoNews
from node.greeting import answer_hello, exchange_hello
from node.net.frames import FrameStream
from node.net.gossip import Gossip
from node.net.host import Host
from protocol import limits
from protocol.cargo_news import (
    CARGOS,
    CARGOS_PROTOCOL,
    NOTICE,
    About,
    Allowance,
    CargosKnown,
    CargosWanted,
    Notice,
    answer,
    batches,
    key_of,
    question,
    topic_of,
)
from protocol.cargo_news import CargoNews as News
from protocol.errors import LinkLost, LocalProtocolError, RemoteProtocolError
from protocol.messages import Hello

log = logging.getLogger(__name__)

LINKS_MAX = 8
SERVED_PER_PEER_MAX = 2  # one, and one that is being opened anew
ANSWER_TIMEOUT_S = 30.0
_PUSHES_MAX = 64  # messages that wait for one neighbour
_LOOK_S = 1.0
_REST_S = 1.0  # after a stream that has ended
_STRANGER_REST_S = 60.0  # and a peer that does not speak this protocol, or not well
_ALLOWANCES_MAX = 4096
_QUESTIONS_PER_S = 20.0  # of one peer; an answer takes some milliseconds where 100,000 notices are known
_QUESTIONS_BURST = 200.0
_PARTS_MAX = 4096  # answers in a row


class CargoLinks:
    """``run`` must be running. ``coordinators()``: peers to hold a link to in any case."""

    def __init__(
        self,
        host: Host,
        news: CargoNews,
        network: str,
        hello: Callable[[], Hello],
        meet: Callable[[Hello, str], object],
        rng: random.Random,
        gossip: Gossip | None = None,
        coordinators: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """``meet`` is told who is at the other end, and raises RemoteProtocolError for somebody who may not. With ``gossip``, before it
        runs, a topic is added to it."""
        self._host, self._news, self._network, self._rng = host, news, network, rng
        self._hello, self._meet, self._coordinators = hello, meet, coordinators
        self._gossip, self._topic = gossip, topic_of(network)
        self._links: dict[str, list[_Link]] = {}
        self._opening: set[str] = set()
        self._rest_until_s: dict[str, float] = {}
        self._useless: OrderedDict[str, Allowance] = OrderedDict()
        self._told: OrderedDict[str, Allowance] = OrderedDict()
        self._publish, self._to_publish = trio.open_memory_channel[Notice](_PUSHES_MAX * limits.CARGO_NOTICES_MAX)
        self.dropped_total = 0
        news.pass_on = self.pass_on
        if gossip is not None:
            gossip.add_topic(self._topic, self._take_gossip)

    def __repr__(self) -> str:
        return f"<CargoLinks to {len(self._links)} peers, {self.dropped_total} pushes dropped>"

    def linked(self) -> tuple[str, ...]:
        """Peers that there is a link with."""
        return tuple(self._links)

    # -- saying

    def pass_on(self, notices: Sequence[Notice], sender: str) -> None:
        """To every neighbour but the one who said it; our own go to the topic too. Never blocks."""
        for peer, links in self._links.items():
            if peer != sender:
                links[0].push_nowait(notices)
        if not sender and self._gossip is not None:
            for notice in notices:
                try:
                    self._publish.send_nowait(notice)
                except trio.WouldBlock:
                    self.dropped_total += 1

    async def _take_gossip(self, forwarder: str, data: bytes) -> bool:
        """Whether it is passed on: what counts, while it is fresh."""
        if not self._allowance(self._told, forwarder, limits.CARGO_TOLD_PER_S, limits.CARGO_TOLD_BURST).try_take(1, trio.current_time()):
            return False
        try:
            notice = NOTICE.decode(data)
        except RemoteProtocolError:
            return False
        await self._news.hear((notice,), forwarder)
        return self._news.is_fresh(notice)

    def _allowance(self, kept: OrderedDict[str, Allowance], peer: str, per_s: float, burst: float) -> Allowance:
        found = kept.get(peer)
        if found is None:
            found = kept[peer] = Allowance(per_s, burst, trio.current_time())
            if len(kept) > _ALLOWANCES_MAX:
                kept.popitem(last=False)
        return found

    async def hear(self, notices: Sequence[Notice], peer: str) -> None:
        """What a link has brought; takes as long as its peer has brought rubbish before."""
        hearing = await self._news.hear(notices, peer)
        if hearing.useless:
            allowance = self._allowance(self._useless, peer, limits.CARGO_USELESS_PER_S, limits.CARGO_USELESS_BURST)
            await trio.sleep(allowance.take(hearing.useless, trio.current_time()))

    # -- links

    async def run(self) -> None:
        """Holds links until cancelled."""
        self._host.set_handler(CARGOS_PROTOCOL, CARGOS, self.serve)
        events = self._host.peer_events()
        async with trio.open_nursery() as nursery:
            if self._gossip is not None:
                nursery.start_soon(self._publish_all, self._gossip)
            while True:
                for peer in self._wanted():
                    self._opening.add(peer)
                    nursery.start_soon(self._keep, peer)
                with trio.move_on_after(_LOOK_S):
                    await events.receive()
                while events.statistics().current_buffer_used:
                    events.receive_nowait()

    async def _publish_all(self, gossip: Gossip) -> None:
        async for notice in self._to_publish:
            try:
                await gossip.publish(NOTICE.encode(notice), self._topic)
            except LocalProtocolError as error:
                log.warning("a notice is not published: %s", error)

    def _wanted(self) -> list[str]:
        """Neighbours to open a link to now."""
        now_s = trio.current_time()
        connected = self._host.connected_peers()
        self._rest_until_s = {peer: until_s for peer, until_s in self._rest_until_s.items() if until_s > now_s}
        free = [peer for peer in connected if peer not in self._opening and peer not in self._rest_until_s]
        first = set(self._coordinators())
        others = [peer for peer in free if peer not in first]
        room = max(0, LINKS_MAX - len(self._opening - first))
        return [peer for peer in free if peer in first] + self._rng.sample(others, min(room, len(others)))

    async def _keep(self, peer: str) -> None:
        rest_s = _REST_S
        try:
            stream = await self._host.open(peer, CARGOS_PROTOCOL, CARGOS)
            try:
                hello = await exchange_hello(stream, self._hello())
                self._check_network(hello, peer)
                await self._run_link(stream, asks=True)
            finally:
                stream.abort()
        except* RemoteProtocolError as group:
            rest_s = _STRANGER_REST_S
            log.debug("no news of Cargos from %s: %s", peer, group.exceptions[0])
        except* (LinkLost, OSError, trio.TooSlowError) as group:
            log.debug("the link to %s has ended: %s", peer, group.exceptions[0])
        finally:
            self._opening.discard(peer)
            self._rest_until_s[peer] = trio.current_time() + rest_s * self._rng.uniform(0.5, 1.0)

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream; raises what ends it."""
        await answer_hello(stream, self._hello, self._check_network)
        if len([link for link in self._links.get(stream.remote_peer, ()) if not link.asks]) >= SERVED_PER_PEER_MAX:
            raise RemoteProtocolError(f"{stream.remote_peer} has {SERVED_PER_PEER_MAX} streams for Cargos already")
        await self._run_link(stream, asks=False)

    def _check_network(self, hello: Hello, peer: str) -> None:
        if hello.network not in ("", self._network):
            raise RemoteProtocolError(f"{peer} is of network {hello.network}, not {self._network}")
        self._meet(hello, peer)

    async def _run_link(self, stream: FrameStream, asks: bool) -> None:
        link = _Link(stream, self, self._news, self._rng, asks)
        links = self._links.setdefault(stream.remote_peer, [])
        links.append(link)
        try:
            await link.run()
        finally:
            links.remove(link)
            if not links and self._links.get(stream.remote_peer) is links:
                del self._links[stream.remote_peer]


class _Link:
    """One stream. ``asks``: this end has opened it, and catches up over it."""

    def __init__(self, stream: FrameStream, owner: CargoLinks, news: CargoNews, rng: random.Random, asks: bool) -> None:
        self._stream, self._owner, self._news, self._rng = stream, owner, news, rng
        self.asks = asks
        self._pushes, self._to_push = trio.open_memory_channel[tuple[Notice, ...]](_PUSHES_MAX)
        self._answers, self._answered = trio.open_memory_channel[CargosKnown](1)
        self._questions = Allowance(_QUESTIONS_PER_S, _QUESTIONS_BURST, trio.current_time())
        self._asked = False

    @property
    def peer(self) -> str:
        return self._stream.remote_peer

    def push_nowait(self, notices: Sequence[Notice]) -> None:
        for part in batches(notices):
            try:
                self._pushes.send_nowait(part)
            except trio.WouldBlock:
                self._owner.dropped_total += 1

    async def run(self) -> None:
        """To the end of the stream, which it raises."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._push)
            if self.asks:
                nursery.start_soon(self._catch_up)
            while True:
                await self._hear(await self._stream.receive())

    async def _push(self) -> None:
        async for notices in self._to_push:
            await self._stream.send(News(notices))

    async def _hear(self, message: object) -> None:
        match message:
            case CargosWanted() if not self.asks:
                await trio.sleep(self._questions.take(1, trio.current_time()))
                await self._stream.send(answer(message, self._news.known))
            case CargosKnown() if self._asked:
                self._asked = False
                self._answers.send_nowait(message)
            case News(notices):
                await self._owner.hear(notices, self.peer)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not to be said now on a stream about Cargos")

    # -- catching up

    async def _catch_up(self) -> None:
        """All at first; then a part again and again, in case something was missed."""
        for about in About:
            after = b""
            for _ in range(_PARTS_MAX):
                after = await self._ask(about, after)
                if not after:
                    break
        while True:
            await trio.sleep(limits.CATCHUP_INTERVAL_S * self._rng.uniform(0.8, 1.2))
            for about in About:
                await self._ask(about, self._news.known[about].start(self._rng.random()))

    async def _ask(self, about: About, after: bytes) -> bytes:
        """One question; behind which key to go on, empty at the end."""
        asked = question(about, self._news.known[about], after)
        self._asked = True
        with trio.fail_after(ANSWER_TIMEOUT_S):
            await self._stream.send(asked)
            told = await self._answered.receive()
        await self._owner.hear(told.notices, self.peer)
        if not told.more:
            return asked.until
        return self._behind(told.notices[-1], after)

    def _behind(self, last: Notice, after: bytes) -> bytes:
        """The key of the last notice of an answer that goes on. Raises RemoteProtocolError where that leads nowhere."""
        key = key_of(last)
        if key <= after:
            raise RemoteProtocolError(f"{self.peer} sends the same Cargos again and again")
        return key
