"""Hosts on loopback, a message to echo, and a raw peer that says whatever a test wants on the wire."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.transport.upgrader import TransportUpgrader

from node.net.counters import NetCounters
from node.net.fast_noise import FastNoise, NoiseSession
from node.net.frames import FrameStream
from node.net.host import Host, open_host, split_address
from protocol.errors import LinkLost
from protocol.registry import Registry, body

ECHO = "/test/echo/1"
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
TESTS = Registry("tests")


@TESTS.message(1)
@dataclass(frozen=True, slots=True)
class Note:
    number: int
    text: str = ""
    data: bytes = body()


TESTS.seal()


def seed(number: int) -> bytes:
    return number.to_bytes(32, "big")


def lab_host(number: int, *listen: str) -> Any:
    return open_host(seed(number), listen or ("/ip4/127.0.0.1/tcp/0",))


async def echo(stream: FrameStream) -> None:
    """Sends every message back until the peer ends the stream."""
    while True:
        try:
            message = await stream.receive()
        except LinkLost:
            return
        await stream.send(message)


async def ask(stream: FrameStream, note: Note) -> Note:
    with trio.fail_after(10):
        await stream.send(note)
        return cast(Note, await stream.receive())


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Host, Host]]:
    """Two connected hosts; the second echoes."""
    async with lab_host(1) as client, lab_host(2) as server:
        server.set_handler(ECHO, TESTS, echo)
        await client.connect(server.addresses()[0])
        yield client, server


def count_tasks() -> int:
    """All tasks of this trio run, system tasks included."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    waiting, count = [root], 0
    while waiting:
        task = waiting.pop()
        count += 1
        for nursery in task.child_nurseries:
            waiting.extend(nursery.child_tasks)
    return count


def count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def settle(condition: Any, timeout_s: float = 5.0) -> None:
    """Waits until ``condition()`` holds. Raises TooSlowError."""
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)


def frame(kind: int, flags: int, stream_id: int, value: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHII", 0, kind, flags, stream_id, value) + payload


class RawPeer:
    """The far end of an encrypted connection, before any muxer: the test is the muxer."""

    def __init__(self, session: NoiseSession, tcp: trio.SocketStream) -> None:
        self.session, self.tcp = session, tcp
        self._seen = b""

    async def say(self, *frames: bytes) -> None:
        """Raises an error of trio when the host has hung up."""
        data = b"".join(frames)
        pieces = [data[i : i + 60_000] for i in range(0, len(data), 60_000)]
        await self.session.send(self.session.seal(pieces))

    async def hear(self) -> tuple[int, int, int, int]:
        """The next frame without its payload: type, flags, stream, length."""
        while len(self._seen) < 12:
            self._seen += b"".join(await self.session.read_records())
        _, kind, flags, stream_id, value = struct.unpack(">BBHII", self._seen[:12])
        skip = 12 + (value if kind == DATA else 0)
        while len(self._seen) < skip:
            self._seen += b"".join(await self.session.read_records())
        self._seen = self._seen[skip:]
        return kind, flags, stream_id, value

    async def wait_hung_up(self, timeout_s: float = 5.0) -> None:
        """Reads to the end of the connection. Raises TooSlowError when there is none."""
        with trio.fail_after(timeout_s):
            try:
                while True:
                    await self.session.read_records()
            except Exception:
                return


class _Owner:
    def __init__(self) -> None:
        self.counters = NetCounters()

    def connection_began(self, connection: Any) -> None:
        """Nothing owns the raw peer."""

    def connection_ended(self, connection: Any, reason: str) -> None:
        """Nothing owns the raw peer."""


@asynccontextmanager
async def raw_peer(host: Host, number: int = 99) -> AsyncIterator[RawPeer]:
    address, peer_id = split_address(host.addresses()[0])
    _, _, ip, _, port = address.split("/")
    tcp = await trio.open_tcp_stream(ip, int(port))
    async with tcp:
        key_pair = create_new_key_pair(seed(number))
        upgrader = TransportUpgrader(
            {NOISE_ID: FastNoise(key_pair, _Owner())}, {TProtocol(YAMUX_ID): cast(Any, object)}
        )
        raw = RawConnection(TrioTCPStream(tcp), True)
        session: Any = await upgrader.upgrade_security(raw, True, ID.from_base58(peer_id))
        await upgrader.muxer_multistream._selector.select(session, True, 10)
        yield RawPeer(session, tcp)
