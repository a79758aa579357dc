"""The market rate: a window that forgets exactly, whatever the order in which jobs are heard of."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest

from coordinator.exchange.rates import (
    RATE_CLEARINGS_MAX,
    RATE_WINDOW_MS,
    Clearing,
    ClearingFigures,
    MarketRate,
    clearing_figures,
)
from protocol.prices import Ask

T0 = 1_790_000_000_000


def cleared(at_ms: int, ask: Ask = Ask(1000), tokens: int = 100, ms: int = 2000, price: int | None = None) -> Clearing:  # noqa: B008
    return Clearing("m", at_ms, ask, ask.price(tokens, ms) if price is None else price, tokens, ms)


def rate_of(clearings: list[Clearing], window_ms: int = RATE_WINDOW_MS, most: int = RATE_CLEARINGS_MAX) -> MarketRate:
    rate = MarketRate(window_ms, most)
    for clearing in clearings:
        rate.add(clearing)
    return rate


def some(chance: random.Random, count: int, span_ms: int = 10_000) -> list[Clearing]:
    found = []
    for _ in range(count):
        ask = Ask(*(chance.randrange(10**6) for _ in range(3)))
        found.append(cleared(T0 + chance.randrange(span_ms), ask, chance.randrange(5000), chance.randrange(60_000)))
    return found


def test_nothing_yet() -> None:
    rate = MarketRate()
    assert rate.rate(T0) is None
    assert rate.tokens_per_s(T0) == 0.0
    assert rate.jobs(T0) == 0
    assert rate.statistics(T0) == ClearingFigures()
    assert rate.statistics(T0).average_micros is None
    assert rate.newest_ms == 0


def test_jobs_at_one_ask_have_that_rate() -> None:
    ask = Ask(1000, 20_001, 37)
    rate = rate_of([cleared(T0, ask, tokens, 7 * tokens) for tokens in (1, 10, 999, 4096)])
    assert rate.rate(T0) == ask
    assert rate.tokens_per_s(T0) == pytest.approx(1000 / 7)


def test_each_part_is_weighted_by_what_it_was_paid_for() -> None:
    rate = rate_of(
        [cleared(T0, Ask(100, 1000, 0), tokens=3000, ms=0), cleared(T0, Ask(300, 5000, 0), tokens=1000, ms=0)]
    )
    assert rate.rate(T0) == Ask(200, 2000, 0)


def test_what_nobody_paid_moves_nothing() -> None:
    """An Island that trades with itself could else write any price into the rate for nothing."""
    honest = [cleared(T0 + n, Ask(1000, 2000, 30)) for n in range(10)]
    greedy = cleared(T0 + 99, Ask(1000, 10**15, 10**15), tokens=0, ms=0)
    assert rate_of([*honest, greedy]).rate(T0 + 99) == rate_of(honest).rate(T0 + 99)


def test_an_ask_counts_as_far_as_it_was_paid() -> None:
    """The limit was half of what the ask gives."""
    ask = Ask(1000, 2000, 4000)
    asked = ask.price(1000, 1000)
    assert rate_of([cleared(T0, ask, 1000, 1000, price=asked // 2)]).rate(T0) == Ask(500, 1000, 2000)
    assert rate_of([cleared(T0, ask, 1000, 1000, price=0)]).rate(T0) == Ask()


def test_jobs_at_the_rate_would_have_cost_what_they_did() -> None:
    chance = random.Random(1)
    for _ in range(100):
        clearings = some(chance, chance.randint(1, 30))
        rate = rate_of(clearings).rate(T0 + 10_000)
        assert rate is not None
        exact = Fraction(0)
        for c in clearings:
            exact += c.ask.per_job + Fraction(
                c.ask.per_1k_output * c.output_tokens + c.ask.per_second * c.compute_ms, 1000
            )
        tokens, ms = sum(c.output_tokens for c in clearings), sum(c.compute_ms for c in clearings)
        at_rate = rate.per_job * len(clearings) + Fraction(rate.per_1k_output * tokens + rate.per_second * ms, 1000)
        assert exact <= at_rate < exact + len(clearings) + Fraction(tokens + ms, 1000), (
            "rounded up, by less than one each"
        )


def test_scaling_asks_scales_the_rate() -> None:
    chance = random.Random(2)
    for _ in range(200):
        clearings, k = some(chance, chance.randint(1, 20)), chance.randint(2, 9)
        dearer = []
        for c in clearings:
            ask = Ask(k * c.ask.per_job, k * c.ask.per_1k_output, k * c.ask.per_second)
            dearer.append(cleared(c.at_ms, ask, c.output_tokens, c.compute_ms))
        one, many = rate_of(clearings).rate(T0 + 10_000), rate_of(dearer).rate(T0 + 10_000)
        assert one is not None and many is not None
        for name in ("per_job", "per_1k_output", "per_second"):
            assert k * (getattr(one, name) - 1) < getattr(many, name) <= k * getattr(one, name)


def test_the_order_does_not_matter() -> None:
    chance = random.Random(3)
    for _ in range(100):
        clearings = some(chance, 40, span_ms=20)  # many at the same millisecond
        moments = [T0 + n for n in (-1, 0, 5, 10, 25, 40)]
        first = rate_of(clearings, window_ms=15, most=25)
        chance.shuffle(clearings)
        second = MarketRate(window_ms=15, clearings_max=25)
        for clearing in clearings:
            second.add(clearing)
            if chance.random() < 0.5:
                second.rate(T0 + chance.randrange(40))  # asking changes nothing
        for now in moments:
            assert first.rate(now) == second.rate(now)
            assert first.statistics(now) == second.statistics(now)
            assert first.tokens_per_s(now) == second.tokens_per_s(now)


def test_the_window_forgets_exactly() -> None:
    chance = random.Random(4)
    window = 1000
    for _ in range(50):
        clearings = some(chance, 60)
        rate = rate_of(clearings, window)
        for _ in range(20):
            now = T0 + chance.randrange(12_000)
            # only what is in the window was ever there
            inside = [c for c in clearings if now - window < c.at_ms <= now + 60_000]
            fresh = rate_of(inside, 10**9)
            assert rate.rate(now) == fresh.rate(now)
            assert rate.jobs(now) == len(inside)
            assert rate.statistics(now) == clearing_figures(c.price_micros for c in inside)
            assert rate.tokens_per_s(now) == fresh.tokens_per_s(now)


def test_the_edges_of_the_window() -> None:
    rate = rate_of([cleared(T0)], window_ms=1000)
    assert [rate.jobs(T0 + ms) for ms in (0, 999, 1000)] == [1, 1, 0]
    assert [rate.jobs(T0 - ms) for ms in (60_000, 60_001)] == [1, 0], "clocks of Coordinators differ a little"


def test_a_clock_that_jumps_forgets_nothing() -> None:
    rate = rate_of([cleared(T0, Ask(500))])
    assert rate.rate(T0 + 10 * RATE_WINDOW_MS) is None
    rate.add(cleared(T0 + 10 * RATE_WINDOW_MS, Ask(9000)))
    assert rate.rate(T0 + 1) == Ask(500), "what cleared in the future does not count yet"


def test_memory_is_bounded_and_the_newest_stay() -> None:
    rate = rate_of([cleared(T0 + n, Ask(n)) for n in range(10_000)], most=100)
    assert rate.jobs(T0 + 10_000) == 100
    assert len(rate._clearings) == 100 and len(rate._sums) == 101
    assert rate.rate(T0 + 10_000) == Ask(9950)  # 9,949.5
    rate.add(cleared(T0, Ask(10**6)))
    assert rate.rate(T0 + 10_000) == Ask(9950), "an old one that is heard of late pushes nothing out"
    assert rate.newest_ms == T0 + 9999


def test_of_clearings_at_one_moment_the_same_ones_stay() -> None:
    twins = [cleared(T0, price=price, ms=ms) for price in (900, 800) for ms in (2000, 3000)]
    kept = {tuple(rate_of(order, most=2)._clearings) for order in (twins, twins[::-1], twins[1:] + twins[:1])}
    assert len(kept) == 1


def test_figures() -> None:
    figures = clearing_figures([30, 10, 20, 45])
    assert figures == ClearingFigures(4, 105, 10, 20, 45)
    assert figures.average_micros == 27  # 26.25
    assert clearing_figures([7]) == ClearingFigures(1, 7, 7, 7, 7)


@pytest.mark.parametrize("bad", [{"price_micros": -1}, {"output_tokens": -1}, {"compute_ms": -1}])
def test_no_clearing_is_less_than_nothing(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="less than nothing"):
        replace(cleared(T0), **bad)  # type: ignore[arg-type]
