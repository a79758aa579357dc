"""Snapshots of the market every five minutes, and history made of them.

Theory of operation. A snapshot covers a *slot*: the five minutes before ``at_ms``, which is always a multiple of five minutes. So whoever
takes it, there is one for each Cargo and slot, and a second one is refused by its key. What cleared in the slot is counted by
``begin <= time < end``, so no job is in two slots or in none. Snapshots keep sums beside counts: what is merged is as exact as the parts.
Only a median cannot be merged; that of a longer time is the median of the snapshots' medians, each as often as it had jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.exchange.amounts import average
from coordinator.exchange.bids import StandingAsk
from coordinator.exchange.order_book import reference_price
from coordinator.exchange.rates import Clearing, ClearingFigures, clearing_figures
from protocol.prices import Ask

SNAPSHOT_INTERVAL_MS = 5 * 60_000  # mission.md: every 5 minutes
HISTORY_HOURS = (1, 24, 7 * 24, 30 * 24)  # mission.md: 1 h, 24 h, 7 d, 30 d
HISTORY_POINTS_MAX = 300  # of a chart
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One Cargo in the slot that ends at ``at_ms``. Asks and rate are prices of the reference job (order_book.py), bids of whole requests
    that wait, clearing prices what jobs cost; all in micro-credits, None where there was none. ``supply``: slots of all Islands that
    offer it; ``demand``: jobs that ran or waited."""

    cargo: str
    at_ms: int
    active_asks: int
    ask_sum_micros: int
    active_bids: int
    bid_sum_micros: int
    jobs_cleared: int
    clearing_sum_micros: int
    clearing_min_micros: int | None
    clearing_median_micros: int | None
    clearing_max_micros: int | None
    rate_micros: int | None
    supply: int
    demand: int
    surge: bool

    @property
    def is_empty(self) -> bool:
        """Nobody offered it, nobody wanted it: not worth a row."""
        return not (self.active_asks or self.demand or self.jobs_cleared)


@dataclass(frozen=True, slots=True)
class Facts:
    """A Cargo at one moment: who offers it, bids (micro-credits) of the requests that wait, jobs that run, and the market's rate."""

    asks: Sequence[StandingAsk]
    bids: Sequence[int] = ()
    running: int = 0
    rate: Ask | None = None
    tokens_per_s: float = 0.0
    surge: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """Several snapshots as one: sums over ``start_ms`` to ``end_ms``, and the prices of jobs in it."""

    start_ms: int
    end_ms: int
    snapshots: int
    active_asks: int
    ask_sum_micros: int
    active_bids: int
    bid_sum_micros: int
    jobs_cleared: int
    clearing_sum_micros: int
    clearing_min_micros: int | None
    clearing_median_micros: int | None
    clearing_max_micros: int | None
    supply_sum: int
    demand_sum: int
    surge: bool


@dataclass(frozen=True, slots=True)
class History:
    """``whole`` is all of the window, ``points`` the same in at most HISTORY_POINTS_MAX equal pieces, the empty ones left out."""

    cargo: str
    hours: int
    whole: Point
    points: tuple[Point, ...]


def slot_end(now_ms: int) -> int:
    """End of the last slot that is over."""
    return now_ms - now_ms % SNAPSHOT_INTERVAL_MS


def due_slot(last_ms: int | None, now_ms: int) -> int | None:
    """The slot of which a snapshot is to be taken now; None where ``last_ms``, the end of the last one taken, is it. Slots that were
    slept through are left out: what asks were then nobody knows."""
    end = slot_end(now_ms)
    return None if last_ms == end else end


def take_snapshot(cargo: str, at_ms: int, facts: Facts, clearings: Iterable[Clearing]) -> Snapshot:
    """The snapshot of the slot that ends at ``at_ms``. Clearings of other times or Cargos do not count. Raises ValueError for a time
    that is not the end of a slot."""
    if at_ms != slot_end(at_ms):
        raise ValueError(f"no slot ends at {at_ms}")
    begin = at_ms - SNAPSHOT_INTERVAL_MS
    prices = [c.price_micros for c in clearings if c.cargo == cargo and begin <= c.at_ms < at_ms]
    return snapshot_now(cargo, at_ms, facts, clearing_figures(prices))


def snapshot_now(cargo: str, at_ms: int, facts: Facts, figures: ClearingFigures) -> Snapshot:
    """A Cargo at this moment beside any figures of cleared jobs, such as those of the rate's window."""
    rate, speed = facts.rate, facts.tokens_per_s
    return Snapshot(
        cargo=cargo,
        at_ms=at_ms,
        active_asks=len(facts.asks),
        ask_sum_micros=sum(reference_price(standing.ask, standing.tokens_per_s) for standing in facts.asks),
        active_bids=len(facts.bids),
        bid_sum_micros=sum(facts.bids),
        jobs_cleared=figures.jobs,
        clearing_sum_micros=figures.sum_micros,
        clearing_min_micros=figures.min_micros,
        clearing_median_micros=figures.median_micros,
        clearing_max_micros=figures.max_micros,
        rate_micros=reference_price(rate, speed) if rate is not None else None,
        supply=sum(standing.slots for standing in facts.asks),
        demand=len(facts.bids) + facts.running,
        surge=facts.surge,
    )


def merge(snapshots: Sequence[Snapshot], start_ms: int, end_ms: int) -> Point:
    """All of them as one point of the time from ``start_ms`` to ``end_ms``."""
    traded = [snapshot for snapshot in snapshots if snapshot.jobs_cleared]
    return Point(
        start_ms=start_ms,
        end_ms=end_ms,
        snapshots=len(snapshots),
        active_asks=sum(snapshot.active_asks for snapshot in snapshots),
        ask_sum_micros=sum(snapshot.ask_sum_micros for snapshot in snapshots),
        active_bids=sum(snapshot.active_bids for snapshot in snapshots),
        bid_sum_micros=sum(snapshot.bid_sum_micros for snapshot in snapshots),
        jobs_cleared=sum(snapshot.jobs_cleared for snapshot in traded),
        clearing_sum_micros=sum(snapshot.clearing_sum_micros for snapshot in traded),
        clearing_min_micros=min(
            (s.clearing_min_micros for s in traded if s.clearing_min_micros is not None), default=None
        ),
        clearing_median_micros=_weighted_median(traded),
        clearing_max_micros=max(
            (s.clearing_max_micros for s in traded if s.clearing_max_micros is not None), default=None
        ),
        supply_sum=sum(snapshot.supply for snapshot in snapshots),
        demand_sum=sum(snapshot.demand for snapshot in snapshots),
        surge=any(snapshot.surge for snapshot in snapshots),
    )


def _weighted_median(traded: Sequence[Snapshot]) -> int | None:
    pairs = sorted((s.clearing_median_micros, s.jobs_cleared) for s in traded if s.clearing_median_micros is not None)
    left = -(-sum(jobs for _, jobs in pairs) // 2)
    for micros, jobs in pairs:
        left -= jobs
        if left <= 0:
            return micros
    return None


def history(cargo: str, snapshots: Iterable[Snapshot], hours: int, now_ms: int) -> History:
    """The ``hours`` before ``now_ms`` of one Cargo; snapshots of other times or Cargos do not count. Each moment is in one point.

    Points begin at multiples of their own length, so that they stay the same from one call to the next.
    """
    begin = now_ms - hours * HOUR_MS
    mine = sorted((s for s in snapshots if s.cargo == cargo and begin < s.at_ms <= now_ms), key=lambda s: s.at_ms)
    length_ms = point_length_ms(hours)
    pieces: dict[int, list[Snapshot]] = {}
    for snapshot in mine:
        start = snapshot.at_ms - SNAPSHOT_INTERVAL_MS
        pieces.setdefault(start - start % length_ms, []).append(snapshot)
    points = tuple(merge(piece, start, start + length_ms) for start, piece in pieces.items())
    return History(cargo, hours, merge(mine, begin, now_ms), points)


def point_length_ms(hours: int) -> int:
    """Length of a point: whole slots, so many that one more than fit into the window are still not too many."""
    slots = hours * HOUR_MS // SNAPSHOT_INTERVAL_MS
    return SNAPSHOT_INTERVAL_MS * max(1, -(-slots // (HISTORY_POINTS_MAX - 1)))


def average_of(point: Point | Snapshot) -> tuple[int | None, int | None, int | None]:
    """Average ask, bid and clearing price, in micro-credits."""
    return (
        average(point.ask_sum_micros, point.active_asks),
        average(point.bid_sum_micros, point.active_bids),
        average(point.clearing_sum_micros, point.jobs_cleared),
    )
