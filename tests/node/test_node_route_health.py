"""Stages that live and do not do well: frozen, standing still, slow; and busy ones, which are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from node.route_health import RouteHealth, Suspect
from protocol import limits
from protocol.errors import Code
from protocol.shards import LayerRange
from protocol.stage_messages import StageReport
from tests.node.stage_net import FakeStage, Island, StageNet, expected_rows, open_stage_net, wait_until

ROUTE = ("first", "second", "third", "driver")
STALLED_S = limits.STAGE_STALL_S + 0.1
PROBE_S = limits.STAGE_PROBE_S + 0.01
STILL_US = int((limits.STAGE_STANDSTILL_S + 1) * 1e6)
SLOW_STEPS = limits.STAGE_SLOW_STEPS


def report(probe: int, index: int, batches: int = 0, busy_us: int = 0) -> StageReport:
    return StageReport(probe, index, batches, 0, busy_us)


def asked(*, lap_s: float = 0.0) -> tuple[RouteHealth, float]:
    """Health that has just sent its first probe, and when."""
    health = RouteHealth()
    assert health.look(100.0, lap_s, 1000.0, ROUTE) == 1
    return health, 1000.0


@pytest.mark.parametrize(
    ("age_s", "lap_s", "asks"),
    [
        (0.0, 0.0, False),
        (limits.STAGE_STALL_S - 0.01, 0.0, False),
        (STALLED_S, 0.0, True),
        (STALLED_S, 0.1, False),  # ten usual laps are no reason
        (STALLED_S + 1.0, 0.1, True),
        (limits.STAGE_STALL_S + 9.9, 5.0, False),
        (limits.STAGE_STALL_S + 10.1, 5.0, True),  # a lap counts as a second at most
    ],
)
def test_when_it_asks(age_s: float, lap_s: float, asks: bool) -> None:
    assert RouteHealth().look(age_s, lap_s, 1000.0, ROUTE) == int(asks)


@pytest.mark.parametrize(
    ("answers", "suspect"),
    [((), 0), ((0,), 1), ((0, 1), 2), ((1, 2), 0), ((0, 2), 1), ((0, 1, 2), None)],
)
def test_the_first_that_does_not_answer_is_frozen(answers: tuple[int, ...], suspect: int | None) -> None:
    health, now_s = asked()
    for index in answers:
        health.hear(report(1, index))
    assert health.look(100.0, 0.0, now_s + limits.STAGE_PROBE_S, ROUTE) == 0, "it has its time to answer"
    verdict = health.look(100.0, 0.0, now_s + PROBE_S, ROUTE)
    assert (verdict.index if isinstance(verdict, Suspect) else None) == suspect
    assert suspect is not None or verdict == 2, "all are busy, and are asked again"


def test_when_all_are_idle_and_a_step_is_away_each_is_suspected_in_turn() -> None:
    health = RouteHealth()
    blamed = []
    for turn in range(4):
        begun_s = 1000.0 + 100 * turn
        probe = health.look(100.0, 0.0, begun_s, ROUTE)
        for repeat in range(2):
            assert isinstance(probe, int)
            for index in range(3):
                health.hear(report(probe, index, batches=7))
            probe = health.look(100.0, 0.0, begun_s + (repeat + 1) * PROBE_S, ROUTE)
        assert isinstance(probe, Suspect) and "a step is lost" in probe.message
        blamed.append(probe.index)
        health.forget()
    assert blamed == [0, 1, 2, 0]


@pytest.mark.parametrize("change", [{"batches": 8}, {"waiting": 1}, {"busy_us": 5}])
def test_who_does_something_has_not_lost_the_step(change: dict[str, int]) -> None:
    health, now_s = asked()
    for index in range(3):
        health.hear(report(1, index, batches=7))
    assert health.look(100.0, 0.0, now_s + PROBE_S, ROUTE) == 2
    for index in range(3):
        health.hear(StageReport(**{"probe": 2, "index": index, "batches": 7, "waiting": 0, "busy_us": 0, **(change if index == 1 else {})}))
    assert health.look(100.0, 0.0, now_s + 2 * PROBE_S, ROUTE) == 3


def test_answers_to_another_probe_do_not_count() -> None:
    health, now_s = asked()
    for index in range(3):
        health.hear(report(7, index))
    verdict = health.look(100.0, 0.0, now_s + PROBE_S, ROUTE)
    assert isinstance(verdict, Suspect) and verdict.index == 0 and "does not answer" in verdict.message


@pytest.mark.parametrize(
    ("first", "second", "suspect"),
    [
        ((5, STILL_US), (5, STILL_US), True),
        ((5, STILL_US), (6, STILL_US), False),  # it has finished one
        ((5, 0), (5, STILL_US), True),
        ((5, STILL_US), (5, STILL_US // 2), False),
        ((5, 0), (5, 0), False),  # idle
    ],
)
def test_standing_still(first: tuple[int, int], second: tuple[int, int], suspect: bool) -> None:
    health, now_s = asked()
    for probe, (batches, busy_us) in ((1, first), (2, second)):
        for index in range(3):
            health.hear(report(probe, index, *((batches, busy_us) if index == 1 else (probe, 10))))
        now_s += PROBE_S
        verdict = health.look(100.0, 0.0, now_s, ROUTE)
    assert isinstance(verdict, Suspect) is suspect
    if isinstance(verdict, Suspect):
        assert (verdict.index == 1 and "11 s" in verdict.message) or "worked on one batch" in verdict.message


def test_one_that_is_slow_by_nature_may_take_longer_for_a_batch() -> None:
    health, now_s = asked()
    health.note("second", 1e6)  # a second for each token: twenty of them are no standstill
    for probe in (1, 2):
        for index in range(3):
            health.hear(report(probe, index, 5, STILL_US if index == 1 else 0))
        now_s += PROBE_S
        assert health.look(100.0, 0.0, now_s, ROUTE) == probe + 1


def test_steps_that_come_again_end_the_asking() -> None:
    health, now_s = asked()
    assert health.look(0.1, 0.0, now_s + 0.5, ROUTE) == 0
    assert health.look(100.0, 0.0, now_s + PROBE_S, ROUTE) == 2, "asked anew, not judged by an old question"
    health.forget()
    assert health.look(100.0, 0.0, now_s + 2 * PROBE_S, ROUTE) == 3


def test_the_last_probe_of_an_older_opening_is_not_compared() -> None:
    health, now_s = asked()
    for index in range(3):
        health.hear(report(1, index, 5, STILL_US))
    health.forget()
    assert health.look(100.0, 0.0, now_s + PROBE_S, ROUTE) == 2
    for index in range(3):
        health.hear(report(2, index, 5, STILL_US))
    assert health.look(100.0, 0.0, now_s + 2 * PROBE_S, ROUTE) == 3


@pytest.mark.parametrize(
    ("usual_us", "later_us", "is_slow"),
    [
        (10_000, 10_000, False),
        (10_000, 39_000, False),  # not four times as long
        (10_000, 60_000, True),
        (100, 2_000, False),  # noise of a busy machine
        (100, 5_000, True),
        (10_000, 2_000, False),  # faster is no fault
    ],
)
def test_slow(usual_us: float, later_us: float, is_slow: bool) -> None:
    health = RouteHealth()
    assert not any(health.note("one", usual_us) for _ in range(50))
    told = [health.note("one", later_us) for _ in range(3 * SLOW_STEPS)]
    assert any(told) is is_slow
    assert not any(told[:SLOW_STEPS]), "not for a moment's sake"
    assert sum(told) <= 1, "once it is told, it is judged anew"


def test_one_slow_step_is_nothing() -> None:
    health = RouteHealth()
    for _ in range(20):
        assert not any(health.note("one", us) for us in (1_000.0,) * 30 + (100_000.0,))
    assert health.decode_us("one") > 0 and health.decode_us("other") == 0.0
    assert "1 stages known" in repr(health)


def _hurry(patch: pytest.MonkeyPatch, standstill_s: float = 0.3) -> None:
    patch.setattr(limits, "STAGE_STALL_S", 0.1)
    patch.setattr(limits, "STAGE_PROBE_S", 0.2)
    patch.setattr(limits, "STAGE_STANDSTILL_S", standstill_s)
    patch.setattr("node.route_driver._WATCH_S", 0.02)


async def _spare(net: StageNet, layer: int) -> Island:
    island = await net.island()
    island.hold(LayerRange(layer, layer + 1))
    return island


def _freeze(patch: pytest.MonkeyPatch, island: Island) -> None:
    """Its connections stay, and nothing comes out of it any more."""
    patch.setattr(island.stage, "_tell", lambda *arguments: None)
    patch.setattr(island.stage, "_do", lambda *arguments: None)


@pytest.mark.parametrize("how", ["frozen", "standing still"])
@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_stage_that_does_nothing_is_found_and_replaced(index: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)
    async with open_stage_net() as net:
        route, driver = await net.ring(4)
        spare = await _spare(net, index)
        sequences = [driver.begin(job, net.ticket(route, f"job-{job}")) for job in (1, 2)]
        await driver.step(*((sequence, 0, [1]) for sequence in sequences))
        bad = route[index]
        if how == "frozen":
            _freeze(monkeypatch, bad)
        else:
            bad.engine.is_stopped = True
        async with trio.open_nursery() as nursery:
            rows = [driver.step_nowait(nursery, (sequence, 1, [2, 3])) for sequence in sequences]
            await wait_until(lambda: driver.broken)
            assert driver.broken_of == {1: [index], 2: [index]}
            assert driver.broken[0][1] is Code.TIMEOUT
            assert ("does not answer" if how == "frozen" else "worked on one batch") in driver.broken[0][2]
            route[index] = spare
            for job in (1, 2):
                driver.driver.mended(job, net.ticket(route, f"job-{job}"))
        assert rows == [expected_rows([1, 2, 3], 3)[1:]] * 2
        assert all(island.engine.rows == 6 for island in route[:-1])


async def test_a_stage_that_takes_everything_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)
    async with open_stage_net() as net:
        route, driver = await net.ring(4)
        good = route[1]
        route[1] = await net.island()
        fake = FakeStage(route[1], route[2])
        sequence = driver.begin(1, net.ticket(route, "job-1"))
        async with trio.open_nursery() as nursery:
            rows = driver.step_nowait(nursery, (sequence, 0, [1, 2]))
            await wait_until(lambda: driver.broken)
            assert driver.broken[0][:2] == (1, Code.TIMEOUT)
            await wait_until(lambda: fake.lost)
            route[1] = good
            driver.driver.mended(1, net.ticket(route, "job-1"))
        assert rows == expected_rows([1, 2], 3)


async def test_a_busy_stage_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        route[1].engine.row_s = 0.03
        sequence = driver.begin(1, net.ticket(route))
        tokens = list(range(30))
        async with trio.open_nursery() as nursery:
            rows = [driver.step_nowait(nursery, (sequence, at, tokens[at : at + 5])) for at in range(0, 30, 5)]
        assert [row for part in rows for row in part] == expected_rows(tokens, 2)
        assert driver.driver.counts.probes > 0 and not driver.broken, "it was asked, and had reasons"


async def test_a_long_batch_of_a_slow_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch, standstill_s=0.05)
    monkeypatch.setattr(limits, "STAGE_PROBE_S", 0.03)
    async with open_stage_net() as net:
        route, driver = await net.ring(2)
        route[0].engine.row_s = 0.06
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, [1]))
        await driver.step((sequence, 1, [2]))
        assert await driver.values((sequence, 2, list(range(14)))) == expected_rows([1, 2, *range(14)], 1)[2:]
        assert driver.driver.counts.probes >= 2 and not driver.broken


async def test_a_stage_that_has_become_slow_is_told_and_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STAGE_SLOW_STEPS", 4)
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        route[0].engine.row_s = route[1].engine.row_s = 0.0005
        sequence = driver.begin(1, net.ticket(route, "job-1"))
        tokens = list(range(40))
        rows: list[float] = []
        for token in tokens:
            if len(rows) == 8:
                route[1].engine.row_s = 0.01
            rows += await driver.values((sequence, len(rows), [token]))
            if driver.on_broken.is_set():
                driver.on_broken = trio.Event()
                driver.driver.mended(1, net.ticket(route, "job-1"))
        assert [told[:2] for told in driver.broken] == [(1, Code.NO_CAPACITY)] and "4 times as long" in driver.broken[0][2]
        assert rows == expected_rows(tokens, 2) and route[0].engine.rows == route[1].engine.rows == 40


async def test_an_idle_route_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _hurry(monkeypatch)
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, [1]))
        looks: list[float] = []
        look = driver.driver._health.look

        def noted(age_s: float, *more: Any) -> Any:
            looks.append(age_s)
            return look(age_s, *more)

        monkeypatch.setattr(driver.driver._health, "look", noted)
        await wait_until(lambda: len(looks) > 10)
        assert set(looks) == {0.0} and driver.driver.counts.probes == 0
