"""One flight: equal questions that come at once cost one job, whatever becomes of the one that has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator.cache.asking import CacheUse, ask_of
from coordinator.cache.policy import CacheConfig
from coordinator.http import schema
from coordinator.http.app import order_of
from coordinator.http.terms import Terms
from coordinator.jobs import CacheHit, Event, Settled
from coordinator.keys import create_key
from coordinator.orders import Order
from protocol import limits
from protocol.errors import Code
from tests.coordinator.cache_net import FakeEmbedding, OneDirection, ask, body, cache_of, cached, said, stats
from tests.coordinator.clients import http, lines_of
from tests.coordinator.desks import CHAT, error_of, rows, until, url_of
from tests.coordinator.fakes import Running, Script, island

QUESTION = "How do I reset my password?"


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    return url_of(tmp_path)


async def many(count: int, work: Callable[[], Awaitable[httpx.Response]]) -> list[httpx.Response]:
    found: list[httpx.Response] = []

    async def one() -> None:
        found.append(await work())

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return found


def waiting(running: Running) -> int:
    return cache_of(running).statistics.waited


async def test_ten_at_once_cost_one_job(books_url: str) -> None:
    gate = trio.Event()
    one = island(1, Script(hang_after=3, until=gate))
    async with cached(books_url, one) as running:

        async def release() -> None:
            await until(lambda: waiting(running) == 9)
            gate.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            answers = await many(10, lambda: ask(running, QUESTION))
        assert {said(answer) for answer in answers} == {QUESTION} and len(one.requests) == 1
        assert sorted(answer.headers["x-archipelag-cache"] for answer in answers) == ["hit"] * 9 + ["miss"]
        assert {answer.json()["metadata"]["job_id"] for answer in answers} == {(await rows(running))[0].id}
        assert {answer.json()["metadata"]["cache_strategy"] for answer in answers} == {None, "exact"}
        found = await stats(running)
        assert (found["hits"], found["misses"], found["waited"]) == (9, 1, 9)


async def test_streams_wait_too_and_are_kept_alive(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADERS_WAIT_S", 0.02)
    gate = trio.Event()
    one = island(1, Script(hang_after=3, until=gate))
    async with cached(books_url, one, keep_alive_comment_s=0.02) as running, trio.open_nursery() as nursery:
        nursery.start_soon(ask, running, QUESTION)
        await until(lambda: len(one.requests) == 1)
        async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True)) as response:
            assert "x-archipelag-cache" not in response.headers  # it is not known yet
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith(":") and len(one.requests) == 1
            gate.set()
            data = [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]" and '"cache_strategy":"exact"' in data[-2] and len(one.requests) == 1


async def test_a_leader_that_fails_hands_over(books_url: str) -> None:
    gate = trio.Event()
    one = island(1, Script(hang_after=2, until=gate, fail_after=3, failure=Code.BAD_INPUT, times=1))
    async with cached(books_url, one) as running:

        async def release() -> None:
            await until(lambda: waiting(running) == 4)
            gate.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            answers = await many(5, lambda: ask(running, QUESTION))
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [400] and len(one.requests) == 2
        good = [answer for answer in answers if answer.status_code == 200]
        assert sorted(answer.headers["x-archipelag-cache"] for answer in good) == ["hit"] * 3 + ["miss"]


async def test_a_leader_whose_client_leaves_hands_over(books_url: str) -> None:
    one = island(1, Script(hang_after=2, times=1))
    async with cached(books_url, one) as running, trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def lead() -> None:
            with scope:
                async with http(running) as client, client.stream("POST", CHAT, json=body(QUESTION, stream=True)) as response:
                    async for _ in lines_of(response):
                        pass

        nursery.start_soon(lead)
        await until(lambda: one.open_now == 1)
        answers: list[httpx.Response] = []

        async def follow() -> None:
            answers.extend(await many(3, lambda: ask(running, QUESTION)))

        nursery.start_soon(follow)
        await until(lambda: waiting(running) == 3)
        scope.cancel()
        await until(lambda: len(answers) == 3)
        assert sorted(answer.headers["x-archipelag-cache"] for answer in answers) == ["hit", "hit", "miss"] and len(one.requests) == 2


async def test_where_every_try_fails_nobody_waits_in_line(books_url: str) -> None:
    """The first two tries fail one after the other; then all who still wait go on by themselves."""
    gates = [trio.Event(), trio.Event(), trio.Event()]
    failing = [Script(hang_after=1, until=gate, fail_after=2, failure=Code.BAD_INPUT, times=1) for gate in gates[:2]]
    one = island(1, *failing, Script(hang_after=1, until=gates[2], fail_after=2, failure=Code.BAD_INPUT))
    async with cached(books_url, one) as running:

        async def release() -> None:
            await until(lambda: waiting(running) == 5)
            gates[0].set()
            await until(lambda: len(one.requests) == 2)
            gates[1].set()
            await until(lambda: one.open_now == 4)  # all at the same time
            gates[2].set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            answers = await many(6, lambda: ask(running, QUESTION))
        for answer in answers:
            error_of(answer, 400, "invalid_value")
        assert len(one.requests) == 6


async def test_after_an_answer_that_is_not_kept_nobody_waits_in_line(books_url: str) -> None:
    gate, last = trio.Event(), trio.Event()
    one = island(1, Script(hang_after=1, until=gate, times=1), Script(hang_after=1, until=last))
    async with cached(books_url, one) as running:

        async def release() -> None:
            await until(lambda: waiting(running) == 3)
            gate.set()
            await until(lambda: one.open_now == 3)  # all at the same time
            last.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            answers = await many(4, lambda: ask(running, QUESTION, max_tokens=2))
        assert [answer.json()["choices"][0]["finish_reason"] for answer in answers] == ["length"] * 4 and len(one.requests) == 4


def order(text: str, job_id: str) -> Order:
    given = body(text)
    api = schema.parse_chat(given, 1)
    wanted = ask_of("echo", api.choices[0], given, "local", "", CacheUse())
    return order_of(job_id, api, Terms(), "local", bytes(32), "chat", 0.0, cache=wanted)


async def test_whoever_waits_need_not_wait_for_a_slow_reader(books_url: str) -> None:
    """The answer is kept once it is paid for, and the client of the first one may take its time with it."""
    begin, gate = trio.Event(), trio.Event()
    one = island(1, Script(hang_after=1, until=begin))
    async with cached(books_url, one) as running, trio.open_nursery() as nursery:
        cache, events = cache_of(running), list[Event]()

        async def slow(event: Event) -> None:
            if isinstance(event, Settled):
                await gate.wait()

        async def follow() -> None:
            events.extend(await cache.collect(order(QUESTION, "quick")))

        nursery.start_soon(cache.run, order(QUESTION, "slow"), slow)
        await until(lambda: one.open_now == 1)
        nursery.start_soon(follow)
        await until(lambda: waiting(running) == 1)
        begin.set()
        await until(lambda: bool(events))
        assert isinstance(events[1], CacheHit) and len(one.requests) == 1
        gate.set()


async def test_accounts_do_not_wait_for_one_another(books_url: str) -> None:
    gate = trio.Event()
    one = island(1, Script(hang_after=2, until=gate, times=1))
    async with cached(books_url, one) as running, trio.open_nursery() as nursery:
        nursery.start_soon(ask, running, QUESTION)
        await until(lambda: one.open_now == 1)
        with trio.fail_after(5):
            assert said(await ask(running, QUESTION, key=create_key(books_url, "ann"))) == QUESTION
        assert waiting(running) == 0
        gate.set()


async def test_who_wants_no_kept_answer_does_not_wait(books_url: str) -> None:
    gate = trio.Event()
    one = island(1, Script(hang_after=2, until=gate, times=1))
    async with cached(books_url, one) as running, trio.open_nursery() as nursery:
        nursery.start_soon(ask, running, QUESTION)
        await until(lambda: one.open_now == 1)
        with trio.fail_after(5):
            assert said(await ask(running, QUESTION, headers={"Cache-Control": "no-cache"})) == QUESTION
        gate.set()


async def test_what_is_found_for_one_is_for_all(books_url: str) -> None:
    """Ten of a question whose answer stands under another wording: one look for it."""
    one, embedding = island(), OneDirection()
    async with cached(books_url, one, embedding=embedding) as running:
        await ask(running, QUESTION)
        await until(lambda: not cache_of(running)._meaning.learning)
        embedding.gate, embedding.calls = trio.Event(), 0

        async def release() -> None:
            await until(lambda: waiting(running) == 4)
            assert embedding.gate is not None
            embedding.gate.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(release)
            answers = await many(5, lambda: ask(running, "How do I reset my password, please?"))
        assert {answer.json()["metadata"]["cache_strategy"] for answer in answers} == {"semantic"}
        assert len(one.requests) == 1 and embedding.calls == 1


async def test_a_leader_that_leaves_while_it_looks(books_url: str) -> None:
    one, embedding = island(), FakeEmbedding()
    async with cached(books_url, one, embedding=embedding) as running, trio.open_nursery() as nursery:
        await ask(running, QUESTION)
        await until(lambda: not cache_of(running)._meaning.learning)
        embedding.gate = trio.Event()
        scope, other = trio.CancelScope(), "How do I reset my password, please?"

        async def lead() -> None:
            with scope:
                await ask(running, other)

        nursery.start_soon(lead)
        await until(lambda: embedding.calls == 2)
        scope.cancel()
        embedding.gate.set()
        with trio.fail_after(5):
            assert said(await ask(running, other)) == other
        assert not cache_of(running)._flights


async def test_children_of_a_run_share_a_flight(books_url: str) -> None:
    """Orders that come through ``collect``, as those of batches do, wait for one another too, and each has its row in the books."""
    one = island()
    async with cached(books_url, one, cache=CacheConfig(shadow_share=0.0)) as running, http(running) as client:
        answer = await client.post("/api/v1/jobs/batch", json={"cargo": "echo", "inputs": [{"prompt": "one two", "temperature": 0}] * 5})
        assert answer.status_code in (201, 202), answer.text
        batch: dict[str, Any] = {}

        async def is_done() -> bool:
            batch.update((await client.get(f"/api/v1/jobs/{answer.json()['id']}/batch-status")).json())
            return bool(batch["parent_state"] in ("succeeded", "failed"))

        await until(is_done)
        output = (await client.get(f"/api/v1/jobs/{answer.json()['id']}/output")).json()
        assert batch["parent_state"] == "succeeded" and len(output["outputs"]) == 5 and len(one.requests) == 1
