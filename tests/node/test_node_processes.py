"""Real processes on loopback: what a user starts, and what happens when it is killed, restarted, drained or left by its client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from node.localnet import LocalNetwork, LocalNode, NodeFailed

SENTENCE = " ".join(f"word{i}" for i in range(60))
SLOW_ECHO = ("--cargo", "echo", "--echo-delay", "0.02")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path) as running:
        yield running


class Chat:
    """One streamed request over plain http.client: sees every line, can hang up in the middle."""

    def __init__(
        self, network: LocalNetwork, key: str, text: str, path: str = "/v1/chat/completions", **more: Any
    ) -> None:
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True, **more}
        self.connection = http.client.HTTPConnection(urlsplit(network.url).netloc, timeout=60)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.connection.request("POST", path, json.dumps(body), headers)
        self.answer = self.connection.getresponse()
        self.events: list[dict[str, Any]] = []
        self.done = False

    @property
    def island(self) -> str:
        return self.answer.getheader("x-archipelag-island", "")

    @property
    def text(self) -> str:
        return "".join(c["delta"].get("content") or "" for e in self.events for c in e.get("choices", []))

    @property
    def error(self) -> dict[str, Any] | None:
        return next((e["error"] for e in self.events if "error" in e), None)

    def read(self, until: Callable[[], bool] = lambda: False) -> Chat:
        for raw in self.answer:
            line = raw.decode().strip()
            if line == "data: [DONE]":
                self.done = True
                break
            if line.startswith("data: "):
                self.events.append(json.loads(line[6:]))
            if until():
                break
        return self

    def hang_up(self) -> None:
        self.connection.sock and self.connection.sock.close()
        self.answer.close()
        self.connection.close()


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Polls a fact of another process; there is no event to wait for across the border."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "node", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def status(node: LocalNode) -> dict[str, Any]:
    result = command("status", "--json", "--data-dir", str(node.data_dir))
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def get(network: LocalNetwork, path: str) -> str:
    with urllib.request.urlopen(network.url + path, timeout=10) as answer:
        return str(answer.read().decode())


def health(network: LocalNetwork) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(get(network, "/health"))
    return facts


def metrics(network: LocalNetwork) -> str:
    return get(network, "/metrics")


def start_two(network: LocalNetwork, *arguments: str) -> dict[str, LocalNode]:
    """Islands by peer id."""
    nodes = [network.start_island(name, *arguments) for name in ("one", "two")]
    return {node.wait_ready()["peer_id"]: node for node in nodes}


def test_the_whole_path_and_the_commands_around_it(network: LocalNetwork) -> None:
    facts = network.start_coordinator()
    assert set(facts) == {"pid", "peer_id", "addresses", "http"}
    assert all(a.endswith(f"/p2p/{facts['peer_id']}") for a in facts["addresses"])
    island = network.start_island(
        "one", "--cargo", "echo", "--ask", "echo=0.25", "--region", "CH", coordinator=facts["addresses"][0]
    )
    ready = island.wait_ready()
    assert set(ready) == {"pid", "peer_id", "addresses", "cargos"} and ready["cargos"] == ["echo"]
    key = command("keys", "create", "--data-dir", str(network.coordinator.data_dir)).stdout  # type: ignore[union-attr]
    assert key.startswith("ak_") and key.count("\n") == 1, "the key and nothing else"
    chat = Chat(network, key.strip(), "hello there", stream_options={"include_usage": True}).read()
    assert chat.done and chat.text == "hello there" and chat.island == ready["peer_id"]
    assert chat.events[-1]["metadata"]["price"] == "0.25"
    assert status(island)["jobs"]["done"] == 1
    peers = command("peers", "--json", "--data-dir", str(network.coordinator.data_dir))  # type: ignore[union-attr]
    (peer,) = json.loads(peers.stdout)
    assert peer["connected"] and peer["island"]["region"] == "CH" and peer["island"]["cargos"] == ["echo"]
    assert "echo" in command("peers", "--data-dir", str(island.data_dir)).stdout
    assert "ready" in command("status", "--data-dir", str(island.data_dir)).stdout
    assert "word" not in island.log() and "hello there" not in island.log(), "no prompt in a log"


def test_an_island_joins_through_any_peer(network: LocalNetwork) -> None:
    network.start_coordinator()
    first = network.start_island("one", "--cargo", "echo").wait_ready()
    second = network.start_island("two", "--cargo", "echo", coordinator=first["addresses"][0])
    second.wait_ready(30)
    assert status(second)["coordinator"] == status(network.nodes[0])["peer_id"]
    wait_for("both in the book", lambda: health(network)["islands"] == 2)


def test_a_killed_island_mid_stream_loses_nothing(network: LocalNetwork) -> None:
    network.start_coordinator()
    islands = start_two(network, *SLOW_ECHO)
    chat = Chat(network, network.make_key(), SENTENCE)
    chat.read(lambda: len(chat.events) > 10)
    victim = islands.pop(chat.island)
    victim.kill()
    chat.read()
    assert chat.done and chat.error is None
    assert chat.text == SENTENCE, "not a word lost or told twice"
    (other,) = islands.values()
    assert status(other)["jobs"]["resumed_tokens"] > 0, "the other Island went on and did not begin again"


def test_a_killed_island_before_the_first_token_is_not_noticed(network: LocalNetwork) -> None:
    network.start_coordinator()
    islands = start_two(network, "--cargo", "echo", "--echo-delay", "1.5")
    key = network.make_key()
    for node in islands.values():
        node.signal(signal.SIGSTOP)  # it takes the job and does not answer
    process = subprocess.Popen([sys.executable, "-c", _ASK, network.url, key], stdout=subprocess.PIPE, text=True)
    wait_for("the job on its way to a frozen Island", lambda: "archipelag_jobs_running 1.0" in metrics(network))
    first, second = islands.values()
    first.kill()  # where the job is there is no telling from outside: one way it moves on at once, the other it was not there
    second.signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["choices"][0]["message"]["content"] == "hello"


_ASK = """
import json, sys, urllib.request
body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hello"}]}).encode()
headers = {"Authorization": "Bearer " + sys.argv[2], "Content-Type": "application/json"}
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1] + "/v1/chat/completions", body, headers), timeout=60).read().decode())
"""


def test_two_killed_islands_end_the_job_with_an_error_in_the_stream(network: LocalNetwork) -> None:
    network.start_coordinator()
    islands = start_two(network, *SLOW_ECHO)
    third = network.start_island("three", *SLOW_ECHO)
    islands[third.wait_ready()["peer_id"]] = third
    chat = Chat(network, network.make_key(), SENTENCE)
    chat.read(lambda: len(chat.events) > 5)
    islands.pop(chat.island).kill()
    seen = len(chat.events)
    chat.read(lambda: len(chat.events) > seen + 5)
    second = next(node for node in islands.values() if status(node)["jobs"]["running"])
    second.kill()
    chat.read()
    assert chat.error is not None and set(chat.error) == {"message", "type", "param", "code"}
    last = next(node for node in islands.values() if node.running)
    assert status(last)["jobs"]["started"] == 0, "a job that has ended two workers is not sent to a third Island"


def test_islands_come_back_to_a_restarted_coordinator(network: LocalNetwork) -> None:
    facts = network.start_coordinator()
    port, peer_port = urlsplit(facts["http"]).port, facts["addresses"][0].split("/")[4]
    coordinator = network.coordinator
    assert coordinator is not None
    coordinator._arguments = [
        "coordinator",
        "--http",
        f"127.0.0.1:{port}",
        "--listen",
        f"/ip4/127.0.0.1/tcp/{peer_port}",
    ]
    island = network.start_island("one", "--cargo", "echo")
    island.wait_ready()
    key = network.make_key()
    coordinator.kill()
    again = coordinator.restart()
    assert again["peer_id"] == facts["peer_id"]
    started = time.monotonic()
    wait_for("the Island in the book", lambda: health(network)["islands"] == 1)
    assert time.monotonic() - started < 5
    chat = Chat(network, key, "still here").read()
    assert chat.done and chat.text == "still here", "key, Island and ticket survive the restart"


def test_a_client_that_hangs_up_frees_the_slot(network: LocalNetwork) -> None:
    network.start_coordinator()
    island = network.start_island("one", *SLOW_ECHO)
    island.wait_ready()
    chat = Chat(network, network.make_key(), "word " * 3000)
    chat.read(lambda: len(chat.events) > 3)
    assert status(island)["jobs"]["running"] == 1
    chat.hang_up()
    started = time.monotonic()
    wait_for("no job", lambda: status(island)["jobs"]["running"] == 0)
    assert time.monotonic() - started < 3, "a second, and what starting the status command takes"
    assert status(island)["jobs"]["cancelled"] == 1


@pytest.mark.parametrize("who", ["island", "coordinator"])
def test_sigterm_lets_running_answers_finish(network: LocalNetwork, who: str) -> None:
    network.start_coordinator()
    island = network.start_island("one", *SLOW_ECHO)
    island.wait_ready()
    chat = Chat(network, network.make_key(), SENTENCE)
    chat.read(lambda: len(chat.events) > 3)
    node = island if who == "island" else network.coordinator
    assert node is not None
    node.signal(signal.SIGTERM)
    chat.read()
    assert chat.done and chat.text == SENTENCE
    assert node.process.wait(20) == 0
    assert not (network.folder / f"{node.name}.ready").exists(), "who has stopped is not ready"


def test_a_second_sigint_stops_at_once(network: LocalNetwork) -> None:
    network.start_coordinator()
    island = network.start_island("one", "--cargo", "echo", "--echo-delay", "5")
    island.wait_ready()
    connection = http.client.HTTPConnection(urlsplit(network.url).netloc, timeout=60)
    body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": SENTENCE}]})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {network.make_key()}"})
    wait_for("a running job", lambda: status(island)["jobs"]["running"])
    island.signal(signal.SIGINT)
    wait_for("the drain", lambda: "finishing what runs" in island.log())
    island.signal(signal.SIGINT)
    assert island.process.wait(5) == 130
    connection.close()


def test_one_node_a_data_folder(network: LocalNetwork) -> None:
    network.start_coordinator()
    network.start_island("one", "--cargo", "echo").wait_ready()
    twin = LocalNode("one", network.folder, ["start", "--coordinator", network.url, "--cargo", "echo"])
    assert twin.process.wait(30) == 2
    assert "already runs on" in twin.log()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("start", "--coordinator", "nonsense", "--cargo", "echo"), "neither a multiaddr"),
        (("start", "--coordinator", "/ip4/127.0.0.1/tcp/1", "--cargo", "echo"), "no /p2p/PEER_ID"),
        (("start", "--no-mdns", "--cargo", "echo"), "--coordinator"),
        (("start", "--listen", "nonsense", "--coordinator", "http://127.0.0.1:1"), "is not an address"),
        (("start", "--memory-limit", "much"), "is no size"),
        (("start", "--ask", "echo=1e3"), "a price is a number"),
        (("start", "--cargo", "no_such_model"), "no_such_model"),
        (("start", "--threads", "0"), "--threads"),
        (("start", "--context", "-5"), "--context"),
        (("start", "--cargo", "echo", "--ready-file", "/no/such/folder/ready"), "--ready-file"),
        (("coordinator", "--body-limit", "1G"), "--body-limit"),
        (("coordinator", "--job-timeout", "0"), "--job-timeout"),
        (("coordinator", "--http", "0.0.0.0:0"), "--insecure-http"),
        (("coordinator", "--tls-cert", "x.pem"), "--tls-key"),
        (("coordinator", "--database-url", "nonsense://x"), "database"),
        (("status",), "no node runs"),
        (("keys", "create", "--scopes", "root"), "--scopes"),
        (("demo", "--islands", "0"), "--islands"),
    ],
)
def test_wrong_settings_end_with_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    more = () if arguments[0] == "demo" else ("--data-dir", str(tmp_path))
    result = command(*arguments, *more)
    assert result.returncode == 2
    complaint = result.stderr
    assert words in complaint
    assert "Traceback" not in complaint


def test_nothing_is_left_behind_by_a_failed_start(network: LocalNetwork) -> None:
    network.start_coordinator()
    with pytest.raises(NodeFailed, match="no-such-model"):
        network.start_island("one", "--cargo", "no-such-model").wait_ready()
    assert not (network.folder / "one.ready").exists()
    assert health(network)["islands"] == 0


def test_the_identity_is_private(network: LocalNetwork) -> None:
    network.start_coordinator()
    assert network.coordinator is not None
    secrets = [
        path
        for path in network.coordinator.data_dir.rglob("*")
        if path.suffix in (".key", ".db") or path.name == "control.json"
    ]
    assert len(secrets) >= 4
    for path in secrets:
        assert path.stat().st_mode & 0o077 == 0, f"{path.name} can be read by others"
    assert os.path.exists("/proc/self"), "runs on Linux"
