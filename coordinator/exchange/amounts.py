"""Small arithmetic on micro-credits. All of it rounds up, so that nothing becomes free by being small; nothing is a float."""

from __future__ import annotations

from collections.abc import Sequence

from protocol import limits
from protocol.prices import Ask

ONE_PPM = 1_000_000
MICROS_PER_USD = 100 * limits.CREDIT_MICROS  # mission.md: 1 credit is about 0.01 dollar
CREDIT_USD = "0.01"


def scaled(micros: int, *factors_ppm: int) -> int:
    """The amount times all factors, rounded once."""
    divisor = 1
    for factor in factors_ppm:
        micros *= factor
        divisor *= ONE_PPM
    return -(-micros // divisor)


def scaled_ask(ask: Ask, *factors_ppm: int) -> Ask:
    """Each part scaled, at most the largest price there is."""
    parts = (ask.per_job, ask.per_1k_output, ask.per_second)
    return Ask(*(min(scaled(part, *factors_ppm), limits.PRICE_MICROS_MAX) for part in parts))


def average(total: int, count: int) -> int | None:
    """None of nothing."""
    return -(-total // count) if count else None


def median(ordered: Sequence[int]) -> int | None:
    """Of sorted amounts the middle one, of two middle ones the lower: so at least half of them are at most this. None of nothing."""
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def format_usd(micros: int) -> str:
    """Micro-credits as exact dollars: 250000 is ``"0.0025"``."""
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    whole, fraction = divmod(micros, MICROS_PER_USD)
    return f"{sign}{whole}.{fraction:08d}".rstrip("0").rstrip(".")
