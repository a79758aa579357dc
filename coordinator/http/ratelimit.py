"""Counting per minute: requests of a key, of an account, of an address; wrong keys of an address. Pure; time in seconds is an argument.

Each Coordinator counts for itself. What is refused is not counted, so whoever waits for the end of a window gets in then.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

WINDOW_S = 60.0
TRACKED_MAX = 10_000
_IPV6_NETWORK_BITS = 64


@dataclass(frozen=True, slots=True)
class Standing:
    """Where somebody stands after a count: ``remaining`` of ``limit`` until the window ends in ``reset_s`` seconds. ``whose`` limit it is,
    for the message."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: float
    whose: str = ""

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

    def _window(self, who: Hashable, now_s: float) -> tuple[float, int]:
        """When it began, and how many were counted since."""
        started_s, used = self._windows.get(who, (now_s, 0))
        return (started_s, used) if now_s - started_s < WINDOW_S else (now_s, 0)

    def has_room(self, who: Hashable, limit: int, now_s: float) -> bool:
        return self._window(who, now_s)[1] < limit

    def count(self, who: Hashable, limit: int, now_s: float, whose: str = "") -> Standing:
        """Counts one more; what is over the limit is not counted."""
        started_s, used = self._window(who, now_s)
        allowed = used < limit
        used += allowed
        self._windows[who] = started_s, used
        self._windows.move_to_end(who)
        if len(self._windows) > TRACKED_MAX:
            self._windows.popitem(last=False)
        return Standing(allowed, limit, limit - used, max(0.0, started_s + WINDOW_S - now_s), whose)


@dataclass(frozen=True, slots=True)
class Limit:
    """One of the limits that a request meets: ``per_minute`` requests of ``who``, counted in ``windows``. ``whose``: as in Standing."""

    windows: PerMinute
    who: Hashable
    per_minute: int
    whose: str


def count_in_all(limits: Sequence[Limit], now_s: float) -> list[Standing]:
    """Counts a request against each limit, or only asks those that refuse it: then it has used nothing up anywhere."""
    full = [limit for limit in limits if not limit.windows.has_room(limit.who, limit.per_minute, now_s)]
    return [limit.windows.count(limit.who, limit.per_minute, now_s, limit.whose) for limit in full or limits]


def tightest(standings: Sequence[Standing]) -> Standing:
    """The one to be told of: with the fewest requests left, and of these the one that lasts longest."""
    return min(standings, key=lambda standing: (standing.remaining, -standing.reset_s))


def counted_as(address: str) -> str:
    """Whom an address counts for: an IPv4 address for itself, an IPv6 one for its /64, since whoever has one of these has them all."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed), _IPV6_NETWORK_BITS), strict=False))
