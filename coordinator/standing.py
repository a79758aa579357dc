"""What this Coordinator has seen of each Island: how fast it really is, whether it fails, its karma, and whether it may take part.

Plain data in memory; time comes as an argument, in seconds of any clock that only goes forward. What an Island claims of itself stands in
its ad, so a claim holds until its first job has been measured here. A figure that was not renewed for long is forgotten, or an Island that
was slow while it was busy would never be asked again and never be measured anew.

An Island that fails cools down, longer each time in a row. Jobs that fail while it cools down were begun before, or as a last resort, and
say nothing new: an Island that dies with twenty jobs has failed once. A job that succeeds ends it at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol import limits

MEASURED_WEIGHT = 0.25  # of the newest job in the average: the last dozen jobs make it up
MEASURED_TOKENS_MIN = 4  # shorter answers measure the clock
MEASURED_LIFETIME_S = 900.0
MEASURED_TOKENS_PER_S_MAX = 1e7  # as in ads
COOLING_MIN_S = 2.0
COOLING_MAX_S = 300.0
FAILURES_COUNTED_MAX = 16  # more in a row make no difference
STANDINGS_MAX = limits.BOOK_PEERS_MAX

assert COOLING_MIN_S * 2 ** (FAILURES_COUNTED_MAX - 1) >= COOLING_MAX_S


@dataclass(slots=True)
class _Measure:
    tokens_per_s: float
    at_s: float


@dataclass(slots=True)
class _Seen:
    """Of one Island. ``failures``: in a row."""

    measures: dict[str, _Measure] = field(default_factory=dict)
    failures: int = 0
    cool_until_s: float = 0.0


class Standing:
    """At most ``STANDINGS_MAX`` Islands are remembered, those longest not heard of are forgotten first. Karma and approvals are as large
    as what sets them."""

    def __init__(self, require_approval: bool = False) -> None:
        self._require_approval = require_approval
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._karma_milli: dict[str, int] = {}
        self._approved: set[str] = set()
        self._changed: set[str] = set()

    def __repr__(self) -> str:
        return f"<Standing of {len(self._seen)} Islands>"

    def served(self, peer: str, cargo: str, tokens: int, decode_us: int, now_s: float) -> None:
        """A job has succeeded there: so many output tokens, decoded in so many microseconds (0: unknown)."""
        seen = self._of(peer)
        if seen.failures:
            seen.failures, seen.cool_until_s = 0, 0.0
            self._changed.add(peer)
        if tokens < MEASURED_TOKENS_MIN or decode_us <= 0:
            return
        speed = min(tokens * 1e6 / decode_us, MEASURED_TOKENS_PER_S_MAX)
        before = self.tokens_per_s(peer, cargo, now_s)
        average = before + MEASURED_WEIGHT * (speed - before) if before else speed
        seen.measures.pop(cargo, None)
        seen.measures[cargo] = _Measure(average, now_s)
        if len(seen.measures) > limits.AD_OFFERS_MAX:
            del seen.measures[next(iter(seen.measures))]
        self._changed.add(peer)

    def failed(self, peer: str, now_s: float) -> None:
        """A job has failed there by the Island's own fault."""
        seen = self._of(peer)
        if now_s < seen.cool_until_s:
            return
        seen.failures = min(seen.failures + 1, FAILURES_COUNTED_MAX)
        seen.cool_until_s = now_s + min(COOLING_MIN_S * 2 ** (seen.failures - 1), COOLING_MAX_S)
        self._changed.add(peer)

    def set_karma(self, karma_milli: Mapping[str, int]) -> None:
        """Karma of all Islands in thousandths, in place of what was set before; who is not in it has none."""
        before, self._karma_milli = self._karma_milli, dict(karma_milli)
        peers = before.keys() | karma_milli.keys()
        self._changed.update(peer for peer in peers if before.get(peer, 0) != karma_milli.get(peer, 0))

    def approve(self, peer: str) -> None:
        self._approved.add(peer)
        self._changed.add(peer)

    def disapprove(self, peer: str) -> None:
        self._approved.discard(peer)
        self._changed.add(peer)

    def is_approved(self, peer: str) -> bool:
        return not self._require_approval or peer in self._approved

    def tokens_per_s(self, peer: str, cargo: str, now_s: float) -> float:
        """Measured for one stream; 0.0 where it is unknown, or too old."""
        seen = self._seen.get(peer)
        measure = seen.measures.get(cargo) if seen is not None else None
        return measure.tokens_per_s if measure is not None and now_s - measure.at_s < MEASURED_LIFETIME_S else 0.0

    def cool_until_s(self, peer: str) -> float:
        """Until then the Island is a last resort; 0.0 where it has not failed."""
        seen = self._seen.get(peer)
        return seen.cool_until_s if seen is not None else 0.0

    def karma_milli(self, peer: str) -> int:
        return self._karma_milli.get(peer, 0)

    def take_changed(self) -> set[str]:
        """Islands of which something has changed since this was called last."""
        changed, self._changed = self._changed, set()
        return changed

    def _of(self, peer: str) -> _Seen:
        seen = self._seen.get(peer)
        if seen is None:
            seen = self._seen[peer] = _Seen()
            if len(self._seen) > STANDINGS_MAX:
                self._changed.add(self._seen.popitem(last=False)[0])
        else:
            self._seen.move_to_end(peer)
        return seen
