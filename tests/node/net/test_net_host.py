"""The host: addresses, dialling, events, life and death, nothing left behind."""

from __future__ import annotations

import logging
import socket

import pytest
import trio

from node.net import host as host_module
from node.net.host import Host, PeerConnected, PeerLost, open_host, peer_id_of, split_address
from protocol import limits
from protocol.errors import ConfigError, LinkLost, LocalProtocolError
from tests.node.net.netlab import ECHO, TESTS, Note, ask, count_files, count_tasks, echo, lab_host, pair, seed, settle


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_addresses_are_resolved_and_end_in_the_peer_id() -> None:
    async with lab_host(1) as host:
        (address,) = host.addresses()
        transport, peer_id = split_address(address)
        assert peer_id == host.peer_id == peer_id_of(seed(1))
        assert transport.startswith("/ip4/127.0.0.1/tcp/") and not transport.endswith("/0")


async def test_an_unspecified_address_stands_for_those_of_the_interfaces() -> None:
    async with lab_host(1, "/ip4/0.0.0.0/tcp/0") as host, lab_host(2) as other:
        assert host.addresses()
        for address in host.addresses():
            assert "0.0.0.0" not in address
            await other.connect(address)
            await other.disconnect(host.peer_id)


async def test_a_taken_port_is_an_error_that_says_what_to_do() -> None:
    async with lab_host(1) as host:
        taken = split_address(host.addresses()[0])[0]
        with pytest.raises(ConfigError, match="choose another port"):
            async with open_host(seed(2), [taken]):
                pass


@pytest.mark.parametrize("address", ["", "127.0.0.1:4001", "/ip4/300.0.0.1/tcp/1", "/ip4/127.0.0.1/udp/1", "/dns4/x"])
async def test_malformed_listen_addresses(address: str) -> None:
    with pytest.raises(ConfigError):
        async with open_host(seed(2), [address]):
            pass


@pytest.mark.parametrize("target", ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/abc", "/p2p/" + peer_id_of(seed(9))])
async def test_malformed_targets(target: str) -> None:
    async with lab_host(1) as host:
        with pytest.raises(ConfigError):
            await host.connect(target)


async def test_an_exception_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with lab_host(1):
            raise KeyError("mine")


async def test_nobody_there_is_a_loss_that_names_the_address() -> None:
    async with lab_host(1) as host:
        with pytest.raises(LinkLost, match="/tcp/"):
            await host.connect(f"/ip4/127.0.0.1/tcp/{_free_port()}/p2p/{peer_id_of(seed(9))}")
        assert host.counters.dials_failed == 1


async def test_somebody_else_at_the_address_is_no_connection() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        transport, _ = split_address(other.addresses()[0])
        with pytest.raises(LinkLost):
            await host.connect(f"{transport}/p2p/{peer_id_of(seed(9))}")
        assert host.connected_peers() == [] and other.connected_peers() == []


async def test_a_host_does_not_dial_itself() -> None:
    async with lab_host(1) as host:
        with pytest.raises(LocalProtocolError):
            await host.connect(host.addresses()[0])


async def test_any_of_the_remembered_addresses_will_do() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        good, peer_id = split_address(other.addresses()[0])
        host.remember(peer_id, [f"/ip4/127.0.0.1/tcp/{_free_port()}", f"/ip4/127.0.0.1/tcp/{_free_port()}", good])
        assert await host.connect(peer_id) == peer_id


async def test_a_black_hole_does_not_hold_up_the_next_address() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        good, peer_id = split_address(other.addresses()[0])
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(1)  # accepts and never answers
            host.remember(peer_id, [f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}", good])
            with trio.fail_after(2):
                await host.connect(peer_id)


@pytest.mark.parametrize("family", ["dns", "dns4"])
async def test_names_are_resolved_as_this_system_resolves_them(family: str) -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        port = other.addresses()[0].split("/")[4]
        await host.connect(f"/{family}/localhost/tcp/{port}/p2p/{other.peer_id}")
        await host.disconnect(other.peer_id)
        with pytest.raises(LinkLost, match=r"nowhere\.invalid"):
            await host.connect(f"/{family}/nowhere.invalid/tcp/{port}/p2p/{other.peer_id}")


async def test_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with lab_host(1) as host, lab_host(2, "/ip6/::1/tcp/0") as other:
        await host.connect(other.addresses()[0])
        await settle(lambda: other.is_connected(host.peer_id))
        assert (other.remote_address(host.peer_id) or "").startswith("/ip6/::1/tcp/")


async def test_dials_of_many_tasks_become_one_connection() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(host.connect, other.addresses()[0])
        assert host.statistics().connections == other.statistics().connections == 1
        assert not host._dials


async def test_a_cancelled_dial_leaves_nothing() -> None:
    async with lab_host(1) as host:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen(1)
            with trio.move_on_after(0.1):
                await host.connect(f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}/p2p/{peer_id_of(seed(9))}")
        assert host.connected_peers() == [] and not host._dials


async def test_events_tell_of_each_peer_once() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        early = host.peer_events()
        await host.connect(other.addresses()[0])
        late = host.peer_events()
        await host.disconnect(other.peer_id)
        await host.connect(other.addresses()[0])
        for channel in (early, late):
            assert await channel.receive() == PeerConnected(other.peer_id)
            assert await channel.receive() == PeerLost(other.peer_id, "closed on this side")
            assert await channel.receive() == PeerConnected(other.peer_id)
        with pytest.raises(trio.WouldBlock):
            early.receive_nowait()


async def test_a_listener_that_left_is_forgotten() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        host.peer_events().close()
        await host.connect(other.addresses()[0])
        assert not host._listeners


async def test_the_channel_ends_with_the_host() -> None:
    async with lab_host(1) as host:
        events = host.peer_events()
    with pytest.raises(trio.EndOfChannel):
        await events.receive()


async def test_the_other_end_hears_of_a_disconnect_at_once() -> None:
    async with pair() as (client, server):
        await settle(lambda: server.is_connected(client.peer_id))
        with trio.fail_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.wait_lost, client.peer_id)
                await client.disconnect(server.peer_id)


async def test_both_dial_at_once_and_either_end_works() -> None:
    for number in range(5):
        async with lab_host(10 + number) as one, lab_host(20 + number) as two:
            for host in (one, two):
                host.set_handler(ECHO, TESTS, echo)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.connect, two.addresses()[0])
                nursery.start_soon(two.connect, one.addresses()[0])
            assert await ask(await one.open(two.peer_id, ECHO, TESTS), Note(1)) == Note(1)
            assert await ask(await two.open(one.peer_id, ECHO, TESTS), Note(2)) == Note(2)


async def test_open_dials_a_remembered_peer() -> None:
    async with lab_host(1) as host, lab_host(2) as other:
        other.set_handler(ECHO, TESTS, echo)
        with pytest.raises(LinkLost, match="no address"):
            await host.open(other.peer_id, ECHO, TESTS)
        host.remember(other.peer_id, other.addresses())
        assert await ask(await host.open(other.peer_id, ECHO, TESTS), Note(3)) == Note(3)
        assert other.remote_address(host.peer_id) is not None


async def test_memory_of_addresses_is_bounded() -> None:
    async with lab_host(1) as host:
        for number in range(limits.PEERS_REMEMBERED_MAX + 20):
            host.remember(peer_id_of(seed(number + 1)), [f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 100)])
        assert len(host._addresses) == limits.PEERS_REMEMBERED_MAX
        newest = peer_id_of(seed(limits.PEERS_REMEMBERED_MAX + 20))
        assert len(host.remembered(newest)) == limits.AD_ADDRESSES_MAX


async def _cycle(server: Host, number: int) -> None:
    async with lab_host(number) as client:
        await client.connect(server.addresses()[0])
        stream = await client.open(server.peer_id, ECHO, TESTS)
        assert await ask(stream, Note(number)) == Note(number)


async def _lives(server: Host, cycles: int) -> None:
    for number in range(cycles):
        await _cycle(server, 1000 + number % 7)


async def _nothing_is_left(cycles: int) -> None:
    async with lab_host(1) as server:
        server.set_handler(ECHO, TESTS, echo)
        await _lives(server, 5)
        await settle(lambda: not server.connected_peers())
        await trio.sleep(0.3)  # the swarm takes leave of a connection a tenth of a second later than we
        tasks, files = count_tasks(), count_files()
        await _lives(server, cycles)
        await settle(lambda: count_tasks() <= tasks and count_files() <= files)
        assert server.counters.connections_opened == cycles + 5
        assert server.statistics().connections == 0
    assert not logging.getLogger().handlers or "libp2p" not in str(logging.getLogger().handlers)


async def test_three_hundred_connections_leave_nothing_behind() -> None:
    await _nothing_is_left(300)


@pytest.mark.soak
async def test_a_thousand_connections_leave_nothing_behind() -> None:
    await _nothing_is_left(1000)


async def test_reconnecting_the_same_pair_leaves_nothing_behind() -> None:
    async with pair() as (client, server):
        await trio.sleep(0.3)
        tasks, files = count_tasks(), count_files()
        for number in range(100):
            await client.disconnect(server.peer_id)
            await client.connect(server.addresses()[0])
            assert await ask(await client.open(server.peer_id, ECHO, TESTS), Note(number)) == Note(number)
        await client.disconnect(server.peer_id)
        await client.connect(server.addresses()[0])
        await settle(lambda: count_tasks() <= tasks + 2 and count_files() <= files)


async def test_a_closed_host_leaves_no_task_and_no_file() -> None:
    async with pair():
        pass
    await trio.sleep(0.2)
    tasks, files = count_tasks(), count_files()
    for _ in range(5):
        async with pair() as (client, server):
            await client.open(server.peer_id, ECHO, TESTS)
    await settle(lambda: count_tasks() <= tasks and count_files() <= files)


async def test_statistics_and_repr_are_status_lines() -> None:
    async with pair() as (client, server):
        await client.open(server.peer_id, ECHO, TESTS)
        statistics = client.statistics()
        assert (statistics.peers, statistics.connections, statistics.streams) == (1, 1, 1)
        assert statistics.counts["streams_opened"] == 1
        assert client.peer_id in repr(client) and "\n" not in repr(client)


def test_the_key_seed_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        host_module.Host(b"short")
