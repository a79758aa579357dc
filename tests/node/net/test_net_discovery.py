"""Finding peers and keeping them."""

from __future__ import annotations

import json
import random
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from node.net.discovery import Discovery, KnownPeer, PeerBook, backoff_s, load_peers
from node.net.host import open_host, peer_id_of
from node.net.mdns import FoundPeer, read_txt, txt_record
from protocol import limits
from protocol.errors import ConfigError
from tests.node.net.netlab import lab_host, seed, settle


class _Chance(random.Random):
    """Always the same draw."""

    def __init__(self, drawn: float) -> None:
        super().__init__(0)
        self._drawn = drawn

    def random(self) -> float:
        return self._drawn


@pytest.mark.parametrize(
    ("attempt", "drawn", "expected_s"),
    [(0, 0.0, 0.1), (0, 1.0, 0.2), (1, 1.0, 0.4), (3, 0.0, 0.8), (3, 1.0, 1.6), (20, 1.0, 30.0), (10_000, 0.0, 15.0)],
)
def test_backoff_table(attempt: int, drawn: float, expected_s: float) -> None:
    assert backoff_s(attempt, _Chance(drawn)) == pytest.approx(expected_s)


def test_backoff_of_held_peers_stays_under_its_cap_and_spreads() -> None:
    rng = random.Random(4)
    pauses = [backoff_s(attempt, rng, limits.RECONNECT_HELD_MAX_S) for attempt in range(200)]
    assert all(0.1 <= pause <= limits.RECONNECT_HELD_MAX_S for pause in pauses)
    assert len(set(pauses)) == len(pauses)


def _known(number: int, seen_s: float) -> KnownPeer:
    return KnownPeer(peer_id_of(seed(number)), ("/ip4/192.0.2.1/tcp/4001",), seen_s)


def test_the_book_is_bounded_and_forgets_whom_it_has_not_seen_for_longest() -> None:
    book = PeerBook()
    for number in range(1, limits.PEERS_REMEMBERED_MAX + 11):
        book.note(_known(number, 1000.0 + number))
    assert len(book) == limits.PEERS_REMEMBERED_MAX
    assert book.get(peer_id_of(seed(10))) is None and book.get(peer_id_of(seed(11))) is not None


def test_the_book_survives_the_disk() -> None:
    book = PeerBook([_known(1, 5.0), _known(2, 6.0)])
    assert PeerBook.from_json(book.to_json()).peers() == book.peers()


BROKEN = [
    b"",
    b"{",
    b"[]",
    b'{"format": 99, "peers": []}',
    b'{"format": 1}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"format": 1, "peers": {}}',
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_left_aside_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "peers.json"
    file.write_bytes(content)
    assert len(load_peers(file)) == 0
    assert "left aside" in caplog.text


def test_bad_entries_are_left_out_and_good_ones_kept(tmp_path: Path) -> None:
    good = {"peer_id": peer_id_of(seed(1)), "addresses": ["/ip4/192.0.2.1/tcp/1"], "seen_s": 5}
    bad: list[Any] = [
        {},
        None,
        7,
        {**good, "peer_id": "me"},
        {**good, "addresses": []},
        {**good, "addresses": ["nowhere"]},
        {**good, "addresses": ["/ip4/192.0.2.1/tcp/1"] * 99},
        {**good, "addresses": 5},
        {**good, "seen_s": float("nan")},
        {**good, "seen_s": "now"},
    ]
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"format": 1, "peers": [*bad, good]}))
    assert [peer.peer_id for peer in load_peers(file).peers()] == [good["peer_id"]]


def test_an_oversized_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_FILE_BYTES_MAX", 10)
    file = tmp_path / "peers.json"
    file.write_bytes(PeerBook([_known(1, 5.0)]).to_json())
    assert len(load_peers(file)) == 0


def test_no_file_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_peers(tmp_path / "peers.json")) == 0
    assert not caplog.records


async def test_peers_of_the_last_run_are_dialled_again(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    async with lab_host(2) as friend:
        async with lab_host(1) as host, trio.open_nursery() as nursery:
            await nursery.start(Discovery(host, file, bootstrap=friend.addresses(), rng=random.Random(1)).run)
            await settle(lambda: host.is_connected(friend.peer_id))
            nursery.cancel_scope.cancel()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert list(tmp_path.iterdir()) == [file]
        async with lab_host(1) as host, trio.open_nursery() as nursery:
            await nursery.start(Discovery(host, file, rng=random.Random(1)).run)
            await settle(lambda: host.is_connected(friend.peer_id))
            nursery.cancel_scope.cancel()


async def test_a_held_peer_that_returns_is_back_within_two_seconds() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listen = f"/ip4/127.0.0.1/tcp/{port}"
    peer_id = peer_id_of(seed(2))
    async with lab_host(1) as host, trio.open_nursery() as nursery:
        await nursery.start(Discovery(host, None, hold=[f"{listen}/p2p/{peer_id}"], rng=random.Random(1)).run)
        for away_s in (0.2, 2.5):
            await trio.sleep(away_s)
            async with open_host(seed(2), [listen]):
                with trio.fail_after(2):
                    while not host.is_connected(peer_id):
                        await trio.sleep(0.01)
            await settle(lambda: not host.is_connected(peer_id))
        nursery.cancel_scope.cancel()


async def test_no_more_peers_than_wanted_are_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_WANTED", 1)
    async with lab_host(1) as host, lab_host(2) as one, lab_host(3) as two, trio.open_nursery() as nursery:
        discovery = Discovery(host, None, bootstrap=[*one.addresses(), *two.addresses()], rng=random.Random(1))
        await nursery.start(discovery.run)
        await settle(lambda: len(host.connected_peers()) == 1)
        await trio.sleep(0.5)
        assert len(host.connected_peers()) == 1
        nursery.cancel_scope.cancel()


async def test_a_peer_that_does_not_answer_is_left_alone_for_longer_and_longer() -> None:
    async with lab_host(1) as host, trio.open_nursery() as nursery:
        gone = f"/ip4/127.0.0.1/tcp/1/p2p/{peer_id_of(seed(9))}"
        await nursery.start(Discovery(host, None, bootstrap=[gone], rng=random.Random(1)).run)
        await trio.sleep(3)
        assert 1 <= host.counters.dials_failed <= 5
        nursery.cancel_scope.cancel()


async def test_what_peers_say_of_others_is_checked() -> None:
    async with lab_host(1) as host:
        discovery = Discovery(host, None, rng=random.Random(1))
        other = peer_id_of(seed(2))
        discovery.learn(other, ["", "nonsense", "/ip4/999.1.1.1/tcp/1"])
        assert len(discovery.book) == 0
        discovery.learn(other, ["nonsense", "/ip4/192.0.2.1/tcp/1", f"/ip4/192.0.2.1/tcp/1/p2p/{other}"])
        assert host.remembered(other) == ("/ip4/192.0.2.1/tcp/1",)
        discovery.learn(host.peer_id, ["/ip4/192.0.2.1/tcp/1"])
        assert len(discovery.book) == 1


async def test_malformed_configuration_is_told_to_the_user() -> None:
    async with lab_host(1) as host:
        with pytest.raises(ConfigError):
            Discovery(host, None, bootstrap=["example.org:4001"], rng=random.Random(1))
        with pytest.raises(ConfigError):
            Discovery(host, None, hold=["/ip4/192.0.2.1/tcp/1"], rng=random.Random(1))


def _raw(record: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in record.items()}


def test_a_txt_record_says_who_and_where() -> None:
    peer_id = peer_id_of(seed(1))
    addresses = [f"/ip4/192.0.2.1/tcp/{port}/p2p/{peer_id}" for port in range(1, 20)]
    found = read_txt(_raw(txt_record(peer_id, addresses, "net", "coordinator")))
    assert found == FoundPeer(
        peer_id, tuple(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, limits.MDNS_ADDRESSES_MAX + 1)), "net", "coordinator"
    )


RECORDS: list[dict[bytes, bytes | None]] = [
    {},
    {b"id": None},
    {b"id": b"short", b"a0": b"/ip4/192.0.2.1/tcp/1"},
    {b"id": peer_id_of(seed(1)).encode()},
    {b"\xff": b"x"},
    {b"id": peer_id_of(seed(1)).encode(), b"a0": b"/x", b"network": b"n" * 500},
]


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_foreign_txt_records_are_refused(record: dict[bytes, bytes | None]) -> None:
    with pytest.raises(ValueError):
        read_txt(record)


async def test_neighbours_of_another_network_are_left_alone() -> None:
    async with lab_host(1) as host:
        heard: list[FoundPeer] = []
        discovery = Discovery(host, None, network="ours", rng=random.Random(1), found=heard.append)
        where = ("/ip4/192.0.2.1/tcp/1",)
        discovery._hear_lan(FoundPeer(peer_id_of(seed(2)), where, "theirs"))
        assert len(discovery.book) == 0 and not heard
        discovery._hear_lan(FoundPeer(peer_id_of(seed(3)), where, "ours"))
        discovery._hear_lan(FoundPeer(peer_id_of(seed(4)), where, ""))
        assert len(discovery.book) == 2 and len(heard) == 2


async def test_two_nodes_on_a_lan_find_each_other(caplog: pytest.LogCaptureFixture) -> None:
    async with lab_host(1, "/ip4/0.0.0.0/tcp/0") as one, lab_host(2, "/ip4/0.0.0.0/tcp/0") as two, trio.open_nursery() as nursery:
        for number, host in enumerate((one, two)):
            await nursery.start(Discovery(host, None, mdns=True, rng=random.Random(number)).run)
        with trio.move_on_after(20):
            while not one.is_connected(two.peer_id) and "mDNS is off" not in caplog.text:
                await trio.sleep(0.05)
        found = one.is_connected(two.peer_id)
        nursery.cancel_scope.cancel()
    if "mDNS is off" in caplog.text:
        pytest.skip("this machine has no interface that does multicast")
    assert found
