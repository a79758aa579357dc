"""What the books cost a chat: echo over the whole path, beside the same build with a ledger that does nothing.

Two networks of one Coordinator and one Island each run side by side and are measured in turns. The one Coordinator keeps its books in
SQLite as always; the other runs the same program with the one object replaced that changes them, so it quotes, issues tickets and checks
receipts, and only holds and posts nothing.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.bars import at_least, at_most
from bench.echo_http import CLIENTS, Target, drive, process

ADDED_MS_MAX = 2.0  # the bars
KEPT_MIN = 0.7
_LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_START_S = 60.0
WITH, WITHOUT = "books in SQLite", "a ledger that does nothing"


def run_without_books(arguments: list[str]) -> int:
    """``archipelag-node`` with books that only say yes."""
    from coordinator.books.books import Books
    from coordinator.books.jobs import Job, OpenJob, SettleJob
    from node.cli import main

    jobs: dict[str, Job] = {}

    async def do(self: Books, operation: Any) -> Any:
        if isinstance(operation, OpenJob):
            jobs[operation.job.id] = operation.job
            return operation.job
        if isinstance(operation, SettleJob):
            price = sum(earned.amount for earned in operation.earned)
            return replace(jobs.pop(operation.job_id), state=operation.outcome.state, price_micros=price)
        raise TypeError(f"{type(operation).__name__} is not expected here")

    Books.do = do  # type: ignore[method-assign]
    return main(arguments)


@contextlib.contextmanager
def _node(folder: Path, name: str, module: tuple[str, ...], *arguments: str) -> Iterator[dict[str, Any]]:
    """A node as a process; its ready file once it is ready."""
    ready = folder / f"{name}.ready"
    common = ["--data-dir", str(folder / name), "--listen", _LOOPBACK, "--ready-file", str(ready), "--no-mdns"]
    with process([sys.executable, "-m", *module, *arguments, *common], folder / f"{name}.log"):
        deadline_s = time.monotonic() + _START_S
        while not ready.exists():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{name} is not ready after {_START_S:.0f} s:\n{(folder / f'{name}.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield json.loads(ready.read_text())


@contextlib.contextmanager
def _network(name: str, folder: Path, module: tuple[str, ...]) -> Iterator[Target]:
    from coordinator.keys import create_key, database_url_of

    folder.mkdir()
    with _node(folder, "coordinator", module, "coordinator", "--http", "127.0.0.1:0") as facts:
        url = str(facts["http"])
        with _node(folder, "island", ("node",), "start", "--coordinator", url, "--cargo", "echo"):
            key = create_key(database_url_of(folder / "coordinator"))
            yield Target(name, int(url.rsplit(":", 1)[1]), key)


def run(quick: bool = False) -> dict[str, Any]:
    found: dict[str, list[dict[str, dict[str, float]]]] = {WITH: [], WITHOUT: []}
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder, contextlib.ExitStack() as stack:
        targets = [
            stack.enter_context(_network(WITHOUT, Path(folder) / "without", ("bench.books_chat", "node"))),
            stack.enter_context(_network(WITH, Path(folder) / "with", ("node",))),
        ]
        for target in targets:
            drive(target, CLIENTS, 500)  # warms up
        for _ in range(3 if quick else 9):
            for target in targets:
                one, many = (300, 1500) if quick else (600, 4000)
                found[target.name].append({"one_client": drive(target, 1, one), "clients_16": drive(target, CLIENTS, many)})
    rows: list[dict[str, Any]] = [{"name": name, **_medians(rounds)} for name, rounds in found.items()]
    return _report({str(row["name"]): row for row in rows}, rows)


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        load: {figure: statistics.median(r[load][figure] for r in rounds) for figure in rounds[0][load]}
        for load in rounds[0]
    }


def _report(by_name: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    added_ms = by_name[WITH]["one_client"]["p50_ms"] - by_name[WITHOUT]["one_client"]["p50_ms"]
    kept = by_name[WITH]["clients_16"]["requests_per_s"] / by_name[WITHOUT]["clients_16"]["requests_per_s"]
    found = [
        at_most("the books, added to an echo chat, ms p50 at one client", added_ms, ADDED_MS_MAX),
        at_least(f"the books, requests/s that are left at {CLIENTS} clients", kept, KEPT_MIN),
    ]
    return {"bench": "books_chat", "rows": rows, "added_ms": added_ms, "kept": kept, "bars": found}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'echo chat over HTTP':<30}{'1 client p50':>14}{'p99':>10}{'16 clients':>16}{'p99':>10}"]
    for row in result["rows"]:
        one, many = row["one_client"], row["clients_16"]
        lines.append(
            f"{row['name']:<30}{one['p50_ms']:>11.2f} ms{one['p99_ms']:>7.1f} ms"
            f"{many['requests_per_s']:>10.0f} req/s{many['p99_ms']:>7.1f} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["node"]:
        sys.exit(run_without_books(sys.argv[2:]))
    print(table(run(quick="--quick" in sys.argv)))
