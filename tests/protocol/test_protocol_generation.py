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
    Tool,
    ToolCall,
    ToolChoice,
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
    {"tools": tuple(Tool(f"t{n}") for n in range(129))},
    {"tools": (Tool("twice"), Tool("twice"))},
    {"tools": tuple(Tool(f"t{n}", parameters="x" * 65_536) for n in range(4))},
    {"tools": (Tool("t"),), "tool_choice": ToolChoice.NAMED},
    {"tools": (Tool("t"),), "tool_choice": ToolChoice.NAMED, "tool": "other"},
    {"tools": (Tool("t"),), "tool": "t"},
    {"tool_choice": ToolChoice.REQUIRED},
    {"tools": (Tool("t"),), "output_format": OutputFormat.JSON_OBJECT},
    {"tools": (Tool("t"),), "messages": (), "prompt": "x"},
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


def test_tools_come_through() -> None:
    request = samples.generation_with_tools()
    assert GENERATION.decode(GENERATION.encode(request)) == request
    plain = samples.generation_with_tools(tools=(), tool_choice=ToolChoice.AUTO, tool="")
    assert request.input_chars - plain.input_chars == sum(tool.chars for tool in request.tools), "they become a part of the prompt"
    assert plain.input_chars == sum(map(len, ("Is it warm in Bern?", "weather", '{"city":"Bern"}', "21 °C")))


@pytest.mark.parametrize("name", ["", "two words", "x" * 65, "naïve", "a\n"])
def test_names_of_tools(name: str) -> None:
    with pytest.raises(ValueError, match="a tool's name"):
        Tool(name)
    with pytest.raises(ValueError, match="a tool's name"):
        ToolCall("1", name, "{}")


@pytest.mark.parametrize(
    "fields",
    [
        {"role": Role.USER, "tool_calls": (ToolCall("1", "f", "{}"),)},
        {"role": Role.ASSISTANT, "tool_call_id": "1"},
        {"role": Role.TOOL, "tool_call_id": "x" * 129},
        {"role": Role.ASSISTANT, "tool_calls": (ToolCall("1", "f", "{}"),) * 129},
        {"role": Role.ASSISTANT, "content": "x" * 32_765, "tool_calls": (ToolCall("1", "f", "{}"), ToolCall("2", "g", ""))},
    ],
    ids=["a user's call", "an assistant's result", "a long id", "many calls", "long together"],
)
def test_messages_with_calls_check_themselves(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ChatMessage(**{"content": "", **fields})


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
