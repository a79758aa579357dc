"""How many jobs of one group run on which Island, so that they spread."""

from __future__ import annotations

from collections.abc import Mapping


class Crowds:
    """Groups by name; the empty one is none."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"<Crowds of {len(self._groups)} groups>"

    def of(self, group: str) -> Mapping[str, int]:
        """Island -> jobs, without those where none runs. It changes with what happens."""
        return self._groups.get(group, {})

    def came(self, group: str, island: str) -> None:
        if group:
            counts = self._groups.setdefault(group, {})
            counts[island] = counts.get(island, 0) + 1

    def left(self, group: str, island: str) -> None:
        """Raises KeyError for one that never came."""
        if not group:
            return
        counts = self._groups[group]
        counts[island] -= 1
        if not counts[island]:
            del counts[island]
        if not counts:
            del self._groups[group]
