"""Two Coordinators on one PostgreSQL, one of them killed every 20 seconds for five minutes under load; the figures go to bench/results/."""

from __future__ import annotations

import json
import random
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from node.localnet import LocalNetwork
from tests.node.coordinators_net import ACCOUNT, Kill, Ledgers, Load, check_books, start_network, statement_charges
from tests.postgres import PostgresServer

SECONDS = 300.0
KILL_EVERY_S = 20.0
RESTARTS_S = (0.0, 14.0)  # at once: jobs come back by the new run; after DEAD_S: only the other Coordinator can have taken them
FROZEN_S = 16.0  # longer than DEAD_S and a beat
FREEZES = 6
CLIENTS = 6
ISLANDS = 3
SEED = 20261125
RESULTS = Path(__file__).parents[2] / "bench" / "results"


def kill_in_turn(network: LocalNetwork, ledgers: Ledgers, peers: dict[str, str], seconds: float, rng: random.Random) -> list[Kill]:
    """Each time another moment, victim and pause before it is started again."""
    kills: list[Kill] = []
    started_s = time.monotonic()
    for number in range(1, int(seconds / KILL_EVERY_S) + 1):
        _sleep_until(started_s + number * KILL_EVERY_S - rng.uniform(0.0, 2.0))
        node = network.node(rng.choice(sorted(peers)))
        kills.append(ledgers.kill(node, peers[node.name]))
        time.sleep(RESTARTS_S[number % 2])
        node.restart()
    _sleep_until(started_s + seconds)
    return kills


def freeze_in_turn(network: LocalNetwork, ledgers: Ledgers, peers: dict[str, str], times: int, rng: random.Random) -> list[Kill]:
    """Each is held up until the others believe it dead, and then goes on where it stood, in the middle of whatever it was doing."""
    frozen: list[Kill] = []
    for _ in range(times):
        time.sleep(rng.uniform(2.0, 4.0))
        node = network.node(rng.choice(sorted(peers)))
        frozen.append(ledgers.freeze(node, peers[node.name]))
        time.sleep(FROZEN_S)
        node.signal(signal.SIGCONT)
    return frozen


def _sleep_until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.monotonic()))


def summary(load: Load, kills: Sequence[Kill], ledgers: Ledgers) -> dict[str, object]:
    reruns_s, releases_s = ledgers.takeovers_s(kills)
    return {
        "kills": len(kills),
        "requests": len(load.told),
        "by_kind": {kind: sum(told.kind == kind for told in load.told) for kind in ("chat", "stream", "job")},
        "answered_at_the_first_try": sum(told.tries == 1 for told in load.told),
        "slowest_answer_s": round(max(told.seconds for told in load.told), 1),
        "charged_micros": sum(told.price for told in load.told),
        "jobs_taken_over": len(reruns_s),
        "takeover_s_median": statistics.median(reruns_s) if reruns_s else None,
        "takeover_s_max": max(reruns_s, default=None),
        "holds_released": len(releases_s),
        "release_s_median": statistics.median(releases_s) if releases_s else None,
        "release_s_max": max(releases_s, default=None),
    }


@pytest.mark.soak
def test_coordinators_that_are_killed_lose_nothing_and_bill_nothing_twice(tmp_path: Path, postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    ledgers = Ledgers(url)
    with LocalNetwork(tmp_path) as network:
        peers = start_network(network, url, ISLANDS)
        api_key = network.make_key(account=ACCOUNT)
        with Load(network.urls, api_key, SEED, CLIENTS) as load:
            kills = kill_in_turn(network, ledgers, peers, SECONDS, random.Random(SEED))
        assert not load.problems
        check_books(ledgers, load.told)
        assert statement_charges(network.urls[1], api_key) == {told.job_id: told.price for told in load.told}
        result = summary(load, kills, ledgers)
    ledgers.close()
    postgres_server.drop(url)
    print(json.dumps(result))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"soak-coordinators-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(result, indent=1))
    assert len(kills) == int(SECONDS / KILL_EVERY_S)
    assert result["jobs_taken_over"], "kills hit jobs"


@pytest.mark.soak
def test_coordinators_that_were_believed_dead_bill_nothing_twice(tmp_path: Path, postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    ledgers = Ledgers(url)
    with LocalNetwork(tmp_path) as network:
        peers = start_network(network, url, ISLANDS)
        api_key = network.make_key(account=ACCOUNT)
        with Load(network.urls, api_key, SEED, CLIENTS) as load:
            frozen = freeze_in_turn(network, ledgers, peers, FREEZES, random.Random(SEED))
        assert not load.problems
        check_books(ledgers, load.told)
        result = summary(load, frozen, ledgers)
    ledgers.close()
    postgres_server.drop(url)
    print(json.dumps(result))
    assert any(kill.left for kill in frozen), "jobs were open there"
