"""From tokens to text: characters whose bytes arrive in several tokens, and stop strings that arrive in several too.

Text is given out as soon as it is certain: no incomplete character, and nothing that may be the beginning of a stop string. The
state depends on the tokens alone, so an answer resumed elsewhere is cut and held back at the same places.
"""

from __future__ import annotations

import codecs


class TextStream:
    """Bytes of tokens in, text out. ``stopped`` is true once a stop string has come; it and what follows is not part of the answer."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._pending = ""
        self.stopped = False

    def __repr__(self) -> str:
        return f"<TextStream{' stopped' if self.stopped else ''}, {len(self._pending)} characters held back>"

    def feed(self, piece: bytes) -> str:
        """Text that is certain after these bytes."""
        if self.stopped:
            return ""
        return self._take(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, when the answer is over."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.decode(b"", final=True))
        rest, self._pending = ("", "") if self.stopped else (self._pending, "")
        return text + rest

    def _take(self, text: str) -> str:
        if not self._stop:
            return text
        self._pending += text
        found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._pending = self._pending[: min(found)], ""
            return certain
        keep = max(overlap(self._pending, stop) for stop in self._stop)
        certain = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(certain) :]
        return certain


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
