"""The order book: every Island in one step, steps that never move. And surge, which is decided for half a minute."""

from __future__ import annotations

import random

import pytest

from coordinator.exchange.bids import StandingAsk
from coordinator.exchange.order_book import EDGES, REFERENCE_MS_MAX, OrderBook, order_book, reference_price
from coordinator.exchange.surge import SURGE_LIFETIME_MS, SurgeDecision, decide_surge
from protocol import limits
from protocol.prices import Ask

T0 = 1_790_000_000_000


def at(micros: int, slots: int = 2) -> StandingAsk:
    return StandingAsk("A", Ask(per_job=micros), 0.0, slots)


def test_the_reference_job() -> None:
    assert reference_price(Ask(5, 300, 0), 0.0) == 305
    assert reference_price(Ask(0, 0, 1000), 50.0) == 20_000  # 1,000 tokens take 20 s
    assert reference_price(Ask(0, 0, 1000), 3.0) == 333_334  # 333.3 s
    assert reference_price(Ask(0, 0, 1000), 0.0) == 200_000  # not measured: 5 tokens/s
    for slowest in (1.0, 1e-300, 5e-324):
        assert reference_price(Ask(0, 0, 1000), slowest) == REFERENCE_MS_MAX
    most = limits.PRICE_MICROS_MAX
    assert reference_price(Ask(most, most, most), 0.0) == most


def test_steps_are_ten_to_a_power_of_ten() -> None:
    assert list(EDGES) == sorted(set(EDGES))
    assert EDGES[:5] == (0, 1, 10, 12, 15)
    assert {100_000, 120_000, 150_000, 200_000, 1_000_000} <= set(EDGES)
    assert EDGES[-1] > limits.PRICE_MICROS_MAX >= EDGES[-2]


def test_a_book() -> None:
    book = order_book([at(0), at(100), at(119), at(120, slots=5), at(151)])
    assert (book.asks, book.slots) == (5, 13)
    assert (book.min_micros, book.median_micros, book.max_micros) == (0, 119, 151)
    shown = {(step.low_micros, step.high_micros): (step.asks, step.slots) for step in book.steps}
    assert shown[0, 1] == (1, 2)
    assert shown[100, 120] == (2, 4)
    assert shown[120, 150] == (1, 5)
    assert shown[150, 200] == (1, 2)
    assert shown[60, 80] == (0, 0)
    assert book.steps[-1].low_micros == 150


def test_an_empty_book() -> None:
    assert order_book([]) == OrderBook(0, 0, None, None, None, ())


def test_every_ask_is_in_exactly_one_step() -> None:
    chance = random.Random(1)
    for _ in range(200):
        asks = [
            at(chance.randrange(10 ** chance.randint(1, 15)), chance.randrange(4)) for _ in range(chance.randint(1, 40))
        ]
        book = order_book(asks)
        assert sum(step.asks for step in book.steps) == book.asks == len(asks)
        assert sum(step.slots for step in book.steps) == book.slots == sum(a.slots for a in asks)
        for low, high in zip(book.steps, book.steps[1:], strict=False):
            assert low.high_micros == high.low_micros
        for step in book.steps:
            assert step.asks == sum(step.low_micros <= a.ask.per_job < step.high_micros for a in asks)
        assert book.steps[0].asks and book.steps[-1].asks
        chance.shuffle(asks)
        assert order_book(asks) == book


def test_a_silly_ask_makes_no_step_wider() -> None:
    plain = order_book([at(100), at(130)])
    silly = order_book([at(100), at(130), at(limits.PRICE_MICROS_MAX)])
    assert silly.steps[: len(plain.steps)] == plain.steps


@pytest.mark.parametrize(
    ("queued", "capacity", "active"),
    [(0, 0, False), (1, 0, True), (60, 30, False), (61, 30, True), (80, 30, True), (2, 1, False), (0, 5, False)],
)
def test_surge_is_more_than_twice_the_capacity(queued: int, capacity: int, active: bool) -> None:
    assert decide_surge(None, queued, capacity, T0) == SurgeDecision(active, queued, capacity, T0)


def test_a_decision_holds_for_half_a_minute() -> None:
    first = decide_surge(None, 80, 30, T0)
    assert decide_surge(first, 0, 30, T0 + SURGE_LIFETIME_MS - 1) is first
    later = decide_surge(first, 0, 30, T0 + SURGE_LIFETIME_MS)
    assert later == SurgeDecision(False, 0, 30, T0 + 30_000)
    assert decide_surge(later, 80, 30, T0 + 59_999) is later


def test_a_clock_that_was_set_back_keeps_no_surge() -> None:
    first = decide_surge(None, 80, 30, T0)
    assert not decide_surge(first, 0, 30, T0 - 1).active
