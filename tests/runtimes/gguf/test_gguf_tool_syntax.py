"""Templates with tools: how their models write calls, what the prompts look like, and the schema that a forced call is held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.errors import Code, Refused
from protocol.generation import ChatMessage, GenerationRequest, Role, Tool, ToolCall, ToolChoice
from runtimes.gguf import gbnf, schema
from runtimes.gguf.grammar import TokenGrammar
from runtimes.gguf.llama import Model
from runtimes.gguf.template import ChatTemplate
from runtimes.gguf.tool_syntax import ToolSyntax, schema_of_call
from tests.runtimes.gguf import tool_templates as templates

Fits = Callable[[str, object], bool]

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER, NOW = Tool("weather", "In a city.", json.dumps(CITY)), Tool("now")
ASK = ChatMessage(Role.USER, "Is it warm?")
CALLED = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("call_1", "weather", '{"city":"Bern"}'),))
TOLD = ChatMessage(Role.TOOL, "21", tool_call_id="call_1")
TALK = (ASK, CALLED, TOLD)
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "syntax"),
    [
        (templates.HERMES, ToolSyntax.HERMES),
        (templates.SMOLLM2_LIST, ToolSyntax.HERMES_LIST),
        (templates.MISTRAL, ToolSyntax.MISTRAL),
        (templates.LLAMA, ToolSyntax.LLAMA),
        (templates.PLAIN_JSON, ToolSyntax.JSON),
        (templates.QWEN3_CODER, ToolSyntax.NONE),
        (PLAIN, ToolSyntax.NONE),
        ("Here are no tools, though <tool_call> stands here: " + PLAIN, ToolSyntax.NONE),
    ],
)
def test_how_a_model_calls_stands_in_its_template(source: str, syntax: ToolSyntax) -> None:
    assert ChatTemplate(source).tools is syntax


def test_hermes() -> None:
    text = ChatTemplate(templates.HERMES).render(TALK, (WEATHER, NOW))
    shown = {"type": "function", "function": {"name": "weather", "description": "In a city.", "parameters": CITY}}
    assert "\n" + json.dumps(shown) + "\n" in text
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith("<|im_start|>user\n<tool_response>\n21\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert "tools" not in ChatTemplate(templates.HERMES).render((ASK,))


def test_mistral_gets_ids_that_it_takes() -> None:
    text = ChatTemplate(templates.MISTRAL, "<s>", "</s>").render((*TALK, ASK), (WEATHER,))
    shown = text.partition('"id": "')[2][:9]
    assert shown.isalnum() and f'"call_id": "{shown}"}}[/TOOL_RESULTS]' in text
    assert '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}, "id": ' in text
    assert text.endswith('[/AVAILABLE_TOOLS][INST] Is it warm?[/INST]') and text.startswith("<s>[INST]")


def test_llama() -> None:
    text = ChatTemplate(templates.LLAMA).render(TALK, (WEATHER,))
    assert '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>' in text and '"description": "In a city."' in text
    twice = (ASK, ChatMessage(Role.ASSISTANT, "", tool_calls=CALLED.tool_calls * 2), TOLD)
    with pytest.raises(Refused, match="single tool-calls") as caught:
        ChatTemplate(templates.LLAMA).render(twice, (WEATHER,))
    assert caught.value.code is Code.BAD_INPUT


def test_arguments_that_are_no_object_stay_a_text() -> None:
    odd = ChatMessage(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "now", "soon"),))
    assert '"arguments": "soon"' in ChatTemplate(templates.HERMES).render((ASK, odd), (NOW,))


@pytest.mark.parametrize(
    ("source", "messages", "tools"),
    [(PLAIN, (ASK,), (NOW,)), (templates.QWEN3_CODER, (ASK,), (NOW,)), (PLAIN, TALK, ())],
    ids=["tools", "an unknown way", "calls of old"],
)
def test_nothing_is_left_out_silently(source: str, messages: tuple[ChatMessage, ...], tools: tuple[Tool, ...]) -> None:
    with pytest.raises(Refused, match="no place for") as caught:
        ChatTemplate(source).render(messages, tools)
    assert caught.value.code is Code.NO_TOOLS and not caught.value.retryable


def test_parameters_that_are_no_schema() -> None:
    for broken in ("{", "[]", "1", "[" * 100_000):
        with pytest.raises(Refused, match="parameters of a tool") as caught:
            ChatTemplate(templates.HERMES).render((ASK,), (Tool("f", parameters=broken[:60_000]),))
        assert caught.value.code is Code.BAD_INPUT


def forced(syntax: ToolSyntax, *tools: Tool, name: str = "") -> str:
    """The grammar."""
    choice = ToolChoice.NAMED if name else ToolChoice.REQUIRED
    request = GenerationRequest(messages=(ASK,), tools=tools, tool_choice=choice, tool=name)
    return gbnf.gbnf(schema.parse(schema_of_call(syntax, request)))


@pytest.fixture(scope="module")
def accepts(smollm2_path: Path) -> Iterator[Fits]:
    """Whether a grammar takes a value, as llama.cpp says."""
    model = Model(str(smollm2_path), vocabulary_only=True)
    ends = model.end_tokens()

    def ask(made: str, value: object) -> bool:
        grammar = TokenGrammar(model, made, ends)
        for token in model.tokenize(json.dumps(value), add_special=False, parse_special=False):
            if not grammar.allows(token):
                return False
            grammar.accept(token)
        return grammar.allows(min(ends))

    yield ask
    model.close()


def test_the_schema_of_a_call(accepts: Fits) -> None:
    any_tool, named = forced(ToolSyntax.HERMES, WEATHER, NOW), forced(ToolSyntax.HERMES, WEATHER, NOW, name="now")
    bern, now = {"name": "weather", "arguments": {"city": "Bern"}}, {"name": "now", "arguments": {}}
    assert accepts(any_tool, bern) and accepts(any_tool, now) and accepts(named, now) and not accepts(named, bern)
    assert not accepts(any_tool, {"name": "weather", "arguments": {"city": 1}}) and not accepts(any_tool, {"name": "rm", "arguments": {}})
    assert accepts(forced(ToolSyntax.LLAMA, NOW), {"name": "now", "parameters": {}})
    assert accepts(forced(ToolSyntax.MISTRAL, NOW), [now]) and not accepts(forced(ToolSyntax.MISTRAL, NOW), [now, now])


def test_references_lead_where_they_led(accepts: Fits) -> None:
    tree = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "$ref": {"enum": ["#/a"]}},
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"const": {"$ref": "#/x"}}}}},
        "required": ["root"],
    }
    made = forced(ToolSyntax.HERMES, Tool("tree", parameters=json.dumps(tree)), NOW)
    good = {"root": {"next": {"next": {"v": {"$ref": "#/x"}}}}, "$ref": "#/a"}
    for arguments, fits in ((good, True), ({"root": {"next": 1}}, False), ({}, False), ({"root": {"v": {"$ref": "#/y"}}}, False)):
        assert accepts(made, {"name": "tree", "arguments": arguments}) is fits, arguments
