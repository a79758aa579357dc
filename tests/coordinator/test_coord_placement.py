"""Places on Islands: counting beyond lagging ads, waiting in order, and what wakes those who wait."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.matching import Wish
from coordinator.placement import Placement, Placer
from protocol import limits
from protocol.errors import Code, Refused
from tests.coordinator.fakes import FakeIsland, FakePort, island, island_key, offer

CARGO = "echo"


def wish(**changes: Any) -> Wish:
    return Wish(**{"cargo": CARGO, "tokens": 10, **changes})


def placer_for(*islands: FakeIsland) -> tuple[Placer, FakePort]:
    port = FakePort(*islands)
    return Placer(port.book, random.Random(1)), port


def slots(count: int, free: int | None = None) -> dict[str, Any]:
    return {"slots_total": count, "slots_free": count if free is None else free}


async def test_own_jobs_count_before_any_ad_shows_them() -> None:
    placer, _ = placer_for(island(1, **slots(2)), island(2, **slots(2)))
    taken = [await placer.place(wish(), 0, 0) for _ in range(4)]
    assert sorted(place.island for place in taken) == sorted([island_key(1).peer_id, island_key(2).peer_id] * 2)
    with pytest.raises(Refused) as refused:
        await placer.place(wish(), 0, 0)
    assert refused.value.code is Code.NO_CAPACITY


async def test_ads_that_already_show_our_jobs_do_not_count_them_twice() -> None:
    one = island(1, **slots(4))
    placer, port = placer_for(one)
    first = [await placer.place(wish(), 0, 0) for _ in range(2)]
    one.offers = (offer(**slots(4, free=1)),)  # our two, and one of somebody else
    port.advertise(one)
    placer.book_changed()
    await placer.place(wish(), 0, 0)
    with pytest.raises(Refused):
        await placer.place(wish(), 0, 0)
    for place in first:
        placer.release(place)
    # two of ours went; the ad has not said so yet, but we know
    await placer.place(wish(), 0, 0)
    await placer.place(wish(), 0, 0)
    with pytest.raises(Refused):
        await placer.place(wish(), 0, 0)


async def test_those_who_wait_are_served_in_order(autojump_clock: trio.testing.MockClock) -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    served: list[int] = []

    async def wait(number: int) -> None:
        place = await placer.place(wish(), 30, 5)
        served.append(number)
        await trio.sleep(0)
        placer.release(place)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
        assert placer.waiting == 5
        placer.release(held)
    assert served == [0, 1, 2, 3, 4]
    assert placer.open_jobs == placer.waiting == 0


async def test_a_newcomer_does_not_overtake() -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    got: list[str] = []

    async def wait(name: str) -> None:
        placer.release(await placer.place(wish(), 30, 5))
        got.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "first")
        await trio.testing.wait_all_tasks_blocked()
        placer.release(held)  # goes to the one that waits, at once
        nursery.start_soon(wait, "second")
    assert got == ["first", "second"]


async def test_a_picky_waiter_does_not_block_the_others() -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    peer = held.island
    got: list[Placement] = []

    async def picky() -> None:
        with pytest.raises(Refused):
            await placer.place(wish(excluded={peer: 10**6}), 0.5, 0.5)

    async def easy() -> None:
        got.append(await placer.place(wish(), 30, 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(picky)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(easy)
        await trio.testing.wait_all_tasks_blocked()
        placer.release(held)
    assert [place.island for place in got] == [peer]


async def test_waits_for_an_island_to_come_back(autojump_clock: trio.testing.MockClock) -> None:
    one = island(1)
    placer, port = placer_for(one)
    placer.release(await placer.place(wish(), 0, 0))
    port.lose(one)
    placer.book_changed()

    async def come_back() -> None:
        await trio.sleep(3)
        port.advertise(one)
        placer.book_changed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        started = trio.current_time()
        place = await placer.place(wish(), 30, 5)
        assert 3 <= trio.current_time() - started < 3.5
    assert place.island == one.peer


@pytest.mark.parametrize(
    ("busy", "code", "took_s"),
    [(True, Code.NO_CAPACITY, 30.0), (False, Code.NO_ISLAND, 5.0)],
    ids=["full", "gone"],
)
async def test_waiting_is_bounded(
    autojump_clock: trio.testing.MockClock, busy: bool, code: Code, took_s: float
) -> None:
    one = island(1, **slots(1))
    placer, port = placer_for(one)
    held = await placer.place(wish(), 0, 0)
    if not busy:
        placer.release(held)
        port.lose(one)
        placer.book_changed()
    started = trio.current_time()
    with pytest.raises(Refused) as refused:
        await placer.place(wish(), 30, 5)
    assert refused.value.code is code
    assert trio.current_time() - started == pytest.approx(took_s, abs=limits.PLACE_RETRY_S)
    assert placer.waiting == 0


async def test_an_unknown_cargo_is_refused_at_once(autojump_clock: trio.testing.MockClock) -> None:
    placer, _ = placer_for(island(1))
    started = trio.current_time()
    with pytest.raises(Refused) as refused:
        await placer.place(wish(cargo="nobody-has-it"), 30, 5)
    assert refused.value.code is Code.UNKNOWN_CARGO and trio.current_time() == started


async def test_a_forgotten_cargo_becomes_unknown(autojump_clock: trio.testing.MockClock) -> None:
    one = island(1)
    placer, port = placer_for(one)
    placer.book_changed()
    port.lose(one)
    placer.book_changed()
    await trio.sleep(limits.CARGO_REMEMBERED_S)
    with pytest.raises(Refused) as refused:
        await placer.place(wish(), 30, 5)
    assert refused.value.code is Code.UNKNOWN_CARGO


async def test_a_place_that_is_given_to_a_cancelled_waiter_is_not_lost() -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placer.place, wish(), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        # it is cancelled and, before it has noticed, gets the place
        nursery.cancel_scope.cancel()
        placer.release(held)
    assert placer.open_jobs == 0 and placer.waiting == 0
    await placer.place(wish(), 0, 0)


async def test_too_many_waiting_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WAITING_JOBS_MAX", 2)
    placer, _ = placer_for(island(1, **slots(1)))
    await placer.place(wish(), 0, 0)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(placer.place, wish(), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Refused) as refused:
            await placer.place(wish(), 30, 5)
        assert refused.value.code is Code.NO_CAPACITY
        nursery.cancel_scope.cancel()


async def test_many_islands_are_sampled_but_none_is_overlooked() -> None:
    islands = [island(number, **slots(1, free=0)) for number in range(1, 101)]
    islands[77].offers = (offer(**slots(1)),)
    placer, _ = placer_for(*islands)
    place = await placer.place(wish(), 0, 0)
    assert place.island == islands[77].peer


async def test_cargos_are_those_that_somebody_offers_and_not_only_drains() -> None:
    one = island(1)
    placer, port = placer_for(one)
    assert placer.cargos() == {CARGO: 1}
    port.advertise(one, draining=True)
    assert placer.cargos() == {}
