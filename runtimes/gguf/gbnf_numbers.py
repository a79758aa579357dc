"""Grammar rules of the numbers between two bounds. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from runtimes.gguf.gbnf_rules import EMPTY, Rules
from runtimes.gguf.schema import BOUNDS, DIGITS, NUMBER_MAX, Contradiction, NoSchema

_NUMBER = r'"-"? ( "0" | [1-9] [0-9]{0,14} ) ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,2} )?'


class Numbers:
    """Rules of the numbers between two bounds."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules

    def integer(self, schema: dict[str, Any]) -> str:
        low, low_open, high, high_open = _bounds(schema)
        first = -NUMBER_MAX if low is None else math.floor(low) + 1 if low_open else math.ceil(low)
        last = NUMBER_MAX if high is None else math.ceil(high) - 1 if high_open else math.floor(high)
        return self._rules.any_of([f'"-" {n}' for n in self._whole(max(1, -last), -first)] + self._whole(max(0, first), last))

    def number(self, schema: dict[str, Any]) -> str:
        low, low_open, high, high_open = _bounds(schema)
        if low is None and high is None:
            return _NUMBER
        options = []
        if low is None or low < 0:  # the bounds change places; zero has no sign
            nearest, is_open = (_ZERO, True) if high is None or high >= 0 else (-high, high_open)
            options += [f'"-" {n}' for n in self._decimals(nearest, is_open, None if low is None else -low, low_open)]
        if high is None or high >= 0:
            nearest, is_open = (_ZERO, False) if low is None or low < 0 else (low, low_open)
            options += self._decimals(nearest, is_open, high, high_open)
        return self._rules.any_of(options)

    def _whole(self, low: int, high: int) -> list[str]:
        """Whole numbers between two that are not negative."""
        options = ['"0"'] if low == 0 <= high else []
        low = max(1, low)
        if high == NUMBER_MAX and low == 1:
            return [*options, f"[1-9] [0-9]{{0,{DIGITS - 1}}}"]
        while low <= high:
            last = min(high, 10 ** len(str(low)) - 1)
            options.append(self._digits(_Between(str(low), str(last)), len(str(low)), whole=True) or "")
            low = last + 1
        return options

    def _decimals(self, low: Decimal, low_open: bool, high: Decimal | None, high_open: bool) -> list[str]:
        """Numbers with or without a point between two that are not negative."""
        a, from_ = _split(low)
        if high is None:
            parts = [(f'"{a}"', _Between(from_, None, low_open))]
            parts += [(whole, _Between()) for whole in self._whole(a + 1, NUMBER_MAX)]
        elif (b_to := _split(high))[0] == a:
            parts = [(f'"{a}"', _Between(from_, b_to[1], low_open, high_open))]
        else:
            b, to = b_to
            parts = [(f'"{a}"', _Between(from_, None, low_open)), (f'"{b}"', _Between(None, to, False, high_open))]
            parts += [(whole, _Between()) for whole in self._whole(a + 1, b - 1)]
        fractions = [(whole, self._fraction(between)) for whole, between in parts]
        return [f"{whole} {fraction}" for whole, fraction in fractions if fraction is not None]

    def _fraction(self, between: _Between) -> str | None:
        """The point and what is behind it, or nothing where that is enough. None: nothing fits."""
        places = max(DIGITS, len(between.low or "") + 1, len(between.high or "") + 1)
        digits = self._digits(between, places, whole=False)
        if digits is None:
            return EMPTY if between.may_end() else None
        return f'( "." {digits} )' + ("?" if between.may_end() else "")

    def _digits(self, between: _Between, places: int, whole: bool) -> str | None:
        """The rule of one digit or more. ``whole``: exactly ``places``, else up to so many. None: nothing fits."""
        if between == _Between():
            return f"[0-9]{{{places}}}" if whole else f"[0-9]{{1,{places}}}"
        groups: dict[_Between, str] = {}
        for digit in "0123456789":
            after = between.after(digit)
            if after is not None:
                groups[after] = groups.get(after, "") + digit
        options = []
        for after, digits in groups.items():
            more = self._digits(after, places - 1, whole) if places > 1 else None
            if after.may_end() and (places == 1 or not whole):
                options.append(f"[{digits}] ( {more} )?" if more else f"[{digits}]")
            elif more:
                options.append(f"[{digits}] {more}")
        return self._rules.any_of(options) if options else None


_ZERO = Decimal(0)


@dataclass(frozen=True)
class _Between:
    """Bounds for a row of digits, as rows of digits; None for one that can no longer be passed. A row that has ended goes on in zeros."""

    low: str | None = None
    high: str | None = None
    low_open: bool = False
    high_open: bool = False

    def after(self, digit: str) -> _Between | None:
        """The bounds for what follows this digit; None where the digit is not between them."""
        low, high = self.low, self.high
        if low is not None:
            first = low[:1] or "0"
            if digit < first:
                return None
            low = low[1:] if digit == first else None
        if high is not None:
            first = high[:1] or "0"
            if digit > first:
                return None
            high = high[1:] if digit == first else None
        return _Between(low, high, self.low_open and low is not None, self.high_open and high is not None)

    def may_end(self) -> bool:
        is_above = self.low is None or not (self.low.strip("0") or self.low_open)
        return is_above and (self.high is None or bool(self.high.strip("0")) or not self.high_open)


def _bounds(schema: dict[str, Any]) -> tuple[Decimal | None, bool, Decimal | None, bool]:
    """Lowest number and whether it is out itself, highest number and whether it is out itself."""
    exact = {key: Decimal(repr(schema[key])) for key in BOUNDS if key in schema}
    low, low_open = max(_bound(exact, "minimum", False) + _bound(exact, "exclusiveMinimum", True), default=(None, False))
    high, high_open = min(_bound(exact, "maximum", True) + _bound(exact, "exclusiveMaximum", False), default=(None, True))
    if (low or 0) > NUMBER_MAX or (high or 0) < -NUMBER_MAX:
        raise NoSchema(f"a bound in the JSON schema is beyond {NUMBER_MAX}")
    low = None if low is not None and low < -NUMBER_MAX else low
    high = None if high is not None and high > NUMBER_MAX else high
    if low is not None and high is not None and low > high:
        raise Contradiction("the JSON schema contradicts itself: no number is between its bounds")
    return low, low_open, high, not high_open


def _bound(exact: dict[str, Decimal], key: str, rank: bool) -> list[tuple[Decimal, bool]]:
    return [(exact[key], rank)] if key in exact else []


def _split(number: Decimal) -> tuple[int, str]:
    """The whole part and the digits behind the point."""
    whole, _, rest = format(number, "f").partition(".")
    return int(whole), rest.rstrip("0")
