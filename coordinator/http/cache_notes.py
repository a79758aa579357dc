"""What an answer says of the cache: in its headers, and in its metadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.cache.asking import CacheAsk
from coordinator.jobs import CacheHit, CachePassed, Replayed

HEADER = "x-archipelag-cache"


@dataclass(slots=True)
class CacheNote:
    """``state``: ``hit``, ``miss`` or ``bypass``; empty while it is not known yet. ``key``: under which the answer is kept, hex."""

    state: str = "bypass"
    key: str = ""
    hit: CacheHit | None = None

    @classmethod
    def of(cls, ask: CacheAsk | None) -> CacheNote:
        """Before anybody was asked: a miss, unless the cache says otherwise."""
        if ask is None:
            return cls()
        return cls("miss" if ask.reads else "bypass", ask.key.hex() if ask.writes else "")

    def note(self, event: CacheHit | CachePassed | Replayed) -> str:
        """Gives the id of the job that the answer belongs to, where the cache names it."""
        if isinstance(event, CacheHit):
            self.state, self.key, self.hit = "hit", event.key, event
            return event.job_id
        self.state, self.key = "bypass", ""
        return ""

    def headers(self) -> dict[str, str]:
        """``age`` as RFC 9111 has it: whole seconds since the answer was made."""
        found = {HEADER: self.state} if self.state else {}
        if self.key and self.state:
            found[f"{HEADER}-key"] = self.key
        if self.hit is not None:
            found |= {f"{HEADER}-strategy": self.hit.strategy, "age": str(int(self.hit.age_s))}
        return found

    def metadata(self) -> dict[str, Any]:
        hit = self.hit
        if hit is None:
            return {"cache_hit": False, "cache_strategy": None}
        return {"cache_hit": True, "cache_strategy": hit.strategy, "cache_key": hit.key, "cache_age_s": round(hit.age_s, 1)}
