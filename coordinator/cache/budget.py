"""How many false answers the semantic step may give before it is switched off. Pure.

A share of the semantic hits of each Cargo is checked in the shadow: an Island is asked too, and the two answers are compared. With k false
ones among n that were checked, the step of that Cargo is switched off once the *lower* bound of Clopper and Pearson's one-sided interval
for the share of false ones passes the budget: once it is, with the given confidence, worse than it may be.

Why the lower one. With nothing checked the upper bound is 1, so a step that had to prove itself first would begin switched off, make no
hits, and never be checked; and with an upper bound below 5 % asked for, 58 checks without a fault would be needed before the first hit.
Before the first check the guards vouch for it, which are measured on pairs (specs/inference-cache.md). The bound is looked at after each
check, so a step that is just within its budget is switched off by chance more often than the confidence says (the more looks, the
more often); that is an error to the safe side: a false answer is worse than a miss.

Only the newest CHECKS_KEPT checks count, so that a long good past does not hide a bad present. A step that was switched off stays so until
the operator says something of the Cargo's policy again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

CHECKS_KEPT = 500
_ROUNDING = 1e-12  # what floats leave of 1 - 0.95 - 0.05
_STEPS = 60  # of the bisection: 2^-60 is finer than a float's digits near 1


def tail(false: int, checks: int, share: float) -> float:
    """The probability of at least ``false`` false ones among ``checks``, where each is false with probability ``share``."""
    if false <= 0:
        return 1.0
    if share <= 0:
        return 0.0
    if share >= 1:
        return 1.0
    log_p, log_q = math.log(share), math.log1p(-share)
    whole = math.lgamma(checks + 1)
    is_upper = 2 * false > checks  # the side with fewer terms: mostly few are false
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(checks - k + 1) + k * log_p + (checks - k) * log_q)
        for k in (range(false, checks + 1) if is_upper else range(false))
    )
    found = min(1.0, math.fsum(terms))
    return found if is_upper else 1.0 - found


def lower_bound(false: int, checks: int, confidence: float) -> float:
    """The share of false ones that is passed with this confidence: the one-sided lower limit of Clopper and Pearson, "The use of confidence
    or fiducial limits illustrated in the case of the binomial" (Biometrika 26, 1934), p with P(X >= k | p) = 1 - confidence."""
    if not 0 <= false <= checks:
        raise ValueError(f"{false} of {checks} checks cannot be false")
    if false == 0:
        return 0.0
    return _root(lambda share: tail(false, checks, share), 1 - confidence)


def upper_bound(false: int, checks: int, confidence: float) -> float:
    """The share below which it is with this confidence: p with P(X <= k | p) = 1 - confidence; 1 where nothing was checked."""
    if not 0 <= false <= checks:
        raise ValueError(f"{false} of {checks} checks cannot be false")
    if false == checks:
        return 1.0
    return _root(lambda share: tail(false + 1, checks, share), confidence)


def _root(grows: Callable[[float], float], wanted: float) -> float:
    """Where a function that grows from 0 to 1 on [0, 1] takes a value."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if grows(middle) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@dataclass(slots=True)
class Record:
    """The checks of one Cargo's hits, newest last; True: it was false. ``is_off``: its semantic step is switched off."""

    checks: deque[bool] = field(default_factory=lambda: deque(maxlen=CHECKS_KEPT))
    false: int = 0
    is_off: bool = False

    def add(self, is_false: bool) -> None:
        if len(self.checks) == CHECKS_KEPT:
            self.false -= self.checks[0]
        self.checks.append(is_false)
        self.false += is_false


class ErrorBudget:
    """The records of all Cargos. ``budget``: the share of false hits that is allowed."""

    def __init__(self, budget: float, confidence: float) -> None:
        self._budget, self._confidence = budget, confidence
        self._records: dict[str, Record] = {}

    def __repr__(self) -> str:
        return f"<ErrorBudget {self._budget:.3f}, {len(self._records)} Cargos, off: {len(self.switched_off())}>"

    def note(self, cargo: str, is_false: bool) -> bool:
        """A hit was checked. Whether this has switched the Cargo's semantic step off."""
        record = self._records.setdefault(cargo, Record())
        record.add(is_false)
        was_off = record.is_off
        # lower_bound() > budget, without looking for the bound itself, since the tail grows with the share
        record.is_off = was_off or tail(record.false, len(record.checks), self._budget) < 1 - self._confidence - _ROUNDING
        return record.is_off and not was_off

    def is_off(self, cargo: str) -> bool:
        record = self._records.get(cargo)
        return record is not None and record.is_off

    def reset(self, cargo: str) -> None:
        """The operator has spoken: it begins anew."""
        self._records.pop(cargo, None)

    def checks(self, cargo: str) -> tuple[int, int]:
        """How many were false, of how many."""
        record = self._records.get(cargo)
        return (record.false, len(record.checks)) if record is not None else (0, 0)

    def bounds(self, cargo: str) -> tuple[float, float]:
        """Between which the share of false hits is, each with the confidence that was set."""
        false, checks = self.checks(cargo)
        return lower_bound(false, checks, self._confidence), upper_bound(false, checks, self._confidence)

    def switched_off(self) -> list[str]:
        """Cargos, by name."""
        return sorted(cargo for cargo, record in self._records.items() if record.is_off)
