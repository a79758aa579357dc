"""How a model writes calls of tools, told from its chat template, and what it is held to where it has to call one. Pure.

Templates show the model its tools and, in earlier turns, its calls; the marks that they use are those that it learned to write:

- Hermes 2 Pro, Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``; SmolLM2 puts a list between the marks;
- Mistral up to its tokenizer v7: ``[TOOL_CALLS] [{"name": …, "arguments": {…}}]``;
- Llama 3.1 and later: the answer is ``{"name": …, "parameters": {…}}``, perhaps behind ``<|python_tag|>``;
- any other with tools: the answer is ``{"name": …, "arguments": {…}}``.

Ways that are not JSON of a name and arguments are not read here, and models that write so have no tools.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from protocol.errors import Code, Refused
from protocol.generation import GenerationRequest, Tool, ToolChoice

_DATA = frozenset({"enum", "const", "default", "examples"})  # keywords whose values are no schemas
_FOREIGN = (  # Qwen3-Coder, GLM 4.5, Mistral from v11 on, DeepSeek, Granite, gpt-oss, Phi 4, FunctionGemma
    *("<function=", "<arg_key>", "[ARGS]", "<｜tool▁calls▁begin｜>", "<|tool_call|>", "<|channel|>", "functools[", "<start_function_call>"),
)
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolSyntax(StrEnum):
    NONE = "none"
    HERMES = "hermes"
    HERMES_LIST = "hermes_list"
    MISTRAL = "mistral"
    LLAMA = "llama"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Marks:
    """``begin`` and ``end`` stand round the calls; without them calls can only be the whole answer. ``optional``: what may stand before.
    ``lead``: what an answer begins with that has to be a call. ``key`` of the arguments. ``is_list``: the calls stand in a JSON list."""

    key: str = "arguments"
    begin: str = ""
    end: str = ""
    optional: str = ""
    lead: str = ""
    is_list: bool = False


MARKS = {
    ToolSyntax.HERMES: Marks(begin="<tool_call>", end="</tool_call>", lead="<tool_call>\n"),
    ToolSyntax.HERMES_LIST: Marks(begin="<tool_call>", end="</tool_call>", lead="<tool_call>", is_list=True),
    ToolSyntax.MISTRAL: Marks(begin="[TOOL_CALLS]", lead="[TOOL_CALLS]", is_list=True),
    ToolSyntax.LLAMA: Marks(key="parameters", optional="<|python_tag|>"),
    ToolSyntax.JSON: Marks(),
}


def syntax_of(template: str) -> ToolSyntax:
    """Of a template that has a place for tools."""
    if any(mark in template for mark in _FOREIGN):
        return ToolSyntax.NONE
    if "[TOOL_CALLS]" in template:
        return ToolSyntax.MISTRAL
    if "<tool_call>" in template:
        return ToolSyntax.HERMES_LIST if "<tool_call>[" in template else ToolSyntax.HERMES
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and "parameters" in template):
        return ToolSyntax.LLAMA
    return ToolSyntax.JSON


def must_call(request: GenerationRequest) -> bool:
    return request.tool_choice is not ToolChoice.AUTO


def schema_of_call(syntax: ToolSyntax, request: GenerationRequest) -> str:
    """The JSON schema of an answer that has to be a call, behind its lead: of one call, since an answer that is complete ends there.

    Raises Refused(bad_input) where the parameters of a tool are no schema.
    """
    marks = MARKS[syntax]
    chosen = [tool for tool in request.tools if request.tool in ("", tool.name)]
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, marks.key: {"$ref": f"#/$defs/t{number}"}},
            "required": ["name", marks.key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(chosen)
    ]
    call: dict[str, Any] = options[0] if len(options) == 1 else {"anyOf": options}
    whole = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if marks.is_list else call
    try:
        definitions = {f"t{number}": _moved(parameters_of(tool), f"#/$defs/t{number}") for number, tool in enumerate(chosen)}
        return json.dumps(whole | {"$defs": definitions}, separators=(",", ":"))
    except RecursionError:
        raise Refused(Code.BAD_INPUT, "the parameters of a tool are nested too deeply") from None


def parameters_of(tool: Tool) -> dict[str, Any]:
    """Raises Refused(bad_input)."""
    if not tool.parameters:
        return NO_ARGUMENTS
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise Refused(Code.BAD_INPUT, "the parameters of a tool are no JSON schema")
    return {"type": "object"} | schema


def as_templates_take_them(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Raises Refused(bad_input)."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": parameters_of(tool)},
        }
        for tool in tools
    ] or None


def _moved(schema: Any, place: str) -> Any:
    """The same schema as a part of another one: its references lead to where it stands then."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: value if key in _DATA else _reference(key, value, place) for key, value in schema.items()}


def _reference(key: str, value: Any, place: str) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return place + value[1:]
    return _moved(value, place)
