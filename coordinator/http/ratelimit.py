"""Counting per minute: requests of a key, wrong keys of an address. Pure; time in seconds is an argument."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

WINDOW_S = 60.0
TRACKED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Standing:
    """Where somebody stands after a count: ``remaining`` of ``limit`` until the window ends in ``reset_s`` seconds."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> dict[str, str]:
        headers = {
            "X-RateLimit-Limit": str(self.limit),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(math.ceil(self.reset_s)),
        }
        if not self.allowed:
            headers["Retry-After"] = str(math.ceil(self.reset_s))
        return headers


class PerMinute:
    """Windows of one minute for each who, from their first count on. The longest unheard is forgotten beyond ``TRACKED_MAX``."""

    def __init__(self) -> None:
        self._windows: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def count(self, who: Hashable, limit: int, now_s: float) -> Standing:
        """Counts one more; what is over the limit is not counted."""
        started_s, used = self._windows.get(who, (now_s, 0))
        if now_s - started_s >= WINDOW_S:
            started_s, used = now_s, 0
        allowed = used < limit
        used += allowed
        self._windows[who] = started_s, used
        self._windows.move_to_end(who)
        if len(self._windows) > TRACKED_MAX:
            self._windows.popitem(last=False)
        return Standing(allowed, limit, limit - used, max(0.0, started_s + WINDOW_S - now_s))
