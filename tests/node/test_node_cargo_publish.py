"""`archipelag-node cargo publish | revoke | list | review | level` against real Coordinators and Islands, each a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.cli import EXIT_CONFIG, main
from node.control import ask_node
from node.datadir import DataDir
from node.localnet import LocalNetwork, LocalNode
from protocol.cargos import SignedCargo, sign_cargo
from tests.node.coordinators_net import wait_for
from tests.protocol.cargo_samples import cargo

KILL_S_MAX = 5.0  # mission: 15; it takes about one, and the machine may be busy
ECHO = ("--cargo", "echo")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path_factory.mktemp("publish")) as network:
        network.start_coordinator()
        for name in ("one", "two"):
            network.start_island(name, *ECHO)
        for name in ("one", "two"):
            network.node(name).wait_ready()
        yield network


@pytest.fixture
def publisher(tmp_path: Path) -> Path:
    """A data folder with a publisher's key."""
    DataDir.open(tmp_path / "pub").key("publisher")
    return tmp_path / "pub"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``cargo …``, which has to end with this status; what it said."""

    def call(*arguments: str, status: int = 0) -> str:
        assert main(["cargo", *arguments]) == status, capsys.readouterr()
        said = capsys.readouterr()
        return said.err if status else said.out

    return call


def signed(folder: Path, name: str, release: str = "1.0.0") -> tuple[Path, SignedCargo]:
    """A .cargo file of this publisher's."""
    key = DataDir.open(folder).key("publisher")
    one = cargo(name, release, key)
    file = folder / f"{name}-{release}.cargo"
    file.write_bytes(sign_cargo(one.manifest, key))
    return file, one


def news(node: LocalNode) -> dict[str, Any]:
    return dict(ask_node(str(node.data_dir), "status")["news"])


def listed(run: Run, *where: str) -> list[str]:
    return [one["address"] for one in json.loads(run("list", "--json", *where))]


def knows(run: Run, node: LocalNode, one: SignedCargo) -> bool:
    return one.address in listed(run, "--data-dir", str(node.data_dir))


def test_published_heard_by_all_and_killed_within_seconds(network: LocalNetwork, publisher: Path, run: Run) -> None:
    file, one = signed(publisher, "killed")
    at = ("--coordinator", network.url, "--api-key", network.make_key("read", "write", account="ann"))
    said = run("publish", str(file), *at)
    assert "is published" in said and one.address in said and "Next: " in said
    islands = [network.node(name) for name in ("one", "two")]
    for island in islands:
        wait_for(f"{island.name} hears of it", partial(knows, run, island, one))
    assert one.address in listed(run, "--coordinator", network.url) and listed(run, "--coordinator", network.url, "--runtime", "gguf") == []
    assert "killed" in run("list", "--coordinator", network.url)

    started_s = time.monotonic()
    data_dir = str(network.node("coordinator").data_dir)
    said = run("revoke", "killed@1.0.0", "--as-operator", "--data-dir", data_dir, "--reason", "it leaks")
    assert f"revoked {one.address}" in said
    for island in islands:
        wait_for(f"{island.name} hears of the end", lambda: news(island)["revocations"] == 1, KILL_S_MAX)  # noqa: B023 (it is called at once)
    assert time.monotonic() - started_s < KILL_S_MAX
    for island in islands:
        assert one.address not in listed(run, "--data-dir", str(island.data_dir))
        assert "was revoked by the network: it leaks" in island.log()
    wait_for("the registry says so", lambda: one.address not in listed(run, "--coordinator", network.url))
    assert "cargo_revoked" in run("publish", str(file), *at, status=EXIT_CONFIG)


def test_an_island_that_was_away_hears_of_it_when_it_comes_back(network: LocalNetwork, publisher: Path, run: Run) -> None:
    file, one = signed(publisher, "slept-through")
    at = ("--coordinator", network.url, "--api-key", network.make_key("read", "write", account="bob"))
    run("publish", str(file), *at)
    island = network.node("two")
    wait_for("it hears of it", partial(knows, run, island, one))
    island.kill()
    assert one.address in listed(run, "--data-dir", str(island.data_dir)), "it was killed and knows it still"
    assert f"revoked {one.address}" in run("revoke", "slept-through@1.0.0", *at, "--data-dir", str(publisher), "--reason", "sorry")
    before = news(network.node("one"))
    island.start_again()
    island.wait_ready()
    wait_for("it hears of the end", lambda: not knows(run, island, one), KILL_S_MAX)
    wait_for("it knows as much as the other", lambda: news(island)["revocations"] == news(network.node("one"))["revocations"])
    assert before["refused"] == 0
    island.kill()
    island.start_again()
    island.wait_ready()
    assert one.address not in listed(run, "--data-dir", str(island.data_dir)), "and has not forgotten it"


def test_a_whole_key_is_revoked(network: LocalNetwork, publisher: Path, run: Run) -> None:
    key = DataDir.open(publisher).key("publisher")
    at = ("--coordinator", network.url, "--api-key", network.make_key("read", "write", account="cid"))
    cargos = [signed(publisher, name) for name in ("lost-a", "lost-b")]
    for file, _ in cargos:
        run("publish", str(file), *at)
    said = run("revoke", "--key", key.peer_id, *at, "--data-dir", str(publisher))
    assert all(f"revoked {one.address}" in said for _, one in cargos)
    assert "its key was revoked" in run("publish", str(signed(publisher, "lost-c")[0]), *at, status=EXIT_CONFIG)
    data_dir = str(network.node("coordinator").data_dir)
    other = DataDir.open(publisher.parent / "other").key("publisher").peer_id
    assert "nothing that is published" in run("revoke", "--key", other, "--as-operator", "--data-dir", data_dir)


def test_an_operator_reviews_and_raises_limits(network: LocalNetwork, publisher: Path, run: Run) -> None:
    file, one = signed(publisher, "reviewed")
    at = ("--coordinator", network.url, "--api-key", network.make_key("read", "write", account="dan"))
    books = ("--data-dir", str(network.node("coordinator").data_dir))
    run("publish", str(file), *at)
    assert "is suspended" in run("review", one.address, "suspended", *books)
    wait_for("it is off the list", lambda: one.address not in listed(run, "--coordinator", network.url))
    run("review", "reviewed@1.0.0", "approved", *books)
    wait_for("it is back", lambda: one.address in listed(run, "--coordinator", network.url))
    assert "it is approved" in run("review", one.address, "rejected", *books, status=EXIT_CONFIG)
    for name in ("reviewed-b", "reviewed-c"):
        run("publish", str(signed(publisher, name)[0]), *at)
    one_more = str(signed(publisher, "reviewed-d")[0])
    assert "at most 3" in run("publish", one_more, *at, status=EXIT_CONFIG)
    assert "at most 10" in run("level", "dan", "verified", *books)
    run("publish", one_more, *at)
    assert "no account" in run("level", "nobody", "verified", *books, status=EXIT_CONFIG)
    assert "one of" in run("level", "dan", "emperor", *books, status=EXIT_CONFIG)


def test_what_is_wrong_is_said_with_the_way_out(network: LocalNetwork, publisher: Path, run: Run, tmp_path: Path) -> None:
    file, _ = signed(publisher, "wrong")
    key, url = network.make_key("read", "write"), network.url
    at = ("--coordinator", url, "--api-key", key)
    books = ("--data-dir", str(network.node("coordinator").data_dir))
    broken = tmp_path / "broken.cargo"
    whole = file.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cases: list[tuple[str, tuple[str, ...]]] = [
        ("say which Coordinator", ("publish", str(file))),
        ("an API key is needed", ("publish", str(file), "--coordinator", url)),
        ("invalid_api_key", ("publish", str(file), "--coordinator", url, "--api-key", "ak_" + "x" * 43)),
        ("scope write", ("publish", str(file), "--coordinator", url, "--api-key", network.make_key("read"))),
        ("cannot read", ("publish", str(tmp_path / "none.cargo"), *at)),
        ("build and sign it again", ("publish", str(broken), *at)),
        ("takes the Coordinator's URL", ("publish", str(file), "--coordinator", "/ip4/127.0.0.1/tcp/1", "--api-key", key)),
        ("cannot be reached", ("publish", str(file), "--coordinator", "http://127.0.0.1:1", "--api-key", key)),
        ("say what to revoke", ("revoke", *at)),
        ("say what to revoke", ("revoke", "wrong@1.0.0", "--key", "x", *at)),
        ("NAME@RELEASE", ("revoke", "wrong", *at, "--data-dir", str(publisher))),
        ("unknown_cargo", ("revoke", "wrong@1.0.0", *at, "--data-dir", str(publisher))),
        ("no publisher.key", ("revoke", "wrong@1.0.0", *at, "--data-dir", str(tmp_path))),
        ("only its own publisher", ("revoke", "--key", "12D3KooW", *at, "--data-dir", str(publisher))),
        ("the registry has no Cargo", ("revoke", "wrong@1.0.0", "--as-operator", *books)),
        ("the registry has no Cargo", ("revoke", "ab" * 32, "--as-operator", *books)),
        ("publisher", ("revoke", "--key", "12D3KooW", "--as-operator", *books)),
        ("no Coordinator keeps its books", ("revoke", "ab" * 32, "--as-operator", "--data-dir", str(publisher))),
        ("--runtime is one of", ("list", "--runtime", "java")),
    ]
    for words, arguments in cases:
        assert words in run(*arguments, status=EXIT_CONFIG), arguments
    assert "no Cargos here yet" in run("list", "--data-dir", str(tmp_path / "empty"))
    (tmp_path / "config.toml").write_text('coordinator = ["/ip4/127.0.0.1/tcp/1/p2p/x"]\nmemory_limit = "1G"\n')
    assert "no Cargos here yet" in run("list", "--data-dir", str(tmp_path)), "the node's own settings are none of this command's"
    assert httpx.get(f"{url}/api/v1/cargos?name=wrong").json()["data"] == [], "nothing of it got in"


def test_the_kill_switch_is_of_the_databases_own_network(network: LocalNetwork, run: Run, tmp_path: Path) -> None:
    for name in ("identity", "network"):
        DataDir.open(tmp_path).key(name)
    database = f"sqlite:///{network.node('coordinator').data_dir / 'coordinator.db'}"
    key = DataDir.open(tmp_path).key("identity").peer_id
    said = run("revoke", "--key", key, "--as-operator", "--data-dir", str(tmp_path), "--database-url", database, status=EXIT_CONFIG)
    assert "of another network" in said


def test_an_api_key_follows_no_redirect(publisher: Path, run: Run) -> None:
    import http.server
    import threading

    seen: list[str] = []

    class Redirects(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            """Nobody reads it."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Redirects)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        file, _ = signed(publisher, "moved")
        assert "status 307" in run("publish", str(file), "--coordinator", url, "--api-key", "secret", status=EXIT_CONFIG)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert seen == ["/api/v1/cargos"]
