"""Tools in chats, between OpenAI's client and an Island that frames calls as protocol.tool_calls says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageFunctionToolCall

from protocol.errors import Code, Refused
from protocol.generation import Role, Tool, ToolCall, ToolChoice, unpack_tokens
from protocol.tool_calls import ARGUMENTS, CALL, END
from tests.coordinator.clients import http, lines_of, with_openai
from tests.coordinator.fakes import FakeIsland, Running, Script, coordinator, island

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "In a city.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "strict": True}}
ASK: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "Is it warm?"}], "tools": [WEATHER, NOW]}
TWO_CALLS = (f"{CALL}wea", f'ther{ARGUMENTS}{{"city"', ':"Bern"}', END, f"{CALL}now{ARGUMENTS}{{}}{END}")
WORDS_TOO = ("Let me ", "see.", *TWO_CALLS)


def writes(*words: str, **more: Any) -> FakeIsland:
    """An Island that answers with these words, one token each."""
    return island(1, Script(words=words, token_s=0.001, **more))


async def whole(running: Running, **changes: Any) -> ChatCompletion:
    return await with_openai(running, lambda client: client.chat.completions.create(**{**ASK, **changes}))


async def streamed(running: Running, **changes: Any) -> list[ChatCompletionChunk]:
    """Chunks as they stand on the wire, checked strictly against OpenAI's types."""
    body = {**ASK, "stream": True, **changes}
    async with http(running) as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        data = [line async for line in lines_of(response)]
    assert data[-1] == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(entry, strict=True) for entry in data[:-1]]


async def test_calls_are_openais(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running:
        answer = await whole(running)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert answer.usage is not None and answer.usage.completion_tokens == len(TWO_CALLS)
    assert choice.message.tool_calls is not None
    first, second = (call.to_dict() for call in choice.message.tool_calls)
    assert first["function"] == {"name": "weather", "arguments": '{"city":"Bern"}'} and first["type"] == "function"
    assert second["function"] == {"name": "now", "arguments": "{}"}
    ids = [str(call["id"]) for call in (first, second)]
    assert len(set(ids)) == 2 and all(call_id.startswith("call_") for call_id in ids)


async def test_words_beside_calls(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*WORDS_TOO)) as running:
        message = (await whole(running)).choices[0].message
    assert message.content == "Let me see." and message.tool_calls is not None and len(message.tool_calls) == 2


async def test_words_alone(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes("It ", "is.")) as running:
        answer, chunks = await whole(running), await streamed(running)
    assert answer.choices[0].message.content == "It is." and answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "It is."


async def test_calls_are_streamed_in_pieces(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*WORDS_TOO)) as running:
        chunks = await streamed(running, stream_options={"include_usage": True})
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(WORDS_TOO)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and deltas[0].content is None
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    pieces = [piece for delta in deltas for piece in delta.tool_calls or ()]
    begun = [piece for piece in pieces if piece.id]
    assert [(piece.index, piece.function.name, piece.function.arguments) for piece in begun if piece.function] == [
        (0, "weather", ""),
        (1, "now", ""),
    ]
    assert all(piece.type == "function" for piece in begun)
    assert pieces.index(begun[1]) > 1, "the first call's arguments came before the second call"
    arguments = ["", ""]
    for piece in pieces:
        assert piece.function is not None
        arguments[piece.index] += piece.function.arguments or ""
    assert arguments == ['{"city":"Bern"}', "{}"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:] if chunk.choices] == ["tool_calls"]


async def test_openais_client_puts_the_pieces_together(tmp_path: Path) -> None:
    def work(client: openai.OpenAI) -> Any:
        with client.chat.completions.stream(**ASK) as stream:
            for _ in stream:
                pass
            return stream.get_final_completion()

    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running:
        answer = await with_openai(running, work)
    (choice,) = answer.choices
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city":"Bern"}', "{}"]
    assert choice.finish_reason == "tool_calls"


async def test_a_call_that_is_cut_off(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running:
        answer = await whole(running, max_tokens=2)
        chunks = await streamed(running, max_tokens=2)
    calls = answer.choices[0].message.tool_calls or []
    call = calls[0]
    assert len(calls) == 1 and isinstance(call, ChatCompletionMessageFunctionToolCall) and call.function.arguments == '{"city"'
    assert answer.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


async def test_each_choice_has_calls_of_its_own(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running:
        answer = await whole(running, n=2)
        chunks = await streamed(running, n=2)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or ()]
    assert len(ids) == len(set(ids)) == 4
    begun = [(choice.index, piece.index) for c in chunks for choice in c.choices for piece in choice.delta.tool_calls or () if piece.id]
    assert sorted(begun) == [(0, 0), (0, 1), (1, 0), (1, 1)]


async def test_a_call_goes_on_at_another_island(tmp_path: Path) -> None:
    """The first Island dies within the arguments; ids and pieces are as if nothing had happened."""
    dying = island(1, Script(words=WORDS_TOO, fail_after=5), tokens_per_s=9.0)
    other = island(2, Script(words=WORDS_TOO), tokens_per_s=1.0)
    async with coordinator(tmp_path, dying, other) as running:
        chunks = await streamed(running)
    assert len(dying.requests) == 1 and len(unpack_tokens(other.requests[0].resume)) == 5
    arguments = [piece.function.arguments for c in chunks for piece in c.choices[0].delta.tool_calls or () if piece.function]
    assert "".join(piece or "" for piece in arguments) == '{"city":"Bern"}{}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_an_answer_told_again_has_the_same_ids(tmp_path: Path) -> None:
    headers = {"Idempotency-Key": "once"}
    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running, http(running) as client:
        first = await client.post("/v1/chat/completions", json=ASK, headers=headers)
        second = await client.post("/v1/chat/completions", json=ASK, headers=headers)
        another = await client.post("/v1/chat/completions", json=ASK)
    assert second.headers["x-archipelag-replayed"] == "true"
    told = [json.loads(response.content)["choices"][0]["message"]["tool_calls"] for response in (first, second, another)]
    assert told[0] == told[1] and told[0][0]["id"] != told[2][0]["id"]


async def test_what_the_island_is_told(tmp_path: Path) -> None:
    one = writes("x")
    messages = [
        {"role": "user", "content": "Is it warm?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bern"}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "21"},
    ]
    named = {"type": "function", "function": {"name": "now"}}
    async with coordinator(tmp_path, one) as running:
        await whole(running, messages=messages, tool_choice=named, parallel_tool_calls=False)
        await whole(running, tool_choice="required")
        await whole(running, tool_choice="none")
        await whole(running, tool_choice="auto", tools=[])
    first, second, none, empty = one.requests
    assert first.tools == (Tool("weather", "In a city.", json.dumps(SCHEMA, separators=(",", ":"))), Tool("now"))
    assert (first.tool_choice, first.tool, first.parallel_calls) == (ToolChoice.NAMED, "now", False)
    assert first.messages[1].tool_calls == (ToolCall("c1", "weather", '{"city":"Bern"}'),) and first.messages[1].content == ""
    assert (first.messages[2].role, first.messages[2].tool_call_id) == (Role.TOOL, "c1")
    assert (second.tool_choice, second.tool, second.parallel_calls) == (ToolChoice.REQUIRED, "", True)
    assert not none.tools and none.tool_choice is ToolChoice.AUTO and not empty.tools


async def test_without_tools_the_marks_are_text(tmp_path: Path) -> None:
    async with coordinator(tmp_path, writes(*TWO_CALLS)) as running:
        answer = await whole(running, tool_choice="none")
    assert answer.choices[0].message.content == "".join(TWO_CALLS) and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_without_tools(tmp_path: Path, stream: bool) -> None:
    refusal = Script(refuse=Refused(Code.NO_TOOLS, "this model has no tools"))
    one = island(1, refusal)
    async with coordinator(tmp_path, one) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json={**ASK, "stream": stream})
        other = await client.post("/v1/chat/completions", json=ASK)
    assert response.status_code == other.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"], error["message"]) == ("tools_not_supported", "tools", "this model has no tools")
    assert len(one.requests) == 2, "nobody tries the same model again"
