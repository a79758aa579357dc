"""Pipelines that lose an Island in the middle of answers: the route is mended, or the answer begins anew, or the job fails clearly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from protocol import limits
from protocol.errors import Code, Refused
from tests.coordinator.fakes import (
    BIG,
    Done,
    FakeIsland,
    Holding,
    Pool,
    Script,
    ask_big,
    big_job,
    pool,
    roomy,
    shard,
)

WORDS = "one two three four five six"
SLOW = Code.NO_CAPACITY


def three() -> list[FakeIsland]:
    """Three stages, each with room for not much more than its part."""
    return [roomy(n, 5) for n in (1, 2, 3)]


def spare(number: int = 9, **changes: object) -> FakeIsland:
    return roomy(number, 5, **changes)


async def while_running(p: Pool, what: Callable[[], Awaitable[None]], count: int = 1, after_s: float = 2.5) -> list[Done]:
    """Runs jobs whose tokens take a second each, and ``what`` in the middle of them."""
    done = [Done() for _ in range(count)]
    p.stages[-1].scripts = [Script(token_s=1.0)]
    async with trio.open_nursery() as nursery:
        for number, one in enumerate(done):
            nursery.start_soon(p.dispatcher.run, big_job(job_id=f"job-{number}"), one.keep)
        await trio.sleep(after_s)
        await what()
    return done


async def fails(p: Pool, what: Callable[[], Awaitable[None]]) -> Refused:
    refusals: list[Refused] = []
    p.stages[-1].scripts = [Script(token_s=1.0)]

    async def run() -> None:
        with pytest.raises(Refused) as caught:
            await p.run()
        refusals.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(2.5)
        await what()
    return refusals[0]


@pytest.mark.parametrize("index", [0, 1])
async def test_a_spare_takes_exactly_the_lost_layers(index: int, autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before, helper = p.stages, spare()
        driver, lost = before[-1], before[index]
        p.port.advertise(helper)

        async def lose() -> None:
            p.port.lose(lost)

        (done,) = await while_running(p, lose)
        assert done.text() == WORDS and driver.broken == [index]
        (order,) = helper.orders
        assert (order.layers, order.cells, order.boot) == (lost.orders[0].layers, lost.orders[0].cells, helper.boot)
        (mended,) = driver.mends
        old = driver.tickets[-1]
        for number in range(3):
            if number != index:
                assert (mended.route[number], mended.boots[number], mended.stages[number]) == (
                    old.route[number],
                    old.boots[number],
                    old.stages[number],
                )
        assert mended.route[index] == helper.peer and mended.stages[index].layers == old.stages[index].layers
        assert mended.stages[index].ask == helper.ask and mended.job_id == old.job_id and mended.nonce != old.nonce
        result = done.result()
        assert result.mended == 1 and result.islands == (driver.peer,) and result.engines == ("stage-1",)
        assert result.stages[0].layers == "" and result.stages[0].island == lost.peer
        assert [share.island for share in result.stages[1:]] == list(mended.route)
        counts = p.statistics
        assert counts.routes_broken == counts.routes_mended == 1
        assert counts.attempts == 2 and counts.workers_ended == counts.takeovers_mid_stream == 0


async def test_two_stages_that_are_lost_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        driver, helpers = p.stages[-1], [spare(8), spare(9)]
        for helper in helpers:
            helper.holding = Holding(delay_s=2.0)
            p.port.advertise(helper)

        async def lose() -> None:
            for it in p.stages[:2]:
                p.port.lose(it)

        (done,) = await while_running(p, lose)
        assert done.text() == WORDS and {it.peer for it in p.stages[:2]} == {it.peer for it in helpers}
        assert len(driver.mends) == 1


async def test_many_jobs_report_one_break_and_it_is_mended_once(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        driver, helper = p.stages[-1], spare(holding=Holding(delay_s=3.0))
        p.port.advertise(helper)

        async def lose() -> None:
            p.port.lose(p.stages[0])

        done = await while_running(p, lose, count=5)
        assert [one.text() for one in done] == [WORDS] * 5
        assert len(helper.orders) == 1 and p.pipelines.mended == 1 and driver.broken == [0] * 5
        assert sorted(t.job_id for t in driver.mends) == [f"job-{n}" for n in range(5)]
        tickets = driver.mends + driver.tickets
        assert len({t.nonce for t in tickets}) == len(tickets)
        assert p.statistics.routes_mended == 5


async def test_choices_of_one_request_have_ids_of_their_own(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        driver = p.stages[-1]
        p.port.advertise(spare())
        driver.scripts = [Script(token_s=1.0)]
        driver.tickets.clear()
        done = Done()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.dispatcher.run, big_job(*[ask_big()] * 3), done.keep)
            await trio.sleep(2.5)
            p.port.lose(p.stages[1])
        assert [done.text(n) for n in range(3)] == [WORDS] * 3
        ids = ["job-1.0", "job-1.1", "job-1.2"]
        assert sorted(t.job_id for t in driver.tickets) == sorted(t.job_id for t in driver.mends) == ids


async def test_a_late_report_gets_the_route_as_it_is_by_then(autojump_clock: trio.testing.MockClock) -> None:
    """A second helper was lost meanwhile, before anybody asked for it: that is mended too, and no job fails."""
    async with pool(*three()) as p:
        await p.run()
        driver = p.stages[-1]
        driver.scripts = [Script(token_s=1.0, times=1), Script(token_s=7.0, times=1)]
        done = [Done(), Done()]
        helpers = [spare(8), spare(9)]
        p.port.advertise(helpers[0])
        async with trio.open_nursery() as nursery:
            for number, one in enumerate(done):
                nursery.start_soon(p.dispatcher.run, big_job(job_id=f"job-{number}"), one.keep)
            await trio.sleep(2.5)
            p.port.lose(p.stages[0])
            await trio.sleep(3.9)  # the first job has ended on the mended route
            assert helpers[0] in p.stages
            p.port.lose(helpers[0])
            p.port.advertise(helpers[1])
        assert [one.text() for one in done] == [WORDS] * 2 and helpers[1] in p.stages
        assert driver.mends[-1].route[0] == helpers[1].peer


async def test_the_lost_island_comes_back_as_another_run(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        lost = before[0]

        async def restart() -> None:
            p.port.lose(lost)
            await trio.sleep(10)
            lost.restart()
            p.port.advertise(lost)

        (done,) = await while_running(p, restart)
        assert done.text() == WORDS and p.stages == before and lost.orders[-1].boot == 1001
        assert before[-1].mends[0].boots == (1001, 1000, 1000)
        assert all(share.layers for share in done.result().stages)


async def test_nobody_holds_the_layers(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        lost = before[1]

        async def lose() -> None:
            p.port.lose(lost)

        refusal = await fails(p, lose)
        assert refusal.code is Code.NO_ISLAND
        assert f"nobody holds layers {lost.orders[0].layers} of big" in refusal.message
        assert limits.MEND_WAIT_S <= trio.current_time() - 2.5 <= limits.MEND_WAIT_S + 1
        assert p.pipelines.given_up == 1 and not p.pipelines.status()
        p.port.advertise(spare())
        before[-1].scripts = []
        assert (await p.run()).text() == WORDS and p.pipelines.planned == 2


async def test_those_who_hold_the_layers_have_no_cells(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        lost, busy = p.stages[1], spare(memory_used=spare().memory)
        layers = lost.orders[0].layers
        busy.shards[layers] = shard(BIG, layers, 256)
        p.port.advertise(busy)

        async def lose() -> None:
            p.port.lose(lost)

        refusal = await fails(p, lose)
        assert refusal.code is Code.NO_CAPACITY and "no capacity" in refusal.message
        assert trio.current_time() - 2.5 <= limits.MEND_WAIT_S + 1


async def test_a_spare_that_refuses_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        helpers = sorted([spare(8), spare(9)], key=lambda it: it.peer)
        for helper in helpers:
            helper.ask = spare().ask
            p.port.advertise(helper)
        helpers[0].holding = Holding(refuse=Refused(Code.NO_CAPACITY, "no"))

        async def lose() -> None:
            p.port.lose(p.stages[0])

        (done,) = await while_running(p, lose)
        assert done.text() == WORDS and p.stages[0] is helpers[1] and len(helpers[0].orders) == 1


async def test_a_spare_that_only_claims_to_hold(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        p.port.advertise(spare(holding=Holding(hidden=True)))

        async def lose() -> None:
            p.port.lose(p.stages[0])

        refusal = await fails(p, lose)
        assert refusal.code is Code.NO_ISLAND and trio.current_time() - 2.5 <= limits.MEND_WAIT_S + 1


async def test_a_route_that_takes_long_to_load_outlives_the_job_that_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """A job waits its time and fails; what is being loaded for it serves the next one."""
    async with pool(*three()) as p:
        await p.run()
        helper = spare(holding=Holding(delay_s=3 * limits.MEND_WAIT_S))
        p.port.advertise(helper)

        async def lose() -> None:
            p.port.lose(p.stages[1])

        refusal = await fails(p, lose)
        assert refusal.code is Code.NO_ISLAND and "was not replaced in time" in refusal.message
        assert trio.current_time() - 2.5 == pytest.approx(limits.MEND_WAIT_S, abs=1)
        p.stages[-1].scripts = []
        assert (await p.run()).text() == WORDS
        assert trio.current_time() - 2.5 == pytest.approx(3 * limits.MEND_WAIT_S, abs=1)
        assert len(helper.orders) == 1 and p.pipelines.planned == p.pipelines.mended == 1 and p.pipelines.given_up == 0


async def test_a_route_that_breaks_again_and_again_ends_its_job(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        driver = p.stages[-1]
        driver.scripts = [Script(complain_after=2, complaint=(1, SLOW), complaints=100)]
        with pytest.raises(Refused) as caught:
            await p.run()
        assert caught.value.code is Code.NO_ISLAND
        assert f"broke {limits.JOB_ATTEMPTS_MAX + 1} times without a token in between" in caught.value.message
        assert len(driver.mends) == limits.JOB_ATTEMPTS_MAX and driver.open_now == 0


async def test_a_slow_stage_without_a_spare_stays(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        before[-1].scripts = [Script(complain_after=2, complaint=(1, SLOW))]
        done = await p.run()
        assert done.text() == WORDS and p.stages == before and trio.current_time() < 1
        assert done.result().mended == p.statistics.routes_mended == 0
        (again,) = before[-1].mends
        assert again.route == before[-1].tickets[-1].route and p.pipelines.mended == 0


async def test_a_slow_stage_is_replaced_by_a_spare(autojump_clock: trio.testing.MockClock) -> None:
    """Both jobs that complain get the new route, though there is no second spare for the second one."""
    async with pool(*three()) as p:
        await p.run()
        slow, driver, helper = p.stages[1], p.stages[-1], spare()
        p.port.advertise(helper)
        driver.scripts = [
            Script(complain_after=2, complaint=(1, SLOW), times=1),
            Script(token_s=1.0, complain_after=3, complaint=(1, SLOW), times=1),
        ]
        done = [Done(), Done()]
        async with trio.open_nursery() as nursery:
            for number, one in enumerate(done):
                nursery.start_soon(p.dispatcher.run, big_job(job_id=f"job-{number}"), one.keep)
        assert [one.text() for one in done] == [WORDS] * 2
        assert p.stages[1] is helper and p.pipelines.mended == 1
        assert [t.route[1] for t in driver.mends] == [helper.peer] * 2 and slow.peer != helper.peer


async def test_a_slow_stage_stays_where_the_spare_refuses(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        p.port.advertise(spare(holding=Holding(refuse=Refused(Code.NO_CAPACITY, "no"))))
        before[-1].scripts = [Script(complain_after=2, complaint=(1, SLOW))]
        assert (await p.run()).text() == WORDS
        assert p.stages == before and trio.current_time() < 5


async def test_a_replacement_with_another_engine(autojump_clock: trio.testing.MockClock) -> None:
    """The answer begins anew behind what was delivered, on the same driver, also for a job that reports late."""
    async with pool(*three()) as p:
        await p.run()
        driver, helper = p.stages[-1], spare(holding=Holding(shown={"engine": "stage-2"}))
        p.port.advertise(helper)
        driver.requests.clear()
        driver.scripts = [Script(token_s=1.0, times=1), Script(token_s=4.0, times=1)]
        done = [Done(), Done()]
        async with trio.open_nursery() as nursery:
            for number, one in enumerate(done):
                nursery.start_soon(p.dispatcher.run, big_job(job_id=f"job-{number}"), one.keep)
            await trio.sleep(2.5)
            p.port.lose(p.stages[0])
        assert [one.text() for one in done] == [WORDS] * 2
        for one in done:
            assert one.result().engines == ("stage-1", "mixed/stage-1+stage-2")
            assert one.result().completion_tokens == 6
        assert sorted(len(r.resume) // 4 for r in driver.requests) == [0, 0, 1, 3]
        assert p.statistics.splices_across_engines == 2 and p.statistics.workers_ended == 0
        assert not driver.mends and trio.current_time() < 10


async def test_another_island_takes_the_place_of_the_driver(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before, helper = p.stages, spare(holding=Holding(delay_s=5.0))
        driver = before[-1]
        p.port.advertise(helper)

        async def lose() -> None:
            p.port.lose(driver)

        (done,) = await while_running(p, lose)
        assert done.text() == WORDS and p.stages == [*before[:2], helper]
        (request,) = helper.requests
        assert len(request.resume) // 4 == 2 and helper.tickets[0].job_id == driver.tickets[-1].job_id
        assert helper.orders[0].layers == driver.orders[0].layers
        result = done.result()
        assert result.islands == (driver.peer, helper.peer) and result.engines == ("stage-1",)
        assert p.statistics.workers_ended == 0 and p.statistics.takeovers_mid_stream == 1
        assert p.pipelines.planned == 1 and p.pipelines.mended == 1


async def test_a_driver_whose_link_is_lost_while_its_ad_still_stands(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before, helper = p.stages, spare()
        p.port.advertise(helper)
        before[-1].scripts = [Script(fail_after=2)]
        done = await p.run()
        assert done.text() == WORDS and done.result().islands == (before[-1].peer, helper.peer)
        assert p.stages == [*before[:2], helper] and trio.current_time() < 1
        assert p.statistics.workers_ended == 0


async def test_the_driver_comes_back_as_another_run(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        driver = before[-1]

        async def restart() -> None:
            p.port.lose(driver)
            await trio.sleep(10)
            driver.restart()
            p.port.advertise(driver)

        (done,) = await while_running(p, restart)
        assert done.text() == WORDS and p.stages == before and done.result().islands == (driver.peer,)


async def lose_links(p: Pool, driver: FakeIsland, scripts: list[Script]) -> Done | Refused:
    """Each time that the link to the driver is lost, the driver says a newer ad soon after."""
    driver.scripts = scripts

    async def say() -> None:
        while True:
            await trio.sleep(0.5)
            p.port.advertise(driver)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(say)
        try:
            return await p.run(big_job(ask_big(" ".join("abcdefghijklmnopqrst"))))
        except Refused as refusal:
            return refusal
        finally:
            nursery.cancel_scope.cancel()


async def test_many_lost_drivers_do_not_end_a_job_that_grows(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        count = 2 * limits.JOB_ATTEMPTS_MAX
        done = await lose_links(p, p.stages[-1], [Script(fail_after=1, times=count), Script()])
        assert isinstance(done, Done) and done.text().split() == list("abcdefghijklmnopqrst") and done.result().completion_tokens == 20
        assert p.statistics.attempts == 2 + count and p.statistics.workers_ended == 0


@pytest.mark.parametrize("fail_after", [0, None])
async def test_many_lost_drivers_end_a_job_that_does_not_grow(
    fail_after: int | None, autojump_clock: trio.testing.MockClock
) -> None:
    gone = Refused(Code.LINK_LOST, "no connection")
    async with pool(*three()) as p:
        await p.run()
        script = Script(fail_after=0) if fail_after == 0 else Script(fail_open=gone)
        refusal = await lose_links(p, p.stages[-1], [script])
        assert isinstance(refusal, Refused) and refusal.code is Code.LINK_LOST
        assert p.statistics.attempts == 1 + limits.JOB_ATTEMPTS_MAX and p.statistics.workers_ended == 0


async def test_a_job_that_ends_two_workers_fails(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        refusal = await lose_links(p, p.stages[-1], [Script(fail_after=2, failure=Code.WORKER_DIED)])
        assert isinstance(refusal, Refused) and refusal.code is Code.WORKER_DIED
        assert "the job ended 2 workers" in refusal.message
        assert p.statistics.workers_ended == 2 and p.statistics.attempts == 3


async def test_a_driver_that_names_a_stage_that_is_none(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        p.stages[-1].scripts = [Script(complain_after=1, complaint=(7, Code.LINK_LOST))]
        with pytest.raises(Refused) as caught:
            await p.run()
        assert caught.value.code is Code.INTERNAL and p.pipelines.mended == p.pipelines.given_up == 0


async def test_a_report_of_an_earlier_run_breaks_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before, helper = p.stages, spare()
        p.port.advertise(helper)
        before[-1].scripts = [Script(complain_after=2, complaint_boot=before[0].boot - 1)]
        done = await p.run()
        assert done.text() == WORDS and p.stages == before and not helper.orders
        assert len(before[-1].mends) == 1 and done.result().mended == 0


async def test_leaving_while_a_route_is_mended(autojump_clock: trio.testing.MockClock) -> None:
    async with pool(*three()) as p:
        await p.run()
        before = p.stages
        before[-1].scripts = [Script(token_s=1.0)]
        with trio.move_on_after(10) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(p.run)
                await trio.sleep(2.5)
                p.port.lose(before[0])
        assert scope.cancelled_caught and before[-1].open_now == 0
        before[0].restart()
        p.port.advertise(before[0])
        before[-1].scripts = []
        assert (await p.run()).text() == WORDS and p.stages == before
