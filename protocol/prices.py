"""Asks and prices in integer micro-credits, so that no sum ever depends on rounding of floats.

As text a price is a decimal number of credits; in JSON it is that text, or a number that is written the same way. Whatever else comes
in (signs, exponents, other digits than ASCII's, a seventh decimal, NaN) is refused and never rounded: a price is what was written, and
no double beside it. So numbers of JSON come here as ``WrittenNumber``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocol import limits

_DECIMAL = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,6}))?\Z")
_SCIENTIFIC = re.compile(r"[0-9.+-]+[eE][0-9+-]+\Z")
_CREDITS_MAX = 10**9 - 1  # nine digits before the point
_ASK_CHARS_MAX = 128
_SHOWN_CHARS = 40
_PARTS = ("per_job", "per_1k_output", "per_second")


@dataclass(frozen=True, slots=True)
class Ask:
    """What an Island wants: per job, per 1,000 output tokens and per second of compute; all in micro-credits."""

    per_job: int = 0
    per_1k_output: int = 0
    per_second: int = 0

    def __post_init__(self) -> None:
        for name in _PARTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= limits.PRICE_MICROS_MAX:
                raise ValueError(f"{name} must be a whole number of micro-credits from 0 to {limits.PRICE_MICROS_MAX}")

    def price(self, output_tokens: int, milliseconds: int) -> int:
        """Price in micro-credits of a job; each part is rounded up, so that work is never free by being small.

        Raises ValueError for less than nothing: it would pay the Consumer.
        """
        if output_tokens < 0 or milliseconds < 0:
            raise ValueError(f"no job has {output_tokens} tokens in {milliseconds} ms")
        per_tokens = -(-self.per_1k_output * output_tokens // 1000)
        per_time = -(-self.per_second * milliseconds // 1000)
        return self.per_job + per_tokens + per_time


class WrittenNumber(float):
    """A number of JSON that is no whole one, and how it was written: for ``json.loads(…, parse_float=WrittenNumber)``."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number


def sum_of_asks(asks: Iterable[Ask]) -> Ask:
    """What several Islands want together for one job, each part at most the largest price there is."""
    every = [(ask.per_job, ask.per_1k_output, ask.per_second) for ask in asks]
    return Ask(*(min(sum(parts), limits.PRICE_MICROS_MAX) for parts in zip(*every, strict=True)))


def parse_credits(text: str) -> int:
    """``"0.25"`` credits as micro-credits. Raises ValueError for signs, exponents, blanks, or more than 6 decimals."""
    match = _DECIMAL.match(text)
    if match is None:
        shown = repr(text[:_SHOWN_CHARS])
        is_scientific = _SCIENTIFIC.match(text[: _SHOWN_CHARS + 1]) is not None
        raise _no_price(f"{shown}: write it without an exponent, and as text if need be (\"0.00005\")" if is_scientific else shown)
    whole, fraction = match.groups()
    return int(whole) * limits.CREDIT_MICROS + int((fraction or "").ljust(6, "0"))


def parse_price(value: object) -> int:
    """A price in JSON, such as a bid, as micro-credits: text as ``parse_credits`` reads it, or a number that is written like that.

    Raises ValueError for all else. Of a float that has lost how it was written counts what Python writes for it.
    """
    if isinstance(value, str):
        return parse_credits(value)
    if isinstance(value, WrittenNumber):
        return parse_credits(value.text)
    if type(value) is int:
        if not 0 <= value <= _CREDITS_MAX:  # not shown: it may have any number of digits
            raise _no_price("a number below 0" if value < 0 else "a larger number")
        return value * limits.CREDIT_MICROS
    if type(value) is float:
        return parse_credits(repr(value))
    raise _no_price(f"{type(value).__name__}")


def _no_price(shown: str) -> ValueError:
    return ValueError(
        f"a price is a number like 0.25 from 0 to {_CREDITS_MAX}.999999 with at most 6 decimals, not {shown}"
    )


def format_credits(micros: int) -> str:
    """Micro-credits as the shortest decimal string: 250000 is ``"0.25"``."""
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    whole, fraction = divmod(micros, limits.CREDIT_MICROS)
    return f"{sign}{whole}.{fraction:06d}".rstrip("0").rstrip(".")


def parse_ask(text: str) -> Ask:
    """``PRICE`` (per job) or ``PER_JOB+PER_1K_OUTPUT+PER_SECOND``, with blanks round the plus if one likes. Raises ValueError."""
    parts = text[: _ASK_CHARS_MAX + 1].split("+")
    if len(text) > _ASK_CHARS_MAX or len(parts) > 3:
        raise ValueError("an ask has at most three parts: per job + per 1,000 output tokens + per second")
    return Ask(*(parse_credits(part.strip(" ")) for part in parts))


def parse_ask_json(value: object) -> Ask:
    """An ask in JSON: text as ``parse_ask`` reads it, a number (per job), or an object with some of the three parts. Raises ValueError."""
    if isinstance(value, str):
        return parse_ask(value)
    if not isinstance(value, Mapping):
        return Ask(parse_price(value))
    unknown = [name for name in value if name not in _PARTS]
    if unknown or not value:
        raise ValueError(f"an ask has the parts {', '.join(_PARTS)}; at least one of them, and nothing else")
    return Ask(**{name: parse_price(part) for name, part in value.items()})


def format_ask(ask: Ask) -> str:
    """The ask as ``parse_ask`` reads it, always with its three parts."""
    return "+".join(format_credits(part) for part in (ask.per_job, ask.per_1k_output, ask.per_second))
