"""``/v1/embeddings``: by hand and by OpenAI's own client, over Cargos that give vectors, something else, or an error."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse

from coordinator.books.jobs import JobState
from coordinator.http.embeddings import TEXTS_MAX, shortest, vectors_json
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask, format_credits
from tests.coordinator.clients import http, with_openai
from tests.coordinator.desks import CREDIT, error_of, funds, opened, rows, url_of
from tests.coordinator.fake_lines import DONE, ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Running, coordinator, island

ALL = 10_000 * CREDIT
ASK = Ask(per_job=700)
MODEL = "vectors"
PATH = "/v1/embeddings"
VECTORS = np.array([[0.1, -0.25, 1 / 3], [1.5e-7, 0, -1]], np.float32)
BODY: dict[str, Any] = {"model": MODEL, "input": ["one", "two"]}


def done(rows: Any, prompt_tokens: int = 7) -> LineScript:
    """A Cargo whose result has these rows of ``embeddings``."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
    fields = {"type": "done", "usage": usage, "embeddings": rows, "dimensions": 3, "task": "embeddings"}
    return LineScript((json.dumps(fields).encode() + b"\n",))


def packed(vectors: Any) -> list[str]:
    return [base64.b64encode(np.asarray(row, "<f4").tobytes()).decode() for row in vectors]


GOOD = done(packed(VECTORS))


def maker(script: LineScript = GOOD, number: int = 1, **changes: Any) -> FakeIsland:
    one = island(number, name=MODEL, runtime="onnx", engine=ENGINE, ask=ASK, **changes)
    one.lines = FakeLines([script])
    return one


async def post(running: Running, headers: dict[str, str] | None = None, path: str = PATH, **changes: Any) -> httpx.Response:
    async with http(running) as client:
        return await client.post(path, json={**BODY, **changes}, headers=headers)


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=["plain", "float", "base64"])
async def test_openais_client_gets_the_vectors(tmp_path: Path, encoding: dict[str, Any]) -> None:
    async with coordinator(tmp_path, maker()) as running:
        answer = await with_openai(running, lambda c: c.embeddings.create(model=MODEL, input=["one", "two"], **encoding))
    assert [entry.index for entry in answer.data] == [0, 1] and answer.model == MODEL
    found = [entry.embedding for entry in answer.data]
    if encoding.get("encoding_format") == "base64":  # who asks for it himself gets it as it is
        assert [str(vector) for vector in found] == packed(VECTORS)
    else:
        assert (np.array(found, np.float32) == VECTORS).all()
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 7)


async def test_an_answer_and_what_the_books_say_of_it(database_url: str) -> None:
    one = maker()
    async with opened(database_url, one) as running:
        answer = await post(running, dimensions=3, user="somebody", explain=True)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        CreateEmbeddingResponse.model_validate(body, strict=True)
        assert [entry["embedding"] for entry in body["data"]] == [[0.1, -0.25, 0.33333334], [1.5e-07, 0, -1]]
        (job,) = await rows(running)
        assert (job.kind, job.cargo, job.state, job.price_micros) == ("embedding", MODEL, JobState.SUCCEEDED, ASK.per_job)
        assert await funds(running) == (ALL - ASK.per_job, 0)
        placement = body["metadata"].pop("placement")
        assert placement["island"] == one.peer == answer.headers["x-archipelag-island"] == answer.headers["x-archipelag-route"]
        price = format_credits(ASK.per_job)
        assert body["metadata"] == {"job_id": job.id, "price": price, "cache_hit": False, "cache_strategy": None}
        assert answer.headers["x-archipelag-job"] == job.id and "run;dur=" in answer.headers["server-timing"]
        assert one.lines is not None
        (asked,) = one.lines.requests
        assert json.loads(asked.data) == {"input": ["one", "two"], "encoding_format": "base64", "dimensions": 3}


async def test_one_text_is_a_list_of_one_and_floats_of_a_cargo_will_do(tmp_path: Path) -> None:
    async with coordinator(tmp_path, one := maker(done([[0.5, 1, -2]]))) as running:
        answer = await post(running, path="/api/v1/embeddings", input="one")
    assert answer.json()["data"] == [{"object": "embedding", "index": 0, "embedding": [0.5, 1, -2]}]
    assert one.lines is not None and json.loads(one.lines.requests[0].data)["input"] == ["one"]


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "order-1"}, {"x-stainless-retry-count": "1"}], ids=["key", "retry"])
async def test_a_request_that_comes_again_is_answered_from_what_was_kept(database_url: str, headers: dict[str, str]) -> None:
    one = maker()
    async with opened(database_url, one) as running:
        first = await post(running, headers if "Idempotency-Key" in headers else None)
        second = await post(running, headers)
        assert first.status_code == 200 and first.content == second.content
        assert "x-archipelag-replayed" not in first.headers and second.headers["x-archipelag-replayed"] == "true"
        assert one.lines is not None and len(one.lines.requests) == 1 and await funds(running) == (ALL - ASK.per_job, 0)


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no model": ({"model": None}, "model"),
    "model is a list": ({"model": ["vectors"]}, "model"),
    "no input": ({"input": None}, "input"),
    "input is a number": ({"input": 3}, "input"),
    "no texts": ({"input": []}, "input"),
    "too many texts": ({"input": ["x"] * (TEXTS_MAX + 1)}, "input"),
    "tokens": ({"input": [1, 2, 3]}, "input"),
    "lists of tokens": ({"input": [[1, 2], [3]]}, "input"),
    "an empty text": ({"input": ""}, "input"),
    "an empty text among others": ({"input": ["x", " "]}, "input[1]"),
    "an object among texts": ({"input": ["x", {}]}, "input[1]"),
    "half a surrogate pair": ({"input": "\ud800"}, "input"),
    "unknown encoding": ({"encoding_format": "int8"}, "encoding_format"),
    "encoding is a list": ({"encoding_format": ["float"]}, "encoding_format"),
    "no dimensions": ({"dimensions": 0}, "dimensions"),
    "half dimensions": ({"dimensions": 1.5}, "dimensions"),
    "bid": ({"bid_price": "much"}, "bid_price"),
    "policy": ({"policy": "mars"}, "policy"),
    "priority": ({"priority": 101}, "priority"),
}


@pytest.mark.parametrize(("changes", "param"), BAD.values(), ids=BAD)
async def test_bad_requests(tmp_path: Path, changes: dict[str, Any], param: str | None) -> None:
    async with opened(url_of(tmp_path), one := maker()) as running, http(running) as client:
        answer = await client.post(PATH, content=json.dumps({**BODY, **changes}))
        error = error_of(answer, 400, answer.json()["error"]["code"], param)
        assert "tokens" not in str(changes) or "send the texts" in error["message"]
        assert one.lines is not None and not one.lines.requests and await rows(running) == []


async def test_a_body_over_a_megabyte_and_no_key(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), maker()) as running:
        error_of(await post(running, input="x" * limits.BODY_BYTES_MAX), 413, "body_too_large")
        async with http(running, "") as client:
            error_of(await client.post(PATH, json=BODY), 401, "invalid_api_key")


def lines(text: bytes) -> LineScript:
    return LineScript((text,))


@pytest.mark.parametrize(
    ("script", "status", "code", "words"),
    [
        (LineScript((DONE,), fail_after=0, failure=Code.BAD_INPUT, fails=9), 400, "invalid_value", "as the script says"),
        (lines(b'{"type":"error","message":"no such thing"}\n'), 422, "cargo_failed", "no such thing"),
        (lines(DONE), 400, "invalid_value", "makes no embeddings"),
        (done("many"), 400, "invalid_value", "makes no embeddings"),
        (done([]), 422, "cargo_failed", "0 vectors for 2 texts"),
        (done(packed(VECTORS[:1])), 422, "cargo_failed", "1 vectors for 2 texts"),
        (done([*packed(VECTORS[:1]), *packed([[1.0]])]), 422, "cargo_failed", "not of one length"),
        (done(["AAA=", "AAA="]), 422, "cargo_failed", "are none"),
        (done(["?", "?"]), 422, "cargo_failed", "are none"),
        (done([3, 4]), 422, "cargo_failed", "are none"),
        (done([[True], ["x"]]), 422, "cargo_failed", "are none"),
        (done([[1e300], [1]]), 422, "cargo_failed", "not finite"),
        (done(packed([[np.nan], [1]])), 422, "cargo_failed", "not finite"),
        (done(["", ""]), 422, "cargo_failed", "vectors"),
    ],
)
async def test_what_gives_no_vectors_costs_nothing(tmp_path: Path, script: LineScript, status: int, code: str, words: str) -> None:
    async with opened(url_of(tmp_path), maker(script)) as running:
        assert words in error_of(await post(running), status, code)["message"]
        (job,) = await rows(running)
        assert job.state is JobState.FAILED and await funds(running) == (ALL, 0)


async def test_nobody_there(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), one := maker(), island_wait_s=0.01, capacity_wait_s=0.01) as running:
        error_of(await post(running, model="nobody-has-it"), 404, "model_not_found", "model")
        error_of(await post(running, model="no name\n"), 404, "model_not_found", "model")
        assert (await post(running)).status_code == 200
        running.port.lose(one)
        error_of(await post(running), 503, "no_island")
        error = await with_openai(running, _refused)
        assert error.status_code == 503


def _refused(client: openai.OpenAI) -> openai.APIStatusError:
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=MODEL, input="one")
    return caught.value


async def test_terms_are_those_of_a_chat(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), maker(), island_wait_s=0.01) as running:
        error_of(await post(running, bid_price="0.0001"), 402, "bid_too_low", "bid_price")
        error_of(await post(running, bid_price="20000"), 402, "insufficient_credits")
        error_of(await post(running, policy="eu"), 503, "no_island")
        async with http(running) as client:
            quote = (await client.post("/api/v1/quotes", json=BODY)).json()
        assert (await post(running, quote=quote["id"], priority=3)).status_code == 200
        job = (await rows(running))[0]
        assert (job.quote_id, job.priority, job.price_micros) == (quote["id"], 3, ASK.per_job)


async def test_the_largest_request_comes_through(tmp_path: Path) -> None:
    """2,048 vectors of 384 numbers are 4 MB in the Cargo's line and 10 MB in the answer; writing them takes 0.3 s."""
    vectors = np.random.default_rng(3).standard_normal((TEXTS_MAX, 384)).astype(np.float32)
    async with opened(url_of(tmp_path), maker(done(packed(vectors)))) as running:
        answer = await post(running, input=["x"] * TEXTS_MAX)
        assert answer.status_code == 200, answer.text
        found = np.array([entry["embedding"] for entry in answer.json()["data"]]).astype(np.float32)
        assert (found == vectors).all()


async def test_where_no_lines_can_be_run_it_says_so(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), maker()) as running:
        object.__setattr__(running.server._services, "lines", None)
        assert "Coordinator" in error_of(await post(running), 404, "not_found")["message"]


def test_numbers_have_the_fewest_digits_that_read_back() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    whole = np.arange(16_777_200, 16_777_232, dtype=np.float32)
    # of the last four a shorter decimal lies just in the middle between two floats
    some = np.array([0, 0.1, -7, 3e38, 2.4788479e11, 1.3879999e10, -1.6190399e10, -4.0647678e11], np.float32)
    for numbers in (bits[np.isfinite(bits)], rng.standard_normal(20_000).astype(np.float32), whole, some):
        (written,) = vectors_json(numbers.reshape(1, -1), is_base64=False)
        assert (np.array(json.loads(written), np.float64).astype(np.float32) == numbers).all()
    usual = rng.standard_normal(2000).astype(np.float32)
    (written,) = vectors_json(usual.reshape(1, -1), is_base64=False)
    assert [float(text) for text in written[1:-1].split(",")] == [float(np.format_float_scientific(x, unique=True)) for x in usual]
    assert shortest(np.array([[0.1]], np.float32)).tolist() == [[0.1]]
