"""How far the Cargos are that are being brought here: for the ad and for ``archipelag-node status``.

Progress comes from any thread and only changes a number; who wants to show it looks now and then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from protocol import limits
from protocol.ads import CargoLoading
from runtimes.store.progress import Progress


class Loading:
    """One Cargo on its way. ``total_bytes``: of all its files."""

    def __init__(self, name: str, address: str, total_bytes: int) -> None:
        self.name, self.address, self.total_bytes = name, address, total_bytes
        self._finished = 0  # bytes of files that are here
        self._current = 0  # and of the one that is under way

    def __repr__(self) -> str:
        return f"<Loading {self.name}: {self.done_bytes} of {self.total_bytes} bytes>"

    @property
    def done_bytes(self) -> int:
        return min(self.total_bytes, self._finished + self._current) if self.total_bytes else self._finished + self._current

    def finished(self, size_bytes: int) -> None:
        """A whole file is here."""
        self._finished, self._current = self._finished + size_bytes, 0

    def heard(self, progress: Progress, size_bytes: int) -> Progress:
        """Passes on to ``progress`` what is said of the file under way, of ``size_bytes`` (0: not known)."""

        def hear(stage: str, done: int, total: int | None) -> None:
            self._current = min(done, size_bytes) if size_bytes else done
            if not size_bytes:
                self.total_bytes = max(self.total_bytes, self._finished + (total or 0))
            progress(stage, done, total)

        return hear


class Loadings:
    """All of an Island."""

    def __init__(self) -> None:
        self._all: list[Loading] = []
        self._changed = trio.Event()

    def __repr__(self) -> str:
        return f"<Loadings: {len(self._all)}>"

    @contextmanager
    def loading(self, name: str, address: str, total_bytes: int) -> Iterator[Loading]:
        one = Loading(name, address, total_bytes)
        self._all.append(one)
        self._note_change()
        try:
            yield one
        finally:
            self._all.remove(one)
            self._note_change()

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def now(self) -> tuple[CargoLoading, ...]:
        """As an ad says it: the oldest first, each address once."""
        found = {one.address: CargoLoading(one.name, one.address, one.done_bytes, one.total_bytes) for one in reversed(self._all)}
        return tuple(reversed(found.values()))[: limits.AD_LOADING_MAX]

    async def wait_changed(self, said: tuple[CargoLoading, ...]) -> tuple[CargoLoading, ...]:
        """Until there is something else to say than ``said``; looks every AD_LOADING_INTERVAL_S while anything is on its way."""
        while (found := self.now()) == said:
            with trio.move_on_after(limits.AD_LOADING_INTERVAL_S if self._all else float("inf")):
                await self._changed.wait()
        return found
