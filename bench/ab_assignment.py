"""What an A/B test adds to a job: choosing its arm, and a chat on a Coordinator with a test beside the same chat with none.

    python -m bench.ab_assignment [--quick]

A real Coordinator with its books and its HTTP face, fake Islands that answer at once. Chats with and without an active test alternate on
the same connection, so that a busy minute hits both alike; the medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_most
from coordinator.abtests.assignment import arm_of, unit_key
from coordinator.abtests.plan import SHARE_WHOLE, Arm, Plan, UnitKind
from coordinator.orders import Order
from tests.coordinator.abtests.ab_net import AB, chat, create, ok, service_of, talking
from tests.coordinator.clients import http
from tests.coordinator.desks import url_of
from tests.coordinator.fakes import Running

UNITS = 100_000
SHARES_OFF_MAX = 0.5  # percent
ADDED_MS_MAX = 0.1  # the bars
ROUNDS, ROUNDS_QUICK, CHATS = 12, 4, 150
_SECRET = bytes(32)


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about half a minute, or ten seconds when quick."""
    off = _shares()
    found = trio.run(_rounds, ROUNDS_QUICK if quick else ROUNDS)
    choose_us = found["choose_us"]
    without_ms, with_ms = (1000 * statistics.median(found[name]) for name in ("without", "with"))
    added = [1000 * (tested - plain) for plain, tested in zip(found["without"], found["with"], strict=True)]
    added_ms = statistics.median(added)
    return {
        "bench": "ab_assignment",
        "units": UNITS,
        "shares_off_percent": off,
        "choose_us": choose_us,
        "chat_ms": {"without": without_ms, "with": with_ms},
        "added_ms": added_ms,
        "assigned": found["assigned"],
        "bars": [
            at_most(f"shares of {UNITS:,} units, farthest from what was asked, percent", max(off.values()), SHARES_OFF_MAX),
            at_most("a request sent to its arm, ms", choose_us / 1000, ADDED_MS_MAX),
            at_most("an echo chat in a test, ms more than one in none", added_ms, ADDED_MS_MAX),
        ],
    }


def _plan(*percents: float) -> Plan:
    arms = tuple(Arm(f"arm{n}", "talk", f"{n}.0.0", f"{n:064x}", round(percent * SHARE_WHOLE / 100)) for n, percent in enumerate(percents))
    return Plan("bench", "talk", arms, "arm0")


def _shares() -> dict[str, float]:
    """How far the farthest arm is from its share, in points of percent."""
    units = [unit_key(_SECRET, UnitKind.USER, "bench", "ann", f"user {number}", "") for number in range(UNITS)]
    off = {}
    for percents in ((50.0, 50.0), (90.0, 10.0), (12.5,) * 8):
        plan = _plan(*percents)
        got = Counter(arm_of(plan, "bench", unit).name for unit in units)
        name = "/".join(f"{percent:g}" for percent in percents)
        off[name] = max(abs(100 * got[arm.name] / UNITS - 100 * arm.share / SHARE_WHOLE) for arm in plan.arms)
    return off


async def _choosing_us(running: Running) -> float:
    """All that the layer in front of the cache does with a chat of an active test; median of ten."""
    tests, orders, times = service_of(running), list[Order](), list[float]()
    assign = tests.assign

    async def noting(order: Order) -> Order:
        orders.append(order)
        return await assign(order)

    tests.assign = noting  # type: ignore[method-assign]
    await chat(running, "ann")
    tests.assign = assign  # type: ignore[method-assign]
    for _ in range(10):
        begun = time.perf_counter()
        for number in range(1_000):
            assert (await assign(replace(orders[0], user=f"user {number}"))).arm is not None
        times.append((time.perf_counter() - begun) / 1_000)
    return 1e6 * statistics.median(times)


async def _rounds(rounds: int) -> dict[str, Any]:
    """Median seconds of a chat in each round, and how many requests were in the test."""
    with tempfile.TemporaryDirectory() as folder:
        async with talking(url_of(Path(folder))) as running:
            id = await create(running, auto_promote=False)
            await ok(running, "POST", f"{AB}/{id}/activate")
            await _chats(running, CHATS)
            found: dict[str, Any] = {"without": [], "with": []}
            for number in range(rounds):
                order = ("without", "with") if number % 2 else ("with", "without")
                for name in order:
                    await ok(running, "POST", f"{AB}/{id}/{'activate' if name == 'with' else 'pause'}")  # saying it again changes nothing
                    found[name].append(await _chats(running, CHATS))
            await ok(running, "POST", f"{AB}/{id}/activate")
            return {**found, "assigned": service_of(running).assigned, "choose_us": await _choosing_us(running)}


async def _chats(running: Running, count: int) -> float:
    times = []
    async with http(running) as client:
        for number in range(count):
            begun = time.perf_counter()
            answer = await chat(running, f"user {number}", client=client)
            times.append(time.perf_counter() - begun)
            assert answer.status_code == 200, answer.text
    return statistics.median(times)


def table(result: dict[str, Any]) -> str:
    off = ", ".join(f"{name}: {points:.3f}" for name, points in result["shares_off_percent"].items())
    chats = result["chat_ms"]
    return "\n".join(
        [
            f"shares of {result['units']:,} units, points of percent off: {off}",
            f"sending a request to its arm: {result['choose_us']:.1f} µs",
            f"an echo chat: {chats['without']:.2f} ms without a test, {chats['with']:.2f} ms in one; {result['assigned']:,} assigned",
        ]
    )


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
