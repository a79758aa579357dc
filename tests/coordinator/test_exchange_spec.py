"""specs/exchange.md and the code say the same."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from coordinator import pricing
from coordinator.exchange.bids import BidSource
from coordinator.exchange.hardware import TIER_PPM
from coordinator.exchange.order_book import EDGES
from coordinator.exchange.quotes import Quote
from coordinator.exchange.snapshots import HISTORY_HOURS

PAGE = (Path(__file__).parents[2] / "specs" / "exchange.md").read_text()
_OWN = re.compile(r"^\| `([a-z_]+)\.([A-Z_]+)` \| ([0-9,]+) \|", re.MULTILINE)


def test_parameters_of_the_coordinator_have_the_values_of_the_code() -> None:
    rows = _OWN.findall(PAGE)
    assert len(rows) > 10
    for module, name, value in rows:
        known = getattr(importlib.import_module(f"coordinator.exchange.{module}"), name)
        assert int(value.replace(",", "")) == known, name


def test_bids_stand_in_their_order() -> None:
    assert re.findall(r"^\d\. \*\*(\w+)\*\*:", PAGE, re.MULTILINE) == list(BidSource)


def test_figures_in_the_text() -> None:
    multipliers = [f"{ppm / 1_000_000:.1f}" for ppm in TIER_PPM.values()]
    assert re.findall(r"rate × (2\.0) .*?, (1\.5) .*?, (1\.2) .*?, (1\.0) .*?, (0\.5) ", PAGE) == [tuple(multipliers)]
    assert f"1 to {HISTORY_HOURS[-1]} hours" in PAGE
    steps = [edge for edge in EDGES if 10**6 <= edge < 10**7]
    assert "1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6 and 8 times" in PAGE
    assert [step / 10**6 for step in steps] == [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8]
    assert "1 s + 2 ×" in PAGE and (pricing.TIME_BASE_MS, pricing.TIME_MARGIN) == (1000, 2.0)
    assert "by 5 tokens/s" in PAGE and pricing.TOKENS_PER_S_ASSUMED == 5.0
    assert "an eighth" in PAGE and pricing.PREFILL_SPEEDUP == 8.0


def test_the_page_names_what_a_quote_holds() -> None:
    quotes = PAGE[PAGE.index("### Quotes") : PAGE.index("### What is published")]
    shown = {"cargo", "island", "ask", "price_micros", "bid", "work", "reasons", "expires_at_ms"}
    assert shown < set(Quote.__dataclass_fields__)
    for word in ("Cargo", "Island", "ask", "price", "bid", "size of the request", "reasons", "expiry"):
        assert word in quotes
