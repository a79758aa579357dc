"""What a text Cargo is asked to do: the one input of chat and completion, checked when it is made.

The Coordinator makes it from an OpenAI request, the Island's engine runs it. It is complete: defaults are filled in and the seed
is drawn before it is sent, so that another Island can continue the same answer after ``resume`` tokens.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from protocol import checks, limits
from protocol.registry import Struct


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class OutputFormat(StrEnum):
    TEXT = "text"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"


class ToolChoice(StrEnum):
    """Whether the answer calls tools: as the model likes, at least one, or the one that is named."""

    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]+\Z")


def check_tool_name(name: str) -> None:
    """OpenAI's rule for names of functions. Raises ValueError."""
    if len(name) > limits.TOOL_NAME_CHARS_MAX or not _TOOL_NAME.match(name):
        raise ValueError(f"a tool's name has letters, digits, _ and -, at most {limits.TOOL_NAME_CHARS_MAX}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. ``parameters``: the JSON schema of its arguments, an object; empty where it takes none."""

    name: str
    description: str = ""
    parameters: str = ""

    def __post_init__(self) -> None:
        check_tool_name(self.name)
        checks.utf8("a tool's description", self.description, limits.TOOLS_BYTES_MAX)
        checks.utf8("a tool's parameters", self.parameters, limits.SCHEMA_BYTES_MAX)

    @property
    def chars(self) -> int:
        return len(self.name) + len(self.description) + len(self.parameters)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an earlier answer has made. ``arguments``: as it wrote them, which should be the JSON of one object."""

    id: str
    name: str
    arguments: str

    def __post_init__(self) -> None:
        checks.utf8("a call's id", self.id, limits.TOOL_CALL_ID_CHARS_MAX)
        check_tool_name(self.name)
        checks.utf8("a call's arguments", self.arguments, limits.JOB_INPUT_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """``tool_calls``: of an assistant; ``tool_call_id``: the call whose result a message of role ``tool`` is."""

    role: Role
    content: str
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.chars > limits.MESSAGE_CHARS_MAX:
            raise ValueError(f"a message has {self.chars} characters; the limit is {limits.MESSAGE_CHARS_MAX}")
        checks.utf8("a message", self.content, limits.JOB_INPUT_BYTES_MAX)
        if len(self.name) > limits.NAME_CHARS_MAX:
            raise ValueError(f"a message's name may have {limits.NAME_CHARS_MAX} characters")
        checks.utf8("a message's name", self.name, limits.NAME_CHARS_MAX * 4)
        checks.at_most("tool_calls", self.tool_calls, limits.TOOL_CALLS_MAX)
        if self.tool_calls and self.role is not Role.ASSISTANT:
            raise ValueError("only an assistant calls tools")
        if self.tool_call_id and self.role is not Role.TOOL:
            raise ValueError("only a message of role tool answers a call")
        checks.utf8("tool_call_id", self.tool_call_id, limits.TOOL_CALL_ID_CHARS_MAX)

    @property
    def chars(self) -> int:
        """Characters of what it says and of the calls that it makes."""
        return len(self.content) + sum(len(call.name) + len(call.arguments) for call in self.tool_calls)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The order of the steps is: bias, penalties, grammar, temperature, top-k, top-p, min-p."""

    temperature: float = limits.TEMPERATURE_DEFAULT
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks.in_range("temperature", self.temperature, 0.0, limits.TEMPERATURE_MAX)
        checks.in_range("top_p", self.top_p, 0.0, 1.0)
        checks.in_range("top_k", self.top_k, 0, 1_000_000)
        checks.in_range("min_p", self.min_p, 0.0, 1.0)
        checks.in_range("presence_penalty", self.presence_penalty, -limits.PENALTY_ABS_MAX, limits.PENALTY_ABS_MAX)
        checks.in_range("frequency_penalty", self.frequency_penalty, -limits.PENALTY_ABS_MAX, limits.PENALTY_ABS_MAX)
        checks.in_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        checks.in_range("seed", self.seed, 0, limits.SEED_MAX)
        checks.at_most("logit_bias", self.logit_bias, limits.LOGIT_BIAS_ENTRIES_MAX)
        for token, bias in self.logit_bias:
            checks.in_range("logit_bias token", token, 0, 2**31 - 1)
            checks.in_range("logit_bias", bias, -limits.LOGIT_BIAS_ABS_MAX, limits.LOGIT_BIAS_ABS_MAX)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """``messages`` (chat, rendered by the model's template) or ``prompt`` (completion, taken as it is); never both.

    ``resume`` holds, as little-endian int32, the tokens of this answer that were already delivered: the engine takes them as its own
    and goes on behind them; text for them is not sent again. ``top_logprobs`` is -1 where no logprobs are wanted.

    Where there are ``tools``, the answer's text is written as protocol.tool_calls says. ``tool``: the one that must be called, with
    ``tool_choice`` named. Without ``parallel_calls`` the answer ends behind its first call.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str = ""
    max_tokens: int = limits.COMPLETION_TOKENS_DEFAULT
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    top_logprobs: int = -1
    output_format: OutputFormat = OutputFormat.TEXT
    schema: str = ""
    echo: bool = False
    resume: bytes = b""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool: str = ""
    parallel_calls: bool = True

    def __post_init__(self) -> None:
        checks.at_most("messages", self.messages, limits.MESSAGES_MAX)
        if bool(self.messages) and bool(self.prompt):
            raise ValueError("messages and prompt exclude each other")
        if len(self.prompt) > limits.MESSAGE_CHARS_MAX:
            raise ValueError(f"the prompt has {len(self.prompt)} characters; the limit is {limits.MESSAGE_CHARS_MAX}")
        checks.utf8("the prompt", self.prompt, limits.JOB_INPUT_BYTES_MAX)
        checks.in_range("max_tokens", self.max_tokens, 1, limits.COMPLETION_TOKENS_MAX)
        checks.at_most("stop", self.stop, limits.STOP_STRINGS_MAX)
        for text in self.stop:
            if not 0 < len(text) <= limits.STOP_STRING_CHARS_MAX:
                raise ValueError(f"a stop string has 1 to {limits.STOP_STRING_CHARS_MAX} characters")
            checks.utf8("a stop string", text, limits.STOP_STRING_CHARS_MAX * 4)
        checks.in_range("top_logprobs", self.top_logprobs, -1, limits.TOP_LOGPROBS_MAX)
        if (self.output_format is OutputFormat.JSON_SCHEMA) != bool(self.schema):
            raise ValueError("a schema comes with output_format json_schema, and only with it")
        checks.utf8("the schema", self.schema, limits.SCHEMA_BYTES_MAX)
        if len(self.resume) % 4 or len(self.resume) // 4 >= self.max_tokens + 1:
            raise ValueError("resume holds whole int32 tokens, at most max_tokens of them")
        self._check_tools()

    def _check_tools(self) -> None:
        checks.at_most("tools", self.tools, limits.TOOLS_MAX)
        names = {tool.name for tool in self.tools}
        if len(names) != len(self.tools):
            raise ValueError("tools name something twice")
        if sum(tool.chars for tool in self.tools) > limits.TOOLS_BYTES_MAX:
            raise ValueError(f"the tools are over {limits.TOOLS_BYTES_MAX} characters")
        if not self.tools and (self.tool_choice is not ToolChoice.AUTO or self.tool):
            raise ValueError("a tool can only be chosen where there are some")
        if (self.tool_choice is ToolChoice.NAMED) != bool(self.tool) or (self.tool and self.tool not in names):
            raise ValueError("the tool that must be called is one of the tools")
        if self.tools and (not self.messages or self.output_format is not OutputFormat.TEXT):
            raise ValueError("tools come with messages, and not with an output format")

    @property
    def input_chars(self) -> int:
        """Characters of prompt or messages, and of the tools, which become part of the prompt."""
        return len(self.prompt) + sum(message.chars for message in self.messages) + sum(tool.chars for tool in self.tools)


GENERATION: Struct[GenerationRequest] = Struct(GenerationRequest, limits.JOB_INPUT_BYTES_MAX)


def pack_tokens(tokens: list[int] | tuple[int, ...]) -> bytes:
    """Token ids as little-endian int32, 4 bytes each."""
    packed = array("i", tokens)
    if packed.itemsize != 4:
        raise AssertionError("this platform has no 4-byte int")
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes | memoryview) -> list[int]:
    """Raises ValueError when the bytes are no whole number of int32."""
    if len(data) % 4:
        raise ValueError("tokens are 4 bytes each")
    packed = array("i")
    packed.frombytes(bytes(data))
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tolist()


_BIG_ENDIAN = array("H", [1]).tobytes() == b"\0\1"
