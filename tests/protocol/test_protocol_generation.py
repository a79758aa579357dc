"""The input of a text Cargo: every limit, and text that has no UTF-8."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.generation import (
    GENERATION,
    ChatMessage,
    GenerationRequest,
    OutputFormat,
    Role,
    Sampling,
    pack_tokens,
    unpack_tokens,
)
from tests.protocol import samples


def test_round_trip() -> None:
    request = samples.generation()
    assert GENERATION.decode(GENERATION.encode(request)) == request


def test_whole_numbers_for_floats_are_written_as_floats() -> None:
    """``temperature: 0`` of a JSON body is an int in Python; the wire has one form for it."""
    whole = GenerationRequest(prompt="x", sampling=Sampling(temperature=0, top_p=1, logit_bias=((1, 5),)))
    assert GENERATION.decode(GENERATION.encode(whole)) == whole
    written = GenerationRequest(prompt="x", sampling=Sampling(temperature=0.0, top_p=1.0, logit_bias=((1, 5.0),)))
    assert GENERATION.encode(whole) == GENERATION.encode(written)


def test_at_the_limits() -> None:
    chat = tuple(ChatMessage(Role.USER, "x" * limits.MESSAGE_CHARS_MAX) for _ in range(limits.MESSAGES_MAX))
    request = GenerationRequest(messages=chat, max_tokens=limits.COMPLETION_TOKENS_MAX)
    assert GENERATION.decode(GENERATION.encode(request)) == request


BAD: list[dict[str, Any]] = [
    {"messages": (ChatMessage(Role.USER, "x"),) * 129},
    {"prompt": "and a prompt"},
    {"messages": (), "prompt": "x" * 32_769},
    {"messages": (), "prompt": "half a pair \ud83c"},
    {"max_tokens": 0},
    {"max_tokens": -5},
    {"max_tokens": 4097},
    {"stop": ("a", "b", "c", "d", "e")},
    {"stop": ("",)},
    {"stop": ("x" * 257,)},
    {"stop": ("\udfff",)},
    {"top_logprobs": -2},
    {"top_logprobs": 21},
    {"output_format": OutputFormat.JSON_SCHEMA},
    {"schema": "{}"},
    {"output_format": OutputFormat.JSON_SCHEMA, "schema": " " * (64 * 1024 + 1)},
    {"output_format": OutputFormat.JSON_SCHEMA, "schema": "\ud800"},
    {"resume": b"123"},
    {"resume": bytes(4 * 65)},
]


@pytest.mark.parametrize("change", BAD, ids=lambda change: "-".join(change))
def test_a_request_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        samples.generation(**change)


@pytest.mark.parametrize(
    "change",
    [
        *({name: bad} for name in ("temperature", "top_p", "min_p") for bad in (math.nan, math.inf, -0.1, 2.1)),
        *({name: bad} for name in ("presence_penalty", "frequency_penalty") for bad in (math.nan, -2.1, 2.1)),
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -math.inf},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"logit_bias": ((-1, 0.0),)},
        {"logit_bias": ((2**31, 0.0),)},
        {"logit_bias": ((1, 100.1),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": tuple((n, 0.0) for n in range(1025))},
    ],
    ids=repr,
)
def test_sampling_checks_itself(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Sampling(**change)


@pytest.mark.parametrize(
    ("content", "name"),
    [("x" * 32_769, ""), ("\ud800", ""), ("x\udc00y", ""), ("x", "n" * 129), ("x", "\ud800")],
    ids=["long", "high half", "low half", "long name", "half in name"],
)
def test_a_message_checks_itself(content: str, name: str) -> None:
    with pytest.raises(ValueError):
        ChatMessage(Role.USER, content, name)


def test_unknown_roles_are_refused() -> None:
    data = GENERATION.encode(samples.generation()).replace(b"\xa4user", b"\xa4boss")
    with pytest.raises(RemoteProtocolError, match="boss"):
        GENERATION.decode(data)


def test_tokens_there_and_back() -> None:
    chance = random.Random(1)
    tokens = [chance.randrange(-(2**31), 2**31) for _ in range(1000)]
    assert unpack_tokens(pack_tokens(tokens)) == tokens
    assert unpack_tokens(memoryview(pack_tokens([1, 2]))) == [1, 2]
    assert pack_tokens([1, -1, 258]) == bytes.fromhex("01000000ffffffff02010000"), "little-endian whatever the machine"
    assert pack_tokens([]) == b"" and unpack_tokens(b"") == []
    with pytest.raises(ValueError):
        unpack_tokens(b"12345")
    with pytest.raises(OverflowError):
        pack_tokens([2**31])
