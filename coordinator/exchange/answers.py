"""The JSON of the exchange. Prices are decimal strings of credits, beside them dollars at the peg; times are ISO 8601 in UTC.

Names are those of the original's API where it has them (``workload``, ``current_rate``, ``snapshot_at``). A price that is compared, such as
``current_rate`` or ``avg_ask_price``, is that of the reference job (order_book.py); clearing prices are what jobs did cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from coordinator.exchange.amounts import CREDIT_USD, ONE_PPM, average, format_usd
from coordinator.exchange.bids import SURGE_PPM, Work, suggested_bid
from coordinator.exchange.hardware import TIER_PPM, Tier, suggested_ask
from coordinator.exchange.markets import Listing
from coordinator.exchange.order_book import REFERENCE_OUTPUT_TOKENS, OrderBook, reference_price
from coordinator.exchange.quotes import Quote
from coordinator.exchange.snapshots import History, Point, Snapshot, average_of
from coordinator.exchange.surge import SurgeDecision
from protocol.prices import Ask, format_ask, format_credits

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REFERENCE = Work(0, REFERENCE_OUTPUT_TOKENS)
_HEAD: dict[str, Any] = {
    "beta_mode": True,
    "credit_peg_usd": CREDIT_USD,
    "reference_job": {"output_tokens": REFERENCE_OUTPUT_TOKENS},
}


def rates_answer(listings: Iterable[Listing]) -> dict[str, Any]:
    """``GET /api/v1/market/rates``"""
    return {"data": [_listing(listing) for listing in sorted(listings, key=_name)], **_HEAD}


def rate_answer(listing: Listing, snapshot: Snapshot) -> dict[str, Any]:
    """``GET /api/v1/market/rates/{cargo}``; ``snapshot``: taken now over the rate's window (``snapshots.snapshot_now``)."""
    ask, bid, clearing = average_of(snapshot)
    data = {
        **_listing(listing),
        "workload_slug": listing.cargo,
        "active_asks": snapshot.active_asks,
        "active_bids": snapshot.active_bids,
        "avg_ask_price": _credits(ask),
        "avg_bid_price": _credits(bid),
        **_clearing_prices(snapshot, clearing),
        "jobs_cleared": snapshot.jobs_cleared,
        "snapshot_at": time_to_json(snapshot.at_ms),
        "usd_equivalent": _usd(clearing),
        "suggestions": _suggestions(listing),
    }
    return {"data": data, **_HEAD}


def history_answer(history: History) -> dict[str, Any]:
    """``GET /api/v1/market/history/{cargo}?hours=24``"""
    return {
        "data": [_point(point) for point in history.points],
        "summary": _point(history.whole),
        "since": time_to_json(history.whole.start_ms),
        "hours": history.hours,
        "workload_slug": history.cargo,
        **_HEAD,
    }


def order_book_answer(cargo: str, book: OrderBook) -> dict[str, Any]:
    """``GET /api/v1/market/orderbook/{cargo}``"""
    steps = [
        {
            "price_from": format_credits(step.low_micros),
            "price_below": format_credits(step.high_micros),
            "asks": step.asks,
            "slots": step.slots,
        }
        for step in book.steps
    ]
    return {
        "data": steps,
        "workload_slug": cargo,
        "active_asks": book.asks,
        "slots": book.slots,
        "min_ask_price": _credits(book.min_micros),
        "median_ask_price": _credits(book.median_micros),
        "max_ask_price": _credits(book.max_micros),
        **_HEAD,
    }


def suggestions_answer(listings: Iterable[Listing], tier: Tier | None = None) -> dict[str, Any]:
    """``GET /api/v1/market/suggestions``; ``tier``: of the Island that asks, where it is known."""
    data = [
        {"workload": _workload(listing.cargo), **_suggestions(listing, tier)} for listing in sorted(listings, key=_name)
    ]
    multipliers = {str(known): format_credits(ppm) for known, ppm in TIER_PPM.items()}
    return {"data": data, "hardware_multipliers": multipliers, "surge_multiplier": format_credits(SURGE_PPM), **_HEAD}


def quote_answer(quote: Quote) -> dict[str, Any]:
    """A quote as its account sees it."""
    return {
        "id": quote.id,
        "object": "quote",
        "cargo": quote.cargo,
        "island": quote.island,
        "price": format_credits(quote.price_micros),
        "price_usd": format_usd(quote.price_micros),
        "ask": ask_to_json(quote.ask),
        "bid_price": format_credits(quote.bid.micros),
        "bid_source": str(quote.bid.source),
        "surge": quote.bid.surge,
        "prompt_tokens": quote.work.prompt_tokens,
        "max_tokens": quote.work.output_tokens,
        "n": quote.work.choices,
        "reasons": list(quote.reasons),
        "created_at": time_to_json(quote.created_at_ms),
        "expires_at": time_to_json(quote.expires_at_ms),
        "credit_peg_usd": CREDIT_USD,
    }


def surge_to_json(surge: SurgeDecision) -> dict[str, Any]:
    return {
        "active": surge.active,
        "multiplier": format_credits(SURGE_PPM if surge.active else ONE_PPM),
        "queued": surge.queued,
        "capacity": surge.capacity,
        "decided_at": time_to_json(surge.decided_at_ms),
    }


def ask_to_json(ask: Ask) -> dict[str, str]:
    return {
        "per_job": format_credits(ask.per_job),
        "per_1k_output": format_credits(ask.per_1k_output),
        "per_second": format_credits(ask.per_second),
    }


def time_to_json(unix_ms: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    moment = _EPOCH + timedelta(milliseconds=unix_ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _name(listing: Listing) -> str:
    return listing.cargo


def _workload(cargo: str) -> dict[str, str]:
    return {"id": cargo, "name": cargo, "slug": cargo}


def _listing(listing: Listing) -> dict[str, Any]:
    rate = listing.rate
    micros = reference_price(rate, listing.tokens_per_s) if rate is not None else None
    return {
        "workload": _workload(listing.cargo),
        "current_rate": _credits(micros),
        "current_rate_usd": _usd(micros),
        "rate": ask_to_json(rate) if rate is not None else None,
        "supply": listing.supply,
        "demand": listing.demand,
        "jobs_cleared": listing.jobs_cleared,
        "surge": surge_to_json(listing.surge),
    }


def _suggestions(listing: Listing, tier: Tier | None = None) -> dict[str, Any]:
    """``suggested_bid`` is for the reference job; an ask stands as ``--ask`` reads it."""
    rate, surge = listing.rate, listing.surge.active
    if rate is None:
        return {
            "suggested_bid": None,
            "suggested_bid_usd": None,
            "suggested_ask": None,
            "suggested_asks": None,
            "surge": surge,
        }
    bid = suggested_bid(rate, _REFERENCE, listing.tokens_per_s, surge)
    return {
        "suggested_bid": format_credits(bid),
        "suggested_bid_usd": format_usd(bid),
        "suggested_ask": format_ask(suggested_ask(rate, tier)) if tier is not None else None,
        "suggested_asks": {str(known): format_ask(suggested_ask(rate, known)) for known in Tier},
        "surge": surge,
    }


def _clearing_prices(prices: Point | Snapshot, clearing: int | None) -> dict[str, str | None]:
    return {
        "avg_clearing_price": _credits(clearing),
        "min_clearing_price": _credits(prices.clearing_min_micros),
        "max_clearing_price": _credits(prices.clearing_max_micros),
        "median_clearing_price": _credits(prices.clearing_median_micros),
    }


def _point(point: Point) -> dict[str, Any]:
    ask, bid, clearing = average_of(point)
    return {
        "snapshot_at": time_to_json(point.end_ms),
        "active_asks": average(point.active_asks, point.snapshots) or 0,
        "active_bids": average(point.active_bids, point.snapshots) or 0,
        "avg_ask_price": _credits(ask),
        "avg_bid_price": _credits(bid),
        **_clearing_prices(point, clearing),
        "jobs_cleared": point.jobs_cleared,
        "supply": average(point.supply_sum, point.snapshots) or 0,
        "demand": average(point.demand_sum, point.snapshots) or 0,
        "surge": point.surge,
    }


def _credits(micros: int | None) -> str | None:
    return format_credits(micros) if micros is not None else None


def _usd(micros: int | None) -> str | None:
    return format_usd(micros) if micros is not None else None
