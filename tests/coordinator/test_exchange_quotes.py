"""Quotes: what is promised is charged, and nothing else is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.exchange.bids import Bid, BidSource, StandingAsk, Work
from coordinator.exchange.quotes import (
    QUOTE_LIFETIME_MS,
    Quote,
    QuoteFault,
    QuoteRefused,
    charge,
    check_quote,
    make_quote,
)
from privacy.keys import NodeKey
from protocol import limits
from protocol.prices import Ask

T0 = 1_790_000_000_000
ISLAND = NodeKey(bytes([1]) * 32).peer_id
ASK = Ask(1000, 20_000, 0)
WORK = Work(prompt_tokens=50, output_tokens=500, choices=2, job_s_max=600.0)
BID = Bid(30_000, BidSource.MARKET, surge=True)


def quoted(ask: Ask = ASK, work: Work = WORK, bid: Bid = BID) -> Quote:
    return make_quote("q1", "alice", "m", StandingAsk(ISLAND, ask, 20.0, 1), work, bid, ("cheapest",), T0)


def fault(
    quote: Quote, account: str = "alice", cargo: str = "m", work: Work = WORK, now: int = T0
) -> QuoteFault | None:
    try:
        check_quote(quote, account, cargo, work, now)
    except QuoteRefused as refused:
        assert refused.message == str(refused)
        return refused.fault
    return None


def test_a_quote() -> None:
    quote = quoted()
    assert (quote.price_micros, quote.limit) == (22_000, 11_000)
    assert (quote.island, quote.ask, quote.expires_at_ms) == (ISLAND, ASK, T0 + 60_000)
    assert QUOTE_LIFETIME_MS == 60_000


def test_no_quote_is_above_its_bid() -> None:
    assert quoted(bid=Bid(22_000, BidSource.SAVED)).price_micros == 22_000
    with pytest.raises(ValueError, match="above the bid"):
        quoted(bid=Bid(21_999, BidSource.SAVED))


def test_who_may_use_it_and_for_what() -> None:
    quote = quoted()
    assert fault(quote) is None
    assert fault(quote, now=T0 + 59_999) is None
    assert fault(quote, now=T0 + 60_000) is QuoteFault.EXPIRED
    assert fault(quote, account="bob") is QuoteFault.NOT_YOURS
    assert fault(quote, account="bob", now=T0 + 60_000) is QuoteFault.NOT_YOURS
    assert fault(quote, cargo="n") is QuoteFault.OTHER_WORK
    for more in ({"output_tokens": 501}, {"choices": 3}, {"prompt_tokens": 51}):
        assert fault(quote, work=replace(WORK, **more)) is QuoteFault.OTHER_WORK
    for less in ({"output_tokens": 499}, {"choices": 1}, {"prompt_tokens": 0}):
        assert fault(quote, work=replace(WORK, **less)) is None


def test_a_clock_that_jumps_makes_no_quote_last_longer() -> None:
    quote = quoted()
    assert fault(quote, now=T0 - 60_000) is None, "another Coordinator's clock"
    assert fault(quote, now=T0 - 60_001) is QuoteFault.EXPIRED


def test_the_quoted_ask_is_charged_whatever_the_island_asks_by_then() -> None:
    quote, raised = quoted(), Ask(50_000, 900_000, 0)
    metered = {"output_tokens": 100, "compute_ms": 3000}
    receipt = min(raised.price(100, 3000), quote.limit)  # an Island charges its own ask up to the ticket's limit
    assert receipt == quote.limit
    assert charge(quote.ask, quote.limit, receipt_micros=receipt, **metered) == 3000
    lowered = Ask(10, 0, 0)
    assert charge(quote.ask, quote.limit, receipt_micros=lowered.price(100, 3000), **metered) == 10


def test_a_charge_is_the_least_of_ask_limit_and_receipt() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        ask = Ask(*(chance.randrange(10 ** chance.randint(1, 6)) for _ in range(3)))
        limit, receipt = chance.randrange(10**7), chance.randrange(10**7)
        tokens, ms = chance.randrange(5000), chance.randrange(10**5)
        price = charge(ask, limit, tokens, ms, receipt)
        assert price in (ask.price(tokens, ms), limit, receipt)
        assert 0 <= price <= min(ask.price(tokens, ms), limit, receipt)


def test_all_choices_of_a_quote_cost_no_more_than_it_says() -> None:
    chance = random.Random(2)
    for _ in range(500):
        ask = Ask(*(chance.randrange(10 ** chance.randint(1, 6)) for _ in range(3)))
        work = Work(chance.randrange(1000), chance.randint(1, 4096), chance.randint(1, 16))
        quote = quoted(ask, work, Bid(limits.PRICE_MICROS_MAX, BidSource.EXPLICIT))
        used = [(chance.randrange(work.output_tokens + 1), chance.randrange(10**7)) for _ in range(work.choices)]
        total = sum(charge(quote.ask, quote.limit, tokens, ms, 10**15) for tokens, ms in used)
        assert total <= quote.price_micros <= quote.bid.micros


@pytest.mark.parametrize(
    ("limit", "receipt", "tokens", "ms"), [(-1, 0, 0, 0), (0, -1, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)]
)
def test_no_charge_is_less_than_nothing(limit: int, receipt: int, tokens: int, ms: int) -> None:
    with pytest.raises(ValueError):
        charge(ASK, limit, tokens, ms, receipt)


def test_to_json_and_back() -> None:
    most = limits.PRICE_MICROS_MAX
    for quote in (
        quoted(),
        quoted(work=Work(0, 1), bid=Bid(2000, BidSource.DEFAULT, capped=True)),
        quoted(work=replace(WORK, job_s_max=30)),
        quoted(Ask(most, 0, 0), Work(0, 1), Bid(most, BidSource.EXPLICIT)),
    ):
        assert Quote.from_json(json.loads(json.dumps(quote.to_json()))) == quote


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda stored: {key: value for key, value in stored.items() if key != name}


def _with(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda stored: {**stored, name: value}


STORED_BADLY: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("no object", lambda stored: [stored]),
    ("nothing", lambda stored: None),
    ("a field missing", _without("island")),
    ("a field more", _with("extra", 1)),
    ("a price as text", _with("price_micros", "22000")),
    ("a price as a float", _with("price_micros", 22000.0)),
    ("a price that is true", _with("price_micros", True)),
    ("a price above its bid", _with("price_micros", 30_001)),
    ("a price below nothing", _with("price_micros", -1)),
    ("a price of any size", _with("price_micros", 10**400)),
    ("an unknown source", _with("bid", [30_000, "guess", False, False])),
    ("a bid that is short", _with("bid", [30_000, "market"])),
    ("a bid above all prices", _with("bid", [10**16, "market", False, False])),
    ("an ask that is short", _with("ask", [1, 2])),
    ("an ask below nothing", _with("ask", [1, 2, -3])),
    ("an ask that is no list", _with("ask", "1+2+3")),
    ("work of no choice", _with("work", [1, 1, 0, 600.0])),
    ("reasons that are no texts", _with("reasons", ["a", 1])),
    ("too many reasons", _with("reasons", ["a"] * 17)),
    ("a reason that breaks lines", _with("reasons", ["a\nb"])),
    ("no Island", _with("island", "nobody")),
    ("an id with blanks", _with("id", "q 1")),
    ("an account that breaks lines", _with("account", "a\nb")),
    ("an end before its begin", _with("expires_at_ms", T0 - 1)),
    ("a time of any size", _with("created_at_ms", 10**400)),
]


@pytest.mark.parametrize("change", [row[1] for row in STORED_BADLY], ids=[row[0] for row in STORED_BADLY])
def test_what_is_no_stored_quote(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(ValueError):
        Quote.from_json(change(quoted().to_json()))
