"""What the cache counts: plain numbers and states, never a question or an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CARGOS_COUNTED_MAX = 1_000


@dataclass(slots=True)
class Counts:
    """Of one Cargo, or of all."""

    exact: int = 0
    semantic: int = 0
    misses: int = 0

    @property
    def hits(self) -> int:
        return self.exact + self.semantic

    def as_json(self) -> dict[str, Any]:
        asked = self.hits + self.misses
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate_percent": round(100 * self.hits / asked, 2) if asked else 0.0,
            "hits_exact": self.exact,
            "hits_semantic": self.semantic,
        }


@dataclass(slots=True)
class CacheStatistics:
    """Since the start. ``bypassed``: requests for which the cache was not asked; ``waited``: those that waited for an equal one;
    ``refused``: answers that were not kept, as they were cut off, empty or too large."""

    total: Counts = field(default_factory=Counts)
    per_cargo: dict[str, Counts] = field(default_factory=dict)
    bypassed: int = 0
    waited: int = 0
    kept: int = 0
    refused: int = 0
    deleted: int = 0
    checks: int = 0
    checks_false: int = 0

    def of(self, cargo: str, is_known: bool) -> tuple[Counts, ...]:
        """What is to be counted up for a request; names that nobody offers are counted together only, as clients can make them up."""
        counts = self.per_cargo.get(cargo)
        if counts is None and is_known and len(self.per_cargo) < CARGOS_COUNTED_MAX:
            counts = self.per_cargo[cargo] = Counts()
        return (self.total,) if counts is None else (self.total, counts)
