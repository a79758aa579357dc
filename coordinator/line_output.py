"""The lines of one choice as they come from Islands, over all its attempts: checked, counted, and told once."""

from __future__ import annotations

from protocol import limits
from protocol.cargo_io import DoneLine, ErrorLine, Line, LineReader, OutputLimits, TokenLine
from protocol.cargo_jobs import Splice
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.messages import JobLines


class LineOutput:
    """``begin`` each attempt, then ``take`` what comes. ``done``: the last line, once it is here."""

    def __init__(self) -> None:
        self._splice = Splice()
        self._reader = LineReader(OutputLimits(output_bytes=limits.CARGO_OUTPUT_BYTES_MAX))
        self.done: DoneLine | None = None

    def __repr__(self) -> str:
        return f"<LineOutput {self._splice!r}{' done' if self.done else ''}>"

    @property
    def has_begun(self) -> bool:
        """Whether anything was told."""
        return self._splice.delivered_bytes > 0

    def begin(self) -> None:
        self._splice.begin()
        self.done = None

    def take(self, message: JobLines) -> list[Line]:
        """The new lines but the last one. Raises RemoteProtocolError where they are no lines, or not as many as the Island counts;
        Refused where another Island's lines differ, or where the Cargo says that it has failed."""
        new = self._splice.feed(bytes(message.lines))
        if not new:
            return []
        lines = self._reader.feed(new)
        if len(new) == len(message.lines) and sum(isinstance(line, TokenLine) for line in lines) != message.tokens:
            raise RemoteProtocolError(f"an Island counts {message.tokens} lines with text, and they are not so many")
        told: list[Line] = []
        for line in lines:
            if isinstance(line, DoneLine):
                self.done = line
            elif isinstance(line, ErrorLine):
                raise Refused(Code.CARGO_FAILED, line.message)
            else:
                told.append(line)
        return told
