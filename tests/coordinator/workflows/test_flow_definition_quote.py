"""The one quote of a run."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.workflows.definition import parse_definition
from coordinator.workflows.quote import QuoteLine, quote_of
from protocol import limits

STEPS: list[dict[str, Any]] = [
    {"key": "a", "cargo": "echo"},
    {"key": "b", "cargo": "big", "for_each": "{{ input.l }}", "max_items": 20, "retry": {"max_attempts": 5}},
    {"key": "c", "cargo": "big", "when": "{{ input.go }}", "bid_price": "0.5"},
]


def test_each_step_at_its_most_and_retries_for_nothing() -> None:
    quote = quote_of(parse_definition({"steps": STEPS}), {"a": 1000, "b": 20_000, "c": 7})
    assert quote.lines == (
        QuoteLine("a", "echo", 1, 1000, True),
        QuoteLine("b", "big", 20, 20_000, False),
        QuoteLine("c", "big", 1, 500_000, False),
    )
    assert (quote.micros, quote.jobs, quote.missing) == (901_000, 22, ())
    assert quote.to_json() == {
        "price_max": "0.901",
        "jobs_max": 22,
        "steps": [
            {"step": "a", "cargo": "echo", "jobs_max": 1, "price_each_max": "0.001", "price_max": "0.001"},
            {"step": "b", "cargo": "big", "jobs_max": 20, "price_each_max": "0.02", "price_max": "0.4"},
            {"step": "c", "cargo": "big", "jobs_max": 1, "price_each_max": "0.5", "price_max": "0.5"},
        ],
        "unpriced": [],
    }


def test_what_nobody_can_price_is_named() -> None:
    quote = quote_of(parse_definition({"steps": STEPS}), {"a": None})
    assert quote.missing == ("a", "b") and quote.micros == 500_000


def test_prices_stay_within_what_prices_can_be() -> None:
    definition = parse_definition({"steps": STEPS})
    assert quote_of(definition, {"a": limits.PRICE_MICROS_MAX, "b": limits.PRICE_MICROS_MAX}).micros == limits.PRICE_MICROS_MAX
    with pytest.raises(ValueError, match="price of a"):
        quote_of(definition, {"a": -1})
