"""One quote for a whole run: the most that it can cost.

Only jobs that succeed cost anything, each at most its bid: a failed attempt is refunded, so one that is tried again pays once. A step costs
at most its bid for each of its items (``max_items`` where it fans out, since nobody knows yet how many there will be), and a run the sum
of its steps. Steps that are skipped, blocked or answered from the cache cost less, never more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.workflows.definition import Definition
from protocol import limits
from protocol.prices import format_credits


@dataclass(frozen=True, slots=True)
class QuoteLine:
    """One step: ``jobs`` at most, each for ``each_micros`` at most. ``is_exact``: it does not fan out and runs in any case."""

    step: str
    cargo: str
    jobs: int
    each_micros: int
    is_exact: bool

    @property
    def micros(self) -> int:
        return self.jobs * self.each_micros

    def to_json(self) -> dict[str, Any]:
        each, most = format_credits(self.each_micros), format_credits(self.micros)
        return {"step": self.step, "cargo": self.cargo, "jobs_max": self.jobs, "price_each_max": each, "price_max": most}


@dataclass(frozen=True, slots=True)
class FlowQuote:
    """The most that a run can cost, in micro-credits; ``missing``: steps that nobody can price now, which are not part of it."""

    lines: tuple[QuoteLine, ...]
    missing: tuple[str, ...] = ()

    @property
    def micros(self) -> int:
        return min(sum(line.micros for line in self.lines), limits.PRICE_MICROS_MAX)

    @property
    def jobs(self) -> int:
        return sum(line.jobs for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        steps = [line.to_json() for line in self.lines]
        return {"price_max": format_credits(self.micros), "jobs_max": self.jobs, "steps": steps, "unpriced": list(self.missing)}


def quote_of(definition: Definition, each_micros: Mapping[str, int | None]) -> FlowQuote:
    """``each_micros``: by the step's key, what one of its jobs costs at most where the step does not say it itself (``bid_price`` counts
    first): the bid that the exchange would make for it; None or absent: nobody can say. Raises ValueError for a price below nothing."""
    lines, missing = [], []
    for step in definition.steps:
        price = step.bid_micros if step.bid_micros is not None else each_micros.get(step.key)
        if price is None:
            missing.append(step.key)
            continue
        if not 0 <= price <= limits.PRICE_MICROS_MAX:
            raise ValueError(f"the price of {step.key} is outside of what prices can be")
        lines.append(QuoteLine(step.key, step.cargo, step.tasks_max, price, not step.fans_out and step.when is None))
    return FlowQuote(tuple(lines), tuple(missing))
