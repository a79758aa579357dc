"""Snapshots and history: each job in one slot, each slot in one point, and sums that survive being merged."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from coordinator.exchange.bids import StandingAsk
from coordinator.exchange.rates import Clearing, clearing_figures
from coordinator.exchange.snapshots import (
    HISTORY_HOURS,
    HISTORY_POINTS_MAX,
    HOUR_MS,
    SNAPSHOT_INTERVAL_MS,
    Facts,
    Snapshot,
    average_of,
    due_slot,
    history,
    merge,
    point_length_ms,
    slot_end,
    snapshot_now,
    take_snapshot,
)
from protocol.prices import Ask

MINUTE = 60_000
T0 = 5 * MINUTE * 6_000_000


def cleared(at_ms: int, price: int, cargo: str = "m") -> Clearing:
    return Clearing(cargo, at_ms, Ask(price), price, 100, 1000)


def quiet(at_ms: int, cargo: str = "m") -> Snapshot:
    return take_snapshot(cargo, at_ms, Facts(()), [])


def traded(at_ms: int, *prices: int) -> Snapshot:
    return take_snapshot("m", at_ms, Facts(()), [cleared(at_ms - 1, price) for price in prices])


def test_slots() -> None:
    assert slot_end(T0) == T0
    assert slot_end(T0 + 5 * MINUTE - 1) == T0
    assert due_slot(None, T0 + 7) == T0
    assert due_slot(T0, T0 + 5 * MINUTE - 1) is None
    assert due_slot(T0, T0 + 5 * MINUTE) == T0 + 5 * MINUTE
    assert due_slot(T0, T0 + 60 * MINUTE + 3) == T0 + 60 * MINUTE, "slept through the others"
    assert due_slot(T0 + 60 * MINUTE, T0 + 1) == T0, "the clock was set back"


def test_a_snapshot() -> None:
    asks = [StandingAsk("A", Ask(100, 50), 0.0, 4), StandingAsk("B", Ask(300), 0.0, 2)]
    facts = Facts(asks, bids=(400, 500, 601), running=2, rate=Ask(10, 20), surge=True)
    clearings = [
        cleared(T0 - 1, 70),
        cleared(T0 - 5 * MINUTE, 90),
        cleared(T0 - 5, 20),
        cleared(T0, 1),
        cleared(T0 - 1, 2, "x"),
    ]
    snapshot = take_snapshot("m", T0, facts, [*clearings, cleared(T0 - 5 * MINUTE - 1, 3)])
    assert snapshot == Snapshot(
        cargo="m",
        at_ms=T0,
        active_asks=2,
        ask_sum_micros=450,
        active_bids=3,
        bid_sum_micros=1501,
        jobs_cleared=3,
        clearing_sum_micros=180,
        clearing_min_micros=20,
        clearing_median_micros=70,
        clearing_max_micros=90,
        rate_micros=30,
        supply=6,
        demand=5,
        surge=True,
    )
    assert average_of(snapshot) == (225, 501, 60)  # 500.33
    assert not snapshot.is_empty


def test_a_snapshot_of_nothing() -> None:
    snapshot = quiet(T0)
    assert snapshot.is_empty
    assert average_of(snapshot) == (None, None, None)
    assert (snapshot.clearing_min_micros, snapshot.rate_micros, snapshot.surge) == (None, None, False)
    for facts in (Facts([StandingAsk("A", Ask(), 0.0, 0)]), Facts((), bids=(0,)), Facts((), running=1)):
        assert not take_snapshot("m", T0, facts, []).is_empty
    assert not traded(T0, 0).is_empty


def test_a_snapshot_is_of_a_whole_slot() -> None:
    with pytest.raises(ValueError, match="no slot ends"):
        take_snapshot("m", T0 + 1, Facts(()), [])
    shown = snapshot_now("m", T0 + 1, Facts(()), clearing_figures([5, 7]))
    assert (shown.at_ms, shown.jobs_cleared, shown.clearing_sum_micros) == (T0 + 1, 2, 12)


def test_each_job_is_in_one_slot() -> None:
    chance = random.Random(1)
    clearings = [cleared(T0 + chance.randrange(60 * MINUTE), chance.randrange(1000)) for _ in range(2000)]
    clearings += [cleared(T0 + n * 5 * MINUTE, 1) for n in range(12)]
    slots = [T0 + n * SNAPSHOT_INTERVAL_MS for n in range(14)]
    snapshots = [take_snapshot("m", at_ms, Facts(()), clearings) for at_ms in slots]
    assert sum(s.jobs_cleared for s in snapshots) == len(clearings)
    assert sum(s.clearing_sum_micros for s in snapshots) == sum(c.price_micros for c in clearings)


def test_merged_snapshots() -> None:
    one = replace(traded(T0, 10, 20, 90), active_asks=2, ask_sum_micros=300, supply=4, demand=1)
    two = replace(traded(T0 + 5 * MINUTE, 50), active_asks=1, ask_sum_micros=60, supply=2, demand=9, surge=True)
    point = merge([one, two, quiet(T0)], T0 - 5 * MINUTE, T0 + 5 * MINUTE)
    assert (point.snapshots, point.jobs_cleared, point.clearing_sum_micros) == (3, 4, 170)
    assert (point.clearing_min_micros, point.clearing_median_micros, point.clearing_max_micros) == (10, 20, 90)
    assert average_of(point) == (120, None, 43)  # 42.5
    assert (point.supply_sum, point.demand_sum, point.surge) == (6, 10, True)
    nothing = merge([], T0, T0 + 1)
    assert (nothing.snapshots, nothing.clearing_median_micros, nothing.surge) == (0, None, False)


def test_the_median_of_a_longer_time_weighs_by_jobs() -> None:
    few, many = traded(T0, 1000, 1000), traded(T0 + 5 * MINUTE, 7, 8, 9)
    assert merge([few, many], 0, 1).clearing_median_micros == 8
    assert merge([few, traded(T0, 5, 5)], 0, 1).clearing_median_micros == 5, "the lower of two in the middle"


@pytest.mark.parametrize("hours", [*HISTORY_HOURS, 2, 25, 719])
def test_history(hours: int) -> None:
    chance = random.Random(hours)
    now = T0 + chance.randrange(5 * MINUTE)
    count = hours * 12
    snapshots = [
        traded(T0 - n * 5 * MINUTE, *(chance.randrange(99) for _ in range(n % 3))) for n in range(-2, count + 3)
    ]
    chance.shuffle(snapshots)
    found = history("m", [*snapshots, quiet(T0, "other")], hours, now)
    inside = [s for s in snapshots if now - hours * HOUR_MS < s.at_ms <= now]
    assert found.whole == merge(sorted(inside, key=lambda s: s.at_ms), now - hours * HOUR_MS, now)
    assert found.whole.snapshots == count
    assert found.whole.jobs_cleared == sum(s.jobs_cleared for s in inside)
    assert count / 40 < len(found.points) <= HISTORY_POINTS_MAX
    for name in ("snapshots", "jobs_cleared", "clearing_sum_micros", "supply_sum"):
        assert sum(getattr(p, name) for p in found.points) == getattr(found.whole, name), "the parts are the whole"
    for earlier, later in zip(found.points, found.points[1:], strict=False):
        assert earlier.end_ms <= later.start_ms
    length = point_length_ms(hours)
    assert all(p.end_ms - p.start_ms == length and p.start_ms % length == 0 for p in found.points)
    lowest = min(p.clearing_min_micros for p in found.points if p.clearing_min_micros is not None)
    assert lowest == found.whole.clearing_min_micros


def test_the_edges_of_a_history() -> None:
    found = history(
        "m", [traded(T0 - HOUR_MS, 1), traded(T0 - HOUR_MS + SNAPSHOT_INTERVAL_MS, 2), traded(T0, 3)], 1, T0
    )
    assert found.whole.clearing_sum_micros == 5


def test_a_chart_never_has_too_many_points() -> None:
    for hours in range(1, HISTORY_HOURS[-1] + 1):
        slots = hours * 12
        length = point_length_ms(hours) // SNAPSHOT_INTERVAL_MS
        assert -(-slots // length) + 1 <= HISTORY_POINTS_MAX
    assert point_length_ms(1) == point_length_ms(24) == SNAPSHOT_INTERVAL_MS


def test_points_stay_the_same_from_one_call_to_the_next() -> None:
    snapshots = [traded(T0 - n * 5 * MINUTE, n) for n in range(9000)]
    first = history("m", snapshots, 720, T0)
    second = history("m", snapshots, 720, T0 + 4 * MINUTE)
    assert first.points[1:] == second.points[1:]


def test_no_history() -> None:
    found = history("m", [], 24, T0)
    assert found.points == () and found.whole.snapshots == 0
    assert found.whole.start_ms == T0 - 24 * HOUR_MS
