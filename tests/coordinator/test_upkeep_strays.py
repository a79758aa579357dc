"""Jobs that the books say are ours and that nobody here runs; and how a run of a Coordinator begins and ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import coordinator.upkeep as upkeep
from coordinator.books import presence
from coordinator.books.books import open_books
from coordinator.books.jobs import Job, JobState
from coordinator.exchange.bids import Work
from coordinator.http.job_input import job_order
from coordinator.http.terms import Terms
from coordinator.keys import ACCOUNT_DEFAULT
from coordinator.orders import Order
from privacy.keys import cache_salt
from protocol.errors import ConfigError
from protocol.generation import GenerationRequest
from protocol.prices import Ask
from tests.coordinator.desks import OTHER, SALT, opened, row, url_of
from tests.coordinator.fakes import COORDINATOR, NETWORK, Running, island

BID = 1000


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "BEAT_S", 0.02)


def order_of(job_id: str, **changes: Any) -> Order:
    salt = cache_salt(SALT, ACCOUNT_DEFAULT)
    request = GenerationRequest(prompt="one two", max_tokens=8)
    order = job_order(job_id, "echo", request, Terms(), ACCOUNT_DEFAULT, salt, 60.0, 60.0)
    return dataclasses.replace(order, work=Work(2, 8), **changes)


async def lose_the_answer(running: Running, order: Order, change: Callable[[Job], Job] = lambda job: job) -> None:
    """The job is in the books, and the one who opened it was told that it could not be."""
    opening = running.server.desk._opening(order, BID, "explicit", None)
    await running.server.books.do(dataclasses.replace(opening, job=change(opening.job)))


def damaged(job: Job) -> Job:
    return dataclasses.replace(job, input=job.input[:-1] + bytes([job.input[-1] ^ 1]))


async def ended(running: Running, job_id: str) -> Job:
    with trio.fail_after(10):
        while not (job := await row(running, job_id)).ended:
            await trio.sleep(0.01)
    return job


async def test_a_submitted_job_that_nobody_runs_is_run(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        await lose_the_answer(running, order_of("stray"))
        job = await ended(running, "stray")
        assert job.state is JobState.SUCCEEDED and job.price_micros > 0 and job.output


async def test_a_chat_that_nobody_runs_fails_and_its_hold_is_released(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        await lose_the_answer(running, order_of("stray", input=b""))
        job = await ended(running, "stray")
        assert (job.state, job.error_code, job.price_micros) == (JobState.FAILED, "books_unavailable", 0)


async def test_a_job_that_cannot_be_read_any_more_fails_at_once(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        await lose_the_answer(running, order_of("stray"), damaged)
        job = await ended(running, "stray")
        assert (job.state, job.error_code) == (JobState.FAILED, "coordinator_lost")


async def test_a_job_that_nobody_runs_and_nobody_wants_is_cancelled(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        await lose_the_answer(running, order_of("stray"), lambda job: dataclasses.replace(job, cancel_wanted=True))
        assert (await ended(running, "stray")).state is JobState.CANCELLED


async def test_a_job_that_is_run_here_is_no_stray(tmp_path: Path) -> None:
    """It waits for a cheaper Island through many rounds, and stays in its first try."""
    async with opened(url_of(tmp_path), island(1, ask=Ask(per_job=BID))) as running:
        board = running.server._parts.board
        await board.submit(order_of("waiting", bid_micros=1))
        await trio.sleep(20 * upkeep.BEAT_S)
        job = await row(running, "waiting")
        assert (job.state, job.tries) == (JobState.SUBMITTED, 1) and list(running.server.desk.live) == ["waiting"]
        await board.cancel("waiting", ACCOUNT_DEFAULT)


async def test_who_ends_in_good_order_leaves_its_jobs_to_the_next_at_once(tmp_path: Path) -> None:
    """The hold stays, the job is run by another Coordinator, also where this one knows no Island yet, and nothing had to be waited for."""
    url, dear, cheap = url_of(tmp_path), island(1, ask=Ask(per_job=BID)), island(2, ask=Ask(per_job=1))
    async with opened(url, dear) as running:
        await running.server._parts.board.submit(order_of("left", bid_micros=1))
        assert await running.server.drain(1.0), "what has not begun holds nobody up"
    async with opened(url, key=OTHER, api_key=running.key) as other:
        with trio.fail_after(10):
            while "left" not in other.server.desk.live:
                await trio.sleep(0.01)
        other.port.advertise(cheap)
        job = await ended(other, "left")
        assert (job.state, job.tries, job.owner) == (JobState.SUCCEEDED, 2, OTHER.peer_id)


async def test_a_killed_run_is_told_from_a_second_one_with_the_same_identity(
    tmp_path: Path, postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.3)
    monkeypatch.setattr(upkeep, "_LOOK_S", 0.02)
    url, peer = postgres_server.new_database(), COORDINATOR.peer_id
    async with open_books(url) as books:
        first = await upkeep.begin_run(books, NETWORK, SALT, peer)
        second = await upkeep.begin_run(books, NETWORK, SALT, peer)  # the first says nothing more
        assert second > first

        async def live() -> None:
            while True:
                await books.change(presence.beat, peer, second, "", await books.now_ms())
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            with pytest.raises(ConfigError, match="runs already"):
                await upkeep.begin_run(books, NETWORK, SALT, peer)
            nursery.cancel_scope.cancel()
    postgres_server.drop(url)
