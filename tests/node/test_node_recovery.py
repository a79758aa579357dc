"""A real model on two Islands: whoever dies in the middle, the answer is the one that nobody's death would have given.

SmolLM2 Q4_1 computes the same logits bit for bit whatever the batch, so at temperature 0 (and, since the random numbers are counted by
position, at any temperature with the same seed) equality is exact.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from node.localnet import LocalNetwork, LocalNode

MODEL = "smollm2-135m"
STORY = [
    {"role": "system", "content": "You are a helpful AI assistant."},
    {"role": "user", "content": "Write a long story about a lighthouse and the sea."},
]


class TwoIslands:
    def __init__(self, network: LocalNetwork) -> None:
        network.start_coordinator()
        self.network, self.key = network, network.make_key()
        self.nodes = [network.start_island(name, "--cargo", MODEL, "--threads", "1") for name in ("one", "two")]
        self.by_peer = {node.wait_ready()["peer_id"]: node for node in self.nodes}

    def takeovers(self) -> float:
        """How often an Island went on with another's answer, as the Coordinator counts it."""
        with urllib.request.urlopen(self.network.url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("archipelag_takeovers_mid_stream_total "))

    def ask(
        self, during: Callable[[str, int], None] = lambda island, tokens: None, **more: Any
    ) -> tuple[str, dict[str, Any]]:
        """The text and the last event; ``during`` is called with the Island and the number of events so far."""
        body = {
            "model": MODEL,
            "messages": STORY,
            "stream": True,
            "max_tokens": 60,
            "stream_options": {"include_usage": True},
            **more,
        }
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.network.url + "/v1/chat/completions", json.dumps(body).encode(), headers)
        text, events = "", 0
        last: dict[str, Any] = {}
        with urllib.request.urlopen(request, timeout=120) as answer:
            island = answer.headers["x-archipelag-island"]
            for raw in answer:
                line = raw.decode().strip()
                if line == "data: [DONE]":
                    return text, last
                if line.startswith("data: "):
                    last, events = json.loads(line[6:]), events + 1
                    assert "error" not in last, last
                    text += "".join(c["delta"].get("content") or "" for c in last["choices"])
                    during(island, events)
        raise AssertionError("the stream ended without [DONE]")


@pytest.fixture(scope="module")
def islands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoIslands]:
    with LocalNetwork(tmp_path_factory.mktemp("recovery")) as network:
        yield TwoIslands(network)


def children(node: LocalNode) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_worker_is_replaced_in_the_middle_of_an_answer(islands: TwoIslands) -> None:
    undisturbed, _ = islands.ask(temperature=0)
    killed: list[int] = []
    before = islands.takeovers()

    def kill_worker(island: str, events: int) -> None:
        if events == 8 and not killed:
            killed.extend(children(islands.by_peer[island])[:1])
            os.kill(killed[0], signal.SIGKILL)

    text, last = islands.ask(kill_worker, temperature=0)
    assert killed and text == undisturbed
    assert islands.takeovers() == before + 1, "the rest came from the other Island"
    assert last["usage"]["completion_tokens"] == 60
    assert all(node.running for node in islands.nodes), "a worker's crash does not hurt its node"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.95, "seed": 7}])
def test_a_killed_island_is_replaced_in_the_middle_of_an_answer(islands: TwoIslands, sampling: dict[str, Any]) -> None:
    for node in islands.nodes:
        if not node.running:
            node.restart()
    undisturbed, _ = islands.ask(**sampling)
    orphans: list[int] = []
    before = islands.takeovers()

    def kill_island(island: str, events: int) -> None:
        node = islands.by_peer[island]
        if events == 10 and not orphans:
            orphans.extend(children(node))
            node.kill()

    text, last = islands.ask(kill_island, **sampling)
    assert orphans and text == undisturbed
    assert islands.takeovers() == before + 1, "the rest came from the other Island"
    assert last["usage"]["completion_tokens"] == 60
    deadline = time.monotonic() + 5
    while not all(map(gone, orphans)):
        assert time.monotonic() < deadline, "the worker outlived its node"
        time.sleep(0.02)
