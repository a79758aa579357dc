"""From a file of inputs to the JSONL of a batch. A file is OpenAI's own JSONL, or has one input a line: a text, or a JSON object. Pure;
lines are taken as they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from protocol import limits
from protocol.errors import ConfigError

CHAT, COMPLETIONS, EMBEDDINGS, JOBS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/v1/jobs"
ENDPOINTS = {"chat": CHAT, "completions": COMPLETIONS, "embeddings": EMBEDDINGS, "jobs": JOBS}


class Form(StrEnum):
    """What stands in the lines of a file."""

    REQUESTS = "requests"  # OpenAI's: {custom_id, method, url, body}
    OBJECTS = "objects"
    TEXTS = "texts"


@dataclass(frozen=True, slots=True)
class Plan:
    """How lines become requests. ``fields``: more of each body, as the user gave them."""

    form: Form
    endpoint: str
    cargo: str
    fields: Mapping[str, Any]


def plan(name: str, first: str, cargo: str, endpoint: str, fields: Mapping[str, Any]) -> Plan:
    """By the file's name and its first line that is not blank. ``endpoint``: of ENDPOINTS, or empty where the lines are to say it. Raises
    ConfigError."""
    value = None if name.endswith(".txt") else _object(first)
    if value is None and name.endswith((".jsonl", ".ndjson", ".json")):
        raise ConfigError(f"{name}: its first line is no JSON object; a file of plain prompts is called .txt")
    if value is not None and "body" in value:
        said = value.get("url")
        return Plan(Form.REQUESTS, endpoint or (said if isinstance(said, str) else CHAT), cargo, fields)
    if not cargo:
        raise ConfigError("name what is to run: --cargo NAME; see archipelag-node cargo list --coordinator URL")
    if value is None:
        return Plan(Form.TEXTS, endpoint or CHAT, cargo, fields)
    guessed = CHAT if "messages" in value else COMPLETIONS if "prompt" in value else JOBS
    return Plan(Form.OBJECTS, endpoint or guessed, cargo, fields)


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def requests(lines: Iterable[str], how: Plan) -> Iterator[bytes]:
    """A line of JSONL for each line that is not blank. What is wrong with one the Coordinator says, by its line; so blank ones stay."""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        made = _request(text, number, how) if text.strip() else ""
        yield made.encode("utf-8", "surrogatepass") + b"\n"


def _request(line: str, number: int, how: Plan) -> str:
    if how.form is Form.TEXTS:
        return _line(f"line-{number}", how, _of_text(line, how))
    value = _object(line)
    if value is None:
        return line
    if how.form is Form.OBJECTS:
        custom_id = value.pop("custom_id", None) if how.endpoint != JOBS else None
        return _line(custom_id if isinstance(custom_id, str) else f"line-{number}", how, _of_object(value, how))
    if not (how.cargo or how.fields) or not isinstance(value.get("body"), dict):
        return line
    name = "cargo" if how.endpoint == JOBS else "model"
    named = {name: how.cargo} if how.cargo and not value["body"].get(name) else {}
    return _compact({**value, "body": {**value["body"], **named, **how.fields}})


def _of_text(text: str, how: Plan) -> dict[str, Any]:
    made: dict[str, Callable[[], dict[str, Any]]] = {
        CHAT: lambda: {"messages": [{"role": "user", "content": text}]},
        COMPLETIONS: lambda: {"prompt": text},
        EMBEDDINGS: lambda: {"input": text},
        JOBS: lambda: {"prompt": text},
    }
    return _of_object(made[how.endpoint](), how)


def _of_object(value: dict[str, Any], how: Plan) -> dict[str, Any]:
    if how.endpoint == JOBS:
        return {"cargo": how.cargo, "input": value, **how.fields}
    return {"model": how.cargo, **value, **how.fields}


def _line(custom_id: str, how: Plan, body: Mapping[str, Any]) -> str:
    return _compact({"custom_id": custom_id, "method": "POST", "url": how.endpoint, "body": body})


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def check_size(lines: int, size: int) -> None:
    """What a Coordinator would refuse is said before anything is sent. Raises ConfigError."""
    if not lines:
        raise ConfigError("the file has no lines")
    if lines > limits.FILE_LINES_MAX:
        most = limits.FILE_LINES_MAX
        raise ConfigError(f"the file has {lines:,} lines, a batch at most {most:,}: cut it with split -l {most} FILE")
    if size > limits.FILE_BYTES_MAX:
        raise ConfigError(f"the requests have {size:,} bytes, a file {limits.FILE_BYTES_MAX:,}: cut it with split -l N FILE")


def parse_field(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``; a VALUE that is no JSON is a text. Raises ValueError."""
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise ValueError(f"{text[:40]!r} is not NAME=VALUE, such as max_tokens=64")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
