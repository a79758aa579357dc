"""Batches in trouble: Islands and Coordinators that die, a database that is away. Each costs at most the inputs that run."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from coordinator.books import run_queries
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import Job, JobState
from tests.coordinator.batch_desk import (
    ALL,
    ASK,
    asked,
    begin,
    hurry,
    lane,
    output,
    over,
    paced,
    paid,
    said,
    status,
    texts,
    watching,
)
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, OTHER, funds, mortal, opened, set_funds, silence, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def children(running: Running, batch_id: str) -> list[Job]:
    return await running.server.books.ask(run_queries.children_of, batch_id)


async def test_another_coordinator_goes_on_without_repeating_what_is_done(database_url: str) -> None:
    """Killed with 3 inputs done and 2 under way: the other one does those 2 again, the rest once, and keeps their order."""
    before: list[FakeIsland] = [lane(number, Script(times=uses), Script(hang_after=1)) for number, uses in ((1, 2), (2, 1))]
    after = lane(3)
    async with mortal(database_url, *before) as first, opened(database_url, after, key=OTHER, api_key=first.running.key) as second:
        batch_id = await begin(first.running, 9, max_parallelism=2)
        await until(lambda: all(one.open_now == 1 for one in before) and len(asked(*before)) == 5)
        await paid(first.running, batch_id, 3)
        running_then = {request.prompt for one in before for request in one.requests[-1:]}
        seen = await status(second, batch_id)
        assert seen["parent_state"] == "running" and seen["child_states"]["succeeded"] == 3
        async with watching(second, batch_id) as heard:
            await until(lambda: len(heard) >= 10)
            await first.kill()
        assert heard[-1][0] == "complete"
        found = await over(second, batch_id)
        assert (found["parent_state"], found["child_states"]) == ("succeeded", {"succeeded": 9})
        assert said(await output(second, batch_id)) == texts(9)
        times = asked(*before, after)
        assert {text for text, count in times.items() if count == 2} == running_then and set(times.values()) == {1, 2}
        assert asked(after).keys() == set(texts(9)) - (asked(*before).keys() - running_then)
        assert await funds(second) == (ALL - 9 * ASK.per_job, 0)


async def test_a_coordinator_that_starts_again_goes_on_itself(tmp_path: Path) -> None:
    one = lane(1, Script(times=3), Script(hang_after=1, times=1))
    async with mortal(url_of(tmp_path), one) as first:
        batch_id = await begin(first.running, 6)
        await until(lambda: len(one.requests) == 4 and one.open_now == 1)
        await paid(first.running, batch_id, 3)
        await first.kill()
        async with opened(url_of(tmp_path), one, api_key=first.running.key) as again:
            assert (await over(again, batch_id))["child_states"] == {"succeeded": 6}
            assert asked(one) == {**dict.fromkeys(texts(6), 1), "input 3": 2} and said(await output(again, batch_id)) == texts(6)
            assert await funds(again) == (ALL - 6 * ASK.per_job, 0)


async def test_islands_that_come_back_after_their_coordinator(tmp_path: Path) -> None:
    """It has just started, knows nobody, and no job of the Cargo has ever been paid: it is not unknown for that."""
    one = lane(1, Script(hang_after=1, times=1))
    async with mortal(url_of(tmp_path), one) as first:
        batch_id = await begin(first.running, 3)
        await until(lambda: one.open_now == 1)
        await first.kill()
        async with opened(url_of(tmp_path), api_key=first.running.key) as again:
            await until(lambda: again.server._placer.waiting == 1)
            again.port.advertise(one)
            assert (await over(again, batch_id))["child_states"] == {"succeeded": 3}


async def test_a_coordinator_that_goes_in_good_order_leaves_it_to_the_next(tmp_path: Path) -> None:
    one = lane(1, Script(times=2), Script(hang_after=1, times=1))
    async with opened(url_of(tmp_path), one) as first:
        batch_id = await begin(first, 4)
        await until(lambda: len(one.requests) == 3 and one.open_now == 1)
        await paid(first, batch_id, 2)
        assert not await first.server.drain(0.05)
    async with opened(url_of(tmp_path), one, api_key=first.key) as again:
        assert (await over(again, batch_id))["child_states"] == {"succeeded": 4}
        assert asked(one) == {**dict.fromkeys(texts(4), 1), "input 2": 2}
        assert {job.id: job.state for job in await children(again, batch_id)}[f"{batch_id}.2.0"] is JobState.CANCELLED
        assert await funds(again) == (ALL - 4 * ASK.per_job, 0)


async def test_one_that_nobody_wants_is_not_taken_up(database_url: str) -> None:
    """It is cancelled at the other Coordinator after its own has died."""
    hung, after = lane(1, Script(times=1), Script(hang_after=1)), lane(2)
    async with mortal(database_url, hung) as first, opened(database_url, after, key=OTHER, api_key=first.running.key) as second:
        batch_id = await begin(first.running, 5)
        await until(lambda: hung.open_now == 1 and len(hung.requests) == 2)
        await paid(first.running, batch_id, 1)
        await first.kill()
        async with http(second) as client:
            answer = (await client.delete(f"{JOBS}/{batch_id}")).json()
        assert (answer["state"], answer["message"]) == ("running", "the Coordinator that runs the batch was told to cancel it")
        found = await over(second, batch_id)
        assert (found["parent_state"], found["child_states"]) == ("cancelled", {"succeeded": 1, "cancelled": 4})
        assert after.requests == [] and await funds(second) == (ALL - ASK.per_job, 0)


async def test_it_is_cancelled_at_another_coordinator_than_its_own(tmp_path: Path) -> None:
    hung = lane(1, Script(hang_after=1))
    async with opened(url_of(tmp_path), hung) as first, opened(url_of(tmp_path), key=OTHER, api_key=first.key) as second:
        batch_id = await begin(first, 3)
        await until(lambda: hung.open_now == 1)
        async with http(second) as client:
            await client.delete(f"{JOBS}/{batch_id}")
        found = await over(first, batch_id)
        assert found["parent_state"] == "cancelled" and hung.open_now == 0 and hung.cancelled == 1


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_an_island_that_dies_costs_its_running_inputs(is_noticed: bool, tmp_path: Path) -> None:
    """Whether its connection breaks or just says nothing any more."""
    gate = trio.Event()
    one, two = lane(1, Script(times=1), Script(hang_after=0, until=gate)), lane(2, paced(0.002))
    async with opened(url_of(tmp_path), one, two) as running:
        batch_id = await begin(running, 8)
        await until(lambda: one.open_now == 1 and len(one.requests) == 2 and len(two.requests) > 0)
        running.port.lose(one)
        if is_noticed:
            gate.set()
        found = await over(running, batch_id)
        assert found["child_states"] == {"succeeded": 8} and said(await output(running, batch_id)) == texts(8)
        times = asked(one, two)
        assert sum(times.values()) == 9 and await funds(running) == (ALL - 8 * ASK.per_job, 0)


async def test_an_island_that_comes_later_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.batches.scheduler._LOOK_S", 0.01)
    gate = trio.Event()
    one, two = lane(1, Script(hang_after=0, until=gate)), lane(2, slots=3)
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 9)
        await until(lambda: one.open_now == 1)
        running.port.advertise(two)
        await until(lambda: len(two.requests) >= 8)
        gate.set()
        assert (await over(running, batch_id))["child_states"] == {"succeeded": 9}


async def test_a_database_that_is_away_stops_it_and_nothing_is_lost(tmp_path: Path) -> None:
    """The run rests, and goes on when the books can be used again; an input whose answer could not be paid is done again."""
    gate = trio.Event()
    one = lane(1, Script(times=2), Script(hang_after=0, until=gate, times=1))
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 5)
        await until(lambda: len(one.requests) == 3 and one.open_now == 1)
        await paid(running, batch_id, 2)
        books = running.server.books
        kept = {name: getattr(books, name) for name in ("do", "do_all", "ask", "change", "begin")}
        silence(books)
        gate.set()
        await until(lambda: not running.server._parts.runs.is_live(batch_id))
        with pytest.raises(BooksUnavailable):
            await books.ask(run_queries.any_run, batch_id)
        for name, method in kept.items():
            setattr(books, name, method)
        assert (await over(running, batch_id))["child_states"] == {"succeeded": 5}
        assert said(await output(running, batch_id)) == texts(5)
        assert asked(one) == {**dict.fromkeys(texts(5), 1), "input 2": 2}
        assert await funds(running) == (ALL - 5 * ASK.per_job, 0)


async def test_no_credit_in_the_middle(tmp_path: Path) -> None:
    """What had credit is done, the rest says why not."""
    one = lane(1)
    async with opened(url_of(tmp_path), one) as running:
        await set_funds(running, 3 * ASK.per_job)
        found = await over(running, await begin(running, 5, bid_price="0.0001"))
        assert found["child_states"] == {"succeeded": 3, "failed": 2} and found["parent_state"] == "succeeded"
        assert {child["error"]["code"] for child in found["children"] if child["error"]} == {"insufficient_credits"}
        assert await funds(running) == (0, 0)


async def test_a_child_can_be_cancelled_alone(tmp_path: Path) -> None:
    gate = trio.Event()
    rest = Script(hang_after=0, until=gate)
    one, two = lane(1, Script(hang_after=1, times=1), rest), lane(2, Script(hang_after=1, times=1), rest)
    async with opened(url_of(tmp_path), one, two) as running:
        batch_id = await begin(running, 3)
        await until(lambda: one.open_now == two.open_now == 1)
        shown = (await status(running, batch_id))["children"]
        async with http(running) as client:
            for child in shown[:2]:
                answer = (await client.delete(f"{JOBS}/{child['id']}")).json()
                assert answer["state"] == "cancelled"
        gate.set()
        found = await over(running, batch_id)
        assert found["child_states"] == {"cancelled": 2, "succeeded": 1} and found["parent_state"] == "succeeded"
        assert found["children"][0]["error"]["code"] == "cancelled"
