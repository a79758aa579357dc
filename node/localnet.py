"""A network of real node processes on this machine, on loopback: what the demo shows, the tests break and the benchmarks measure.

Each node is its own ``archipelag-node`` process with its own identity and data folder, started by id and ended by id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator.keys import create_key
from node.database import database_url
from protocol.errors import ArchipelagError

START_TIMEOUT_S = 300.0  # loading takes seconds; a first start on a slow disk takes longer
STOP_TIMEOUT_S = 35.0  # a drain takes at most 30
_LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class NodeFailed(ArchipelagError):
    """A node did not start, or ended by itself; the text has the end of its log."""


class LocalNode:
    """One child process and its files."""

    def __init__(
        self,
        name: str,
        folder: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        common: Sequence[str] = ("--no-mdns",),
    ) -> None:
        """``common``: what every start of this kind of node gets."""
        self.name, self.folder, self._common = name, folder, list(common)
        self.data_dir = folder / name
        self.log_file, self._ready_file = folder / f"{name}.log", folder / f"{name}.ready"
        self._arguments, self._environment = list(arguments), dict(environment or {})
        self.process = self._spawn()

    def __repr__(self) -> str:
        return f"<LocalNode {self.name}, pid {self.process.pid}, {'running' if self.running else 'ended'}>"

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "node", *self._arguments, "--data-dir", str(self.data_dir)]
        command += ["--ready-file", str(self._ready_file), *self._common]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | self._environment
        with open(self.log_file, "ab") as log:
            # A session of its own: Ctrl-C reaches whoever started the network, who then stops the nodes in order.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The ready file's content. Raises NodeFailed when the process ends first, or in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._ready_file.exists():
                facts: dict[str, Any] = json.loads(self._ready_file.read_text())
                return facts
            if not self.running:
                raise NodeFailed(f"{self.name} ended with status {self.process.returncode}:\n{self._log_end()}")
            time.sleep(0.02)
        raise NodeFailed(f"{self.name} was not ready within {timeout_s:.0f} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join(f"  {line}" for line in self.log().splitlines()[-8:])

    def signal(self, number: int) -> None:
        if self.running:
            self.process.send_signal(number)

    def kill(self) -> None:
        """As a power cut would: no drain, no goodbye."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, then what it exits with; killed when it takes longer than a drain may."""
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def restart(self) -> dict[str, Any]:
        """A new process on the same data folder and with the same arguments."""
        self.start_again()
        return self.wait_ready()

    def start_again(self) -> None:
        """``restart`` that does not wait."""
        self.process = self._spawn()

    def keep_ports(self, facts: Mapping[str, Any]) -> None:
        """From now on it is started on the ports that it got, as its ready file tells them."""
        web, peers = str(facts["http"]).rpartition(":")[2], str(facts["addresses"][0]).split("/")[4]
        for option, any_port, port in (("--http", ":0", f":{web}"), ("--listen", "/tcp/0", f"/tcp/{peers}")):
            index = self._arguments.index(option) + 1
            value = self._arguments[index]
            self._arguments[index] = value.removesuffix(any_port) + port if value.endswith(any_port) else value


class LocalNetwork:
    """Coordinators, mostly one, and Islands. Leaving the context stops them all.

    >>> with LocalNetwork(folder) as network:
    ...     network.start_coordinator(); island = network.start_island("one", "--cargo", "echo"); island.wait_ready()
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder, self._environment = folder, dict(environment or {})
        self.nodes: list[LocalNode] = []
        self.coordinator: LocalNode | None = None  # the first
        self.url = ""
        self.urls: list[str] = []
        self._database_url = ""

    def __enter__(self) -> LocalNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self.nodes):
            node.signal(signal.SIGTERM)
        for node in reversed(self.nodes):
            node.stop()

    def _start(self, name: str, arguments: Sequence[str]) -> LocalNode:
        node = LocalNode(name, self.folder, arguments, self._environment)
        self.nodes.append(node)
        return node

    def start_coordinator(
        self,
        http: str = "127.0.0.1:0",
        *more: str,
        listen: str = _LOOPBACK,
        name: str = "coordinator",
        database_url: str = "",
    ) -> dict[str, Any]:
        """Starts it and waits until it serves; returns its ready file. It keeps its ports when it is restarted.

        ``database_url``: where it is not SQLite in its data folder; a second Coordinator needs the first one's, and serves its network.
        """
        arguments = ["coordinator", "--http", http, "--listen", listen, *more]
        if database_url:
            arguments += ["--database-url", database_url]
        if self.coordinator is not None:
            arguments += ["--network-of", str(self.coordinator.data_dir)]
        node = self._start(name, arguments)
        facts = node.wait_ready()
        node.keep_ports(facts)
        if self.coordinator is None:
            self.coordinator, self.url, self._database_url = node, str(facts["http"]), database_url
        self.urls.append(str(facts["http"]))
        return facts

    def node(self, name: str) -> LocalNode:
        return next(node for node in self.nodes if node.name == name)

    def start_island(self, name: str, *more: str, coordinator: str = "") -> LocalNode:
        """Starts it and returns at once; call ``wait_ready`` on it. It joins all Coordinators that have been started, or one."""
        joined = [part for url in ([coordinator] if coordinator else self.urls) for part in ("--coordinator", url)]
        return self._start(name, ["start", *joined, "--listen", _LOOPBACK, *more])

    def start_bridge(self, name: str, key: str, *more: str, coordinator: str = "") -> LocalNode:
        """Starts it and returns at once; ``http`` of its ready file is where it serves."""
        arguments = ["bridge", "--coordinator", coordinator or self.url, "--http", "127.0.0.1:0", *more]
        node = LocalNode(name, self.folder, arguments, self._environment | {"ARCHIPELAG_API_KEY": key}, ())
        self.nodes.append(node)
        return node

    def make_key(self, *scopes: str, account: str = "local", rate_limit: int = 0) -> str:
        assert self.coordinator is not None, "the key lives in the Coordinator's database"
        url = database_url(str(self.coordinator.data_dir), self._database_url or None)
        return create_key(url, account, scopes or ("read", "write"), rate_limit)
