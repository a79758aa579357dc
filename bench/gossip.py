"""Gossip: whole networks in the seeded simulator, in network time, and ten real processes on loopback, in real time.

Simulated: how long until every node knows a new price, until a dead Island has left every book, and until the two halves of a parted
network agree again, over many seeds, at 50 ms links and 5 % loss. Real: ten processes, each a host with GossipSub and a book, publish
one signed ad a second each; what arrives, how fast, and what it costs.

    python -m bench.gossip [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_least, at_most
from node.bookkeeper import BookKeeper
from node.net.gossip import Gossip
from node.net.host import open_host
from privacy.keys import NodeKey
from protocol import limits
from protocol.ads import AD_VERSION, Ad, Hardware, open_ad, read_ad, sign_ad
from protocol.book import Outcome
from protocol.prices import Ask
from tests.network.sim import Config, Simulator

PROCESSES = 10
DIALS = 4  # each process dials so many of those before it
TOPIC = "archipelag/ads/1/bench"
NETWORK = "bench"
SETTLE_S = 4.0  # meshes form within a few heartbeats of 1 s
GRACE_S = 3.0


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about 20 s when quick, two minutes otherwise."""
    result: dict[str, Any] = {
        "bench": "gossip",
        "simulated": simulated(nodes=100, seeds=6 if quick else 30),
        **({} if quick else {"simulated_1000": simulated(nodes=1000, seeds=1, coordinators=5, parted=False)}),
        "real": real(publish_s=5.0 if quick else 20.0),
        "read_ad_us": read_ad_us(),
    }
    return result | {"bars": _bars(result["simulated"], result["real"])}


def _bars(network: dict[str, Any], processes: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        at_most("gossip, 100 simulated nodes know a new price, s, worst", network["price_known_by_all_s"]["max"], 2.0),
        at_most("gossip, a dead Island has left every book, s, worst", network["dead_gone_from_all_s"]["max"], 15.0),
        at_least("gossip, delivered among 10 processes, %", processes["delivered_percent"], 100.0),
    ]


# -- simulated


def simulated(nodes: int, seeds: int, coordinators: int = 3, parted: bool = True) -> dict[str, Any]:
    """``parted`` adds the healing of a parted network, which is slow to simulate with a thousand nodes: half a million losses."""
    prices: list[float] = []
    deaths: list[float] = []
    heals: list[float] = []
    rpcs: list[float] = []
    for seed in range(seeds):
        prices += _prices(Config(nodes, seed, coordinators), rpcs)
        deaths += _deaths(Config(nodes, seed, coordinators))
        heals += [_heal(Config(nodes, seed, coordinators=2))] if parted else []
    return {
        "nodes": nodes,
        "seeds": seeds,
        "latency_ms": 50,
        "loss_percent": 5,
        "price_known_by_all_s": _spread(prices),
        "dead_gone_from_all_s": _spread(deaths),
        **({"healed_s": _spread(heals)} if heals else {}),
        "full_messages_per_node_and_ad": round(statistics.mean(rpcs), 2),
    }


def _prices(config: Config, messages: list[float], count: int = 10) -> list[float]:
    network, out = Simulator(config), []
    for price in range(1, count + 1):
        island = network.chance.choice(network.islands())
        before = network.statistics.full_messages
        network.set_price(island, price)
        out.append(network.run_until(lambda island=island, price=price: _knows(network, island.peer, price), 30))  # type: ignore[misc]
        network.run_for(network.chance.uniform(2, 4))
        messages.append((network.statistics.full_messages - before) / config.nodes)
    return out


def _knows(network: Simulator, peer: str, per_job: int) -> bool:
    entries = (node.book.entries.get(peer) for node in network.living())
    return all(entry is not None and entry.ad.default_ask.per_job == per_job for entry in entries)


def _deaths(config: Config, count: int = 3) -> list[float]:
    network, out = Simulator(config), []
    for _ in range(count):
        victim = network.chance.choice(network.islands())
        network.kill(victim)
        out.append(network.run_until(lambda peer=victim.peer: not _anywhere(network, peer), 60))  # type: ignore[misc]
        network.inject(network.chance.choice(network.living()), victim.sent[0])
        network.run_for(network.chance.uniform(3, 5))
        if _anywhere(network, victim.peer):
            raise AssertionError(f"{network!r}: stale gossip brought a dead Island back")
    return out


def _anywhere(network: Simulator, peer: str) -> bool:
    return any(peer in node.book.entries for node in network.living())


def _heal(config: Config) -> float:
    network = Simulator(config)
    network.partition(network.nodes[::2], network.nodes[1::2])
    network.run_for(20)
    network.heal()
    alive = {node.peer for node in network.islands()}
    return network.run_until(lambda: all(node.book.entries.keys() == alive for node in network.living()), 120)


# -- real


def real(publish_s: float) -> dict[str, Any]:
    """Ten processes that publish one ad a second each."""
    workers = [_spawn(number) for number in range(PROCESSES)]
    try:
        addresses = [_hear(worker)["address"] for worker in workers]
        chance = random.Random(1)
        for number, worker in enumerate(workers):
            dials = chance.sample(addresses[:number], min(DIALS, number))
            _tell(worker, {"dial": dials, "publish_s": publish_s, "phase": number / PROCESSES})
        for worker in workers:
            _hear(worker)  # it is connected
        for worker in workers:
            _tell(worker, {"go": True})
        reports = [_hear(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return _evaluate(reports, publish_s)


def _evaluate(reports: Sequence[dict[str, Any]], publish_s: float) -> dict[str, Any]:
    sent = {(report["peer"], sequence): at_ns for report in reports for sequence, at_ns in report["sent"]}
    latencies_ms = [
        (at_ns - sent[peer, sequence]) / 1e6 for report in reports for peer, sequence, at_ns in report["heard"]
    ]
    cpu = [report["cpu_s"] / report["wall_s"] * 100 for report in reports]
    return {
        "processes": PROCESSES,
        "ads_per_second_each": 1,
        "publish_s": publish_s,
        "published": len(sent),
        "delivered_percent": round(100 * len(latencies_ms) / (len(sent) * (PROCESSES - 1)), 3),
        "latency_ms": _spread(latencies_ms, digits=1),
        "cpu_percent_each": {"mean": round(statistics.mean(cpu), 2), "max": round(max(cpu), 2)},
    }


def _spawn(number: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.gossip", "--worker", str(number)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _tell(worker: subprocess.Popen[str], message: dict[str, Any]) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(message) + "\n")
    worker.stdin.flush()


def _hear(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a gossip worker ended early with {worker.wait()}")
    heard: dict[str, Any] = json.loads(line)
    return heard


async def _worker(number: int) -> None:
    key = NodeKey((1000 + number).to_bytes(32, "big"))
    keeper = BookKeeper(NETWORK)
    async with open_host(key.seed) as host, trio.open_nursery() as nursery:
        gossip = Gossip(host, TOPIC, lambda envelope: keeper.hear(envelope) is not Outcome.REFUSED)
        await nursery.start(gossip.run)
        _say({"address": host.addresses()[0]})
        plan = await _listen()
        for address in plan["dial"]:
            await host.connect(address)
        await trio.sleep(SETTLE_S)
        _say({"ready": True})
        await _listen()
        heard: list[tuple[str, int, int]] = []
        nursery.start_soon(_receive, gossip, heard)
        cpu_s, wall_s = time.process_time(), time.monotonic()
        sent = await _publish(gossip, key, plan)
        cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - wall_s
        await trio.sleep(GRACE_S)
        _say({"peer": key.peer_id, "sent": sent, "heard": heard, "cpu_s": cpu_s, "wall_s": wall_s})
        await _listen()  # until the parent is done with all


async def _publish(gossip: Gossip, key: NodeKey, plan: dict[str, Any]) -> list[tuple[int, int]]:
    sent: list[tuple[int, int]] = []
    await trio.sleep(plan["phase"])
    boot = time.time_ns() // 1_000_000
    for _ in range(int(plan["publish_s"])):
        next_s = trio.current_time() + 1.0
        sequence = time.time_ns() // 1_000_000
        envelope = sign_ad(_ad(key.peer_id, boot, sequence), key)
        sent.append((sequence, time.time_ns()))
        await gossip.publish(envelope)
        await trio.sleep_until(next_s)
    return sent


async def _receive(gossip: Gossip, heard: list[tuple[str, int, int]]) -> None:
    async for _, envelope in gossip.received:
        at_ns = time.time_ns()
        ad = open_ad(envelope)
        heard.append((ad.peer, ad.sequence, at_ns))


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _listen() -> dict[str, Any]:
    """One line from the parent; when the parent is gone this process ends at once."""
    line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    if not line:
        os._exit(1)
    message: dict[str, Any] = json.loads(line)
    return message


# -- one ad


def read_ad_us() -> float:
    """What it costs to believe an ad: signature, decoding and checks, in microseconds."""
    key = NodeKey(bytes(32))
    now_ms = time.time_ns() // 1_000_000
    envelope = sign_ad(_ad(key.peer_id, now_ms, now_ms), key)
    rounds = []
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(200):
            read_ad(envelope, now_ms)
        rounds.append((time.perf_counter() - start_s) / 200 * 1e6)
    return round(statistics.median(rounds), 1)


def _ad(peer: str, boot: int, sequence: int) -> Ad:
    return Ad(
        version=AD_VERSION,
        network=NETWORK,
        peer=peer,
        boot=boot,
        sequence=sequence,
        expires_at_ms=sequence + int(limits.AD_LIFETIME_S * 1000),
        agent="bench",
        addresses=("/ip4/127.0.0.1/tcp/4001",),
        region="EU",
        hardware=Hardware(8, 2**34, 2**38),
        runtimes=("echo", "gguf"),
        memory_offered_bytes=2**33,
        default_ask=Ask(per_job=1000),
        offers=(),
    )


def _spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], digits),
        "max": round(ordered[-1], digits),
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'gossip':44} {'median':>8} {'p99':>8} {'max':>8}"]
    for name, group in results.items():
        for figure, spread in group.items() if isinstance(group, dict) else ():
            if isinstance(spread, dict) and "median" in spread:
                lines.append(f"{name + ' ' + figure:44} {spread['median']:8} {spread['p99']:8} {spread['max']:8}")
    made = results["real"]
    lines.append(f"real delivered {made['delivered_percent']} %, CPU {made['cpu_percent_each']['mean']} % a process")
    lines.append(f"reading an ad takes {results['read_ad_us']} µs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and a shorter run")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        trio.run(_worker, arguments.worker)
        return
    results = run(arguments.quick)
    print(table(results))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
