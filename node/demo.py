"""The demo: a Coordinator and Islands as processes on this machine, a key, and one answer streamed through the OpenAI API.

Everything runs for real: each node is its own ``archipelag-node`` process with its own identity, on loopback. Their data lives in a
temporary folder that goes with them; the model stays in the user's cache.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from protocol.errors import ArchipelagError, ConfigError
from runtimes.store import ModelStore

MODEL = "smollm2-135m"
SYSTEM = "You are a helpful AI assistant."  # with the template's own system prompt this model does not name Paris
_START_TIMEOUT_S = 300.0  # loading takes seconds; a first start on a slow disk takes longer
_STOP_TIMEOUT_S = 35.0
_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class DemoConfig:
    prompt: str
    islands: int = 2
    once: bool = False
    http: str = "127.0.0.1:8080"
    http_chosen: bool = False  # the user named the port, so another one would be a surprise


class DemoFailed(ArchipelagError):
    """A node of the demo did not start or ended; the text has the end of its log."""


class Node:
    """One child process and its files."""

    def __init__(self, name: str, folder: Path, arguments: list[str]) -> None:
        self.name, self._log, self._ready_file = name, folder / f"{name}.log", folder / f"{name}.ready"
        command = [sys.executable, "-m", "node", *arguments, "--ready-file", str(self._ready_file), "--no-mdns"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open(self._log, "wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which then stops its nodes in order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self) -> dict[str, Any] | None:
        """The ready file's content once it is there. Raises DemoFailed when the process has ended."""
        if self._ready_file.exists():
            facts: dict[str, Any] = json.loads(self._ready_file.read_text())
            return facts
        if self.process.poll() is not None:
            raise DemoFailed(f"{self.name} ended with status {self.process.returncode}:\n{self.log_end()}")
        return None

    def log_end(self) -> str:
        return "\n".join(f"  {line}" for line in self._log.read_text(errors="replace").splitlines()[-8:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait_stopped(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_demo(config: DemoConfig, out: TextIO) -> None:
    """Raises DemoFailed or ConfigError; Ctrl-C ends it in order."""
    started = time.monotonic()
    _say(out, f"1/4 model {MODEL}")
    ModelStore().fetch(MODEL)
    with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as name, _nodes() as nodes:
        folder = Path(name)
        _say(out, "2/4 Coordinator")
        url = _start_coordinator(config, folder, nodes, out)
        _say(out, f"3/4 {config.islands} Islands, each loading the model with one thread")
        islands = _start_islands(config, folder, url, nodes)
        key = _make_key(folder)
        _say(out, f"4/4 answer ({time.monotonic() - started:.1f} s after the start)\n")
        _ask(url, key, config.prompt, islands, out)
        if not config.once:
            _stay(url, key, nodes, out)


def _say(out: TextIO, text: str) -> None:
    print(text, file=out, flush=True)


@contextlib.contextmanager
def _nodes() -> Iterator[list[Node]]:
    """A list whose nodes are stopped at the end, whatever happens."""
    nodes: list[Node] = []
    try:
        yield nodes
    finally:
        for node in reversed(nodes):
            node.stop()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for node in reversed(nodes):
            node.wait_stopped(deadline)


def _wait(node: Node) -> dict[str, Any]:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        facts = node.ready()
        if facts is not None:
            return facts
        time.sleep(0.05)
    raise DemoFailed(f"{node.name} was not ready within {_START_TIMEOUT_S:.0f} s:\n{node.log_end()}")


def _start_coordinator(config: DemoConfig, folder: Path, nodes: list[Node], out: TextIO) -> str:
    address = config.http
    if not config.http_chosen and not _is_free(address):
        _say(out, f"    {address} is taken, so a free port is used")
        address = f"{address.rpartition(':')[0]}:0"
    arguments = [
        "coordinator",
        "--data-dir",
        str(folder / "coordinator"),
        "--http",
        address,
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
    ]
    nodes.append(Node("coordinator", folder, arguments))
    return str(_wait(nodes[-1])["http"])


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def _start_islands(config: DemoConfig, folder: Path, url: str, nodes: list[Node]) -> dict[str, str]:
    """Names by peer id."""
    islands = []
    for number in range(1, config.islands + 1):
        arguments = ["start", "--data-dir", str(folder / f"island-{number}"), "--coordinator", url, "--cargo", MODEL]
        arguments += ["--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1"]
        islands.append(Node(f"island-{number}", folder, arguments))
        nodes.append(islands[-1])
    return {_wait(node)["peer_id"]: node.name for node in islands}


def _make_key(folder: Path) -> str:
    from coordinator.keys import create_key
    from node.database import database_url

    return create_key(database_url(str(folder / "coordinator"), None), "local", ("read", "write"))


def _ask(url: str, key: str, prompt: str, islands: dict[str, str], out: TextIO) -> None:
    """Streams the answer as it comes, then says who gave it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    body = {
        "model": MODEL,
        "messages": messages,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_ANSWER_TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise DemoFailed(f"the Coordinator answers {answer.status}: {answer.read(2000).decode(errors='replace')}")
        island = answer.getheader("x-archipelag-island", "")
        _say(out, f"> {prompt}")
        last = _print_stream(answer, out)
    _say(out, f"\n\nfrom {islands.get(island, 'an Island')} ({island})")
    usage, metadata = last.get("usage") or {}, last.get("metadata") or {}
    _say(
        out,
        f"{usage.get('completion_tokens')} tokens, price {metadata.get('price')} credits, job {metadata.get('job_id')}",
    )


def _print_stream(answer: http.client.HTTPResponse, out: TextIO) -> dict[str, Any]:
    """Prints the text of an SSE stream; returns its last chunk. Raises DemoFailed for an error in the stream or a stream without end."""
    last: dict[str, Any] = {}
    for raw in answer:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return last
        if not line.startswith("data: "):
            continue
        last = json.loads(line[6:])
        if "error" in last:
            raise DemoFailed(f"the answer broke off: {last['error'].get('message')}")
        for choice in last.get("choices", []):
            out.write(choice["delta"].get("content") or "")
            out.flush()
    raise DemoFailed("the answer ended without [DONE]")


def _stay(url: str, key: str, nodes: list[Node], out: TextIO) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "stream": True})
    _say(out, f"\nbase URL  {url}/v1\nAPI key   {key}\n")
    _say(
        out,
        f"curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'\n",
    )
    _say(out, "Ctrl-C stops the demo.")
    try:
        while all(node.process.poll() is None for node in nodes):
            time.sleep(0.5)
        ended = next(node for node in nodes if node.process.poll() is not None)
        raise DemoFailed(f"{ended.name} ended with status {ended.process.returncode}:\n{ended.log_end()}")
    except KeyboardInterrupt:
        _say(out, "\nstopping …")


def check_islands(count: int) -> int:
    """Raises ConfigError for a number that makes no demo."""
    if not 1 <= count <= 16:
        raise ConfigError("--islands takes 1 to 16; each loads the model and runs one thread")
    return count
