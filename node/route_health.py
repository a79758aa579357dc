"""Whether the stages of a route are well: decided from the time that steps take, and from their answers when they are asked.

Dead is a stage whose link is lost; that shows elsewhere. Frozen is one that does not answer a probe while those before it do. Standing
still is one that answers and whose engine does not finish a batch; one that is slow but finishes batches is busy, not dead. Slow is one
that takes several times as long as it did, for many steps.

Pure: times in, verdicts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol import limits
from protocol.stage_messages import StageReport

_STALL_LAPS = 10.0
_LEARN = 0.2
_SLOW_LEAST_US = 2000  # noise of a busy machine is no reason
_BUSY_TOKENS = 20  # a batch may take as long as so many decoded tokens


@dataclass(frozen=True, slots=True)
class Suspect:
    """The stage with this index is to be replaced."""

    index: int
    message: str


@dataclass(slots=True)
class _Speed:
    """Decoding time of one stage: at its best, and now."""

    best_us: float = 0.0
    now_us: float = 0.0
    slow_steps: int = 0

    def note(self, us: float) -> bool:
        self.now_us = us if not self.now_us else self.now_us + _LEARN * (us - self.now_us)
        self.best_us = self.now_us if not self.best_us else min(self.best_us, self.now_us)
        is_slow = self.now_us > limits.STAGE_SLOW_FACTOR * self.best_us + _SLOW_LEAST_US
        self.slow_steps = self.slow_steps + 1 if is_slow else 0
        return self.slow_steps > limits.STAGE_SLOW_STEPS


class RouteHealth:
    """Of one route and its stages. Times of ``look`` in seconds."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[str, int], _Speed] = {}  # by peer and size of the batch, in powers of two
        self._probe = 0
        self._asked_s = 0.0
        self._reports: dict[int, StageReport] = {}
        self._before: dict[int, StageReport] = {}
        self._swallowed = 0

    def __repr__(self) -> str:
        return f"<RouteHealth after {self._probe} probes, {len(self._speeds)} stages known>"

    def note(self, peer: str, us: float, rows: int = 1) -> bool:
        """A stage has decoded a batch of so many rows in so long. Whether it has been much slower than it was, with batches of about that
        size, for many steps."""
        key = peer, rows.bit_length()
        if not self._speeds.setdefault(key, _Speed()).note(us):
            return False
        for known in [known for known in self._speeds if known[0] == peer]:
            del self._speeds[known]  # it may be all there is: judged anew from here
        return True

    def decode_us(self, peer: str) -> float:
        """Time of a batch in a stage, lately, of the smallest kind that was seen; 0.0 unknown."""
        return min(((key[1], speed.now_us) for key, speed in self._speeds.items() if key[0] == peer), default=(0, 0.0))[1]

    def forget(self) -> None:
        """The route is opened anew."""
        self._asked_s, self._reports, self._before = 0.0, {}, {}

    def hear(self, report: StageReport) -> None:
        if report.probe == self._probe:
            self._reports[report.index] = report

    def look(self, age_s: float, lap_s: float, now_s: float, route: Sequence[str]) -> int | Suspect:
        """What to do when the oldest step is away for ``age_s`` where a lap takes ``lap_s``: nothing (0), send the probe with this number,
        or replace a stage."""
        if age_s < limits.STAGE_STALL_S + _STALL_LAPS * min(lap_s, 1.0):
            self.forget()
            return 0
        if not self._asked_s:
            return self._ask(now_s)
        if now_s - self._asked_s <= limits.STAGE_PROBE_S:
            return 0
        return self._suspect(route) or self._ask(now_s)

    def _ask(self, now_s: float) -> int:
        self._probe += 1
        self._asked_s, self._before, self._reports = now_s, self._reports, {}
        return self._probe

    def _suspect(self, route: Sequence[str]) -> Suspect | None:
        for index, peer in enumerate(route[:-1]):
            report = self._reports.get(index)
            if report is None:
                return Suspect(index, "it does not answer, though those before it do")
            limit_s = max(limits.STAGE_STANDSTILL_S, _BUSY_TOKENS * self.decode_us(peer) / 1e6)
            before = self._before.get(index)
            if report.busy_us / 1e6 > limit_s and before is not None and before.batches == report.batches:
                return Suspect(index, f"its engine has worked on one batch for {report.busy_us / 1e6:.0f} s")
        return self._swallower(route)

    def _swallower(self, route: Sequence[str]) -> Suspect | None:
        """All say twice that they have nothing to do, and a step is away: one has lost it in silence. Each is suspected in turn."""
        stages = range(len(route) - 1)
        pairs = [(self._before.get(index), self._reports.get(index)) for index in stages]
        for before, now in pairs:
            if before is None or now is None or now.waiting or now.busy_us or before.batches != now.batches:
                return None
        self._swallowed += 1
        return Suspect((self._swallowed - 1) % len(pairs), "a step is lost and no stage says that it has it")
