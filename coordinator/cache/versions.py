"""Which releases of a Cargo count: of what others know, as far as the cache asks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.cache.asking import CacheAsk
from coordinator.cache.policy import versions_of
from protocol.cargos import CargoManifest

OFFERED_S = 1.0  # what Islands offer is looked at so often
OFFERED_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Cargos:
    """What the cache asks of others. ``manifest(name)``: of a listed Cargo; ``releases(name)``: content hashes that may run, the newest
    first, None for a name that nobody has listed; ``offered(name)``: content hashes that Islands offer under it."""

    manifest: Callable[[str], CargoManifest | None]
    releases: Callable[[str], Sequence[str] | None]
    offered: Callable[[str], Iterable[str]]


class Versions:
    """``clock`` in seconds, only forward."""

    def __init__(self, cargos: Cargos, clock: Callable[[], float]) -> None:
        self.cargos, self._clock = cargos, clock
        self._offered: dict[str, tuple[frozenset[str], float]] = {}

    def __repr__(self) -> str:
        return f"<Versions of {len(self._offered)} Cargos>"

    def of(self, cargo: str) -> frozenset[str] | None:
        """Content hashes whose answers count now; None: all; empty: the Cargo may not run."""
        return versions_of(self.cargos.releases(cargo), self.offered(cargo))

    def count(self, cargo: str, content_hash: str) -> bool:
        found = self.of(cargo)
        return found is None or content_hash in found

    def answers(self, ask: CacheAsk, content_hash: str) -> bool:
        """Whether an answer of this version may be told to whoever asks."""
        return content_hash == ask.content_hash if ask.content_hash else self.count(ask.cargo, content_hash)

    def offered(self, cargo: str) -> frozenset[str]:
        """As it was within the last second: of 10,000 Islands that takes a millisecond to find out."""
        known = self._offered.get(cargo)
        now_s = self._clock()
        if known is not None and now_s < known[1]:
            return known[0]
        if len(self._offered) >= OFFERED_MAX:
            self._offered.clear()
        found = frozenset(self.cargos.offered(cargo))
        self._offered[cargo] = found, now_s + OFFERED_S
        return found
