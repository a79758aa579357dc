"""Peers that break the rules: each is refused, counted, and harms neither the node nor its other peers."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import trio

from node.net.frames import FrameStream
from node.net.host import Host, PeerConnected, PeerLost, peer_id_of
from protocol import limits
from protocol.errors import LinkLost
from tests.node.net.netlab import (
    ACK,
    DATA,
    ECHO,
    FIN,
    PING,
    RST,
    SYN,
    TESTS,
    WINDOW,
    Note,
    ask,
    echo,
    frame,
    lab_host,
    pair,
    raw_peer,
    seed,
    settle,
)


async def _still_serves(client: Host, server: Host) -> None:
    stream = await client.open(server.peer_id, ECHO, TESTS)
    assert await ask(stream, Note(1, data=bytes(100_000))) == Note(1, data=bytes(100_000))
    await stream.aclose()


async def test_ten_thousand_streams_are_refused_and_counted() -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        async with trio.open_nursery() as nursery:

            async def flood() -> None:
                for start in range(0, 10_000, 500):
                    await peer.say(*(frame(WINDOW, SYN, 2 * i + 1, 0) for i in range(start, start + 500)))

            nursery.start_soon(flood)
            answers = {ACK: 0, RST: 0}
            while answers[RST] < 10_000 - limits.STREAMS_PER_PEER_MAX:
                kind, flags, _, _ = await peer.hear()
                if kind == WINDOW and flags in answers:
                    answers[flags] += 1
        assert answers == {ACK: limits.STREAMS_PER_PEER_MAX, RST: 10_000 - limits.STREAMS_PER_PEER_MAX}
        assert server.counters.streams_refused == 10_000 - limits.STREAMS_PER_PEER_MAX
        assert server.statistics().streams <= limits.STREAMS_PER_PEER_MAX
        await _still_serves(client, server)


async def test_a_flood_by_a_peer_that_never_reads_is_cut_off() -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        with pytest.raises((OSError, trio.BrokenResourceError)), trio.fail_after(20):
            for start in range(0, 2_000_000, 2_000):
                await peer.say(*(frame(WINDOW, SYN, 2 * i + 1, 0) for i in range(start, start + 2_000)))
        assert server.counters.connections_broken == 1
        await _still_serves(client, server)


async def test_pings_without_end_are_answered_without_a_queue() -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        for number in range(200):
            await peer.say(*(frame(PING, SYN, 0, number * 1000 + i) for i in range(1000)))
        with trio.fail_after(5):
            while True:
                kind, flags, _, value = await peer.hear()
                if (kind, flags, value) == (PING, ACK, 199_999):
                    break
        assert server.counters.connections_broken == 0
        await _still_serves(client, server)


async def test_a_peer_that_never_reads_a_stream_holds_up_only_that_stream() -> None:
    async with pair() as (client, server):
        received = trio.Event()

        async def deaf(stream: FrameStream) -> None:
            await received.wait()
            while True:
                await stream.receive()

        server.set_handler("/test/deaf/1", TESTS, deaf)
        blocked = await client.open(server.peer_id, "/test/deaf/1", TESTS)
        sent: list[int] = []

        async def fill() -> None:
            for number in range(40):
                await blocked.send(Note(number, data=bytes(1_000_000)))
                sent.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            await settle(lambda: len(sent) >= 15)
            for _ in range(5):
                await _still_serves(client, server)
            assert len(sent) <= limits.STREAM_WINDOW_BYTES // 1_000_000
            received.set()
        assert len(sent) == 40


def _stream_frames(*more: bytes) -> tuple[bytes, ...]:
    return (frame(WINDOW, SYN, 1, 0), *more)


VIOLATIONS: dict[str, tuple[bytes, ...]] = {
    "version": (b"\x01" + frame(PING, SYN, 0, 1)[1:],),
    "type": (frame(7, 0, 0, 0),),
    "opened twice": _stream_frames(frame(WINDOW, SYN, 1, 0)),
    "our parity": (frame(WINDOW, SYN, 2, 0),),
    "stream zero": (frame(WINDOW, SYN, 0, 0),),
    "overrun window": _stream_frames(frame(DATA, 0, 1, 256 * 1024 + 1)),
    "overrun in parts": _stream_frames(*(frame(DATA, 0, 1, 50_000, bytes(50_000)) for _ in range(6))),
    "data after the end": _stream_frames(frame(DATA, FIN, 1, 0), frame(DATA, 0, 1, 5, b"hello")),
    "huge frame for nobody": (frame(DATA, 0, 77, 0xFFFFFFFF),),
    "window overflow": _stream_frames(frame(WINDOW, 0, 1, 0xFFFFFFFF)),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_violations_end_this_connection_and_no_other(name: str) -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        await settle(lambda: server.statistics().connections == 2)
        await peer.say(*VIOLATIONS[name])
        await peer.wait_hung_up()
        assert server.counters.connections_broken == 1
        assert server.connected_peers() == [client.peer_id]
        await _still_serves(client, server)


async def test_a_header_may_come_in_pieces() -> None:
    async with pair() as (_, server), raw_peer(server) as peer:
        for byte in frame(PING, SYN, 0, 4711):
            await peer.say(bytes([byte]))
        with trio.fail_after(5):
            while await peer.hear() != (PING, ACK, 0, 4711):
                pass


async def test_a_forged_record_ends_the_connection() -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        sealed = peer.session.seal([frame(PING, SYN, 0, 1)])
        sealed[5] ^= 1
        await peer.session.send(sealed)
        await peer.wait_hung_up()
        assert server.counters.connections_broken == 1
        await _still_serves(client, server)


async def test_a_truncated_record_is_no_message() -> None:
    async with pair() as (client, server), raw_peer(server) as peer:
        sealed = peer.session.seal([frame(WINDOW, SYN, 1, 0) * 3])
        await peer.session.send(sealed[: len(sealed) // 2])
        await peer.tcp.send_eof()
        await peer.wait_hung_up()
        assert server.counters.streams_accepted == 0
        await _still_serves(client, server)


async def test_one_byte_frames_do_not_become_a_thousand_times_as_much_memory() -> None:
    async with pair() as (_, server), raw_peer(server) as peer:
        window = 256 * 1024
        tracemalloc.start()
        try:
            await peer.say(frame(WINDOW, SYN, 1, 0))
            await settle(lambda: server.counters.streams_accepted == 1)
            before, _ = tracemalloc.get_traced_memory()
            lines = b"\x13/multistream/1.0.0\n" + bytes([len(ECHO) + 1]) + ECHO.encode() + b"\n"
            await peer.say(frame(DATA, 0, 1, len(lines), lines))
            tiny = frame(DATA, 0, 1, 1, b"\0") * 1000
            # an endless frame of zeros is not valid, so announce one long frame first and drip its body
            head = (100).to_bytes(4, "big") + (window * 2).to_bytes(4, "big")
            await peer.say(frame(DATA, 0, 1, 8, head))
            for _ in range(200):
                await peer.say(tiny)
            await trio.sleep(0.2)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 8 * 1024 * 1024, "200,000 one-byte frames"


JUNK = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\0" * 4000,
    b"\xa5" * 70_000,
    b"\x13/multistream/1.0.0\n\xff\xff\xff\xff\x0f",
]


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
async def test_garbage_on_the_port_is_refused_and_counted(junk: bytes) -> None:
    async with pair() as (client, server):
        _, _, ip, _, port, _, _ = server.addresses()[0].split("/")
        for _ in range(5):
            tcp = await trio.open_tcp_stream(ip, int(port))
            async with tcp:
                try:
                    await tcp.send_all(junk)
                    await tcp.send_eof()
                    while await tcp.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass
        await settle(lambda: server.counters.handshakes_refused == 5)
        await _still_serves(client, server)


async def test_a_silent_caller_is_shown_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with pair() as (client, server):
        _, _, ip, _, port, _, _ = server.addresses()[0].split("/")
        async with await trio.open_tcp_stream(ip, int(port)) as tcp:
            with trio.fail_after(5):
                while await tcp.receive_some():
                    pass
        await settle(lambda: server.counters.handshakes_refused == 1)
        await _still_serves(client, server)


async def test_a_frozen_peer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_INTERVAL_S", 0.2)
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_S", 0.3)
    async with lab_host(2) as server:
        events = server.peer_events()
        async with raw_peer(server, 7):  # reads nothing, says nothing: as if stopped
            began_s = trio.current_time()
            with trio.fail_after(5):
                assert await events.receive() == PeerConnected(peer_id_of(seed(7)))
                lost = await events.receive()
            assert lost == PeerLost(peer_id_of(seed(7)), "the peer does not answer")
            assert 0.4 < trio.current_time() - began_s < 2.0
        assert server.counters.connections_broken == 1


async def test_a_peer_that_answers_pings_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_INTERVAL_S", 0.05)
    monkeypatch.setattr(limits, "KEEPALIVE_TIMEOUT_S", 0.2)
    async with pair() as (client, server):
        await trio.sleep(1.0)
        assert client.is_connected(server.peer_id) and server.is_connected(client.peer_id)
        assert 0 < client.round_trips_s()[server.peer_id] < 0.5


async def test_a_peer_that_sends_but_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_INTERVAL_S", 0.1)
    monkeypatch.setattr(limits, "WRITE_STALL_S", 0.5)
    async with lab_host(2) as server, raw_peer(server, 7) as peer:
        lines = b"\x13/multistream/1.0.0\n" + bytes([len("/test/pour/1") + 1]) + b"/test/pour/1\n"

        async def pour(stream: FrameStream) -> None:
            while True:
                await stream.send(Note(1, data=bytes(1_000_000)))

        server.set_handler("/test/pour/1", TESTS, pour)
        await peer.say(frame(WINDOW, SYN, 1, 1 << 30), frame(DATA, 0, 1, len(lines), lines))
        with pytest.raises((OSError, trio.BrokenResourceError)), trio.fail_after(10):
            while True:  # alive, by the look of it
                await peer.say(frame(WINDOW, 0, 1, 0))
                await trio.sleep(0.05)
        assert server.counters.connections_broken == 1


async def test_a_peer_that_never_reads_does_not_hold_up_the_end() -> None:
    async with lab_host(2) as server, raw_peer(server, 7) as peer:
        lines = b"\x13/multistream/1.0.0\n" + bytes([len("/test/pour/1") + 1]) + b"/test/pour/1\n"
        pouring = trio.Event()

        async def pour(stream: FrameStream) -> None:
            pouring.set()
            await stream.send(Note(1, data=bytes(60_000_000)))

        server.set_handler("/test/pour/1", TESTS, pour)
        await peer.say(frame(WINDOW, SYN, 1, 1 << 30), frame(DATA, 0, 1, len(lines), lines))
        await pouring.wait()
        await trio.sleep(0.3)
        began_s = trio.current_time()
        await server.disconnect(peer_id_of(seed(7)))
        assert trio.current_time() - began_s < 1.5


async def test_lost_connection_is_a_loss_on_both_ends_and_delivers_what_had_come() -> None:
    async with pair() as (client, server):
        held: list[FrameStream] = []

        async def keep(stream: FrameStream) -> None:
            await stream.send(Note(1))
            held.append(stream)
            await trio.sleep_forever()

        server.set_handler("/test/keep/1", TESTS, keep)
        stream = await client.open(server.peer_id, "/test/keep/1", TESTS)
        await settle(lambda: bool(held))
        await trio.sleep(0.05)
        connection: Any = server._connections[client.peer_id][0]
        connection.lose("pulled out")
        await settle(lambda: not client.connected_peers())
        assert await stream.receive() == Note(1)
        for end in (stream, held[0]):
            with pytest.raises(LinkLost):
                await end.receive()
            with pytest.raises(LinkLost):
                await end.send(Note(2))


async def test_connections_over_the_limit_are_refused_and_slots_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_MAX", 5)
    async with lab_host(2) as server:
        server.set_handler(ECHO, TESTS, echo)
        for number in range(20):
            async with lab_host(100 + number) as client:
                await client.connect(server.addresses()[0])
                assert await ask(await client.open(server.peer_id, ECHO, TESTS), Note(number)) == Note(number)
        assert server.counters.connections_opened == 20
        await settle(lambda: server.statistics().connections == 0)
