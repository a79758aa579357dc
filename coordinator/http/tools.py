"""Tools in a chat's request: ``tools``, ``tool_choice``, ``parallel_tool_calls``, and the calls of earlier answers. Checked field by field.

``tool_choice: none`` leaves the tools out, so that a model without tools can answer.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.http.errors import bad_request, unsupported
from coordinator.http.fields import Fields, text_of, wrong_type
from protocol import limits
from protocol.generation import Tool, ToolCall, ToolChoice, check_tool_name


def tools_of(fields: Fields) -> dict[str, Any]:
    """The fields of a GenerationRequest that speak of tools. Raises ApiError 400."""
    tools, parallel = _tools(fields.get("tools")), fields.get("parallel_tool_calls") is None or fields.flag("parallel_tool_calls")
    choice, name = _choice(fields.get("tool_choice"))
    if choice is None or not tools:
        if choice in (ToolChoice.REQUIRED, ToolChoice.NAMED):
            raise bad_request("tool_choice needs tools to choose from", "tool_choice")
        return {}
    if name and name not in {tool.name for tool in tools}:
        raise bad_request("tool_choice names a function that is not among tools", "tool_choice")
    return {"tools": tools, "tool_choice": choice, "tool": name, "parallel_calls": parallel}


def _tools(value: object) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong_type("tools", "an array", value)
    if len(value) > limits.TOOLS_MAX:
        raise bad_request(f"there are {len(value)} tools; the limit is {limits.TOOLS_MAX}", "tools", "array_above_max_length")
    tools = tuple(_tool(entry, f"tools[{index}]") for index, entry in enumerate(value))
    if len({tool.name for tool in tools}) != len(tools):
        raise bad_request("two of the tools have the same name", "tools")
    if sum(tool.chars for tool in tools) > limits.TOOLS_BYTES_MAX:
        raise bad_request(f"the tools are over {limits.TOOLS_BYTES_MAX} characters together", "tools", "string_above_max_length")
    return tools


def _tool(value: object, where: str) -> Tool:
    function, inner = _function(value, where)
    description, parameters, strict = function.get("description"), function.get("parameters"), function.get("strict")
    if strict is not None and type(strict) is not bool:
        raise wrong_type(f"{inner}.strict", "a boolean", strict)
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_type(f"{inner}.parameters", "a JSON schema, which is an object", parameters)
    schema = json.dumps(parameters, separators=(",", ":")) if parameters else ""
    if len(schema) > limits.SCHEMA_BYTES_MAX:
        raise bad_request(f"{inner}.parameters is over {limits.SCHEMA_BYTES_MAX} bytes", f"{inner}.parameters")
    text = "" if description is None else text_of(description, f"{inner}.description", limits.MESSAGE_CHARS_MAX)
    return Tool(_name(function, inner), text, schema)


def _function(value: object, where: str) -> tuple[dict[str, Any], str]:
    """The function of a tool, a choice or a call, and where it stands."""
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    kind, function = value.get("type"), value.get("function")
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"{where}.type", f"{kind[:40]!r} is not supported here; tools are functions")
    if not isinstance(function, dict):
        raise bad_request(f"{where}.function must be an object", f"{where}.function", "missing_required_parameter")
    return function, f"{where}.function"


def _name(function: dict[str, Any], where: str) -> str:
    name = text_of(function.get("name"), f"{where}.name", limits.TOOL_NAME_CHARS_MAX)
    try:
        check_tool_name(name)
    except ValueError as error:
        raise bad_request(str(error), f"{where}.name") from None
    return name


def _choice(value: object) -> tuple[ToolChoice | None, str]:
    """None: no tool may be called."""
    if value is None or value == "auto":
        return ToolChoice.AUTO, ""
    if value == "none":
        return None, ""
    if value == "required":
        return ToolChoice.REQUIRED, ""
    if isinstance(value, dict):
        return ToolChoice.NAMED, _name(*_function(value, "tool_choice"))
    raise bad_request("tool_choice must be none, auto, required or a function", "tool_choice")


def calls_of(value: object, where: str, chars_left: int) -> tuple[ToolCall, ...]:
    """``tool_calls`` of a message whose content leaves room for so many characters. Raises ApiError 400."""
    if not value:
        return ()
    if not isinstance(value, list):
        raise wrong_type(where, "an array", value)
    if len(value) > limits.TOOL_CALLS_MAX:
        text = f"{where} has {len(value)} calls; the limit is {limits.TOOL_CALLS_MAX}"
        raise bad_request(text, where, "array_above_max_length")
    calls = tuple(_call(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if sum(len(call.name) + len(call.arguments) for call in calls) > chars_left:
        text = f"{where} and the content have over {limits.MESSAGE_CHARS_MAX} characters together"
        raise bad_request(text, where, "string_above_max_length")
    return calls


def _call(value: object, where: str) -> ToolCall:
    function, inner = _function(value, where)
    arguments = text_of(function.get("arguments"), f"{inner}.arguments", limits.MESSAGE_CHARS_MAX)
    return ToolCall(call_id(value, "id", where), _name(function, inner), arguments)


def call_id(value: Any, field: str, where: str) -> str:
    """An id that a call has or that a result names; empty where there is none."""
    given = value.get(field)
    checked = "" if given is None else text_of(given, f"{where}.{field}", limits.TOOL_CALL_ID_CHARS_MAX)
    if len(checked.encode()) > limits.TOOL_CALL_ID_CHARS_MAX:
        raise bad_request(f"{where}.{field} is over {limits.TOOL_CALL_ID_CHARS_MAX} bytes", f"{where}.{field}")
    return checked
