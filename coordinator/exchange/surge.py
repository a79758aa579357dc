"""Surge: bids from the market are raised while far more jobs wait than there is room for. Decided for half a minute at a time."""

from __future__ import annotations

from dataclasses import dataclass

SURGE_QUEUE_FACTOR = 2  # mission.md: while queued jobs > 2 x capacity
SURGE_LIFETIME_MS = 30_000  # mission.md: 30 s cache


@dataclass(frozen=True, slots=True)
class SurgeDecision:
    """``queued`` jobs that waited for a Cargo, ``capacity`` slots of all Islands that offer it, when it was decided."""

    active: bool
    queued: int
    capacity: int
    decided_at_ms: int

    def holds(self, now_ms: int) -> bool:
        """Not for a clock that was set back either: then nobody knows how old it is."""
        return 0 <= now_ms - self.decided_at_ms < SURGE_LIFETIME_MS


def decide_surge(last: SurgeDecision | None, queued: int, capacity: int, now_ms: int) -> SurgeDecision:
    """The last decision while it holds, else a new one."""
    if last is not None and last.holds(now_ms):
        return last
    return SurgeDecision(queued > SURGE_QUEUE_FACTOR * capacity, queued, capacity, now_ms)
