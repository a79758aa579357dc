"""A name moves from release to release with real processes: an Island that was given the name follows, one that was given a release does
not, and nobody but a Coordinator moves it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio

from coordinator.books.books import Books
from coordinator.registry import Registry
from node.bookkeeper import now_ms
from node.cli import main
from node.control import ask_node
from node.database import open_books
from node.datadir import DataDir
from node.greeting import exchange_hello
from node.jobs_served import island_hello
from node.localnet import LocalNetwork, LocalNode
from node.net.host import open_host
from node.notice_store import NEWS_FOLDER
from privacy.keys import NodeKey
from protocol import limits
from protocol.cargo_news import CARGOS, CARGOS_PROTOCOL, NOTICE, About, CargoNews, CargosKnown, CargosWanted, Notice
from protocol.cargo_promotions import PROMOTION_VERSION, Promotion, SignedPromotion, sign_promotion
from protocol.tickets import Delegation, network_id_of, sign_delegation
from runtimes.wasm import modules
from tests.node.coordinators_net import wait_for

FOLLOWED_S_MAX = 10.0  # it takes a second, most of it the Coordinator's look at its database
NAME = "moving"
MODULES = {"1.0.0": "sha256", "2.0.0": "slug", "3.0.0": "uuid"}
TOML = """
name = "{name}"
release = "{release}"
runtime = "wasm"
entry = "module.wasm"
licence = "Apache-2.0"
ask = "0.002"
description = "release {release}"

[files."module.wasm"]

[needs]
memory_mb = 256
time_s = 60
"""


@dataclass
class Published:
    """Releases of one name, by their publisher."""

    network: LocalNetwork
    folder: Path
    api_key: str
    addresses: dict[str, str] = field(default_factory=dict)

    def pack(self, release: str, name: str = NAME) -> Path:
        home = self.folder / f"{name}-{release}"
        home.mkdir()
        (home / "cargo.toml").write_text(TOML.format(name=name, release=release))
        (home / "module.wasm").write_bytes(modules.load(MODULES[release]).wasm)
        for action in ("build", "sign"):
            assert main(["cargo", action, str(home), "--data-dir", str(self.folder / "publisher")]) == 0
        return home / f"{name}-{release}.cargo"

    def publish(self, file: Path, *more: str) -> dict[str, Any]:
        at = ["--coordinator", self.network.url, "--api-key", self.api_key]
        assert main(["cargo", "publish", str(file), *more, *at]) == 0
        shown = self.shown(f"{NAME}@{file.stem.rpartition('-')[2]}")
        self.addresses[shown["release"]] = shown["address"]
        return shown

    def shown(self, reference: str) -> dict[str, Any]:
        return dict(httpx.get(f"{self.network.url}/api/v1/cargos/{reference}").json())


def coordinator_keys(network: LocalNetwork) -> tuple[NodeKey, NodeKey]:
    data = DataDir.open(network.node("coordinator").data_dir)
    return data.key("identity"), data.key("network")


def proof(key: NodeKey, network_key: NodeKey) -> bytes:
    network, until_ms = network_id_of(network_key.public_key), now_ms() + int(limits.DELEGATION_LIFETIME_S * 1000)
    return sign_delegation(Delegation(network, key.peer_id, until_ms), network_key)


def promote(network: LocalNetwork, name: str, address: str, origin: str) -> SignedPromotion:
    """As a Coordinator of the same database does it."""
    key, network_key = coordinator_keys(network)
    registry = Registry(
        cast(Books, None),
        now_ms,
        sign=lambda promotion: sign_promotion(promotion, key),
        delegation=lambda: proof(key, network_key),
        network=network_id_of(network_key.public_key),
    )
    with open_books(str(network.node("coordinator").data_dir), None) as database, database.writing() as connection:
        return registry.promote_within(connection, name, address, origin)


def status(island: LocalNode) -> dict[str, Any]:
    return dict(ask_node(str(island.data_dir), "status"))


def serves(island: LocalNode) -> list[str]:
    return [one["content_hash"] for one in status(island)["cargos"]]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("promoted")) as network:
        network.start_coordinator()
        yield network


@pytest.fixture
def its(network: LocalNetwork, tmp_path: Path) -> Published:
    return Published(network, tmp_path, network.make_key("read", "write", account="pub"))


def kind(client: httpx.Client, cargo: str) -> str:
    """Which of MODULES has answered a job; both take the same input."""
    given = {"text": f"Hello World {time.monotonic_ns()}"}  # no answer from the cache
    answer = client.post("/api/v1/jobs", json={"cargo": cargo, "input": given, "stream": True})
    assert answer.status_code == 200, answer.text
    events = [block.partition("\n")[2].removeprefix("data: ") for block in answer.text.split("\n\n") if block]
    assert json.loads(events[-1])["state"] == "succeeded", answer.text
    return "sha256" if "sha256" in json.loads(events[-2])["result"] else "slug"


@dataclass
class Asker:
    """Asks one job after the other by a name, from ``asking`` to its end; none may fail."""

    client: httpx.Client
    cargo: str
    kinds: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._ask)
            try:
                yield
            finally:
                self._stop.set()
            asked.result()

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.kinds.append(kind(self.client, self.cargo))


def say(to: str, notices: list[Notice]) -> None:
    """As a stranger on a stream of its own."""

    async def speak() -> None:
        async with open_host(bytes([77]) * 32) as host:
            await host.connect(to)
            stream = await host.open(to.rpartition("/")[2], CARGOS_PROTOCOL, CARGOS)
            try:
                await exchange_hello(stream, hello)
                await stream.send(CargoNews(tuple(notices)))
                await stream.send(CargosWanted(About.REVOCATION))
                while not isinstance(await stream.receive(), CargosKnown):  # so all that was sent before has been heard
                    pass
            finally:
                stream.abort()

    hello = island_hello("", "test")
    trio.run(speak)


def kept(island: LocalNode) -> list[Notice]:
    """The promotions on a node's disk."""
    return [NOTICE.decode(file.read_bytes()) for file in (island.data_dir / NEWS_FOLDER).glob("*.promoted")]


def forgeries(old: Notice, address: str, network: str) -> list[Notice]:
    """By somebody who has made a network, by somebody with a Coordinator's delegation and no key of it, and what was said before."""
    stranger = NodeKey(bytes([78]) * 32)
    said = Promotion(PROMOTION_VERSION, network, NAME, address, "1.0.0", limits.PROMOTION_SERIAL_MAX, now_ms(), "forged")
    envelope = sign_promotion(said, stranger)
    own = sign_delegation(Delegation(network_id_of(stranger.public_key), stranger.peer_id, now_ms() + 60_000), stranger)
    return [Notice(About.PROMOTION, envelope, b"", own), Notice(About.PROMOTION, envelope, b"", old.delegation), old]


def heard(island: LocalNode, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What an Island says of the network's Cargos."""
    capsys.readouterr()
    assert main(["cargo", "list", "--json", "--data-dir", str(island.data_dir)]) == 0
    return list(json.loads(capsys.readouterr().out))


def test_a_name_moves_and_islands_follow(
    network: LocalNetwork, client: httpx.Client, its: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 20 s: seven nodes start, each with a worker."""

    def start(name: str, cargo: str) -> LocalNode:
        return network.start_island(name, "--cargo", cargo, "--cache-dir", str(tmp_path / name))

    files = {release: its.pack(release) for release in MODULES}
    assert its.publish(files["1.0.0"])["current"]
    first, second = start("first", str(files["1.0.0"])), start("second", str(files["2.0.0"]))
    follower = start("follower", NAME)
    facts = follower.wait_ready()
    assert facts["cargos"] == [NAME] and serves(follower) == [its.addresses["1.0.0"]]

    assert not its.publish(files["2.0.0"], "--candidate")["current"]
    tester = start("tester", f"{NAME}@2.0.0")
    for island in (first, second, tester):
        island.wait_ready()
    wait_for("the follower hears what its name stands for", lambda: len(kept(follower)) == 1)
    assert kind(client, NAME) == "sha256" and serves(follower) == [its.addresses["1.0.0"]]
    (old,) = kept(follower)

    first.stop()
    asker = Asker(client, NAME)
    with asker.asking():
        wait_for("jobs run", lambda: bool(asker.kinds))
        signed = promote(network, NAME, its.addresses["2.0.0"], "ab:one")
        wait_for("the Island follows", lambda: serves(follower) == [its.addresses["2.0.0"]], FOLLOWED_S_MAX)
        wait_for("jobs follow", lambda: asker.kinds[-1] == "slug", FOLLOWED_S_MAX)
    assert asker.kinds == sorted(asker.kinds), "no answer of the old release behind one of the new"
    assert its.shown(NAME)["release"] == "2.0.0" and its.shown(f"{NAME}@2.0.0")["current"] and not its.shown(f"{NAME}@1.0.0")["current"]

    assert {one["release"]: one["current"] for one in heard(follower, capsys)} == {"1.0.0": False, "2.0.0": True}

    before = status(follower)["news"]
    say(facts["addresses"][0], forgeries(old, its.addresses["1.0.0"], signed.promotion.network))
    after = status(follower)["news"]
    assert after["refused"] == before["refused"] + 2 and after["known"] > before["known"] and after["new"] == before["new"]
    assert [notice.envelope for notice in kept(follower)] == [signed.envelope]
    follower.stop()
    follower.restart()
    assert serves(follower) == [its.addresses["2.0.0"]] and kind(client, NAME) == "slug"

    with Asker(client, NAME).asking():
        promote(network, NAME, its.addresses["1.0.0"], "rollback:one")
        wait_for("the Island goes back", lambda: serves(follower) == [its.addresses["1.0.0"]], FOLLOWED_S_MAX)
    assert kind(client, NAME) == "sha256" and serves(tester) == [its.addresses["2.0.0"]]

    assert its.publish(files["3.0.0"])["current"], "published plainly: the name moves"
    wait_for("nobody has its files", lambda: "trying again" in follower.log(), FOLLOWED_S_MAX)
    assert serves(follower) == [its.addresses["1.0.0"]] and kind(client, NAME) == "sha256", "it goes on with what it has"
    start("third", str(files["3.0.0"])).wait_ready()
    wait_for("the Island follows once it can", lambda: serves(follower) == [its.addresses["3.0.0"]], FOLLOWED_S_MAX)
