"""Stages, links, engines and drivers that are lost in the middle: every row is right, and who survives computes nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from node.route_driver import RouteState
from protocol.errors import Code
from protocol.shards import LayerRange
from tests.node.stage_net import COLLEAGUE, EchoDriver, Island, StageNet, expected_rows, open_stage_net, wait_until

PROMPT = list(range(3, 24))
LATER = [31, 32, 33, 34]


class Chats:
    """Several jobs on one ring, each with its own tokens; rows are compared with those of a ring without failures."""

    def __init__(self, net: StageNet, route: list[Island], driver: EchoDriver, jobs: int) -> None:
        self.net, self.route, self.driver = net, route, driver
        self.tokens: dict[int, list[int]] = {}
        self.rows: dict[int, list[list[float]]] = {}
        self.sequences = {job: driver.begin(job, net.ticket(route, f"job-{job}")) for job in range(1, jobs + 1)}
        for job in self.sequences:
            self.tokens[job], self.rows[job] = [], []

    def say(self, nursery: trio.Nursery, job: int, tokens: Sequence[int]) -> None:
        part = (self.sequences[job], len(self.tokens[job]), tokens)
        self.tokens[job] += tokens
        self.rows[job].append(self.driver.step_nowait(nursery, part))

    async def begin(self) -> None:
        """Every job has its prompt behind it."""
        async with trio.open_nursery() as nursery:
            for job in self.sequences:
                self.say(nursery, job, [job, *PROMPT])

    def replace(self, index: int, spare: Island) -> list[Island]:
        self.route = [*self.route[:index], spare, *self.route[index + 1 :]]
        return self.route

    def mend(self, *jobs: int) -> None:
        for job in jobs or tuple(self.sequences):
            self.driver.driver.mended(job, self.net.ticket(self.route, f"job-{job}"))

    @property
    def positions(self) -> int:
        return sum(map(len, self.tokens.values()))

    def check(self, *jobs: int) -> None:
        for job in jobs or tuple(self.sequences):
            came = [row for part in self.rows[job] for row in part]
            assert came == expected_rows(self.tokens[job], len(self.route) - 1)


async def chats(net: StageNet, stages: int, jobs: int) -> Chats:
    route, driver = await net.ring(stages)
    made = Chats(net, route, driver, jobs)
    await made.begin()
    return made


async def spare(net: StageNet, layer: int) -> Island:
    island = await net.island()
    island.hold(LayerRange(layer, layer + 1))
    return island


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_stage_dies_with_steps_under_way(victim: int) -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 3)
        survivors = [island for number, island in enumerate(talk.route[:-1]) if number != victim]
        other = await spare(net, victim)
        talk.route[victim].engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                for token in LATER:
                    talk.say(nursery, job, [token])
            assert talk.driver.steps_waiting == 12
            before = talk.positions - 12
            assert survivors[-1].engine.rows == before, "what is under way stands before the victim"
            await talk.route[victim].die()
            await wait_until(lambda: talk.driver.broken)
            assert talk.driver.broken_of == {job: [victim] for job in talk.sequences}
            assert talk.driver.broken[0][1] is Code.LINK_LOST
            talk.replace(victim, other)
            talk.mend()
        talk.check()
        assert all(island.engine.rows == talk.positions for island in survivors), "survivors computed each row once"
        assert other.engine.rows == talk.positions, "what was lost, and what is new"
        assert other.counts["rows_filled"] == before
        assert talk.driver.driver.counts.breaks == 1 and talk.driver.driver.status()["last_mend_s"] is not None


async def test_only_what_was_lost_is_computed_again() -> None:
    """A stage that comes back to the route after its link was cut goes on with what it has."""
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        await talk.route[1].host.disconnect(talk.route[2].peer)
        await wait_until(lambda: len(talk.driver.broken) == 2)
        assert set(talk.driver.broken_of) == {1, 2} and {index for index, *_ in talk.driver.broken} <= {1, 2}
        talk.mend()
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                talk.say(nursery, job, LATER)
        talk.check()
        assert all(island.engine.rows == talk.positions for island in talk.route[:-1])
        assert not any(island.counts["rows_filled"] for island in talk.route[:-1])


@pytest.mark.parametrize("ends", ["first", "last"])
async def test_a_link_of_the_driver_is_cut(ends: str) -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        driver = talk.route[-1]
        await driver.host.disconnect(talk.route[0 if ends == "first" else -2].peer)
        await wait_until(lambda: len(talk.driver.broken) == 2)
        assert talk.driver.broken[0][0] == (0 if ends == "first" else 2)
        talk.mend()
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                talk.say(nursery, job, LATER)
        talk.check()
        assert all(island.engine.rows == talk.positions for island in talk.route[:-1])


async def test_mended_tickets_that_come_at_different_times() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 3, 2)
        other = await spare(net, 1)
        await talk.route[1].die()
        await wait_until(lambda: len(talk.driver.broken) == 2)
        talk.replace(1, other)
        talk.mend(1)
        async with trio.open_nursery() as nursery:
            talk.say(nursery, 1, [40])
            await wait_until(lambda: talk.rows[1][-1])
            talk.check(1)
            talk.say(nursery, 2, [50])
            both = talk.driver.step_nowait(nursery, (1, len(talk.tokens[1]), [41]), (2, len(talk.tokens[2]), [51]))
            sent = talk.driver.driver.counts.steps_sent
            assert not talk.rows[2][-1] and not both
            talk.mend(2)
            await wait_until(lambda: both)
            assert talk.driver.driver.counts.steps_sent == sent + 2 and talk.driver.driver.counts.openings == 2
        talk.check(2)
        assert both == [expected_rows([*talk.tokens[job], 40 + 10 * (job - 1) + 1], 2)[-1] for job in (1, 2)]


async def test_a_second_death_during_recovery() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        first, second = await spare(net, 1), await spare(net, 2)
        async with trio.open_nursery() as nursery:
            talk.route[1].engine.is_stopped = True
            talk.say(nursery, 1, LATER)
            await talk.route[1].die()
            await wait_until(lambda: len(talk.driver.broken) == 2)
            talk.replace(1, first)
            first.engine.is_stopped = True  # it is asked for the past, and has not computed it
            talk.mend()
            await wait_until(lambda: talk.driver.driver.state is RouteState.UP)
            await talk.route[2].die()
            await wait_until(lambda: len(talk.driver.broken) == 4)
            assert talk.driver.broken_of == {1: [1, 2], 2: [1, 2]}
            talk.replace(2, second)
            talk.mend()
            first.engine.is_stopped = False
            talk.say(nursery, 2, LATER)
        talk.check()
        assert [island.engine.rows for island in talk.route[:-1]] == [talk.positions] * 3


async def test_two_stages_die_at_once() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        first, second = await spare(net, 1), await spare(net, 2)
        await talk.route[1].die()
        await talk.route[2].die()
        await wait_until(lambda: len(talk.driver.broken) == 2)
        talk.replace(1, first)
        talk.replace(2, second)
        talk.mend()
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                talk.say(nursery, job, LATER)
        talk.check()
        assert [island.engine.rows for island in talk.route[:-1]] == [talk.positions] * 3


async def test_a_replacement_that_is_dead_too() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 3, 2)
        first, second = await spare(net, 1), await spare(net, 1)
        await first.die()
        await talk.route[1].die()
        await wait_until(lambda: len(talk.driver.broken) == 2)
        talk.replace(1, first)
        talk.mend()
        await wait_until(lambda: len(talk.driver.broken) == 4)
        assert talk.driver.broken_of == {1: [1, 1], 2: [1, 1]} and "cannot reach" in talk.driver.broken[-1][2]
        talk.replace(1, second)
        talk.mend()
        async with trio.open_nursery() as nursery:
            talk.say(nursery, 1, LATER)
        talk.check(1)


@pytest.mark.parametrize("is_under_way", [True, False])
async def test_a_job_that_ends_while_the_route_is_broken(is_under_way: bool) -> None:
    """Its rows stand in steps of others, launched before or after: those others get theirs."""
    async with open_stage_net() as net:
        talk = await chats(net, 3, 2)
        other = await spare(net, 1)
        talk.route[1].engine.is_stopped = True
        parts = [(job, len(talk.tokens[job]), [60 + job]) for job in (1, 2)]
        async with trio.open_nursery() as nursery:
            if is_under_way:
                rows = talk.driver.step_nowait(nursery, *parts)
            await talk.route[1].die()
            await wait_until(lambda: len(talk.driver.broken) == 2)
            talk.driver.driver.job_over(1)
            if not is_under_way:
                rows = talk.driver.step_nowait(nursery, *parts)
            talk.driver.driver.end_sequences((1,))
            talk.replace(1, other)
            talk.mend(2)
            await wait_until(lambda: rows)
        assert rows == [0.0, expected_rows([*talk.tokens[2], 62], 2)[-1]]
        talk.driver.over(2, 2)
        await wait_until(lambda: not any(island.engine.cells for island in talk.route[:-1]))
        assert all(island.stage.status()["kept_bytes"] == 0 for island in talk.route[:-1])


async def test_a_job_that_ends_after_others_were_mended() -> None:
    """The ticket of one job never comes; when it is given up, the step that it shares goes on."""
    async with open_stage_net() as net:
        talk = await chats(net, 3, 2)
        other = await spare(net, 1)
        talk.route[1].engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            rows = talk.driver.step_nowait(nursery, *((job, len(talk.tokens[job]), [60 + job]) for job in (1, 2)))
            await talk.route[1].die()
            await wait_until(lambda: len(talk.driver.broken) == 2)
            talk.replace(1, other)
            talk.mend(1)
            await wait_until(lambda: talk.driver.driver.state is RouteState.UP)
            talk.driver.driver.job_over(2)
            await wait_until(lambda: rows)
            talk.driver.driver.end_sequences((2,))
        assert rows == [expected_rows([*talk.tokens[1], 61], 2)[-1], 0.0]


async def test_the_last_job_ends_while_the_route_is_broken() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 3, 1)
        other = await spare(net, 1)
        await talk.route[1].die()
        await wait_until(lambda: talk.driver.broken)
        talk.driver.over(1, 1)
        assert talk.driver.driver.state is RouteState.DOWN and talk.driver.driver.is_free
        route = talk.replace(1, other)
        sequence = talk.driver.begin(2, net.ticket(route))
        assert await talk.driver.values((sequence, 0, [5, 6])) == expected_rows([5, 6], 2)
        assert talk.driver.broken_of == {1: [1]}


@pytest.mark.parametrize("keep", [len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 3])
async def test_the_driver_dies_and_another_goes_on(keep: int) -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                talk.say(nursery, job, LATER)
        before = talk.positions
        await talk.route[-1].die()
        island = await net.island()
        driver = EchoDriver(island, LayerRange(3, 4))
        route = talk.replace(3, island)
        for job in talk.sequences:
            sequence = driver.begin(job, net.ticket(route, f"job-{job}"), keep=keep)
            tokens = [*talk.tokens[job][:keep], 81, 82]
            assert await driver.values((sequence, 0, tokens)) == expected_rows(tokens, 3)
        assert not driver.broken and not driver.failed
        for stage in route[:-1]:
            assert stage.counts["adopted"] == 2 and stage.stage.status()["sessions"] == 1
            assert stage.engine.rows == before + 4, "survivors compute only what is new"
            assert stage.engine.cells == 2 * (keep + 2)


async def test_an_orphan_is_adopted_under_a_ticket_of_the_same_coordinator_only() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 3, 1)
        before = talk.positions
        await talk.route[-1].die()
        island = await net.island()
        driver = EchoDriver(island, LayerRange(2, 3))
        route = talk.replace(2, island)
        sequence = driver.begin(1, net.ticket(route, "job-1", signer=COLLEAGUE), keep=before)
        assert await driver.values((sequence, 0, PROMPT)) == expected_rows(PROMPT, 2), "nothing of the other job is in it"
        assert [stage.counts["adopted"] for stage in route[:-1]] == [0, 0]


async def test_an_engine_that_ends_heals_without_the_driver() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        stage = talk.route[1]
        stage.engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            talk.say(nursery, 1, [61])
            talk.say(nursery, 2, [62])
            await wait_until(lambda: talk.route[0].engine.rows == talk.positions)
            stage.engine.end()
            talk.say(nursery, 1, [63])
            stage.engine.is_stopped = False
            stage.engine.begin_again()
        talk.check()
        assert not talk.driver.broken and not talk.driver.failed and talk.driver.driver.counts.breaks == 0
        assert talk.route[0].engine.rows == talk.route[2].engine.rows == talk.positions
        assert stage.counts["rows_asked"] > 0 and stage.engine.rows == 2 * talk.positions - 3


async def test_an_engine_that_is_down_while_a_stage_is_replaced() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 4, 2)
        other = await spare(net, 2)
        talk.route[1].engine.end()
        await talk.route[2].die()
        await wait_until(lambda: len(talk.driver.broken) == 2)
        talk.replace(2, other)
        talk.mend()
        async with trio.open_nursery() as nursery:
            for job in talk.sequences:
                talk.say(nursery, job, LATER)
            await wait_until(lambda: talk.driver.driver.state is RouteState.UP)
            talk.route[1].engine.begin_again()
        talk.check()
        assert talk.route[0].engine.rows == other.engine.rows == talk.positions


async def test_a_job_that_ended_the_engine_twice_is_refused_and_others_go_on() -> None:
    async with open_stage_net() as net:
        talk = await chats(net, 3, 2)
        stage = talk.route[1]
        async with trio.open_nursery() as nursery:
            stage.engine.is_stopped = True
            talk.say(nursery, 1, [66])
            for _ in range(2):
                await wait_until(lambda: _is_computing(stage))
                stage.engine.end()
                stage.engine.begin_again()
            await wait_until(lambda: talk.driver.failed)
            stage.engine.is_stopped = False
            assert talk.driver.failed[0].code is Code.WORKER_DIED and "twice" in talk.driver.failed[0].message
            talk.driver.over(1, 1)
            talk.say(nursery, 2, LATER)
        talk.check(2)
        assert len(talk.driver.failed) == 1 and not talk.driver.broken


def _is_computing(island: Island) -> bool:
    return bool(island.stage._session is not None and island.stage._session.machine.computing)
