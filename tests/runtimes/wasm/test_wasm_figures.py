"""Modules that count: their answers beside those of Python's library and numpy, or of the formula written anew."""

from __future__ import annotations

import calendar
import math
import random
import statistics
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.runtimes.wasm.test_wasm_modules import answer, complaint


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_statistics(seed: int) -> None:
    chance = random.Random(seed)
    numbers = [chance.gauss(0, 10.0 ** chance.randint(-3, 6)) for _ in range(chance.randint(2, 200))]
    said = answer("number_stats", numbers=numbers, quantiles=[0, 0.1, 0.5, 1])
    assert (said["count"], said["min"], said["max"]) == (len(numbers), min(numbers), max(numbers))
    scale = max(map(abs, numbers))
    assert said["sum"] == pytest.approx(math.fsum(numbers), abs=1e-12 * scale)
    assert said["mean"] == pytest.approx(statistics.fmean(numbers), abs=1e-12 * scale)
    assert said["median"] == pytest.approx(statistics.median(numbers), rel=1e-12)
    assert said["variance"] == pytest.approx(statistics.variance(numbers), rel=1e-12)
    assert said["deviation"] == pytest.approx(statistics.stdev(numbers), rel=1e-12)
    assert said["quantiles"] == pytest.approx(list(np.quantile(numbers, [0, 0.1, 0.5, 1])), rel=1e-9, abs=1e-12 * scale)


def test_figures_at_the_borders() -> None:
    assert answer("number_stats", numbers=[7]) == {
        "count": 1, "sum": 7, "min": 7, "max": 7, "mean": 7, "median": 7, "quantiles": [7, 7, 7]
    }  # fmt: skip
    assert answer("number_stats", numbers=[1e100, 1, -1e100])["sum"] == 1, "what additions lose is kept"
    for number in (0.1, 1e-300, 5e-324, 1.7976931348623157e308, 2.0**53, -(2.0**60), 1 / 3, -0.5):
        assert answer("number_stats", numbers=[number])["max"] == number, "numbers are written so that they read back"
    for wrong in ([], "x", [1, "2"], [[1]], [None], [10**400]):
        assert '"numbers" must be' in complaint("number_stats", numbers=wrong)
    assert '"quantiles" must be' in complaint("number_stats", numbers=[1], quantiles=[1.5])
    assert "too large" in complaint("number_stats", numbers=[1.7e308, 1.7e308])


@pytest.mark.parametrize("seed", range(5))
def test_matrices_are_those_of_numpy(seed: int) -> None:
    chance = np.random.default_rng(seed)
    side, other = int(chance.integers(1, 12)), int(chance.integers(1, 6))
    a, b = chance.normal(size=(side, side)), chance.normal(size=(side, other))
    cases: dict[str, Any] = {"multiply": a @ b, "solve": np.linalg.solve(a, b)}
    for op, expected in cases.items():
        assert np.allclose(answer("matrix", op=op, a=a.tolist(), b=b.tolist())["result"], expected, rtol=1e-8, atol=1e-8)
    cases = {"inverse": np.linalg.inv(a), "determinant": np.linalg.det(a)}
    for op, expected in cases.items():
        assert np.allclose(answer("matrix", op=op, a=a.tolist())["result"], expected, rtol=1e-8, atol=1e-8)
    assert answer("matrix", op="transpose", a=b.tolist())["result"] == b.T.tolist()


def test_matrices_that_do_not_fit() -> None:
    ones = [[1, 1], [1, 1]]
    assert answer("matrix", op="determinant", a=ones) == {"result": 0}
    assert answer("matrix", op="determinant", a=[[0, 1], [1, 0]]) == {"result": -1}
    assert complaint("matrix", op="inverse", a=ones) == '"a" has no inverse'
    assert "as many rows" in complaint("matrix", op="inverse", a=[[1, 2]])
    assert '"b" must be' in complaint("matrix", op="multiply", a=ones, b=[[1, 2]])
    assert '"b" must be' in complaint("matrix", op="solve", a=ones, b=[[1]])
    unusable: list[Any] = [[], [[]], [[1], [1, 2]], [[1, "x"]], [1], [[0] * 257]]
    for wrong in unusable:
        assert '"a" must be' in complaint("matrix", op="transpose", a=wrong)
    assert '"op" must be' in complaint("matrix", op="rotate", a=ones)


_BASE32 = "0123456789bcdefghjkmnpqrstuvwxyz"


def _geohash(latitude: float, longitude: float, precision: int) -> str:
    """By its definition: bits of the two halvings, longitude first."""
    count = 5 * precision
    bits = {
        axis: f"{min(int((value + span) / (2 * span) * 2**amount), 2**amount - 1):0{amount}b}"
        for axis, value, span, amount in ((0, longitude, 180, (count + 1) // 2), (1, latitude, 90, count // 2))
        if amount
    }
    mixed = "".join(bits[place % 2][place // 2] for place in range(count))
    return "".join(_BASE32[int(mixed[place : place + 5], 2)] for place in range(0, count, 5))


@pytest.mark.parametrize("seed", range(5))
def test_ways_and_geohashes(seed: int) -> None:
    chance = random.Random(seed)
    points = [[chance.uniform(-90, 90), chance.uniform(-180, 180)] for _ in range(6)]
    precision = chance.randint(1, 12)
    said = answer("geo", points=points, precision=precision)
    assert said["geohashes"] == [_geohash(latitude, longitude, precision) for latitude, longitude in points]
    legs = [_distance_m(a, b) for a, b in pairwise(points)]
    assert said["legs_m"] == pytest.approx(legs, abs=0.01) and said["length_m"] == pytest.approx(sum(legs), abs=0.01)
    box = answer("geo", geohash=said["geohashes"][0].upper())
    assert box["south"] <= points[0][0] <= box["north"] and box["west"] <= points[0][1] <= box["east"]
    assert _geohash(box["latitude"], box["longitude"], precision) == said["geohashes"][0]


def _distance_m(a: list[float], b: list[float]) -> float:
    """By vectors, which is another formula than the module's."""

    def vector(point: list[float]) -> Any:
        latitude, longitude = np.radians(point)
        return np.array([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)])

    one, other = vector(a), vector(b)
    return float(6371008.8 * np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other))


def test_places_at_the_borders() -> None:
    assert answer("geo", points=[[57.64911, 10.40744]], precision=11)["geohashes"] == ["u4pruydqqvj"], "the example of its inventor"
    assert answer("geo", points=[[90, 180], [-90, -180]], precision=2)["geohashes"] == ["zz", "00"]
    assert answer("geo", points=[[90, 0], [-90, 0]])["length_m"] == pytest.approx(math.pi * 6371008.8, abs=0.001)
    for wrong in ([], [[91, 0]], [[0, 181]], [[0]], [0, 0], "x"):
        assert '"points" must be' in complaint("geo", points=wrong)
    for hash_ in ("", "ailo", "0" * 13, "u\0"):
        assert '"geohash" must be' in complaint("geo", geohash=hash_)


@pytest.mark.parametrize("seed", range(10))
def test_dates_are_moved_as_datetime_moves_them(seed: int) -> None:
    chance = random.Random(seed)
    begin = datetime(1, 1, 1) + timedelta(seconds=chance.randrange(9000 * 365 * 86400))
    shift = {unit: chance.randint(-5000, 5000) for unit in ("weeks", "days", "hours", "minutes", "seconds")}
    try:
        moved = begin + timedelta(**shift)
    except OverflowError:
        return
    said = answer("date_math", date=begin.isoformat(), **shift)
    assert said["date"] == moved.isoformat()
    year, week, weekday = moved.isocalendar()
    assert (said["week_year"], said["week"], said["weekday"]) == (year, week, weekday)
    assert said["day_of_year"] == moved.timetuple().tm_yday and said["leap"] == calendar.isleap(moved.year)
    assert said["unix_s"] == int((moved - datetime(1970, 1, 1)).total_seconds())


def test_every_day_of_four_centuries_in_steps() -> None:
    day = date(1899, 12, 20)
    while day.year < 2300:
        said = answer("date_math", date=day.isoformat(), until="2000-01-01")
        assert (said["week_year"], said["week"], said["weekday"]) == tuple(day.isocalendar())
        assert said["days"] == (date(2000, 1, 1) - day).days
        day += timedelta(days=397)


@pytest.mark.parametrize(
    ("begin", "shift", "expected"),
    [
        ("2024-01-31", {"months": 1}, "2024-02-29"),
        ("2023-01-31", {"months": 1}, "2023-02-28"),
        ("2024-02-29", {"years": 1}, "2025-02-28"),
        ("2024-03-31", {"months": -13}, "2023-02-28"),
        ("2024-12-31", {"days": 1}, "2025-01-01"),
        ("2024-12-31T23:59:59.25Z", {"seconds": 1}, "2025-01-01T00:00:00.25Z"),
        ("2024-05-05 10:00+0530", {"hours": -11}, "2024-05-04T23:00:00+05:30"),
        ("0001-01-01", {}, "0001-01-01"),
        ("2024-05-05", {"minutes": 5}, "2024-05-05T00:05:00"),
    ],
)
def test_dates_are_moved_by_the_calendar(begin: str, shift: dict[str, int], expected: str) -> None:
    assert answer("date_math", date=begin, **shift)["date"] == expected


def test_zones_count() -> None:
    said = answer("date_math", date="2024-05-05T10:00:00+02:00", until="2024-05-05T10:00:00-01:30")
    assert said["seconds"] == 3.5 * 3600 and said["days"] == 0
    assert said["unix_s"] == int(datetime(2024, 5, 5, 8, tzinfo=UTC).timestamp())
    assert '"until" must be' in complaint("date_math", date="2024-05-05T10:00:00Z", until="2024-05-05")


@pytest.mark.parametrize(
    "text",
    [
        *("", "2023-02-29", "2024-13-01", "2024-00-01", "0000-01-01", "2024-1-1", "2024-01-01T24:00", "2024-01-01T10", "2024-01-01x"),
        *("2024-01-01T10:00:00.", "2024-01-01T10:00Z ", "2024-01-01T10:00+24:00", "20240101"),
    ],
)
def test_what_is_no_date(text: str) -> None:
    assert '"date" must be a date like' in complaint("date_math", date=text)


def test_dates_stay_within_the_calendar() -> None:
    for shift in ({"days": 1}, {"months": 1}, {"seconds": 86400}, {"years": 10**12}):
        assert "years 1 to 9999" in complaint("date_math", date="9999-12-31", **shift)
    assert "years 1 to 9999" in complaint("date_math", date="0001-01-01", weeks=-1)
    assert '"days" must be an integer' in complaint("date_math", date="2024-01-01", days=1.5)


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        total += sum(divmod(int(digit) * 2, 10)) if place % 2 else int(digit)
    return total % 10 == 0


@pytest.mark.parametrize("seed", range(5))
def test_check_digits_are_found_again(seed: int) -> None:
    chance = random.Random(seed)
    body = "".join(chance.choice("0123456789") for _ in range(12))
    said = answer("check_digit", kind="luhn", text=body + "0")
    assert _luhn(body + said["expected"]) and said["valid"] == (said["expected"] == "0")
    ean = answer("check_digit", kind="ean", text=body + "0")["expected"]
    assert sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body + ean)) % 10 == 0
    isbn = answer("check_digit", kind="isbn", text=body[:9] + "0")["expected"]
    assert sum((10 - place) * (10 if digit == "X" else int(digit)) for place, digit in enumerate(body[:9] + isbn)) % 11 == 0
    account = "DE00" + body + "123456"
    check = answer("check_digit", kind="iban", text=account)["expected"]
    assert int(account[4:] + "1314" + check) % 97 == 1
    assert answer("check_digit", kind="iban", text=f"de{check} {account[4:]}")["valid"] is True


@pytest.mark.parametrize(
    ("kind", "text", "more"),
    [
        ("iban", "GB82 WEST 1234 5698 7654 32", {"country": "GB", "expected": "82"}),
        ("iban", "CH93 0076 2011 6238 5295 7", {"country": "CH", "expected": "93"}),
        ("iban", "MT84MALT011000012345MTLCAST001S", {"country": "MT", "expected": "84"}),
        ("isbn", "0-8044-2957-X", {"expected": "X"}),
        ("isbn", "978-3-16-148410-0", {"expected": "0"}),
        ("ean", "73513537", {"expected": "7"}),
        ("credit_card", "4111 1111 1111 1111", {"expected": "1", "issuer": "visa"}),
        ("credit_card", "3782 822463 10005", {"expected": "5", "issuer": "american express"}),
        ("credit_card", "5555 5555 5555 4444", {"expected": "4", "issuer": "mastercard"}),
        ("luhn", "79927398713", {"expected": "3"}),
    ],
)
def test_well_known_numbers(kind: str, text: str, more: dict[str, str]) -> None:
    plain = text.replace(" ", "").replace("-", "")
    assert answer("check_digit", kind=kind, text=text) == {"valid": True, "text": plain} | more
    wrong = plain[:-2] + ("1" if plain[-2] != "1" else "2") + plain[-1]
    assert answer("check_digit", kind=kind, text=wrong)["valid"] is False


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("iban", "DE89"), ("iban", "XX893704004405320130"), ("iban", ""), ("isbn", "9773161484100"), ("isbn", "x"), ("ean", "1234567")),
        *(("luhn", "0"), ("luhn", "12a4"), ("luhn", "é"), ("credit_card", "42")),
    ],
)
def test_what_is_not_well_formed_has_no_check_digit(kind: str, text: str) -> None:
    assert answer("check_digit", kind=kind, text=text) == {"valid": False, "text": text.upper() if text.isascii() else text}
    assert '"kind" must be' in complaint("check_digit", kind="sum", text=text)
