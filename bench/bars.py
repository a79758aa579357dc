"""A bar: a figure, what it may be at most or has to be at least, and whether it is met."""

from __future__ import annotations

from typing import Any


def at_most(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "at_most": limit, "met": value <= limit}


def at_least(name: str, value: float, limit: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 3), "at_least": limit, "met": value >= limit}


def lines(bars: list[dict[str, Any]]) -> list[str]:
    """One line a bar, fit for a terminal."""
    return [f"{'ok  ' if bar['met'] else 'MISS'} {bar['name']}: {bar['value']:g} ({_limit(bar)})" for bar in bars]


def markdown(bars: list[dict[str, Any]]) -> list[str]:
    """Rows of README's table."""
    return [
        f"| {bar['name']} | {bar['value']:g} | {_limit(bar)} | {'yes' if bar['met'] else '**no**'} |" for bar in bars
    ]


def _limit(bar: dict[str, Any]) -> str:
    return f"at most {bar['at_most']:g}" if "at_most" in bar else f"at least {bar['at_least']:g}"
