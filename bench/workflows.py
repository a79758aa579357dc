"""Workflows of echo Cargos through the whole engine: runner, templates, desk, and books in SQLite.

Wide: one step, many that need it, and one that needs them all. Chains: steps one behind the other, each with what the one before has said.
Several runs at once. First with Islands inside the Coordinator's process, so that nothing but the engine is measured (their signatures and
checks of tickets count against it all the same): that is the bar. Then Coordinator, two Islands and client as processes of their own, over
HTTP and libp2p; on two cores they share what the engine had alone.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_least
from coordinator.books import run_queries
from coordinator.books.runs import RunState
from coordinator.keys import ACCOUNT_DEFAULT
from coordinator.workflows.flows import Asked, Once
from node.collector import set_for_long_service
from node.localnet import LocalNetwork
from protocol.prices import Ask
from tests.coordinator.desks import opened, url_of
from tests.coordinator.fakes import Running, island

STEPS_PER_S_MIN = 500.0  # the bar
WIDE, LONG = 198, 50  # steps of one run
WIDE_RUNS, LONG_RUNS = 8, 32
ISLANDS = 4
_POLL_S = 0.005
_POLL_HTTP_S = 0.05
_ANSWER_S = 60.0


def wide() -> dict[str, Any]:
    """WIDE steps between a first and a last one."""
    middle = [_step(f"m{number}", "{{ first.output.text }} again") for number in range(WIDE)]
    return {"steps": [_step("first", "{{ input }}"), *middle, {**_step("last", "done"), "depends_on": [step["key"] for step in middle]}]}


def chain() -> dict[str, Any]:
    """LONG steps, each of which says what the one before has said."""
    return {"steps": [_step("s0", "{{ input }}"), *(_step(f"s{n}", f"{{{{ s{n - 1}.output.text }}}}") for n in range(1, LONG))]}


def _step(key: str, prompt: str) -> dict[str, Any]:
    return {"key": key, "cargo": "echo", "input": {"prompt": prompt}, "cache": "off"}


_SHAPES = {"wide": (wide(), WIDE_RUNS), "chains": (chain(), LONG_RUNS)}


# ---- inside one process


async def _inside(quick: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder:
        islands = [island(number, ask=Ask(per_job=1000)) for number in range(1, ISLANDS + 1)]
        async with opened(url_of(Path(folder)), *islands) as running:
            await _round(running, "warm", chain(), 4)
            set_for_long_service()  # as the node does it
            found: dict[str, list[float]] = {}
            for number in range(2 if quick else 5):
                for name, (flow, runs) in _SHAPES.items():
                    found.setdefault(name, []).append(await _round(running, f"{name}{number}", flow, runs))
    return _rows("in one process", found)


def _rows(where: str, found: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for name, rates in found.items():
        flow, runs = _SHAPES[name]
        steps = len(flow["steps"])
        rows.append({"name": name, "where": where, "runs": runs, "steps": steps, "steps_per_s": round(statistics.median(rates), 1)})
    return rows


async def _round(running: Running, name: str, flow: dict[str, Any], runs: int) -> float:
    """Steps per second, from the requests to the last run's end in the books."""
    flows, books = running.server._parts.flows, running.server.books
    ids = [f"wf_{name}x{number}" for number in range(runs)]
    began_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for run_id in ids:
            nursery.start_soon(flows.start, Asked(ACCOUNT_DEFAULT, name, flow, input="one two three"), Once(run_id))
    for run_id in ids:
        while running.server._parts.runs.is_live(run_id):
            await trio.sleep(_POLL_S)
    took_s = time.perf_counter() - began_s
    for run_id in ids:
        run = await books.ask(run_queries.any_run, run_id)
        if run is None or run.state is not RunState.SUCCEEDED:
            raise RuntimeError(f"{run_id} did not succeed: {run and run.error_message}")
    return runs * len(flow["steps"]) / took_s


# ---- as processes


@contextlib.contextmanager
def _network(folder: Path) -> Iterator[tuple[str, str]]:
    """URL and key of a Coordinator with two Islands."""
    with LocalNetwork(folder) as network:
        url = str(network.start_coordinator()["http"])
        for name in ("one", "two"):
            network.start_island(name, "--cargo", "echo")
        for name in ("one", "two"):
            network.node(name).wait_ready()
        yield f"{url}/api/v1/workflows", network.make_key()


def _processes(quick: bool) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder, _network(Path(folder)) as (url, key):
        _over_http(url, key, chain(), 4)
        for _ in range(1 if quick else 3):
            for name, (flow, runs) in _SHAPES.items():
                found.setdefault(name, []).append(_over_http(url, key, flow, runs))
    return _rows("processes, HTTP", found)


def _over_http(url: str, key: str, flow: dict[str, Any], runs: int) -> float:
    """Steps per second, from the first request to the last run's end as HTTP shows it."""
    began_s = time.perf_counter()
    ids = [_call(url, key, {"definition": flow, "input": "one two three"})["id"] for _ in range(runs)]
    for run_id in ids:
        while (state := _call(f"{url}/{run_id}/timeline", key)["state"]) == "running":
            time.sleep(_POLL_HTTP_S)
        if state != "succeeded":
            raise RuntimeError(f"{run_id} is {state}")
    return runs * len(flow["steps"]) / (time.perf_counter() - began_s)


def _call(url: str, key: str, body: Any = None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(body).encode() if body is not None else None, headers=headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        return dict(json.loads(answer.read()))


def run(quick: bool = False) -> dict[str, Any]:
    engine = trio.run(_inside, quick)
    found = [at_least(f"workflow engine, {row['name']}, steps/s", row["steps_per_s"], STEPS_PER_S_MIN) for row in engine]
    return {"bench": "workflows", "rows": [*engine, *_processes(quick)], "bars": found}


def table(result: dict[str, Any]) -> str:
    lines = [f"{'echo workflows':<12}{'':<18}{'runs':>6}{'steps each':>12}{'steps/s':>10}"]
    for row in result["rows"]:
        lines.append(f"{row['name']:<12}{row['where']:<18}{row['runs']:>6}{row['steps']:>12}{row['steps_per_s']:>10.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run(quick="--quick" in sys.argv)))
