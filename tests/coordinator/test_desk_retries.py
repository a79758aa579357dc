"""A request that comes again is answered and not billed again: by its idempotency key, or as OpenAI's clients try again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgpack
import openai
import pytest
import trio

from coordinator.books.jobs import JobState
from coordinator.books.schema import jobs, requests
from coordinator.keys import create_key
from privacy.sealed_rows import RowSealer, SealBroken
from protocol.errors import Code, Refused
from protocol.prices import Ask
from tests.coordinator.clients import HELLO, http, with_openai
from tests.coordinator.desks import (
    A_JOB,
    CHAT,
    CREDIT,
    JOBS,
    OTHER,
    SALT,
    TEXT,
    chat,
    chunks_of,
    ended,
    error_of,
    funds,
    get,
    opened,
    row,
    rows,
    submit,
    text_of,
    until,
    url_of,
)
from tests.coordinator.fakes import Running, Script, island

ALL = 10_000 * CREDIT
PRICE = 1000  # of every answer here
KEY = {"Idempotency-Key": "order-1"}
AGAIN = {"x-stainless-retry-count": "1"}


def same(first: httpx.Response, second: httpx.Response) -> None:
    """Two answers of one job, but for when they were given."""
    assert first.status_code == second.status_code == 200, second.text
    left, right = first.json(), second.json()
    assert {**left, "created": 0} == {**right, "created": 0}
    assert first.headers["x-archipelag-job"] == second.headers["x-archipelag-job"] == left["metadata"]["job_id"]
    assert "x-archipelag-replayed" not in first.headers and second.headers["x-archipelag-replayed"] == "true"


async def billed_once(running: Running, times: int = 1) -> None:
    paid = [job for job in await rows(running) if job.state is JobState.SUCCEEDED]
    assert len(paid) == times and await funds(running) == (ALL - times * PRICE, 0)


@pytest.mark.parametrize("headers", [KEY, AGAIN], ids=["key", "retry"])
async def test_the_same_request_twice_is_one_job_one_charge_and_one_answer(database_url: str, headers: dict[str, str]) -> None:
    one = island()
    async with opened(database_url, one) as running:
        body = {"temperature": 1.5, "logprobs": True, "explain": True, "n": 2}
        first = await chat(running, KEY if headers is KEY else None, **body)
        same(first, await chat(running, headers, **body))
        assert len(one.requests) == 2, "the choices of one job"
        assert first.json()["metadata"]["placement"]["island"] == one.peer
        assert running.server.statistics()["answers_replayed"] == 1
        assert [job.price_micros for job in await rows(running)] == [2 * PRICE]


async def test_a_stream_is_told_again_as_a_stream(tmp_path: Path) -> None:
    one = island()
    async with opened(url_of(tmp_path), one) as running:
        body = {"stream": True, "stream_options": {"include_usage": True}}
        first, second = [await chunks_of(await chat(running, KEY, **body)) for _ in range(2)]
        assert text_of(first) == text_of(second) == TEXT
        assert first[-1]["usage"] == second[-1]["usage"] and first[-1]["metadata"] == second[-1]["metadata"]
        assert {chunk["id"] for chunk in first} == {chunk["id"] for chunk in second}
        assert len(one.requests) == 1
        await billed_once(running)
        error_of(await chat(running, KEY), 422, "idempotency_key_reused")  # the body says that it is no stream


@pytest.mark.parametrize("path", ["/v1/completions", "/api/v1/completions", "/api/v1/chat/completions"])
async def test_every_endpoint_takes_a_key(tmp_path: Path, path: str) -> None:
    body = HELLO if "chat" in path else {"model": "echo", "prompt": TEXT, "echo": True}
    async with opened(url_of(tmp_path), island()) as running, http(running) as client:
        first, second = [await client.post(path, json=body, headers=KEY) for _ in range(2)]
        same(first, second)
        await billed_once(running)


async def test_a_key_is_for_one_request_of_one_account(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        await chat(running, KEY)
        for other in ({"max_tokens": 9}, {"bid_price": "1"}, {"user": "somebody else"}):
            error_of(await chat(running, KEY, **other), 422, "idempotency_key_reused")
        async with http(running) as client:
            error_of(await client.post(JOBS, json=A_JOB, headers=KEY), 422, "idempotency_key_reused")
        async with http(running, create_key(running.database_url, "other")) as client:
            answer = await client.post(CHAT, json=HELLO, headers=KEY)
        assert "x-archipelag-replayed" not in answer.headers
        await billed_once(running)


@pytest.mark.parametrize("bad", ["x" * 129, "schlüssel", "tab\tkey"])
async def test_a_key_that_is_none(tmp_path: Path, bad: str) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        answer = await chat(running, httpx.Headers({"Idempotency-Key": bad}, encoding="utf-8"))
        assert answer.status_code == 400 and await rows(running) == []
        for good in ("x" * 128, "' OR 1=1; DROP TABLE requests; --", "%s {} \\ /"):
            first = await chat(running, {"Idempotency-Key": good})
            same(first, await chat(running, {"Idempotency-Key": good}))
        await billed_once(running, 3)


async def test_while_the_first_try_of_a_chat_runs_its_key_is_in_use(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    answers: list[httpx.Response] = []
    async with opened(url_of(tmp_path), one) as running:

        async def ask() -> None:
            answers.append(await chat(running, KEY))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: one.open_now == 1)
            for _ in range(3):
                busy = await chat(running, KEY)
                error_of(busy, 409, "idempotency_key_in_use")
                assert busy.headers["retry-after"]
            more.set()
        same(answers[0], await chat(running, KEY))
        await billed_once(running)


async def test_many_at_once_under_one_key_are_one_job(database_url: str) -> None:
    one = island(1, Script(token_s=0.005))
    async with opened(database_url, one) as running, http(running) as client:
        codes: list[int] = []

        async def ask() -> None:
            codes.append((await client.post(CHAT, json=HELLO, headers=KEY)).status_code)

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(ask)
        assert set(codes) == {200, 409} and len(one.requests) == 1
        await billed_once(running)


@pytest.mark.parametrize("headers", [KEY, AGAIN], ids=["key", "retry"])
async def test_what_failed_runs_anew(tmp_path: Path, headers: dict[str, str]) -> None:
    one = island(1, Script(refuse=Refused(Code.BAD_INPUT, "not now"), times=1))
    async with opened(url_of(tmp_path), one) as running:
        assert (await chat(running, KEY if headers is KEY else None)).status_code == 400
        answer = await chat(running, headers)
        assert answer.status_code == 200 and "x-archipelag-replayed" not in answer.headers
        await billed_once(running)
        if headers is KEY:
            same(answer, await chat(running, KEY))
            await billed_once(running)


async def test_a_retry_waits_for_the_first_try(tmp_path: Path) -> None:
    """Its client has lost patience with a proxy, say; the Coordinator still works on it."""
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    answers: list[httpx.Response] = []
    async with opened(url_of(tmp_path), one) as running:

        async def ask(headers: dict[str, str]) -> None:
            answers.append(await chat(running, headers))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, {})
            await until(lambda: one.open_now == 1)
            nursery.start_soon(ask, AGAIN)
            nursery.start_soon(ask, {"x-stainless-retry-count": "2"})
            await trio.sleep(0.1)
            assert not answers and len(one.requests) == 1
            more.set()
        assert len({answer.json()["metadata"]["job_id"] for answer in answers}) == 1
        assert sorted("x-archipelag-replayed" in answer.headers for answer in answers) == [False, True, True]
        await billed_once(running)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_retry_whose_first_try_was_left_runs_anew(tmp_path: Path, stream: bool) -> None:
    one = island(1, Script(hang_after=0, times=1))
    async with opened(url_of(tmp_path), one) as running:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: chat(running, stream=stream))
            await until(lambda: one.open_now == 1)
            nursery.cancel_scope.cancel()
        answer = await chat(running, AGAIN, stream=stream)
        assert answer.status_code == 200 and "x-archipelag-replayed" not in answer.headers
        await billed_once(running)


@pytest.mark.parametrize("count", ["0", "", "-1", "one", "99999", "²"])
async def test_what_is_no_retry_runs(tmp_path: Path, count: str) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        await chat(running)
        await chat(running, httpx.Headers({"x-stainless-retry-count": count}, encoding="utf-8"))
        await billed_once(running, 2)


async def test_openais_own_client_tries_again_and_pays_once(tmp_path: Path) -> None:
    """The answer is lost on its way, as a connection that breaks loses it; the client asks again by itself."""

    def work(client: openai.OpenAI) -> str:
        return client.chat.completions.create(**HELLO).choices[0].message.content or ""

    one = island()
    async with opened(url_of(tmp_path), one) as running:
        lost: list[bool] = []

        class Losing(httpx.HTTPTransport):
            def handle_request(self, request: httpx.Request) -> httpx.Response:
                response = super().handle_request(request)
                if not lost:
                    lost.append(True)
                    response.read()
                    raise httpx.ReadError("the connection broke")
                return response

        assert await with_openai(running, retrying(work), http_client=httpx.Client(transport=Losing())) == TEXT
        assert lost and len(one.requests) == 1
        await billed_once(running)


def retrying(work: Callable[[openai.OpenAI], str]) -> Callable[[openai.OpenAI], str]:
    return lambda client: work(client.with_options(max_retries=2))


async def test_another_coordinator_answers_again_too(database_url: str) -> None:
    one, more = island(1, Script(times=2), Script(hang_after=1, until=trio.Event(), times=1)), trio.Event()
    one.scripts[1].until = more
    async with opened(database_url, one) as first, opened(database_url, one, key=OTHER, api_key=first.key) as second:
        same(await chat(first, KEY), await chat(second, KEY))
        alone = await chat(second, max_tokens=9)
        same(alone, await chat(first, AGAIN, max_tokens=9))
        answers: list[httpx.Response] = []

        async def ask(running: Running, headers: dict[str, str]) -> None:
            answers.append(await chat(running, headers, max_tokens=8))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, first, {})
            await until(lambda: len(one.requests) == 3)

            async def is_written() -> bool:
                return len(await rows(second)) == 3

            await until(is_written)
            nursery.start_soon(ask, second, AGAIN)
            await trio.sleep(0.05)
            more.set()
        same(*sorted(answers, key=lambda answer: "x-archipelag-replayed" in answer.headers))
        await billed_once(second, 3)


async def test_a_key_is_forgotten_after_its_time(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        first = await chat(running, KEY)

        def age(connection: Any) -> None:
            connection.execute(requests.update().values(expires_at_ms=1))
            connection.execute(jobs.update().values(created_at_ms=1))

        await running.server.books.change(age)
        second = await chat(running, KEY)
        third = await chat(running, AGAIN)
        assert first.json()["metadata"]["job_id"] != second.json()["metadata"]["job_id"]
        same(second, third)
        await billed_once(running, 2)


async def test_keys_do_not_pile_up(database_url: str) -> None:
    async with opened(database_url, island()) as running:
        await chat(running, KEY)
        await chat(running, {"Idempotency-Key": "order-2"}, max_tokens=9)
        upkeep, books = running.server._parts.upkeep, running.server.books

        def age(connection: Any) -> None:
            connection.execute(requests.update().where(requests.c.id == "local/order-1").values(expires_at_ms=1))

        await books.change(age)
        await upkeep._round(sweep=True)
        assert await books.ask(lambda connection: list(connection.execute(requests.select()).scalars())) == ["local/order-2"]


async def test_where_the_answer_is_gone_a_key_says_so(tmp_path: Path) -> None:
    """It must neither bill again nor look for the answer for ever."""
    async with opened(url_of(tmp_path), island()) as running:
        first = await chat(running, KEY)
        await running.server.books.change(lambda connection: connection.execute(jobs.update().values(output=b"")))
        with trio.fail_after(5):
            error_of(await chat(running, KEY), 422, "idempotency_key_reused")
        assert first.status_code == 200
        await billed_once(running)


# Submitted jobs


async def test_a_job_submitted_twice_is_one_job(tmp_path: Path) -> None:
    """Nobody waits for it: its second try is told how it is now."""
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        first = await client.post(JOBS, json=A_JOB, headers=KEY)
        await until(lambda: one.open_now == 1)
        with trio.fail_after(5):
            again = [await client.post(JOBS, json=A_JOB, headers=headers) for headers in (KEY, AGAIN)]
        assert [answer.status_code for answer in (first, *again)] == [201] * 3
        assert {answer.json()["id"] for answer in again} == {first.json()["id"]} and again[0].json()["state"] != "submitted"
        assert ["x-archipelag-replayed" in answer.headers for answer in (first, *again)] == [False, True, True]
        more.set()
        await ended(running, first.json()["id"])
        late = await client.post(JOBS, json=A_JOB, headers=KEY)
        assert late.json()["id"] == first.json()["id"] and late.json()["state"] == "succeeded"
        assert len(one.requests) == 1
        await billed_once(running)


async def test_a_job_whose_answer_is_gone_is_still_that_job(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(), result_retention_s=0.0) as running:
        job_id = await submit(running, KEY)
        await ended(running, job_id)
        with trio.fail_after(5):
            assert await submit(running, KEY) == job_id and await submit(running, AGAIN) == job_id
        error_of(await get(running, f"{JOBS}/{job_id}/output"), 410, "output_expired")
        await billed_once(running)


async def test_many_submit_at_once_under_one_key(database_url: str) -> None:
    one = island()
    async with opened(database_url, one) as running:
        found: set[str] = set()

        async def post() -> None:
            found.add(await submit(running, KEY))

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(post)
        await ended(running, found.pop())
        assert not found and len(one.requests) == 1
        await billed_once(running)


async def test_a_job_that_failed_may_be_submitted_again(tmp_path: Path) -> None:
    one = island(1, Script(refuse=Refused(Code.BAD_INPUT, "not now"), times=1))
    async with opened(url_of(tmp_path), one) as running:
        first = await submit(running, KEY)
        assert (await ended(running, first))["state"] == "failed"
        second = await submit(running, KEY)
        assert second != first and (await ended(running, second))["state"] == "succeeded"
        await billed_once(running)


async def test_a_quote_that_is_over_does_not_hide_what_was_bought_with_it(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask(PRICE))) as running, http(running) as client:
        quote = (await client.post("/api/v1/quotes", json=HELLO)).json()["id"]
        first = await chat(running, KEY, quote=quote)
        job_id = await submit(running, {"Idempotency-Key": "order-2"}, quote=quote)
        await ended(running, job_id)
        hour_later = running.server.desk._clock_ms() + 120_000
        running.server._parts.market._clock_ms = lambda: hour_later
        same(first, await chat(running, KEY, quote=quote))
        assert await submit(running, {"Idempotency-Key": "order-2"}, quote=quote) == job_id
        error_of(await chat(running, {"Idempotency-Key": "order-3"}, quote=quote), 409, "quote_expired", "quote")
        error_of(await chat(running, quote=quote), 409, "quote_expired", "quote")
        await billed_once(running, 2)


async def test_an_answer_that_nothing_opens_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of another version, or sealed with another secret."""
    async with opened(url_of(tmp_path), island()) as running:
        answer = await chat(running, KEY)
        job_id = answer.json()["metadata"]["job_id"]
        for value in (RowSealer(SALT).seal(msgpack.packb([99, []]), job_id, bytes(24)), b"nothing at all"):
            await running.server.books.change(lambda connection, value: connection.execute(jobs.update().values(output=value)), value)
            error_of(await chat(running, KEY), 422, "idempotency_key_reused")
            error_of(await get(running, f"{JOBS}/{job_id}/output"), 410, "output_expired")
    assert caplog.text.count(f"the answer of job {job_id} is lost") == 4


async def test_what_is_kept_for_retries_is_sealed(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        answer = await chat(running)
        job = await row(running, answer.json()["metadata"]["job_id"])
        assert b"three" in RowSealer(SALT).open(job.output, job.id)
        with pytest.raises(SealBroken):
            RowSealer(SALT).open(job.output, "another job")
