"""The public order book: how many Islands ask how much for one reference job, in steps that never change.

Asks are vectors and jobs differ, so they are compared by a job of ``REFERENCE_OUTPUT_TOKENS`` at the speed of the Island. The steps are
ten to a power of ten, at the same prices in every book, so that two books can be laid over one another and a silly ask makes nobody
else's step wider. Who asks what is not shown: that is in the ads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.exchange.amounts import median
from coordinator.exchange.bids import StandingAsk
from coordinator.pricing import TOKENS_PER_S_ASSUMED
from protocol import limits
from protocol.prices import Ask

REFERENCE_OUTPUT_TOKENS = 1000
REFERENCE_MS_MAX = int(limits.JOB_TIMEOUT_S * 1000)  # no job runs longer, whatever speed an ad claims
_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
EDGES: tuple[int, ...] = (0, 1, *(step * 10**power for power in range(14) for step in _STEPS), 10**15, 12 * 10**14)
"""Lowest price of each step, in micro-credits; the last is the end."""
assert EDGES[-2] <= limits.PRICE_MICROS_MAX < EDGES[-1], "every price has its step"


def reference_price(ask: Ask, tokens_per_s: float) -> int:
    """Micro-credits for the reference job at this speed, 0.0 for unknown; at most PRICE_MICROS_MAX."""
    time_ms = min(1000 * REFERENCE_OUTPUT_TOKENS / (tokens_per_s or TOKENS_PER_S_ASSUMED), REFERENCE_MS_MAX)
    return min(ask.price(REFERENCE_OUTPUT_TOKENS, math.ceil(time_ms)), limits.PRICE_MICROS_MAX)


@dataclass(frozen=True, slots=True)
class Step:
    """Islands that ask from ``low_micros`` to less than ``high_micros``, and the jobs that they can do at a time."""

    low_micros: int
    high_micros: int
    asks: int
    slots: int


@dataclass(frozen=True, slots=True)
class OrderBook:
    """All asks of a Cargo. ``steps`` reach from the cheapest to the dearest, empty ones between them included."""

    asks: int
    slots: int
    min_micros: int | None
    median_micros: int | None
    max_micros: int | None
    steps: tuple[Step, ...]


def order_book(asks: Sequence[StandingAsk]) -> OrderBook:
    prices = [reference_price(standing.ask, standing.tokens_per_s) for standing in asks]
    counts, slots = [0] * len(EDGES), [0] * len(EDGES)
    for price, standing in zip(prices, asks, strict=True):
        step = bisect_right(EDGES, price) - 1
        counts[step] += 1
        slots[step] += standing.slots
    used = [index for index, count in enumerate(counts) if count]
    shown = range(used[0], used[-1] + 1) if used else range(0)
    return OrderBook(
        asks=len(prices),
        slots=sum(slots),
        min_micros=min(prices, default=None),
        median_micros=median(sorted(prices)),
        max_micros=max(prices, default=None),
        steps=tuple(Step(EDGES[index], EDGES[index + 1], counts[index], slots[index]) for index in shown),
    )
