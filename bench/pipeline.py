"""Pipelines: one model over several Islands against the same model whole, what a hop costs, what delays cost, many jobs, memory.

Two parts run as real processes on loopback (SmolLM2-135M, one engine thread each); the ring of pretended stages with known compute times
runs in this process over real libp2p connections, through proxies that hold every byte back for a given time.
"""

from __future__ import annotations

import http.client
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import trio

from bench import bars
from node.control import ask_node
from node.localnet import LocalNetwork
from tests.node.stage_net import EchoDriver, open_stage_net

MODEL = "smollm2-135m"
PROMPT = "Write a short story about an island."
MEMORY = {2: "170M", 3: "145M"}  # what makes a pipeline of so many stages of this model
DELAYS_MS = (0, 5, 20, 50, 100)
COMPUTE_S = 0.02
STAGES = 3
_SPIN_S = 0.003
MIB = 1024 * 1024
PROCESS_BYTES_BAR = 80 * MIB


@dataclass
class Stream:
    """One streamed answer, timed at the client."""

    tokens: int = 0
    seconds: float = 0.0  # from the first piece to the last
    gaps_ms: list[float] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    route: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens - 1) / self.seconds


def ask(url: str, key: str, tokens: int, prompt: str = PROMPT) -> Stream:
    """Raises RuntimeError for an answer that is none."""
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": "You are a helpful AI assistant."}, {"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    found = Stream()
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=300)) as connection:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
        found.route = tuple(response.getheader("x-archipelag-route", "").split(","))
        first_s = last_s = 0.0
        for raw in response:
            if not raw.startswith(b"data: {"):
                continue
            chunk = json.loads(raw[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            found.metadata = chunk.get("metadata") or found.metadata
            found.tokens = (chunk.get("usage") or {}).get("completion_tokens", found.tokens)
            if any(choice["delta"].get("content") for choice in chunk.get("choices", [])):
                now_s = time.perf_counter()
                if first_s:
                    found.gaps_ms.append((now_s - last_s) * 1e3)
                first_s, last_s = first_s or now_s, now_s
        found.seconds = last_s - first_s
    return found


class Side:
    """A network of its own: the whole model on one Island, or a pipeline."""

    def __init__(self, network: LocalNetwork, stages: int) -> None:
        self.network, self.stages = network, stages
        network.start_coordinator()
        if stages == 1:
            nodes = [network.start_island("whole", "--cargo", MODEL, "--threads", "1")]
        else:
            options = ("--memory-limit", MEMORY[stages], "--threads", "1")
            nodes = [network.start_island(f"stage-{n}", *options) for n in range(stages)]
        self.nodes = {str(node.wait_ready()["peer_id"]): node for node in nodes}
        self.key = network.make_key()

    def ask(self, tokens: int) -> Stream:
        return ask(self.network.url, self.key, tokens)

    def shards(self) -> list[dict[str, Any]]:
        return [shard for node in self.nodes.values() for shard in ask_node(str(node.data_dir), "status")["shards"]]


def _speed(quick: bool) -> dict[str, Any]:
    """Tokens per second of one stream, whole and in stages, in rounds that alternate; two networks at a time, since idle ones cost too."""
    result: dict[str, Any] = {"tokens_per_s": {}, "whole_tokens_per_s": {}, "hop_ms": {}, "wire_ms_a_hop": {}, "memory": []}
    for stages in (2, 3):
        _compare(result, stages, *((3, 96) if quick else (7, 192)))
    return result


def _compare(result: dict[str, Any], stages: int, rounds: int, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        networks = [LocalNetwork(Path(name) / str(count)) for count in (1, stages)]
        try:
            for network in networks:
                network.folder.mkdir()
            whole, staged = (Side(network, count) for network, count in zip(networks, (1, stages), strict=True))
            found: dict[Side, list[Stream]] = {whole: [], staged: []}
            for side in found:
                side.ask(16)
            for _ in range(rounds):
                for side, streams in found.items():
                    streams.append(side.ask(tokens))
            result["whole_tokens_per_s"][str(stages)] = [round(stream.tokens_per_s, 2) for stream in found[whole]]
            _note_speed(result, staged, found[staged])
        finally:
            for network in networks:
                network.__exit__(None, None, None)


def _full(side: Side) -> list[dict[str, Any]]:
    """The stages while one job fills nearly all of their cells."""
    cells = side.shards()[0]["cells"]
    tokens = 48
    prompt = "word " * (min(cells, 4096) - tokens - 64)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, side.network.url, side.key, tokens, prompt)
        shards: list[dict[str, Any]] = []
        while not answer.done():
            shards = side.shards()
            time.sleep(0.05)
        answer.result()
    return shards


def _note_speed(result: dict[str, Any], side: Side, streams: Sequence[Stream]) -> None:
    result["tokens_per_s"][str(side.stages)] = [round(stream.tokens_per_s, 2) for stream in streams]
    hops, wires = [], []
    for stream in streams:
        laps = stream.tokens  # the prompt's one lap in place of the last token's
        compute_ms = sum(stage["compute_ms"] for stage in stream.metadata["route"]) / laps
        hops.append((statistics.median(stream.gaps_ms) - compute_ms) / side.stages)
        wires.append(stream.metadata["wire_ms"] / laps / side.stages)
    result["hop_ms"][str(side.stages)] = statistics.median(hops)
    result["wire_ms_a_hop"][str(side.stages)] = statistics.median(wires)
    for shard in _full(side):
        known = shard["weights_bytes"] + shard["kv_bytes"] + shard["compute_bytes"]
        rss = psutil.Process(shard["pid"]).memory_info().rss
        kept = shard.get("stage", {}).get("kept_bytes", 0)  # in the node's process
        result["memory"].append(
            {
                "stages": side.stages,
                "layers": shard["layers"],
                "rss_mb": round(rss / 1e6, 1),
                "beside_mb": round((rss - known) / 1e6, 1),
                "predicted_mb": round(shard["bytes_needed"] / 1e6, 1),
                "predicted_by_used": shard["bytes_needed"] / (rss + kept),
                "beside_bytes": rss - known,
            }
        )


class DelayProxy:
    """Passes a TCP connection on and holds every byte back for ``delay_s``, in both directions, without limiting how much is under way."""

    def __init__(self, target: tuple[str, int], delay_s: float) -> None:
        self._target, self.delay_s = target, delay_s
        self.port = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    async def _serve(self, stream: trio.SocketStream) -> None:
        other = await trio.open_tcp_stream(*self._target)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, stream, other)
            nursery.start_soon(self._pass, other, stream)

    async def _pass(self, source: trio.SocketStream, target: trio.SocketStream) -> None:
        waiting: deque[tuple[float, bytes]] = deque()
        more = trio.Event()

        async def send() -> None:
            nonlocal more
            while True:
                while waiting:
                    due_s, data = waiting.popleft()
                    await trio.sleep_until(due_s - _SPIN_S)
                    while trio.current_time() < due_s:  # timers are a millisecond late
                        await trio.lowlevel.checkpoint()
                    await target.send_all(data)
                more = trio.Event()
                await more.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            try:
                while data := bytes(await source.receive_some(65536)):
                    waiting.append((trio.current_time() + self.delay_s, data))
                    more.set()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the bench is over
            nursery.cancel_scope.cancel()


def _port(address: str) -> int:
    return int(address.split("/tcp/")[1].split("/")[0])


async def _delayed(delay_ms: float, tokens: int) -> float:
    """Median milliseconds of a token over a ring of three stages that compute nothing."""
    async with open_stage_net() as net:
        route, driver = await net.ring(STAGES)
        for index, island in enumerate(route):
            after = route[(index + 1) % STAGES]
            proxy = DelayProxy(("127.0.0.1", _port(after.host.addresses()[0])), delay_ms / 1e3)
            await net.nursery.start(proxy.run)
            net.proxies[island.peer, after.peer] = f"/ip4/127.0.0.1/tcp/{proxy.port}"
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, [1, 2, 3]))
        laps = []
        for position in range(3, 3 + tokens):
            started_s = time.perf_counter()
            await driver.step((sequence, position, [position]))
            laps.append((time.perf_counter() - started_s) * 1e3)
        return statistics.median(laps)


async def _many(jobs: int, tokens: int) -> float:
    """Rows per second of so many jobs over three stages of COMPUTE_S a row each, the driver's own included."""
    async with open_stage_net() as net:
        route, driver = await net.ring(STAGES, COMPUTE_S)
        own = trio.Lock()  # the driver's engine computes one row at a time
        sequences = [driver.begin(number, net.ticket(route)) for number in range(1, jobs + 1)]
        for sequence in sequences:
            await driver.step((sequence, 0, [1]))
        started_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for sequence in sequences:
                nursery.start_soon(partial(_decode, driver, sequence, tokens, own))
        return jobs * tokens / (time.perf_counter() - started_s)


async def _decode(driver: EchoDriver, sequence: int, tokens: int, own: trio.Lock) -> None:
    for position in range(1, tokens + 1):
        await driver.step((sequence, position, [position]))
        async with own:
            await trio.sleep(COMPUTE_S)


def run(quick: bool) -> dict[str, Any]:
    result = _speed(quick)
    tokens = 20 if quick else 60
    result["delays"] = {str(delay): trio.run(_delayed, delay, tokens) for delay in DELAYS_MS}
    one, eight = trio.run(_many, 1, 10 if quick else 20), trio.run(_many, 8, 10 if quick else 20)
    result["concurrency"] = {"one": one, "eight": eight}
    speed, whole = statistics.median(result["tokens_per_s"]["2"]), statistics.median(result["whole_tokens_per_s"]["2"])
    over_ms = max(lap - STAGES * int(delay) for delay, lap in result["delays"].items()) / STAGES
    worst = max((abs(entry["predicted_by_used"] - 1) for entry in result["memory"]), default=1.0)
    beside = max((entry["beside_bytes"] for entry in result["memory"]), default=2 * PROCESS_BYTES_BAR)
    result["bars"] = [
        bars.at_least("two Islands / whole model, tokens/s of one stream, 1 thread each", speed / whole, 0.80),
        bars.at_most("software cost of a hop, p50, ms (two stages)", result["hop_ms"]["2"], 1.0),
        bars.at_most("software cost of a hop, p50, ms (three stages)", result["hop_ms"]["3"], 1.0),
        bars.at_most("time a token beyond the delays of 0 to 100 ms, worst, ms a hop", over_ms, 1.0),
        bars.at_least("8 jobs / 1 job over 3 stages of 20 ms, throughput", eight / one, 2.6),
        bars.at_most("a stage's process beside weights, KV and buffers, worst / 80 MiB", beside / PROCESS_BYTES_BAR, 1.0),
        bars.at_most("predicted / used memory of a stage, worst distance from 1", worst, 0.05),
    ]
    return result


def table(result: dict[str, Any]) -> str:
    lines = ["| stages | tokens/s, median (all rounds) | whole model | software a hop, ms | of it on the wire |", "|---|---|---|---|---|"]
    for stages, values in result["tokens_per_s"].items():
        whole = statistics.median(result["whole_tokens_per_s"][stages])
        told = f"{result['hop_ms'][stages]:.2f} | {result['wire_ms_a_hop'][stages]:.2f}"
        lines.append(f"| {stages} | {statistics.median(values):.1f} ({', '.join(map(str, values))}) | {whole:.1f} | {told} |")
    lines += ["", "| one-way delay, ms | token, ms | sum of delays |", "|---|---|---|"]
    lines += [f"| {delay} | {lap:.2f} | {STAGES * int(delay)} |" for delay, lap in result["delays"].items()]
    lines += ["", "| stages | layers | RSS, MB | beside weights, KV, buffers | predicted, MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {m['stages']} | {m['layers']} | {m['rss_mb']} | {m['beside_mb']} | {m['predicted_mb']} |" for m in result["memory"]
    ]
    one, eight = result["concurrency"]["one"], result["concurrency"]["eight"]
    return "\n".join([*lines, "", f"3 stages of 20 ms: one job {one:.1f} tokens/s, eight jobs {eight:.1f}"])


__all__ = ["ask", "run", "table"]
