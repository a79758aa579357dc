"""Which bid a job carries: where it comes from, what it reaches, and what it never passes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.books.errors import BooksRefused, Why
from coordinator.exchange.amounts import average, format_usd, median, scaled, scaled_ask
from coordinator.exchange.bids import (
    GUESS_FACTOR_MAX,
    AskPrices,
    Bid,
    BidSource,
    Market,
    StandingAsk,
    Work,
    ask_prices,
    resolve_bid,
    suggested_bid,
)
from coordinator.exchange.quotes import charge
from protocol import limits
from protocol.prices import Ask

RICH = 10**15
WORK = Work(prompt_tokens=100, output_tokens=1000)


def standing(ask: Ask, name: str = "A", speed: float = 0.0, slots: int = 1) -> StandingAsk:
    return StandingAsk(name, ask, speed, slots)


def resolve(
    market: Market, asks: list[StandingAsk], work: Work = WORK, available: int = RICH, **said: Any
) -> Bid | None:
    return resolve_bid(work, market, ask_prices(asks, work), available_micros=available, **said)


def credits(micros: int) -> Ask:
    return Ask(per_job=micros)


RATE = Market(rate=credits(1000), default=credits(70))
ORDER: list[tuple[str, dict[str, Any], Market, Bid]] = [
    ("what the job says", {"explicit": 5, "saved": 7}, RATE, Bid(5, BidSource.EXPLICIT)),
    ("nothing is a bid too", {"explicit": 0, "saved": 7}, RATE, Bid(0, BidSource.EXPLICIT)),
    ("what was saved", {"saved": 7}, RATE, Bid(7, BidSource.SAVED)),
    ("a saved nothing", {"saved": 0}, RATE, Bid(0, BidSource.SAVED)),
    ("the market", {}, RATE, Bid(1050, BidSource.MARKET)),
    ("the market in a surge", {}, replace(RATE, surge=True), Bid(1313, BidSource.MARKET, surge=True)),  # 1312.5
    ("the Cargo's own price", {}, Market(default=credits(3000)), Bid(3000, BidSource.DEFAULT)),
    ("its own price knows no surge", {}, Market(default=credits(3000), surge=True), Bid(3000, BidSource.DEFAULT)),
    ("the middle of the asks", {}, Market(), Bid(840, BidSource.DEFAULT)),
]


@pytest.mark.parametrize(("said", "market", "bid"), [row[1:] for row in ORDER], ids=[row[0] for row in ORDER])
def test_the_first_that_there_is(said: dict[str, Any], market: Market, bid: Bid) -> None:
    asks = [standing(credits(micros)) for micros in (700, 800, 9000)]
    assert resolve(market, asks, **said) == bid


def test_the_example_of_the_sources() -> None:
    """Rate 0.12 credits, 80 jobs wait for 30 slots: 0.15."""
    assert scaled(120_000, 1_250_000) == 150_000
    assert scaled(120_000, 1_050_000, 1_250_000) == 157_500


def test_a_rate_is_applied_to_any_length() -> None:
    market = Market(rate=Ask(100, 2000, 0))
    for tokens, usual in ((1, 102), (500, 1100), (4096, 8292)):
        bid = resolve(market, [], Work(10, tokens))
        assert bid == Bid(scaled(usual, 1_050_000), BidSource.MARKET)
        assert suggested_bid(Ask(100, 2000, 0), Work(10, tokens), 0.0) == scaled(usual, 1_050_000)


def test_the_market_reaches_the_cheapest_up_to_four_times_the_rate() -> None:
    for cheapest, micros in (
        (900, 1050),
        (1050, 1050),
        (1051, 1051),
        (3999, 3999),
        (4000, 4000),
        (4001, 4000),
        (10**9, 4000),
    ):
        bid = resolve(RATE, [standing(credits(cheapest)), standing(credits(10**10))])
        assert bid is not None and bid.micros == micros, cheapest


def test_the_default_reaches_the_cheapest_too() -> None:
    market = Market(default=credits(100))
    for cheapest, micros in ((90, 100), (300, 300), (500, 400)):
        bid = resolve(market, [standing(credits(cheapest))])
        assert bid == Bid(micros, BidSource.DEFAULT)


def test_hard_limits_do_not_give() -> None:
    asks = [standing(credits(1001))]
    assert resolve(RATE, asks, explicit=1000) == Bid(1000, BidSource.EXPLICIT)
    assert resolve(RATE, asks, saved=1000) == Bid(1000, BidSource.SAVED)


def test_a_rate_of_nothing_holds_only_while_somebody_asks_nothing() -> None:
    free = Market(rate=Ask(), default=Ask())
    assert resolve(free, [standing(Ask()), standing(credits(500))]) == Bid(0, BidSource.MARKET)
    assert resolve(free, [standing(credits(400)), standing(credits(500))]) == Bid(420, BidSource.DEFAULT)
    assert resolve(free, []) is None
    assert resolve(replace(free, default=credits(9)), [standing(credits(8))]) == Bid(9, BidSource.DEFAULT)


def test_nothing_to_go_by() -> None:
    assert resolve(Market(), []) is None
    assert resolve(Market(), [], explicit=3) == Bid(3, BidSource.EXPLICIT)


def test_without_history_half_of_the_islands_are_within_reach() -> None:
    chance = random.Random(1)
    for _ in range(300):
        asks = [standing(credits(chance.randrange(10**6)), f"I{n}") for n in range(chance.randint(1, 9))]
        bid = resolve(Market(), asks)
        assert bid is not None
        within = [a for a in asks if WORK.price_max(a.ask, a.tokens_per_s) <= bid.limit(1)]
        assert 2 * len(within) >= len(asks)


def test_an_explicit_bid_that_the_account_does_not_have() -> None:
    assert resolve(RATE, [], available=1000, explicit=1000) == Bid(1000, BidSource.EXPLICIT)
    with pytest.raises(BooksRefused, match=r"the bid is 0.001001 credits, and the account has 0.001 free") as error:
        resolve(RATE, [], available=1000, explicit=1001)
    assert error.value.why is Why.NO_CREDIT


@pytest.mark.parametrize("said", [{}, {"saved": 5000}])
def test_any_other_bid_is_cut_to_what_the_account_has(said: dict[str, Any]) -> None:
    bid = resolve(RATE, [], available=600, **said)
    assert bid is not None and bid.micros == 600 and bid.capped
    bid = resolve(RATE, [], available=10**6, **said)
    assert bid is not None and not bid.capped
    bid = resolve(RATE, [], available=0, **said)
    assert bid is not None and bid.micros == 0 and bid.capped


def test_a_bid_covers_all_choices() -> None:
    one, three = Work(100, 1000), Work(100, 1000, choices=3)
    for market in (RATE, replace(RATE, surge=True), Market(default=credits(777)), Market()):
        for asks in ([standing(credits(999))], [standing(credits(2500), speed=3.0), standing(Ask(7, 7, 7))]):
            single, whole = resolve(market, asks, one), resolve(market, asks, three)
            assert single is not None and whole is not None
            assert whole.limit(3) >= single.limit(1) - 1
            assert 3 * whole.limit(3) <= whole.micros < 3 * whole.limit(3) + 3
            reached = ask_prices(asks, three).cheapest
            assert reached is not None
            if whole.micros >= reached:
                assert whole.limit(3) >= reached // 3


def test_time_counts_where_it_is_asked_for() -> None:
    slow, fast = standing(Ask(0, 0, 1000), speed=10.0), standing(Ask(0, 0, 1000), speed=100.0)
    prices = ask_prices([slow, fast], WORK)
    assert prices.cheapest == WORK.price_max(fast.ask, 100.0) < WORK.price_max(slow.ask, 10.0)
    assert prices.median == prices.cheapest


def test_prices_stop_at_the_largest() -> None:
    most = limits.PRICE_MICROS_MAX
    assert Work(0, 4096, choices=64).price_max(Ask(most, most, most), 0.0) == most
    bid = resolve(Market(rate=credits(most), surge=True), [standing(credits(most))], available=2 * most)
    assert bid == Bid(most, BidSource.MARKET, surge=True)


def test_no_work_is_less_than_nothing() -> None:
    for bad in ((-1, 0, 1), (0, -1, 1), (0, 0, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="no request has"):
            Work(*bad)


def _market(chance: random.Random) -> tuple[Market, list[StandingAsk], Work]:
    def ask() -> Ask:
        return Ask(*(chance.randrange(10 ** chance.randint(1, 7)) if chance.random() < 0.7 else 0 for _ in range(3)))

    asks = [standing(ask(), f"I{n}", chance.choice((0.0, 3.0, 40.0))) for n in range(chance.randint(1, 8))]
    rate = ask() if chance.random() < 0.7 else None
    default = ask() if chance.random() < 0.5 else None
    market = Market(rate, chance.choice((0.0, 20.0)), default, chance.random() < 0.5)
    return market, asks, Work(chance.randrange(3000), chance.randint(1, 4096), chance.randint(1, 8))


def _clear(asks: list[StandingAsk], work: Work, bid: Bid, tokens: int, ms: int) -> tuple[str, int] | None:
    """The cheapest Island within the bid, and what one choice costs there."""
    limit = bid.limit(work.choices)
    willing = [(work.price_of_choice(a.ask, a.tokens_per_s), a.island, a) for a in asks]
    willing = [entry for entry in willing if entry[0] <= limit]
    if not willing:
        return None
    chosen = min(willing, key=lambda entry: entry[:2])[2]
    receipt = chosen.ask.price(tokens, ms)
    return chosen.island, charge(chosen.ask, limit, tokens, ms, receipt)


def test_no_price_is_above_its_bid() -> None:
    chance, cleared = random.Random(2), 0
    for _ in range(2000):
        market, asks, work = _market(chance)
        bid = resolve(market, asks, work, available=chance.choice((RICH, 10**5)))
        assert bid is not None
        outcome = _clear(asks, work, bid, chance.randrange(2 * work.output_tokens), chance.randrange(10**7))
        if outcome is not None:
            cleared += 1
            assert outcome[1] * work.choices <= bid.micros
    assert cleared > 1000


def test_a_guess_stays_near_what_is_usual() -> None:
    chance, seen = random.Random(3), set()
    for _ in range(2000):
        market, asks, work = _market(chance)
        bid = resolve(market, asks, work)
        assert bid is not None
        seen.add((bid.source, bid.surge))
        if bid.source is BidSource.MARKET and market.rate is not None:
            usual, cheapest = work.price_max(market.rate, market.tokens_per_s), ask_prices(asks, work).cheapest or 0
            assert scaled(usual, 1_050_000) <= bid.micros <= GUESS_FACTOR_MAX * usual
            assert bid.micros >= min(cheapest, GUESS_FACTOR_MAX * usual)
    assert seen == {(BidSource.MARKET, False), (BidSource.MARKET, True), (BidSource.DEFAULT, False)}


def test_the_order_of_asks_does_not_matter() -> None:
    chance = random.Random(4)
    for _ in range(500):
        market, asks, work = _market(chance)
        before = resolve(market, asks, work)
        chance.shuffle(asks)
        assert resolve(market, asks, work) == before


def test_an_ask_that_loses_changes_no_clearing() -> None:
    chance, tried = random.Random(5), 0
    for _ in range(1000):
        market, asks, work = _market(chance)
        bid = resolve(market, asks, work)
        assert bid is not None
        loser = standing(Ask(bid.micros + 1 + chance.randrange(10**9), chance.randrange(10**6)), "LOSER")
        more = resolve(market, [*asks, loser], work)
        assert more is not None
        if bid.source is BidSource.MARKET:
            assert more == bid
            assert _clear([*asks, loser], work, more, 10, 1000) == _clear(asks, work, bid, 10, 1000)
            tried += 1
    assert tried > 300


def test_scaling_all_prices_scales_the_bid() -> None:
    chance = random.Random(6)
    for _ in range(1000):
        market, asks, work = _market(chance)
        k = chance.randint(2, 9)

        def times(ask: Ask | None, k: int = k) -> Ask | None:
            return None if ask is None else scaled_ask(ask, k * 1_000_000)

        larger = replace(market, rate=times(market.rate), default=times(market.default))
        dearer = [replace(a, ask=scaled_ask(a.ask, k * 1_000_000)) for a in asks]
        bid, scaled_bid = resolve(market, asks, work), resolve(larger, dearer, work)
        assert bid is not None and scaled_bid is not None
        assert bid.source is scaled_bid.source
        # each part of an ask is rounded up once for each choice, and the bid once more: less than that is lost
        slack = k * (2 * GUESS_FACTOR_MAX * work.choices + 1)
        assert k * bid.micros - slack <= scaled_bid.micros <= k * bid.micros


def test_amounts() -> None:
    assert [scaled(n, 1_050_000) for n in (0, 1, 20, 21)] == [0, 2, 21, 23]
    assert scaled(1, 1_050_000, 1_250_000) == 2  # rounded once
    assert scaled_ask(Ask(1, 20, 10**15), 1_050_000) == Ask(2, 21, 10**15)
    assert (average(0, 0), average(7, 2), average(8, 2)) == (None, 4, 4)
    assert (median([]), median([5]), median([1, 2]), median([1, 2, 9])) == (None, 5, 1, 2)
    assert [format_usd(n) for n in (0, 1, 250_000, 100_000_000, -150_000_000)] == [
        "0",
        "0.00000001",
        "0.0025",
        "1",
        "-1.5",
    ]


def test_prices_of_nobody() -> None:
    assert ask_prices([], WORK) == AskPrices(None, None)
