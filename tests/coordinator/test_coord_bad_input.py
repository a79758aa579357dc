"""Bad input: the right status, OpenAI's envelope, the parameter at fault, and the same connection answers the next request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio

from coordinator.keys import create_key
from protocol import limits
from tests.coordinator.clients import HELLO
from tests.coordinator.fakes import Running, coordinator, island

USER = {"role": "user", "content": "x"}


def chat(**changes: Any) -> dict[str, Any]:
    return {**HELLO, **changes}


def schema(**changes: Any) -> dict[str, Any]:
    inner = {"name": "a", "schema": {"type": "object"}, **changes}
    return chat(response_format={"type": "json_schema", "json_schema": inner})


def tool(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


def call(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", **changes}}


def calls(made: Any, role: str = "assistant") -> dict[str, Any]:
    return chat(messages=[{"role": role, "content": "x", "tool_calls": made}])


DEEP = "[" * 100_000 + "]" * 100_000

# name -> body, status, param
CHAT: dict[str, tuple[Any, int, str | None]] = {
    "no JSON": (b"{not json", 400, None),
    "nothing": (b"", 400, None),
    "half a JSON": (b'{"model": "echo", "messages": [', 400, None),
    "no UTF-8": (b'{"model": "\xff"}', 400, None),
    "an array": (b"[]", 400, None),
    "a number": (b"3", 400, None),
    "NaN": (b'{"model": "echo", "temperature": NaN}', 400, None),
    "nested without end": (DEEP.encode(), 400, None),
    "a number of 5,000 digits": (b'{"model": "echo", "max_tokens": %b}' % (b"9" * 5000), 400, None),
    "no model": ({"messages": [USER]}, 400, "model"),
    "model is a number": (chat(model=3), 400, "model"),
    "model is empty": (chat(model=""), 400, "model"),
    "unknown model": (chat(model="no-such-model"), 404, "model"),
    "no messages": ({"model": "echo"}, 400, "messages"),
    "empty messages": (chat(messages=[]), 400, "messages"),
    "messages is text": (chat(messages="x"), 400, "messages"),
    "129 messages": (chat(messages=[USER] * 129), 400, "messages"),
    "33,000 characters": (chat(messages=[{"role": "user", "content": "x" * 33_000}]), 400, "messages[0].content"),
    "33,000 in parts": (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 16_500}] * 2}]),
        400,
        "messages[0].content",
    ),
    "a message is text": (chat(messages=["x"]), 400, "messages[0]"),
    "no role": (chat(messages=[{"content": "x"}]), 400, "messages[0].role"),
    "unknown role": (chat(messages=[USER, {"role": "wizard", "content": "x"}]), 400, "messages[1].role"),
    "role is an array": (chat(messages=[{"role": ["user"], "content": "x"}]), 400, "messages[0].role"),
    "no content": (chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
    "content is a number": (chat(messages=[{"role": "user", "content": 1}]), 400, "messages[0].content"),
    "content is an object": (chat(messages=[{"role": "user", "content": {}}]), 400, "messages[0].content"),
    "no parts": (chat(messages=[{"role": "user", "content": []}]), 400, "messages[0].content"),
    "half a surrogate pair": (
        b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "messages[0].content",
    ),
    "an image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400,
        "messages[0].content[0].type",
    ),
    "an empty call": (calls([{}]), 400, "messages[0].tool_calls[0].function"),
    "calls are an object": (calls({"id": "1"}), 400, "messages[0].tool_calls"),
    "129 calls": (calls([call()] * 129), 400, "messages[0].tool_calls"),
    "arguments are an object": (calls([call(arguments={})]), 400, "messages[0].tool_calls[0].function.arguments"),
    "half a pair in arguments": (
        json.dumps(calls([call(arguments="\ud800")])).encode(),
        400,
        "messages[0].tool_calls[0].function.arguments",
    ),
    "arguments and content over the limit": (calls([call(arguments="x" * 32_767)]), 400, "messages[0].tool_calls"),
    "a user's call": (calls([call()], role="user"), 400, "messages[0].tool_calls"),
    "a call's long id": (calls([{**call(), "id": "x" * 129}]), 400, "messages[0].tool_calls[0].id"),
    "a result's id is a number": (chat(messages=[{"role": "tool", "content": "x", "tool_call_id": 1}]), 400, "messages[0].tool_call_id"),
    "tools are an object": (chat(tools={"type": "function"}), 400, "tools"),
    "a tool is a text": (chat(tools=["f"]), 400, "tools[0]"),
    "a tool without a function": (chat(tools=[{"type": "function"}]), 400, "tools[0].function"),
    "a tool of another type": (chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), 400, "tools[0].type"),
    "a tool without a name": (chat(tools=[tool(name=None)]), 400, "tools[0].function.name"),
    "a tool's name has a space": (chat(tools=[tool(name="two words")]), 400, "tools[0].function.name"),
    "parameters are a text": (chat(tools=[tool(parameters="{}")]), 400, "tools[0].function.parameters"),
    "parameters over 64 KiB": (chat(tools=[tool(parameters={"description": "x" * 65_536})]), 400, "tools[0].function.parameters"),
    "a description is a number": (chat(tools=[tool(description=1)]), 400, "tools[0].function.description"),
    "strict is a text": (chat(tools=[tool(strict="yes")]), 400, "tools[0].function.strict"),
    "129 tools": (chat(tools=[tool(name=f"t{n}") for n in range(129)]), 400, "tools"),
    "tools of one name": (chat(tools=[tool(), tool()]), 400, "tools"),
    "tools over 256 KiB": (chat(tools=[tool(name=f"t{n}", description="x" * 30_000) for n in range(9)]), 400, "tools"),
    "functions": (chat(functions=[{"name": "f"}]), 400, "functions"),
    "function_call": (chat(function_call={"name": "f"}), 400, "function_call"),
    "tool_choice required": (chat(tool_choice="required"), 400, "tool_choice"),
    "tool_choice of no tool": (chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}), 400, "tool_choice"),
    "tool_choice of another type": (chat(tools=[tool()], tool_choice={"type": "allowed_tools"}), 400, "tool_choice.type"),
    "tool_choice unknown": (chat(tools=[tool()], tool_choice="sometimes"), 400, "tool_choice"),
    "tool_choice is a list": (chat(tools=[tool()], tool_choice=["auto"]), 400, "tool_choice"),
    "parallel_tool_calls is a number": (chat(tools=[tool()], parallel_tool_calls=1), 400, "parallel_tool_calls"),
    "tools and a format": (chat(tools=[tool()], response_format={"type": "json_object"}), 400, "response_format"),
    "audio": (chat(modalities=["text", "audio"]), 400, "modalities"),
    "max_tokens 0": (chat(max_tokens=0), 400, "max_tokens"),
    "max_tokens -1": (chat(max_tokens=-1), 400, "max_tokens"),
    "max_tokens 4097": (chat(max_tokens=4097), 400, "max_tokens"),
    "max_tokens 10^30": (chat(max_tokens=10**30), 400, "max_tokens"),
    "max_tokens 1.5": (chat(max_tokens=1.5), 400, "max_tokens"),
    "max_tokens text": (chat(max_tokens="5"), 400, "max_tokens"),
    "max_tokens true": (chat(max_tokens=True), 400, "max_tokens"),
    "max_completion_tokens -1": (chat(max_completion_tokens=-1), 400, "max_completion_tokens"),
    "temperature -0.1": (chat(temperature=-0.1), 400, "temperature"),
    "temperature 2.1": (chat(temperature=2.1), 400, "temperature"),
    "temperature 1e999": (
        b'{"model":"echo","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        400,
        "temperature",
    ),
    "temperature 10^400": (chat(temperature=10**400), 400, "temperature"),
    "temperature true": (chat(temperature=True), 400, "temperature"),
    "temperature text": (chat(temperature="hot"), 400, "temperature"),
    "top_p 1.1": (chat(top_p=1.1), 400, "top_p"),
    "top_k -1": (chat(top_k=-1), 400, "top_k"),
    "min_p 2": (chat(min_p=2), 400, "min_p"),
    "presence_penalty 3": (chat(presence_penalty=3), 400, "presence_penalty"),
    "frequency_penalty -3": (chat(frequency_penalty=-3), 400, "frequency_penalty"),
    "repetition_penalty 0": (chat(repetition_penalty=0), 400, "repetition_penalty"),
    "logit_bias is an array": (chat(logit_bias=[1]), 400, "logit_bias"),
    "logit_bias of a word": (chat(logit_bias={"cat": 1}), 400, "logit_bias"),
    "logit_bias of -1": (chat(logit_bias={"-1": 1}), 400, "logit_bias"),
    "logit_bias 101": (chat(logit_bias={"5": 101}), 400, "logit_bias"),
    "logit_bias of many": (chat(logit_bias={str(i): 1 for i in range(1025)}), 400, "logit_bias"),
    "seed 2^63": (chat(seed=2**63), 400, "seed"),
    "seed 0.5": (chat(seed=0.5), 400, "seed"),
    "five stops": (chat(stop=list("abcde")), 400, "stop"),
    "an empty stop": (chat(stop=""), 400, "stop"),
    "stop is a number": (chat(stop=3), 400, "stop"),
    "a stop of 257": (chat(stop="x" * 257), 400, "stop"),
    "logprobs is a number": (chat(logprobs=1), 400, "logprobs"),
    "top_logprobs alone": (chat(top_logprobs=1), 400, "top_logprobs"),
    "top_logprobs 21": (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "n 0": (chat(n=0), 400, "n"),
    "n 17": (chat(n=17), 400, "n"),
    "n 10^9": (chat(n=10**9), 400, "n"),
    "stream text": (chat(stream="yes"), 400, "stream"),
    "stream_options alone": (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    "include_usage 1": (chat(stream=True, stream_options={"include_usage": 1}), 400, "stream_options.include_usage"),
    "response_format text": (chat(response_format="json"), 400, "response_format"),
    "response_format unknown": (chat(response_format={"type": "xml"}), 400, "response_format.type"),
    "no schema": (chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema"),
    "a schema that is text": (schema(schema="string"), 400, "response_format.json_schema.schema"),
    "a schema that is an array": (schema(schema=[1]), 400, "response_format.json_schema.schema"),
    "a schema over 64 KB": (schema(schema={"enum": ["x" * 70_000]}), 400, "response_format.json_schema.schema"),
    "a schema without name": (schema(name=None), 400, "response_format.json_schema.name"),
    "a schema with a bad name": (schema(name="a b"), 400, "response_format.json_schema.name"),
    "strict is text": (schema(strict="yes"), 400, "response_format.json_schema.strict"),
    "a body over 1 MB": (chat(user="x" * 1_000_001), 413, None),
}

COMPLETION: dict[str, tuple[Any, int, str | None]] = {
    "no prompt": ({"model": "echo"}, 400, "prompt"),
    "empty array": ({"model": "echo", "prompt": []}, 400, "prompt"),
    "tokens": ({"model": "echo", "prompt": [1, 2, 3]}, 400, "prompt"),
    "arrays of tokens": ({"model": "echo", "prompt": [[1, 2], [3]]}, 400, "prompt"),
    "a prompt is an object": ({"model": "echo", "prompt": {}}, 400, "prompt"),
    "one of them is no text": ({"model": "echo", "prompt": ["a", None]}, 400, "prompt[1]"),
    "33,000 characters": ({"model": "echo", "prompt": "x" * 33_000}, 400, "prompt"),
    "65 prompts": ({"model": "echo", "prompt": ["a"] * 65}, 400, "prompt"),
    "5 x 16": ({"model": "echo", "prompt": ["a"] * 5, "n": 16}, 400, "prompt"),
    "suffix": ({"model": "echo", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    "best_of": ({"model": "echo", "prompt": "a", "best_of": 3}, 400, "best_of"),
    "logprobs 6": ({"model": "echo", "prompt": "a", "logprobs": 6}, 400, "logprobs"),
    "logprobs true": ({"model": "echo", "prompt": "a", "logprobs": True}, 400, "logprobs"),
    "echo and logprobs": ({"model": "echo", "prompt": "a", "logprobs": 1, "echo": True}, 400, "logprobs"),
    "echo is a number": ({"model": "echo", "prompt": "a", "echo": 1}, 400, "echo"),
}


class Wire:
    """One connection, kept: whatever is answered, the next request has to work on it."""

    def __init__(self, stream: trio.SocketStream, key: str) -> None:
        self._stream, self.key = stream, key
        self._http = h11.Connection(h11.CLIENT)

    async def send(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        plain = {
            "Host": "x",
            "Content-Length": str(len(body)),
            "Authorization": f"Bearer {self.key}",
            **(headers or {}),
        }
        request = h11.Request(method=method, target=path, headers=[(k, v) for k, v in plain.items() if v])
        for event in (request, h11.Data(body), h11.EndOfMessage()):
            data = self._http.send(event)
            if data:
                await self._stream.send_all(data)
        status, found, answer = 0, {}, b""
        while True:
            got = self._http.next_event()
            if got is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(65536))
            elif isinstance(got, h11.Response):
                status, found = got.status_code, {k.decode(): v.decode() for k, v in got.headers}
            elif isinstance(got, h11.Data):
                answer += bytes(got.data)
            elif isinstance(got, h11.EndOfMessage):
                break
        self._http.start_next_cycle()
        return status, found, answer


@asynccontextmanager
async def wire(running: Running, key: str | None = None) -> AsyncIterator[Wire]:
    host, port = running.url.removeprefix("http://").split(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        yield Wire(stream, running.key if key is None else key)


def check_envelope(headers: dict[str, str], body: bytes) -> dict[str, Any]:
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    answer = json.loads(body)
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = answer["error"]
    assert error["message"] and error["type"] and error["code"]
    return error


async def check_alive(connection: Wire) -> None:
    status, _, body = await connection.send("POST", "/v1/chat/completions", json.dumps(HELLO).encode())
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "one two three four five"


async def check_table(tmp_path: Path, path: str, table: dict[str, tuple[Any, int, str | None]]) -> None:
    """All rows over one connection, with a good request after each."""
    wrong: list[str] = []
    async with coordinator(tmp_path, island()) as running, wire(running) as connection:
        for name, (body, status, param) in table.items():
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            got, headers, answer = await connection.send("POST", path, raw)
            error = check_envelope(headers, answer)
            if (got, error["param"]) != (status, param):
                wrong.append(f"{name}: {got} {error}")
            await check_alive(connection)
        assert running.server.statistics()["running"] == 0
    assert not wrong, "\n".join(wrong)


async def test_chat(tmp_path: Path) -> None:
    await check_table(tmp_path, "/v1/chat/completions", CHAT)


async def test_completions(tmp_path: Path) -> None:
    await check_table(tmp_path, "/v1/completions", COMPLETION)


async def test_the_limits_themselves_are_allowed(tmp_path: Path) -> None:
    most = chat(
        messages=[{"role": "user", "content": "x" * limits.MESSAGE_CHARS_MAX}] + [USER] * (limits.MESSAGES_MAX - 1),
        max_tokens=limits.COMPLETION_TOKENS_MAX,
        temperature=2,
        top_p=1,
        stop=["a"] * limits.STOP_STRINGS_MAX,
        seed=-(2**63),
        n=limits.CHOICES_MAX,
    )
    async with coordinator(tmp_path, island()) as running, wire(running) as connection:
        status, _, body = await connection.send("POST", "/v1/chat/completions", json.dumps(most).encode())
    assert status == 200, body


async def test_an_operator_may_raise_the_body_limit(tmp_path: Path) -> None:
    body = json.dumps(chat(user="x" * 1_100_000)).encode()
    async with coordinator(tmp_path, island(), body_bytes_max=2_000_000) as running, wire(running) as connection:
        status, _, answer = await connection.send("POST", "/v1/chat/completions", body)
    assert status == 200, answer


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/%00", 404, "model_not_found"),
    ],
)
async def test_wrong_addresses(tmp_path: Path, method: str, path: str, status: int, code: str) -> None:
    async with coordinator(tmp_path, island()) as running, wire(running) as connection:
        got, headers, body = await connection.send(method, path)
        assert (got, check_envelope(headers, body)["code"]) == (status, code)
        await check_alive(connection)


async def test_a_body_that_is_not_what_its_headers_say(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running, wire(running) as connection:
        got, headers, body = await connection.send(
            "POST", "/v1/chat/completions", b"abc", {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        )
        assert (got, check_envelope(headers, body)["code"]) == (400, "invalid_body")


async def test_keys(tmp_path: Path) -> None:
    """Missing, malformed, wrong, read-only: told apart, in the envelope, on a connection that lives on."""
    body = json.dumps(HELLO).encode()
    async with coordinator(tmp_path, island(), login_tries_per_minute=100) as running, wire(running) as connection:
        read_only = create_key(running.database_url, scopes=["read"])
        write_only = create_key(running.database_url, scopes=["write"])
        cases = [
            ("", 401, "invalid_api_key"),
            ("Bearer", 401, "invalid_api_key"),
            ("Bearer x", 401, "invalid_api_key"),
            ("Bearer ak_" + "A" * 43, 401, "invalid_api_key"),
            (f"Basic {running.key}", 401, "invalid_api_key"),
            (f"Bearer {running.key}x", 401, "invalid_api_key"),
            (f"Bearer {read_only}", 403, "insufficient_scope"),
        ]
        for header, status, code in cases:
            got, headers, answer = await connection.send(
                "POST", "/v1/chat/completions", body, {"Authorization": header}
            )
            assert (got, check_envelope(headers, answer)["code"]) == (status, code), header
            await check_alive(connection)
        for key, path, status in ((read_only, "/v1/models", 200), (write_only, "/v1/models", 403)):
            got, _, _ = await connection.send("GET", path, headers={"Authorization": f"Bearer {key}"})
            assert got == status
        got, _, _ = await connection.send(
            "POST", "/v1/chat/completions", body, {"Authorization": f"bearer {write_only}"}
        )
        assert got == 200


async def test_a_key_is_checked_before_the_body(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running, wire(running, "none") as connection:
        status, headers, body = await connection.send("POST", "/v1/chat/completions", b"{" * 900_000)
        assert status == 401 and check_envelope(headers, body)
        connection.key = running.key
        await check_alive(connection)
