"""An account's statement: read in pages, written as CSV or JSON while it is read. A line for each transfer, oldest first.

Each page is a question of its own, so a reader who is slow holds no connection of the database. Lines are ordered by time and id. A cursor
names the line behind which to go on; balances are always summed up anew, so nothing that a cursor says is believed.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import sqlalchemy as sql

from coordinator.books.queries import Line, Position, balance_at, statement_lines
from protocol import limits
from protocol.prices import format_credits

PAGE_LINES = 1000
TIME_MS_MAX = 253_402_300_799_999  # the year 9999
COLUMNS = ("time", "kind", "job", "amount", "balance", "id")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME_CHARS_MAX = 40
_CURSOR_CHARS_MAX = 512
_CURSOR = re.compile(r"(?P<at>[0-9]{1,15}):(?P<side>[01]):(?P<id>.+)\Z")


def time_text(unix_ms: int) -> str:
    """``2026-01-31T09:30:00.250Z``"""
    return (_EPOCH + timedelta(milliseconds=unix_ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: str) -> int:
    """Unix milliseconds of an ISO date or time; UTC unless it says otherwise. Raises ValueError."""
    wrong = ValueError(f"a time is something like 2026-01-31 or 2026-01-31T09:30:00Z, not {text[:_TIME_CHARS_MAX]!r}")
    if len(text) > _TIME_CHARS_MAX or not text.isascii():
        raise wrong
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise wrong from None
    unix_ms = ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // timedelta(milliseconds=1)
    if not 0 <= unix_ms <= TIME_MS_MAX:
        raise wrong
    return unix_ms


def cursor_of(at: Position) -> str:
    return base64.urlsafe_b64encode(f"{at.at_ms}:{at.side}:{at.id}".encode()).rstrip(b"=").decode()


def parse_cursor(text: str) -> Position:
    """Raises ValueError for anything that ``cursor_of`` does not give."""
    wrong = ValueError("a cursor is what next_cursor said")
    if len(text) > _CURSOR_CHARS_MAX or not text.isascii():
        raise wrong
    try:
        plain = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise wrong from None
    match = _CURSOR.match(plain)
    if match is None or not match["id"].isprintable():
        raise wrong
    return Position(int(match["at"]), int(match["side"]), match["id"])


class StatementReader:
    """Goes through an account's lines from ``since_ms`` on, or behind ``after``, up to and without ``until_ms``; at most ``limit`` of them.

    ``open`` first, then ``next_page`` until there is nothing.
    """

    def __init__(self, account: str, since_ms: int, until_ms: int, after: Position | None = None, limit: int | None = None) -> None:
        self.account = account
        self.balance = 0  # in micro-credits, after the last line that was read
        self.has_more = True
        self._until_ms, self._left = until_ms, limit
        start = Position(since_ms)
        self._at = start if after is None or after.at_ms < since_ms else after

    def open(self, connection: sql.Connection) -> int:
        """The balance before the first line."""
        self.balance = balance_at(connection, self.account, self._at)
        return self.balance

    def next_page(self, connection: sql.Connection) -> list[Line]:
        size = PAGE_LINES if self._left is None else min(PAGE_LINES, self._left)
        if not size or not self.has_more:
            return []
        lines = statement_lines(connection, self.account, self._at, self.balance, self._until_ms, size + 1)
        self.has_more, lines = len(lines) > size, lines[:size]
        if lines:
            self._at, self.balance = lines[-1].position, lines[-1].balance
        if self._left is not None:
            self._left -= len(lines)
        return lines

    @property
    def next_cursor(self) -> str | None:
        """Where to go on; None where nothing is left."""
        return cursor_of(self._at) if self.has_more else None


def line_to_json(line: Line) -> dict[str, Any]:
    return {
        "time": time_text(line.at_ms),
        "kind": line.kind,
        "job": line.job or None,
        "amount": format_credits(line.amount),
        "balance": format_credits(line.balance),
        "id": line.id,
    }


class Rendering(Protocol):
    """Writes a statement piece by piece."""

    content_type: str

    def begin(self, reader: StatementReader) -> str:
        """Once the reader is open."""
        ...

    def lines(self, lines: Sequence[Line]) -> str: ...

    def end(self, reader: StatementReader) -> str: ...


class CsvStatement:
    """RFC 4180, with a header line."""

    content_type = "text/csv; charset=utf-8"

    def begin(self, reader: StatementReader) -> str:
        return ",".join(COLUMNS) + "\r\n"

    def lines(self, lines: Sequence[Line]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS).writerows(map(line_to_json, lines))
        return text.getvalue()

    def end(self, reader: StatementReader) -> str:
        return ""


class JsonStatement:
    """One object: ``{"account", "opening_balance", "data": [...], "closing_balance", "next_cursor"}``."""

    content_type = "application/json"

    def __init__(self) -> None:
        self._comma = ""

    def begin(self, reader: StatementReader) -> str:
        opening = format_credits(reader.balance)
        return f'{{"account":{json.dumps(reader.account)},"opening_balance":"{opening}","data":['

    def lines(self, lines: Sequence[Line]) -> str:
        pieces = []
        for line in lines:
            pieces.append(self._comma + json.dumps(line_to_json(line), ensure_ascii=False, separators=(",", ":")))
            self._comma = ",\n"
        return "".join(pieces)

    def end(self, reader: StatementReader) -> str:
        closing = format_credits(reader.balance)
        return f'],"closing_balance":"{closing}","next_cursor":{json.dumps(reader.next_cursor)}}}\n'


RENDERINGS: dict[str, type[CsvStatement] | type[JsonStatement]] = {"csv": CsvStatement, "json": JsonStatement}


def until_now(now_ms: int) -> int:
    """The end of a statement that names none: what the clocks of other Coordinators say may be a little ahead."""
    return now_ms + int(limits.CLOCK_SKEW_S * 1000)
