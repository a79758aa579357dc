"""Prices are integers; text goes in and out without loss, and nothing is free by being small."""

from __future__ import annotations

import random
from decimal import ROUND_CEILING, Decimal

import pytest

from protocol import limits
from protocol.prices import Ask, format_credits, parse_ask, parse_credits


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


@pytest.mark.parametrize("text", ["", "1+", "+1", "1+2+3+4", "1++2", "-1", "a"])
def test_what_is_no_ask(text: str) -> None:
    with pytest.raises(ValueError):
        parse_ask(text)


def test_an_ask_checks_itself() -> None:
    for bad in (-1, limits.PRICE_MICROS_MAX + 1):
        for place in range(3):
            with pytest.raises(ValueError):
                Ask(*(bad if n == place else 0 for n in range(3)))


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
