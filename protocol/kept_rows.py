"""Rows that a stage or the driver of a pipeline keeps, to send them again to whoever has lost them. See protocol/stages.py."""

from __future__ import annotations

from collections.abc import Iterator

from protocol import limits
from protocol.stage_messages import Span, StageRows


class KeptRows:
    """The results of one sequence from position 0 on, as they travel. A copy shares the first ``shared`` rows of the sequence that it was
    copied from, those among them that are still to come, too: whichever of the two computes them puts them there."""

    def __init__(self, row_bytes: int, parent: KeptRows | None = None, shared: int = 0) -> None:
        while parent is not None and shared <= parent._shared:
            parent = parent._parent  # so that each one up the line shares less than the one before
        self._row_bytes = row_bytes
        self._parent: KeptRows | None = parent
        self._shared: int = shared if parent is not None else 0
        self._own = bytearray()

    def __repr__(self) -> str:
        return f"<KeptRows {len(self)}, {self._shared} of them shared>"

    @property
    def _end(self) -> int:
        return self._shared + len(self._own) // self._row_bytes

    def line(self) -> Iterator[KeptRows]:
        """Itself and those that it shares rows of."""
        kept: KeptRows | None = self
        while kept is not None:
            yield kept
            kept = kept._parent

    def __len__(self) -> int:
        length, shared = self._end, 0
        for kept in self.line():
            if kept._end < shared:
                length = kept._end
            shared = kept._shared
        return length

    def put(self, position: int, rows: bytes | memoryview) -> None:
        """Takes rows from ``position`` on, of which those that are here already are left as they are."""
        high = position + len(rows) // self._row_bytes
        for kept in self.line():
            low, end = max(position, kept._shared), kept._end
            if low < high:
                if low > end:
                    raise ValueError(f"rows from {low} on would leave a hole behind {end}")
                kept._own += rows[(end - position) * self._row_bytes : (high - position) * self._row_bytes]
                high = low
            if position >= kept._shared:
                break

    def take(self, low: int, high: int) -> bytes:
        """Rows ``low`` up to ``high``, which must be here."""
        if high > len(self):
            raise ValueError(f"{len(self)} rows are kept, not {high}")
        parts = []
        for kept in self.line():
            start = max(low, kept._shared)
            if start < high:
                parts.append(bytes(kept._own[(start - kept._shared) * self._row_bytes : (high - kept._shared) * self._row_bytes]))
                high = start
            if low >= kept._shared:
                break
        return b"".join(reversed(parts))


def fill_frames(sequence: int, low: int, high: int, kept: KeptRows) -> Iterator[StageRows]:
    """Kept rows as frames."""
    for start in range(low, high, limits.STAGE_FILL_ROWS):
        end = min(high, start + limits.STAGE_FILL_ROWS)
        yield StageRows(0, (Span(sequence, start, end - start),), fill=True, rows=kept.take(start, end))
