"""Prices are integers; text goes in and out without loss, and nothing is free by being small."""

from __future__ import annotations

import json
import random
from decimal import ROUND_CEILING, Decimal

import pytest

from protocol import limits
from protocol.prices import (
    Ask,
    WrittenNumber,
    format_ask,
    format_credits,
    parse_ask,
    parse_ask_json,
    parse_credits,
    parse_price,
    sum_of_asks,
)


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("0", 0),
        ("1", 1_000_000),
        ("0.25", 250_000),
        ("0.000001", 1),
        ("0.100000", 100_000),
        ("007.5", 7_500_000),
        ("999999999.999999", 999_999_999_999_999),
    ],
)
def test_parse(text: str, micros: int) -> None:
    assert parse_credits(text) == micros


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "1.",
        ".5",
        "1e3",
        "0.0000001",
        "1,5",
        "nan",
        "inf",
        "0x10",
        "1_000",
        "1\n",
        " 1",
        "1000000000",
        "٣",
        "1.٣",
        "²",
    ],
)
def test_what_is_no_price(text: str) -> None:
    with pytest.raises(ValueError, match="a price is"):
        parse_credits(text)


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (250_000, "0.25"),
        (10_000_000, "10"),
        (1_000_000_001, "1000.000001"),
        (-250_000, "-0.25"),
    ],
)
def test_format(micros: int, text: str) -> None:
    assert format_credits(micros) == text


def test_there_and_back() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        micros = chance.randrange(10 ** chance.randint(1, 15))
        assert parse_credits(format_credits(micros)) == micros
        assert Decimal(format_credits(micros)) * limits.CREDIT_MICROS == micros


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ("0.25", Ask(250_000)),
        ("0.1+0.02", Ask(100_000, 20_000)),
        ("0 + 0.02 + 0.000001", Ask(0, 20_000, 1)),
    ],
)
def test_an_ask(text: str, ask: Ask) -> None:
    assert parse_ask(text) == ask


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+",
        "+1",
        "1+2+3+4",
        "1++2",
        "-1",
        "a",
        "1\t+2",
        "1\n",
        "1\u2003+2",
        "1+nan",
        "1+1e3",
        "1+" * 10**6,
        "1" * 10**6,
    ],
)
def test_what_is_no_ask(text: str) -> None:
    with pytest.raises(ValueError):
        parse_ask(text)


def test_an_ask_checks_itself() -> None:
    bads: list[object] = [-1, limits.PRICE_MICROS_MAX + 1, 10**5000, True, 1.0, float("nan"), "1", None]
    for bad in bads:
        for place in range(3):
            with pytest.raises(ValueError):
                Ask(*(bad if n == place else 0 for n in range(3)))  # type: ignore[arg-type]


def test_each_part_of_a_price_is_rounded_up() -> None:
    assert Ask(5, 1, 0).price(1, 0) == 6
    assert Ask(0, 1, 1).price(1, 1) == 2
    assert Ask(0, 1, 1).price(0, 0) == 0
    assert Ask(0, 1000, 1000).price(7, 9) == 16
    assert Ask(0, 999, 0).price(1001, 0) == 1000  # 999.999


def test_the_price_against_exact_arithmetic() -> None:
    chance = random.Random(2)
    for _ in range(2000):
        ask = Ask(*(chance.randrange(10 ** chance.randint(1, 9)) for _ in range(3)))
        tokens, ms = chance.randrange(5000), chance.randrange(10**7)
        exact = Decimal(ask.per_job)
        for rate, amount in ((ask.per_1k_output, tokens), (ask.per_second, ms)):
            exact += (Decimal(rate) * amount / 1000).to_integral_value(ROUND_CEILING)
        assert ask.price(tokens, ms) == exact


def test_no_job_is_less_than_nothing() -> None:
    for tokens, milliseconds in ((-1, 0), (0, -1), (-(10**9), 10**9)):
        with pytest.raises(ValueError, match="no job has"):
            Ask(1, 1, 1).price(tokens, milliseconds)


def test_asks_add_up_and_stop_at_the_largest_price() -> None:
    assert sum_of_asks([Ask(1, 2, 3), Ask(10, 20, 30)]) == Ask(11, 22, 33)
    assert sum_of_asks([Ask(limits.PRICE_MICROS_MAX), Ask(1, 1)]) == Ask(limits.PRICE_MICROS_MAX, 1)


@pytest.mark.parametrize(
    ("value", "micros"),
    [
        ("0.25", 250_000),
        ("0", 0),
        (0, 0),
        (3, 3_000_000),
        (999_999_999, 999_999_999_000_000),
        (0.25, 250_000),
        (0.0, 0),
        (12.0, 12_000_000),
        (0.1, 100_000),  # what was written, not the double beside it
        (0.000123, 123),
        (123456789.123456, 123_456_789_123_456),
    ],
)
def test_a_price_in_json(value: object, micros: int) -> None:
    assert parse_price(value) == micros
    assert parse_price(json.loads(json.dumps(value))) == micros


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(-1, id="negative"),
        pytest.param(-0.25, id="negative float"),
        pytest.param(-0.0, id="minus nothing"),
        pytest.param("-1", id="negative text"),
        pytest.param(float("nan"), id="NaN"),
        pytest.param("NaN", id="NaN text"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param(float("-inf"), id="minus infinity"),
        pytest.param("Infinity", id="infinity text"),
        pytest.param(10**30, id="10^30"),
        pytest.param(1e30, id="10^30 as a float"),
        pytest.param(str(10**30), id="10^30 as text"),
        pytest.param(10**9, id="one above the largest"),
        pytest.param(1e9, id="one above the largest as a float"),
        pytest.param(10**5000, id="more digits than Python prints"),
        pytest.param(-(10**5000), id="as many below nothing"),
        pytest.param("1e3", id="scientific"),
        pytest.param("1E-3", id="scientific and small"),
        pytest.param(1e-6, id="a float that is written with an exponent"),
        pytest.param(1e16, id="a float that is large"),
        pytest.param("0.0000001", id="seven decimals"),
        pytest.param(0.0000015, id="seven decimals as a float"),
        pytest.param(0.1234567, id="seven digits behind the point"),
        pytest.param(0.1 + 0.2, id="what floats make of 0.3"),
        pytest.param("\u0661", id="Arabic digit"),
        pytest.param("\uff11", id="full-width digit"),
        pytest.param("1\u06f5", id="Persian digit behind"),
        pytest.param(True, id="true"),
        pytest.param(False, id="false"),
        pytest.param(None, id="null"),
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param(" 1", id="blank before"),
        pytest.param("1 ", id="blank behind"),
        pytest.param("1\n", id="line break"),
        pytest.param("1\x00", id="NUL"),
        pytest.param("\ud800", id="half a surrogate pair"),
        pytest.param("1" * 1_000_000, id="a million digits"),
        pytest.param("0." + "0" * 1_000_000, id="a million decimals"),
        pytest.param("0x10", id="hex"),
        pytest.param("1,5", id="comma"),
        pytest.param("1_000", id="underscore"),
        pytest.param("'; DROP TABLE bids; --", id="SQL"),
        pytest.param([1], id="list"),
        pytest.param({"per_job": 1}, id="object"),
    ],
)
def test_what_is_no_price_in_json(value: object) -> None:
    with pytest.raises(ValueError, match="a price is a number") as error:
        parse_price(value)
    assert len(str(error.value)) < 250, "what was said is not said back at length"


def read(text: str) -> object:
    return json.loads(text, parse_float=WrittenNumber)


def test_a_price_in_json_is_what_was_written() -> None:
    chance = random.Random(3)
    for _ in range(3000):
        micros = chance.randrange(10 ** chance.randint(1, 15))
        text = format_credits(micros)
        assert parse_price(text) == parse_price(read(text)) == micros, text
        longer = f"{text}0000000" if "." in text else f"{text}.0000001"
        with pytest.raises(ValueError, match="a price is a number"):
            parse_price(read(longer))


@pytest.mark.parametrize(
    ("text", "micros"),
    [("0.00005", 50), ("0.000001", 1), ("0.123456", 123_456), ("123456789.123457", 123_456_789_123_457), ("1.50", 1_500_000)],
)
def test_small_and_long_numbers_in_json(text: str, micros: int) -> None:
    assert parse_price(read(text)) == micros
    assert parse_ask_json(read(f'{{"per_1k_output": {text}}}')) == Ask(0, micros)


@pytest.mark.parametrize("text", ["1e3", "1E0", "5e-05", "1E+2", "0.25e0", "-1e3"])
def test_an_exponent_is_refused_and_the_text_says_so(text: str) -> None:
    for value in (read(text), text):
        with pytest.raises(ValueError, match="without an exponent"):
            parse_price(value)


@pytest.mark.parametrize("text", ["0.12345600000000000000001", "0.1000000", "-0.25", "-0.0", "999999999.9999999"])
def test_a_number_that_would_have_to_be_rounded_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at most 6 decimals") as error:
        parse_price(read(text))
    assert text in str(error.value) and "exponent" not in str(error.value)


def test_a_written_number_is_a_number() -> None:
    number = read("0.70")
    assert isinstance(number, WrittenNumber) and number == 0.7 and number.text == "0.70"
    assert json.dumps({"a": number}) == '{"a": 0.7}'


@pytest.mark.parametrize(
    ("value", "ask"),
    [
        ("0.1+0.02", Ask(100_000, 20_000)),
        (0.25, Ask(250_000)),
        (2, Ask(2_000_000)),
        ({"per_1k_output": "0.02"}, Ask(0, 20_000)),
        ({"per_job": 1, "per_1k_output": 0.5, "per_second": "0.000001"}, Ask(1_000_000, 500_000, 1)),
    ],
)
def test_an_ask_in_json(value: object, ask: Ask) -> None:
    assert parse_ask_json(value) == ask


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [],
        [1],
        {},
        {"per_jobs": 1},
        {"per_job": 1, "x": 2},
        {"per_job": -1},
        {"per_job": None},
        "",
        -1,
        1e30,
        {1: 2},
    ],
)
def test_what_is_no_ask_in_json(value: object) -> None:
    with pytest.raises(ValueError):
        parse_ask_json(value)


def test_an_ask_as_text_and_back() -> None:
    assert format_ask(Ask(250_000, 0, 1)) == "0.25+0+0.000001"
    chance = random.Random(4)
    for _ in range(500):
        ask = Ask(*(chance.randrange(10**15) for _ in range(3)))
        assert parse_ask(format_ask(ask)) == ask
