"""What a simulated day is judged by."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.exchange.bids import BidSource
from protocol import limits
from tests.network.market_island import Site

_SOURCES = list(BidSource)
_SOURCE_CODE = {source: code for code, source in enumerate(_SOURCES)}


class End(StrEnum):
    """How a job ended. The last three were never on an Island, or not to their end."""

    SERVED = "served"
    CANCELLED = "cancelled"
    LOST = "lost with two Islands"
    TOO_SLOW = "out of time"
    REPLACED = "ended with their Coordinator"
    GAVE_UP = "gave up waiting"
    PRICE = "refused by price"
    NO_CREDIT = "refused for credit"


_ENDS = list(End)
_END_CODE = {end: code for code, end in enumerate(_ENDS)}
_NEVER = -1.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one day. Utilisation: slot-seconds in use of those there were; its peak is of five minutes. ``waits_s``: p50, p95, p99 and mean
    until a first place, of all jobs that got one or gave up waiting for it (they count with what they waited). ``finishes_s``: p50 and
    p95 from arrival to the last token of jobs that were served. ``failures``: of attempts, ``requeued``: jobs that went on elsewhere.
    Prices in credits. ``jain``: fairness index of what Islands earned, and of that by what each could have done while it was there."""

    policy: str
    jobs: int
    ends: dict[str, int]
    utilisation: float
    utilisation_peak: float
    waits_s: tuple[float, float, float, float]
    waited_share: float
    finishes_s: tuple[float, float]
    tokens: int
    failures: int
    requeued: int
    price_mean: float
    price_per_1k: float
    jain: float
    jain_by_capacity: float
    market_refused_share: float

    @property
    def served(self) -> int:
        return self.ends[End.SERVED]


class Tally:
    """Columns of what became of each job; those that have not ended yet have no end."""

    def __init__(self, jobs: int) -> None:
        self.wait_s = array("d", [_NEVER]) * jobs
        self.finish_s = array("d", [_NEVER]) * jobs
        self.end_code = array("b", [-1]) * jobs
        self.source_code = array("b", [-1]) * jobs
        self.was_requeued = array("b", [0]) * jobs
        self.price_micros = array("q", [0]) * jobs
        self.tokens = array("q", [0]) * jobs
        self.failures = 0
        self.ended_twice = 0
        self._peak = 0.0
        self._busy_s = self._online_s = 0.0

    def bid(self, number: int, source: BidSource) -> None:
        self.source_code[number] = _SOURCE_CODE[source]

    def start(self, number: int, wait_s: float) -> None:
        if self.wait_s[number] == _NEVER:
            self.wait_s[number] = wait_s

    def requeue(self, number: int) -> None:
        self.was_requeued[number] = 1

    def end(self, number: int, end: End, finish_s: float, price_micros: int = 0, tokens: int = 0) -> None:
        self.ended_twice += self.end_code[number] >= 0
        self.end_code[number] = _END_CODE[end]
        self.finish_s[number] = finish_s
        self.price_micros[number], self.tokens[number] = price_micros, tokens
        if end is End.GAVE_UP:
            self.start(number, finish_s)

    def sample(self, sites: Iterable[Site], now_s: float) -> None:
        """How busy the Islands were since the last time."""
        busy_s = online_s = 0.0
        for site in sites:
            site.advance(now_s)
            busy_s += site.busy_s
            online_s += site.online_s
        if online_s > self._online_s:
            self._peak = max(self._peak, (busy_s - self._busy_s) / (online_s - self._online_s))
        self._busy_s, self._online_s = busy_s, online_s

    def ended_otherwise(self) -> int:
        """Ends that came beside a first one, and jobs without any."""
        return self.ended_twice + self.end_code.count(-1)

    @property
    def paid_micros(self) -> int:
        return sum(self.price_micros)

    def figures(self, policy: str, sites: list[Site], earned_micros: list[int]) -> Figures:
        """``earned_micros``: of the Islands, in the order of the sites."""
        ends, waits = np.array(self.end_code), np.array(self.wait_s)
        served = ends == _END_CODE[End.SERVED]
        finishes, prices = np.array(self.finish_s)[served], np.array(self.price_micros)[served]
        tokens = int(np.array(self.tokens)[served].sum())
        waits = waits[waits >= 0.0]
        market = np.array(self.source_code) == _SOURCE_CODE[BidSource.MARKET]
        refused = market & (ends == _END_CODE[End.PRICE])
        counts = Counter(ends.tolist())
        could = [site.plan.capacity * site.plan.online_s for site in sites]
        return Figures(
            policy=policy,
            jobs=len(ends),
            ends={end: counts[code] for code, end in enumerate(_ENDS)},
            utilisation=sum(site.busy_s for site in sites) / sum(site.online_s for site in sites),
            utilisation_peak=self._peak,
            waits_s=(*_quantiles(waits, 0.5, 0.95, 0.99), float(waits.mean())),  # type: ignore[arg-type]
            waited_share=float((waits > 0.0).mean()),
            finishes_s=_quantiles(finishes, 0.5, 0.95),  # type: ignore[arg-type]
            tokens=tokens,
            failures=self.failures,
            requeued=sum(self.was_requeued),
            price_mean=float(prices.mean()) / limits.CREDIT_MICROS,
            price_per_1k=1000 * int(prices.sum()) / tokens / limits.CREDIT_MICROS,
            jain=jain(earned_micros),
            jain_by_capacity=jain([earned / work for earned, work in zip(earned_micros, could, strict=True)]),
            market_refused_share=float(refused.sum() / max(1, market.sum())),
        )


def _quantiles(values: npt.NDArray[Any], *which: float) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, which))


def jain(values: Iterable[float]) -> float:
    """Jain's fairness index: 1.0 where all have the same, 1/n where one has all."""
    column = np.array(list(values), np.float64)
    return float(column.sum() ** 2 / (len(column) * (column**2).sum())) if column.any() else 1.0


def table(days: list[Figures]) -> str:
    """One column a day, for a terminal or README."""
    rows: list[tuple[str, list[str]]] = [
        ("", [day.policy for day in days]),
        ("utilisation, %", [f"{100 * day.utilisation:.1f}" for day in days]),
        ("  in the busiest five minutes", [f"{100 * day.utilisation_peak:.1f}" for day in days]),
        *((f"jobs {end}", [f"{day.ends[end]:,}" for day in days]) for end in End),
        ("attempts that failed", [f"{day.failures:,}" for day in days]),
        ("jobs that went on elsewhere", [f"{day.requeued:,}" for day in days]),
        ("jobs that waited, %", [f"{100 * day.waited_share:.2f}" for day in days]),
        *(
            (f"waiting time {name}, s", [f"{day.waits_s[at]:.2f}" for day in days])
            for at, name in enumerate(("p50", "p95", "p99", "mean"))
        ),
        *((f"time to finish {name}, s", [f"{day.finishes_s[at]:.1f}" for day in days]) for at, name in enumerate(("p50", "p95"))),
        ("output tokens, millions", [f"{day.tokens / 1e6:.2f}" for day in days]),
        ("mean price, credits", [f"{day.price_mean:.4f}" for day in days]),
        ("  of 1,000 output tokens", [f"{day.price_per_1k:.4f}" for day in days]),
        ("bids by the market refused by price, %", [f"{100 * day.market_refused_share:.3f}" for day in days]),
        ("fairness of earnings (Jain)", [f"{day.jain:.3f}" for day in days]),
        ("  by what each could have done", [f"{day.jain_by_capacity:.3f}" for day in days]),
    ]
    return "\n".join(f"{name:<42}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows)
