"""Two Coordinators on one PostgreSQL, as an operator starts them: either serves what the other has taken, and killing one loses nothing.

The counts of the bar are in test_node_coordinators_soak.py.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.datadir import DataDir
from node.localnet import LocalNetwork, LocalNode, NodeFailed
from protocol.errors import ConfigError
from protocol.prices import parse_credits
from tests.node.coordinators_net import (
    ACCOUNT,
    ECHO,
    Client,
    Kill,
    Ledgers,
    Load,
    Told,
    check_books,
    start_network,
    statement_charges,
    wait_for,
    wait_joined,
)
from tests.postgres import PostgresServer

RecordProperty = Callable[[str, object], None]
SEED = 7
SHY_REGION = "CH"
WORDS = 70  # of an answer that takes 2.8 s: long enough to be killed in it
TAKEOVER_S_MAX = 20.0  # a Coordinator is missed after 10, and looked for every 2; the machine may be busy


@dataclass
class Running:
    network: LocalNetwork
    peers: dict[str, str]  # name -> peer id, of the Coordinators
    ledgers: Ledgers
    api_key: str
    told: list[Told] = field(default_factory=list)

    def client(self, name: str, *coordinators: str) -> Client:
        """One that asks them in turn, from the first one on."""
        return Client([self.url(one) for one in coordinators], self.api_key, name, SEED, turn=-1)

    def url(self, name: str) -> str:
        return self.network.urls[sorted(self.peers).index(name)]

    def open_jobs(self, name: str, kind: str) -> list[str]:
        """Of one Coordinator, that an Island works on."""
        owner = self.peers[name]
        query = "SELECT id, kind FROM jobs WHERE owner = :owner AND kind = :kind AND state IN ('submitted', 'assigned', 'running')"
        return [row["id"] for row in self.ledgers.rows(query, owner=owner, kind=kind)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[Running]:
    url = postgres_server.new_database()
    ledgers = Ledgers(url)
    with LocalNetwork(tmp_path_factory.mktemp("coordinators")) as network:
        peers = start_network(network, url, islands=2)
        network.start_island("shy", *ECHO, "--region", SHY_REGION, coordinator=network.url)  # has heard of the first one only
        yield Running(network, peers, ledgers, network.make_key(account=ACCOUNT))
    ledgers.close()
    postgres_server.drop(url)


def test_either_serves_what_the_other_has_taken(running: Running) -> None:
    first, second = (running.url(name) for name in ("coordinator", "second"))
    both = running.client("both", *running.peers)
    running.told += [both.ask(kind) for kind in ("chat", "stream", "job", "chat")]
    owners = {row["owner"] for row in running.ledgers.rows("SELECT owner FROM jobs")}
    assert owners == set(running.peers.values()), "both give jobs to the Islands"

    with httpx.Client(headers={"Authorization": f"Bearer {running.api_key}", "Idempotency-Key": "once"}, timeout=30) as http:
        prompt = " ".join(["word"] * WORDS)
        body = {"cargo": "echo", "input": {"prompt": prompt}}
        job = http.post(f"{first}/api/v1/jobs", json=body).raise_for_status().json()
        again = http.post(f"{second}/api/v1/jobs", json=body)
        assert again.raise_for_status().json()["id"] == job["id"], "the other one knows the key"
        assert again.elapsed.total_seconds() < 1.5, "and does not make its client wait for the end"
        ended = wait_for("its end, seen from the other", lambda: _ended(http, f"{second}/api/v1/jobs/{job['id']}"))
        assert ended["state"] == "succeeded"
        assert http.get(f"{second}/api/v1/jobs/{job['id']}/output").json()["output"]["text"] == prompt
        balances = {http.get(f"{url}/api/v1/account").json()["credits"] for url in (first, second)}
        assert len(balances) == 1
    price = running.ledgers.charges(ACCOUNT)[job["id"]]
    running.told.append(Told("once", "job", job["id"], price, 1, 0.0))
    check_books(running.ledgers, running.told)


def _ended(http: httpx.Client, url: str) -> dict[str, Any] | None:
    job: dict[str, Any] = http.get(url).raise_for_status().json()
    return job if job["completed_at"] else None


def test_an_island_that_knows_one_coordinator_works_for_the_other_too(running: Running) -> None:
    shy = running.network.node("shy").wait_ready()["peer_id"]
    wait_joined(running.network.node("shy"), {running.peers["coordinator"]})
    url = running.url("second")
    wait_for("its ad at the other one", lambda: httpx.get(f"{url}/health").json()["islands"] == 3)
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello there"}], "policy": {"regions": [SHY_REGION.lower()]}}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {running.api_key}"}, timeout=30)
    assert answer.raise_for_status().headers["x-archipelag-island"] == shy
    metadata = answer.json()["metadata"]
    running.told.append(Told("shy", "chat", metadata["job_id"], parse_credits(metadata["price"]), 1, 0.0))


def test_killing_one_under_load_loses_nothing_and_bills_nothing_twice(
    running: Running, record_property: RecordProperty
) -> None:
    victim, other = "second", "coordinator"
    slow: list[Told] = []

    def ask(kind: str) -> None:
        slow.append(running.client(f"slow-{kind}", victim, other).ask(kind, WORDS))

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in ("job", "stream", "chat")]
    with Load(running.network.urls, running.api_key, SEED, clients=2) as load:
        for thread in threads:
            thread.start()
        wait_for("a job there", lambda: running.open_jobs(victim, "job"))
        wait_for("chats there", lambda: len(running.open_jobs(victim, "chat")) >= 2)
        kill = running.ledgers.kill(running.network.node(victim), running.peers[victim])
        assert set(kill.left.values()) == {True, False}, "one that can be run again, and chats"
        for thread in threads:
            thread.join()
        running.network.node(victim).restart()
    assert not load.problems and len(slow) == 3
    for name in ("island0", "island1"):
        wait_joined(running.network.node(name), set(running.peers.values()))
    running.told += load.told + slow
    check_books(running.ledgers, running.told)
    charges = statement_charges(running.url(victim), running.api_key)
    assert charges == {told.job_id: told.price for told in running.told}, "the statement says so too"
    _check_takeover(running, kill, other, record_property)


def _check_takeover(running: Running, kill: Kill, other: str, record_property: RecordProperty) -> None:
    for job_id, can_rerun in kill.left.items():
        (row,) = running.ledgers.rows("SELECT owner, state, tries, price_micros FROM jobs WHERE id = :id", id=job_id)
        assert row["owner"] == running.peers[other], "by the one that was left"
        if can_rerun:
            assert (row["state"], row["tries"]) == ("succeeded", 2)
        else:
            assert (row["state"], row["price_micros"]) == ("failed", 0), "an answer that was cut off costs nothing"
    reruns_s, releases_s = running.ledgers.takeovers_s([kill])
    record_property("takeover_s", reruns_s)
    record_property("release_s", releases_s)
    assert max(reruns_s + releases_s) < TAKEOVER_S_MAX


def test_one_that_stops_hands_over_what_has_not_begun(running: Running) -> None:
    key = running.network.make_key(account="patient")
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=30) as http:
        body = {"cargo": "echo", "input": {"prompt": "never"}, "bid_price": "0.000001"}  # waits until somebody asks as little
        job_id = http.post(f"{running.url('second')}/api/v1/jobs", json=body).raise_for_status().json()["id"]
        node = running.network.node("second")
        node.signal(signal.SIGTERM)
        assert node.process.wait(10) == 0, "it does not wait for what has not begun"

        def owner() -> bool:
            (row,) = running.ledgers.rows("SELECT owner FROM jobs WHERE id = :id", id=job_id)
            return bool(row["owner"] == running.peers["coordinator"])

        wait_for("the other has it, long before one that was killed would be missed", owner, timeout_s=8)
        cancelled = http.delete(f"{running.url('coordinator')}/api/v1/jobs/{job_id}").raise_for_status().json()
        assert (cancelled["state"], cancelled["price"]) == ("cancelled", "0")
    node.restart()
    check_books(running.ledgers, running.told)


def test_a_copy_of_a_data_folder_is_refused_and_the_original_goes_on(running: Running) -> None:
    original = running.network.node("second").data_dir
    copy = running.network.folder / "copy"
    shutil.copytree(original, copy)
    assert "runs already" in _refused(running.network, "copy")
    assert httpx.get(f"{running.url('second')}/health").json()["status"] == "ok"


def _refused(network: LocalNetwork, name: str) -> str:
    """What a Coordinator says that does not start."""
    database_url = network.nodes[0]._arguments[network.nodes[0]._arguments.index("--database-url") + 1]
    arguments = ["coordinator", "--http", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0", "--database-url", database_url]
    node = LocalNode(name, network.folder, arguments)
    network.nodes.append(node)
    with pytest.raises(NodeFailed, match="status 2") as failed:
        node.wait_ready(60)
    network.nodes.remove(node)
    assert "Traceback" not in node.log()
    return str(failed.value)


def test_a_network_without_a_shared_database_is_refused(tmp_path: Path) -> None:
    node = LocalNode("lonely", tmp_path, ["coordinator", "--network-of", str(tmp_path)])
    with pytest.raises(NodeFailed, match="--network-of needs --database-url"):
        node.wait_ready(60)


# ---- --network-of


def coordinator_folder(path: Path) -> DataDir:
    data = DataDir.open(path)
    for name in ("network", "salt", "identity"):
        data.secret(name)
    return data


def test_joining_takes_over_what_a_network_shares_and_nothing_else(tmp_path: Path) -> None:
    first, second = coordinator_folder(tmp_path / "a"), DataDir.open(tmp_path / "b")
    for _ in range(2):  # the second time it is done already
        second.join(first.path)
        assert second.secret("network") == first.secret("network") and second.secret("salt") == first.secret("salt")
        assert second.secret("identity") != first.secret("identity")
    assert {file.stat().st_mode & 0o777 for file in second.path.glob("*.key")} == {0o600}


def test_joining_needs_a_coordinators_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no network\.key"):
        DataDir.open(tmp_path / "b").join(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_another_network_does_not_join_even_in_part(tmp_path: Path) -> None:
    first, second = coordinator_folder(tmp_path / "a"), DataDir.open(tmp_path / "b")
    own = second.secret("salt")
    with pytest.raises(ConfigError, match="of another network"):
        second.join(first.path)
    assert second.secret("salt") == own and not (second.path / "network.key").exists()


def test_a_copied_identity_does_not_join(tmp_path: Path) -> None:
    first = coordinator_folder(tmp_path / "a")
    shutil.copytree(first.path, tmp_path / "b")
    with pytest.raises(ConfigError, match="an identity of its own"):
        DataDir.open(tmp_path / "b").join(first.path)
    first.join(first.path)  # its own folder is no copy
