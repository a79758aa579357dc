"""The direct path: nobody blocks Islands by asking, going away or lying; Islands that fail lose karma; jobs whose bridge is gone end."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

import coordinator.direct as direct
import coordinator.upkeep as upkeep
from coordinator.books.accounts import IslandRecord
from coordinator.books.jobs import JobState
from coordinator.books.queries import island_view, karma_of
from coordinator.http.errors import ApiError
from coordinator.keys import create_key
from protocol import limits
from protocol.book import Book
from protocol.errors import Code
from protocol.prices import Ask
from protocol.tickets import read_ticket
from tests.coordinator.desks import opened, row, until, url_of
from tests.coordinator.direct_desk import HOLDER, JOB_ID, Bridge, driver_of, receipt_of
from tests.coordinator.fakes import FakeIsland, Running, island


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_LOST_WAIT_S", 0.0)
    monkeypatch.setattr(upkeep, "BEAT_S", 0.02)


def taken(running: Running) -> int:
    """Places on Islands."""
    return running.server.direct._placer.open_jobs


async def record_of(running: Running, it: FakeIsland) -> IslandRecord:
    view = await running.server.books.ask(island_view, it.peer)
    return view.record if view is not None else IslandRecord(it.peer)


def cools(running: Running, it: FakeIsland) -> bool:
    return running.server.direct._placer.standing.cool_until_s(it.peer) > trio.current_time()


# -- places


async def test_a_job_has_as_many_places_as_choices(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        bridge = Bridge(running)
        for _ in range(10):
            await bridge.ticket()
        assert taken(running) == 1
        for _ in range(10):
            await bridge.ticket(job_id="cd" * 12, choices=3)
        assert taken(running) == 1 + 3


async def test_more_tickets_than_a_job_can_need_count_as_requests(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        bridge = Bridge(running, api_key=create_key(running.database_url, rate_limit_per_minute=2))
        for _ in range(limits.JOB_ATTEMPTS_MAX + 1):
            await bridge.ticket()
        with pytest.raises(ApiError) as caught:
            await bridge.ticket()
        assert caught.value.status == 429


async def test_another_holder_s_job_of_the_same_id_is_a_request_too(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        key = create_key(running.database_url, rate_limit_per_minute=1)
        await Bridge(running, api_key=key).ticket()
        with pytest.raises(ApiError) as caught:
            await Bridge(running, island(7).key, key).ticket()
        assert caught.value.status == 429


async def test_an_account_has_so_many_places_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_PLACES_PER_ACCOUNT_MAX", 2)
    async with opened(url_of(tmp_path), island(1)) as running:
        bridge, other = Bridge(running), Bridge(running, api_key=create_key(running.database_url, "bob"))
        first = await bridge.ticket("00" * 12)
        await bridge.ticket("11" * 12)
        with pytest.raises(ApiError) as caught:
            await bridge.ticket("22" * 12)
        assert (caught.value.status, caught.value.code) == (503, "no_capacity") and caught.value.headers["Retry-After"]
        await other.ticket("33" * 12)
        bridge.give_back(first)
        await bridge.ticket("22" * 12)


async def test_a_bridge_that_has_gone_frees_its_places(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running:
        bridge, places = Bridge(running), running.server.direct._places
        bridge.desk.opened(HOLDER.peer_id)
        bridge.desk.opened(HOLDER.peer_id)
        granted = await bridge.ticket()
        bridge.desk.closed(HOLDER.peer_id)
        places.tend(trio.current_time() + 60)
        assert taken(running) == 1, "it has another stream"
        bridge.desk.closed(HOLDER.peer_id)
        bridge.desk.opened(HOLDER.peer_id)
        places.tend(trio.current_time() + 60)
        assert taken(running) == 1, "it is back"
        bridge.desk.closed(HOLDER.peer_id)
        places.tend(trio.current_time() + limits.DESK_GONE_S / 2)
        assert taken(running) == 1
        places.tend(trio.current_time() + limits.DESK_GONE_S)
        assert taken(running) == 0
        bridge.desk.opened(HOLDER.peer_id)
        bridge.give_back(granted)
        it = running.port.islands[driver_of(granted)]
        assert (await bridge.settle(bridge.attempt(granted, 5, receipt_of(it, granted, 5)))).price_micros == 1000
        assert taken(running) == 0 and not len(places), "once, and its ticket was good all the time"


async def test_places_are_tended_without_anybody_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_GONE_S", 0.0)
    monkeypatch.setattr(direct, "TEND_S", 0.01)
    async with opened(url_of(tmp_path), island(1)) as running:
        bridge = Bridge(running)
        bridge.desk.opened(HOLDER.peer_id)
        await bridge.ticket()
        bridge.desk.closed(HOLDER.peer_id)
        await until(lambda: taken(running) == 0)


# -- Islands that fail


async def test_an_island_that_goes_in_mid_answer_has_failed_once(tmp_path: Path) -> None:
    one, two = island(1), island(2)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        granted = [await bridge.ticket(f"{number:024x}") for number in range(3)]
        running.port.advertise(two)
        running.port.lose(one)
        for number, ticket in enumerate(granted):
            bridge.give_back(ticket, Code.LINK_LOST, tokens=10)
            await bridge.drop(job_id=f"{number:024x}")
        assert (await record_of(running, one)).jobs_failed == 1, "one death, however many jobs and Consumers tell of it"
        assert cools(running, one)
        running.port.islands[one.peer].boot += 1
        running.port.advertise(one)
        bridge.excluded = [two]
        again = await bridge.ticket()
        running.port.lose(one)
        bridge.give_back(again, Code.LINK_LOST, tokens=10)
        await bridge.drop()
        assert (await record_of(running, one)).jobs_failed == 2


@pytest.mark.parametrize("outcome", [Code.LINK_LOST, Code.LEASE_LOST, Code.INTERNAL, Code.NO_CAPACITY, Code.BAD_TICKET])
async def test_a_consumer_s_word_alone_harms_no_island(tmp_path: Path, outcome: Code) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        bridge.give_back(await bridge.ticket(), outcome, tokens=10)
        assert (await bridge.drop()).price_micros == 1000, "he pays for what he signed"
        assert (await record_of(running, one)).jobs_failed == 0 and not cools(running, one)


@pytest.mark.parametrize("tokens", [None, 0])
async def test_nothing_signed_is_no_failure(tmp_path: Path, tokens: int | None) -> None:
    """Whoever keeps tickets until an Island leaves in peace has nothing against it."""
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        granted = await bridge.ticket()
        running.port.lose(one)
        bridge.give_back(granted, Code.LINK_LOST, tokens)
        await bridge.drop()
        assert (await record_of(running, one)).jobs_failed == 0 and not cools(running, one)


@pytest.mark.parametrize(("ask", "failed"), [(Ask(per_job=1000), 1), (Ask(), 0)], ids=["paid", "free"])
async def test_a_worker_that_died_counts_where_it_is_paid_for(tmp_path: Path, ask: Ask, failed: int) -> None:
    one = island(1, ask=ask)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        bridge.give_back(await bridge.ticket(), Code.WORKER_DIED, tokens=10)
        await bridge.drop()
        assert (await record_of(running, one)).jobs_failed == failed and cools(running, one) == bool(failed)
        events = await running.server.books.ask(karma_of, one.peer, None, 10)
        assert all(event.job_id == JOB_ID for event in events)


async def test_a_whole_answer_ends_the_cooling(tmp_path: Path) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        bridge.give_back(await bridge.ticket(), Code.WORKER_DIED, tokens=10)
        await bridge.drop()
        granted = await bridge.ticket("cd" * 12)
        await bridge.settle(bridge.attempt(granted, 5, receipt_of(one, granted, 5)), job_id="cd" * 12)
        assert not cools(running, one)


async def test_an_island_s_death_may_be_seen_a_little_later_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_LOST_WAIT_S", 10.0)
    one, two = island(1), island(2)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        granted = await bridge.ticket()
        running.port.advertise(two)
        bridge.give_back(granted, Code.LINK_LOST, tokens=10)
        bridge.excluded = [one]
        looks = 0

        def book() -> Book:
            nonlocal looks
            looks += 1
            if looks == 3:
                running.port.lose(one)
            return running.port.book()

        monkeypatch.setattr(running.server.direct, "_book", book)
        await bridge.ticket()
        assert (await bridge.books())[0].price_micros == 0


# -- jobs whose bridge has gone


async def test_a_job_whose_bridge_has_gone_ends_with_what_its_island_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        granted, waiting = await bridge.ticket(), "cd" * 12
        await bridge.ticket(waiting)
        await bridge.claim(one, granted, 10)
        sweep = running.server._parts.upkeep._end_lost
        now_ms = await running.server.books.now_ms()
        await sweep(now_ms + int(1000 * upkeep.BRIDGE_LOST_S) - 60_000)
        assert (await row(running, JOB_ID)).state is JobState.RUNNING, "its bridge may still say how it ended"
        await sweep(now_ms + int(1000 * upkeep.BRIDGE_LOST_S) + 60_000)
        job = await row(running, JOB_ID)
        assert (job.state, job.error_code, job.price_micros) == (JobState.FAILED, "bridge_lost", 1000) and job.error_message
        assert (await row(running, waiting)).state is JobState.RUNNING, "its ticket is open: it may be claimed"
        assert (await bridge.settle(bridge.attempt(granted, 10))).price_micros == 1000, "who comes late hears the price"


async def test_a_job_that_goes_on_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old one, whose newest ticket was claimed a moment ago."""

    async def no_sweep(*_arguments: object) -> None:
        """The Coordinator's own would find the job before it has its second ticket."""

    monkeypatch.setattr(upkeep.Upkeep, "_sweep", no_sweep)
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge, desk = Bridge(running), running.server.direct
        now_ms = desk._clock_ms()
        with monkeypatch.context() as before:
            before.setattr(desk, "_clock_ms", lambda: now_ms - 1000 * int(upkeep.BRIDGE_LOST_S) - 1000)
            bridge.give_back(await bridge.ticket(bid="1"), Code.NO_CAPACITY)
        await bridge.claim(one, await bridge.ticket(), 10)
        await running.server._parts.upkeep._end_lost(now_ms)
        assert (await row(running, JOB_ID)).state is JobState.RUNNING


async def test_the_sweep_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "BRIDGE_LOST_S", -1.0)
    monkeypatch.setattr(upkeep, "SWEEP_S", 0.02)
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        await bridge.claim(one, await bridge.ticket(), 10)

        async def over() -> bool:
            return (await row(running, JOB_ID)).ended

        await until(over)


async def test_a_fast_island_does_not_wait_for_signatures(tmp_path: Path) -> None:
    """It risks a quarter second of its work, by the pace of its own last receipt."""
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        bridge = Bridge(running)
        first = await bridge.ticket()
        assert read_ticket(first.ticket).count_every == limits.COUNT_EVERY_TOKENS
        await bridge.settle(bridge.attempt(first, 30, receipt_of(one, first, 30)))  # in 3 ms
        second = await bridge.ticket("cd" * 12)
        assert read_ticket(second.ticket).count_every >= int(10_000 * limits.COUNT_EVERY_S)
