"""OpenAI's own client against the Coordinator, and every byte of a stream checked against OpenAI's own types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol import limits
from protocol.errors import Code, Refused
from protocol.generation import OutputFormat, Role
from tests.coordinator.clients import HELLO, http, lines_of, with_openai
from tests.coordinator.fakes import FakeIsland, Running, Script, coordinator, island

TEXT = "one two three four five"


def logprobs(words: list[str]) -> bytes:
    entries = [
        {
            "token": word,
            "logprob": -0.5,
            "bytes": list(word.encode()),
            "top_logprobs": [
                {"token": word, "logprob": -0.5, "bytes": None},
                {"token": "x", "logprob": -2, "bytes": [120]},
            ],
        }
        for word in words
    ]
    return json.dumps(entries).encode()


def check_whole(body: bytes) -> ChatCompletion:
    """OpenAI's types, strictly, but for ``metadata``: there it is what a client stored (strings only), here what we say of the job."""
    return ChatCompletion.model_validate({**json.loads(body), "metadata": None}, strict=True)


def check_completion_chunk(data: str) -> Completion:
    """As above; OpenAI sends a null finish_reason on all chunks but the last, which its own type forgot."""
    body = json.loads(data)
    for choice in body["choices"]:
        assert choice["finish_reason"] in (None, "stop")
        choice["finish_reason"] = "stop"
    return Completion.model_validate(body, strict=True)


async def events(
    running: Running, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> tuple[httpx.Response, list[str]]:
    async with http(running) as client, client.stream("POST", path, json={**body, "stream": True}) as response:
        return response, [data async for data in lines_of(response)]


@pytest.mark.parametrize("prefix", ["v1", "api/v1"])
async def test_the_client_gets_an_answer(tmp_path: Path, prefix: str) -> None:
    async with coordinator(tmp_path, island()) as running:
        answer = await with_openai(running, lambda c: c.chat.completions.create(**HELLO), prefix=prefix)
    assert answer.choices[0].message.content == TEXT and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 5, 10)
    assert answer.system_fingerprint == "echo-1" and answer._request_id


async def test_the_client_streams_an_answer(tmp_path: Path) -> None:
    def work(client: openai.OpenAI) -> list[ChatCompletionChunk]:
        return list(client.chat.completions.create(**HELLO, stream=True, stream_options={"include_usage": True}))

    async with coordinator(tmp_path, island(1, Script(token_s=0.002))) as running:
        chunks = await with_openai(running, work)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5


async def test_the_whole_object_is_openais(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json=HELLO)
    body = response.json()
    check_whole(response.content)
    choice = body["choices"][0]
    assert choice["logprobs"] is None and choice["message"]["refusal"] is None
    assert body["metadata"] == {
        "job_id": response.headers["x-archipelag-job"],
        "price": "0.001",
        "cache_hit": False,
        "cache_strategy": None,
    }
    assert response.headers["x-archipelag-island"] == response.headers["x-archipelag-route"] == island().peer
    assert response.headers["x-request-id"] and "place;dur=" in response.headers["server-timing"]


@pytest.mark.parametrize("include_usage", [True, False, None])
async def test_every_chunk_is_openais(tmp_path: Path, include_usage: bool | None) -> None:
    options = {} if include_usage is None else {"stream_options": {"include_usage": include_usage}}
    async with coordinator(tmp_path, island(1, Script(token_s=0.001))) as running:
        response, data = await events(running, {**HELLO, **options})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-archipelag-island"] == island().peer
    assert response.headers["x-request-id"] and response.headers["x-archipelag-job"]
    assert data[-1] == "[DONE]"
    raw = [json.loads(entry) for entry in data[:-1]]
    chunks = [ChatCompletionChunk.model_validate_json(entry, strict=True) for entry in data[:-1]]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    last = chunks[-2] if include_usage else chunks[-1]
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * (chunks.index(last)) + ["stop"]
    assert all(choice["logprobs"] is None for entry in raw for choice in entry["choices"])
    if include_usage:
        assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 10
        assert all(entry["usage"] is None for entry in raw[:-1])
    else:
        assert all("usage" not in entry for entry in raw)
    assert raw[-1]["metadata"]["job_id"] == response.headers["x-archipelag-job"]
    assert all("metadata" not in entry for entry in raw[:-1])


async def test_choices_are_merged_into_one_stream(tmp_path: Path) -> None:
    one = island(1, Script(token_s=0.001))
    async with coordinator(tmp_path, one) as running:
        _, data = await events(running, {**HELLO, "n": 3, "seed": 41, "stream_options": {"include_usage": True}})
    chunks = [ChatCompletionChunk.model_validate_json(entry, strict=True) for entry in data[:-1]]
    texts = {0: "", 1: "", 2: ""}
    roles: list[int] = []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == dict.fromkeys(range(3), TEXT) and sorted(roles) == [0, 1, 2]
    assert sorted(request.sampling.seed for request in one.requests) == [41, 42, 43]
    usage = chunks[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (5, 15)
    assert json.loads(data[-2])["metadata"]["price"] == "0.003"


async def test_choices_of_a_whole_answer(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running, http(running) as client:
        body = (await client.post("/v1/chat/completions", json={**HELLO, "n": 2})).json()
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [(0, TEXT), (1, TEXT)]
    assert body["usage"]["completion_tokens"] == 10 and body["usage"]["prompt_tokens"] == 5


async def test_logprobs_of_chat(tmp_path: Path) -> None:
    wanted = {**HELLO, "logprobs": True, "top_logprobs": 2}
    async with coordinator(tmp_path, island(1, Script(logprobs=logprobs))) as running:
        _, data = await events(running, wanted)
        async with http(running) as client:
            whole = check_whole((await client.post("/v1/chat/completions", json=wanted)).content)
    streamed = [
        entry
        for chunk in (ChatCompletionChunk.model_validate_json(entry, strict=True) for entry in data[:-1])
        for entry in ((chunk.choices[0].logprobs.content or []) if chunk.choices[0].logprobs else [])
    ]
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content is not None
    for entries in (streamed, whole.choices[0].logprobs.content):
        assert "".join(entry.token for entry in entries) == TEXT
        assert entries[0].logprob == -0.5 and entries[0].bytes == list(b"one") and len(entries[0].top_logprobs) == 2


async def test_completions_whole_and_streamed(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"model": "echo", "prompt": TEXT}
    async with coordinator(tmp_path, island()) as running:
        whole = await with_openai(running, lambda c: c.completions.create(**wanted))
        _, data = await events(running, {**wanted, "stream_options": {"include_usage": True}}, "/v1/completions")
    assert whole.choices[0].text == TEXT and whole.object == "text_completion"
    chunks = [check_completion_chunk(entry) for entry in data[:-1]]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT
    assert [json.loads(entry)["choices"][0]["finish_reason"] for entry in data[:-2]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and data[-1] == "[DONE]"


async def test_completions_of_many_prompts_with_echo(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"model": "echo", "prompt": ["a b", "c"], "n": 2, "echo": True}
    async with coordinator(tmp_path, island()) as running:
        whole = await with_openai(running, lambda c: c.completions.create(**wanted))
        _, data = await events(running, wanted, "/v1/completions")
    assert [(choice.index, choice.text) for choice in whole.choices] == [
        (0, "a ba b"),
        (1, "a ba b"),
        (2, "cc"),
        (3, "cc"),
    ]
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 6)
    texts = dict.fromkeys(range(4), "")
    for entry in data[:-1]:
        for choice in json.loads(entry)["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "a ba b", 1: "a ba b", 2: "cc", 3: "cc"}


async def test_logprobs_of_completions_have_their_own_shape(tmp_path: Path) -> None:
    wanted = {"model": "echo", "prompt": TEXT, "logprobs": 2}
    async with coordinator(tmp_path, island(1, Script(logprobs=logprobs, token_s=0.001))) as running:
        async with http(running) as client:
            whole = Completion.model_validate_json((await client.post("/v1/completions", json=wanted)).content)
        _, data = await events(running, wanted, "/v1/completions")
    shown = whole.choices[0].logprobs
    assert shown is not None and shown.tokens is not None and shown.text_offset == [0, 3, 7, 13, 18]
    assert shown.token_logprobs == [-0.5] * 5 and shown.top_logprobs is not None
    assert shown.top_logprobs[0] == {"one": -0.5, "x": -2.0}
    offsets = [
        offset
        for entry in data[:-1]
        for choice in json.loads(entry)["choices"]
        for offset in (choice["logprobs"] or {"text_offset": []})["text_offset"]
    ]
    assert offsets == shown.text_offset


async def test_models(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island(1), island(2, name="org/other")) as running:
        found = await with_openai(running, lambda c: list(c.models.list()))
        one = await with_openai(running, lambda c: c.models.retrieve("org/other"))
        async with http(running) as client:
            missing = await client.get("/v1/models/none")
            raw = (await client.get("/api/v1/models")).json()
    assert [model.id for model in found] == ["echo", "org/other"] and one.owned_by == "archipelag"
    assert all(Model.model_validate(model, strict=True) for model in raw["data"]) and raw["object"] == "list"
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


async def test_every_parameter_reaches_the_island(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    body = {
        "model": "echo",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
            },
            {"role": "assistant", "content": None},
            {"role": "user", "content": "x"},
        ],
        "max_tokens": 7,
        "max_completion_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": -2,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.1,
        "logit_bias": {"50": -100, "7": 3.5},
        "seed": 12,
        "stop": ["a", "b"],
        "logprobs": True,
        "top_logprobs": 4,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x-1", "strict": True, "schema": schema}},
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "unknown_extra": 1,
    }
    one = island()
    async with coordinator(tmp_path, one) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (request,) = one.requests
    assert [(m.role, m.content, m.name) for m in request.messages] == [
        (Role.SYSTEM, "be brief", ""),
        (Role.USER, "one\ntwo", "ann"),
        (Role.ASSISTANT, "", ""),
        (Role.USER, "x", ""),
    ]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 3, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-2.0, 2.0, 1.1)
    assert sampling.logit_bias == ((7, 3.5), (50, -100.0)) and sampling.seed == 12
    assert (request.max_tokens, request.stop, request.top_logprobs) == (9, ("a", "b"), 4)
    assert request.output_format is OutputFormat.JSON_SCHEMA and json.loads(request.schema) == schema


async def test_defaults_are_filled_in_and_seeds_drawn(tmp_path: Path) -> None:
    one = island()
    async with coordinator(tmp_path, one) as running, http(running) as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=HELLO)
    sampling = one.requests[0].sampling
    assert sampling.temperature == limits.TEMPERATURE_DEFAULT and sampling.top_p == 1.0
    assert one.requests[0].max_tokens == limits.COMPLETION_TOKENS_DEFAULT
    assert one.requests[0].sampling.seed != one.requests[1].sampling.seed


async def test_length_is_told(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        answer = await with_openai(running, lambda c: c.chat.completions.create(**HELLO, max_tokens=2))
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == "one two"


async def test_an_island_that_dies_is_not_noticed(tmp_path: Path) -> None:
    islands = island(1, Script(fail_after=2), tokens_per_s=9.0), island(2, tokens_per_s=1.0)
    async with coordinator(tmp_path, *islands) as running:
        response, data = await events(running, HELLO)
        counts = running.server.statistics()
    text = "".join(c["delta"].get("content", "") for entry in data[:-1] for c in json.loads(entry)["choices"])
    assert text == TEXT and data[-1] == "[DONE]" and counts["takeovers_mid_stream"] == 1
    metadata = json.loads(data[-2])["metadata"]
    assert metadata["islands"] == [islands[0].peer, islands[1].peer] and "spliced_engines" not in metadata
    assert response.headers["x-archipelag-island"] == islands[0].peer


async def test_a_splice_between_engines_is_told(tmp_path: Path) -> None:
    islands = island(1, Script(fail_after=2), tokens_per_s=9.0), island(2, engine="echo-2", tokens_per_s=1.0)
    async with coordinator(tmp_path, *islands) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json=HELLO)
    assert response.json()["metadata"]["spliced_engines"] == ["echo-1", "echo-2"]
    assert response.headers["x-archipelag-island"] == islands[1].peer


async def test_an_error_in_the_stream_is_clear(tmp_path: Path) -> None:
    def work(client: openai.OpenAI) -> str:
        text = ""
        with pytest.raises(openai.APIError) as raised:
            for chunk in client.chat.completions.create(**HELLO, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert raised.value.code == "link_lost" and "2 workers" in raised.value.message
        return text

    def pool() -> list[FakeIsland]:
        dying = [island(number, Script(fail_after=number, token_s=0.002), tokens_per_s=9.0 - number) for number in (1, 2)]
        return [*dying, island(3, tokens_per_s=0.1)]

    async with coordinator(tmp_path / "first", *pool()) as running:
        assert await with_openai(running, work) == "one two three"
    async with coordinator(tmp_path / "second", *pool()) as running:  # the first one has the two cool down
        _, data = await events(running, HELLO)
    error = json.loads(data[-1])["error"]
    assert set(error) == {"message", "type", "param", "code"} and "[DONE]" not in data


@pytest.mark.parametrize(
    ("refused", "status", "code"),
    [
        (Refused(Code.BAD_INPUT, "this is no schema"), 400, "invalid_value"),
        (Refused(Code.CONTEXT_LENGTH, "too long"), 400, "context_length_exceeded"),
        (Refused(Code.INTERNAL, "x"), 500, "internal_error"),
        (Refused(Code.NO_CAPACITY, "full"), 503, "no_capacity"),
        (Refused(Code.DRAINING, "x"), 503, "no_island"),
        (Refused(Code.WORKER_DIED, "x"), 503, "no_island"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_early_errors_have_a_status_also_in_streams(
    tmp_path: Path, refused: Refused, status: int, code: str, stream: bool
) -> None:
    one = island(1, Script(refuse=refused))
    async with coordinator(tmp_path, one, capacity_wait_s=0.3, island_wait_s=0.1) as running, http(running) as client:
        response = await client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
    assert response.status_code == status and response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    assert ("retry-after" in response.headers) == (status == 503)
    assert response.headers["x-request-id"]
