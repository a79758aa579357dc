"""Hold-and-post pairs a second: what the ledger takes from 64 clients and from one, on SQLite and PostgreSQL.

A pair is what a job costs the books at least: a hold that is on disk before the client goes on, and a post of it. Beside it the limit of
the disk: how often a second 4 KiB can be written and flushed. Each client is a thread with an account of its own, and all pay one payee.
The systems take turns, round by round; medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.bars import at_least
from coordinator.books.database import Database, sqlite_url
from coordinator.books.ledger import PlaceHold, PostHold, Share, grant
from coordinator.books.writer import Writer
from tests.postgres import PostgresServer, why_unavailable

CLIENTS = 64
BARS = {"sqlite": 2000, "postgres": 1000}  # pairs/s under 64 clients
_FUNDS = 10**15
_NEVER_MS = 2**50
_FLUSHED_BYTES = 4096


@contextmanager
def _writer(url: str) -> Iterator[Writer]:
    database = Database(url)
    writer = Writer(database)
    try:
        for client in range(CLIENTS):
            writer.do(grant(f"user:{client}", _FUNDS, f"fund:{client}"))
        yield writer
    finally:
        writer.close()
        database.close()


def _pairs(writer: Writer, clients: int, seconds: float, name: str) -> dict[str, float]:
    """Pairs/s of so many threads, and changes in a commit."""
    statistics_ = writer.statistics
    groups, units = statistics_.groups, statistics_.units
    done = [0] * clients
    end_s = time.monotonic() + seconds

    def client(number: int) -> None:
        account = f"user:{number}"
        while time.monotonic() < end_s:
            id = f"{name}:{number}:{done[number]}"
            writer.do(PlaceHold(id, account, 100, _NEVER_MS))
            writer.do(PostHold(id, account, (Share("user:payee", 60),)))
            done[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent_s = time.monotonic() - started_s
    return {"pairs_per_s": sum(done) / spent_s, "group": (statistics_.units - units) / (statistics_.groups - groups)}


def _flushes(folder: Path, seconds: float) -> float:
    """Writes of 4 KiB a second, each flushed before the next."""
    block, count = os.urandom(_FLUSHED_BYTES), 0
    file = os.open(folder / "flushed", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            os.pwrite(file, block, count % 256 * _FLUSHED_BYTES)
            os.fsync(file)
            count += 1
    finally:
        os.close(file)
    return count / seconds


@contextmanager
def _databases(folder: Path) -> Iterator[dict[str, str]]:
    """The URL of each kind that this machine has."""
    urls = {"sqlite": sqlite_url(folder)}
    if why_unavailable() is not None:
        yield urls
        return
    with PostgresServer() as server:
        server.start()
        yield urls | {"postgres": server.new_database()}


def _measure(folder: Path, urls: dict[str, str], rounds: int, seconds: float) -> dict[str, Any]:
    flushes: list[float] = []
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        flushes.append(_flushes(folder, seconds / 2))
        for kind, url in urls.items():
            with _writer(url) as writer:
                for clients in (CLIENTS, 1):
                    pairs = _pairs(writer, clients, seconds, f"{number}.{clients}")
                    found.setdefault(f"{kind}, {clients} client{'s' if clients > 1 else ''}", []).append(pairs)
    medians = {
        name: {key: round(statistics.median(each[key] for each in measured), 1) for key in measured[0]}
        for name, measured in found.items()
    }
    return {"flushes_per_s": round(statistics.median(flushes)), "databases": medians}


def run(quick: bool = False) -> dict[str, Any]:
    rounds, seconds = (2, 0.7) if quick else (5, 3.0)
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-", dir="/tmp") as folder, _databases(Path(folder)) as urls:
        measured = _measure(Path(folder), urls, rounds, seconds)
    bars = [
        at_least(f"hold-and-post pairs/s, {kind}, {CLIENTS} clients", _figure(measured, kind), limit)
        for kind, limit in BARS.items()
        if kind in urls
    ]
    return {"bench": "books", **measured, "skipped": {} if "postgres" in urls else {"postgres": why_unavailable()}, "bars": bars}


def _figure(measured: dict[str, Any], kind: str) -> float:
    return float(measured["databases"][f"{kind}, {CLIENTS} clients"]["pairs_per_s"])


def table(result: dict[str, Any]) -> str:
    lines = [f"{'hold and post':<24}{'pairs/s':>9}{'changes a commit':>18}"]
    lines += [f"{name:<24}{of['pairs_per_s']:>9.0f}{of['group']:>18.1f}" for name, of in result["databases"].items()]
    lines.append(f"{'4 KiB, flushed':<24}{result['flushes_per_s']:>9} flushes/s (two commits are a pair, one by one)")
    lines += [f"{kind}: not measured, {why}" for kind, why in result["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
