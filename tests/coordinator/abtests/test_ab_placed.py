"""Where jobs of a name go that has several versions: to the best that can begin now, and to a Cargo of another name that it stands for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import trio

from coordinator.cache.policy import CacheConfig
from coordinator.keys import ACCOUNT_DEFAULT
from coordinator.matching import Choice, Wish
from coordinator.placement import NotPlaced, Placement, Placer
from coordinator.regions import EU
from coordinator.standing import Standing
from protocol import limits
from protocol.cargos import Runtime
from protocol.errors import Code
from protocol.prices import Ask
from protocol.tickets import read_ticket
from tests.coordinator.abtests.ab_net import CHAT, NAME, NEW, NEW_ASK, OLD, OLD_ASK, call, chat, offering, ok, publish
from tests.coordinator.batch_desk import begin, over
from tests.coordinator.cache_net import ask as asking
from tests.coordinator.cache_net import said, strategy
from tests.coordinator.desks import error_of, opened, until
from tests.coordinator.direct_desk import Bridge, receipt_of
from tests.coordinator.fakes import FakeIsland, FakePort, Running, Script, island
from tests.coordinator.test_coord_placement import slots
from tests.protocol.cargo_samples import cargo

OWN_1, OWN_2, OTHER_1 = "a1" * 32, "a2" * 32, "b1" * 32
CANDIDATE = cargo("talk-two", "1.0.0", runtime=Runtime.GGUF)


def holding(number: int, content_hash: str, count: int = 1, name: str = "own", **changes: Any) -> FakeIsland:
    return island(number, name=name, content_hash=content_hash, **slots(count), **changes)


def placer_of(*islands: FakeIsland, **settings: Any) -> tuple[Placer, FakePort]:
    """``own`` may run as OWN_2, the best, or OWN_1."""
    port = FakePort(*islands)
    placer = Placer(port.book, random.Random(1), **settings)
    placer.offered.releases = {"own": (OWN_2, OWN_1)}.get
    return placer, port


def standing_for_other(*islands: FakeIsland, **settings: Any) -> tuple[Placer, FakePort]:
    """``own`` stands for ``other``; its own releases may stand in."""
    placer, port = placer_of(*islands, **settings)
    placer.offered.releases = {"own": (OTHER_1, OWN_2, OWN_1), "other": (OTHER_1,)}.get
    placer.offered.alias = lambda name: "other" if name == "own" else name
    placer.offered.aliases = lambda: ["own"]
    return placer, port


def wish(**changes: Any) -> Wish:
    return Wish(**{"cargo": "own", "tokens": 10, **changes})


def version(place: Placement) -> str:
    return place.candidate.offer.content_hash


# The best version that can begin now


async def test_few_islands_of_a_new_version_do_not_leave_those_of_the_old_one_idle() -> None:
    old = [holding(number, OWN_1) for number in range(1, 5)]
    placer, _ = placer_of(*old, holding(5, OWN_2))
    taken = [await placer.place(wish(), 0, 0) for _ in range(5)]
    assert [version(place) for place in taken] == [OWN_2] + [OWN_1] * 4, "the better one first"
    with pytest.raises(NotPlaced) as full:
        await placer.place(wish(), 0, 0)
    assert full.value.code is Code.NO_CAPACITY and placer.slots("own") == 5
    placer.release(taken[0])
    assert version(await placer.place(wish(), 0, 0)) == OWN_2, "and again as soon as it has room"


async def test_where_all_are_full_a_job_waits_for_the_best() -> None:
    placer, _ = placer_of(holding(1, OWN_1), holding(2, OWN_2))
    new, old = [await placer.place(wish(), 0, 0) for _ in range(2)]
    got: list[Placement] = []

    async def wait() -> None:
        got.append(await placer.place(wish(), 30, 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        placer.release(old)
        await trio.testing.wait_all_tasks_blocked()
        assert not got and placer.queued("own") == 1
        placer.release(new)
    assert [version(place) for place in got] == [OWN_2]


async def test_a_newcomer_that_the_old_version_takes_does_not_stand_behind_those_who_wait_for_the_new_one() -> None:
    placer, port = placer_of(holding(1, OWN_2))
    await placer.place(wish(), 0, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placer.place, wish(), 30, 5)
        await trio.testing.wait_all_tasks_blocked()
        port.advertise(holding(2, OWN_1))
        with trio.fail_after(5):
            assert version(await placer.place(wish(), 30, 5)) == OWN_1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "change",
    [{"policy": EU}, {"price_max_micros": 100}, {"excluded": "old"}, {"context_over": 5000}],
    ids=["policy", "price", "failure", "context"],
)
async def test_room_that_is_no_good_for_the_job_is_no_room(change: dict[str, Any]) -> None:
    """It waits for the new version, rather than to be refused for what the old version's Islands are."""
    old, new = holding(1, OWN_1, context_tokens=5000, ask=Ask(per_job=200)), holding(2, OWN_2, ask=Ask(per_job=100))
    placer, port = placer_of(old, new)
    port.advertise(new, region="DE")
    port.advertise(old, region="US")
    if "excluded" in change:
        change = {"excluded": {old.peer: 2**60}}
    taken = await placer.place(wish(**change), 0, 0)
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(**change), 0, 0)
    assert refused.value.code is Code.NO_CAPACITY and not refused.value.refusal.by_price
    placer.release(taken)
    assert version(await placer.place(wish(**change), 0, 0)) == OWN_2


async def test_an_old_version_that_alone_meets_the_policy_gets_the_job_or_is_waited_for() -> None:
    old, new = holding(1, OWN_1), holding(2, OWN_2)
    placer, port = placer_of(old, new)
    port.advertise(old, region="DE")
    port.advertise(new, region="US")
    assert version(await placer.place(wish(policy=EU), 0, 0)) == OWN_1
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(policy=EU), 0, 0)
    assert refused.value.code is Code.NO_CAPACITY, "the other version would never do"


async def test_a_quoted_island_decides_on_the_version() -> None:
    old, new = holding(1, OWN_1), holding(2, OWN_2)
    placer, _ = placer_of(old, new)
    quoted = wish(island=old.peer)
    place = await placer.place(quoted, 0, 0)
    assert place.island == old.peer
    with pytest.raises(NotPlaced) as refused:
        await placer.place(quoted, 0, 0)
    assert refused.value.code is Code.NO_CAPACITY and "quote" in refused.value.message, "it is waited for, as it was promised"
    failed = replace(quoted, excluded={old.peer: 2**60})
    assert version(await placer.place(failed, 0, 0)) == OWN_2, "unless it is out of the question"


async def test_the_price_is_that_of_the_version_that_would_be_got() -> None:
    old, new = holding(1, OWN_1, 3, ask=Ask(per_job=10)), holding(2, OWN_2, ask=Ask(per_job=70))
    placer, _ = placer_of(old, new)
    found = placer.price_range("own", 1, 1, 60)
    assert (found.cheapest, found.slots) == (70, 4)
    await placer.place(wish(), 0, 0)
    found = placer.price_range("own", 1, 1, 60)
    assert (found.cheapest, found.slots) == (10, 4)
    assert placer.price_range("own", 1, 1, 60, OWN_2).slots == 1, "of one version that is named"
    outcome = placer.preview(wish(), None)
    assert isinstance(outcome, Choice) and outcome.price_micros == 10


async def test_islands_that_drain_or_are_not_approved_offer_no_version() -> None:
    """Of a new version whose only Islands are such ones, jobs would find nobody."""
    standing = Standing(require_approval=True)
    old, new = holding(1, OWN_1), holding(2, OWN_2)
    placer, port = placer_of(old, new, standing=standing)
    assert placer.content_hashes("own") == set()
    standing.approve(old.peer)
    assert placer.content_hashes("own") == {OWN_1} and placer.price_range("own", 1, 1, 60).slots == 1
    standing.approve(new.peer)
    assert placer.content_hashes("own") == {OWN_1, OWN_2}
    port.advertise(new, draining=True)
    assert placer.content_hashes("own") == {OWN_1} and version(await placer.place(wish(), 0, 0)) == OWN_1


# A Cargo of another name


async def test_a_name_that_stands_for_another_is_placed_there() -> None:
    placer, _ = standing_for_other(holding(1, OTHER_1, name="other", ask=Ask(per_job=70)))
    assert placer.writes_text("own") is placer.writes_text("other") is not None
    assert placer.cargos() == {"own": 1, "other": 1} and placer.slots("own") == 1 and len(placer.asks("own")) == 1
    assert placer.price_range("own", 1, 1, 60).cheapest == placer.price_range("own", 1, 1, 60, OTHER_1).cheapest == 70
    assert placer.content_hashes("own") == {OTHER_1} and placer.largest_context("own", OTHER_1) == 100_000
    place = await placer.place(wish(content_hash=OTHER_1), 0, 0)
    assert place.candidate.offer.name == "other", "an answer that goes on elsewhere says only the version"
    got: list[Placement] = []

    async def wait() -> None:
        got.append(await placer.place(wish(job_id="job", price_max_micros=99), 30, 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert placer.queued("own") == placer.queued("other") == 1 and placer.waiting_bids("own") == [99]
        assert set(placer.why_waiting({"job": "own"})) == {"job"}
        placer.release(place)
    assert version(got[0]) == OTHER_1


async def test_where_nobody_offers_the_other_its_own_versions_stand_in(autojump_clock: trio.testing.MockClock) -> None:
    other, own = holding(1, OTHER_1, name="other"), holding(2, OWN_1, 2)
    placer, port = standing_for_other(own)
    assert version(await placer.place(wish(), 0, 0)) == OWN_1 and placer.cargos() == {"own": 1}
    assert placer.writes_text("own") is not None and placer.price_range("own", 1, 1, 60).slots == 2
    port.advertise(other)
    assert version(await placer.place(wish(), 0, 0)) == OTHER_1 and set(placer.cargos()) == {"own", "other"}
    assert placer.slots("own") == 3 and placer.content_hashes("own") == {OWN_1, OTHER_1}
    assert placer.largest_context("own", OWN_1) and version(await placer.place(wish(content_hash=OWN_1), 0, 0)) == OWN_1


async def test_an_older_version_of_the_other_is_not_what_the_name_stands_for() -> None:
    placer, _ = standing_for_other(holding(1, "b0" * 32, name="other"))
    assert set(placer.cargos()) == {"other"} and placer.slots("own") == 0
    assert placer.price_range("own", 1, 1, 60).slots == 0


async def test_its_own_islands_help_where_the_others_are_full() -> None:
    placer, _ = standing_for_other(holding(1, OTHER_1, name="other"), holding(2, OWN_2), holding(3, OWN_1))
    assert [version(await placer.place(wish(), 0, 0)) for _ in range(3)] == [OTHER_1, OWN_2, OWN_1]


async def test_a_job_waits_for_the_other_to_come_back(autojump_clock: trio.testing.MockClock) -> None:
    placer, port = standing_for_other()
    with pytest.raises(NotPlaced) as refused:
        await placer.place(wish(), 30, 30)
    assert refused.value.code is Code.UNKNOWN_CARGO
    placer.remember_offered(("own",))
    got: list[Placement] = []

    async def wait() -> None:
        got.append(await placer.place(wish(), 30, 30))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(3)
        port.advertise(holding(1, OTHER_1, name="other"))
        placer.book_changed()
    assert version(got[0]) == OTHER_1


# On a whole Coordinator


async def promote(running: Running, address: str) -> None:
    await running.server.registry.promote(ACCOUNT_DEFAULT, NAME, address, "ab:1")


async def test_all_routes_know_a_name_that_stands_for_another(books_url: str) -> None:
    """No Island offers the base's own versions any more."""
    two = offering(CANDIDATE, 1, NEW_ASK)
    async with opened(books_url, two) as running:
        await publish(running, OLD, CANDIDATE)
        missing = {"cargo": NAME, "inputs": [{"prompt": "one"}]}
        error_of(await call(running, "POST", "/api/v1/jobs/batch", json=missing), 404, "model_not_found", "cargo")
        await promote(running, CANDIDATE.address)
        models = [model["id"] for model in (await ok(running, "GET", "/v1/models"))["data"]]
        assert sorted(models) == [NAME, "talk-two"]
        asked = [(await ok(running, "GET", f"/api/v1/market/rates/{name}"))["data"]["active_asks"] for name in (NAME, "talk-two")]
        assert asked == [1, 1]
        assert (await over(running, await begin(running, 3, cargo=NAME)))["child_states"] == {"succeeded": 3}
        steps = {"steps": [{"key": "a", "cargo": NAME, "input": {"prompt": "one"}}]}
        quote = await ok(running, "POST", "/api/v1/workflows/quote", {"definition": steps})
        assert quote["unpriced"] == [] and float(quote["price_max"]) > 0
        assert {(ticket.cargo, ticket.content_hash) for ticket in two.tickets} == {("talk-two", CANDIDATE.address)}


async def test_a_quote_for_a_name_that_stands_for_another_is_kept(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = offering(CANDIDATE, 1, NEW_ASK)
    async with opened(books_url, two) as running:
        await publish(running, OLD, CANDIDATE)
        await promote(running, CANDIDATE.address)
        request = {"model": NAME, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 10}
        standing, served = running.server._placer.standing, []
        monkeypatch.setattr(standing, "served", lambda island, cargo, *more: served.append((island, cargo)))
        quote = await ok(running, "POST", "/api/v1/quotes", request)
        assert (quote["cargo"], quote["island"]) == (NAME, two.peer)
        answer = await call(running, "POST", CHAT, json={**request, "quote": quote["id"]})
        assert answer.status_code == 200, answer.text
        assert two.tickets[-1].cargo == "talk-two" and running.server._placer.open_jobs == 0
        assert served == [(two.peer, "talk-two")], "its speed is measured as what it is"


async def test_a_ticket_of_the_direct_path_names_the_cargo_that_runs(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_LOST_WAIT_S", 0.0)
    two = offering(CANDIDATE, 1, NEW_ASK)
    async with opened(books_url, two) as running:
        await publish(running, OLD, CANDIDATE)
        await promote(running, CANDIDATE.address)
        bridge = Bridge(running)
        granted = await bridge.ticket(cargo=NAME)
        ticket = read_ticket(granted.ticket)
        assert (ticket.cargo, granted.offer.name, ticket.content_hash) == ("talk-two", "talk-two", CANDIDATE.address)
        bridge.give_back(granted, str(Code.LINK_LOST), 2)
        again = await bridge.ticket(cargo=NAME, content_hash=CANDIDATE.address, engine=granted.offer.engine)
        assert read_ticket(again.ticket).cargo == "talk-two", "it goes on there"
        await bridge.settle(bridge.attempt(again, 3, receipt_of(two, again, 3)))
        job, records = await bridge.books()
        assert job.cargo == NAME and {record.cargo for record in records} == {"talk-two"}
        assert running.server._placer.open_jobs == 0


async def test_what_the_old_version_says_while_the_new_one_is_full_is_not_kept(books_url: str) -> None:
    """The cache has answers of the version that the name stands for only."""
    gate = trio.Event()
    old = offering(OLD, 1, OLD_ASK, *(Script(words=("old",)) for _ in range(2)))
    new = offering(NEW, 2, NEW_ASK, Script(words=("new",), hang_after=0, until=gate, times=1), Script(words=("new",)))
    new.offers = tuple(replace(each, **slots(1)) for each in new.offers)
    async with opened(books_url, old, new, cache=CacheConfig()) as running, trio.open_nursery() as nursery:
        await publish(running, OLD, NEW)
        nursery.start_soon(chat, running, "", "something else")
        await until(lambda: bool(new.requests))
        for _ in range(2):
            answer = await asking(running, "hello", model=NAME)
            assert (said(answer), strategy(answer)) == ("old", None)
        gate.set()
        await until(lambda: not new.open_now and not running.server._placer.open_jobs)
        found = Counter([(said(answer), strategy(answer)) for answer in [await asking(running, "hello", model=NAME) for _ in range(2)]])
        assert found == {("new", None): 1, ("new", "exact"): 1}
