"""What the exchange shows and what it is told: keys, decimal strings, and fields of clients that are no use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.exchange import answers
from coordinator.exchange.bids import Bid, BidSource, StandingAsk, Work
from coordinator.exchange.hardware import Tier
from coordinator.exchange.markets import Listing, Markets
from coordinator.exchange.order_book import order_book
from coordinator.exchange.parsing import AskingPrice, parse_asking_price, parse_bid, parse_hours
from coordinator.exchange.quotes import make_quote
from coordinator.exchange.rates import RATE_WINDOW_MS, Clearing
from coordinator.exchange.snapshots import Facts, history, snapshot_now, take_snapshot
from coordinator.exchange.surge import SurgeDecision
from privacy.keys import NodeKey
from protocol.prices import Ask, parse_ask, parse_credits

T0 = 300_000 * 6_000_000
ISLAND = NodeKey(bytes([1]) * 32).peer_id
ASKS = [StandingAsk(ISLAND, Ask(100_000, 20_000), 30.0, 4)]
HEAD = {"beta_mode": True, "credit_peg_usd": "0.01", "reference_job": {"output_tokens": 1000}}
SURGING = SurgeDecision(True, 80, 30, T0)


def listing(cargo: str = "m", rate: Ask | None = Ask(100_000, 20_000), surge: SurgeDecision = SURGING) -> Listing:  # noqa: B008
    return Listing(cargo, rate, 30.0, 30, 95, 7, surge)


def test_rates() -> None:
    answer = answers.rates_answer([listing("z"), listing("a", None, SurgeDecision(False, 0, 30, T0))])
    assert answer == {
        "data": [
            {
                "workload": {"id": "a", "name": "a", "slug": "a"},
                "current_rate": None,
                "current_rate_usd": None,
                "rate": None,
                "supply": 30,
                "demand": 95,
                "jobs_cleared": 7,
                "surge": {
                    "active": False,
                    "multiplier": "1",
                    "queued": 0,
                    "capacity": 30,
                    "decided_at": "2027-01-15T08:00:00.000Z",
                },
            },
            {
                "workload": {"id": "z", "name": "z", "slug": "z"},
                "current_rate": "0.12",
                "current_rate_usd": "0.0012",
                "rate": {"per_job": "0.1", "per_1k_output": "0.02", "per_second": "0"},
                "supply": 30,
                "demand": 95,
                "jobs_cleared": 7,
                "surge": {
                    "active": True,
                    "multiplier": "1.25",
                    "queued": 80,
                    "capacity": 30,
                    "decided_at": "2027-01-15T08:00:00.000Z",
                },
            },
        ],
        **HEAD,
    }


def test_a_rate() -> None:
    markets = Markets()
    for price in (100_000, 300_000):
        markets.add(Clearing("m", T0, Ask(price), price, 10, 100))
    facts = Facts(ASKS, bids=(150_000,), running=2)
    snapshot = snapshot_now("m", T0 + 5, facts, markets.statistics("m", T0 + 5))
    answer = answers.rate_answer(markets.listing("m", 1, 2, 4, T0 + 5), snapshot)
    assert answer["data"] == {
        "workload": {"id": "m", "name": "m", "slug": "m"},
        "workload_slug": "m",
        "current_rate": "0.2",
        "current_rate_usd": "0.002",
        "rate": {"per_job": "0.2", "per_1k_output": "0", "per_second": "0"},
        "supply": 4,
        "demand": 3,
        "surge": {
            "active": False,
            "multiplier": "1",
            "queued": 1,
            "capacity": 4,
            "decided_at": "2027-01-15T08:00:00.005Z",
        },
        "active_asks": 1,
        "active_bids": 1,
        "avg_ask_price": "0.12",
        "avg_bid_price": "0.15",
        "avg_clearing_price": "0.2",
        "min_clearing_price": "0.1",
        "max_clearing_price": "0.3",
        "median_clearing_price": "0.1",
        "jobs_cleared": 2,
        "snapshot_at": "2027-01-15T08:00:00.005Z",
        "usd_equivalent": "0.002",
        "suggestions": {
            "suggested_bid": "0.21",
            "suggested_bid_usd": "0.0021",
            "suggested_ask": None,
            "suggested_asks": {
                "enterprise": "0.4+0+0",
                "high_end": "0.3+0+0",
                "mid_range": "0.24+0+0",
                "entry": "0.2+0+0",
                "cpu_only": "0.1+0+0",
            },
            "surge": False,
        },
    }


def test_a_history() -> None:
    clearings = [Clearing("m", T0 - 1, Ask(500), 500, 1, 1)]
    snapshots = [
        take_snapshot("m", T0, Facts(ASKS, bids=(9,)), clearings),
        take_snapshot("m", T0 - 300_000, Facts(ASKS), []),
    ]
    answer = answers.history_answer(history("m", snapshots, 1, T0 + 1))
    assert answer["hours"] == 1 and answer["workload_slug"] == "m"
    assert answer["since"] == "2027-01-15T07:00:00.001Z"
    assert [point["snapshot_at"] for point in answer["data"]] == [
        "2027-01-15T07:55:00.000Z",
        "2027-01-15T08:00:00.000Z",
    ]
    assert answer["data"][1] == {
        "snapshot_at": "2027-01-15T08:00:00.000Z",
        "active_asks": 1,
        "active_bids": 1,
        "avg_ask_price": "0.12",
        "avg_bid_price": "0.000009",
        "avg_clearing_price": "0.0005",
        "min_clearing_price": "0.0005",
        "max_clearing_price": "0.0005",
        "median_clearing_price": "0.0005",
        "jobs_cleared": 1,
        "supply": 4,
        "demand": 1,
        "surge": False,
    }
    assert answer["summary"]["jobs_cleared"] == 1
    assert answer["summary"]["active_asks"] == 1


def test_an_order_book() -> None:
    answer = answers.order_book_answer("m", order_book(ASKS))
    assert answer == {
        "data": [{"price_from": "0.12", "price_below": "0.15", "asks": 1, "slots": 4}],
        "workload_slug": "m",
        "active_asks": 1,
        "slots": 4,
        "min_ask_price": "0.12",
        "median_ask_price": "0.12",
        "max_ask_price": "0.12",
        **HEAD,
    }


def test_suggestions() -> None:
    answer = answers.suggestions_answer([listing(), listing("x", None)], Tier.HIGH_END)
    known, unknown = answer["data"]
    assert known["workload"]["name"] == "m"
    assert known["suggested_bid"] == "0.1575"  # 0.12 x 1.05 x 1.25
    assert known["suggested_ask"] == "0.15+0.03+0"
    assert parse_ask(known["suggested_asks"]["enterprise"]) == Ask(200_000, 40_000)
    assert unknown["suggested_bid"] is None and unknown["suggested_asks"] is None
    assert set(known) == set(unknown)
    expected = {"enterprise": "2", "high_end": "1.5", "mid_range": "1.2", "entry": "1", "cpu_only": "0.5"}
    assert answer["hardware_multipliers"] == expected
    assert answer["surge_multiplier"] == "1.25"


def test_a_quote() -> None:
    quote = make_quote("q1", "alice", "m", ASKS[0], Work(10, 1000), Bid(200_000, BidSource.SAVED), ("only one",), T0)
    answer = answers.quote_answer(quote)
    assert (answer["price"], answer["price_usd"], answer["bid_price"]) == ("0.12", "0.0012", "0.2")
    assert (answer["bid_source"], answer["surge"], answer["island"]) == ("saved", False, ISLAND)
    assert answer["ask"] == {"per_job": "0.1", "per_1k_output": "0.02", "per_second": "0"}
    assert (answer["created_at"], answer["expires_at"]) == ("2027-01-15T08:00:00.000Z", "2027-01-15T08:01:00.000Z")
    assert answer["reasons"] == ["only one"]


def test_every_answer_is_json_and_every_price_a_decimal_string() -> None:
    quote = make_quote("q1", "alice", "m", ASKS[0], Work(10, 1000), Bid(200_000, BidSource.SAVED), (), T0)
    bodies = [
        answers.rates_answer([listing()]),
        answers.rate_answer(listing(), snapshot_now("m", T0, Facts(ASKS), Markets().statistics("m", T0))),
        answers.history_answer(history("m", [take_snapshot("m", T0, Facts(ASKS), [])], 24, T0)),
        answers.order_book_answer("m", order_book(ASKS)),
        answers.suggestions_answer([listing()]),
        answers.quote_answer(quote),
    ]
    for body in bodies:
        for name, value in _leaves(json.loads(json.dumps(body))):
            assert not isinstance(value, float), name
            if (
                ("price" in name or "rate" in name or "bid" in name)
                and value is not None
                and name not in ("active_bids", "bid_source")
            ):
                assert isinstance(value, str), name
                if not name.endswith("_usd") and name != "usd_equivalent":
                    parse_credits(value)


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, entry in value.items() for leaf in _leaves(entry, key)]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in _leaves(entry, name)]
    return [(name, value)]


def test_markets_of_many_cargos_are_bounded() -> None:
    markets = Markets(cargos_max=3)
    for n in range(10):
        markets.add(Clearing(f"m{n % 5}", T0 + n, Ask(n), n, 1, 1))
        markets.surge(f"m{n}", 1, 0, T0)
    assert [markets.rate(f"m{n}", T0 + 10) for n in range(5)] == [None, None, Ask(7), Ask(8), Ask(9)]
    assert repr(markets) == "<Markets of 3 Cargos>"
    assert len(markets._surges) == 3


def test_a_market_for_a_bid() -> None:
    markets = Markets()
    markets.add(Clearing("m", T0, Ask(500), 500, 20, 1000))
    market = markets.market("m", Ask(9), queued=9, capacity=4, now_ms=T0)
    assert (market.rate, market.tokens_per_s, market.default, market.surge) == (Ask(500), 20.0, Ask(9), True)
    assert markets.market("m", None, queued=0, capacity=4, now_ms=T0 + 29_999).surge, "decided for half a minute"
    assert not markets.market("m", None, queued=0, capacity=4, now_ms=T0 + 30_000).surge
    assert markets.rate("m", T0 + RATE_WINDOW_MS) is None
    assert markets.tokens_per_s("nobody's", T0) == 0.0


def test_a_bid() -> None:
    assert parse_bid("0.25") == parse_bid(0.25) == 250_000
    for bad in (-1, "-1", float("nan"), 10**30, "1e3", "0.0000001", "\u0661", True, " ", "", None, "9" * 10**6):
        with pytest.raises(ValueError, match="bid_price: a price is a number"):
            parse_bid(bad)
    with pytest.raises(ValueError, match="saved_bid: a price"):
        parse_bid(-1, "saved_bid")


def test_an_asking_price() -> None:
    body: dict[str, Any] = {"workload_slug": "m", "asking_price": "2.00", "host_id": ISLAND}
    assert parse_asking_price(body) == AskingPrice("m", ISLAND, Ask(2_000_000))
    body = {"cargo": "m", "asking_price": {"per_second": "0.1"}, "island": ISLAND}
    assert parse_asking_price(body) == AskingPrice("m", ISLAND, Ask(0, 0, 100_000))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"workload_slug": None}, "workload_slug: missing"),
        ({"cargo": "m"}, "workload_slug: said twice"),
        ({"workload_slug": 3}, "workload_slug: must be text"),
        ({"workload_slug": "'; DROP TABLE asks; --"}, "workload_slug is not a valid name"),
        ({"host_id": "x"}, "host_id is not a peer id"),
        ({"host_id": None}, "host_id: missing"),
        ({"asking_price": None}, "asking_price: "),
        ({"asking_price": -1}, "asking_price: "),
        ({"asking_price": "1e3"}, "asking_price: "),
        ({"asking_price": float("inf")}, "asking_price: "),
        ({"asking_price": "1+2+3+4"}, "asking_price: "),
    ],
)
def test_what_is_no_asking_price(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        parse_asking_price({"workload_slug": "m", "asking_price": "2", "host_id": ISLAND, **change})


def test_hours() -> None:
    assert [parse_hours(text) for text in (None, "1", "24", "168", "720")] == [24, 1, 24, 168, 720]
    for bad in ("", "0", "-1", "721", "1.5", "1e2", " 24", "٢", "9" * 10**6, "024"):
        with pytest.raises(ValueError, match="hours: a whole number from 1 to 720"):
            parse_hours(bad)
