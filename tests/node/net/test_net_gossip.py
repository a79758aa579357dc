"""Gossip between real hosts: what is accepted travels, what is refused does not, and failures stay inside."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from node.net.gossip import Gossip, Validator
from node.net.host import Host
from protocol import limits
from protocol.errors import LocalProtocolError
from tests.node.net.netlab import lab_host, settle

TOPIC = "test/1/net"


def good(data: bytes) -> bool:
    return not data.startswith(b"bad")


@asynccontextmanager
async def chain(count: int, validator: Validator = good) -> AsyncIterator[tuple[list[Host], list[Gossip]]]:
    """Hosts in a row, each connected to the next only; the mesh stands."""
    async with AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(lab_host(i + 1)) for i in range(count)]
        nursery = await stack.enter_async_context(trio.open_nursery())
        gossips = [Gossip(host, TOPIC, validator) for host in hosts]
        for gossip in gossips:
            await nursery.start(gossip.run)
        for one, two in itertools.pairwise(hosts):
            await one.connect(two.addresses()[0])
        await settle(lambda: meshed(gossips))
        yield hosts, gossips
        nursery.cancel_scope.cancel()


def meshed(gossips: list[Gossip]) -> bool:
    inner = [len(gossip.mesh()) >= 2 for gossip in gossips[1:-1]]
    return all(inner) and all(gossip.mesh() for gossip in (gossips[0], gossips[-1]))


async def take(gossip: Gossip) -> tuple[str, bytes]:
    with trio.fail_after(5):
        return await gossip.received.receive()


async def test_a_message_reaches_the_far_end_of_a_chain_with_its_author() -> None:
    async with chain(5) as (hosts, gossips):
        await gossips[0].publish(b"price 1")
        for gossip in gossips[1:]:
            assert await take(gossip) == (hosts[0].peer_id, b"price 1")
        with pytest.raises(trio.WouldBlock):
            gossips[0].received.receive_nowait()


async def test_what_the_validator_refuses_is_not_passed_on() -> None:
    async with chain(3) as (_, gossips):
        await gossips[0].publish(b"bad news")
        await gossips[0].publish(b"good news")
        assert (await take(gossips[2]))[1] == b"good news"
        assert gossips[1].counters.refused == 1
        assert gossips[2].counters.refused == 0
        assert gossips[2].counters.received == 1


async def test_a_burst_arrives_whole() -> None:
    async with chain(3) as (_, gossips):
        for number in range(300):
            await gossips[0].publish(b"%d" % number)
        got = {(await take(gossips[2]))[1] for _ in range(300)}
        assert got == {b"%d" % number for number in range(300)}
        assert gossips[2].counters.dropped == 0


async def test_who_does_not_read_loses_messages_and_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GOSSIP_QUEUED_MAX", 10)
    async with chain(2) as (_, gossips):
        for number in range(30):
            await gossips[0].publish(b"%d" % number)
        await settle(lambda: gossips[1].counters.dropped == 20)
        assert gossips[1].statistics_json()["waiting"] == 10


async def test_a_raising_validator_is_contained() -> None:
    def fragile(data: bytes) -> bool:
        if data == b"trap":
            raise ZeroDivisionError("a bug of ours")
        return True

    async with chain(2, fragile) as (_, gossips):
        await gossips[0].publish(b"trap")
        await gossips[0].publish(b"fine")
        assert (await take(gossips[1]))[1] == b"fine"
        assert gossips[1].counters.errors == 1
        assert gossips[1].counters.restarts == 0


async def test_an_oversized_message_is_refused_on_both_ends() -> None:
    async with chain(2) as (_, gossips):
        too_much = bytes(limits.ENVELOPE_BYTES_MAX + 1)
        with pytest.raises(LocalProtocolError):
            await gossips[0].publish(too_much)
        pubsub: Any = gossips[0]._pubsub
        await pubsub.publish(TOPIC, too_much)
        await settle(lambda: gossips[1].counters.refused == 1)
        assert gossips[1].counters.received == 0


def _unsigned(message: rpc_pb2.Message) -> None:
    message.ClearField("signature")
    message.ClearField("key")


def _forged(message: rpc_pb2.Message) -> None:
    message.data = b"something else"


def _stolen(message: rpc_pb2.Message) -> None:
    message.from_id = ID.from_base58("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN").to_bytes()


def _garbage_key(message: rpc_pb2.Message) -> None:
    """An id that holds no key makes libp2p look into ``key``, where it raises."""
    message.from_id = b"\x12\x20" + bytes(32)
    message.key = b"\xff" * 40


@pytest.mark.parametrize("spoil", [_unsigned, _forged, _stolen, _garbage_key])
async def test_only_what_its_author_signed_is_heard(spoil: Callable[[rpc_pb2.Message], None]) -> None:
    async with chain(3) as (hosts, gossips):
        pubsub: Any = gossips[0]._pubsub
        signed: list[rpc_pb2.Message] = []
        original = pubsub.router.publish

        async def catch(forwarder: ID, message: rpc_pb2.Message) -> None:
            signed.append(message)

        pubsub.router.publish = catch
        await gossips[0].publish(b"signed")
        pubsub.router.publish = original
        spoil(signed[0])
        await original(pubsub.my_id, signed[0])
        await gossips[0].publish(b"after")
        assert await take(gossips[2]) == (hosts[0].peer_id, b"after")
        assert gossips[1].counters.received == 1


async def test_peers_connected_before_the_service_ran_are_greeted() -> None:
    async with lab_host(1) as one, lab_host(2) as two:
        await one.connect(two.addresses()[0])
        async with trio.open_nursery() as nursery:
            gossips = [Gossip(host, TOPIC, good) for host in (one, two)]
            for gossip in gossips:
                await nursery.start(gossip.run)
            await settle(lambda: all(gossip.mesh() for gossip in gossips))
            await gossips[1].publish(b"hello")
            assert await take(gossips[0]) == (two.peer_id, b"hello")
            nursery.cancel_scope.cancel()


async def test_publishing_heals_after_a_quick_reconnect() -> None:
    async with chain(2) as (hosts, gossips):
        for round_ in range(3):
            await hosts[0].disconnect(hosts[1].peer_id)
            await hosts[0].connect(hosts[1].addresses()[0])
            await _until_heard(gossips, b"round %d" % round_)


async def _until_heard(gossips: list[Gossip], data: bytes) -> None:
    """Ads are repeated, so a message lost in the moment of reconnecting is no harm: within 5 s they get through."""
    with trio.fail_after(5):
        number = 0
        while True:
            number += 1
            await gossips[0].publish(data + b" %d" % number)
            with trio.move_on_after(0.3):
                while not (await gossips[1].received.receive())[1].startswith(data):
                    pass
                return


async def test_a_service_that_ends_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async with chain(2) as (_, gossips):
        pubsub: Any = gossips[1]._pubsub

        async def bug() -> None:
            raise RuntimeError("a bug in the service")

        pubsub.manager.run_task(bug)
        await settle(lambda: gossips[1].counters.restarts == 1 and bool(gossips[1].mesh()), 15)
        assert any("a bug in the service" in record.getMessage() for record in caplog.records)
        await _until_heard(gossips, b"again")


async def test_cancelling_leaves_no_notifee_and_publishing_is_counted_as_dropped() -> None:
    async with lab_host(1) as host:
        swarm: Any = host.libp2p.get_network()
        before = len(swarm.notifees)
        gossip = Gossip(host, TOPIC, good)
        async with trio.open_nursery() as nursery:
            await nursery.start(gossip.run)
            assert len(swarm.notifees) == before + 1
            nursery.cancel_scope.cancel()
        assert len(swarm.notifees) == before
        await gossip.publish(b"too late")
        assert gossip.counters.dropped == 1


async def test_a_restarted_node_does_not_repeat_its_sequence_numbers() -> None:
    async with lab_host(1) as one, trio.open_nursery() as nursery:
        gossip = Gossip(one, TOPIC, good)
        await nursery.start(gossip.run)
        for round_ in range(2):
            async with lab_host(2) as two, trio.open_nursery() as inner:
                again = Gossip(two, TOPIC, good)
                await inner.start(again.run)
                await two.connect(one.addresses()[0])
                await settle(lambda g=again: bool(g.mesh()))
                for number in range(50):
                    await again.publish(b"%d of life %d" % (number, round_))
                for _ in range(50):
                    assert (await take(gossip))[1].endswith(b"life %d" % round_)
                inner.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def test_a_second_topic_has_a_taker_of_its_own() -> None:
    """What it takes is passed on, with its own word, and gets in nobody's way on the first."""
    taken: list[list[bytes]] = [[], [], []]
    async with AsyncExitStack() as stack:
        hosts = [await stack.enter_async_context(lab_host(i + 1)) for i in range(3)]
        nursery = await stack.enter_async_context(trio.open_nursery())
        gossips = [Gossip(host, TOPIC, good) for host in hosts]
        for gossip, mine in zip(gossips, taken, strict=True):

            async def take_in(forwarder: str, data: bytes, mine: list[bytes] = mine) -> bool:
                await trio.lowlevel.checkpoint()
                mine.append(data)
                return good(data)

            gossip.add_topic("second", take_in)
            await nursery.start(gossip.run)
        for one, two in itertools.pairwise(hosts):
            await one.connect(two.addresses()[0])
        await settle(lambda: meshed(gossips) and all(_mesh_of(gossip, "second") for gossip in gossips))
        await gossips[0].publish(b"bad word", "second")
        await gossips[0].publish(b"word", "second")
        await gossips[0].publish(b"price 1")
        assert (await take(gossips[2]))[1] == b"price 1"
        await settle(lambda: taken[2] == [b"word"])
        assert taken == [[], [b"bad word", b"word"], [b"word"]]
        with pytest.raises(trio.WouldBlock):
            gossips[2].received.receive_nowait()
        nursery.cancel_scope.cancel()


def _mesh_of(gossip: Gossip, topic: str) -> set[Any]:
    router: Any = gossip._pubsub.router if gossip._pubsub is not None else None
    return set(router.mesh.get(topic, ())) if router is not None else set()
