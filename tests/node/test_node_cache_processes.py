"""The cache of answers in a real Coordinator, and the operator's commands beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.cli import main
from node.control import ask_node
from node.demo_client import ask_json
from node.localnet import LocalNetwork, LocalNode

PATIENCE_S = 30.0
POLITE = "What is the capital of France, please?"
PLAIN = "What is the capital of France?"

Command = Callable[..., str]


class Running:
    """A Coordinator with an Island that echoes, and a client with a key."""

    def __init__(self, network: LocalNetwork, *flags: str) -> None:
        network.start_coordinator("127.0.0.1:0", *flags)
        island = network.start_island("one", "--cargo", "echo")
        self.network, self.url, self.key = network, network.url, network.make_key()
        self.other_key = network.make_key(account="bob")
        island.wait_ready()

    @property
    def node(self) -> LocalNode:
        assert self.network.coordinator is not None
        return self.network.coordinator

    def ask(self, text: str, key: str = "") -> dict[str, Any]:
        """The metadata of an answer, with its text."""
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = ask_json(self.url, key or self.key, "/v1/chat/completions", body)
        return {**answer["metadata"], "text": answer["choices"][0]["message"]["content"]}

    def strategy(self, text: str, key: str = "") -> str:
        """``exact`` or ``semantic``; empty for a miss."""
        metadata = self.ask(text, key)
        return str(metadata["cache_strategy"]) if metadata["cache_hit"] else ""

    def wait_strategy(self, text: str, wanted: str, key: str = "") -> None:
        wait(lambda: self.strategy(text, key) == wanted)

    def model_state(self) -> str:
        return str(ask_node(str(self.node.data_dir), "status")["cache_model"].get("state", ""))


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.05)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with LocalNetwork(tmp_path) as network:
        yield Running(network)


@pytest.fixture
def command(running: Running, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> str:
        assert main(["cache", *arguments, "--data-dir", str(running.node.data_dir)]) == 0
        return capsys.readouterr().out

    return run


def test_what_the_operator_says_holds_beside_the_running_coordinator(running: Running, command: Command) -> None:
    """Each word of his is heard within a poll of the database, and stands in no log."""
    first, again = running.ask(PLAIN), running.ask(PLAIN)
    assert (first["cache_hit"], first["cache_strategy"]) == (False, None) and float(first["price"]) >= 0
    assert (again["cache_hit"], again["cache_strategy"], float(again["price"])) == (True, "exact", 0.0)
    assert again["text"] == first["text"]
    assert running.strategy(PLAIN, running.other_key) == "", "an account is not told what another has asked"
    told = json.loads(command("stats", "--json"))
    assert (told["hits"], told["misses"], told["size"]) == (1, 2, 2) and "own" not in told
    assert told["cargos"]["echo"]["hits"] == 1 and "hits exact" in command("stats")

    command("policy", "echo", "--enabled", "no")
    running.wait_strategy(PLAIN, "")
    command("policy", "echo", "--reset")
    running.wait_strategy(PLAIN, "exact")
    command("clear", "--account", "bob")
    running.wait_strategy(PLAIN, "", running.other_key)
    assert running.strategy(PLAIN) == "exact", "only what was named is forgotten"
    command("clear", "--cargo", "echo")
    running.wait_strategy(PLAIN, "")
    command("policy", "echo", "--public")
    running.wait_strategy("a question of one of them", "")
    running.wait_strategy("a question of one of them", "exact", running.other_key)
    assert "France" not in running.node.log() + command("stats") + command("policy")


def test_a_coordinator_without_a_cache(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        network.start_coordinator("127.0.0.1:0", "--cache", "off")
        key = network.make_key()
        assert ask_json(network.url, key, "/health")["cache"]["enabled"] is False
        assert network.coordinator is not None and ask_node(str(network.coordinator.data_dir), "status")["cache_model"] == {}


def test_alike_questions_are_found_by_the_model_which_comes_back(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path, {"ARCHIPELAG_CACHE_MODEL": "minilm-l6-v2"}) as network:
        running = Running(network)
        wait(lambda: running.model_state() == "on")
        first = running.ask(PLAIN)
        wait(lambda: ask_json(network.url, running.key, "/api/v1/cache/stats")["learning"] == 0)  # a moment behind the answer
        polite = running.ask(POLITE)
        assert (polite["cache_hit"], polite["cache_strategy"], polite["text"]) == (True, "semantic", first["text"])
        for child in psutil.Process(running.node.process.pid).children():
            child.kill()  # its worker in its sandbox, the only one
        wait(lambda: running.model_state() != "on")
        assert running.strategy(PLAIN) == "exact" and running.strategy("Thanks! " + POLITE) == "", "served all the same"
        wait(lambda: running.model_state() == "on")
        running.wait_strategy("Hello! " + POLITE, "semantic")
