"""Hits over HTTP: what is told, what it costs, what is kept and what is not, and how it is deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import trio
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from coordinator.cache.policy import CacheConfig
from coordinator.keys import create_key
from protocol.errors import Code
from protocol.prices import Ask
from tests.coordinator.cache_net import CACHE, ask, body, cache_of, cached, said, stats, strategy
from tests.coordinator.clients import HELLO, http, lines_of, with_openai
from tests.coordinator.desks import (
    CHAT,
    JOBS,
    chunks_of,
    ended,
    error_of,
    funds,
    get,
    opened,
    row,
    rows,
    text_of,
    until,
    url_of,
)
from tests.coordinator.fake_lines import ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Script, island

QUESTION = "How do I reset my password?"
VECTORS = np.array([[0.5, -0.25], [1, 0]], np.float32)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    return url_of(tmp_path)


async def test_a_hit_beside_a_miss(books_url: str) -> None:
    one = island()
    async with cached(books_url, one) as running:
        first = await ask(running, QUESTION)
        before = await funds(running)
        again = await ask(running, "how do I  reset my password?")
        assert strategy(first) is None and strategy(again) == "exact"
        assert said(first) == said(again) == QUESTION and len(one.requests) == 1
        ChatCompletion.model_validate({**again.json(), "metadata": None}, strict=True)  # ours is not all strings
        old, new = first.json(), again.json()
        assert old["usage"] == new["usage"] and old["system_fingerprint"] == new["system_fingerprint"]
        assert (old["metadata"]["price"], new["metadata"]["price"]) == ("0.001", "0")
        assert new["metadata"]["job_id"] == old["metadata"]["job_id"] == again.headers["x-archipelag-job"]
        assert again.headers["x-archipelag-island"] == again.headers["x-archipelag-route"] == ""
        assert first.headers["x-archipelag-island"] == one.peer
        assert first.headers["x-archipelag-cache-key"] == again.headers["x-archipelag-cache-key"] == new["metadata"]["cache_key"]
        assert again.headers["age"] == "0" and "age" not in first.headers
        assert await funds(running) == before and len(await rows(running)) == 1
        found = await stats(running)
        assert (found["hits"], found["misses"], found["size"], found["hit_rate_percent"]) == (1, 1, 1, 50.0)
        assert found["own"] == 1 and found["cargos"]["echo"]["hits_exact"] == 1


async def events(response: httpx.Response) -> list[str]:
    return [line async for line in lines_of(response)]


async def stream(running: Any, **changes: Any) -> tuple[httpx.Response, list[str]]:
    async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True, **changes)) as response:
        return response, await events(response)


@pytest.mark.parametrize("was_streamed", [True, False])
async def test_a_stream_is_told_again_as_a_stream(books_url: str, was_streamed: bool) -> None:
    one = island(1, Script(token_s=0.001))
    async with cached(books_url, one) as running:
        await (stream(running) if was_streamed else ask(running, QUESTION))
        response, data = await stream(running, stream_options={"include_usage": True})
        assert response.headers["x-archipelag-cache"] == "hit" and response.headers["x-archipelag-cache-strategy"] == "exact"
        assert data[-1] == "[DONE]" and len(one.requests) == 1
        chunks = [ChatCompletionChunk.model_validate_json(entry, strict=True) for entry in data[:-1]]
        assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == QUESTION
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
        last = json.loads(data[-2])
        assert last["usage"]["total_tokens"] == 12 and last["metadata"]["cache_strategy"] == "exact"
        assert last["metadata"]["cache_hit"] and last["metadata"]["price"] == "0"


async def test_with_openais_client(books_url: str) -> None:
    one = island()

    def work(client: openai.OpenAI) -> tuple[str, str]:
        whole = client.chat.completions.create(**HELLO)
        chunks = list(client.chat.completions.create(**HELLO, stream=True))
        return whole.choices[0].message.content or "", "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async with cached(books_url, one) as running:
        first, second = await with_openai(running, work)
        assert first == second == "one two three four five" and len(one.requests) == 1


async def test_completions_and_echo(books_url: str) -> None:
    one = island()
    async with cached(books_url, one) as running, http(running) as client:
        wanted = {"model": "echo", "prompt": "one two", "temperature": 0}
        answers = [await client.post("/v1/completions", json=wanted | more) for more in ({}, {}, {"echo": True}, {"prompt": ["one two"]})]
        assert [answer.json()["metadata"]["cache_strategy"] for answer in answers] == [None, "exact", "exact", "exact"]
        assert [answer.json()["choices"][0]["text"] for answer in answers] == ["one two"] * 2 + ["one twoone two", "one two"]
        many = await client.post("/v1/completions", json=wanted | {"n": 2})
        assert many.headers["x-archipelag-cache"] == "bypass" and len(one.requests) == 3


@pytest.mark.parametrize(
    ("header", "states", "jobs"),
    [
        ("no-cache", ["bypass", "hit"], 2),  # the new answer takes the old one's place
        ("no-store", ["bypass", "hit"], 2),
        ("private", ["hit", "hit"], 1),
        ("max-age=0", ["hit", "hit"], 1),
    ],
)
async def test_what_a_client_says(books_url: str, header: str, states: list[str], jobs: int) -> None:
    one = island()
    async with cached(books_url, one) as running:
        await ask(running, QUESTION)
        answers = [await ask(running, QUESTION, headers={"Cache-Control": header}), await ask(running, QUESTION)]
        assert [answer.headers["x-archipelag-cache"] for answer in answers] == states and len(one.requests) == jobs


async def test_no_store_leaves_nothing_and_no_cache_does(books_url: str) -> None:
    async with cached(books_url, island()) as running:
        told = await ask(running, QUESTION, headers={"Cache-Control": "no-store"})
        assert "x-archipelag-cache-key" not in told.headers and (await stats(running))["size"] == 0
        await ask(running, QUESTION, headers={"Cache-Control": "no-cache"})
        assert (await stats(running))["size"] == 1 and strategy(await ask(running, QUESTION)) == "exact"


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 2}, {"tools": [TOOL]}, {"n": 2}, {"temperature": 1}],
    ids=["cut off", "tools", "two choices", "by chance"],
)
async def test_what_is_not_kept(books_url: str, changes: dict[str, Any]) -> None:
    one = island()
    async with cached(books_url, one) as running:
        for _ in range(2):
            assert strategy(await ask(running, QUESTION, **changes)) is None
        found = await stats(running)
        assert len(one.requests) == 2 * changes.get("n", 1) and found["hits"] == found["size"] == 0
    if "max_tokens" in changes:
        assert cache_of(running).statistics.refused == 2


async def test_an_answer_that_broke_off_is_not_kept(books_url: str) -> None:
    broken = island(1, Script(fail_after=2, failure=Code.BAD_INPUT, times=1))
    async with cached(books_url, broken) as running:
        async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True)) as response:
            chunks = await chunks_of(response)
        assert "error" in chunks[-1] and (await stats(running))["size"] == 0
        assert strategy(await ask(running, QUESTION)) is None and said(await ask(running, QUESTION)) == QUESTION


async def test_a_client_that_leaves_has_nothing_kept(books_url: str) -> None:
    one = island(1, Script(hang_after=2, times=1))
    async with cached(books_url, one) as running:
        async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True)) as response:
            assert [line async for line in _some(response, 2)]
        await until(lambda: one.open_now == 0)
        assert strategy(await ask(running, QUESTION)) is None and said(await ask(running, QUESTION)) == QUESTION


async def _some(response: httpx.Response, count: int) -> Any:
    lines = lines_of(response)
    for _ in range(count):
        yield await anext(lines)


async def test_answers_get_old(books_url: str) -> None:
    one = island()
    async with cached(books_url, one, cache=CacheConfig(ttl_s=60)) as running:
        cache, now_s = cache_of(running), 1000.0
        cache._clock = lambda: now_s
        await ask(running, QUESTION)
        now_s += 59
        hit = await ask(running, QUESTION)
        assert strategy(hit) == "exact" and hit.headers["age"] == "59" and hit.json()["metadata"]["cache_age_s"] == 59.0
        now_s += 1
        assert strategy(await ask(running, QUESTION)) is None and len(one.requests) == 2


async def test_entries_are_bounded(books_url: str) -> None:
    one = island()
    async with cached(books_url, one, cache=CacheConfig(entries_max=2)) as running:
        for text in ("one", "two", "one", "three", "one", "two"):
            await ask(running, text)
        assert [request.messages[-1].content for request in one.requests] == ["one", "two", "three", "two"]
        found = await stats(running)
        assert (found["size"], found["evicted"], found["entries_max"]) == (2, 2, 2)


async def test_accounts_do_not_see_each_others_answers(books_url: str) -> None:
    one, ann = island(), create_key(books_url, "ann")
    async with cached(books_url, one) as running:
        await ask(running, QUESTION)
        assert strategy(await ask(running, QUESTION, key=ann)) is None
        assert strategy(await ask(running, QUESTION, key=ann)) == strategy(await ask(running, QUESTION)) == "exact"
        assert len(one.requests) == 2 and (await stats(running, ann))["own"] == 1


async def test_residency_is_part_of_the_question(books_url: str) -> None:
    async with cached(books_url, island(), island_wait_s=0.01, capacity_wait_s=0.01) as running:
        await ask(running, QUESTION)
        refused = await ask(running, QUESTION, policy="eu")
        assert refused.status_code == 503, refused.text  # what was computed anywhere is no answer to who asks for Europe


# ---- jobs


async def test_a_submitted_job(books_url: str) -> None:
    one = island()
    given = {"cargo": "echo", "input": {"prompt": "one two"}}
    async with cached(books_url, one) as running, http(running) as client:
        first = await client.post(JOBS, json=given)
        assert first.headers["x-archipelag-cache"] == "miss"
        await ended(running, first.json()["id"])
        before = await funds(running)
        second = await client.post(JOBS, json=given)
        assert second.headers["x-archipelag-cache"] == "hit" and second.headers["x-archipelag-cache-strategy"] == "exact"
        shown = second.json()
        assert shown["state"] == "succeeded" and shown["id"] != first.json()["id"] and shown["price"] == "0"
        assert (shown["cache_hit"], shown["cache_strategy"], shown["island"]) == (True, "exact", None)
        output = (await get(running, f"{JOBS}/{shown['id']}/output")).json()
        assert output["output"]["text"] == "one two" and output["completed"]
        async with client.stream("GET", f"{JOBS}/{shown['id']}/stream") as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("event")]
        assert lines == ["event: chunk", "event: complete"]
        assert await funds(running) == before and len(one.requests) == 1
        assert (await row(running, shown["id"])).bid_source == "cache"


async def test_a_streamed_job(books_url: str) -> None:
    one = island()
    given = {"cargo": "echo", "input": {"prompt": "one two"}, "stream": True}
    async with cached(books_url, one) as running, http(running) as client:
        answers = [await client.post(JOBS, json=given) for _ in range(2)]
        assert [answer.headers["x-archipelag-cache"] for answer in answers] == ["miss", "hit"]
        assert answers[0].headers["x-archipelag-job"] == answers[1].headers["x-archipelag-job"]
        names = [line.removeprefix("event: ") for line in answers[1].text.splitlines() if line.startswith("event")]
        assert names == ["cache", "state", "state", "chunk", "complete"]
        cache = json.loads(answers[1].text.splitlines()[1].removeprefix("data: "))
        assert (cache["type"], cache["cache_hit"], cache["cache_strategy"]) == ("cache", True, "exact") and len(one.requests) == 1


async def test_chats_and_jobs_share_answers(books_url: str) -> None:
    one = island()
    async with cached(books_url, one) as running, http(running) as client:
        await ask(running, QUESTION)
        wanted = {key: value for key, value in body(QUESTION).items() if key != "model"}
        job = await client.post(JOBS, json={"cargo": "echo", "input": wanted})
        assert job.json()["cache_hit"] and len(one.requests) == 1


async def test_idempotency_keys_hold_for_hits_too(books_url: str) -> None:
    one, headers = island(), {"Idempotency-Key": "once"}
    async with cached(books_url, one) as running, http(running) as client:
        await ask(running, QUESTION)
        first = await ask(running, QUESTION, headers=headers)
        again = await ask(running, QUESTION, headers=headers)
        assert strategy(first) == "exact" and first.json()["metadata"]["job_id"] == again.json()["metadata"]["job_id"]
        assert again.headers["x-archipelag-replayed"] == "true" and again.headers["x-archipelag-cache"] == "bypass"
        error_of(await ask(running, "Another question", headers=headers), 422, "idempotency_key_reused")
        given, once = {"cargo": "echo", "input": {"prompt": QUESTION, "temperature": 0}}, {"Idempotency-Key": "job"}
        ids = [(await client.post(JOBS, json=given, headers=once)).json()["id"] for _ in range(2)]
        assert ids[0] == ids[1]


async def test_a_retry_is_a_replay_and_no_hit(books_url: str) -> None:
    one = island()
    async with cached(books_url, one) as running:
        first = await ask(running, QUESTION)
        again = await ask(running, QUESTION, headers={"x-stainless-retry-count": "1"})
        assert again.headers["x-archipelag-replayed"] == "true" and again.json()["metadata"]["job_id"] == first.json()["metadata"]["job_id"]
        assert again.json()["metadata"]["price"] == "0.001" and (await stats(running))["hits"] == 0 and len(one.requests) == 1


# ---- Cargos that give lines


def line_island(name: str, lines: tuple[bytes, ...], runtime: str = "onnx") -> FakeIsland:
    one = island(1, name=name, runtime=runtime, engine=ENGINE, ask=Ask(per_job=700))
    one.lines = FakeLines([LineScript(lines)])
    return one


async def test_embeddings(books_url: str) -> None:
    done = {"type": "done", "usage": {"prompt_tokens": 7, "completion_tokens": 0}, "embeddings": VECTORS.tolist()}
    one = line_island("vectors", (json.dumps(done).encode() + b"\n",))
    assert one.lines is not None
    async with cached(books_url, one) as running, http(running) as client:
        wanted = {"model": "vectors", "input": ["One", "two"]}
        answers = [await client.post("/v1/embeddings", json=wanted | more) for more in ({}, {"encoding_format": "base64"}, {})]
        assert [answer.json()["metadata"]["cache_strategy"] for answer in answers] == [None, "exact", "exact"]
        assert answers[0].json()["data"] == answers[2].json()["data"] and answers[2].json()["usage"]["prompt_tokens"] == 7
        assert answers[2].headers["x-archipelag-cache"] == "hit" and answers[2].headers["x-archipelag-island"] == ""
        other = await client.post("/v1/embeddings", json={"model": "vectors", "input": ["one", "two"]})
        assert other.json()["metadata"]["cache_hit"] is False and len(one.lines.requests) == 2


async def test_pictures_only_with_a_seed(books_url: str) -> None:
    picture = b'{"type":"image","data":"aGk=","format":"png","width":1,"height":1}\n'
    one = line_island("shapes", (picture, b'{"type":"done","seeds":[5]}\n'), "diffusers")
    assert one.lines is not None
    async with cached(books_url, one) as running, http(running) as client:
        wanted = {"model": "shapes", "prompt": "a circle"}
        for more, states in (
            ({}, ["bypass", "bypass"]),
            ({"seed": 5}, ["miss", "hit"]),
            ({"seed": 5, "response_format": "url"}, ["bypass", "bypass"]),
        ):
            answers = [await client.post("/v1/images/generations", json=wanted | more) for _ in range(2)]
            assert [answer.headers["x-archipelag-cache"] for answer in answers] == states, answers[0].text
        assert len(one.lines.requests) == 5


async def test_lines_of_which_nobody_has_said_anything_are_not_kept(books_url: str) -> None:
    one = line_island("stats", (b'{"type":"done","answer":42}\n',), "wasm")
    async with cached(books_url, one) as running, http(running) as client:
        for _ in range(2):
            job = await client.post(JOBS, json={"cargo": "stats", "input": {"text": "one"}})
            await ended(running, job.json()["id"])
        assert one.lines is not None and len(one.lines.requests) == 2 and (await stats(running))["size"] == 0


# ---- deleting, and what is shown


async def test_deleting(books_url: str) -> None:
    one, ann = island(), create_key(books_url, "ann")
    async with cached(books_url, one) as running, http(running) as client, http(running, ann) as hers:
        key = (await ask(running, "one")).headers["x-archipelag-cache-key"]
        await ask(running, "two")
        await ask(running, "one", key=ann)
        assert (await client.delete(f"{CACHE}/{key}")).json() == {"deleted": 1}
        assert strategy(await ask(running, "one", key=ann)) == strategy(await ask(running, "two")) == "exact"
        assert strategy(await ask(running, "one")) is None
        assert (await client.delete(CACHE, params={"cargo": "other"})).json() == {"deleted": 0}
        assert (await client.delete(CACHE, params={"cargo": "echo"})).json() == {"deleted": 2}
        assert strategy(await ask(running, "one", key=ann)) == "exact"
        assert (await hers.delete(CACHE)).json() == {"deleted": 1} and (await stats(running))["size"] == 0
        error_of(await client.delete(CACHE, params={"account": "ann"}), 400, "invalid_value", "account")
        error_of(await client.delete(f"{CACHE}/abc"), 404, "not_found")
        assert (await client.delete(f"{CACHE}/{'0' * 64}")).json() == {"deleted": 0}


async def test_keys_and_scopes(books_url: str) -> None:
    read = create_key(books_url, "ann", scopes=("read",))
    async with cached(books_url, island()) as running:
        async with http(running, read) as client:
            assert (await client.get(f"{CACHE}/stats")).status_code == 200
            assert (await client.delete(CACHE)).status_code == 403
        async with http(running, "") as client:
            assert (await client.get(f"{CACHE}/stats")).status_code == (await client.delete(CACHE)).status_code == 401


async def test_health_and_metrics(books_url: str) -> None:
    async with cached(books_url, island()) as running, http(running, "") as client:
        await ask(running, "one secret")
        await ask(running, "one secret")
        health = (await client.get("/health")).json()
        assert health["cache"] == {"enabled": True, "semantic": "no model for embeddings was given"}
        metrics = (await client.get("/metrics")).text
        assert "archipelag_cache_hits_exact 1.0" in metrics and "archipelag_cache_misses 1.0" in metrics and "secret" not in metrics


async def test_without_a_cache(books_url: str) -> None:
    one = island()
    async with opened(books_url, one) as running, http(running, "") as client:
        answers = [await ask(running, QUESTION) for _ in range(2)]
        assert [answer.headers["x-archipelag-cache"] for answer in answers] == ["bypass"] * 2 and len(one.requests) == 2
        assert (await client.get("/health")).json()["cache"]["enabled"] is False
        found = await stats(running)
        assert found["enabled"] is False and found["size"] == 0 and found["semantic"] == "the cache is switched off"


async def test_hits_are_told_while_the_books_are_away(books_url: str) -> None:
    async with cached(books_url, island()) as running:
        await ask(running, QUESTION)
        books = running.server.books
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(books, "do", _never)
            patch.setattr(books, "begin", _never)
            with trio.fail_after(5):
                assert strategy(await ask(running, QUESTION)) == "exact"


def _never(*_arguments: Any) -> Any:
    raise AssertionError("a hit needs no books")


async def test_texts_of_a_stream_are_whole(books_url: str) -> None:
    """A stream that was told in many pieces comes again as the same text."""
    words = tuple(f"word{number} " for number in range(300))
    one = island(1, Script(words=words))
    async with cached(books_url, one) as running:
        for _ in range(2):
            async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True)) as response:
                assert text_of(await chunks_of(response)) == "".join(words)
        assert len(one.requests) == 1
