"""What people see while they wait."""

from __future__ import annotations

import io

from runtimes.store import ConsoleProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_about_every_tenth() -> None:
    stream = io.StringIO()
    with ConsoleProgress(stream) as progress:
        for done in range(0, 200_000_001, 1_000_000):
            progress("m: downloading", done, 200_000_000)
        progress("m: unpacking", 60_000_000, None)
        progress("m: unpacking", 61_000_000, None)
        progress("m: unpacking", 160_000_000, None)
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["m: downloading: 0 % of 200 MB", "m: downloading: 10 % of 200 MB"]
    assert lines[10:] == ["m: downloading: 100 % of 200 MB", "m: unpacking: 60 MB", "m: unpacking: 160 MB"]


def test_a_terminal_gets_a_bar_for_each_stage() -> None:
    stream = Terminal()
    with ConsoleProgress(stream) as progress:
        progress("m: downloading", 0, 100)
        progress("m: downloading", 100, 100)
        progress("m: unpacking", 0, None)
    assert "m: downloading: 100%" in stream.getvalue()
    assert stream.getvalue().endswith("\n")
    assert "m: unpacking" in stream.getvalue()


def test_nothing_is_a_total_too() -> None:
    stream = io.StringIO()
    ConsoleProgress(stream)("m: checking", 0, 0)
    assert stream.getvalue() == "m: checking: 0 MB\n"
