"""What clients say to the exchange. Raises ValueError with a text for the client that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.exchange.snapshots import HISTORY_HOURS
from protocol import checks, limits
from protocol.prices import Ask, parse_ask_json, parse_price

_HOURS = re.compile(r"[1-9][0-9]{0,3}\Z")
_HOURS_DEFAULT = 24


@dataclass(frozen=True, slots=True)
class AskingPrice:
    """What an Island is to ask for a Cargo from now on."""

    cargo: str
    island: str
    ask: Ask


def parse_bid(value: object, name: str = "bid_price") -> int:
    """Micro-credits of a bid in JSON, for a job or to be saved."""
    try:
        return parse_price(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parse_asking_price(body: Mapping[str, Any]) -> AskingPrice:
    """``POST /api/v1/market/asking-prices``: ``{workload_slug, asking_price, host_id}``; ``cargo`` and ``island`` mean the same."""
    cargo = _text(body, "workload_slug", "cargo")
    island = _text(body, "host_id", "island")
    checks.label("workload_slug", cargo, limits.NAME_CHARS_MAX)
    checks.peer_id("host_id", island)
    try:
        return AskingPrice(cargo, island, parse_ask_json(body.get("asking_price")))
    except ValueError as error:
        raise ValueError(f"asking_price: {error}") from None


def parse_hours(text: str | None) -> int:
    """``?hours=``: up to the longest history; None: a day."""
    if text is None:
        return _HOURS_DEFAULT
    if not _HOURS.match(text) or int(text) > HISTORY_HOURS[-1]:
        raise ValueError(f"hours: a whole number from 1 to {HISTORY_HOURS[-1]}, not {text[:40]!r}")
    return int(text)


def _text(body: Mapping[str, Any], *names: str) -> str:
    said = [name for name in names if body.get(name) is not None]
    if len(said) != 1:
        raise ValueError(f"{names[0]}: {'missing' if not said else 'said twice'}")
    value = body[said[0]]
    if not isinstance(value, str):
        raise ValueError(f"{said[0]}: must be text, not {type(value).__name__}")
    return value
