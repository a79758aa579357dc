"""specs/ledger.md and the code say the same."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

from coordinator.books.audit import CHECKS
from coordinator.books.errors import Why
from coordinator.books.ledger import AMOUNT_MAX, ISSUE, LOSSES, Balance, Hold, HoldState, Transfer, TransferKind

PAGE = (Path(__file__).parents[2] / "specs" / "ledger.md").read_text()
_OWN = re.compile(r"^\| `([a-z_.]+)\.([A-Z_]+)` \| (-?[0-9,]+) \|", re.MULTILINE)


def test_parameters_of_the_coordinator_have_the_values_of_the_code() -> None:
    rows = _OWN.findall(PAGE)
    assert len(rows) > 8
    for module, name, value in rows:
        known = getattr(importlib.import_module(f"coordinator.{module}"), name)
        assert int(value.replace(",", "")) == known, name
    assert "at most 2^60" in PAGE and AMOUNT_MAX == 2**60


def test_rows_have_the_fields_of_the_code() -> None:
    for row in (Balance, Transfer, Hold):
        names = "  ".join(field.name for field in fields(row))
        assert re.search(rf"^{row.__name__} +{re.escape(names)}$", PAGE, re.MULTILINE), row.__name__


def test_states_kinds_and_accounts_are_named() -> None:
    table = PAGE[PAGE.index("| | pending |") : PAGE.index("There are four kinds")]
    assert set(re.findall(r"^\| \w* ?\| (\w+) \|", table, re.MULTILINE)) == {state.value for state in HoldState}
    assert all(f"`{kind.value}`" in PAGE for kind in TransferKind)
    assert all(f"`{account}`" in PAGE for account in (ISSUE, LOSSES)) and f"`{Why.NO_CREDIT.value}`" in PAGE


def test_each_promise_has_its_check() -> None:
    promises = re.findall(r"^\d+\. ", PAGE[PAGE.index("## What holds when") :], re.MULTILINE)
    assert len(promises) == len(CHECKS) - 1  # two checks are about tickets, and one promise
