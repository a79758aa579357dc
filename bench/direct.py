"""The direct path beside the Coordinator's own bridge: the same Island, the same model, the same clients, in turns.

Two figures. Tokens per second of streamed answers, through ``archipelag-node bridge`` (tokens straight from the Island) and through the
Coordinator's HTTP face. And what the Coordinator's peers and it say to one another for one job of the bridge, in bytes of frames, for short
and for long answers: it must not grow with the answer.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.bars import at_least, at_most

MODEL = "smollm2-135m"
CLIENTS = 4
BRIDGE, COORDINATOR = "bridge, straight from the Island", "Coordinator's HTTP face"
SHORT, LONG = 16, 512  # tokens of an answer
RATIO_MIN = 1.0  # the bars
GROWTH_MAX = 1.05
_ECHO_WORDS = 4000
_BATCHES, _IDLE_S = 5, 1.0


def _answer(url: str, key: str, model: str, prompt: str, tokens: int) -> int:
    """Streams one answer to its end; how many tokens it had."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = HTTPConnection(urlsplit(url).netloc, timeout=120)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{url} answers {response.status}: {response.read(2000).decode(errors='replace')}")
    usage: dict[str, Any] = {}
    for line in response:
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage") or usage
    connection.close()
    return int(usage["completion_tokens"])


def _tokens_per_s(url: str, key: str, model: str, prompt: str, tokens: int, clients: int, rounds: int) -> float:
    with ThreadPoolExecutor(clients) as pool:
        started_s = time.perf_counter()
        jobs = [pool.submit(_answer, url, key, model, prompt, tokens) for _ in range(clients * rounds)]
        total = sum(job.result() for job in jobs)
        return total / (time.perf_counter() - started_s)


def _coordinator_bytes(data_dir: Path) -> int:
    """Bytes of all frames that the Coordinator has sent and received since it started."""
    from node.control import ask_node

    counts = ask_node(str(data_dir), "status")["host"]["counts"]
    return int(counts["frame_bytes_sent"]) + int(counts["frame_bytes_received"])


def _bytes_per_job(data_dir: Path, url: str, key: str, words: int, jobs: int) -> float:
    """Of the bridge's jobs, less what passes anyhow in such a time; the middle of several batches, since gossip comes in bursts."""
    prompt = " ".join(["word"] * words)
    found = []
    for _ in range(_BATCHES):
        before, started_s = _coordinator_bytes(data_dir), time.perf_counter()
        for _ in range(jobs):
            _answer(url, key, "echo", prompt, words)
        took_s, used = time.perf_counter() - started_s, _coordinator_bytes(data_dir) - before
        idle_before = _coordinator_bytes(data_dir)
        time.sleep(_IDLE_S)
        idle_per_s = (_coordinator_bytes(data_dir) - idle_before) / _IDLE_S
        found.append((used - idle_per_s * took_s) / jobs)
    return statistics.median(found)


def run(quick: bool = False) -> dict[str, Any]:
    from node.localnet import LocalNetwork

    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in (BRIDGE, COORDINATOR)}
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder, LocalNetwork(Path(folder)) as network:
        network.start_coordinator()
        assert network.coordinator is not None
        island = network.start_island("island", "--cargo", MODEL, "--cargo", "echo", "--threads", "1", "--ask", "echo=0.001")
        island.wait_ready()
        key = network.make_key()
        bridge = network.start_bridge("bridge", key)
        urls = {BRIDGE: str(bridge.wait_ready()["http"]), COORDINATOR: network.url}
        prompts = {"smollm2-135m, 1 client": (MODEL, "Tell a long story about the sea.", 128, 1, 1 if quick else 2)}
        prompts[f"smollm2-135m, {CLIENTS} clients"] = (MODEL, "Tell a long story about the sea.", 128, CLIENTS, 1)
        prompts["echo, 1 client"] = ("echo", " ".join(["word"] * _ECHO_WORDS), _ECHO_WORDS, 1, 3)
        for url in urls.values():
            _answer(url, key, MODEL, "Hello", 8)
        for _ in range(2 if quick else 5):
            for load, (model, prompt, tokens, clients, rounds) in prompts.items():
                for name, url in urls.items():
                    speed = _tokens_per_s(url, key, model, prompt, tokens, clients, rounds)
                    speeds[name].setdefault(load, []).append(speed)
        data_dir, jobs = network.coordinator.data_dir, 5 if quick else 20
        sizes = {words: _bytes_per_job(data_dir, urls[BRIDGE], key, words, jobs) for words in (SHORT, LONG, _ECHO_WORDS)}
    medians = {name: {load: statistics.median(values) for load, values in found.items()} for name, found in speeds.items()}
    return _report(medians, sizes)


def _report(medians: dict[str, dict[str, float]], sizes: dict[int, float]) -> dict[str, Any]:
    bars = [
        at_least(f"direct path / Coordinator's bridge, tokens/s, {load}", medians[BRIDGE][load] / medians[COORDINATOR][load], RATIO_MIN)
        for load in medians[BRIDGE]
    ]
    growth = sizes[_ECHO_WORDS] / sizes[SHORT]
    bars.append(at_most(f"Coordinator's bytes for a job of {_ECHO_WORDS} tokens / of {SHORT}", growth, GROWTH_MAX))
    return {"bench": "direct", "tokens_per_s": medians, "coordinator_bytes_per_job": sizes, "bars": bars}


def table(result: dict[str, Any]) -> str:
    loads = list(result["tokens_per_s"][BRIDGE])
    lines = [f"{'tokens/s of streamed answers':<36}" + "".join(f"{load:>28}" for load in loads)]
    for name, speeds in result["tokens_per_s"].items():
        lines.append(f"{name:<36}" + "".join(f"{speeds[load]:>28.1f}" for load in loads))
    for words, size in result["coordinator_bytes_per_job"].items():
        lines.append(f"Coordinator, frames of one job of the bridge with {words} tokens: {size:.0f} bytes")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run(quick=True)))
