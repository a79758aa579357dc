"""Market rates: what jobs of a Cargo cost lately, as an ask that can be applied to a job of any length.

Theory of operation. A *clearing* is one job that was paid. The rate is the average of the asks at which jobs cleared, each part weighted
by what it was paid for: the price of a job by jobs, of tokens by tokens, of seconds by time. So a part that cost nobody anything (a
million credits per second, for a job of no time) moves nothing, and all jobs at the rate would have cost what they did cost together.
Where a job cost less than its ask gives, since its limit was lower, its ask counts as that much lower.

The window holds the newest clearings, by their own time and not by when they were heard of: whatever the order in which they come, the
window is the same, and what has left it leaves no trace. With running sums a rate is two searches and a subtraction. Nothing is thrown away
for its age, only for its number: a clock that jumps ahead and back again forgets nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from coordinator.exchange.amounts import average, median
from protocol import limits
from protocol.prices import Ask

RATE_WINDOW_MS = 24 * 3_600_000  # one quiet day does not lose the rate
RATE_CLEARINGS_MAX = 1000  # and where there is trade, the rate is as young as the last thousand jobs
_SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)

_Sums = tuple[int, int, int, int, int, int, int, int]
_NOTHING: _Sums = (0,) * 8


@dataclass(frozen=True, slots=True)
class Clearing:
    """One paid job: the ask that it cleared at, its price in micro-credits, and what was metered."""

    cargo: str
    at_ms: int
    ask: Ask
    price_micros: int
    output_tokens: int
    compute_ms: int

    def __post_init__(self) -> None:
        if min(self.price_micros, self.output_tokens, self.compute_ms) < 0:
            raise ValueError("no job costs or uses less than nothing")


@dataclass(frozen=True, slots=True)
class ClearingFigures:
    """Prices of cleared jobs, in micro-credits; None where there were no jobs."""

    jobs: int = 0
    sum_micros: int = 0
    min_micros: int | None = None
    median_micros: int | None = None
    max_micros: int | None = None

    @property
    def average_micros(self) -> int | None:
        return average(self.sum_micros, self.jobs)


def clearing_figures(prices: Iterable[int]) -> ClearingFigures:
    ordered = sorted(prices)
    if not ordered:
        return ClearingFigures()
    return ClearingFigures(len(ordered), sum(ordered), ordered[0], median(ordered), ordered[-1])


class MarketRate:
    """The window of one Cargo. Memory is bounded by ``clearings_max``."""

    def __init__(self, window_ms: int = RATE_WINDOW_MS, clearings_max: int = RATE_CLEARINGS_MAX) -> None:
        self._window_ms, self._clearings_max = window_ms, clearings_max
        self._clearings: list[Clearing] = []  # in the order of _rank
        self._sums: list[_Sums] = [_NOTHING]  # sums[j] - sums[i] is the sum over clearings[i:j]; of the first ones at least

    def __repr__(self) -> str:
        return f"<MarketRate {len(self._clearings)} clearings>"

    @property
    def newest_ms(self) -> int:
        """When the newest job cleared; 0 where none has."""
        return self._clearings[-1].at_ms if self._clearings else 0

    def add(self, clearing: Clearing) -> None:
        """Counts a clearing. It is not known again: whoever says it twice counts it twice."""
        clearings, sums = self._clearings, self._sums
        place = len(clearings)
        if clearings and _rank(clearing) < _rank(clearings[-1]):
            place = bisect_right(clearings, _rank(clearing), key=_rank)
        clearings.insert(place, clearing)
        del sums[place + 1 :]  # summed anew when somebody asks: those that come late come many at a time
        if len(clearings) > self._clearings_max:
            del clearings[0]
            if len(sums) > 1:
                del sums[0]

    def rate(self, now_ms: int) -> Ask | None:
        """The rate at ``now_ms``; None without a job in the window."""
        jobs, per_job, tokens, per_tokens, time_ms, per_time, plain_1k, plain_second = self._in_window(now_ms)
        if not jobs:
            return None
        # jobs that used none of something say nothing of what it is worth, but they were placed at an ask for it
        per_1k = average(per_tokens, tokens) if tokens else average(plain_1k, jobs)
        per_second = average(per_time, time_ms) if time_ms else average(plain_second, jobs)
        return Ask(average(per_job, jobs) or 0, per_1k or 0, per_second or 0)

    def tokens_per_s(self, now_ms: int) -> float:
        """Output tokens per second of compute of the jobs in the window; 0.0 where nothing is known."""
        _, _, tokens, _, time_ms, *_ = self._in_window(now_ms)
        return 1000 * tokens / time_ms if time_ms else 0.0

    def jobs(self, now_ms: int) -> int:
        """Jobs in the window."""
        return self._in_window(now_ms)[0]

    def statistics(self, now_ms: int) -> ClearingFigures:
        """Prices of the jobs in the window. Sorts them."""
        low, high = self._bounds(now_ms)
        return clearing_figures(clearing.price_micros for clearing in self._clearings[low:high])

    def _bounds(self, now_ms: int) -> tuple[int, int]:
        """Clearings of the window: later than its begin, and no further ahead than honest clocks may differ."""
        low = bisect_right(self._clearings, now_ms - self._window_ms, key=_time)
        high = bisect_right(self._clearings, now_ms + _SKEW_MS, key=_time)
        return low, high

    def _in_window(self, now_ms: int) -> _Sums:
        sums = self._sums
        sums += accumulate(map(_weights, self._clearings[len(sums) - 1 :]), _plus, initial=sums.pop())
        low, high = self._bounds(now_ms)
        return _minus(sums[high], sums[low])


def _time(clearing: Clearing) -> int:
    return clearing.at_ms


def _rank(clearing: Clearing) -> tuple[int, ...]:
    """A total order, so that the newest are the same ones whatever the order in which they come."""
    ask = clearing.ask
    parts = (ask.per_job, ask.per_1k_output, ask.per_second)
    return (clearing.at_ms, clearing.price_micros, clearing.output_tokens, clearing.compute_ms, *parts)


def _weights(clearing: Clearing) -> _Sums:
    """One job, and its ask weighted by what each part was paid for."""
    ask, tokens, time_ms, paid = clearing.ask, clearing.output_tokens, clearing.compute_ms, clearing.price_micros
    per_job, per_1k, per_second = ask.per_job, ask.per_1k_output, ask.per_second
    asked = ask.price(tokens, time_ms)
    if paid < asked:
        per_job, per_1k, per_second = (part * paid // asked for part in (per_job, per_1k, per_second))
    return 1, per_job, tokens, per_1k * tokens, time_ms, per_second * time_ms, ask.per_1k_output, ask.per_second


def _plus(a: _Sums, b: _Sums) -> _Sums:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7]


def _minus(a: _Sums, b: _Sums) -> _Sums:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3], a[4] - b[4], a[5] - b[5], a[6] - b[6], a[7] - b[7]
