"""The demo of A/B tests: two releases of a Cargo that really differ, requests of many users, and a name that moves by itself.

Everything runs for real: the commands are those that users have, each node is its own ``archipelag-node`` process, both releases are
WebAssembly in the Islands' sandbox (demo_ab_programs), the figures are those of the Coordinator's books, and the Island that serves the
name gets the new release from the other one.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from coordinator.abtests.plan import AbState
from node import ab_table
from node.ab_client import AbClient
from node.control import ask_node
from node.demo_ab_programs import ABOUT, BELOW_MAX, module
from node.demo_client import DemoFailed, say
from node.localnet import LocalNetwork, LocalNode

NAME, OLD, NEW = "primes", "1.0.0", "2.0.0"
FIRST_BELOW = 200_001  # the first user's number; each has another one, for equal questions are answered from the cache
_AGAIN_EVERY = 10  # each so many-th user asks twice
_CLIENTS = 2
_TABLE_S = 5.0  # between two looks at the results
_MINIMUM_SAMPLES = 100  # users in each variant
_PROMOTED_S_MAX = 150.0
_FOLLOWED_S_MAX = 20.0
_POLL_S = 0.1
_ADDRESS_CHARS = 16
_ASKED = 15  # before and after
_TIMEOUT_S = 60.0
_CARGO_TOML = """name = "{name}"
release = "{release}"
runtime = "wasm"
entry = "module.wasm"
licence = "Apache-2.0"
ask = "0.001"
description = "how many primes there are below a number, by {about}"

[files."module.wasm"]

[needs]
memory_mb = 64
time_s = 10
"""


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: ``seconds`` until all of it was there, ``variant`` where it counts for a test."""

    seconds: float
    variant: str
    is_cached: bool


@dataclass(frozen=True, slots=True)
class Shell:
    """The command line of a publisher at this Coordinator."""

    folder: Path
    url: str
    key: str
    out: TextIO

    def run(self, *arguments: str) -> str:
        """Shows a command and what it prints. Raises DemoFailed."""
        say(self.out, f"    $ archipelag-node {' '.join(arguments)}")
        environment = os.environ | {"ARCHIPELAG_COORDINATOR": self.url, "ARCHIPELAG_API_KEY": self.key}
        environment |= {"ARCHIPELAG_DATA_DIR": str(self.folder / "publisher"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "node", *arguments]
        nothing = subprocess.DEVNULL
        done = subprocess.run(command, cwd=self.folder, env=environment, stdin=nothing, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoFailed(f"archipelag-node {arguments[0]} {arguments[1]} failed: {done.stderr[-1000:]}")
        for line in done.stdout.splitlines():
            say(self.out, f"    {line}".rstrip())
        return done.stdout


def run_ab_demo(out: TextIO) -> None:
    """Raises DemoFailed, NodeFailed or ConfigError; Ctrl-C ends it in order."""
    with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as name, LocalNetwork(Path(name)) as network:
        folder = Path(name)
        network.start_coordinator()
        shell = Shell(folder, network.url, network.make_key(account="publisher"), out)
        say(out, f"1/5 {NAME} {OLD} counts primes by {ABOUT[OLD]}, {NEW} by {ABOUT[NEW]}; it is a candidate, so the name stays where it is")
        files = [_pack(shell, OLD), _pack(shell, NEW)]
        shell.run("cargo", "publish", files[0])
        shell.run("cargo", "publish", files[1], "--candidate")
        say(out, f"2/5 island-1 serves {NAME}, island-2 {NAME}@{NEW}; they get the files from the publisher's Islands, which go then")
        follower, tester = _start_islands(network, files)
        addresses = {OLD: _serves(follower)[0], NEW: _serves(tester)[0]}
        users = Users(network.url, network.make_key(account="users"))
        before = _ask_some(users, "before", out)
        say(out, "3/5 the test")
        test_id = _create(shell)
        client = AbClient(network.url, shell.key)
        say(out, f"4/5 users ask, {_CLIENTS} at a time, until the test promotes a variant by itself")
        with users.asking():
            _wait_promoted(client, test_id, users, out)
            _wait(f"{follower.name} to follow", lambda: _serves(follower) == [addresses[NEW]])
        counted = f"{users.asked:,} answers, {users.cached:,} of them from the cache"
        say(out, f"\n    {counted}; all of them are right, and who asked twice had the same variant twice\n")
        say(out, f"5/5 what has happened, and what {NAME} stands for now")
        shell.run("ab", "show", test_id)
        moved = f"{addresses[OLD][:_ADDRESS_CHARS]} → {addresses[NEW][:_ADDRESS_CHARS]}"
        say(out, f"\n    {follower.name}, which was started with --cargo {NAME}, has followed: {moved}, {NAME} {NEW}")
        tester.stop()
        say(out, f"    island-2 has gone; {follower.name} serves {NAME} alone")
        after = _ask_some(users, "after", out)
        if after >= before:
            raise DemoFailed(f"requests took {before:.1f} ms before the promotion and {after:.1f} ms after it")
        shell.run("ab", "rollback", test_id)
        _wait(f"{follower.name} to go back", lambda: _serves(follower) == [addresses[OLD]])
        say(out, f"    {follower.name} has gone back to {addresses[OLD][:_ADDRESS_CHARS]}, {NAME} {OLD}")
        say(out, "stopping …")


# -- Cargos and Islands


def _pack(shell: Shell, release: str) -> str:
    """The file of a release, signed."""
    home = shell.folder / f"{NAME}-{release}"
    home.mkdir()
    (home / "cargo.toml").write_text(_CARGO_TOML.format(name=NAME, release=release, about=ABOUT[release]), encoding="utf-8")
    (home / "module.wasm").write_bytes(module(release))
    shell.run("cargo", "build", home.name)
    shell.run("cargo", "sign", home.name)
    return f"{home.name}/{home.name}.cargo"


def _start_islands(network: LocalNetwork, files: list[str]) -> tuple[LocalNode, LocalNode]:
    """Each with a store of its own, so that files have to come from other Islands."""

    def start(name: str, cargo: str) -> LocalNode:
        return network.start_island(name, "--cargo", cargo, "--cache-dir", str(network.folder / f"{name}-cache"))

    publishers = [start(f"publisher-{number}", str(network.folder / file)) for number, file in enumerate(files, 1)]
    follower, tester = start("island-1", NAME), start("island-2", f"{NAME}@{NEW}")
    for node in (follower, tester, *publishers):
        node.wait_ready()
    for node in publishers:
        node.stop()
    return follower, tester


def _serves(island: LocalNode) -> list[str]:
    """Addresses of the Cargos that an Island runs."""
    return [str(one["content_hash"]) for one in ask_node(str(island.data_dir), "status")["cargos"]]


# -- users


@dataclass
class Users:
    """One after the other, each with a question of his own; any thread may ask."""

    url: str
    key: str
    asked: int = 0
    cached: int = 0
    _number: int = 0
    _failure: str = ""
    _right: list[int] = field(default_factory=lambda: primes_below(BELOW_MAX))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises DemoFailed for what went wrong with an answer."""
        if self._failure:
            raise DemoFailed(self._failure)

    @contextmanager
    def asking(self) -> Iterator[None]:
        with ThreadPoolExecutor(_CLIENTS) as pool:
            running = [pool.submit(self._ask_on) for _ in range(_CLIENTS)]
            try:
                yield
            finally:
                self._stop.set()
            for one in running:
                one.result()
        self.check()

    def ask_one(self, connection: http.client.HTTPConnection) -> Told:
        """A new user's question, which some ask twice. Raises DemoFailed."""
        with self._lock:
            self._number += 1
            number = self._number
        told = self._ask(connection, number)
        if number % _AGAIN_EVERY == 0:
            again = self._ask(connection, number)
            if told.variant and again.variant not in (told.variant, ""):  # none: the test has ended meanwhile
                raise DemoFailed(f"user-{number} has asked twice, and got {told.variant} and {again.variant}")
        return told

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=_TIMEOUT_S)

    def _ask_on(self) -> None:
        try:
            with closing(self.connect()) as connection:
                while not self._stop.is_set():
                    self.ask_one(connection)
        except (DemoFailed, OSError, http.client.HTTPException) as error:
            self._failure = self._failure or str(error)
            self._stop.set()

    def _ask(self, connection: http.client.HTTPConnection, number: int) -> Told:
        below = FIRST_BELOW + number - 1
        body = {"cargo": NAME, "input": {"below": below}, "user": f"user-{number}", "stream": True}
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        started = time.monotonic()
        connection.request("POST", "/api/v1/jobs", json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        took_s = time.monotonic() - started
        if response.status != 200:
            raise DemoFailed(f"the Coordinator answers {response.status}: {text[:1000]}")
        variant = response.getheader("x-archipelag-ab-variant", "")
        if (primes := _primes(text)) != self._right[below]:
            raise DemoFailed(f"there are {self._right[below]} primes below {below}, not {primes}")
        told = Told(took_s, variant, response.getheader("x-archipelag-cache") == "hit")
        with self._lock:
            self.asked += 1
            self.cached += told.is_cached
        return told


def primes_below(most: int) -> list[int]:
    """How many primes there are below each number up to ``most``, by Python, to check answers with."""
    is_prime = bytearray([1]) * most
    is_prime[:2] = bytes(min(2, most))
    for number in range(2, math.isqrt(most) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = bytes(len(range(number * number, most, number)))
    return list(itertools.accumulate(is_prime, initial=0))


def _primes(events: str) -> int:
    """Of a job's events. Raises DemoFailed where it has not succeeded."""
    told = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    result = next((one["result"] for one in told if one["type"] == "output"), None)
    if result is None or told[-1].get("state") != "succeeded":
        raise DemoFailed(f"a job did not succeed: {events[-500:]}")
    return int(result["primes"])


def _ask_some(users: Users, when: str, out: TextIO) -> float:
    """Milliseconds of a request, the median of some."""
    with closing(users.connect()) as connection:
        told = [users.ask_one(connection) for _ in range(_ASKED)]
    took_ms = 1000 * statistics.median(one.seconds for one in told)
    say(out, f"    {when} the test a request for {NAME} takes {took_ms:.1f} ms, the median of {_ASKED}")
    return took_ms


# -- the test


def _create(shell: Shell) -> str:
    """Its id."""
    variants = [part for name, release in (("old", OLD), ("new", NEW)) for part in ("--variant", f"{name}={NAME}@{release}:50")]
    rules = ["--metric", "latency", "--minimum-samples", str(_MINIMUM_SAMPLES), "--minimum-hours", "0", "--guardrail", "success:5"]
    printed = shell.run("ab", "create", "--name", "sieve", "--base", NAME, *variants, *rules, "--activate")
    first, _, _ = printed.partition("\n")
    return first.removeprefix("created ").strip()


def _wait_promoted(client: AbClient, test_id: str, users: Users, out: TextIO) -> None:
    """Shows the results now and then. Raises DemoFailed."""
    deadline, table_at_s = time.monotonic() + _PROMOTED_S_MAX, time.monotonic() + 1.0
    while True:
        users.check()
        results = client.results(test_id)
        ended = results["test"]["state"] in ab_table.ENDED
        if ended or time.monotonic() >= table_at_s:
            table_at_s = time.monotonic() + _TABLE_S
            say(out, "\n" + "\n".join(f"    {line}".rstrip() for line in ab_table.results_lines(results)))
        if ended:
            break
        if time.monotonic() > deadline:
            raise DemoFailed(f"the test has promoted nothing within {_PROMOTED_S_MAX:.0f} s")
        time.sleep(_POLL_S)
    if results["test"]["state"] != AbState.PROMOTED or results["test"]["winner"] != "new":
        raise DemoFailed(f"the test has ended otherwise: {ab_table.ended_words(results['test'])}")


def _wait(what: str, has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _FOLLOWED_S_MAX
    while not has_happened():
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {_FOLLOWED_S_MAX:.0f} s for {what}")
        time.sleep(_POLL_S)
