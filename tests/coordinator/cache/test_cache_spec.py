"""specs/inference-cache.md and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.cache import asking, budget, candidates, judging, meaning, policy, purge, service, shadow, table
from coordinator.cache.budget import tail
from protocol import limits

PAGE = (Path(__file__).parents[3] / "specs" / "inference-cache.md").read_text()
HOMES = {module.__name__.rpartition(".")[2]: module for module in (asking, budget, candidates, judging, meaning, policy, purge, service)}


def test_parameters() -> None:
    rows = dict(re.findall(r"^\| `([a-z]*\.?[A-Z_]+)` \| ([0-9.,]+) \|", PAGE, re.MULTILINE))
    assert len(rows) == 21
    for name, written in rows.items():
        home, _, constant = name.rpartition(".")
        assert getattr(HOMES.get(home, limits), constant) == float(written.replace(",", "")), name
    named = set(re.findall(r"`([a-z]*\.?[A-Z]+_[A-Z_]+)`", PAGE))
    assert named <= set(rows), named - set(rows)


def test_words() -> None:
    assert f"`{shadow.SHADOW_ACCOUNT}`" in PAGE and f"above {asking.SAMPLED_TEMPERATURE_MAX} without" in PAGE
    assert table.OVERSIZE_SHARE == 16 and "a sixteenth of all room" in PAGE
    for label in (asking._TEXT_LABEL,):
        assert f'"{label.decode().rstrip(chr(0))}"' in PAGE


@pytest.mark.parametrize(("false", "checks"), [(2, 7), (3, 16), (5, 40)])
def test_when_it_is_switched_off(false: int, checks: int) -> None:
    """The figures on the page are the last ones at which it is."""
    assert re.search(rf"\b{false} (?:false ones )?of (?:the first )?{checks}\b", PAGE)
    allowed = policy.ERROR_BUDGET_DEFAULT
    assert tail(false, checks, allowed) < 1 - policy.CONFIDENCE_DEFAULT <= tail(false, checks + 1, allowed)
