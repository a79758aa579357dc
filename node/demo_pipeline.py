"""The pipeline demo: a model that no Island can hold runs on two of three, one of them is killed in the middle of an answer, and the answer
is finished, the same to the letter.

Everything runs for real: the model is cut into files, each node is its own ``archipelag-node`` process, the kill is a SIGKILL.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, TextIO

from node.demo_client import MODEL, DemoFailed, chunks_of, open_answer, say, text_of
from node.localnet import LocalNetwork, LocalNode

ISLANDS = 3
MEMORY = "170M"  # each offers so much; the whole model needs some 260 MB with its cache, buffers and process
_TOKENS = 90
_KILL_AT = 30  # pieces of text


@dataclass(frozen=True, slots=True)
class PipelineDemo:
    prompt: str
    stage: int = 0  # which stage of the route is killed; negative ones count from the end


@dataclass(slots=True)
class _Answer:
    text: str = ""
    route: tuple[str, ...] = ()
    longest_gap_s: float = 0.0
    metadata: dict[str, Any] | None = None


def run_pipeline_demo(config: PipelineDemo, out: TextIO) -> None:
    """Raises DemoFailed, NodeFailed or ConfigError; Ctrl-C ends it in order."""
    with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as name, LocalNetwork(Path(name)) as network:
        shards = Path(name) / "shards"
        say(out, f"1/5 cut {MODEL} in two and check that the halves compute what the whole does")
        _cut(shards, out)
        say(out, f"2/5 a Coordinator, and {ISLANDS} Islands that offer {MEMORY}B each: too little for the whole model")
        network.start_coordinator("127.0.0.1:0", "--manifest", str(shards / f"{MODEL}.shards.json"))
        islands = _start_islands(network, shards)
        key = network.make_key()
        say(out, "3/5 an answer; the Coordinator plans the pipeline, and its Islands load their layers\n")
        first = _ask(network.url, key, config.prompt, out)
        say(out, f"\n\n    route: {_names(first.route, islands)}")
        victim = islands[first.route[config.stage]]
        say(out, f"4/5 the same question; {victim.name} is killed in the middle\n")

        def kill(pieces: int) -> None:
            if pieces == _KILL_AT:
                victim.kill()
                out.write(f" [{victim.name} is dead] ")

        second = _ask(network.url, key, config.prompt, out, kill)
        say(out, f"\n\n    route: {_names(second.route, islands)} at the start; {_end(second, islands)}")
        say(out, f"    the longest pause was {second.longest_gap_s:.2f} s")
        if second.text != first.text:
            raise DemoFailed("the second answer is another one")
        say(out, "5/5 both answers are the same, letter for letter\n\nstopping …")


def _cut(folder: Path, out: TextIO) -> None:
    """By the command that users have."""
    command = [sys.executable, "-m", "node", "cargo", "shard", MODEL, "--shards", "2", "--out", str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"the model could not be cut: {done.stdout[-500:]}")
    for line in done.stdout.splitlines():
        say(out, f"    {line}" if line.strip() else "")


def _start_islands(network: LocalNetwork, shards: Path) -> dict[str, LocalNode]:
    """By peer id. One thread each: engines that spin on the same cores slow each other down many times."""
    options = ("--memory-limit", MEMORY, "--threads", "1", "--shard-dir", str(shards))
    nodes = [network.start_island(f"island-{number}", *options) for number in range(1, ISLANDS + 1)]
    return {str(node.wait_ready()["peer_id"]): node for node in nodes}


def _names(route: tuple[str, ...], islands: dict[str, LocalNode]) -> str:
    return " → ".join(islands[peer].name for peer in route)


def _end(answer: _Answer, islands: dict[str, LocalNode]) -> str:
    stages = (answer.metadata or {}).get("route", [])
    told = [f"{islands[s['island']].name} layers {s['layers']} in {s['compute_ms']:.0f} ms" for s in stages if s["layers"]]
    return f"at the end {', '.join(told)}; on the wire {(answer.metadata or {}).get('wire_ms', 0):.0f} ms"


def _ask(url: str, key: str, prompt: str, out: TextIO, watch: Callable[[int], None] = lambda pieces: None) -> _Answer:
    answer = _Answer()
    with open_answer(url, key, prompt, max_tokens=_TOKENS) as response:
        answer.route = tuple(response.getheader("x-archipelag-route", "").split(","))
        say(out, f"> {prompt}")
        _follow(response, answer, out, watch)
    return answer


def _follow(response: HTTPResponse, answer: _Answer, out: TextIO, watch: Callable[[int], None]) -> None:
    pieces, heard_s = 0, time.monotonic()
    for chunk in chunks_of(response):
        answer.metadata = chunk.get("metadata") or answer.metadata
        text = text_of(chunk)
        if not text:
            continue
        now_s = time.monotonic()
        if pieces:
            answer.longest_gap_s = max(answer.longest_gap_s, now_s - heard_s)
        answer.text, pieces, heard_s = answer.text + text, pieces + 1, now_s
        out.write(text)
        out.flush()
        watch(pieces)
