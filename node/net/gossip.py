"""GossipSub: what a topic's validator accepts is handed out and passed on, the rest goes no further.

Theory of operation. py-libp2p's Pubsub and GossipSub do the protocol: a mesh of 4 to 12 peers, full messages inside it, ids to the
others each heartbeat, every message signed by its author (strict signing). This module sets what its defaults get wrong and puts the
pieces where one bad message or one bug could end the node into a cage.

What stock 0.8.1 does and this module changes, each with a test:
- The heartbeat is 120 s; here 1 s, so a mesh forms and heals within seconds.
- A subscription holds 32 messages and drops the rest; here every message goes to our own bounded channel, and drops are counted.
- The spam limit of 10 messages/s counts what a peer *forwards*, so it silences relays; it is off, the validator judges instead.
- Sequence numbers start at the clock in seconds: a node that restarts after publishing quickly repeats its own numbers, and its
  messages are dropped as already seen. Here they start at the clock in nanoseconds.
- An exception while a message is pushed ends the whole service; here it is counted, and a service that ends anyway is started anew.
- Peers connected before the service runs are never greeted, and after a quick reconnect the dead stream is kept; both are repaired.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from node.net.host import Host
from node.net.oneline import one_line
from protocol import limits
from protocol.errors import LocalProtocolError

log = logging.getLogger(__name__)

Validator = Callable[[bytes], bool]
Taker = Callable[[str, bytes], Awaitable[bool]]  # forwarder and data -> whether it is passed on
_PROTOCOLS = (TProtocol("/meshsub/1.1.0"), TProtocol("/meshsub/1.0.0"))
_DEGREE, _DEGREE_LOW, _DEGREE_HIGH = 6, 4, 12  # the specification's figures
_HEARTBEAT_S = 1
_RESTART_S = 1.0
_RPC_BYTES_MAX = 1024 * 1024


@dataclass(slots=True)
class GossipCounters:
    published: int = 0
    received: int = 0
    refused: int = 0  # by the validator, or too large
    dropped: int = 0  # the node did not read fast enough
    errors: int = 0  # messages that made libp2p or the validator raise
    restarts: int = 0


class Gossip:
    """Publishes to and hears topics. One for each host; nothing happens until ``run`` runs."""

    def __init__(self, host: Host, topic: str, validator: Validator) -> None:
        self.topic = topic
        self.counters = GossipCounters()
        self.received: trio.MemoryReceiveChannel[tuple[str, bytes]]
        self._hand_out, self.received = trio.open_memory_channel[tuple[str, bytes]](limits.GOSSIP_QUEUED_MAX)
        self._host = host
        self._validator = validator
        self._takers: dict[str, Taker] = {}
        self._pubsub: _CagedPubsub | None = None

    def __repr__(self) -> str:
        return f"<Gossip {self.topic}, {len(self.mesh())} in the mesh, {self.counters.received} received>"

    def add_topic(self, topic: str, taker: Taker) -> None:
        """One more topic, before ``run``: ``taker`` takes each message in, may wait meanwhile, and says whether it is passed on."""
        self._takers[topic] = taker

    async def publish(self, data: bytes, topic: str = "") -> None:
        """Signs and sends to the mesh, of another topic than the first where one is named. Raises LocalProtocolError for a message over
        ENVELOPE_BYTES_MAX."""
        if len(data) > limits.ENVELOPE_BYTES_MAX:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes is over {limits.ENVELOPE_BYTES_MAX}")
        if self._pubsub is None:
            self.counters.dropped += 1
            return
        self.counters.published += 1
        await self._pubsub.publish(topic or self.topic, data)
        await trio.lowlevel.checkpoint()  # publishing only fills queues; let them drain

    def mesh(self) -> list[str]:
        """Peers to which we send full messages."""
        router = self._pubsub.router if self._pubsub is not None else None
        return [str(peer) for peer in router.mesh.get(self.topic, ())] if isinstance(router, GossipSub) else []

    def statistics_json(self) -> dict[str, Any]:
        return {
            **asdict(self.counters),
            "mesh": len(self.mesh()),
            "waiting": self.received.statistics().current_buffer_used,
        }

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; ``nursery.start`` returns when the topic is joined."""
        started = False
        while True:
            try:
                async with self._service() as pubsub:
                    if not started:
                        started = True
                        task_status.started()
                    await pubsub.manager.wait_finished()
            except Exception as error:  # a bug in libp2p's service must not take the node along
                log.warning("gossip on %s ended and is started again: %s", self.topic, one_line(error))
            self.counters.restarts += 1
            await trio.sleep(_RESTART_S)

    @asynccontextmanager
    async def _service(self) -> AsyncIterator[_CagedPubsub]:
        """One life of libp2p's service; leaves no notifee and no thread behind."""
        basic = self._host.libp2p
        swarm: Any = basic.get_network()
        before = list(swarm.notifees)
        router = _Router()
        pubsub = _CagedPubsub(self, router)
        try:
            async with background_trio_service(pubsub), background_trio_service(router):
                await pubsub.wait_until_ready()
                pubsub.set_topic_validator(self.topic, self.judge, is_async_validator=False)
                await pubsub.subscribe(self.topic)
                for topic in self._takers:
                    pubsub.set_topic_validator(topic, functools.partial(self._take, topic), is_async_validator=True)
                    await pubsub.subscribe(topic)
                self._pubsub = pubsub
                pubsub.greet(swarm.connections)
                yield pubsub
        finally:
            self._pubsub = None
            pubsub.hang_up()
            for notifee in [one for one in swarm.notifees if one not in before]:
                swarm.remove_notifee(notifee)
            pubsub.seen_messages.stop()

    # -- called by _CagedPubsub

    def judge(self, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Whether a message may be handed out and passed on; ours always may."""
        if str(forwarder) == self._host.peer_id:
            return True
        if len(message.data) <= limits.ENVELOPE_BYTES_MAX and self._validator(message.data):
            return True
        self.counters.refused += 1
        return False

    async def _take(self, topic: str, forwarder: ID, message: rpc_pb2.Message) -> bool:
        """Like ``judge``, of a topic that was added."""
        if str(forwarder) == self._host.peer_id:
            return True
        if len(message.data) <= limits.ENVELOPE_BYTES_MAX and await self._takers[topic](str(forwarder), message.data):
            return True
        self.counters.refused += 1
        return False

    def deliver(self, message: rpc_pb2.Message) -> None:
        author = str(ID(message.from_id))
        if author == self._host.peer_id:
            return
        try:
            self._hand_out.send_nowait((author, message.data))
            self.counters.received += 1
        except trio.WouldBlock:
            self.counters.dropped += 1

    def failed(self, peer: ID, error: Exception) -> None:
        self.counters.errors += 1
        log.warning("gossip from %s: %s", peer, one_line(error))


class _Router(GossipSub):
    def __init__(self) -> None:
        super().__init__(
            protocols=_PROTOCOLS,
            degree=_DEGREE,
            degree_low=_DEGREE_LOW,
            degree_high=_DEGREE_HIGH,
            heartbeat_interval=_HEARTBEAT_S,
            spam_protection_enabled=False,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,  # asks for three different addresses, which a LAN behind one NAT has not
        )

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()  # only adaptive gossip would ever trim it


class _CagedPubsub(Pubsub):
    """Pubsub whose messages go straight to the Gossip that owns it, and whose failures stay inside."""

    def __init__(self, gossip: Gossip, router: GossipSub) -> None:
        super().__init__(
            gossip._host.libp2p,
            router,
            seen_ttl=int(limits.GOSSIP_SEEN_S),
            strict_signing=True,
            max_inbound_rpc_size=_RPC_BYTES_MAX,
            allowed_topics={gossip.topic, *gossip._takers},
        )
        self._gossip = gossip
        self._inbound: set[Any] = set()
        self.counter = time.time_ns()

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            self._gossip.failed(msg_forwarder, error)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        if self._gossip.topic in publish_message.topicIDs:
            self._gossip.deliver(publish_message)

    async def stream_handler(self, stream: INetStream) -> None:
        """A peer's stream to us. It also tells that the peer started anew, so our stream to it may be a dead one."""
        muxed: Any = cast(Any, stream).muxed_stream
        self._inbound.add(muxed)
        try:
            if self.manager.is_running:
                self._drop_if_dead(muxed.connection.peer_id)
                await super().stream_handler(stream)
        finally:
            self._inbound.discard(muxed)
            muxed.reset_nowait()

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if not self._drop_if_dead(peer_id):
            await super()._handle_new_peer(peer_id)

    def _drop_if_dead(self, peer_id: ID) -> bool:
        """Whether our stream to the peer was dead; then it is forgotten and the peer, if connected, is greeted anew."""
        stream: Any = self.peers.get(peer_id)
        dead = stream is not None and stream.muxed_stream.was_reset
        if dead:
            self._handle_dead_peer(peer_id)
        return dead

    def hang_up(self) -> None:
        """Resets all streams of this service, so that peers greet the next one."""
        outbound: list[Any] = [cast(Any, stream).muxed_stream for stream in self.peers.values()]
        for muxed in [*self._inbound, *outbound]:
            muxed.reset_nowait()

    def greet(self, peers: Iterable[ID]) -> None:
        for peer in list(peers):
            self.manager.run_task(self._handle_new_peer_with_retry, peer)
