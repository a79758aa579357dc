"""Progress of long steps, for people: a bar where somebody watches a terminal, else a plain line about every tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

Progress = Callable[[str, int, int | None], None]
"""``progress(stage, done_bytes, total_bytes)``: the total is None where nobody said it; a new stage starts again at any figure."""

_LINE_BYTES = 50_000_000  # a line each so many bytes where the total is unknown


class ConsoleProgress:
    """A ``Progress`` that writes to ``stream``. Close it, or the last bar stays open."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[None] | None = None
        self._stage = ""
        self._line = -1

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
        if self._stream.isatty():
            self._show_bar(stage, done, total)
        else:
            self._show_line(stage, done, total)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage, self._line = None, "", -1

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _show_bar(self, stage: str, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = tqdm(desc=stage, total=total, initial=done, unit="B", unit_scale=True, file=self._stream)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def _show_line(self, stage: str, done: int, total: int | None) -> None:
        line = done * 10 // total if total else done // _LINE_BYTES
        if line == self._line:
            return
        self._line = line
        share = f"{min(100, line * 10)} % of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        print(f"{stage}: {share}", file=self._stream, flush=True)


def no_progress(stage: str, done: int, total: int | None) -> None:
    """For callers that show nothing."""
