"""OpenAI's request bodies, checked field by field, turned into what Islands are asked to do.

Every complaint names its parameter. Parameters that do not change the answer are accepted and ignored; those that would change its
meaning and that we cannot honour are refused (``unsupported_parameter``), so that nobody believes that they were honoured.
Names that OpenAI does not know are ignored, since many clients send extras.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from coordinator.http import tools
from coordinator.http.errors import bad_request, unsupported
from coordinator.http.fields import Fields, number_of, text_of, wrong_type
from protocol import limits
from protocol.generation import ChatMessage, GenerationRequest, OutputFormat, Role, Sampling
from protocol.prices import WrittenNumber

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,  # OpenAI's newer name for it
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
_NO_TOOLS = (None, "none", "auto")  # a function_call that asks for nothing
_SCHEMA_NAME_CHARS_MAX = 64
_LOGPROBS_COMPLETIONS_MAX = 5  # OpenAI's limit for /v1/completions
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A request that passed all checks. ``choices`` are complete; ``echoes``: the text to put before each (completions with echo)."""

    model: str
    choices: tuple[GenerationRequest, ...]
    stream: bool
    include_usage: bool
    logprobs: bool
    echoes: tuple[str, ...] = ()


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; its numbers know how they were written, for those that are prices. Raises ApiError 400 for anything
    else, NaN and Infinity included."""
    try:
        value = json.loads(body, parse_float=WrittenNumber, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError | _Constant) else "it is not valid"
        raise bad_request(f"the body could not be read as JSON: {reason}", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", None, "invalid_type")
    return value


class _Constant(ValueError):
    """NaN, Infinity or -Infinity stands in a body."""


def _no_constant(name: str) -> NoReturn:
    raise _Constant(f"{name} is no number of JSON")


def parse_chat(body: Mapping[str, Any], seed: int) -> ApiRequest:
    """``POST /v1/chat/completions``. ``seed`` is used where the client gave none. Raises ApiError 400."""
    fields = Fields(body)
    model = fields.text("model", limits.NAME_CHARS_MAX, required=True)
    _refuse_unsupported(body)
    logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, limits.TOP_LOGPROBS_MAX)
    if top is not None and not logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    output_format, schema = _response_format(fields.get("response_format"))
    tool_fields = tools.tools_of(fields)
    if tool_fields and output_format is not OutputFormat.TEXT:
        raise unsupported("response_format", "together with tools is not supported here; leave one of them out")
    base = GenerationRequest(
        messages=_messages(fields.get("messages")),
        max_tokens=_max_tokens(fields, "max_completion_tokens", "max_tokens"),
        sampling=_sampling(fields, seed),
        stop=_stop(fields.get("stop")),
        top_logprobs=(top or 0) if logprobs else -1,
        output_format=output_format,
        schema=schema,
        **tool_fields,
    )
    n = fields.integer("n", 1, limits.CHOICES_MAX) or 1
    stream, include_usage = _stream(fields)
    return ApiRequest(model, _choices([base], n), stream, include_usage, logprobs)


def parse_completion(body: Mapping[str, Any], seed: int) -> ApiRequest:
    """``POST /v1/completions``. Raises ApiError 400."""
    fields = Fields(body)
    model = fields.text("model", limits.NAME_CHARS_MAX, required=True)
    if fields.get("suffix"):
        raise unsupported("suffix")
    prompts = _prompts(fields.get("prompt"))
    n = fields.integer("n", 1, limits.CHOICES_MAX) or 1
    best_of = fields.integer("best_of", 1, limits.CHOICES_MAX)
    if best_of is not None and best_of != n:
        raise unsupported("best_of", "other than n is not supported here")
    if len(prompts) * n > limits.COMPLETION_CHOICES_MAX:
        raise bad_request(f"prompts x n may be at most {limits.COMPLETION_CHOICES_MAX}", "prompt")
    top = fields.integer("logprobs", 0, _LOGPROBS_COMPLETIONS_MAX)
    echo = fields.flag("echo")
    if echo and top is not None:
        raise unsupported("logprobs", "together with echo is not supported here")
    sampling, stop = _sampling(fields, seed), _stop(fields.get("stop"))
    max_tokens = _max_tokens(fields, "max_tokens")
    output_format, schema = _response_format(fields.get("response_format"))
    bases = [
        GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            top_logprobs=-1 if top is None else top,
            output_format=output_format,
            schema=schema,
        )
        for prompt in prompts
    ]
    stream, include_usage = _stream(fields)
    echoes = tuple(prompt for prompt in prompts for _ in range(n)) if echo else ()
    return ApiRequest(model, _choices(bases, n), stream, include_usage, top is not None, echoes)


def _choices(bases: list[GenerationRequest], n: int) -> tuple[GenerationRequest, ...]:
    """n of each, with seeds that follow one another, so that they differ and can be had again."""
    if n == 1 and len(bases) == 1:
        return (bases[0],)
    found = []
    for base in bases:
        for offset in range(n):
            seed = (base.sampling.seed + offset) & limits.SEED_MAX
            found.append(replace(base, sampling=replace(base.sampling, seed=seed)))
    return tuple(found)


def _messages(value: object) -> tuple[ChatMessage, ...]:
    if value is None:
        raise bad_request("you must provide messages", "messages", "missing_required_parameter")
    if not isinstance(value, list):
        raise wrong_type("messages", "an array", value)
    if not value:
        raise bad_request("messages must hold at least one message", "messages", "empty_array")
    if len(value) > limits.MESSAGES_MAX:
        text = f"there are {len(value)} messages; the limit is {limits.MESSAGES_MAX}"
        raise bad_request(text, "messages", "array_above_max_length")
    return tuple(_message(entry, f"messages[{index}]") for index, entry in enumerate(value))


def _message(value: object, where: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    role = value.get("role")
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise bad_request(f"{where}.role must be one of {', '.join(_ROLES)}", f"{where}.role")
    for field in ("function_call", "audio"):
        if value.get(field):
            raise unsupported(f"{where}.{field}")
    name = value.get("name")
    checked = "" if name is None else text_of(name, f"{where}.name", limits.NAME_CHARS_MAX)
    content = _content(value.get("content"), known, f"{where}.content")
    calls = tools.calls_of(value.get("tool_calls"), f"{where}.tool_calls", limits.MESSAGE_CHARS_MAX - len(content))
    if calls and known is not Role.ASSISTANT:
        raise bad_request(f"{where}.tool_calls: only an assistant calls tools", f"{where}.tool_calls")
    answers = tools.call_id(value, "tool_call_id", where) if known is Role.TOOL else ""
    return ChatMessage(known, content, checked, calls, answers)


def _content(value: object, role: Role, where: str) -> str:
    if value is None and role is Role.ASSISTANT:
        return ""
    if not isinstance(value, list):
        return text_of(value, where, limits.MESSAGE_CHARS_MAX)
    if not value:
        raise bad_request(f"{where} must hold at least one part", where, "empty_array")
    texts = [_part(part, f"{where}[{index}]") for index, part in enumerate(value)]
    return text_of("\n".join(texts), where, limits.MESSAGE_CHARS_MAX)


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    kind = value.get("type")
    if kind == "text" or kind == "refusal":
        return text_of(value.get(kind), f"{where}.{kind}", limits.MESSAGE_CHARS_MAX)
    if isinstance(kind, str) and kind:
        raise unsupported(f"{where}.type", f"{kind[:40]!r} is not supported here; this model reads text")
    raise bad_request(f"{where}.type must be 'text'", f"{where}.type")


def _prompts(value: object) -> list[str]:
    if value is None:
        raise bad_request("you must provide prompt", "prompt", "missing_required_parameter")
    if isinstance(value, str):
        return [_prompt(value, "prompt")]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string or an array of strings", value)
    if not value:
        raise bad_request("prompt must hold at least one prompt", "prompt", "empty_array")
    if any(type(entry) in (int, list) for entry in value):
        raise unsupported("prompt", "as arrays of tokens is not supported here; send text")
    if len(value) > limits.COMPLETION_CHOICES_MAX:
        text = f"there are {len(value)} prompts; the limit is {limits.COMPLETION_CHOICES_MAX}"
        raise bad_request(text, "prompt", "array_above_max_length")
    return [_prompt(entry, f"prompt[{index}]") for index, entry in enumerate(value)]


def _prompt(value: object, where: str) -> str:
    return text_of(value, where, limits.MESSAGE_CHARS_MAX)


def _max_tokens(fields: Fields, *names: str) -> int:
    """The first that is given; all are checked."""
    given = [fields.integer(name, 1, limits.COMPLETION_TOKENS_MAX) for name in names]
    return next((value for value in given if value is not None), limits.COMPLETION_TOKENS_DEFAULT)


def _sampling(fields: Fields, seed: int) -> Sampling:
    given_seed = fields.integer("seed", -_INT64, _INT64 - 1)
    penalty = limits.PENALTY_ABS_MAX
    return Sampling(
        temperature=fields.number("temperature", 0, limits.TEMPERATURE_MAX, limits.TEMPERATURE_DEFAULT),
        top_p=fields.number("top_p", 0, 1, 1.0),
        top_k=fields.integer("top_k", 0, 1_000_000) or 0,
        min_p=fields.number("min_p", 0, 1, 0.0),
        presence_penalty=fields.number("presence_penalty", -penalty, penalty, 0.0),
        frequency_penalty=fields.number("frequency_penalty", -penalty, penalty, 0.0),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 10, 1.0),
        logit_bias=_logit_bias(fields.get("logit_bias")),
        # OpenAI's seeds are signed, ours are not; the mask keeps different ones different but for the sign
        seed=(seed if given_seed is None else given_seed) & limits.SEED_MAX,
    )


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise wrong_type("logit_bias", "an object", value)
    if len(value) > limits.LOGIT_BIAS_ENTRIES_MAX:
        raise bad_request(f"logit_bias may have at most {limits.LOGIT_BIAS_ENTRIES_MAX} entries", "logit_bias")
    found: dict[int, float] = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < 2**31):
            raise bad_request("the keys of logit_bias are token ids", "logit_bias")
        found[int(token)] = number_of(bias, "logit_bias", -limits.LOGIT_BIAS_ABS_MAX, limits.LOGIT_BIAS_ABS_MAX)
    return tuple(sorted(found.items()))


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    entries = value if isinstance(value, list) else [value]
    if len(entries) > limits.STOP_STRINGS_MAX:
        raise bad_request(f"stop may hold at most {limits.STOP_STRINGS_MAX} strings", "stop", "array_above_max_length")
    texts = [text_of(entry, "stop", limits.STOP_STRING_CHARS_MAX) for entry in entries]
    if not all(texts):
        raise bad_request("a stop string must not be empty", "stop")
    return tuple(texts)


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.get("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object", options)
    if not stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    include = options.get("include_usage")
    if include is not None and type(include) is not bool:
        raise wrong_type("stream_options.include_usage", "a boolean", include)
    return stream, bool(include)


def _response_format(value: object) -> tuple[OutputFormat, str]:
    if value is None:
        return OutputFormat.TEXT, ""
    if not isinstance(value, dict):
        raise wrong_type("response_format", "an object", value)
    kind = value.get("type")
    if kind == "text":
        return OutputFormat.TEXT, ""
    if kind == "json_object":
        return OutputFormat.JSON_OBJECT, ""
    if kind != "json_schema":
        raise bad_request("response_format.type must be text, json_object or json_schema", "response_format.type")
    return OutputFormat.JSON_SCHEMA, _schema(value.get("json_schema"), "response_format.json_schema")


def _schema(value: object, where: str) -> str:
    """The schema as text. Whether it is a schema that can be followed is for the Island's grammar compiler to say."""
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise bad_request(f"{where}.name must be a string", f"{where}.name", "missing_required_parameter")
    if (
        len(name) > _SCHEMA_NAME_CHARS_MAX
        or not name.replace("-", "_").replace("_", "a").isalnum()
        or not name.isascii()
    ):
        raise bad_request(
            f"{where}.name may hold letters, digits, _ and -, at most {_SCHEMA_NAME_CHARS_MAX}", f"{where}.name"
        )
    strict = value.get("strict")
    if strict is not None and type(strict) is not bool:
        raise wrong_type(f"{where}.strict", "a boolean", strict)
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise bad_request(
            f"{where}.schema must be a JSON schema, which is an object", f"{where}.schema", "invalid_type"
        )
    text = json.dumps(schema, separators=(",", ":"))
    if len(text) > limits.SCHEMA_BYTES_MAX:
        raise bad_request(f"{where}.schema is over {limits.SCHEMA_BYTES_MAX} bytes", f"{where}.schema")
    return text


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    if body.get("functions"):
        raise unsupported("functions", "is not supported here; use tools")
    if body.get("function_call") not in _NO_TOOLS:
        raise unsupported("function_call", "is not supported here; use tool_choice")
    for name in ("audio", "web_search_options"):
        if body.get(name):
            raise unsupported(name)
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise unsupported("modalities", "other than text is not supported here")
