"""Our face over libp2p: one host of TCP + Noise + Yamux. Outside it there are peer ids as text, FrameStreams and events.

Theory of operation. libp2p's Swarm listens, dials and upgrades connections; from then on each connection is our
FastYamux, which tells its host when it begins and when it is lost. The host keeps its own list of connections by that,
because the swarm's own lags behind by a tenth of a second. Streams are negotiated in one round trip: header and
protocol id go out in one write.

Rules.
- Handlers may raise what they like: it is logged as one line, counted, and the stream is reset. A handler that returns
  closes it.
- A dial tries all addresses of a peer, each with a head start over the next, and there is one dial for each peer at a
  time.
- Lost is lost: PeerLost comes before any waiting task wakes up, and a new connection to the same peer is a new
  PeerConnected.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import ifaddr
import trio
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost, _IdentifyNotifee
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from libp2p.utils.varint import encode_delim
from multiaddr import Multiaddr

from node.net import workarounds
from node.net.counters import NetCounters
from node.net.fast_noise import FastNoise
from node.net.fast_stream import FastStream
from node.net.fast_yamux import FastYamux
from node.net.frames import FrameStream
from node.net.oneline import leaves, one_line
from protocol import checks, limits
from protocol.errors import ConfigError, LinkLost, LocalProtocolError, RemoteProtocolError
from protocol.registry import Registry

log = logging.getLogger(__name__)

Handler = Callable[[FrameStream], Awaitable[None]]
_MULTISTREAM = b"/multistream/1.0.0"
_CLOSE_TIMEOUT_S = 3.0
_NAME_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class PeerConnected:
    peer_id: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    peer_id: str
    reason: str


PeerEvent = PeerConnected | PeerLost


@dataclass(frozen=True, slots=True)
class HostStatistics:
    peers: int
    connections: int
    streams: int
    counts: dict[str, int]


def split_address(address: str) -> tuple[str, str]:
    """Transport part and peer id of a multiaddr that ends in ``/p2p/PEER_ID``. Raises ConfigError."""
    transport, found, peer = address.rpartition("/p2p/")
    try:
        if not found or not transport:
            raise ValueError("it must end in /p2p/PEER_ID")
        checks.peer_id("peer id", peer)
        Multiaddr(address)
    except Exception as error:  # multiaddr raises errors of a dozen unrelated classes for malformed text
        raise ConfigError(f"{address!r} is no address like /ip4/192.0.2.1/tcp/4001/p2p/12D3Koo…: {error}") from error
    return transport, peer


def peer_id_of(key_seed: bytes) -> str:
    """The peer id that belongs to a 32-byte Ed25519 seed."""
    return str(ID.from_pubkey(create_new_key_pair(key_seed).public_key))


class Host:
    """A running libp2p host; made by open_host."""

    def __init__(self, key_seed: bytes) -> None:
        checks.exactly("key_seed", key_seed, 32)
        key_pair = create_new_key_pair(key_seed)
        identity = ID.from_pubkey(key_pair.public_key)
        store = PeerStore()
        store.add_key_pair(identity, key_pair)
        upgrader = TransportUpgrader(
            {NOISE_ID: FastNoise(key_pair, self)}, {TProtocol(YAMUX_ID): cast(Any, workarounds.make_muxer)}
        )
        self.peer_id = str(identity)
        self.counters = NetCounters()
        self._swarm = Swarm(
            identity,
            store,
            upgrader,
            [TCP()],
            retry_config=RetryConfig(max_retries=0),
            connection_config=_connection_config(),
        )
        self._swarm.on_inbound_refused = self._inbound_refused  # type: ignore[attr-defined]
        self._basic = BasicHost(self._swarm, disable_identify_address_discovery=True)
        self._swarm.set_stream_handler(self._on_stream)
        _stop_identifying(self._swarm)
        self._connections: dict[str, list[FastYamux]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._dials: dict[str, trio.Lock] = {}
        self._listeners: set[trio.MemorySendChannel[PeerEvent]] = set()
        self._lost = trio.lowlevel.ParkingLot()
        self._stop = trio.Event()

    def __repr__(self) -> str:
        return f"<Host {self.peer_id}, {len(self._connections)} peers, {self.counters.connections_opened} so far>"

    @property
    def libp2p(self) -> BasicHost:
        """For modules of this package that build on libp2p's own services."""
        return self._basic

    # -- addresses and peers

    def addresses(self) -> list[str]:
        """Where peers reach us, each ending in ``/p2p/PEER_ID``; 0.0.0.0 stands for the addresses of all interfaces."""
        listening = [str(address) for address in self._basic.get_transport_addrs()]
        return [f"{one}/p2p/{self.peer_id}" for address in listening for one in _expand(address)]

    def remember(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Addresses (with or without ``/p2p/…``) for later dials, newest first; replaces what was known of the peer."""
        checks.peer_id("peer_id", peer_id)
        known = tuple(dict.fromkeys(address.partition("/p2p/")[0] for address in addresses))[: limits.AD_ADDRESSES_MAX]
        self._addresses.pop(peer_id, None)
        if known:
            self._addresses[peer_id] = known
        while len(self._addresses) > limits.PEERS_REMEMBERED_MAX:
            del self._addresses[next(iter(self._addresses))]

    def remembered(self, peer_id: str) -> tuple[str, ...]:
        return self._addresses.get(peer_id, ())

    def connected_peers(self) -> list[str]:
        return list(self._connections)

    def is_connected(self, peer_id: str) -> bool:
        return peer_id in self._connections

    def round_trips_s(self) -> dict[str, float]:
        """Round trip in seconds to each connected peer; measured when it connects and every half minute."""
        newest = {peer_id: connections[-1].round_trip_s for peer_id, connections in self._connections.items()}
        return {peer_id: seconds for peer_id, seconds in newest.items() if seconds is not None}

    def remote_address(self, peer_id: str) -> str | None:
        """Host and port from which a connected peer is seen, as a multiaddr."""
        for connection in self._connections.get(peer_id, ()):
            seen = connection.get_remote_address()
            if seen is not None:
                return f"/{'ip6' if ':' in seen[0] else 'ip4'}/{seen[0]}/tcp/{seen[1]}"
        return None

    async def connect(self, target: str, timeout_s: float = limits.DIAL_TIMEOUT_S) -> str:
        """Connects to a multiaddr that ends in /p2p/PEER_ID, or to a peer id whose addresses are remembered.

        Returns the peer id. Raises LinkLost when no address answers in time, ConfigError for a malformed address.
        """
        if target.startswith("/"):
            transport, peer_id = split_address(target)
            addresses: tuple[str, ...] = (transport,)
        else:
            checks.peer_id("target", target)
            peer_id, addresses = target, self.remembered(target)
        if peer_id == self.peer_id:
            raise LocalProtocolError("a host does not connect to itself")
        await self._connect(peer_id, addresses, timeout_s)
        return peer_id

    async def disconnect(self, peer_id: str) -> None:
        """Ends all connections to the peer; it may come back."""
        for connection in list(self._connections.get(peer_id, ())):
            await connection.close()

    async def _connect(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        lock = self._dials.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                if self.is_connected(peer_id):
                    return
                if not addresses:
                    raise LinkLost(f"no address of {peer_id} is known")
                await self._dial_any(peer_id, addresses, timeout_s)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dials.pop(peer_id, None)

    async def _dial_any(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        failures: list[str] = []

        async def dial(address: str, over: trio.Event) -> None:
            try:
                for resolved in await _resolve(address):
                    await self._dial(resolved, peer_id, failures)
                    if self.is_connected(peer_id):
                        nursery.cancel_scope.cancel()
                        return
            except OSError as error:
                failures.append(f"{address}: {error.strerror}")
            finally:
                over.set()

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                for address in addresses:
                    over = trio.Event()
                    nursery.start_soon(dial, address, over)
                    with trio.move_on_after(limits.DIAL_STAGGER_S):
                        await over.wait()
        if not self.is_connected(peer_id):
            self.counters.dials_failed += 1
            raise LinkLost(f"cannot reach {peer_id}: {'; '.join(failures) or f'no answer within {timeout_s:g} s'}")

    async def _dial(self, address: str, peer_id: str, failures: list[str]) -> None:
        try:
            await self._swarm.dial_addr(Multiaddr(f"{address}/p2p/{peer_id}"), ID.from_base58(peer_id))
        except Exception as error:  # the swarm lets errors of every layer through
            failures.append(f"{address}: {one_line(error)}")

    async def wait_lost(self, peer_id: str) -> None:
        """Returns when there is no connection to the peer; at once where there is none."""
        while self.is_connected(peer_id):
            await self._lost.park()
        await trio.lowlevel.checkpoint()

    # -- streams

    def set_handler(self, protocol_id: str, registry: Registry, handler: Handler) -> None:
        """Serves a protocol: ``handler`` runs in a task of its own for each stream that a peer opens."""

        async def serve(stream: INetStream) -> None:
            await self._serve(protocol_id, registry, handler, cast(FastStream, cast(Any, stream).muxed_stream))

        self._basic.set_stream_handler(TProtocol(protocol_id), cast(Any, serve))

    async def open(
        self, peer_id: str, protocol_id: str, registry: Registry, timeout_s: float = limits.OPEN_TIMEOUT_S
    ) -> FrameStream:
        """A new stream to a peer; dials it when its addresses are remembered. Raises LinkLost, RemoteProtocolError."""
        if not self.is_connected(peer_id):
            await self.connect(peer_id)
        try:
            connection = self._connections[peer_id][-1]
        except LookupError:
            raise LinkLost(f"the connection to {peer_id} was lost") from None
        stream: FastStream | None = None
        try:
            with trio.fail_after(timeout_s):
                stream = await connection.open_stream()
                stream.widen_window()
                await _negotiate(stream, protocol_id)
        except BaseException as error:
            if stream is not None:
                stream.reset_nowait()
            if isinstance(error, trio.TooSlowError):
                raise LinkLost(f"{peer_id} did not accept {protocol_id} within {timeout_s:g} s") from None
            if isinstance(error, MuxedStreamError):
                raise LinkLost(f"opening {protocol_id} to {peer_id}: {error}") from error
            if isinstance(error, BaseLibp2pError):
                raise RemoteProtocolError(f"opening {protocol_id} to {peer_id}: {error}") from error
            raise
        return FrameStream(stream, registry, self.counters, protocol_id)

    async def _serve(self, protocol_id: str, registry: Registry, handler: Handler, stream: FastStream) -> None:
        stream.widen_window()
        frames = FrameStream(stream, registry, self.counters, protocol_id)
        try:
            await handler(frames)
            await frames.aclose()
        except Exception as error:
            if not all(isinstance(leaf, LinkLost) for leaf in leaves(error)):
                self.counters.handler_errors += 1
                log.warning("%s from %s: %s", protocol_id, frames.remote_peer, one_line(error))
        finally:
            if not stream.send_closed:
                frames.abort()

    async def _on_stream(self, net_stream: INetStream) -> None:
        """For each stream that a peer opens, of our protocols and libp2p's. Raises nothing but trio.Cancelled."""
        stream = cast(FastStream, cast(Any, net_stream).muxed_stream)
        try:
            communicator = MultiselectCommunicator(net_stream)
            timeout_s = math.ceil(limits.HANDSHAKE_TIMEOUT_S)
            protocol_id, handler = await self._basic.multiselect.negotiate(communicator, timeout_s)
            if protocol_id is None or handler is None:
                raise LookupError("no protocol was agreed on")
            net_stream.set_protocol(protocol_id)
        except Exception as error:
            self.counters.streams_refused += 1
            log.debug("stream from %s refused: %s", stream.connection.peer_id, one_line(error))
            stream.reset_nowait()
            return
        try:
            await handler(net_stream)
        except Exception as error:
            self.counters.handler_errors += 1
            log.warning("%s from %s: %s", protocol_id, stream.connection.peer_id, one_line(error))
            stream.reset_nowait()

    # -- events

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """What happens from now on, beginning with a PeerConnected for each peer that is connected already."""
        send, receive = trio.open_memory_channel[PeerEvent](limits.PEER_EVENTS_QUEUED_MAX)
        for peer_id in self._connections:
            send.send_nowait(PeerConnected(peer_id))
        self._listeners.add(send)
        return receive

    def _tell(self, event: PeerEvent) -> None:
        for channel in list(self._listeners):
            try:
                channel.send_nowait(event)
            except trio.BrokenResourceError:
                self._listeners.discard(channel)
            except trio.WouldBlock:
                log.error("a listener for peer events is too far behind; %r is lost", event)

    def connection_began(self, connection: FastYamux) -> None:
        self.counters.connections_opened += 1
        peer_id = str(connection.peer_id)
        connections = self._connections.setdefault(peer_id, [])
        connections.append(connection)
        if len(connections) == 1:
            self._tell(PeerConnected(peer_id))

    def connection_ended(self, connection: FastYamux, reason: str) -> None:
        peer_id = str(connection.peer_id)
        connections = self._connections.get(peer_id, [])
        if connection not in connections:
            return
        self.counters.connections_lost += 1
        connections.remove(connection)
        if not connections:
            del self._connections[peer_id]
            self._tell(PeerLost(peer_id, reason))
            self._lost.unpark_all()

    def _inbound_refused(self, reason: str) -> None:
        self.counters.handshakes_refused += 1
        log.debug("inbound connection refused: %s", reason)

    def statistics(self) -> HostStatistics:
        connections = [connection for several in self._connections.values() for connection in several]
        return HostStatistics(
            peers=len(self._connections),
            connections=len(connections),
            streams=sum(connection.stream_count for connection in connections),
            counts=self.counters.snapshot(),
        )

    # -- life

    async def run(self, listen: Sequence[str], *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until stop_nowait. Raises ConfigError when it cannot listen."""
        async with background_trio_service(self._swarm):
            for address in listen:
                if not await self._swarm.listen(Multiaddr(address)):
                    raise ConfigError(f"cannot listen on {address}: is it an address of this machine?")
            task_status.started()
            try:
                await self._stop.wait()
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_TIMEOUT_S):
                    await self._close()

    def stop_nowait(self) -> None:
        self._stop.set()

    async def _close(self) -> None:
        async with trio.open_nursery() as nursery:
            for connections in list(self._connections.values()):
                for connection in list(connections):
                    nursery.start_soon(connection.close)
        for channel in self._listeners:
            channel.close()
        self._listeners.clear()
        await self._basic.close()


@asynccontextmanager
async def open_host(key_seed: bytes, listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)) -> AsyncIterator[Host]:
    """A host that listens on ``listen`` until the block ends; ``key_seed`` is a 32-byte Ed25519 seed.

    Raises ConfigError for an address that is malformed or taken. An exception of the block comes out as it is, in no
    group.
    """
    workarounds.install()
    for address in listen:
        _check_free(address)
    host = Host(key_seed)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run, listen)
        try:
            yield host
        except Exception as error:
            failure = error
        finally:
            host.stop_nowait()
    if failure is not None:
        raise failure


def _connection_config() -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=limits.CONNECTIONS_MAX,
        min_connections=0,
        low_watermark=0,
        high_watermark=limits.CONNECTIONS_MAX,
        dial_timeout=limits.DIAL_TIMEOUT_S,
        inbound_upgrade_timeout=limits.HANDSHAKE_TIMEOUT_S,
        outbound_upgrade_timeout=limits.HANDSHAKE_TIMEOUT_S,
    )


def _stop_identifying(swarm: Swarm) -> None:
    """libp2p asks every new peer who it is, in system tasks whose failure would end the process. We only answer."""
    for notifee in list(swarm.notifees):
        if isinstance(notifee, _IdentifyNotifee):
            swarm.remove_notifee(notifee)


def _check_free(address: str) -> None:
    """libp2p listens with SO_REUSEPORT, so two nodes on one port would silently share it. Raises ConfigError."""
    try:
        parsed = Multiaddr(address)
        port = int(str(parsed.value_for_protocol("tcp")))
        family_name = "ip6" if address.startswith("/ip6/") else "ip4"
        ip = str(parsed.value_for_protocol(family_name))
    except Exception as error:  # multiaddr raises errors of a dozen unrelated classes for malformed text
        raise ConfigError(f"{address!r} is not an address like /ip4/0.0.0.0/tcp/4001: {error}") from error
    with socket.socket(socket.AF_INET6 if family_name == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror}; choose another port, or 0") from None


def _expand(address: str) -> list[str]:
    family, _, rest = address.lstrip("/").partition("/")
    ip, _, port = rest.partition("/")
    if ip not in ("0.0.0.0", "::"):
        return [address]
    found = [
        str(one.ip if family == "ip4" else one.ip[0])
        for adapter in ifaddr.get_adapters()
        for one in adapter.ips
        if one.is_IPv4 == (family == "ip4")
    ]
    usable = [one for one in found if not one.startswith(("127.", "fe80:")) and one != "::1"]
    return [f"/{family}/{one}/{port}" for one in usable or found]


async def _resolve(address: str) -> list[str]:
    """Addresses without names, by this system's own resolver; libp2p's asks name servers only. Raises OSError."""
    family, _, rest = address.lstrip("/").partition("/")
    if family not in _NAME_FAMILIES:
        return [address]
    name, _, port = rest.partition("/")
    found = await trio.socket.getaddrinfo(name, None, family=_NAME_FAMILIES[family], type=socket.SOCK_STREAM)
    ips = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/{port}" for ip in ips]


async def _negotiate(stream: FastStream, protocol_id: str) -> None:
    """Agrees on a protocol in one round trip. Raises RemoteProtocolError when the peer does not speak it."""
    wanted = protocol_id.encode()
    await stream.write(encode_delim(_MULTISTREAM) + encode_delim(wanted))
    header = await workarounds.read_short_line(stream)
    answer = await workarounds.read_short_line(stream)
    if header != _MULTISTREAM or answer != wanted:
        raise RemoteProtocolError(f"{stream.connection.peer_id} does not speak {protocol_id}")
