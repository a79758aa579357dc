"""Shows what py-libp2p does wrong as it ships, one probe for each fault. No line of ours is imported here.

Prints one JSON object: name of the fault -> whether it is still there. test_net_workarounds.py fails for each that is gone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import _NegativePeerCache
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils import varint
from multiaddr import Multiaddr

RAW = TProtocol("/test/raw/1")
LISTEN = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
Probe = Callable[[], Awaitable[bool]]
PROBES: dict[str, Probe] = {}


def probe(name: str) -> Callable[[Probe], Probe]:
    def register(function: Probe) -> Probe:
        PROBES[name] = function
        return function

    return register


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Any]:
    host: Any = new_host(listen_addrs=LISTEN, muxer_preference="YAMUX", **settings)
    async with host.run(listen_addrs=LISTEN):
        yield host


def where(host: Any) -> Any:
    return info_from_p2p_addr(Multiaddr(str(host.get_addrs()[0])))


@probe("inbound-slot-leak")
async def slots_leak() -> bool:
    config = ConnectionConfig(max_connections=4, min_connections=0, low_watermark=0, high_watermark=4)
    async with running(connection_config=config) as server:
        for number in range(6):
            async with running() as client:
                try:
                    with trio.fail_after(3):
                        await client.connect(where(server))
                except Exception:
                    return number >= 4
    return False


@probe("dial-delay")
async def dials_wait() -> bool:
    async with running() as server, running() as client:
        began_s = trio.current_time()
        await client.connect(where(server))
        return trio.current_time() - began_s >= 0.25


@probe("negative-cache")
async def failures_block() -> bool:
    cache = _NegativePeerCache()
    cache.mark_failed("peer")
    in_ten_seconds = time.monotonic() + 10
    real, time.monotonic = time.monotonic, lambda: in_ten_seconds
    try:
        return cache.is_blocked("peer")
    finally:
        time.monotonic = real


@probe("muxer-ignored")
async def muxer_is_ignored() -> bool:
    class Mine(Yamux):
        pass

    mine = {TProtocol("/yamux/1.0.0"): Mine}
    async with running(muxer_opt=mine) as server, running(muxer_opt=mine) as client:
        await client.connect(where(server))
        connection = client.get_network().get_connections()[0]
        return type(connection.muxed_conn) is not Mine


@probe("auto-connector")
async def everybody_is_dialled() -> bool:
    async with running() as server, running() as client:
        info = where(server)
        client.get_peerstore().add_addrs(info.peer_id, info.addrs, 1000)
        await client.get_network().auto_connector.maybe_connect()
        with trio.move_on_after(3):
            while not client.get_network().get_connections():
                await trio.sleep(0.02)
        return bool(client.get_network().get_connections())


@probe("negotiation-unbounded")
async def any_length_is_read() -> bool:
    asked: list[int] = []

    class Reader:
        def __init__(self) -> None:
            self.data = varint.encode_uvarint(1 << 30)

        async def read(self, n: int | None = None) -> bytes:
            asked.append(n or 0)
            taken, self.data = self.data[:n], self.data[n:]
            return taken

    with contextlib.suppress(Exception):
        await varint.read_delim(Reader())  # type: ignore[arg-type]
    return max(asked) >= 1 << 30


@probe("gossip-queue")
async def queue_is_short() -> bool:
    queue = RpcQueue()
    return not all(queue.push(rpc_pb2.RPC()) for _ in range(100))


@probe("root-logger")
async def root_logger_is_touched() -> bool:
    root = logging.getLogger()
    saved, root.handlers = root.handlers, []
    try:
        async with running() as server, running() as client:
            await client.connect(where(server))
            return bool(root.handlers)
    finally:
        root.handlers = saved


@probe("noisy-logs")
async def expected_events_are_errors() -> bool:
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("libp2p").addHandler(handler)
    try:
        async with running() as server, running() as client:
            await client.connect(where(server))
            with contextlib.suppress(Exception):
                await client.new_stream(server.get_id(), [TProtocol("/nobody/serves/this")])
    finally:
        logging.getLogger("libp2p").removeHandler(handler)
    return heard.getvalue().count("\n") > 3


@probe("handler-kills-host")
async def handler_kills_host() -> bool:
    async def broken(stream: Any) -> None:
        raise ZeroDivisionError("a bug in a handler")

    try:
        async with running() as client, running() as server:
            server.set_stream_handler(RAW, broken)
            await client.connect(where(server))
            await client.new_stream(server.get_id(), [RAW])
            await trio.sleep(0.5)
            return not server.get_network().get_manager().is_running
    except BaseException:
        return True


@probe("cancelled-write")
async def cancelled_write_corrupts() -> bool:
    async def swallow(stream: Any) -> None:
        with contextlib.suppress(Exception):
            while True:
                await stream.read(65_536)

    async with running() as server, running() as client:
        server.set_stream_handler(RAW, swallow)
        await client.connect(where(server))
        for _ in range(10):
            try:
                stream = await client.new_stream(server.get_id(), [RAW])
                with trio.move_on_after(0.05):
                    await stream.write(bytes(8_000_000))
                with trio.fail_after(3):
                    probe_stream = await client.new_stream(server.get_id(), [RAW])
                    await probe_stream.write(b"still there?")
            except Exception:
                return True
    return False


@probe("one-address")
async def only_one_address_is_tried() -> bool:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        async with running() as server, running() as client:
            info = where(server)
            client.get_peerstore().add_addrs(
                info.peer_id, [Multiaddr(f"/ip4/127.0.0.1/tcp/{nobody.getsockname()[1]}"), *info.addrs], 1000
            )
            try:
                await client.get_network().dial_peer(info.peer_id)
            except Exception:
                return True
    return False


@probe("shared-port")
async def two_hosts_share_a_port() -> bool:
    async with running() as one:
        taken = one.get_network().listeners
        address = next(iter(taken.values())).get_addrs()[0]
        two: Any = new_host(listen_addrs=[address])
        async with two.run(listen_addrs=[address]):
            return bool(two.get_network().listeners)


@probe("gossip-heartbeat")
async def heartbeat_is_slow() -> bool:
    return bool(inspect.signature(GossipSub.__init__).parameters["heartbeat_interval"].default > 1)


@probe("gossip-spam-limit")
async def relays_are_silenced() -> bool:
    router = GossipSub(protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12)
    relay: Any = new_host().get_id()
    messages = [rpc_pb2.Message(from_id=b"author %d" % i, seqno=b"1", topicIDs=["t"]) for i in range(50)]
    return not all(router._check_spam_protection(relay, message) for message in messages)


@probe("gossip-seqno")
async def restart_repeats_numbers() -> bool:
    """Two lives within a second, each numbers its messages from the clock: the second life's are known already."""
    def number() -> bytes:
        router = GossipSub(protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12)
        pubsub = Pubsub(new_host(), router)
        pubsub.seen_messages.stop()
        return pubsub._next_seqno()

    while time.time() % 1 > 0.5:
        await trio.sleep(0.05)
    return number() == number()


@probe("gossip-push-raises")
async def one_message_ends_the_service() -> bool:
    router = GossipSub(protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12)
    pubsub = Pubsub(new_host(), router)
    pubsub.seen_messages.stop()
    garbage = rpc_pb2.Message(from_id=b"\x12\x20" + bytes(32), key=b"\xff" * 40, signature=b"x", topicIDs=["t"])
    try:
        await pubsub.push_msg(pubsub.my_id, garbage)
    except Exception:
        return True
    return False


async def main() -> None:
    found: dict[str, bool] = {}
    for name, check in PROBES.items():
        with trio.move_on_after(20) as scope:
            try:
                found[name] = await check()
            except Exception as error:
                print(f"{name}: {error!r}", file=sys.stderr)
        if scope.cancelled_caught:
            print(f"{name}: took too long", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    trio.run(main)
