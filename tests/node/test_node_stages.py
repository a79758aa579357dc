"""A ring of stages over real hosts: rows go straight from peer to peer, share frames and batches, and leave nothing behind."""

from __future__ import annotations

import pytest
import trio

from node.route_driver import RouteState
from protocol.errors import Code
from protocol.prices import Ask
from protocol.shards import LayerRange
from protocol.tickets import TicketStage
from tests.node.stage_net import SLOTS, EchoDriver, expected_rows, open_stage_net, wait_until

PROMPT = list(range(3, 40))


@pytest.mark.parametrize("stages", [2, 3, 5])
async def test_rows_go_straight_from_peer_to_peer(stages: int) -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(stages)
        outsider = await net.island()
        sequence = driver.begin(1, net.ticket(route))
        tokens = [*PROMPT, 7, 8, 9, 10]
        rows = await _steps(driver, sequence, PROMPT, *([token] for token in (7, 8, 9, 10)))
        assert rows == expected_rows(tokens, stages - 1)
        steps = 5
        for number, island in enumerate(route[:-1]):
            assert island.counts["frames_forwarded"] == steps and island.engine.rows == len(tokens)
            assert island.neighbours.opened == [route[number + 1].peer], "each stage pushes to the next one, and opens nothing else"
            assert island.served == [route[number - 1].peer]
        assert route[-1].neighbours.opened == [route[0].peer] and route[-1].served == [route[-2].peer]
        neighbours = {n: {route[n - 1].peer, route[(n + 1) % stages].peer} for n in range(stages)}
        assert all(set(island.host.connected_peers()) == neighbours[n] for n, island in enumerate(route))
        assert not outsider.host.connected_peers() and not outsider.served
        assert driver.driver.counts.steps_sent == driver.driver.counts.steps_arrived == steps
        assert driver.driver.engines == ("echo/1",) * (stages - 1)


async def test_two_jobs_share_a_frame_and_a_batch() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        first, second = driver.begin(1, net.ticket(route)), driver.begin(2, net.ticket(route))
        rows = await driver.values((first, 0, PROMPT), (second, 0, [1, 2]))
        assert rows == [*expected_rows(PROMPT, 2), *expected_rows([1, 2], 2)]
        for island in route[:-1]:
            assert (island.counts["batches"], island.counts["frames_forwarded"]) == (1, 1), "one of each for both"


async def test_chunks_of_a_prompt_flow_one_behind_the_other() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(4)
        sequence = driver.begin(1, net.ticket(route))
        chunks = [PROMPT[n : n + 8] for n in range(0, len(PROMPT), 8)]
        route[2].engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            rows = [driver.step_nowait(nursery, (sequence, 8 * n, chunk)) for n, chunk in enumerate(chunks)]
            await wait_until(lambda: route[1].counts.get("frames_forwarded") == len(chunks))
            assert route[0].engine.rows == route[1].engine.rows == len(PROMPT) and not route[2].engine.rows
            assert driver.steps_waiting == len(chunks), "all of them are under way at once"
            route[2].engine.is_stopped = False
        assert [row for part in rows for row in part] == expected_rows(PROMPT, 3)


async def test_many_sequences_and_their_ends() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        sequences = {job: driver.begin(job, net.ticket(route), declared=64) for job in range(1, SLOTS + 1)}
        rows: dict[int, list[float]] = {}
        async with trio.open_nursery() as nursery:
            for job, sequence in sequences.items():
                rows[job] = driver.step_nowait(nursery, (sequence, 0, PROMPT[:job]))
        assert all(rows[job] == expected_rows(PROMPT[:job], 2) for job in sequences)
        one_more = driver.begin(99, net.ticket(route), declared=64)
        await wait_until(lambda: driver.failed)
        assert driver.failed[0].code is Code.NO_CAPACITY and "stage 0" in driver.failed[0].message
        driver.over(99, one_more)
        for job, sequence in sequences.items():
            driver.over(job, sequence)
        await wait_until(lambda: not any(island.engine.cells for island in route[:-1]))
        assert all(island.stage.status()["kept_bytes"] == 0 for island in route[:-1])
        again = [driver.begin(100 + n, net.ticket(route), declared=64) for n in range(SLOTS)]
        rows_again = await driver.values(*((sequence, 0, [5]) for sequence in again))
        assert rows_again == expected_rows([5], 2) * SLOTS, "every slot is free again"


async def test_a_fork_shares_the_rows_of_its_source() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        source = driver.begin(1, net.ticket(route))
        await driver.step((source, 0, PROMPT))
        fork = driver.begin(2, net.ticket(route), source=source, shared=len(PROMPT))
        rows = await driver.values((source, len(PROMPT), [1]), (fork, len(PROMPT), [2]))
        assert rows == [expected_rows([*PROMPT, token], 2)[-1] for token in (1, 2)]
        assert all(island.engine.rows == len(PROMPT) + 2 for island in route[:-1]), "the prompt was computed once"
        driver.over(1, source)
        driver.over(2, fork)
        await wait_until(lambda: not any(island.engine.cells for island in route[:-1]))
        assert all(island.stage.status()["kept_bytes"] == 0 for island in route[:-1])


async def test_a_job_that_is_over_leaves_the_steps_of_others_whole() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        first, second = driver.begin(1, net.ticket(route)), driver.begin(2, net.ticket(route))
        await driver.step((first, 0, [1]), (second, 0, [2]))
        route[1].engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            rows = driver.step_nowait(nursery, (first, 1, [3]), (second, 1, [4]))
            alone = driver.step_nowait(nursery, (first, 2, [5]))
            await wait_until(lambda: route[0].counts.get("frames_forwarded") == 3)
            driver.over(1, first)
            await wait_until(lambda: alone)
            route[1].engine.is_stopped = False
        assert alone == [0.0] and rows == [0.0, expected_rows([2, 4], 2)[-1]]


async def test_sequences_that_end_under_way_do_not_hold_up_their_steps() -> None:
    """The engine may end one of a job's sequences alone; what is under way with it is over then."""
    async with open_stage_net() as net:
        route, driver = await net.ring(2)
        sequence = driver.begin(1, net.ticket(route))
        route[0].engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            rows = driver.step_nowait(nursery, (sequence, 0, [1]))
            await wait_until(lambda: route[0].engine.waiting == 0 and driver.driver.counts.steps_sent)
            driver.driver.end_sequences((sequence,))
            await wait_until(lambda: rows)
        assert rows == [0.0]


async def test_stages_that_changed_their_price_serve_jobs_of_the_same_route() -> None:
    """A ticket for another route, or for other layers, is refused; what a job costs is for those who pay."""
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        first = driver.begin(1, net.ticket(route))
        await driver.step((first, 0, [1]))
        dearer = tuple(TicketStage(LayerRange(n, n + 1), Ask(per_job=20)) for n in range(3))
        second = driver.begin(2, net.ticket(route, stages=dearer))
        assert await driver.values((second, 0, [2])) == expected_rows([2], 2)
        assert not driver.failed


async def test_status_says_what_happened() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, PROMPT))
        said = route[1].stage.status()
        assert (said["index"], said["route"], said["layers"]) == (1, [island.peer for island in route], "1-1")
        assert said["kept_bytes"] == len(PROMPT) * 64 and said["sessions"] == 1 and not route[1].stage.is_free
        said = driver.driver.status()
        assert (said["state"], said["layers"], said["last_mend_s"]) == ("up", ["0-0", "1-1", "2-2"], None)
        assert not driver.driver.is_free


async def test_a_driver_that_leaves_frees_its_stages_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.STAGE_ORPHAN_S", 0.1)
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, PROMPT))
        await route[-1].die()
        await wait_until(lambda: all(island.stage.is_free and not island.engine.cells for island in route[:-1]))


async def test_what_an_engine_still_computes_for_a_driver_that_left_is_not_taken_for_another_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.STAGE_ORPHAN_S", 0.05)
    async with open_stage_net() as net:
        route, driver = await net.ring(2)
        stage = route[0]
        sequence = driver.begin(1, net.ticket(route))
        stage.engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            driver.step_nowait(nursery, (sequence, 0, [1, 2, 3]))
            await wait_until(lambda: stage.engine.waiting == 0 and stage.stage.status()["counts"] and driver.driver.counts.steps_sent)
            await route[-1].die()
            await wait_until(lambda: stage.stage.is_free)
            other = EchoDriver(await net.island(), LayerRange(1, 2))
            second = other.begin(1, net.ticket([stage, net.islands[-1]]))
            rows = other.step_nowait(nursery, (second, 0, [4, 5, 6]))
            await wait_until(lambda: other.driver.state is RouteState.UP and other.driver.counts.steps_sent)
            stage.engine.is_stopped = False
            await wait_until(lambda: rows)
            nursery.cancel_scope.cancel()
        assert rows == expected_rows([4, 5, 6], 1)


async def _steps(driver: EchoDriver, sequence: int, *parts: list[int]) -> list[float]:
    """Steps one after the other."""
    rows: list[float] = []
    for tokens in parts:
        rows += await driver.values((sequence, len(rows), tokens))
    return rows
