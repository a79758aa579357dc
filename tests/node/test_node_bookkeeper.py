"""The book's shell: what is heard, refused, forgotten and announced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from node.bookkeeper import BookKeeper
from node.datadir import DataDir
from node.trust import Pins
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import AD_VERSION, Ad, Hardware, Lost, sign_ad, sign_lost
from protocol.book import Outcome
from protocol.errors import ConfigError, RemoteProtocolError, SignatureError
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from protocol.prices import Ask
from protocol.tickets import Delegation, network_id_of, sign_delegation

NOW = 1_800_000_000_000
ISLAND, COORDINATOR, NETWORK = NodeKey(b"i" * 32), NodeKey(b"c" * 32), NodeKey(b"n" * 32)
NET = network_id_of(NETWORK.public_key)


def _ad(sequence: int = NOW) -> Ad:
    return Ad(
        version=AD_VERSION,
        network=NET,
        peer=ISLAND.peer_id,
        boot=NOW - 1000,
        sequence=sequence,
        expires_at_ms=sequence + int(limits.AD_LIFETIME_S * 1000),
        agent="test",
        addresses=(),
        region="",
        hardware=Hardware(1, 0, 0),
        runtimes=(),
        memory_offered_bytes=0,
        default_ask=Ask(),
        offers=(),
    )


class Clock:
    def __init__(self) -> None:
        self.now_ms = NOW

    def __call__(self) -> int:
        return self.now_ms


async def test_an_ad_is_heard_once_and_wakes_who_waits() -> None:
    keeper = BookKeeper(NET, Clock())
    envelope = sign_ad(_ad(), ISLAND)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.wait_changed)
        await trio.testing.wait_all_tasks_blocked()
        assert keeper.hear(envelope) is Outcome.CHANGED
    assert keeper.hear(envelope) is Outcome.STALE
    assert keeper.statistics().heard_total == 1, "the second time the signature was not even looked at"


@pytest.mark.parametrize(
    "envelope", [b"", b"rubbish", sign_ad(_ad(), COORDINATOR), sign_ad(replace(_ad(), network="0" * 32), ISLAND)]
)
def test_what_must_not_be_believed(envelope: bytes) -> None:
    keeper = BookKeeper(NET, Clock())
    assert keeper.hear(envelope) is Outcome.REFUSED
    assert keeper.hear(envelope) is Outcome.REFUSED, "and stays refused"
    assert not keeper.book.entries and keeper.statistics().refused_total == 1


def test_a_loss_stays_until_the_island_speaks_again() -> None:
    clock = Clock()
    keeper = BookKeeper(NET, clock)
    old = sign_ad(_ad(NOW - 10), ISLAND)
    keeper.hear(sign_ad(_ad(), ISLAND))
    keeper.trust(COORDINATOR.peer_id)
    lost = keeper.loss_of(ISLAND.peer_id)
    assert lost == Lost(NET, ISLAND.peer_id, NOW, NOW)
    assert keeper.hear(sign_lost(lost, COORDINATOR)) is Outcome.CHANGED and not keeper.book.entries
    assert keeper.hear(old) is Outcome.STALE and not keeper.book.entries, "stale gossip brings nobody back"
    assert keeper.loss_of(ISLAND.peer_id) is None
    assert keeper.hear(sign_ad(_ad(NOW + 1), ISLAND)) is Outcome.CHANGED and ISLAND.peer_id in keeper.book.entries


def test_an_island_that_is_called_dead_speaks_up() -> None:
    keeper = BookKeeper(NET, Clock(), own_peer=ISLAND.peer_id)
    keeper.trust(COORDINATOR.peer_id)
    spoke: list[int] = []
    keeper.refute = lambda: spoke.append(1)
    keeper.hear(sign_ad(_ad(), ISLAND))
    keeper.hear(sign_lost(Lost(NET, ISLAND.peer_id, NOW - 1, NOW), COORDINATOR))
    assert not spoke, "an older ad of ours is gone, we know"
    keeper.hear(sign_lost(Lost(NET, ISLAND.peer_id, NOW, NOW), COORDINATOR))
    assert spoke == [1]


def test_only_coordinators_may_call_somebody_lost() -> None:
    keeper = BookKeeper(NET, Clock())
    keeper.hear(sign_ad(_ad(), ISLAND))
    notice = Lost(NET, ISLAND.peer_id, NOW, NOW)
    assert keeper.hear(sign_lost(notice, NodeKey(b"x" * 32))) is Outcome.REFUSED
    assert keeper.book.entries
    keeper.trust(COORDINATOR.peer_id)
    assert keeper.hear(sign_lost(notice, COORDINATOR)) is Outcome.CHANGED
    assert not keeper.book.entries


async def test_expired_ads_leave(autojump_clock: trio.testing.MockClock) -> None:
    clock = Clock()
    keeper = BookKeeper(NET, clock)
    keeper.hear(sign_ad(_ad(), ISLAND))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(10)
        assert keeper.book.entries
        clock.now_ms += int((limits.AD_LIFETIME_S + limits.CLOCK_SKEW_S) * 1000) + 1
        await trio.sleep(10)
        assert not keeper.book.entries
        nursery.cancel_scope.cancel()


def _hello(delegation: bytes, role: NodeRole = NodeRole.COORDINATOR) -> Hello:
    return Hello(PROTOCOL_VERSION, role, NET, "test", delegation)


def _delegation(network_key: NodeKey = NETWORK, until: int = NOW + 1, peer: str = COORDINATOR.peer_id) -> bytes:
    return sign_delegation(Delegation(network_id_of(network_key.public_key), peer, until), network_key)


def test_the_network_is_pinned_at_first_contact(tmp_path: Path) -> None:
    pins = Pins(DataDir.open(tmp_path))
    assert pins.network == ""
    assert pins.check_hello(_hello(_delegation()), COORDINATOR.peer_id, NOW).network == NET
    again = Pins(DataDir.open(tmp_path))
    assert again.network == NET
    with pytest.raises(SignatureError, match="delete"):
        again.check_hello(_hello(_delegation(NodeKey(b"o" * 32))), COORDINATOR.peer_id, NOW)


@pytest.mark.parametrize(
    ("hello", "sender", "error"),
    [
        (_hello(_delegation(), NodeRole.ISLAND), COORDINATOR.peer_id, RemoteProtocolError),
        (_hello(_delegation()), ISLAND.peer_id, SignatureError),
        (_hello(_delegation(until=NOW - 1)), COORDINATOR.peer_id, RemoteProtocolError),
        (_hello(b""), COORDINATOR.peer_id, SignatureError),
        (
            _hello(sign_delegation(Delegation(NET, COORDINATOR.peer_id, NOW + 1), COORDINATOR)),
            COORDINATOR.peer_id,
            SignatureError,
        ),
    ],
)
def test_who_is_no_coordinator(tmp_path: Path, hello: Hello, sender: str, error: type[Exception]) -> None:
    pins = Pins(DataDir.open(tmp_path))
    with pytest.raises(error):
        pins.check_hello(hello, sender, NOW)
    assert pins.network == "", "nothing is pinned by a liar"


def test_a_url_is_pinned_to_a_peer(tmp_path: Path) -> None:
    pins = Pins(DataDir.open(tmp_path))
    pins.check_url("http://a", COORDINATOR.peer_id)
    pins.check_url("http://a", COORDINATOR.peer_id)
    with pytest.raises(ConfigError, match="another identity"):
        Pins(DataDir.open(tmp_path)).check_url("http://a", ISLAND.peer_id)


def test_the_keeper_names_no_secret(capsys: Any) -> None:
    assert repr(ISLAND) == f"<NodeKey {ISLAND.peer_id}>"
