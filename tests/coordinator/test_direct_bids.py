"""The direct path keeps to the bid: however many Islands an answer takes, an honest Consumer pays no more, and a liar pays his lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator.books.direct import TicketState
from coordinator.books.jobs import JobState
from coordinator.http.errors import ApiError, from_refusal
from coordinator.keys import ACCOUNT_DEFAULT
from coordinator.placement import NotPlaced
from protocol import limits
from protocol.direct import PlaceFreed
from protocol.errors import Code
from protocol.prices import Ask
from protocol.receipts import Ending
from protocol.tickets import read_ticket, ticket_hash
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import OTHER, funds, opened, url_of
from tests.coordinator.direct_desk import JOB_ID, Bridge, driver_of, limit_of, receipt_of
from tests.coordinator.fakes import FakeIsland, Running, island

PER_JOB, PER_TOKEN = Ask(per_job=1000), Ask(per_1k_output=1000)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DESK_LOST_WAIT_S", 0.0)


def islands(ask: Ask = PER_JOB, count: int = 2) -> list[FakeIsland]:
    return [island(number, ask=ask) for number in range(1, count + 1)]


def credits(micros: int) -> str:
    return f"{micros / 1_000_000:f}"


async def refused(bridge: Bridge, **changes: Any) -> ApiError:
    """What the bridge hears, in the words of the HTTP face."""
    with pytest.raises((ApiError, NotPlaced)) as caught:
        await bridge.ticket(**changes)
    error = caught.value
    if isinstance(error, NotPlaced):
        return from_refusal(error)
    assert isinstance(error, ApiError)
    return error


def gone(bridge: Bridge, granted: Any) -> FakeIsland:
    """The Island of this ticket has died, and everybody sees it."""
    it = bridge.running.port.islands[driver_of(granted)]
    bridge.running.port.lose(it)
    bridge.excluded.append(it)
    return it


def other(running: Running, granted: Any) -> FakeIsland:
    (found,) = [it for it in running.port.islands.values() if it.peer != driver_of(granted)]
    return found


async def test_an_island_that_dies_in_mid_answer_costs_nothing_beside_the_bid(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1000))
        dead = gone(bridge, first)
        bridge.give_back(first, Code.LINK_LOST, tokens=100)
        second = await bridge.ticket(bid=credits(1000))
        assert driver_of(second) != dead.peer and limit_of(second) == 1000
        assert (await funds(running))[1] == 1000, "no more than the bid is held"
        done = bridge.attempt(second, 50, receipt_of(other(running, first), second, 50))
        assert (await bridge.settle(bridge.attempt(first, 100), done)).price_micros == 1000
        job, records = await bridge.books()
        assert (job.bid_micros, job.price_micros, job.state) == (1000, 1000, JobState.SUCCEEDED)
        assert [record.state for record in records] == [TicketState.BROKEN, TicketState.PAID]
        claimed = await bridge.claim(dead, first, 100)
        assert (claimed.accepted, claimed.paid_micros) == (True, 0), "it was not dead after all, and the bid is used up"
        assert (await bridge.books())[0].price_micros == 1000


async def test_what_the_bid_leaves_pays_an_island_that_was_only_cut_off(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1700))
        dead = gone(bridge, first)
        bridge.give_back(first, Code.LINK_LOST, tokens=100)
        second = await bridge.ticket()
        await bridge.settle(bridge.attempt(second, 5, receipt_of(other(running, first), second, 5)))
        assert (await bridge.claim(dead, first, 100)).paid_micros == 700
        assert (await bridge.claim(dead, first, 100)).paid_micros == 700, "once"
        assert (await bridge.books())[0].price_micros == 1700


async def test_an_island_that_lives_is_paid_for_its_part_and_the_next_gets_the_rest(tmp_path: Path) -> None:
    """1,000 tokens at a micro-credit each: the second Island needs only what is still to come."""
    async with opened(url_of(tmp_path), *islands(PER_TOKEN)) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1000))
        bridge.excluded.append(running.port.islands[driver_of(first)])
        bridge.give_back(first, Code.WORKER_DIED, tokens=400)
        second = await bridge.ticket(bid=credits(1000))
        assert limit_of(second) == 600 and (await funds(running))[1] == 600
        assert read_ticket(second.ticket).token_limit == 600, "or it could be used for a whole answer"
        done = bridge.attempt(second, 600, receipt_of(other(running, first), second, 600))
        billed = await bridge.settle(bridge.attempt(first, 400), done)
        assert billed.price_micros == 1000
        assert (await bridge.claim(running.port.islands[driver_of(first)], first, 400)).paid_micros == 400
        assert (await bridge.books())[0].price_micros == 1000


async def test_the_next_island_is_one_that_the_rest_pays(tmp_path: Path) -> None:
    dear, cheap = island(2, ask=Ask(100, 1000)), island(3, ask=Ask(per_1k_output=500))
    async with opened(url_of(tmp_path), island(1, ask=PER_TOKEN)) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1000))
        running.port.advertise(dear)
        running.port.advertise(cheap)
        bridge.excluded.append(running.port.islands[driver_of(first)])
        bridge.give_back(first, Code.WORKER_DIED, tokens=400)
        second = await bridge.ticket(affinity=dear.peer)
        assert driver_of(second) == cheap.peer and limit_of(second) == 300


async def test_a_bid_that_leaves_nothing_ends_the_job(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1000))
        bridge.give_back(first, Code.WORKER_DIED, tokens=1)
        error = await refused(bridge, bid=credits(1000))
        assert (error.status, error.code, error.param) == (402, "bid_too_low", "bid_price")
        assert (await bridge.drop()).price_micros == 1000


async def test_a_refused_ticket_costs_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        for _ in range(5):
            bridge.give_back(await bridge.ticket(bid=credits(1000)), Code.NO_CAPACITY)
        assert limit_of(await bridge.ticket(bid=credits(1000))) == 1000
        assert (await funds(running))[1] == 1000


async def test_a_quote_is_the_most_too_and_holds_though_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), *islands(PER_TOKEN)) as running:
        bridge = Bridge(running)
        async with http(running) as client:
            body = {**HELLO, "max_tokens": 1000}
            quote = (await client.post("/api/v1/quotes", json=body)).json()
        first = await bridge.ticket(quote=quote["id"])
        assert (await bridge.books())[0].bid_source == "quote"
        bridge.excluded.append(running.port.islands[driver_of(first)])
        bridge.give_back(first, Code.WORKER_DIED, tokens=400)
        later_ms = running.server.direct._clock_ms() + 120_000
        monkeypatch.setattr(running.server.direct._market, "_clock_ms", lambda: later_ms)
        second = await bridge.ticket(quote=quote["id"])
        assert limit_of(first) == 1000 and limit_of(second) == 600
        await bridge.settle(bridge.attempt(second, 600, receipt_of(other(running, first), second, 600)))
        assert (await bridge.books())[0].price_micros == 1000


async def test_a_quoted_ask_is_that_of_further_tickets_too(tmp_path: Path) -> None:
    it = island(1, ask=PER_TOKEN)
    async with opened(url_of(tmp_path), it) as running:
        bridge = Bridge(running)
        async with http(running) as client:
            quote = (await client.post("/api/v1/quotes", json={**HELLO, "max_tokens": 1000})).json()
        bridge.give_back(await bridge.ticket(quote=quote["id"]), Code.NO_CAPACITY)
        it.offers = (replace(it.offers[0], ask=Ask(per_1k_output=500)),)
        running.port.advertise(it)
        await bridge.ticket(quote=quote["id"])
        assert [record.ask_per_1k_output for record in (await bridge.books())[1]] == [1000, 1000]


async def test_choices_share_the_bid(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands(PER_TOKEN)) as running:
        bridge = Bridge(running)
        terms: dict[str, Any] = {"choices": 2, "bid": credits(2000)}
        granted: list[Any] = []

        async def one() -> None:
            granted.append(await bridge.ticket(**terms))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        whole, broken = granted
        bridge.give_back(whole, tokens=10)
        bridge.give_back(broken, Code.WORKER_DIED, tokens=400)
        error = await refused(bridge, **terms)
        assert error.code == "bid_too_low", "which choice it is for is not known, so it is counted whole"
        assert (await bridge.books())[0].price_micros == 400
        _, records = await bridge.books()
        states = {record.id: record.state for record in records}
        assert sorted(states.values()) == [TicketState.OPEN, TicketState.PAID]
        assert (await funds(running))[1] == 1000


async def test_an_answer_that_was_lost_with_its_stream_takes_nothing_from_the_bid(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        await bridge.ticket(bid=credits(1000))
        again = await bridge.ticket(bid=credits(1000))
        assert limit_of(again) == 1000 and (await funds(running))[1] == 1000
        assert [record.state for record in (await bridge.books())[1]] == [TicketState.FREED, TicketState.OPEN]
        assert running.server.direct._placer.open_jobs == 1


async def test_a_job_that_another_coordinator_has_begun_goes_on_by_its_bid(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    async with opened(url, *islands(PER_TOKEN)) as one:
        first = await Bridge(one).ticket(bid=credits(1000))
        async with opened(url, *islands(PER_TOKEN), key=OTHER, api_key=one.key) as two:
            bridge = Bridge(two)
            second = await bridge.ticket(bid=credits(5000))
            assert limit_of(second) == 1000 and second.ticket != first.ticket
            job, records = await bridge.books()
            assert (job.bid_micros, len(records)) == (1000, 2) and (await funds(two))[1] == 1000
            reported = bridge.attempt(first, 3), bridge.attempt(second, 4)
            assert (await bridge.settle(*reported)).price_micros == 7, "freed for want of a word, and paid all the same"


async def test_who_calls_a_whole_answer_broken_pays_it_beside_his_bid(tmp_path: Path) -> None:
    """He says that nothing came, and has signed for all of it."""
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(bid=credits(1000))
        bridge.give_back(first, Code.LINK_LOST)
        second = await bridge.ticket(bid=credits(1000))
        it = running.port.islands[driver_of(second)]
        await bridge.settle(bridge.attempt(second, 5, receipt_of(it, second, 5)))
        claimed = await bridge.claim(running.port.islands[driver_of(first)], first, 100, Ending.STOP)
        assert claimed.paid_micros == 1000
        assert (await bridge.books())[0].price_micros == 2000


async def test_a_forged_count_says_nothing(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        first = await bridge.ticket(job_id="cd" * 12)
        second = await bridge.ticket()
        freed = PlaceFreed(JOB_ID, ticket_hash(second.ticket), Code.WORKER_DIED, bridge.count(first, 9))
        bridge.desk.freed(freed, bridge.key.peer_id)
        await bridge.ticket()
        assert (await bridge.books())[0].price_micros == 0


async def test_what_a_job_shows_of_where_it_runs(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        it = next(iter(running.port.islands.values()))
        for known in running.port.islands.values():
            running.port.advertise(known, region="EU")
        bridge = Bridge(running)
        granted = await bridge.ticket()
        async with http(running) as client:
            placement = (await client.get(f"/api/v1/jobs/{JOB_ID}/placement")).json()
            job = (await client.get(f"/api/v1/jobs/{JOB_ID}")).json()
        assert placement["island"] == driver_of(granted) and placement["region"] == "EU" and it.peer
        assert placement["placement"]["considered"], placement
        assert (job["bid_source"], job["region"]) == ("default", "EU")
        await running.server.direct._market.save_bid(ACCOUNT_DEFAULT, "echo", 3000)
        await bridge.ticket(job_id="cd" * 12)
        assert (await bridge.books("cd" * 12))[0].bid_source == "saved"


async def test_what_the_coordinator_never_had_it_does_not_give(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        granted = await bridge.ticket()

        def error(answer: httpx.Response) -> tuple[int, str]:
            return answer.status_code, answer.json()["error"]["code"]

        async with http(running) as client:
            answer = await client.delete(f"/api/v1/jobs/{JOB_ID}")
            assert error(answer) == (409, "not_owner") and "its bridge" in answer.json()["error"]["message"]
            assert error(await client.get(f"/api/v1/jobs/{JOB_ID}/output")) == (404, "output_not_here")
            job = (await bridge.books())[0]
            assert not job.cancel_wanted and not job.ended, "nothing has changed"
            it = running.port.islands[driver_of(granted)]
            await bridge.settle(bridge.attempt(granted, 5, receipt_of(it, granted, 5)))
            assert error(await client.get(f"/api/v1/jobs/{JOB_ID}/output")) == (404, "output_not_here")
            assert (await client.delete(f"/api/v1/jobs/{JOB_ID}")).json()["state"] == "succeeded"


async def test_a_statement_names_the_job(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), *islands()) as running:
        bridge = Bridge(running)
        granted = await bridge.ticket()
        await bridge.settle(bridge.attempt(granted, 5, receipt_of(running.port.islands[driver_of(granted)], granted, 5)))
        async with http(running) as client:
            lines = (await client.get("/api/v1/account/statement")).json()["data"]
            (charge,) = [line for line in lines if line["kind"] == "charge"]
            assert charge["job"] == JOB_ID
            assert (await client.get(f"/api/v1/jobs/{charge['job']}")).status_code == 200
            assert JOB_ID in (await client.get("/api/v1/account/statement?format=csv")).text
