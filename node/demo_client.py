"""What a demo asks with: one streamed chat completion of the OpenAI API, with the standard library alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPResponse
from typing import Any, TextIO
from urllib.parse import urlsplit

from protocol.errors import ArchipelagError

MODEL = "smollm2-135m"
_SYSTEM = "You are a helpful AI assistant."  # with the template's own system prompt this model does not name Paris
_TIMEOUT_S = 180.0


class DemoFailed(ArchipelagError):
    """The demo's question got no answer."""


def ask_json(url: str, key: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One call of the REST API: GET, or POST where there is a body. Raises DemoFailed for anything but success."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read(1_000_000).decode(errors="replace")
        if response.status not in (200, 201):
            raise DemoFailed(f"the Coordinator answers {response.status} at {path}: {text[:2000]}")
        answer: dict[str, Any] = json.loads(text)
        return answer


def question(prompt: str) -> dict[str, Any]:
    """The body of a greedy chat."""
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "temperature": 0}


def say(out: TextIO, text: str) -> None:
    print(text, file=out, flush=True)


@contextlib.contextmanager
def open_answer(url: str, key: str, prompt: str, **fields: Any) -> Iterator[HTTPResponse]:
    """A greedy answer as it begins; ``fields`` of the request's body. Raises DemoFailed where there is none."""
    body = {**question(prompt), "stream": True, **fields}
    connection = HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise DemoFailed(f"the Coordinator answers {response.status}: {response.read(2000).decode(errors='replace')}")
        yield response


def chunks_of(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Raises DemoFailed for an error in the stream or a stream without end."""
    for raw in response:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                raise DemoFailed(f"the answer broke off: {chunk['error'].get('message')}")
            yield chunk
    raise DemoFailed("the answer ended without [DONE]")


def text_of(chunk: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", []))
