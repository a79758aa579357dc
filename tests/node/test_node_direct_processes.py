"""The direct path as real processes with real books: what a Consumer starts, and who is paid when somebody is killed."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from node.localnet import LocalNetwork, LocalNode, NodeFailed

SENTENCE = " ".join(f"word{number}" for number in range(200))
SLOW = ("--cargo", "echo", "--echo-delay", "0.01", "--ask", "echo=0+1+0")  # a milli-credit a token
CREDITS = 10_000


class Direct:
    """A Coordinator that may be killed and started again at the same addresses, an Island, an account, and a bridge."""

    def __init__(self, network: LocalNetwork, *island: str) -> None:
        self.network = network
        facts = network.start_coordinator()
        assert network.coordinator is not None
        self.coordinator = network.coordinator
        web, peers = urlsplit(facts["http"]).netloc, facts["addresses"][0].split("/")[4]
        self.coordinator._arguments = ["coordinator", "--http", web, "--listen", f"/ip4/127.0.0.1/tcp/{peers}"]
        self.island = network.start_island("one", *(island or SLOW))
        self.island.wait_ready()
        self.key = network.make_key()
        self.bridge = network.start_bridge("bridge", self.key)
        self.url = str(self.bridge.wait_ready(60)["http"])

    def stream(self, text: str = SENTENCE, **more: Any) -> Stream:
        return Stream(self.url, self.key, text, **more)

    def account(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.network.url}/api/v1/account", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            facts: dict[str, Any] = json.loads(answer.read())
            return facts

    def paid(self) -> int:
        """Milli-credits that the account has spent; None is held any more."""
        facts = self.account()
        return round((CREDITS - float(facts["credits_posted"])) * 1000)

    def claims(self) -> list[Path]:
        return list((self.island.data_dir / "claims").glob("*.claim"))


class Stream:
    """One streamed chat over plain http.client."""

    def __init__(self, url: str, key: str, text: str, **more: Any) -> None:
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], "stream": True, **more}
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        self.answer = self.connection.getresponse()
        self.events: list[dict[str, Any]] = []
        self.done = False

    @property
    def text(self) -> str:
        return "".join(c["delta"].get("content") or "" for e in self.events for c in e.get("choices", []))

    def read(self, until: Callable[[], bool] = lambda: False) -> Stream:
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


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Polls a fact of another process; there is no event to wait for across the border."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def status(node: LocalNode) -> dict[str, Any]:
    command = [sys.executable, "-m", "node", "status", "--json", "--data-dir", str(node.data_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


@pytest.fixture
def network(tmp_path: Path) -> Iterator[LocalNetwork]:
    with LocalNetwork(tmp_path) as running:
        yield running


def test_the_whole_path(network: LocalNetwork) -> None:
    direct = Direct(network)
    with openai.OpenAI(base_url=f"{direct.url}/v1", api_key=direct.key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        answer = client.chat.completions.create(
            model="echo", messages=[{"role": "user", "content": SENTENCE}], max_tokens=500
        )
        assert answer.choices[0].message.content == SENTENCE
        metadata: Any = answer.metadata
        assert metadata["price"] == "0.2" and direct.paid() == 200, "200 tokens, billed before the last byte left"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "x"}])
    wait_for("the Island's own claim", lambda: status(direct.island)["claims"]["settled"] == 1)
    assert direct.paid() == 200 and float(direct.account()["credits_held"]) == 0, "the ticket pays once"
    assert not direct.claims()
    for node in (direct.coordinator, direct.island, direct.bridge):
        assert direct.key not in node.log() and "word7" not in node.log(), f"{node.name} has logged too much"
    assert direct.bridge.stop() == 0


def test_a_consumer_that_is_killed_pays_what_it_has_signed(network: LocalNetwork) -> None:
    direct = Direct(network)
    stream = direct.stream()
    stream.read(until=lambda: len(stream.events) > 130)
    direct.bridge.kill()
    wait_for("the Island's claim", lambda: status(direct.island)["claims"]["settled"] == 1)
    paid = direct.paid()
    assert 96 <= paid < 200, "what was signed, and no more"
    assert float(direct.account()["credits_held"]) == 0


def test_an_island_that_is_killed_in_mid_answer_costs_no_more_than_the_bid(network: LocalNetwork) -> None:
    asks = ("--cargo", "echo", "--echo-delay", "0.01", "--ask", "echo=1+0+0")
    direct = Direct(network, *asks)
    other = network.start_island("two", *asks)
    other.wait_ready()
    wait_for("both Islands", lambda: status(direct.coordinator)["islands"] == 2)
    stream = direct.stream(max_tokens=300, bid_price="1")
    stream.read(until=lambda: len(stream.events) > 100)
    names = {status(node)["peer_id"]: node for node in (direct.island, other)}
    names.pop(stream.answer.headers["x-archipelag-island"]).kill()
    (survivor,) = names.values()
    stream.read()
    assert stream.done and stream.text == SENTENCE, stream.events[-1]
    (metadata,) = [event["metadata"] for event in stream.events if event.get("metadata", {}).get("price")]
    assert metadata["price"] == "1" and direct.paid() == 1000
    wait_for("the other Island's claim", lambda: status(survivor)["claims"]["settled"] == 1)
    assert direct.paid() == 1000 and float(direct.account()["credits_held"]) == 0


def test_the_coordinator_is_killed_in_the_middle_and_comes_back(network: LocalNetwork) -> None:
    """The answer goes on to its end; report and claim wait, and the ticket pays once."""
    direct = Direct(network)
    stream = direct.stream()
    stream.read(until=lambda: len(stream.events) > 20)
    direct.coordinator.kill()
    stream.read()
    assert stream.done and stream.text == SENTENCE
    assert stream.events[-1]["metadata"]["price"] == "0.2", "by the receipt"
    with pytest.raises(urllib.error.HTTPError) as refused:
        body = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "x"}]}).encode()
        headers = {"Authorization": f"Bearer {direct.key}", "Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{direct.url}/v1/chat/completions", body, headers), timeout=30)
    assert refused.value.code == 503 and refused.value.headers["Retry-After"]
    direct.coordinator.restart()
    wait_for("the pay", lambda: direct.paid() == 200)
    wait_for("the claim", lambda: status(direct.island)["claims"]["settled"] == 1)
    wait_for("the report", lambda: status(direct.bridge)["reports"] == 0)
    assert direct.paid() == 200 and float(direct.account()["credits_held"]) == 0
    assert direct.stream("still here").read().text == "still here"


def test_claims_survive_an_island_that_is_killed(network: LocalNetwork) -> None:
    """Everybody dies: the Coordinator first, then the bridge, and the Island as soon as it has written down what it is owed."""
    direct = Direct(network)
    stream = direct.stream()
    stream.read(until=lambda: len(stream.events) > 20)
    direct.coordinator.kill()
    stream.read()
    direct.bridge.kill()
    wait_for("the claim on disk", direct.claims)
    direct.island.kill()
    (file,) = direct.claims()
    assert file.stat().st_mode & 0o077 == 0
    direct.coordinator.restart()
    assert direct.paid() == 0
    direct.island.restart()
    wait_for("the pay", lambda: direct.paid() == 200)
    wait_for("an empty folder", lambda: not direct.claims())
    assert float(direct.account()["credits_held"]) == 0


def test_a_bridge_drains(network: LocalNetwork) -> None:
    direct = Direct(network)
    stream = direct.stream()
    stream.read(until=lambda: len(stream.events) > 20)
    direct.bridge.signal(signal.SIGTERM)
    stream.read()
    assert stream.done and stream.text == SENTENCE
    assert direct.bridge.process.wait(20) == 0
    assert direct.paid() == 200
    assert not (network.folder / "bridge.ready").exists()


def test_a_wrong_key_ends_the_start_with_one_clear_line(network: LocalNetwork) -> None:
    network.start_coordinator()
    with pytest.raises(NodeFailed, match="refuses the API key") as caught:
        network.start_bridge("bridge", "ak_" + "A" * 43).wait_ready(60)
    assert "status 2" in str(caught.value) and "Traceback" not in str(caught.value)
    assert "A" * 43 not in str(caught.value)


def test_a_key_in_a_file_is_a_key_that_others_cannot_read(network: LocalNetwork, tmp_path: Path) -> None:
    network.start_coordinator()
    file = tmp_path / "key"
    file.write_text(network.make_key() + "\n")
    file.chmod(0o644)
    with pytest.raises(NodeFailed, match="chmod 600"):
        network.start_bridge("one", "", "--api-key-file", str(file)).wait_ready(60)
    file.chmod(0o600)
    assert network.start_bridge("two", "", "--api-key-file", str(file)).wait_ready(60)["http"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--coordinator"),
        (("--coordinator", "nonsense"), "neither a multiaddr"),
        (("--coordinator", "http://127.0.0.1:1", "--http", "0.0.0.0:0"), "serves its own only"),
        (("--coordinator", "http://127.0.0.1:1", "--job-timeout", "0"), "--job-timeout"),
        (("--coordinator", "http://127.0.0.1:1", "--api-key", "secret"), "ak_"),
        (("--coordinator", "http://127.0.0.1:1", "--api-key-file", "/no/such/file"), "cannot be read"),
    ],
)
def test_wrong_settings_end_with_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    good = () if "--api-key" in arguments or "--api-key-file" in arguments else ("--api-key", "ak_" + "A" * 43)
    command = [sys.executable, "-m", "node", "bridge", "--data-dir", str(tmp_path), *arguments, *good]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and words in result.stderr
    assert "Traceback" not in result.stderr and "secret" not in result.stderr
