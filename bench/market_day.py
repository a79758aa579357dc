"""A simulated day of the market: a thousand Islands that join and leave, a million jobs that bid, wait, run, fail and are paid; by our
placement, by random choice and by the cheapest ask, on the same trace. Decisions and books are production's (tests/network/market_day.py).

    python -m bench.market_day [--quick]

Times in the table are simulated. Afterwards every credit is accounted for, from the rows of the books.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

from bench.bars import at_most
from tests.network.market_day import Day
from tests.network.market_figures import Figures
from tests.network.market_figures import table as figures_table
from tests.network.market_places import PICKERS
from tests.network.market_trace import JOBS, Config, make_trace

JOBS_QUICK = 20_000
SEED = 1


def run(quick: bool = False) -> dict[str, Any]:
    """All figures; about 40 minutes, or a minute when quick."""
    trace = make_trace(Config.scaled(JOBS_QUICK if quick else JOBS, SEED))
    days: list[Figures] = []
    complaints: list[str] = []
    took_s: dict[str, float] = {}
    for policy in PICKERS:
        started_s = time.process_time()
        day = Day(trace, policy)
        days.append(day.run())
        complaints += [f"{policy}: {complaint}" for complaint in day.audit()]
        took_s[policy] = round(time.process_time() - started_s, 1)
        print(f"  {policy}: {took_s[policy]:.0f} s of CPU time", flush=True)
    return {
        "bench": "market_day",
        "jobs": len(trace.jobs),
        "islands": len(trace.islands),
        "day_h": round(trace.config.day_s / 3600, 2),
        "offered_load": round(trace.load, 3),
        "days": [asdict(day) for day in days],
        "complaints": complaints,
        "cpu_s": took_s,
        "table": figures_table(days),
        "bars": _bars(days, complaints),
    }


def _bars(days: list[Figures], complaints: list[str]) -> list[dict[str, Any]]:
    """Waiting and finishing against the better of the other two."""
    ours, others = days[0], days[1:]
    wait = ours.waits_s[3] / max(min(day.waits_s[3] for day in others), 1e-9)
    finish = ours.finishes_s[0] / min(day.finishes_s[0] for day in others)
    return [
        at_most("simulated day, sums of the books that are off", len(complaints), 0),
        at_most("simulated day, mean wait, of the better of random and cheapest-first", wait, 1.0),
        at_most("simulated day, median time to finish, of the better of those two", finish, 1.0),
    ]


def table(result: dict[str, Any]) -> str:
    head = (
        f"{result['jobs']:,} jobs, {result['islands']:,} Islands, {result['day_h']:g} h, "
        f"offered load {100 * result['offered_load']:.0f} % of what Islands can do"
    )
    return "\n".join([head, result["table"], *result["complaints"]])


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
