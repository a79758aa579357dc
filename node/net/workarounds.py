"""Every workaround for py-libp2p, in one place.

All of them are for **py-libp2p 0.8.1**, the version that setup.cfg pins. tests/node/net/test_net_workarounds.py shows
for each one that the stock behaviour is still wrong, and fails when it no longer is: then the workaround goes.
``install`` may be called as often as one likes; open_host calls it.

What is not here because it needs no patch: exceptions of stream handlers are contained by host.py (stock: one uncaught
exception ends the process), cancelled writes by fast_yamux.py (stock: a torn Noise record ends the connection), and
dialling is done address by address by host.py (stock: at most one TCP address of a peer is tried).
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import libp2p.network.connection.swarm_connection as swarm_connection
import libp2p.network.swarm as swarm_module
import libp2p.protocol_muxer.multiselect_communicator as communicator_module
import libp2p.stream_muxer.muxer_multistream as muxer_module
from libp2p.abc import ISecureConn
from libp2p.exceptions import ParseError
from libp2p.io.abc import Reader
from libp2p.io.exceptions import IOException
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.pubsub.rpc_queue import DefaultMaxMessageSize, RpcQueue
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from node.net.fast_noise import NoiseSession
from node.net.fast_yamux import FastYamux
from node.net.oneline import one_line
from protocol.errors import ConfigError

VERSION = "0.8.1"
NEGATIVE_CACHE_S = 1.0
NEGOTIATION_LINE_BYTES_MAX = 1024  # the multistream specification allows 64 KiB; our longest protocol id has 40

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workaround:
    """``why`` says what stock py-libp2p ``version`` does wrong; ``apply`` repairs it for the whole process."""

    name: str
    why: str
    apply: Callable[[], None]
    version: str = VERSION


# -- 1. A node refuses every inbound connection after max_connections - min_connections of them in its life.

_stock_inbound: Any = swarm_module.Swarm._do_handle_inbound_connection


async def _handle_inbound(self: Any, stream: Any, listen_address: Any, failure_event: Any) -> None:
    """Holds the inbound slot as long as this connection lives; stock holds it as long as the swarm lives."""
    remote = self._build_remote_multiaddr(stream)
    raw = RawConnection(stream, False)
    try:
        if remote is not None and not await self.connection_gate.is_allowed(remote):
            await raw.close()
            return
        connection = await self.upgrade_inbound_raw_conn(raw, listen_address)
    except Exception as error:
        await raw.close()
        refused = getattr(self, "on_inbound_refused", None)
        if refused is not None:
            refused(one_line(error))
        return
    await connection.event_closed.wait()


def _free_inbound_slots() -> None:
    swarm_module.Swarm._do_handle_inbound_connection = _handle_inbound  # type: ignore[method-assign,assignment]


# -- 2. Every successful dial waits 250 ms, because the head start is waited for on the *failure* of the first address.


def _dial_without_delay() -> None:
    swarm_module._HAPPY_EYEBALLS_DELAY = 0.0


# -- 3. One failed dial blocks a peer for 60 s.

_stock_cache_init: Any = swarm_module._NegativePeerCache.__init__


def _short_cache_init(self: Any, ttl: float = NEGATIVE_CACHE_S, max_size: int = 10_000) -> None:
    _stock_cache_init(self, ttl, max_size)


def _shorten_negative_cache() -> None:
    swarm_module._NegativePeerCache.__init__ = _short_cache_init  # type: ignore[method-assign]


# -- 4. The muxer class that a host is given is ignored for /yamux/1.0.0: the stock class is hard-coded.


def make_muxer(
    conn: ISecureConn,
    peer_id: ID,
    is_initiator: bool | None = None,
    on_close: Callable[[], Awaitable[Any]] | None = None,
) -> FastYamux | Yamux:
    """Ours over our Noise session; stock over anything else, so that stock hosts in the same process stay stock."""
    if isinstance(conn, NoiseSession):
        return FastYamux(conn, peer_id, is_initiator, on_close)
    return Yamux(conn, peer_id, is_initiator, on_close)


def _use_our_muxer() -> None:
    vars(muxer_module)["Yamux"] = make_muxer


# -- 5. The AutoConnector dials every known peer until 200 connections stand: a small network becomes a full mesh.


async def _connect_nobody(self: Any) -> None:
    """Who connects to whom is decided in discovery.py."""


def _stop_auto_connector() -> None:
    AutoConnector.maybe_connect = _connect_nobody  # type: ignore[method-assign]


# -- 6. A multistream line may announce any length: its reader waits for it and keeps what comes.


async def read_short_line(reader: Reader) -> bytes:
    """One line of the multistream protocol without its line feed. Raises ParseError."""
    try:
        line = await read_varint_prefixed_bytes_limited(reader, NEGOTIATION_LINE_BYTES_MAX)
        line.decode("utf-8")
    except (ValueError, IOException) as error:
        raise ParseError(str(error)) from error
    if not line.endswith(b"\n"):
        raise ParseError("a line ends in a line feed")
    return line[:-1]


def _bound_negotiation() -> None:
    vars(communicator_module)["read_delim"] = read_short_line


# -- 7. Pubsub queues 32 messages for each peer and drops the rest without a word.

GOSSIP_QUEUE_MESSAGES = 1024


def _widen_gossip_queue() -> None:
    RpcQueue.__init__.__defaults__ = (GOSSIP_QUEUE_MESSAGES, DefaultMaxMessageSize)


# -- 8. SwarmConn logs through the root logger's functions, which install a handler on the root logger.


def _log_under_own_name() -> None:
    vars(swarm_connection)["logging"] = logging.getLogger("libp2p.network.connection")


# -- 9. Expected events (a peer went away, a stream was refused) are logged as errors with tracebacks of many lines.


def _quiet_logs() -> None:
    """What matters is counted and logged by us, one line each."""
    for name in list(logging.Logger.manager.loggerDict):
        if name == "libp2p" or name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)


WORKAROUNDS: tuple[Workaround, ...] = (
    Workaround("inbound-slot-leak", "inbound slots are freed only when the swarm ends", _free_inbound_slots),
    Workaround("dial-delay", "every successful dial waits 250 ms", _dial_without_delay),
    Workaround("negative-cache", "a failed dial blocks the peer for 60 s", _shorten_negative_cache),
    Workaround("muxer-ignored", "muxer_opt is ignored for /yamux/1.0.0", _use_our_muxer),
    Workaround("auto-connector", "known peers are dialled up to 200 connections", _stop_auto_connector),
    Workaround("negotiation-unbounded", "a multistream line may announce any length", _bound_negotiation),
    Workaround("gossip-queue", "32 messages are queued for a peer, the rest is dropped", _widen_gossip_queue),
    Workaround("root-logger", "SwarmConn installs a handler on the root logger", _log_under_own_name),
    Workaround("noisy-logs", "expected events are logged as errors of many lines", _quiet_logs),
)

_installed: set[str] = set()


def install() -> None:
    """Applies what is not applied yet. Raises ConfigError for a version of libp2p that was never tried with these."""
    found = importlib.metadata.version("libp2p")
    if found != VERSION:
        raise ConfigError(f"libp2p {found} is installed, but this node was built for {VERSION}: run `make setup`")
    for workaround in WORKAROUNDS:
        if workaround.name not in _installed:
            workaround.apply()
            _installed.add(workaround.name)
