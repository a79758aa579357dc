"""What kills cost, with the counts of the bars: the share of the undisturbed throughput that is left, and where the time goes.

The figures go to bench/results/. Two stages at work and two Islands to spare, so that one is there while the killed one starts anew.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node.control import ask_node
from node.localnet import LocalNetwork
from tests.node.pipeline_net import Net

MEMORY = "200M"  # room for sessions of 1,024 tokens, and too little for the whole model
RESULTS = Path(__file__).parents[2] / "bench" / "results"
NEVER_END = {"0": -100, "2": -100}  # the tokens that would end an answer early
# steps between two kills, tokens of a session -> the share of the undisturbed throughput that has to be left
BARS = {(1000, 128): 0.93, (1000, 1024): 0.73, (100, 128): 0.30, (100, 1024): 0.20}
KILLS = {1000: 4, 100: 12}


@dataclass
class Run:
    tokens: int = 0
    seconds: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    kills: int = 0
    mends: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Killer:
    """Kills a stage of the route, drawn by chance, each so many steps, and has its Island start anew."""

    def __init__(self, net: Net, every: int, seed: int) -> None:
        self._net, self._every, self._rng = net, every, random.Random(seed)
        self._threads: list[threading.Thread] = []
        self.steps = self.kills = 0

    def step(self, _: int) -> None:
        self.steps += 1
        if self._every and self.steps % self._every == 0:
            running = [peer for peer in current_route(self._net) if self._net.node(peer).running]
            node = self._net.node(self._rng.choice(running))
            node.kill()
            self.kills += 1
            thread = threading.Thread(target=node.restart)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


def session(net: Net, killer: Killer, tokens: int, number: int, run: Run) -> None:
    heard_s = time.monotonic()
    gaps: list[float] = []

    def watch(pieces: int) -> None:
        nonlocal heard_s
        now_s = time.monotonic()
        if pieces > 1:
            gaps.append(now_s - heard_s)
        heard_s = now_s
        killer.step(pieces)

    started_s = time.monotonic()
    answer = net.ask(f"{number}: write a very long story about the sea.", tokens, watch, logit_bias=NEVER_END)
    run.seconds += time.monotonic() - started_s
    run.tokens += answer.usage["completion_tokens"]
    assert answer.usage["completion_tokens"] == tokens, "no request is lost, none is cut short"
    run.gaps_s += [gap for gap in gaps if gap > 0.3]


def current_route(net: Net) -> tuple[str, ...]:
    coordinator = net.network.coordinator
    assert coordinator is not None
    pipelines = ask_node(str(coordinator.data_dir), "status")["pipelines"]
    return tuple(stage["island"] for stage in pipelines[0]["stages"]) if pipelines else ()


def measure(net: Net, every: int, tokens: int, steps: int) -> Run:
    run, killer = Run(), Killer(net, every, seed=every + tokens)
    number = 0
    while run.tokens < steps:
        number += 1
        session(net, killer, tokens, number, run)
    run.kills = killer.kills
    killer.wait()
    return run


@pytest.mark.soak
def test_what_is_left_of_the_throughput_when_stages_are_killed(tmp_path: Path) -> None:
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "runs": []}
    missed = []
    with LocalNetwork(tmp_path) as network:
        net = Net(network, 4, MEMORY)
        net.ask(tokens=16)
        for tokens in (128, 1024):
            plain = measure(net, 0, tokens, max(1024, 2 * tokens))
            for every in (1000, 100):
                run = measure(net, every, tokens, every * KILLS[every])
                share = run.tokens_per_s / plain.tokens_per_s
                loads = [shard for peer, node in net.by_peer.items() if node.running for shard in _loads(net, peer)]
                entry = {
                    "steps_between_kills": every,
                    "tokens_of_a_session": tokens,
                    "undisturbed_tokens_per_s": round(plain.tokens_per_s, 2),
                    "tokens_per_s": round(run.tokens_per_s, 2),
                    "share": round(share, 3),
                    "bar": BARS[every, tokens],
                    "kills": run.kills,
                    "pause_s_median": round(statistics.median(run.gaps_s or [0.0]), 3),
                    "pauses_s": [round(gap, 2) for gap in run.gaps_s],
                    "obtain_s": statistics.median(load[0] for load in loads),
                    "load_s": statistics.median(load[1] for load in loads),
                    "reopen_and_refill_s": [load[2] for load in loads if load[2]],
                }
                result["runs"].append(entry)
                print(json.dumps(entry))
                assert run.kills >= KILLS[every] - 1
                if share < BARS[every, tokens]:
                    missed.append(entry)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"soak-pipeline-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(result, indent=1))
    assert not missed, missed


def _loads(net: Net, peer: str) -> list[tuple[float, float, float | None]]:
    shards = ask_node(str(net.node(peer).data_dir), "status")["shards"]
    return [(s["obtain_s"], s["load_s"], s.get("driver", {}).get("last_mend_s")) for s in shards if "load_s" in s]
