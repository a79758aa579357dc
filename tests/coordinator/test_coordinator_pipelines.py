"""Pipelines from the first request on: planned once, ordered, waited for, offered like an Island, and explained to the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.jobs import Accepted, JobSpec
from coordinator.planning import NoPlan, Plan, plan
from protocol import limits
from protocol.errors import Code, LocalProtocolError, Refused
from protocol.prices import Ask
from protocol.shards import LayerRange
from protocol.tickets import Ticket
from tests.coordinator.clients import http, lines_of
from tests.coordinator.fakes import (
    BIG,
    HASH_BIG,
    Done,
    FakeIsland,
    Holding,
    Pool,
    Running,
    Script,
    ask_big,
    big_job,
    coordinator,
    island,
    island_key,
    model,
    pool,
    room,
    roomy,
    shard,
)

WORDS = "one two three four five six"
NO = Refused(Code.NO_CAPACITY, "the disk is full")


def ticket_of(driver: FakeIsland) -> Ticket:
    return driver.tickets[-1]


async def refused(p: Pool, job: JobSpec | None = None) -> Refused:
    with pytest.raises(Refused) as caught:
        await p.run(job)
    return caught.value


async def together(p: Pool, count: int) -> list[Done]:
    """Jobs of their own, all at once."""
    done = [Done() for _ in range(count)]
    async with trio.open_nursery() as nursery:
        for number, one in enumerate(done):
            nursery.start_soon(p.dispatcher.run, big_job(job_id=f"job-{number}"), one.keep)
    return done


async def test_the_first_request_plans_orders_waits_and_runs(autojump_clock: trio.testing.MockClock) -> None:
    islands = [roomy(n, holding=Holding(delay_s=40.0)) for n in (1, 2, 3)]
    async with pool(*islands) as p:
        done = await p.run()
        assert trio.current_time() == pytest.approx(40, abs=1)  # longer than a job would wait for room
        assert done.text() == WORDS
        stages, (spare,) = p.stages, p.spares
        assert len(stages) == 2 and p.pipelines.planned == 1
        orders = [it.orders for it in stages]
        assert all(len(order) == 1 for order in orders) and not spare.orders
        layers = [order.layers for (order,) in orders]
        assert layers[0].low == 0 and layers[0].high == layers[1].low and layers[1].high == 12
        assert {order.cells for (order,) in orders} == {4096} and orders[0][0].manifest == BIG
        ticket = ticket_of(stages[-1])
        assert ticket.route == tuple(it.peer for it in stages) and ticket.boots == (1000, 1000)
        assert [stage.layers for stage in ticket.stages] == layers
        assert [stage.ask for stage in ticket.stages] == [it.ask for it in stages]
        assert ticket.content_hash == HASH_BIG and ticket.cargo == "big" and ticket.job_id == "job-1"
        (accepted,) = [e for e in done.events if isinstance(e, Accepted)]
        assert accepted.route == ticket.route and accepted.island == stages[-1].peer
        assert accepted.engine == "stage-1" and done.result().engines == ("stage-1",)
        await p.run()
        assert p.pipelines.planned == 1 and sum(len(it.orders) for it in islands) == 2


async def test_ten_requests_at_once_make_one_plan(autojump_clock: trio.testing.MockClock) -> None:
    islands = [roomy(n, holding=Holding(delay_s=5.0)) for n in (1, 2, 3)]
    async with pool(*islands) as p:
        done = await together(p, 10)
        assert [one.text() for one in done] == [WORDS] * 10
        assert p.pipelines.planned == 1 and [len(it.orders) for it in p.stages] == [1, 1]
        tickets = p.stages[-1].tickets
        assert len({t.nonce for t in tickets}) == len({t.job_id for t in tickets}) == 10


async def test_the_price_limit_is_that_of_all_stages(autojump_clock: trio.testing.MockClock) -> None:
    asks = [Ask(1000, 2000), Ask(10, 20_000)]
    async with pool(roomy(1, ask=asks[0]), roomy(2, ask=asks[1])) as p:
        await p.run()
        assert ticket_of(p.stages[-1]).price_limit_micros == Ask(1010, 22_000).price(64, 0)


async def test_a_stage_is_paid_what_its_ad_asks_for_the_model(autojump_clock: trio.testing.MockClock) -> None:
    """An Island may ask for one model something else than by default, and says so once it holds it."""
    dear = roomy(1, holding=Holding(shown={"ask": Ask(per_job=7777)}))
    async with pool(dear, roomy(2)) as p:
        await p.run()
        ticket = ticket_of(p.stages[-1])
        assert dict(zip(ticket.route, ticket.stages, strict=True))[dear.peer].ask == Ask(per_job=7777)
        assert ticket.price_limit_micros == 7777 + 2


async def test_one_island_that_has_room_gets_the_whole_model(autojump_clock: trio.testing.MockClock) -> None:
    large = roomy(3, 12, holding=Holding(delay_s=40.0))
    async with pool(roomy(1), roomy(2), large) as p:
        done = await p.run()
        (order,) = large.orders
        assert order.layers == LayerRange(0, 12) and done.text() == WORDS
        ticket = ticket_of(large)
        assert ticket.route == (large.peer,) and ticket.stages == () and not p.pipelines.status()
        await p.run()
        assert p.pipelines.planned == 1 and p.pipelines.given_up == 0


async def test_a_whole_model_that_no_ad_shows_is_planned_elsewhere(autojump_clock: trio.testing.MockClock) -> None:
    liar = roomy(3, 12, holding=Holding(hidden=True))
    async with pool(roomy(1), roomy(2), liar) as p:
        assert (await p.run()).text() == WORDS
        assert len(liar.orders) == 1 and liar not in p.stages


async def test_a_model_that_nobody_knows(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1), roomy(2)) as p:
        refusal = await refused(p, JobSpec("job-1", "other", bytes(32), (ask_big(),)))
        assert refusal.code is Code.UNKNOWN_CARGO and trio.current_time() == 0


async def test_nobody_offers_memory(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(island(1)) as p:
        refusal = await refused(p)
        assert refusal.code is Code.NO_ISLAND and refusal.message == "nobody offers memory for shards of big"
        assert trio.current_time() == pytest.approx(limits.ISLAND_WAIT_S)


async def test_too_little_memory_is_said_with_figures(autojump_clock: trio.testing.MockClock) -> None:
    small = [roomy(1, 3), roomy(2, 3)]
    async with pool(*small) as p:
        refusal = await refused(p)
        assert refusal.code is Code.NO_CAPACITY and "no capacity: big needs " in refusal.message
        assert str(sum(it.memory for it in small)) in refusal.message
        assert trio.current_time() == pytest.approx(limits.ISLAND_WAIT_S) and not small[0].orders


async def test_memory_that_is_offered_while_a_job_waits_is_used(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1)) as p, trio.open_nursery() as nursery:

        async def offer_more() -> None:
            await trio.sleep(3)
            p.port.advertise(roomy(2))

        nursery.start_soon(offer_more)
        assert (await p.run()).text() == WORDS
        assert 3 <= trio.current_time() < 4


def three(holding: Holding | None = None, **changes: Any) -> tuple[FakeIsland, list[FakeIsland]]:
    """Three equal Islands, two of which are enough; the one that is planned with first answers orders as ``holding`` says."""
    islands = sorted([roomy(n, **changes) for n in (1, 2, 3)], key=lambda it: it.peer)
    islands[0].holding = holding or Holding()
    return islands[0], islands[1:]


NOT_HELD = {
    "refuses": Holding(refuse=NO),
    "is gone": Holding(refuse=Refused(Code.LINK_LOST, "gone")),
    "gets no order that large": Holding(refuse=LocalProtocolError("the header is too large")),
    "claims what its ad does not show": Holding(hidden=True),
    "holds another model": Holding(shown={"content_hash": "dd" * 32}),
}


@pytest.mark.parametrize("name", NOT_HELD)
async def test_an_island_that_does_not_hold_is_left_out(name: str, autojump_clock: trio.testing.MockClock) -> None:
    bad, others = three(NOT_HELD[name])
    async with pool(bad, *others) as p:
        assert (await p.run()).text() == WORDS
        assert len(bad.orders) == 1 and sorted(it.peer for it in p.stages) == [it.peer for it in others]
        assert p.pipelines.planned == 2 and p.pipelines.given_up == 0


async def test_a_file_with_another_hash_than_the_manifest_lists(autojump_clock: trio.testing.MockClock) -> None:
    ranges = (LayerRange(0, 6), LayerRange(6, 12))
    sizes = tuple(BIG.weights_bytes(layers) for layers in ranges)
    manifest = model(shard_layers=ranges, shard_hashes=("e1" * 32, "e2" * 32), shard_bytes=sizes, shard_urls=("", ""))
    bad, others = three(Holding(shown={"shard_hash": "e3" * 32}))
    async with pool(bad, *others, manifest=manifest) as p:
        assert (await p.run()).text() == WORDS
        assert len(bad.orders) == 1 and bad not in p.stages
        assert {stage.layers for stage in ticket_of(p.stages[-1]).stages} == set(ranges)


async def test_nobody_takes_the_order(autojump_clock: trio.testing.MockClock) -> None:
    bad, others = three(Holding(refuse=NO))
    for it in others:
        it.holding = Holding(refuse=NO)
    async with pool(bad, *others) as p:
        refusal = await refused(p)
        assert refusal.code in (Code.NO_CAPACITY, Code.NO_ISLAND)
        assert trio.current_time() <= limits.CAPACITY_WAIT_S + 1
        assert sorted(len(it.orders) for it in p.port.islands.values()) == [0, 1, 1]
        for it in p.port.islands.values():
            it.holding = Holding()
        await trio.sleep(61)  # by then they are asked again
        assert (await p.run()).text() == WORDS


async def test_what_was_loaded_for_a_plan_that_failed_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """Who loaded gets its memory back, and who asks again is told at once what the other Island said, until it may be tried again."""
    bad, good = roomy(1, holding=Holding(refuse=NO, delay_s=2.0)), roomy(2)
    async with pool(bad, good) as p:
        refusal = await refused(p)
        assert "the disk is full" in refusal.message
        (order,) = good.orders
        assert p.port.drops == [(good.peer, order.layers)] and good.memory_used == 0 and not good.shards
        began_s = trio.current_time()
        assert "the disk is full" in (await refused(p)).message
        assert len(good.orders) == len(bad.orders) == 1 and p.pipelines.planned == 1
        assert trio.current_time() - began_s <= limits.ISLAND_WAIT_S
        bad.holding = Holding()
        await trio.sleep(61)
        assert (await p.run()).text() == WORDS and len(p.port.drops) == 1


async def test_layers_that_the_next_plan_uses_are_not_dropped(autojump_clock: trio.testing.MockClock) -> None:
    bad, others = three(Holding(refuse=NO))
    async with pool(bad, *others) as p:
        assert (await p.run()).text() == WORDS and p.pipelines.planned == 2
        ticket = ticket_of(p.stages[-1])
        used = [(peer, stage.layers) for peer, stage in zip(ticket.route, ticket.stages, strict=True)]
        held = [(it.peer, layers) for it in others for layers in it.shards]
        assert sorted(used) == sorted(held), "all that is held is used"
        assert not set(used) & set(p.port.drops)


async def test_loading_is_waited_for_but_not_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    frozen, others = three(Holding(delay_s=1e6))
    async with pool(frozen, *others, timeout_s=1e5) as p:
        refusal = await refused(p)
        assert refusal.code is Code.NO_CAPACITY and "is being loaded on several Islands" in refusal.message
        assert trio.current_time() == pytest.approx(limits.SHARD_LOAD_S, abs=1)
        assert (await p.run()).text() == WORDS and frozen not in p.stages


async def test_a_job_s_own_time_limit_comes_before_that_of_loading(autojump_clock: trio.testing.MockClock) -> None:
    frozen, others = three(Holding(delay_s=1e6))
    async with pool(frozen, *others, timeout_s=100.0) as p:
        assert (await refused(p)).code is Code.TIMEOUT
        assert trio.current_time() == pytest.approx(100)


async def test_leaving_while_layers_are_loaded_ends_everything(autojump_clock: trio.testing.MockClock) -> None:
    with trio.move_on_after(20):
        async with pool(*[roomy(n, holding=Holding(delay_s=100)) for n in (1, 2)]) as p:
            await p.run()
    assert trio.current_time() == pytest.approx(20)


async def test_an_island_that_restarts_has_lost_its_layers(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1), roomy(2)) as p:
        await p.run()
        before = p.stages
        first = before[0]
        first.restart()
        p.port.advertise(first)
        assert (await p.run()).text() == WORDS
        assert p.stages == before and len(first.orders) == 2 and len(before[1].orders) == 1
        assert ticket_of(before[1]).boots == (1001, 1000) and first.orders[1].boot == 1001
        assert p.pipelines.mended == 1 and p.pipelines.planned == 1


@pytest.mark.parametrize("index", [0, 1])
async def test_an_island_that_drains_is_replaced(index: int, autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1), roomy(2), roomy(3)) as p:
        await p.run()
        leaving, (spare,) = p.stages[index], p.spares
        kept = p.stages[1 - index]
        p.port.advertise(leaving, draining=True)
        assert (await p.run()).text() == WORDS
        assert p.stages[index] is spare and p.stages[1 - index] is kept
        assert spare.orders[0].layers == leaving.orders[0].layers and spare.orders[0].cells == leaving.orders[0].cells


async def test_draining_without_a_spare(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1), roomy(2)) as p:
        await p.run()
        p.port.advertise(p.stages[0], draining=True, memory_free_bytes=0)
        refusal = await refused(p)
        assert refusal.code in (Code.NO_CAPACITY, Code.NO_ISLAND)
        assert trio.current_time() <= limits.MEND_WAIT_S + 1 and p.pipelines.given_up == 1


async def test_a_stage_whose_engine_restarts_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """Its layers are out of the ad for a moment, and its memory is still taken: nothing else is loaded."""
    async with pool(roomy(1), roomy(2), roomy(3)) as p:
        await p.run()
        before, (spare,) = p.stages, p.spares
        p.port.advertise(before[0], shards=())
        assert (await p.run()).text() == WORDS
        assert p.stages == before and not spare.orders


async def test_models_that_could_be_planned_are_listed(autojump_clock: trio.testing.MockClock) -> None:
    small = island(1)
    async with pool(small) as p:
        assert list(p.placer.cargos()) == ["echo"]
        p.port.advertise(roomy(2))
        assert set(p.placer.cargos()) == {"echo", "big"}
        p.port.advertise(p.port.islands[island_key(2).peer_id], draining=True)
        assert set(p.placer.cargos()) == {"echo"}


async def test_a_model_is_listed_while_its_layers_take_all_the_memory(autojump_clock: trio.testing.MockClock) -> None:
    one, two = roomy(1), roomy(2)
    for it in (one, two):
        it.memory = room(0, 6) + 10_000
    async with pool(one, two) as p:
        one.holding, two.holding = Holding(delay_s=5), Holding(delay_s=20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.run)
            await trio.sleep(1)
            for it in (one, two):  # what is being loaded is set aside
                p.port.advertise(it, memory_free_bytes=0)
            await trio.sleep(1)
            assert "big" in p.placer.cargos()
        for it in (one, two):
            p.port.advertise(it, memory_free_bytes=0)
        assert "big" in p.placer.cargos()


async def test_layers_that_are_held_make_a_model_after_the_coordinator_was_restarted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    halves = [roomy(1), roomy(2)]
    for it, layers in zip(halves, (LayerRange(0, 5), LayerRange(5, 12)), strict=True):
        it.shards[layers] = shard(BIG, layers)
        it.memory_used = it.memory
    async with pool(*halves) as p:
        assert "big" in p.placer.cargos()
        assert (await p.run()).text() == WORDS
        assert p.stages == halves


@pytest.mark.parametrize("slow_stage", [0, 1])
async def test_a_busy_pipeline_makes_jobs_wait(slow_stage: int, autojump_clock: trio.testing.MockClock) -> None:
    """As many jobs at once as the stage with the fewest slots takes, whichever was loaded last."""
    first, others = three()
    islands = [first, others[0]]
    async with pool(*islands) as p:
        for number, it in enumerate(islands):
            it.scripts = [Script(token_s=1.0)]
            it.holding = Holding(delay_s=2.0 if number == slow_stage else 1.0, shown={"slots": 2 + 3 * number})
        done = await together(p, 5)
        assert [one.text() for one in done] == [WORDS] * 5
        assert p.stages[-1].open_max == 2
        assert trio.current_time() == pytest.approx(2 + 3 * 6, abs=1)


async def test_a_pipeline_without_free_cells_is_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(roomy(1), roomy(2)) as p:
        await p.run()
        driver = p.stages[-1]
        driver.scripts = [Script(refuse=Refused(Code.NO_CAPACITY, "no cells"), times=3)]
        assert (await p.run()).text() == WORDS
        assert p.statistics.refusals[Code.NO_CAPACITY] == 3 and trio.current_time() < 3
        assert p.pipelines.planned == 1 and p.pipelines.mended == 0


async def test_who_offers_the_whole_model_is_asked_first(autojump_clock: trio.testing.MockClock) -> None:
    whole = island(9, name="big", content_hash=HASH_BIG)
    async with pool(roomy(1), roomy(2), whole) as p:
        assert (await p.run()).text() == WORDS
        assert len(whole.tickets) == 1 and p.pipelines.planned == 0


async def test_a_guess_of_the_length_refuses_nobody(autojump_clock: trio.testing.MockClock) -> None:
    """Only the Island counts tokens, so a long text is treated alike whether the model is loaded already or not."""
    long = ask_big("word " * 6000, max_tokens=4)  # taken for 10,000 tokens; a context has 8,192
    async with pool(roomy(1), roomy(2)) as p:
        done = await p.run(big_job(long))
        assert len(done.text().split()) == 4
        again = await p.run(big_job(long))
        assert again.text() == done.text()


async def test_waiting_for_room_does_not_plan_over_and_over(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is a search: the same facts are not searched again for each job that waits."""
    tries = [0]

    def counted(*arguments: Any) -> Plan | NoPlan:
        tries[0] += 1
        return plan(*arguments)

    monkeypatch.setattr("coordinator.pipelines.plan", counted)
    async with pool(roomy(1, 3), roomy(2, 3)) as p, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(refused, p, big_job(job_id=f"job-{number}"))
    assert tries[0] == 1


# -- what the client sees

ASK_BIG = {"model": "big", "messages": [{"role": "user", "content": "one two three four five"}]}
TEXT = "one two three four five"


@asynccontextmanager
async def serving(folder: Path, *islands: FakeIsland) -> AsyncIterator[tuple[Running, Any]]:
    async with coordinator(folder, *islands, manifests={"big": BIG}) as running, http(running) as client:
        yield running, client


def check_route(metadata: dict[str, Any], stages: list[FakeIsland]) -> None:
    assert [share["island"] for share in metadata["route"]] == [it.peer for it in stages]
    for number, (share, it) in enumerate(zip(metadata["route"], stages, strict=True), 1):
        (order,) = it.orders
        assert share == {
            "island": it.peer,
            "layers": str(order.layers),
            "ask": f"0.00000{it.ask.per_job}+0+0",
            "compute_ms": number,
            "held_ms": 2 * number,
        }
    assert metadata["wire_ms"] == 0.5 and metadata["stages_replaced"] == 0


async def test_a_whole_answer_names_its_route(tmp_path: Path) -> None:
    async with serving(tmp_path, roomy(1), roomy(2)) as (running, client):
        answer = await client.post("/v1/chat/completions", json=ASK_BIG)
        listed = (await client.get("/v1/models")).json()
        stages = [running.port.islands[stage["island"]] for stage in running.server.pipelines.status()[0]["stages"]]
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == TEXT
    assert answer.headers["x-archipelag-route"] == ",".join(it.peer for it in stages)
    assert answer.headers["x-archipelag-island"] == stages[-1].peer
    first, last = (str(it.orders[0].layers) for it in stages)
    timing = answer.headers["server-timing"]
    assert timing.endswith(f", stage0;dur=1.00;desc={first}, stage1;dur=2.00;desc={last}, wire;dur=0.50")
    check_route(body["metadata"], stages)
    assert body["system_fingerprint"] == "stage-1" and [m["id"] for m in listed["data"]] == ["big"]


async def test_a_streamed_answer_names_its_route(tmp_path: Path) -> None:
    async with serving(tmp_path, roomy(1), roomy(2)) as (running, client):
        response = await client.post("/v1/chat/completions", json={**ASK_BIG, "stream": True})
        data = [line async for line in lines_of(response)]
        stages = [running.port.islands[stage["island"]] for stage in running.server.pipelines.status()[0]["stages"]]
    assert response.headers["x-archipelag-route"] == ",".join(it.peer for it in stages)
    assert "place;dur=" in response.headers["server-timing"]
    chunks = [json.loads(line) for line in data[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == TEXT
    check_route(chunks[-1]["metadata"], stages)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replaced_stage_is_told(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path, roomy(1), roomy(2), roomy(3)) as (running, client):
        await client.post("/v1/chat/completions", json=ASK_BIG)
        stages = [running.port.islands[stage["island"]] for stage in running.server.pipelines.status()[0]["stages"]]
        stages[-1].scripts = [Script(complain_after=2, times=1)]
        answer = await client.post("/v1/chat/completions", json={**ASK_BIG, "stream": stream})
        after = [running.port.islands[stage["island"]] for stage in running.server.pipelines.status()[0]["stages"]]
        data = [line async for line in lines_of(answer)] if stream else []
    metadata = (json.loads(data[-2]) if stream else answer.json())["metadata"]
    assert [share["island"] for share in metadata["route"]] == [stages[0].peer, *(it.peer for it in after)]
    assert metadata["route"][0]["layers"] is None and metadata["route"][0]["compute_ms"] == 0.01
    assert metadata["stages_replaced"] == 1 and "islands" not in metadata
    route = stages if stream else after  # headers of a stream have gone out before the break
    assert answer.headers["x-archipelag-route"] == ",".join(it.peer for it in route)
    if not stream:
        assert "stage0;dur=0.01;desc=replaced" in answer.headers["server-timing"]


async def test_the_route_of_an_answer_that_ends_on_one_island(tmp_path: Path) -> None:
    """It began in a pipeline whose driver failed, and meanwhile somebody offers the whole model."""
    whole = island(9, name="big", content_hash=HASH_BIG)
    async with serving(tmp_path, roomy(1), roomy(2)) as (running, client):
        await client.post("/v1/chat/completions", json=ASK_BIG)
        driver = running.port.islands[running.server.pipelines.status()[0]["stages"][-1]["island"]]
        driver.scripts = [Script(fail_after=2, times=1)]

        async def come() -> None:
            with trio.fail_after(5):
                while not running.server.statistics()["waiting"]:
                    await trio.sleep(0.005)
            running.port.advertise(whole)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            # it asks far more than the pipeline, so the market's bid would not do
            answer = await client.post("/v1/chat/completions", json={**ASK_BIG, "bid_price": "1"})
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert answer.headers["x-archipelag-island"] == answer.headers["x-archipelag-route"] == whole.peer
    assert "wire" not in answer.headers["server-timing"] and "route" not in answer.json()["metadata"]


async def test_an_answer_that_another_engine_and_another_driver_continued(tmp_path: Path) -> None:
    async with serving(tmp_path, roomy(1), roomy(2)) as (running, client):
        await client.post("/v1/chat/completions", json=ASK_BIG)
        first, driver = (running.port.islands[s["island"]] for s in running.server.pipelines.status()[0]["stages"])
        helper = roomy(3, holding=Holding(shown={"engine": "stage-2"}))
        running.port.advertise(helper)
        driver.scripts = [Script(complain_after=2, complaint=(1, Code.LINK_LOST), times=1)]
        answer = await client.post("/v1/chat/completions", json={**ASK_BIG, "bid_price": "1"})
    body = answer.json()
    assert body["choices"][0]["message"]["content"] == TEXT
    assert body["metadata"]["spliced_engines"] == ["stage-1", "mixed/stage-1+stage-2"]
    assert body["metadata"]["islands"] == [driver.peer, helper.peer]
    assert [share["island"] for share in body["metadata"]["route"]] == [first.peer, helper.peer]
    assert answer.headers["x-archipelag-route"] == f"{first.peer},{helper.peer}"
    assert answer.headers["x-archipelag-island"] == helper.peer


async def test_errors_of_models_over_several_islands(tmp_path: Path) -> None:
    async with (
        coordinator(tmp_path, roomy(1, 3), manifests={"big": BIG}, capacity_wait_s=0.2) as running,
        http(running) as client,
    ):
        small = await client.post("/v1/chat/completions", json=ASK_BIG)
        other = await client.post("/v1/chat/completions", json={**ASK_BIG, "model": "other"})
    assert small.status_code == 503 and small.json()["error"]["code"] == "no_capacity"
    assert "big needs" in small.json()["error"]["message"]
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"
