"""Echo through the whole path (client, Coordinator, libp2p, Island and back) beside the LiteLLM proxy before an equally trivial upstream.

Three servers answer the same request: a bare aiohttp handler, LiteLLM in front of it, and our Coordinator with one Island that serves
``echo``. Each is measured from this process with keep-alive connections: the time of one request at one client, requests per second at 16.
The client is a bare asyncio protocol that only looks for the end of an answer, so it costs a few dozen microseconds a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bars import at_least, at_most

CLIENTS = 16
ADDED_MS_MAX = 3.0  # the bars
RATIO_MIN = 10.0
BARE, LITELLM, OURS = "bare aiohttp handler", "LiteLLM proxy", "Archipelag, whole path"
_LITELLM = Path(".venv-bench/bin/litellm")
_START_S = 120.0
_BODY = json.dumps(
    {"model": "echo", "messages": [{"role": "user", "content": "the quick brown fox jumps over the lazy dog"}]}
).encode()
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    port: int
    key: str
    pid: int = 0  # where the whole of it can be frozen while others are measured: its process group


class _Client(asyncio.Protocol):
    """One keep-alive connection that sends the next request as soon as an answer is complete."""

    def __init__(self, request: bytes, load: _Load) -> None:
        self._request, self._load = request, load
        self._buffer = bytearray()
        self._expected = 0
        self._sent_s = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        if not self._load.take():
            self._transport.close()
            return
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._expected:
            self._expected = _expected_bytes(self._buffer)
        done = len(self._buffer) >= self._expected if self._expected > 0 else self._buffer.endswith(b"\r\n0\r\n\r\n")
        if not self._expected or not done:
            return
        self._load.done(time.perf_counter() - self._sent_s, bytes(self._buffer))
        self._buffer.clear()
        self._expected = 0
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.closed()


def _expected_bytes(buffer: bytearray) -> int:
    """Bytes of the whole answer; 0 while its headers are incomplete, -1 where it comes in chunks."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return 0
    length = _LENGTH.search(buffer, 0, end + 2)
    return end + 4 + int(length[1]) if length else -1


class _Load:
    """Shares ``count`` requests among the clients and collects their times."""

    def __init__(self, count: int, clients: int) -> None:
        self._left, self._open = count, clients
        self.times_s: list[float] = []
        self.failed = 0
        self.failure = b""
        self.ended = asyncio.Event()

    def take(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def done(self, seconds: float, answer: bytes) -> None:
        self.times_s.append(seconds)
        if not answer.startswith(b"HTTP/1.1 200") or b'"error"' in answer:
            self.failed += 1
            self.failure = answer

    def closed(self) -> None:
        self._open -= 1
        if not self._open:
            self.ended.set()


async def _drive(target: Target, clients: int, count: int, path: str, body: bytes) -> dict[str, float]:
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\nAuthorization: Bearer {target.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    load = _Load(count, clients)
    loop = asyncio.get_running_loop()
    started_s = time.perf_counter()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(request, load), "127.0.0.1", target.port)
    await load.ended.wait()
    took_s = time.perf_counter() - started_s
    if load.failed or len(load.times_s) != count:
        lost = count - len(load.times_s)
        text = load.failure.decode(errors="replace")
        raise RuntimeError(
            f"{target.name}: {load.failed} of {count} requests failed, {lost} lost; the last failure: {text}"
        )
    ordered = sorted(load.times_s)
    return {
        "requests_per_s": round(count / took_s, 1),
        "p50_ms": round(statistics.median(ordered) * 1000, 3),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1000, 3),
    }


def drive(target: Target, clients: int, count: int, stream: bool = False) -> dict[str, float]:
    """Sends ``count`` requests over ``clients`` connections. Raises RuntimeError when one is not answered with 200."""
    body = json.dumps({**json.loads(_BODY), "stream": True}).encode() if stream else _BODY
    return drive_at(target, clients, count, "/v1/chat/completions", body)


def drive_at(target: Target, clients: int, count: int, path: str, body: bytes) -> dict[str, float]:
    """The same with a body of one's own."""
    return asyncio.run(_drive(target, clients, count, path, body))


def serve_upstream(port: int) -> None:
    """The trivial upstream: reads the request and answers with its last message."""
    from aiohttp import web

    async def chat(request: web.Request) -> web.Response:
        content = (await request.json())["messages"][-1]["content"]
        tokens = len(content.split())
        message = {"role": "assistant", "content": content, "refusal": None}
        answer = {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": "echo",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": tokens, "completion_tokens": tokens, "total_tokens": 2 * tokens},
        }
        return web.json_response(answer)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def process(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[int]:
    """A child in a process group of its own; gives its id."""
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | (environment or {}), start_new_session=True
        )
    try:
        yield child.pid
    finally:
        os.killpg(child.pid, signal.SIGCONT)
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_answers(target: Target, log: Path) -> None:
    """Until a request is answered with 200."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            drive(target, 1, 1)
            return
        except (OSError, RuntimeError):
            if time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{target.name} does not answer after {_START_S:.0f} s:\n{tail}") from None
            time.sleep(0.2)


@contextlib.contextmanager
def _upstream(folder: Path) -> Iterator[Target]:
    target, log = Target(BARE, _free_port(), "none"), folder / "upstream.log"
    with process([sys.executable, "-m", "bench.echo_http", "upstream", str(target.port)], log):
        _wait_answers(target, log)
        yield target


@contextlib.contextmanager
def _litellm(folder: Path, upstream: Target) -> Iterator[Target]:
    target, log = Target(LITELLM, _free_port(), "sk-bench"), folder / "litellm.log"
    parameters = {"model": "openai/echo", "api_base": f"http://127.0.0.1:{upstream.port}/v1", "api_key": "none"}
    settings = {
        "model_list": [{"model_name": "echo", "litellm_params": parameters}],
        "general_settings": {"master_key": target.key},
        "litellm_settings": {"telemetry": False, "set_verbose": False},
    }
    config = folder / "litellm.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    command = [str(_LITELLM), "--config", str(config), "--host", "127.0.0.1", "--port", str(target.port)]
    with process(command, log, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}) as pid:
        _wait_answers(target, log)
        yield dataclasses.replace(target, pid=pid)


@contextlib.contextmanager
def _archipelag(folder: Path) -> Iterator[Target]:
    """A Coordinator and one Island, as processes of their own."""
    from node.localnet import LocalNetwork

    with LocalNetwork(folder) as network:
        url = str(network.start_coordinator()["http"])
        network.start_island("island", "--cargo", "echo").wait_ready()
        target = Target(OURS, int(url.rsplit(":", 1)[1]), network.make_key())
        _wait_answers(target, folder / "coordinator.log")
        yield target


def _round(target: Target, quick: bool) -> dict[str, Any]:
    """One client, then 16. A slow server gets fewer requests so that each figure takes about as long."""
    single, many = (60, 160) if quick else (200, 600)
    if target.name != LITELLM:
        single, many = single * 5, many * 10
    return {"one_client": drive(target, 1, single), "clients_16": drive(target, CLIENTS, many)}


@contextlib.contextmanager
def _alone(target: Target, targets: list[Target]) -> Iterator[None]:
    """What can be frozen is, so that its background work does not count against the one that is measured."""
    frozen = [other.pid for other in targets if other.pid and other is not target]
    for pid in frozen:
        os.killpg(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in frozen:
            os.killpg(pid, signal.SIGCONT)


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {
        kind: {figure: statistics.median(one[kind][figure] for one in rounds) for figure in rounds[0][kind]}
        for kind in rounds[0]
    }


def run(quick: bool = False) -> dict[str, Any]:
    """All three stay up; rounds alternate between them, each figure is the median of its rounds."""
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        upstream = stack.enter_context(_upstream(folder))
        targets = [upstream, *([stack.enter_context(_litellm(folder, upstream))] if _LITELLM.exists() else [])]
        ours = stack.enter_context(_archipelag(folder))
        targets.append(ours)
        for target in targets:
            drive(target, CLIENTS, 60 if target.name == LITELLM else 1000)  # warms up
        found: dict[str, list[dict[str, Any]]] = {target.name: [] for target in targets}
        streamed = []
        for _ in range(2 if quick else 5):
            for target in targets:
                with _alone(target, targets):
                    found[target.name].append(_round(target, quick))
            with _alone(ours, targets):
                streamed.append({"clients_16": drive(ours, CLIENTS, 160 if quick else 800, stream=True)})
    rows = [{"name": name, **_medians(rounds)} for name, rounds in found.items()]
    return _report(rows, _medians(streamed)["clients_16"])


def _added_ms(row: dict[str, Any], bare: dict[str, Any]) -> float:
    return float(row["one_client"]["p50_ms"] - bare["one_client"]["p50_ms"])


def _report(rows: list[dict[str, Any]], streamed: dict[str, float]) -> dict[str, Any]:
    by_name = {row["name"]: row for row in rows}
    whole = by_name[OURS]
    found = [at_most("echo, added latency, ms p50 at one client", _added_ms(whole, by_name[BARE]), ADDED_MS_MAX)]
    if LITELLM in by_name:
        ratio = whole["clients_16"]["requests_per_s"] / by_name[LITELLM]["clients_16"]["requests_per_s"]
        found.append(at_least(f"echo, requests/s over LiteLLM's, {CLIENTS} clients", ratio, RATIO_MIN))
    return {"bench": "echo_http", "rows": rows, "streamed_16_clients": streamed, "bars": found}


def table(result: dict[str, Any]) -> str:
    bare = result["rows"][0]
    lines = [f"{'echo over HTTP':<26}{'1 client p50':>14}{'added':>10}{'16 clients':>16}{'p99':>10}"]
    for row in result["rows"]:
        one, many = row["one_client"], row["clients_16"]
        lines.append(
            f"{row['name']:<26}{one['p50_ms']:>11.2f} ms{_added_ms(row, bare):>7.2f} ms"
            f"{many['requests_per_s']:>10.0f} req/s{many['p99_ms']:>7.1f} ms"
        )
    streamed = result["streamed_16_clients"]
    lines.append(f"{'Archipelag, streamed':<26}{'':>14}{'':>10}{streamed['requests_per_s']:>10.0f} req/s{streamed['p99_ms']:>7.1f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["upstream"]:
        serve_upstream(int(sys.argv[2]))
    else:
        print(table(run(quick="--quick" in sys.argv)))
