"""Messages over real connections: sizes, ends, cancellation, bad bytes."""

from __future__ import annotations

import logging
import struct
from typing import Any

import pytest
import trio

from node.net.frames import FrameStream, StreamEnded
from node.net.host import Host
from protocol import limits
from protocol.errors import LinkLost, LocalProtocolError, RemoteProtocolError
from tests.node.net.netlab import ECHO, TESTS, Note, ask, echo, pair, settle

SIZES = [0, 1, 63, 64, 65_506, 65_507, 65_508, 262_144, 4 * 1024 * 1024, limits.STREAM_WINDOW_BYTES + 5]


@pytest.mark.parametrize("size", SIZES)
async def test_any_size_comes_back_whole(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        assert await ask(stream, Note(size, "x" * 10, payload)) == Note(size, "x" * 10, payload)


async def test_many_small_messages_arrive_in_order() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        async with trio.open_nursery() as nursery:

            async def send_all() -> None:
                for number in range(3000):
                    await stream.send(Note(number))

            nursery.start_soon(send_all)
            assert [(await stream.receive()).number for _ in range(3000)] == list(range(3000))


async def test_concurrent_senders_are_not_interleaved() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        notes = {number: Note(number, data=bytes([number]) * 700_000) for number in range(8)}
        async with trio.open_nursery() as nursery:
            for note in notes.values():
                nursery.start_soon(stream.send, note)
            for _ in range(8):
                got = await stream.receive()
                assert got == notes.pop(got.number)


async def test_a_message_of_no_registry_is_our_own_fault() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        with pytest.raises(LocalProtocolError):
            await stream.send("text")
        assert await ask(stream, Note(1)) == Note(1)


async def _script(server: Host, actions: Any) -> None:
    """The server's handler runs ``actions(stream)`` and then waits for the peer's end."""

    async def handler(stream: FrameStream) -> None:
        await actions(stream)
        await trio.sleep_forever()

    server.set_handler("/test/script/1", TESTS, handler)


async def test_clean_end_between_frames() -> None:
    async with pair() as (client, server):

        async def actions(stream: FrameStream) -> None:
            await stream.send(Note(1))
            await stream.aclose()

        await _script(server, actions)
        stream = await client.open(server.peer_id, "/test/script/1", TESTS)
        assert await stream.receive() == Note(1)
        with pytest.raises(StreamEnded):
            await stream.receive()


@pytest.mark.parametrize("cut", [3, 8, 20])
async def test_end_inside_a_frame_is_a_loss_and_no_clean_end(cut: int) -> None:
    async with pair() as (client, server):

        async def actions(stream: FrameStream) -> None:
            await stream._stream.write(struct.pack(">II", 100, 100)[:cut] + bytes(max(0, cut - 8)))
            stream._stream.close_write_nowait()

        await _script(server, actions)
        stream = await client.open(server.peer_id, "/test/script/1", TESTS)
        with pytest.raises(LinkLost) as caught:
            await stream.receive()
        assert not isinstance(caught.value, StreamEnded)


async def test_reset_is_a_loss_after_what_had_arrived() -> None:
    async with pair() as (client, server):
        await _script(server, _send_and_abort)
        stream = await client.open(server.peer_id, "/test/script/1", TESTS)
        await trio.sleep(0.05)
        assert await stream.receive() == Note(1)
        with pytest.raises(LinkLost):
            await stream.receive()
        with pytest.raises(LinkLost):
            await stream.send(Note(2))


async def _send_and_abort(stream: FrameStream) -> None:
    await stream.send(Note(1))
    stream.abort()


BAD_FRAMES = {
    "header too long": struct.pack(">II", limits.FRAME_HEADER_BYTES_MAX + 1, 0),
    "no header": struct.pack(">II", 0, 5),
    "body too long": struct.pack(">II", 10, limits.FRAME_BODY_BYTES_MAX + 1),
    "no MessagePack": struct.pack(">II", 4, 0) + b"\xc1\xc1\xc1\xc1",
    "unknown number": struct.pack(">II", 2, 0) + b"\x91\x09",
    "wrong type": struct.pack(">II", 4, 0) + b"\x93\x01\xa1x",
    "text": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_bad_frames_are_refused_counted_and_harm_nobody(name: str) -> None:
    async with pair() as (client, server):
        refused = trio.Event()

        async def handler(stream: FrameStream) -> None:
            with pytest.raises(RemoteProtocolError):
                await stream.receive()
            refused.set()
            with pytest.raises(LinkLost):
                await stream.receive()

        server.set_handler("/test/strict/1", TESTS, handler)
        stream = await client.open(server.peer_id, "/test/strict/1", TESTS)
        await stream._stream.write(BAD_FRAMES[name])
        with trio.fail_after(5):
            await refused.wait()
        assert server.counters.frames_refused == 1
        other = await client.open(server.peer_id, ECHO, TESTS)
        assert await ask(other, Note(7)) == Note(7)


async def test_an_announced_body_costs_nothing_before_it_comes() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        await stream._stream.write(struct.pack(">II", 5, limits.FRAME_BODY_BYTES_MAX) + bytes(1000))
        await settle(lambda: server.counters.streams_accepted == 1)
        await trio.sleep(0.05)
        held = [s for several in server._connections.values() for c in several for s in c._streams.values()]
        assert sum(len(chunk) for s in held for chunk in s._chunks) <= 1008


async def test_cancelled_receive_loses_nothing() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        big = Note(1, data=bytes(6_000_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, big)
            got = None
            for _ in range(10_000):
                with trio.move_on_after(0.001):
                    got = await stream.receive()
                if got is not None:
                    break
        assert got == big


async def test_send_cancelled_before_it_began_leaves_the_stream_usable() -> None:
    async with pair() as (client, server):
        stream = await client.open(server.peer_id, ECHO, TESTS)
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.send(Note(1))
        assert scope.cancelled_caught
        assert await ask(stream, Note(2)) == Note(2)


async def test_send_cancelled_in_the_middle_resets_this_stream_only() -> None:
    async with pair() as (client, server):
        ended = trio.Event()

        async def never_reads(stream: FrameStream) -> None:
            await settle(lambda: stream._stream.was_reset, 10)
            ended.set()

        server.set_handler("/test/deaf/1", TESTS, never_reads)
        healthy = await client.open(server.peer_id, ECHO, TESTS)
        for _ in range(5):
            stream = await client.open(server.peer_id, "/test/deaf/1", TESTS)
            with trio.move_on_after(0.2) as scope:
                await stream.send(Note(1, data=bytes(limits.STREAM_WINDOW_BYTES + 1_000_000)))
            assert scope.cancelled_caught
            with pytest.raises(LinkLost):
                await stream.send(Note(2))
            assert await ask(healthy, Note(3, data=bytes(100_000))) == Note(3, data=bytes(100_000))
        with trio.fail_after(5):
            await ended.wait()
        assert server.statistics().connections == 1


async def test_a_raising_handler_is_one_log_line_and_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as (client, server):

        async def broken(stream: FrameStream) -> None:
            await stream.receive()
            async with trio.open_nursery():
                raise ZeroDivisionError("a bug\nof two lines")

        server.set_handler("/test/broken/1", TESTS, broken)
        stream = await client.open(server.peer_id, "/test/broken/1", TESTS)
        with caplog.at_level(logging.WARNING, "node.net.host"), pytest.raises(LinkLost):
            await ask(stream, Note(1))
        assert server.counters.handler_errors == 1
        lines = [record.getMessage() for record in caplog.records if record.name == "node.net.host"]
        assert len(lines) == 1 and "ZeroDivisionError" in lines[0] and "\n" not in lines[0]
        assert await ask(await client.open(server.peer_id, ECHO, TESTS), Note(2)) == Note(2)


async def test_a_handler_that_returns_closes_the_stream_in_order() -> None:
    async with pair() as (client, server):

        async def one_answer(stream: FrameStream) -> None:
            await stream.send(await stream.receive())

        server.set_handler("/test/once/1", TESTS, one_answer)
        stream = await client.open(server.peer_id, "/test/once/1", TESTS)
        assert await ask(stream, Note(1)) == Note(1)
        with pytest.raises(StreamEnded):
            await stream.receive()
        await stream.aclose()
        await settle(lambda: client.statistics().streams == 0 and server.statistics().streams == 0)


async def test_a_block_closes_its_stream_and_aborts_it_on_error() -> None:
    async with pair() as (client, server):
        async with await client.open(server.peer_id, ECHO, TESTS) as stream:
            assert await ask(stream, Note(1)) == Note(1)
        with pytest.raises(KeyError):
            async with await client.open(server.peer_id, ECHO, TESTS):
                raise KeyError("mine")
        await settle(lambda: client.statistics().streams == 0 and server.statistics().streams == 0)


async def test_talking_to_somebody_who_left_ends_in_a_reset() -> None:
    async with pair() as (client, server):

        async def leaves(stream: FrameStream) -> None:
            await stream.aclose()

        server.set_handler("/test/leaves/1", TESTS, leaves)
        stream = await client.open(server.peer_id, "/test/leaves/1", TESTS)
        with pytest.raises(LinkLost), trio.fail_after(5):
            while True:
                await stream.send(Note(1, data=bytes(10_000)))
                await trio.sleep(0.01)
        await settle(lambda: server.statistics().streams == 0)


async def test_unknown_protocol_is_refused_and_counted() -> None:
    async with pair() as (client, server):
        with pytest.raises(RemoteProtocolError, match="does not speak /test/nothing/1"):
            await client.open(server.peer_id, "/test/nothing/1", TESTS)
        await settle(lambda: server.counters.streams_refused == 1)
        assert await ask(await client.open(server.peer_id, ECHO, TESTS), Note(2)) == Note(2)


async def test_both_ends_may_open_streams() -> None:
    async with pair() as (client, server):
        client.set_handler(ECHO, TESTS, echo)
        stream = await server.open(client.peer_id, ECHO, TESTS)
        assert stream.remote_peer == client.peer_id
        assert await ask(stream, Note(5, "back")) == Note(5, "back")


async def test_opening_more_streams_than_allowed_waits_for_room() -> None:
    async with pair() as (client, server):
        streams = [await client.open(server.peer_id, ECHO, TESTS) for _ in range(limits.STREAMS_PER_PEER_MAX)]
        with trio.move_on_after(0.1) as scope:
            await client.open(server.peer_id, ECHO, TESTS)
        assert scope.cancelled_caught
        await streams[0].aclose()
        with trio.fail_after(5):
            late = await client.open(server.peer_id, ECHO, TESTS)
        assert await ask(late, Note(1)) == Note(1)
        assert server.counters.streams_refused == 0


async def test_forty_streams_of_two_mebibytes_in_both_directions_do_not_lock_up() -> None:
    async with pair() as (client, server):
        payload = bytes(2 * 1024 * 1024)

        async def talk(number: int) -> None:
            stream = await client.open(server.peer_id, ECHO, TESTS)
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(stream.send, Note(number, data=payload))
                for _ in range(2):
                    assert (await stream.receive()).number == number
            await stream.aclose()

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(talk, number)
        await settle(lambda: client.statistics().streams == 0 and server.statistics().streams == 0)
