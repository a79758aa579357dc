"""Seeded noise: whatever bytes come in whatever pieces, nothing but the documented errors comes out."""

from __future__ import annotations

import logging
import random
from collections import deque
from typing import Any

import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from node.net.counters import NetCounters
from node.net.frames import FrameStream, StreamEnded
from protocol.errors import LinkLost, RemoteProtocolError
from protocol.framing import FrameDecoder, encode_frame
from tests.node.net.netlab import ECHO, TESTS, Note, ask, frame, pair, raw_peer


class _Script:
    """A stream that delivers given chunks and then ends."""

    def __init__(self, chunks: list[Any]) -> None:
        self.connection = self
        self.peer_id = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
        self._chunks = deque(chunks)
        self.was_reset = False

    async def receive_chunks(self) -> list[Any]:
        await trio.lowlevel.checkpoint()
        if not self._chunks:
            raise MuxedStreamEOF("end")
        return [self._chunks.popleft() for _ in range(min(2, len(self._chunks)))]

    def reset_nowait(self) -> None:
        self.was_reset = True


def _cut(data: bytes, rng: random.Random) -> list[Any]:
    chunks: list[Any] = []
    while data:
        size = rng.choice((1, 2, 3, 7, 11, 600, 70_000))
        piece: Any = data[:size]
        chunks.append(rng.choice((bytes, bytearray, memoryview))(piece))
        data = data[size:]
    return chunks


async def _all(chunks: list[Any]) -> tuple[list[Any], type[Exception]]:
    stream = FrameStream(_Script(chunks), TESTS, NetCounters())  # type: ignore[arg-type]
    got = []
    try:
        while True:
            got.append(await stream.receive())
    except (LinkLost, RemoteProtocolError) as error:
        return got, type(error)


@pytest.mark.parametrize("number", range(30))
async def test_any_cut_gives_the_same_messages(number: int) -> None:
    rng = random.Random(number)
    notes = [Note(i, "t" * rng.randrange(50), rng.randbytes(rng.choice((0, 1, 400, 200_000)))) for i in range(20)]
    data = b"".join(encode_frame(TESTS, note) for note in notes)
    assert await _all(_cut(data, rng)) == (notes, StreamEnded)
    assert await _all(_cut(data[: -rng.randrange(1, 8)], rng)) == (notes[:-1], LinkLost)


@pytest.mark.parametrize("number", range(100))
async def test_noise_ends_as_the_decoder_of_the_protocol_says(number: int) -> None:
    rng = random.Random(number)
    data = bytearray(b"".join(encode_frame(TESTS, Note(i, "text", b"body" * i)) for i in range(10)))
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    expected: list[Any] = []
    refused = False
    try:
        for message in FrameDecoder(TESTS).feed(bytes(data)):
            expected.append(message)
    except RemoteProtocolError:
        refused = True
    got, end = await _all(_cut(bytes(data), rng))
    assert got == expected
    assert (end is RemoteProtocolError) == refused


def _noise(rng: random.Random) -> bytes:
    """Mostly plausible frames, so that the noise gets past the first check."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(1, 40))
    kind = rng.choice((0, 0, 1, 1, 1, 2, 3, rng.randrange(256)))
    flags = rng.choice((0, 1, 2, 4, 8, 5, 9, 12, 15, rng.randrange(1 << 16)))
    value = rng.choice((0, 1, 100, 262_144, 0xFFFFFFFF, rng.randrange(1 << 32)))
    payload = rng.randbytes(min(value, 300)) if kind == 0 else b""
    return frame(kind, flags, rng.choice((0, 1, 1, 1, 2, 3, 5, 7)), value, payload)


async def test_a_hundred_peers_talk_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as (client, server):
        with caplog.at_level(logging.WARNING):
            for number in range(100):
                rng = random.Random(number)
                async with raw_peer(server, 100 + number % 3) as peer:
                    try:
                        for _ in range(rng.randrange(1, 30)):
                            await peer.say(_noise(rng))
                    except (OSError, trio.BrokenResourceError):
                        continue
        assert "internal error" not in caplog.text
        stream = await client.open(server.peer_id, ECHO, TESTS)
        assert await ask(stream, Note(1)) == Note(1)
        assert server.counters.connections_broken > 10
        assert client.counters.connections_lost == 0
