"""The health of a whole network, from seeds: news spreads, the dead leave and stay away, and what was parted comes together again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol import limits
from protocol.ads import Lost, sign_ad, sign_lost
from tests.network import sim
from tests.network.sim import Config, Node, Simulator

PRICE_LIMIT_S = 2.0  # "100 simulated nodes know a new price within 2 s of network time at 50 ms links and 5 % loss"
DEAD_LIMIT_S = 15.0  # "a dead Island leaves the book within 15 s and is not brought back by stale gossip"


def price_known(network: Simulator, island: Node, per_job: int) -> Callable[[], bool]:
    def known() -> bool:
        entries = (node.book.entries.get(island.peer) for node in network.living())
        return all(entry is not None and entry.ad.default_ask.per_job == per_job for entry in entries)

    return known


def gone(network: Simulator, peer: str) -> Callable[[], bool]:
    return lambda: not any(peer in node.book.entries for node in network.living())


def all_know_all(network: Simulator) -> Callable[[], bool]:
    def agreed() -> bool:
        alive = {node.peer for node in network.islands()}
        return all(node.book.entries.keys() == alive for node in network.living())

    return agreed


def test_a_seed_is_a_run() -> None:
    def run(seed: int) -> object:
        network = Simulator(Config(40, seed))
        network.set_price(network.islands()[3], 5)
        network.kill(network.islands()[7])
        network.run_for(12)
        return network.statistics, [sorted(node.neighbours) for node in network.nodes]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("seed", range(3))
def test_meshes_keep_their_size(seed: int) -> None:
    network = Simulator(Config(100, seed))
    for _ in range(30):
        network.run_for(1)
        for node in network.living():
            assert sim.MESH_LOW <= len(node.gossip.mesh) <= sim.MESH_HIGH
            assert node.gossip.mesh <= node.neighbours


@pytest.mark.parametrize("seed", range(10))
def test_a_new_price_is_known_everywhere_within_two_seconds(seed: int) -> None:
    network = Simulator(Config(100, seed))
    for price in range(1, 9):
        island = network.chance.choice(network.islands())
        network.set_price(island, price)
        assert network.run_until(price_known(network, island, price), 10) <= PRICE_LIMIT_S
        network.run_for(network.chance.uniform(0, 2))


def test_a_price_spreads_though_everybody_changes_theirs() -> None:
    network = Simulator(Config(100, 77))
    for number, island in enumerate(network.islands()):
        network.at(network.chance.uniform(0, 1), network.set_price, island, 1000 + number)
    network.run_for(1)
    for number, island in enumerate(network.islands()):
        assert network.run_until(price_known(network, island, 1000 + number), PRICE_LIMIT_S) <= PRICE_LIMIT_S


def test_the_model_can_fail() -> None:
    """With half of all packets lost and nothing that repairs, many never hear; either remedy helps, and both together bring it to all."""

    def missing(repair: bool, catchup: bool) -> int:
        unaware = 0
        for seed in range(5):
            network = Simulator(Config(60, seed, loss=0.5, repair=repair, catchup=catchup))
            island = network.islands()[0]
            network.set_price(island, 9)
            network.run_for(30)
            unaware += sum(node.book.entries[island.peer].ad.default_ask.per_job != 9 for node in network.living())
        return unaware

    untreated = missing(repair=False, catchup=False)
    assert untreated > 20
    assert 0 < missing(repair=True, catchup=False) < untreated / 5
    assert 0 < missing(repair=False, catchup=True) < untreated / 5
    assert missing(repair=True, catchup=True) == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_dead_island_leaves_every_book(seed: int) -> None:
    network = Simulator(Config(100, seed))
    network.run_for(network.chance.uniform(0, 5))
    victim = network.chance.choice(network.islands())
    network.kill(victim)
    assert network.run_until(gone(network, victim.peer), 60) <= DEAD_LIMIT_S


@pytest.mark.parametrize("seed", range(3))
def test_many_die_at_once(seed: int) -> None:
    network = Simulator(Config(100, seed))
    victims = network.chance.sample(network.islands(), 30)
    for victim in victims:
        network.kill(victim)
    assert network.run_until(all_know_all(network), 60) <= DEAD_LIMIT_S


@pytest.mark.parametrize("seed", range(3))
def test_stale_gossip_brings_nobody_back(seed: int) -> None:
    """Everything that the dead Island ever signed is replayed at random nodes until well after it has expired and been forgotten."""
    network = Simulator(Config(40, seed))
    victim = network.islands()[5]
    for price in range(5):
        network.set_price(victim, price)
        network.run_for(1)
    network.kill(victim)
    assert network.run_until(gone(network, victim.peer), 60) <= DEAD_LIMIT_S
    chance = random.Random(seed)
    assert len(victim.sent) >= 6
    for _ in range(550):
        node = chance.choice(network.living())
        network.inject(node, chance.choice(victim.sent))
        assert victim.peer not in node.book.entries
        network.run_for(1)
        assert gone(network, victim.peer)()
    assert all(not node.book.tombstones for node in network.living()), "the graves are forgotten in the end"


def test_replayed_gossip_is_not_passed_on() -> None:
    """What changes no book goes no further, so an old envelope costs one packet and not a flood."""
    network = Simulator(Config(60, 4, catchup=False))
    island = network.islands()[0]
    network.set_price(island, 1)
    network.run_for(limits.GOSSIP_SEEN_S + 2)  # nobody remembers the message id
    network.set_price(island, 2)
    network.run_for(3)
    before = network.statistics.full_messages
    for node in network.living():
        network.inject(node, island.sent[1])
    network.run_for(3)
    assert network.statistics.full_messages == before + len(network.living())


def test_a_newcomer_is_told_of_the_dead_before_it_can_be_lied_to() -> None:
    network = Simulator(Config(40, 3))
    victim = network.islands()[5]
    network.kill(victim)
    network.run_until(gone(network, victim.peer), 60)
    network.run_for(10)  # gossip has long stopped to repeat it
    newcomer = network.join()
    network.run_for(1)
    network.inject(newcomer, victim.sent[0])
    assert victim.peer not in newcomer.book.entries


def test_a_newcomer_that_was_lied_to_is_set_right() -> None:
    """Without catching up at once it believes the replayed ad, which is genuine; the next comparison of books corrects it."""
    network = Simulator(Config(40, 3))
    victim = network.islands()[5]
    network.kill(victim)
    network.run_until(gone(network, victim.peer), 60)
    network.run_for(10)  # gossip has long stopped to repeat it
    newcomer = network.join(catch_up=False)
    network.inject(newcomer, victim.sent[0])
    assert victim.peer in newcomer.book.entries, "it cannot know better yet"
    assert network.run_until(gone(network, victim.peer), 60) <= 2 * 1.2 * limits.CATCHUP_INTERVAL_S


@pytest.mark.parametrize("seed", range(3))
def test_an_island_that_is_called_dead_by_mistake_speaks_up(seed: int) -> None:
    network = Simulator(Config(60, seed))
    coordinator, island = network.nodes[0], network.islands()[8]
    network._notify_loss(coordinator, island.peer)
    assert island.peer not in coordinator.book.entries
    network.run_for(0.1)
    assert network.run_until(all_know_all(network), 10) <= 2 * PRICE_LIMIT_S


@pytest.mark.parametrize("seed", range(3))
def test_partition_and_heal(seed: int) -> None:
    """Each side has one Coordinator. Each side forgets the other within the limit, and both agree again soon after the wire is back."""
    network = Simulator(Config(60, seed, coordinators=2))
    left, right = network.nodes[::2], network.nodes[1::2]
    network.partition(left, right)
    network.run_for(DEAD_LIMIT_S)
    for side in (left, right):
        ours = {node.peer for node in side if not node.coordinator}
        assert all(node.book.entries.keys() == ours for node in side)
    lonely = next(node for node in left if not node.coordinator)
    network.set_price(lonely, 42)
    network.run_for(30)
    network.heal()
    assert network.run_until(all_know_all(network), 60) <= DEAD_LIMIT_S
    assert price_known(network, lonely, 42)()


def test_a_short_cut_is_not_a_death() -> None:
    """A wire that is back before the keepalive's patience ends costs nobody its place."""
    network = Simulator(Config(60, 1, coordinators=2))
    network.partition(network.nodes[::2], network.nodes[1::2])
    network.run_for(limits.KEEPALIVE_TIMEOUT_S - 0.1)
    network.heal()
    network.run_for(20)
    assert all_know_all(network)() and not any(node.book.tombstones for node in network.nodes)


@pytest.mark.parametrize("seed", range(2))
def test_churn(seed: int) -> None:
    """Each second one dies and one comes, for two minutes: no book keeps a dead Island past the limit, none misses an old one."""
    network = Simulator(Config(60, seed))
    died_s: dict[str, float] = {}
    came_s: dict[str, float] = {node.peer: -100.0 for node in network.islands()}
    for _ in range(120):
        victim = network.chance.choice(network.islands())
        died_s[victim.peer] = network.now_s
        network.kill(victim)
        came_s[network.join().peer] = network.now_s
        network.run_for(1)
        long_dead = {peer for peer, at_s in died_s.items() if network.now_s - at_s > DEAD_LIMIT_S}
        settled = {node.peer for node in network.islands() if network.now_s - came_s[node.peer] > 3 * PRICE_LIMIT_S}
        for node in network.living():
            assert not long_dead & node.book.entries.keys()
            if network.now_s - came_s.get(node.peer, -100.0) > 3 * PRICE_LIMIT_S:
                assert settled <= node.book.entries.keys()
    assert network.run_until(all_know_all(network), 60) <= DEAD_LIMIT_S


def test_a_network_that_starts_from_nothing() -> None:
    network = Simulator(Config(60, 2), warm=False)
    assert network.run_until(all_know_all(network), 60) <= 10


def test_coordinators_that_die_are_replaced_by_the_others() -> None:
    network = Simulator(Config(60, 6, coordinators=4))
    network.kill(network.nodes[0])
    network.kill(network.nodes[1])
    network.run_for(15)
    victim = network.islands()[10]
    network.kill(victim)
    assert network.run_until(gone(network, victim.peer), 60) <= DEAD_LIMIT_S


def test_without_any_coordinator_the_dead_leave_when_their_ads_expire() -> None:
    network = Simulator(Config(20, 6, coordinators=1))
    network.kill(network.nodes[0])
    victim = network.islands()[3]
    network.kill(victim)
    limit_s = limits.AD_LIFETIME_S + limits.CLOCK_SKEW_S + 2 * network.config.clock_skew_s + 5
    network.run_for(limits.AD_LIFETIME_S - 2 * network.config.clock_skew_s - limits.AD_REFRESH_S)
    assert not gone(network, victim.peer)()
    assert network.run_until(all_know_all(network), limit_s) <= limit_s


@pytest.mark.parametrize("seed", range(3))
def test_clocks_that_differ_by_most_of_a_minute(seed: int) -> None:
    network = Simulator(Config(60, seed, clock_skew_s=limits.CLOCK_SKEW_S / 2 - 1))
    island, victim = network.islands()[0], network.islands()[1]
    network.set_price(island, 3)
    assert network.run_until(price_known(network, island, 3), 10) <= PRICE_LIMIT_S
    network.kill(victim)
    assert network.run_until(gone(network, victim.peer), 60) <= DEAD_LIMIT_S
    for _ in range(200):
        network.inject(network.chance.choice(network.living()), victim.sent[0])
        network.run_for(2)
        assert gone(network, victim.peer)()
    assert network.statistics.refused == 0 or all_know_all(network)()


def test_forgeries_go_nowhere() -> None:
    """Each is refused by the node that gets it, which passes nothing on."""
    network = Simulator(Config(40, 9, catchup=False))
    island, liar, coordinator = network.islands()[0], network.islands()[1], network.nodes[0]
    ad = network._ad(island)
    ahead_ms = ad.sequence + int(limits.CLOCK_SKEW_S * 1000) + 30_000
    lost = Lost(sim.NETWORK, island.peer, island.sequence, network.clock_ms(coordinator))
    signed = sign_ad(replace(ad, sequence=ad.sequence + 1), island.key)
    forgeries = [
        b"",
        b"\x00" * 300,
        signed[:-1],
        signed[:-1] + bytes([signed[-1] ^ 1]),
        sign_ad(replace(ad, sequence=ad.sequence + 1), liar.key),
        sign_ad(replace(ad, sequence=ahead_ms, expires_at_ms=ahead_ms + 1000), island.key),
        sign_ad(replace(ad, sequence=ad.sequence + 1, network="elsewhere"), island.key),
        sign_lost(lost, liar.key),
        sign_lost(replace(lost, network="elsewhere"), coordinator.key),
    ]
    before = network.statistics.full_messages
    for node in network.living():
        for forgery in forgeries:
            network.inject(node, forgery)
    network.run_for(2)
    assert network.statistics.refused == len(forgeries) * len(network.living())
    assert network.statistics.full_messages == before + network.statistics.refused
    assert all_know_all(network)()
    network.inject(network.living()[0], signed)
    network.run_for(2)
    assert all(node.book.entries[island.peer].ad.sequence == ad.sequence + 1 for node in network.living())


def test_every_distinct_envelope_is_really_verified() -> None:
    network = Simulator(Config(30, 1))
    for price in range(10):
        network.set_price(network.islands()[price], price)
    network.run_for(3)
    assert network.statistics.signatures == 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_a_thousand_nodes(seed: int) -> None:
    network = Simulator(Config(1000, seed, coordinators=5))
    for price in range(1, 6):
        island = network.chance.choice(network.islands())
        network.set_price(island, price)
        assert network.run_until(price_known(network, island, price), 10) <= PRICE_LIMIT_S
    victims = network.chance.sample(network.islands(), 20)
    for victim in victims:
        network.kill(victim)
    assert network.run_until(lambda: all(gone(network, v.peer)() for v in victims), 60) <= DEAD_LIMIT_S
    for victim in victims:
        network.inject(network.chance.choice(network.living()), victim.sent[0])
    network.run_for(10)
    assert all_know_all(network)()
