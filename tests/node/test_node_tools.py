"""Tools from OpenAI's client to the engine in its worker and back, as processes on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageFunctionToolCall

from node.localnet import LocalNetwork
from tests.runtimes.gguf.tiny_models import TINY, write_tiny
from tests.runtimes.gguf.tool_templates import HERMES

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


class Running:
    """A Coordinator, an Island with echo and a tiny model whose template has tools, and a client."""

    def __init__(self, network: LocalNetwork) -> None:
        network.start_coordinator()
        tiny = replace(TINY["llama"], context=4096, template=HERMES)
        path = write_tiny(network.folder / "tiny-tools.gguf", tiny)
        more = ("--cargo", f"file:{path}", "--cargo", "echo", "--threads", "1", "--memory-limit", "600000000")
        self.model = next(name for name in network.start_island("one", *more).wait_ready()["cargos"] if name != "echo")
        self.client = openai.OpenAI(base_url=network.url + "/v1", api_key=network.make_key(), max_retries=0)

    def ask(self, **changes: Any) -> Any:
        fields = {"model": self.model, "messages": [{"role": "user", "content": "Is it warm in Bern?"}], "max_tokens": 200, "seed": 5}
        return self.client.chat.completions.create(**{**fields, "tools": [WEATHER, NOW], **changes})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with LocalNetwork(tmp_path_factory.mktemp("tools")) as network:
        yield Running(network)


def test_a_named_tool_is_called_with_arguments_that_fit(running: Running) -> None:
    for seed in range(3):
        answer: ChatCompletion = running.ask(tool_choice=NAMED, temperature=1.2, seed=seed)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        calls = choice.message.tool_calls or []
        call = calls[0]
        assert len(calls) == 1 and isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert call.type == "function" and call.function.name == "weather" and call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        assert list(arguments) == ["city", "unit"] and len(arguments["city"]) <= 12 and arguments["unit"] in ("C", "F")
        assert answer.usage is not None and 0 < answer.usage.completion_tokens < 200
        assert answer.usage.prompt_tokens > 300, "the tools stand in the prompt"


def test_a_stream_is_the_same_call(running: Running) -> None:
    whole = running.ask(tool_choice="required")
    chunks = list(running.ask(tool_choice="required", stream=True, stream_options={"include_usage": True}))
    pieces = [piece for chunk in chunks for choice in chunk.choices for piece in choice.delta.tool_calls or ()]
    (call,) = whole.choices[0].message.tool_calls
    assert [piece.function.name for piece in pieces if piece.id] == [call.function.name]
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments and len(pieces) > 1
    assert chunks[-2].choices[0].finish_reason == "tool_calls" and chunks[-1].usage == whole.usage


def test_a_talk_with_calls_goes_on(running: Running) -> None:
    first = running.ask(tool_choice=NAMED).choices[0].message
    told = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "21 degrees"}
    messages = [{"role": "user", "content": "Is it warm in Bern?"}, first.model_dump(exclude_none=True), told]
    after, before = running.ask(messages=messages, max_tokens=4), running.ask(max_tokens=4)
    assert after.usage.prompt_tokens > before.usage.prompt_tokens + 60, "call and result stand in the prompt"


def test_a_model_without_tools_says_so(running: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        running.ask(model="echo")
    assert caught.value.code == "tools_not_supported" and caught.value.param == "tools"
    assert running.ask(model="echo", tool_choice="none").choices[0].message.content == "Is it warm in Bern?"
