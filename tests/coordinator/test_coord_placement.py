"""Places on Islands: counting beyond lagging ads, waiting in order, what wakes those who wait, and what is written when facts change."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from coordinator import placement as module
from coordinator.columns import Columns
from coordinator.matching import Choice, Refusal, Wish, choose
from coordinator.placement import PRIORITY_PER_WAITED_S, ROUND_TRIPS_READ_S, NotPlaced, Placement, Placer, PriceRange
from coordinator.regions import EU
from coordinator.standing import COOLING_MIN_S, Standing
from protocol import limits
from protocol.errors import Code, Refused
from protocol.prices import Ask
from tests.coordinator.fakes import FakeIsland, FakePort, island, island_key, offer, pool, roomy

CARGO = "echo"


def wish(**changes: Any) -> Wish:
    return Wish(**{"cargo": CARGO, "tokens": 10, **changes})


def placer_for(*islands: FakeIsland, **settings: Any) -> tuple[Placer, FakePort]:
    port = FakePort(*islands)
    return Placer(port.book, random.Random(1), **settings), port


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


async def test_a_newcomer_before_the_one_that_was_served_has_woken() -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placer.place, wish(), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        placer.release(held)
        with pytest.raises(Refused) as refused:
            await placer.place(wish(), 0, 0)
        assert refused.value.code is Code.NO_CAPACITY
    assert placer.open_jobs == 1 and placer.waiting == 0 and placer.queued(CARGO) == 0


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


async def test_of_many_islands_none_is_overlooked() -> None:
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


# -- priority


async def order_served(placer: Placer, arrivals: list[tuple[float, int]], held: Placement) -> list[int]:
    """Jobs come at these times with these priorities; in which order they are served, one after the other, once the place is free."""
    served: list[int] = []

    async def one(number: int, at_s: float, priority: int) -> None:
        await trio.sleep(at_s)
        place = await placer.place(wish(priority=priority), 1000, 5)
        served.append(number)
        await trio.sleep(0.01)
        placer.release(place)

    async with trio.open_nursery() as nursery:
        for number, (at_s, priority) in enumerate(arrivals):
            nursery.start_soon(one, number, at_s, priority)
        await trio.sleep(100)
        placer.release(held)
    return served


PASSED_AFTER_S = 100 / PRIORITY_PER_WAITED_S
ORDERS = [
    ("who came first", [(0.0, 0), (1.0, 0), (2.0, 0)], [0, 1, 2]),
    ("higher priority first", [(0.0, 0), (1.0, 50), (2.0, 100), (3.0, 50)], [2, 1, 3, 0]),
    ("the highest passes who waited for less", [(0.0, 0), (PASSED_AFTER_S - 1, 100)], [1, 0]),
    ("but not who waited for longer", [(0.0, 0), (PASSED_AFTER_S + 1, 100)], [0, 1]),
]


@pytest.mark.parametrize(("arrivals", "order"), [row[1:] for row in ORDERS], ids=[row[0] for row in ORDERS])
async def test_order_of_those_who_wait(
    autojump_clock: trio.testing.MockClock, arrivals: list[tuple[float, int]], order: list[int]
) -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    assert await order_served(placer, arrivals, held) == order
    assert placer.waiting == placer.open_jobs == 0


async def test_a_newcomer_of_higher_priority_passes_those_who_cannot_be_served_yet(
    autojump_clock: trio.testing.MockClock,
) -> None:
    placer, _ = placer_for(island(1, **slots(2)))
    held = [await placer.place(wish(), 0, 0) for _ in range(2)]
    got: list[str] = []

    async def wait(name: str, priority: int) -> None:
        placer.release(await placer.place(wish(priority=priority), 30, 5))
        got.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "low", 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wait, "high", 2)
        await trio.testing.wait_all_tasks_blocked()
        placer.release(held[0])
    assert got == ["high", "low"]


async def test_a_thousand_who_wait_cost_one_choice_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    placer, _ = placer_for(island(1, **slots(1)))
    held = await placer.place(wish(), 0, 0)
    calls = 0

    def counted(*arguments: Any) -> Choice | Refusal:
        nonlocal calls
        calls += 1
        return choose(*arguments)

    monkeypatch.setattr(module, "choose", counted)
    async with trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(placer.place, wish(output_tokens=number, price_max_micros=5000 + number), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        calls = 0
        for _ in range(10):
            placer.book_changed()
        placer.release(held)
        await trio.testing.wait_all_tasks_blocked()
        assert calls == 1 and placer.waiting == 999
        nursery.cancel_scope.cancel()


async def test_those_who_cannot_be_served_are_tried_in_bounded_numbers_and_starve_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SETTLE_TRIES_MAX", 8)
    one = island(1, **slots(1), ask=Ask(1000))
    placer, _ = placer_for(one)
    held = await placer.place(wish(), 0, 0)
    async with trio.open_nursery() as nursery:
        for number in range(50):  # they bid too little, each in its own way
            nursery.start_soon(placer.place, wish(price_max_micros=number, waits_for_price=True), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        got: list[Placement] = []

        async def payer() -> None:
            got.append(await placer.place(wish(price_max_micros=1000, waits_for_price=True), 30, 5))

        nursery.start_soon(payer)
        await trio.testing.wait_all_tasks_blocked()
        placer.release(held)
        for _ in range(50 // 8 + 1):
            await trio.testing.wait_all_tasks_blocked()
            placer.book_changed()
        await trio.testing.wait_all_tasks_blocked()
        assert len(got) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("rows", "tries"), [(32_000, 20), (40, 10), (1, 2)])
async def test_the_more_islands_there_are_the_fewer_are_tried_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: int, tries: int) -> None:
    monkeypatch.setattr(module, "SETTLE_ROWS_MAX", rows)
    placer, _ = placer_for(*(island(number, **slots(1), ask=Ask(1000)) for number in range(4)))
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(placer.place, wish(price_max_micros=number, waits_for_price=True), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        calls = 0
        take = placer._take

        def counted(wish: Wish) -> Placement | Refusal:
            nonlocal calls
            calls += 1
            return take(wish)

        monkeypatch.setattr(placer, "_take", counted)
        placer.book_changed()
        assert calls == tries
        nursery.cancel_scope.cancel()


# -- price and policy


async def test_too_low_a_bid_is_refused_at_once_where_nobody_waits_for_it() -> None:
    placer, _ = placer_for(island(1, ask=Ask(1000)), island(2, ask=Ask(700)))
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(price_max_micros=500), 0, 5)
    refusal = refused.value.refusal
    assert refused.value.code is Code.NO_ISLAND and refusal.by_price and refusal.cheapest_micros == 700


async def test_a_low_bid_that_does_not_wait_is_refused_at_once(autojump_clock: trio.testing.MockClock) -> None:
    placer, _ = placer_for(island(1, ask=Ask(1000)))
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(price_max_micros=500), 30, 5)
    assert refused.value.refusal.by_price and trio.current_time() == 0 and placer.waiting == 0


async def test_a_low_bid_waits_for_asks_to_fall(autojump_clock: trio.testing.MockClock) -> None:
    one = island(1, ask=Ask(1000))
    placer, port = placer_for(one)

    async def fall() -> None:
        await trio.sleep(20)
        one.offers = (offer(ask=Ask(400)),)
        port.advertise(one)
        placer.book_changed()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fall)
        place = await placer.place(wish(price_max_micros=500, waits_for_price=True), 30, 5)
    assert trio.current_time() == pytest.approx(20, abs=0.5)
    assert place.choice.price_micros == 400 and placer.waiting == 0
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(price_max_micros=100, waits_for_price=True), 3, 100)
    assert refused.value.refusal.by_price and refused.value.refusal.cheapest_micros == 400


async def test_a_policy_is_never_given_up(autojump_clock: trio.testing.MockClock) -> None:
    one, two = island(1), island(2, **slots(1))
    placer, port = placer_for(one, two)
    port.advertise(one, region="us-east")
    with pytest.raises(NotPlaced, match="no Island in eu offers the model 'echo'"):
        await placer.place(wish(policy=EU), 30, 5)
    port.advertise(two, region="de")
    held = await placer.place(wish(policy=EU), 0, 0)
    assert held.island == two.peer and placer.region_of(held.island) == "de"
    started_s = trio.current_time()
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(policy=EU), 30, 5)
    assert refused.value.code is Code.NO_CAPACITY and trio.current_time() - started_s == pytest.approx(30, abs=0.5)


# -- what was seen of Islands


async def test_an_island_that_failed_is_left_alone_for_a_while_unless_it_is_the_only_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    one, two = island(1, tokens_per_s=90.0), island(2, tokens_per_s=30.0)
    standing = Standing()
    placer, port = placer_for(one, two, standing=standing)
    assert (await placer.place(wish(), 0, 0)).island == one.peer
    standing.failed(one.peer, trio.current_time())
    assert (await placer.place(wish(), 0, 0)).island == two.peer
    port.lose(two)
    last_resort = await placer.place(wish(), 0, 0)
    assert last_resort.island == one.peer and any("cooling" in reason for reason in last_resort.choice.reasons)
    port.advertise(two)
    await trio.sleep(COOLING_MIN_S)
    assert (await placer.place(wish(), 0, 0)).island == one.peer


async def test_what_is_measured_replaces_the_claim() -> None:
    one, two = island(1, tokens_per_s=900.0), island(2, tokens_per_s=100.0)
    placer, port = placer_for(one, two)
    assert (await placer.place(wish(), 0, 0)).island == one.peer
    placer.standing.served(one.peer, CARGO, 100, 10_000_000, trio.current_time())
    assert (await placer.place(wish(), 0, 0)).island == two.peer
    port.advertise(one)  # a new ad does not make it forgotten
    assert (await placer.place(wish(), 0, 0)).island == two.peer


async def test_approval_and_karma_reach_the_choice() -> None:
    one, two = island(1), island(2)
    standing = Standing(require_approval=True)
    placer, _ = placer_for(one, two, standing=standing)
    with pytest.raises(Refused):
        await placer.place(wish(), 0, 0)
    assert placer.asks(CARGO) == [] and placer.cargos() == {}
    standing.approve(two.peer)
    assert [(await placer.place(wish(), 0, 0)).island for _ in range(3)] == [two.peer] * 3
    assert [row[0] for row in placer.asks(CARGO)] == [two.peer] and placer.cargos() == {CARGO: 1}
    standing.approve(one.peer)
    standing.set_karma({two.peer: 40_000})
    assert (await placer.place(wish(), 0, 0)).island == two.peer


async def test_round_trips_are_read_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    one, two = island(1), island(2)
    trips = {one.peer: 0.001, two.peer: 0.2}
    placer, _ = placer_for(one, two, round_trips_s=lambda: trips)
    assert {(await placer.place(wish(), 0, 0)).island for _ in range(5)} == {one.peer}
    trips = {one.peer: 0.2, two.peer: 0.001}
    await trio.sleep(ROUND_TRIPS_READ_S)
    assert {(await placer.place(wish(), 0, 0)).island for _ in range(5)} == {two.peer}


# -- facts


async def test_only_rows_of_ads_that_changed_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    islands = [island(number) for number in range(1, 21)]
    placer, port = placer_for(*islands)
    placer.book_changed()
    written: list[str] = []
    put = Columns.put

    def spied(self: Columns, candidate: Any, known: Any) -> None:
        written.append(candidate.island)
        put(self, candidate, known)

    monkeypatch.setattr(Columns, "put", spied)
    port.advertise(islands[3])
    port.lose(islands[5])
    placer.book_changed()
    placer.book_changed()
    await placer.place(wish(), 0, 0)
    assert written == [islands[3].peer] and placer.islands() == 19


async def test_an_offer_that_is_taken_back_is_gone_and_the_others_stay() -> None:
    one = island(1)
    one.offers = (offer("a"), offer("b"))
    placer, port = placer_for(one)
    held = await placer.place(wish(cargo="b"), 0, 0)
    assert set(placer.cargos()) == {"a", "b"}
    one.offers = (offer("a"),)
    port.advertise(one)
    assert set(placer.cargos()) == {"a"}
    with pytest.raises(Refused):
        await placer.place(wish(cargo="b"), 0, 0)
    placer.release(held)
    one.offers = (offer("b"),)
    port.advertise(one)
    assert placer.asks("b") == [(one.peer, offer().ask, 0.0, 256, 256)] and placer.open_jobs == 0


async def test_an_island_that_leaves_with_jobs_open_leaves_nothing_behind() -> None:
    one = island(1, **slots(2))
    placer, port = placer_for(one)
    held = [await placer.place(wish(), 0, 0) for _ in range(2)]
    port.lose(one)
    placer.book_changed()
    for place in held:
        placer.release(place)
    assert placer.open_jobs == 0 and not placer._own and not placer._facts


async def test_counts_hold_whatever_comes_and_goes() -> None:
    rng = random.Random(7)
    islands = {it.peer: it for it in (island(number, **slots(6)) for number in range(1, 7))}
    placer, port = placer_for(*islands.values())
    held: list[Placement] = []
    others = dict.fromkeys(islands, 0)  # jobs of somebody else

    def ours(peer: str) -> int:
        return sum(place.island == peer for place in held)

    for _ in range(3000):
        peer, what = rng.choice(list(islands)), rng.random()
        if what < 0.4:
            try:
                held.append(await placer.place(wish(tokens=rng.randrange(9)), 0, 0))
            except Refused:
                assert all(not port.is_there(it) or ours(p) + others[p] >= 6 for p, it in islands.items())
        elif what < 0.75 and held:
            placer.release(held.pop(rng.randrange(len(held))))
        elif what < 0.95:
            others[peer] = rng.randrange(max(1, 7 - ours(peer)))
            islands[peer].offers = (offer(**slots(6, free=6 - ours(peer) - others[peer])),)
            port.advertise(islands[peer])
            placer.book_changed()
        elif not ours(peer):
            port.lose(islands[peer])
            others[peer] = 6  # until it speaks again
        shown = {row[0]: row[3] for row in placer.asks(CARGO)}
        assert shown == {p: 6 - ours(p) - others[p] for p, it in islands.items() if port.is_there(it)}
        assert placer.open_jobs == len(held)


async def test_what_the_exchange_reads() -> None:
    one, two = island(1, **slots(2), ask=Ask(5, 6, 7), tokens_per_s=12.5), island(2, **slots(3, free=1))
    placer, port = placer_for(one, two)
    port.advertise(two, draining=True)
    held = [await placer.place(wish(), 0, 0) for _ in range(2)]
    assert placer.asks(CARGO) == [(one.peer, Ask(5, 6, 7), 12.5, 0, 2)]
    assert placer.asks("nothing") == [] and placer.queued(CARGO) == 0 and placer.waiting_bids(CARGO) == []
    async with trio.open_nursery() as nursery:
        for priority, micros in ((0, 900), (5, 800), (0, None)):
            nursery.start_soon(placer.place, wish(price_max_micros=micros, priority=priority), 30, 5)
            await trio.testing.wait_all_tasks_blocked()
        assert placer.queued(CARGO) == 3 and placer.waiting_bids(CARGO) == [800, 900]
        nursery.cancel_scope.cancel()
    for place in held:
        placer.release(place)
    assert placer.region_of("nobody") == ""


async def test_a_preview_takes_nothing() -> None:
    placer, _ = placer_for(island(1, **slots(1), ask=Ask(1000)))
    for _ in range(3):
        choice = placer.preview(wish(), 1000)
        assert isinstance(choice, Choice) and choice.price_micros == 1000
    refusal = placer.preview(wish(), 999)
    assert isinstance(refusal, Refusal) and refusal.by_price
    assert placer.open_jobs == 0
    await placer.place(wish(), 0, 0)


async def test_a_pipeline_stands_in_the_order_book_under_its_last_stage() -> None:
    async with pool(roomy(1), roomy(2)) as p:
        assert p.placer.asks("big") == []
        await p.run()
        (row,) = p.placer.asks("big")
        assert row[0] == p.stages[-1].peer and row[1] == Ask(per_job=3) and row[3:] == (8, 8)
        place = await p.placer.place(Wish("big", 100), 0, 0)
        assert place.candidate.plan is not None and p.placer.asks("big")[0][3] == 7
        p.placer.release(place)
        assert p.placer.asks("big")[0][3] == 8


async def test_the_cheapest_price_is_one_that_can_be_had_now() -> None:
    cheap, middle, dear = island(1, **slots(1), ask=Ask(100)), island(2, **slots(1), ask=Ask(300)), island(3, ask=Ask(900))
    placer, _ = placer_for(cheap, middle, dear)

    def cheapest() -> int | None:
        return placer.price_range("echo", 10, 10, 600.0).cheapest

    assert placer.price_range("other", 10, 10, 600.0) == PriceRange()
    there = placer.price_range("echo", 10, 10, 600.0)
    assert (there.cheapest, there.median, there.slots) == (100, 300, 258)
    held = [await placer.place(wish(price_max_micros=limit), 0, 0) for limit in (100, 300)]
    assert cheapest() == 900  # a bid of 100 or 300 would wait beside an idle Island
    placer.release(held[0])
    assert cheapest() == 100
