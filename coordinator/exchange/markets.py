"""What one Coordinator remembers of all markets: the window of clearings and the surge decision of each Cargo. In memory, bounded.

A Coordinator that starts feeds the clearings of the last window back in from the books; several that share the books feed each other's.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.exchange.bids import Market
from coordinator.exchange.rates import Clearing, ClearingFigures, MarketRate
from coordinator.exchange.surge import SurgeDecision, decide_surge
from protocol import limits
from protocol.prices import Ask


@dataclass(frozen=True, slots=True)
class Listing:
    """A Cargo on the exchange now: its rate and the speed it is for (None and 0.0 without a trade), and how much there is of it."""

    cargo: str
    rate: Ask | None
    tokens_per_s: float
    supply: int
    demand: int
    jobs_cleared: int
    surge: SurgeDecision


class Markets:
    """All calls come from one thread. Cargos beyond ``cargos_max`` push out the one that has not cleared for longest."""

    def __init__(self, cargos_max: int = limits.CARGOS_REMEMBERED_MAX) -> None:
        self._cargos_max = cargos_max
        self._rates: dict[str, MarketRate] = {}
        self._surges: dict[str, SurgeDecision] = {}

    def __repr__(self) -> str:
        return f"<Markets of {len(self._rates)} Cargos>"

    def add(self, clearing: Clearing) -> None:
        """A job was paid. Not for jobs between an account and its own Islands: they would make any price they like the market's."""
        rate = self._rates.get(clearing.cargo)
        if rate is None:
            rate = self._rates[clearing.cargo] = MarketRate()
        rate.add(clearing)
        if len(self._rates) > self._cargos_max:
            del self._rates[min(self._rates, key=lambda cargo: self._rates[cargo].newest_ms)]

    def rate(self, cargo: str, now_ms: int) -> Ask | None:
        return self._rate_of(cargo).rate(now_ms)

    def tokens_per_s(self, cargo: str, now_ms: int) -> float:
        """Of the jobs that the rate is of; 0.0 unknown."""
        return self._rate_of(cargo).tokens_per_s(now_ms)

    def statistics(self, cargo: str, now_ms: int) -> ClearingFigures:
        return self._rate_of(cargo).statistics(now_ms)

    def surge(self, cargo: str, queued: int, capacity: int, now_ms: int) -> SurgeDecision:
        """Whether bids are raised: the decision of the last half minute, or a new one from the jobs that wait and the slots there are."""
        last = self._surges.pop(cargo, None)
        decision = self._surges[cargo] = decide_surge(last, queued, capacity, now_ms)
        if len(self._surges) > self._cargos_max:
            del self._surges[next(iter(self._surges))]
        return decision

    def market(self, cargo: str, default: Ask | None, queued: int, capacity: int, now_ms: int) -> Market:
        """What ``bids.resolve_bid`` has to know. ``default``: the Cargo's own price."""
        rate = self._rate_of(cargo)
        surge = self.surge(cargo, queued, capacity, now_ms)
        return Market(rate.rate(now_ms), rate.tokens_per_s(now_ms), default, surge.active)

    def listing(self, cargo: str, queued: int, running: int, capacity: int, now_ms: int) -> Listing:
        """What is shown of a Cargo."""
        rate = self._rate_of(cargo)
        return Listing(
            cargo=cargo,
            rate=rate.rate(now_ms),
            tokens_per_s=rate.tokens_per_s(now_ms),
            supply=capacity,
            demand=queued + running,
            jobs_cleared=rate.jobs(now_ms),
            surge=self.surge(cargo, queued, capacity, now_ms),
        )

    def _rate_of(self, cargo: str) -> MarketRate:
        return self._rates.get(cargo) or _NO_RATE


_NO_RATE = MarketRate(clearings_max=0)
