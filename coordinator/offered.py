"""What a name stands for among what Islands offer: which version of a Cargo a job gets.

Theory of operation. The registry says which versions may run under a name, the best first; one of them may be a Cargo of another name,
which the name is promoted to, and Islands offer that under its own name. A job gets the best version on which it can begin now: where the
few Islands of a version that was promoted a moment ago are full, those of the one before it go on to help. Where all are full it waits
for the best one that has Islands for it. A quote's Island, and an answer that has begun, decide on the version that they are of.

Almost always one version is offered, and nothing is weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from coordinator.columns import Columns
from coordinator.matching import Refusal, Wish, why_not
from coordinator.regions import Residency
from protocol.errors import Code

VERSIONS_WEIGHED_MAX = 8  # of a name, for one job


class Offered:
    """``columns(name)``: who offers what under a name now.

    ``releases(name)``: of a name that is listed, the addresses that may run, the best first; None for one that nobody has listed.
    ``alias(name)``: the name of the Cargo that a name stands for, mostly itself; if not, its address is the first of ``releases``.
    ``aliases()``: the names that stand for a Cargo of another one.
    """

    def __init__(self, columns: Callable[[str], Columns]) -> None:
        self._columns = columns
        self.releases: Callable[[str], Sequence[str] | None] = lambda name: None
        self.alias: Callable[[str], str] = lambda name: name
        self.aliases: Callable[[], Iterable[str]] = tuple

    def __repr__(self) -> str:
        return f"<Offered, {len(list(self.aliases()))} names stand for others>"

    def names(self, cargo: str) -> tuple[str, ...]:
        """Under which Islands offer what runs under a name."""
        other = self.alias(cargo)
        return (cargo,) if other == cargo else (other, cargo)

    def name(self, cargo: str, content_hash: str = "") -> str:
        """Under which Islands offer this version of what a name stands for; or the best that somebody offers."""
        other = self.alias(cargo)
        if other == cargo:
            return cargo
        promoted = (self.releases(cargo) or ("",))[0]
        if content_hash:
            return other if content_hash == promoted else cargo
        return other if promoted in self._columns(other).content_hashes() else cargo

    def content_hashes(self, cargo: str) -> set[str]:
        """Of all that is offered under a name, or under the one that it stands for."""
        return set().union(*(self._columns(name).content_hashes() for name in self.names(cargo)))

    def slots(self, cargo: str, policy: Residency | None) -> int:
        """Jobs of a name that run at once, at most, on all versions that it may get; free or busy; 0 where nobody offers one."""
        releases = self.releases(cargo)
        if releases is None:
            facts = self._columns(cargo)
            return facts.slots("", policy) if len(facts) else 0
        found = self._offered(cargo, releases)
        return sum(self._columns(name).slots(address, policy) for name, address in found)

    def pinned(self, wish: Wish, now_s: float) -> Wish | Refusal:
        """The wish for the version that it gets, by the name under which Islands offer that. Of a Cargo that is listed only its own
        releases count, whatever else is offered under its name. A refusal where none may run."""
        cargo = wish.cargo
        if wish.content_hash:
            return _named(wish, self.name(cargo, wish.content_hash))
        releases = self.releases(cargo)
        if releases is None:
            return wish
        if not releases:
            text = f"no release of the Cargo {cargo} may run any more: it was revoked or suspended, or its time is over"
            return Refusal(Code.UNKNOWN_CARGO, text)
        found = self._offered(cargo, releases) or [(self.alias(cargo), releases[0])]
        wishes = [replace(wish, cargo=name, content_hash=address) for name, address in found[:VERSIONS_WEIGHED_MAX]]
        return wishes[0] if len(wishes) == 1 else self._weighed(wishes, now_s)

    def _offered(self, cargo: str, releases: Sequence[str]) -> list[tuple[str, str]]:
        """Those of the releases that somebody offers: under which name, and their addresses."""
        other = self.alias(cargo)
        own = self._columns(cargo).content_hashes()
        first = [(other, releases[0])] if other != cargo and releases and releases[0] in self._columns(other).content_hashes() else []
        return first + [(cargo, address) for address in releases if address in own]

    def _weighed(self, wishes: Sequence[Wish], now_s: float) -> Wish:
        """The first that can be had now; else the first for which it makes sense to wait."""
        full: Wish | None = None
        for wish in sorted(wishes, key=lambda wish: not self._is_quoted(wish)):
            refusal = why_not(self._columns(wish.cargo), wish, now_s)
            if refusal is None:
                return wish
            if refusal.code is Code.NO_CAPACITY:
                if self._is_quoted(wish):
                    return wish
                full = full or wish
        return full or wishes[0]

    def _is_quoted(self, wish: Wish) -> bool:
        """Whether a quote promised an Island of this version."""
        return bool(wish.island) and self._columns(wish.cargo).offers(wish.island, wish.content_hash)


def _named(wish: Wish, name: str) -> Wish:
    return wish if name == wish.cargo else replace(wish, cargo=name)
