"""Asks and prices in integer micro-credits, so that no sum ever depends on rounding of floats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from protocol import checks, limits

_DECIMAL = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,6}))?\Z")


@dataclass(frozen=True, slots=True)
class Ask:
    """What an Island wants: per job, per 1,000 output tokens and per second of compute; all in micro-credits."""

    per_job: int = 0
    per_1k_output: int = 0
    per_second: int = 0

    def __post_init__(self) -> None:
        for name in ("per_job", "per_1k_output", "per_second"):
            checks.in_range(name, getattr(self, name), 0, limits.PRICE_MICROS_MAX)

    def price(self, output_tokens: int, milliseconds: int) -> int:
        """Price in micro-credits of a job; each part is rounded up, so that work is never free by being small."""
        per_tokens = -(-self.per_1k_output * output_tokens // 1000)
        per_time = -(-self.per_second * milliseconds // 1000)
        return self.per_job + per_tokens + per_time


def sum_of_asks(asks: Iterable[Ask]) -> Ask:
    """What several Islands want together for one job, each part at most the largest price there is."""
    every = [(ask.per_job, ask.per_1k_output, ask.per_second) for ask in asks]
    return Ask(*(min(sum(parts), limits.PRICE_MICROS_MAX) for parts in zip(*every, strict=True)))


def parse_credits(text: str) -> int:
    """``"0.25"`` credits as micro-credits. Raises ValueError for signs, exponents, or more than 6 decimals."""
    match = _DECIMAL.match(text)
    if match is None:
        raise ValueError(f"a price is a number like 0.25 with at most 6 decimals, not {text[:40]!r}")
    whole, fraction = match.groups()
    return int(whole) * limits.CREDIT_MICROS + int((fraction or "").ljust(6, "0"))


def format_credits(micros: int) -> str:
    """Micro-credits as the shortest decimal string: 250000 is ``"0.25"``."""
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    whole, fraction = divmod(micros, limits.CREDIT_MICROS)
    return f"{sign}{whole}.{fraction:06d}".rstrip("0").rstrip(".")


def parse_ask(text: str) -> Ask:
    """``PRICE`` (per job) or ``PER_JOB+PER_1K_OUTPUT+PER_SECOND``. Raises ValueError."""
    parts = text.split("+")
    if len(parts) > 3:
        raise ValueError("an ask has at most three parts: per job + per 1,000 output tokens + per second")
    return Ask(*(parse_credits(part.strip()) for part in parts))
