"""A batch of 100 inputs on four Islands of which one is five times slower: when it ends, of the best that any schedule could do.

    python -m bench.batch [--quick]

A real Coordinator with its books and its HTTP face; its Islands are fakes that take one input at a time and so many milliseconds for each,
so that the ideal is known exactly: the least time by which 100 equal inputs fit on these speeds. The client hears the end from the event
stream.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_least, at_most
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, opened, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island

INPUTS = 100
FAST_S = 0.2
SLOWER = 5.0
PACES_S = (FAST_S, FAST_S, FAST_S, SLOWER * FAST_S)
ROUNDS, ROUNDS_QUICK = 3, 1
RATIO_MAX = 1.15  # the bar


def ideal_s(count: int, paces_s: tuple[float, ...]) -> float:
    """The least time by which ``count`` equal inputs can be done where each Island does one at a time and takes its pace for it: the first
    multiple of a pace by which all Islands together have ended so many."""
    ends = sorted(number * pace_s for pace_s in paces_s for number in range(1, count + 1))
    return ends[count - 1]


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; 25 s, or 8 s when quick."""
    ideal = ideal_s(INPUTS, PACES_S)
    rounds = [trio.run(_round) for _ in range(ROUNDS_QUICK if quick else ROUNDS)]
    ratios = [found["seconds"] / ideal for found in rounds]
    shares_s = max(-(-INPUTS // len(PACES_S)) * pace_s for pace_s in PACES_S)
    return {
        "bench": "batch",
        "inputs": INPUTS,
        "paces_s": PACES_S,
        "ideal_s": round(ideal, 3),
        "rounds": rounds,
        "ratio": round(statistics.median(ratios), 4),
        "equal_shares_ratio": round(shares_s / ideal, 3),
        "bars": [
            at_most("batch of 100 on 4 Islands, one 5 times slower: finishing time, of the ideal", statistics.median(ratios), RATIO_MAX),
            at_least("the same, inputs that were sent to a second Island in each round", min(it["copies"] for it in rounds), 1),
            at_most("the same, inputs that were paid more or less than once", max(it["misbilled"] for it in rounds), 0),
        ],
    }


async def _round() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        islands = [_island(number, pace_s) for number, pace_s in enumerate(PACES_S, start=1)]
        async with opened(url_of(Path(folder)), *islands) as running:
            started_s = time.perf_counter()
            batch_id = await _batch(running)
            seconds = time.perf_counter() - started_s
            async with http(running) as client:
                shown = (await client.get(f"{JOBS}/{batch_id}/batch-status")).json()
                output = (await client.get(f"{JOBS}/{batch_id}/output")).json()
            assert [each["text"] for each in output["outputs"]] == [f"input-{number}" for number in range(INPUTS)]
            paid = [child["price"] for child in shown["children"]]
            return {
                "seconds": round(seconds, 4),
                "copies": shown["stragglers"],
                "cancelled": sum(one.cancelled for one in islands),
                "misbilled": len([price for price in paid if price != "0.001"]),
                "inputs_by_island": [sum(child["island"] == one.peer for child in shown["children"]) for one in islands],
            }


def _island(number: int, pace_s: float) -> FakeIsland:
    return island(number, Script(token_s=pace_s), slots_total=1, slots_free=1)


async def _batch(running: Running) -> str:
    """From the request to the last event."""
    body = {"cargo": "echo", "inputs": [{"prompt": f"input-{number}"} for number in range(INPUTS)]}
    async with http(running) as client:
        batch_id = str((await client.post(f"{JOBS}/batch", json=body)).json()["id"])
        async with client.stream("GET", f"{JOBS}/{batch_id}/stream") as answer:
            name = data = ""
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = line.removeprefix("data: ")
        assert name == "complete" and json.loads(data)["child_states"] == {"succeeded": INPUTS}, data
    return batch_id


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['inputs']} inputs, Islands that take {', '.join(f'{1000 * pace_s:g}' for pace_s in result['paces_s'])} ms each; "
        f"ideal {result['ideal_s']:g} s",
        "| round | s | of the ideal | sent twice | inputs by Island |",
        "|---|---|---|---|---|",
    ]
    for number, found in enumerate(result["rounds"], start=1):
        ratio = found["seconds"] / result["ideal_s"]
        shares = " + ".join(map(str, found["inputs_by_island"]))
        lines.append(f"| {number} | {found['seconds']:.2f} | {ratio:.3f} | {found['copies']} | {shares} |")
    lines.append(f"an equal share for each Island would take {result['equal_shares_ratio']:g} times the ideal")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
