"""Several Coordinators over one database: one dies, sleeps, or is slow, and every job is done and billed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator import upkeep
from coordinator.books import job_queries
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import JobState
from coordinator.books.ledger import escrow
from coordinator.books.schema import holds
from coordinator.upkeep import Vigil
from privacy.keys import NodeKey
from protocol import limits
from protocol.prices import Ask
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import (
    CHAT,
    CREDIT,
    JOBS,
    OTHER,
    TEXT,
    WHOLE,
    Event,
    Mortal,
    balance,
    chat,
    chunks_of,
    ended,
    error_of,
    funds,
    mortal,
    opened,
    outline,
    row,
    rows,
    submit,
    text_of,
    until,
    url_of,
    watch,
)
from tests.coordinator.fakes import COORDINATOR, FakeIsland, Running, Script, island, offer

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
PRICE = ASK.price(5, 0)
KEY = {"Idempotency-Key": "order-1"}
AGAIN = {"x-stainless-retry-count": "1"}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats of 40 ms; who is silent for 0.4 s is dead."""
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "DEAD_S", 0.4)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.job_board.POLL_S", 0.01)
    monkeypatch.setattr("coordinator.desk.POLL_S", 0.01)


@contextmanager
def asleep(running: Running) -> Iterator[None]:
    """Its upkeep says nothing to the books; requests go on."""

    def nothing(*_arguments: Any) -> Any:
        raise BooksUnavailable("asleep")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.server._parts.upkeep, "_beat", nothing)
        yield


async def all_idle(*runnings: Running) -> None:
    await until(lambda: not any(running.server.desk.live for running in runnings))


async def test_another_coordinator_runs_the_jobs_of_one_that_was_killed(database_url: str) -> None:
    hung, fresh = island(1, Script(hang_after=3), ask=ASK), island(2, ask=ASK)
    async with mortal(database_url, hung) as first, opened(database_url, fresh, key=OTHER, api_key=first.running.key) as second:
        job_id = await submit(first.running)
        waiting_id = await submit(first.running, input={"prompt": "six seven eight nine"}, priority=9)
        await until(lambda: hung.open_now == 2)
        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, second, job_id, seen)
            await until(lambda: bool(seen))
            await first.kill()
        job = await ended(second, job_id)
        assert (job["state"], job["tries"], job["island"]) == ("succeeded", 2, fresh.peer)
        assert outline(seen)[-2:] == WHOLE[-2:]
        other = await ended(second, waiting_id)
        assert (other["state"], other["priority"]) == ("succeeded", 9)
        assert {request.prompt for request in fresh.requests} == {TEXT, "six seven eight nine"}
        assert (await row(second, job_id)).owner == OTHER.peer_id and second.server.statistics()["jobs_adopted"] == 2
        paid = PRICE + ASK.price(4, 0)
        assert await funds(second) == (ALL - paid, 0)
        assert await balance(second, escrow(fresh.peer)) == (paid, 0) and await balance(second, escrow(hung.peer)) == (0, 0)


async def test_a_chat_dies_with_its_coordinator_and_its_retry_runs_elsewhere(database_url: str) -> None:
    hung, fresh = island(1, Script(hang_after=3), ask=ASK), island(2, ask=ASK)
    async with mortal(database_url, hung) as first, opened(database_url, fresh, key=OTHER, api_key=first.running.key) as second:

        async def ask(headers: dict[str, str]) -> None:
            with pytest.raises(httpx.HTTPError):
                (await chat(first.running, headers)).raise_for_status()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, {})
            nursery.start_soon(ask, {**KEY})
            await until(lambda: hung.open_now == 2)
            while len(await rows(second)) < 2:  # an Island may begin before its job is written
                await trio.sleep(0)
            error_of(await chat(second, KEY), 409, "idempotency_key_in_use")
            await first.kill()
        answer = await chat(second, AGAIN)  # waits until it is known that the first has died
        assert answer.status_code == 200 and "x-archipelag-replayed" not in answer.headers
        assert (await chat(second, KEY)).status_code == 200
        states = sorted((job.state.value, job.error_code) for job in await rows(second))
        assert states == 2 * [("failed", "coordinator_lost")] + 2 * [("succeeded", "")]
        assert await funds(second) == (ALL - 2 * PRICE, 0)


async def test_a_coordinator_that_starts_again_takes_up_its_own_jobs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "DEAD_S", 3600.0)
    one = island(1, Script(hang_after=3, times=1), ask=ASK)
    async with mortal(url_of(tmp_path), one) as first:
        job_id = await submit(first.running)
        await until(lambda: one.open_now == 1)
        await first.kill()
        assert one.cancelled == 1
        async with opened(url_of(tmp_path), one, api_key=first.running.key) as again:
            job = await ended(again, job_id)
            assert (job["state"], job["tries"]) == ("succeeded", 2) and await funds(again) == (ALL - PRICE, 0)


async def test_a_quote_holds_for_whoever_runs_the_job_in_the_end(tmp_path: Path) -> None:
    hung, url = island(1, Script(hang_after=3, times=1), ask=ASK), url_of(tmp_path)
    async with mortal(url, hung) as first:
        async with http(first.running) as client:
            quote = (await client.post("/api/v1/quotes", json={"cargo": "echo", "max_tokens": 10, "prompt_tokens": 9})).json()["id"]
        job_id = await submit(first.running, input={"prompt": TEXT, "max_tokens": 10}, quote=quote)
        await until(lambda: hung.open_now == 1)
        await first.kill()
        hung.offers = (offer(ask=Ask(per_job=900_000)),)
        async with opened(url, hung, island(2, ask=ASK), key=OTHER, api_key=first.running.key) as second:
            job = await ended(second, job_id)
            assert (job["state"], job["island"]) == ("succeeded", hung.peer) and await funds(second) == (ALL - PRICE, 0)


async def test_a_job_that_brings_down_every_coordinator_is_given_up(tmp_path: Path) -> None:
    one, url, key, job_id = island(1, Script(hang_after=1), ask=ASK), url_of(tmp_path), "", ""
    for tried in range(limits.JOB_TRIES_MAX):
        async with mortal(url, one, api_key=key) as victim:
            key = victim.running.key
            job_id = job_id or await submit(victim.running)
            await until(lambda tried=tried: len(one.requests) == tried + 1)
            await victim.kill()
    async with opened(url, one, api_key=key) as running:
        job = await ended(running, job_id)
        assert (job["state"], job["tries"], job["error"]["code"]) == ("failed", limits.JOB_TRIES_MAX, "coordinator_lost")
        assert len(one.requests) == limits.JOB_TRIES_MAX and await funds(running) == (ALL, 0)
        assert (await row(running, job_id)).input == b""


async def test_a_job_that_nobody_wants_any_more_is_not_taken_up(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=1), ask=ASK)
    async with mortal(url_of(tmp_path), one) as first, opened(url_of(tmp_path), one, key=OTHER, api_key=first.running.key) as second:
        job_id = await submit(first.running)
        await until(lambda: one.open_now == 1)
        await first.kill()
        async with http(second) as client:
            await client.delete(f"{JOBS}/{job_id}")
        job = await ended(second, job_id)
        assert job["state"] == "cancelled" and len(one.requests) == 1 and await funds(second) == (ALL, 0)


async def test_who_was_only_asleep_cannot_bill_what_was_taken_from_it(database_url: str) -> None:
    """Its watchers hear that the job begins anew, and get the answer that counts."""
    more = trio.Event()
    slow, fresh = island(1, Script(hang_after=3, until=more), ask=ASK), island(2, ask=ASK)
    async with opened(database_url, slow) as first, opened(database_url, fresh, key=OTHER, api_key=first.key) as second:
        job_id = await submit(first)
        seen: list[Event] = []
        answers: list[httpx.Response] = []

        async def ask(stream: bool) -> None:
            answers.append(await chat(first, stream=stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, first, job_id, seen)
            nursery.start_soon(ask, False)
            nursery.start_soon(ask, True)
            await until(lambda: slow.open_now == 3 and len(seen) == 6)
            with asleep(first):
                assert (await ended(second, job_id))["tries"] == 2
            await until(lambda: len(slow.requests) == 3)
            more.set()
        assert outline(seen) == [*WHOLE[:3], "chunk one two three four five", "state submitted", *WHOLE[3:]]
        told = sorted(answers, key=lambda answer: answer.status_code)
        (*_, last) = await chunks_of(told[0])
        assert last["error"]["code"] == "cancelled" and "taken this job over" in last["error"]["message"]
        error_of(told[1], 503, "cancelled")
        assert told[1].headers["retry-after"]
        assert await funds(first) == (ALL - PRICE, 0) and await balance(first, escrow(slow.peer)) == (0, 0)
        assert (await row(first, job_id)).owner == OTHER.peer_id and first.server.desk.taken_over == 3


async def test_an_island_stops_when_its_job_was_taken_over_before_it_began(tmp_path: Path) -> None:
    more = trio.Event()
    slow, fresh = island(1, Script(hang_after=0, until=more), ask=ASK), island(2, ask=ASK)
    async with opened(url_of(tmp_path), slow) as first, opened(url_of(tmp_path), fresh, key=OTHER, api_key=first.key) as second:
        job_id = await submit(first)
        await until(lambda: slow.open_now == 1)
        with asleep(first):
            await ended(second, job_id)
        more.set()  # its first word is the first that is noted since
        await until(lambda: slow.cancelled == 1)
        await all_idle(first, second)
        assert await funds(first) == (ALL - PRICE, 0)


async def test_after_an_outage_nobody_takes_what_the_others_do(tmp_path: Path) -> None:
    """All of them look silent then, to whoever comes back first."""
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more), ask=ASK)
    async with opened(url_of(tmp_path), one) as first, opened(url_of(tmp_path), one, key=OTHER, api_key=first.key) as second:
        await trio.sleep(0.5)  # both have watched for long enough to judge
        job_id = await submit(first)
        await until(lambda: one.open_now == 1)
        with asleep(first), asleep(second):
            await trio.sleep(0.5)
        upkeeps = [running.server._parts.upkeep for running in (second, first)]
        for each in upkeeps * 3:
            await each._round(sweep=True)
        await trio.sleep(0.1)
        more.set()
        assert (await ended(first, job_id))["tries"] == 1
        assert [each.adopted for each in upkeeps] == [0, 0] and await funds(first) == (ALL - PRICE, 0)


STEADY = [(0.15, 0.15, False), (0.15, 0.15, False), (0.15, 0.15, True)]
BEATS: list[list[tuple[float, float | None, bool]]] = [
    # (seconds that passed, what the database's clock says passed, or None for an outage), whether others may be judged
    [(0.0, 0.0, False), *STEADY, (0.15, 0.15, True)],
    [(0.0, 0.0, False), *STEADY, (0.0, None, False), (0.1, 0.1, False), *STEADY],
    [(0.0, 0.0, False), (0.5, 0.5, False), *STEADY],  # we slept
    [(0.0, 0.0, False), *STEADY, (0.1, 3600.0, False), *STEADY],  # it jumped ahead
    [(0.0, 0.0, False), *STEADY, (0.1, -3600.0, False), *STEADY],
    [(0.0, 0.0, False), (0.15, 0.3, False), (0.15, 0.05, False), (0.15, 0.15, True)],  # a little off is a slow answer
]


@pytest.mark.parametrize("beats", BEATS)
def test_who_may_judge_others(beats: list[tuple[float, float | None, bool]]) -> None:
    vigil, now_s, database_s = Vigil(), 1000.0, 1_700_000_000.0
    for passed_s, database_passed_s, wanted in beats:
        now_s += passed_s
        if database_passed_s is None:
            vigil.lost()
            continue
        database_s += database_passed_s
        assert vigil.seen(now_s, round(database_s * 1000)) is wanted


async def test_orphans_are_jobs_of_runs_that_are_gone(database_url: str) -> None:
    three = NodeKey(bytes([7]) * 32)
    async with opened(database_url, island(1, Script(hang_after=0))) as running:
        open_id = await submit(running)
        await chat(running, model="nobody-has-it")
        await until(lambda: running.server._parts.board._desk.live[open_id].job.state is JobState.ASSIGNED)
        me = running.server.desk.me

        async def orphans(live: dict[str, int], limit: int = 100) -> list[str]:
            return [job.id for job in await running.server.books.ask(job_queries.orphaned_jobs, live, limit)]

        assert await orphans({me.owner: me.boot}) == []
        assert await orphans({me.owner: me.boot, OTHER.peer_id: 7}) == []
        assert await orphans({OTHER.peer_id: me.boot, three.peer_id: 1}) == [open_id]
        assert await orphans({me.owner: me.boot + 1}) == [open_id], "an earlier run's"
        assert await orphans({}) == [open_id] and await orphans({}, 0) == []
        (found,) = await running.server.books.ask(job_queries.orphaned_jobs, {}, 100)
        assert found.input == b"", "what is large is not read for each beat"
        assert COORDINATOR.peer_id == me.owner


@pytest.mark.parametrize("moved_ms", [-30 * 86_400_000, 30 * 86_400_000])
async def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path: Path, moved_ms: int) -> None:
    more = trio.Event()
    one = island(1, Script(times=1), Script(hang_after=3, until=more, times=2), ask=ASK)
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        first = await client.post(CHAT, json=HELLO, headers=KEY)
        desk = running.server.desk
        now_ms = desk._clock_ms
        job_id = await submit(running)
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await client.post(CHAT, json={**HELLO, "stream": True}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: one.open_now == 2)
            desk._clock_ms = lambda: now_ms() + moved_ms
            late_id = await submit(running, input={"prompt": "six"})
            again = await client.post(CHAT, json=HELLO, headers=KEY)
            for _ in range(3):
                await running.server._parts.upkeep._round(sweep=True)
            more.set()
        job, late = await ended(running, job_id), await ended(running, late_id)
        assert (job["state"], late["state"], job["tries"], late["tries"]) == ("succeeded", "succeeded", 1, 1)
        assert text_of(await chunks_of(answers[0])) == TEXT
        for _ in range(2):
            await running.server._parts.upkeep._round(sweep=True)
        if again.status_code == 200:
            assert again.json()["metadata"] == first.json()["metadata"]
        else:
            error_of(again, 422, "idempotency_key_reused")
        assert await funds(running) == (ALL - 3 * PRICE - ASK.price(1, 0), 0)


async def test_a_hold_that_looks_over_does_not_end_a_job_that_runs(database_url: str) -> None:
    """By a clock that jumped. Whoever runs it settles it; only what belongs to nobody is ended."""
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more), ask=ASK)
    async with opened(database_url, one) as first, opened(database_url, one, key=OTHER, api_key=first.key) as second:
        job_id = await submit(first)
        await until(lambda: one.open_now == 1)
        await first.server.books.change(lambda connection: connection.execute(holds.update().values(expires_at_ms=1)))
        for running in (first, second):
            await running.server._parts.upkeep._round(sweep=True)
        more.set()
        assert (await ended(second, job_id))["state"] == "succeeded" and await funds(first) == (ALL - PRICE, 0)


async def test_a_job_that_comes_back_to_its_first_coordinator(tmp_path: Path) -> None:
    """It slept, another one took the job and died; meanwhile the first one's own try has gone on."""
    more = trio.Event()
    slow, hung = island(1, Script(hang_after=3, until=more), ask=ASK), island(2, Script(hang_after=1), ask=ASK)
    async with opened(url_of(tmp_path), slow) as first:
        job_id = await submit(first)
        await until(lambda: slow.open_now == 1)
        async with mortal(url_of(tmp_path), hung, key=OTHER, api_key=first.key) as second:
            with asleep(first):
                await until(lambda: hung.open_now == 1)
            await _settled_in(second)
            await second.kill()
        await trio.sleep(0.6)
        more.set()
        job = await ended(first, job_id)
        assert job["state"] == "succeeded" and await funds(first) == (ALL - PRICE, 0)
        await all_idle(first)
        assert not first.server._parts.board._feeds


async def _settled_in(one: Mortal) -> None:
    """The job that it has taken over shows its Island."""
    await until(lambda: all(live.job.state is JobState.RUNNING for live in one.running.server.desk.live.values()))


async def test_islands_of_two_coordinators(tmp_path: Path) -> None:
    """One Island serves both; each pays it for its own jobs."""
    one: FakeIsland = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as first, opened(url_of(tmp_path), one, key=OTHER, api_key=first.key) as second:
        for running in (first, second, first):
            assert (await chat(running)).status_code == 200
        assert await funds(second) == (ALL - 3 * PRICE, 0) and await balance(first, escrow(one.peer)) == (3 * PRICE, 0)
        assert {ticket.issuer for ticket in one.tickets} == {COORDINATOR.peer_id, OTHER.peer_id}
