"""Stages that send what they must not, or nothing: the right one is blamed, its neighbours stay whole, and the route can be mended."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio

from node.jobs_served import island_hello
from node.route_driver import RouteState
from protocol import limits
from protocol.errors import Code, LinkLost
from protocol.framing import encode_frame
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from protocol.shards import LayerRange
from protocol.stage_messages import (
    STAGE,
    STAGE_PROTOCOL,
    RowsWanted,
    SequenceEnd,
    SequenceOpen,
    Span,
    StageFault,
    StageOpened,
    StageProbe,
    StageReport,
    StageRows,
    StageTime,
)
from tests.node.stage_net import (
    NETWORK,
    FakeStage,
    Island,
    StageNet,
    answer_of,
    expected_rows,
    open_stage_net,
    opening,
    wait_until,
)

ROW = struct.pack("<16f", *range(16))


class Middle:
    """A good stage between a raw link before it and a driver that only listens. Sequences 1 and 2 are open, of 1 there are two rows."""

    def __init__(self, net: StageNet, before: Island, stage: Island, behind: FakeStage) -> None:
        self.net, self.before, self.stage, self.behind = net, before, stage, behind
        self.heard: list[Any] = []
        self._epoch = 0

    async def open(self) -> Any:
        self._epoch += 1
        stream = await self.before.open(self.stage, opening(self.ticket(), 1, self._epoch))
        assert isinstance(await answer_of(stream), StageOpened)
        for sequence in (1, 2):
            await stream.send(SequenceOpen(sequence, 16, 0, 0, 0, self.ticket()))
        await stream.send(StageRows(1, (Span(1, 0, 2),), rows=2 * ROW))
        known = len(self.behind.all(StageRows))
        await wait_until(lambda: len(self.behind.all(StageRows)) > known)
        return stream

    def ticket(self) -> bytes:
        return self.net.ticket([self.before, self.stage, self.behind.island])

    async def end(self, stream: Any) -> list[Any]:
        """What still comes until the link ends."""
        heard: list[Any] = []
        with pytest.raises(LinkLost):
            while True:
                heard.append(await answer_of(stream))
        return heard

    async def check_goes_on(self) -> None:
        """The driver opens the route anew; the stage has what it had."""
        rows = self.stage.engine.rows
        kept = self.stage.stage.status()["kept_bytes"]
        assert kept == 128, "two rows, and nothing of what was no good"
        self._epoch += 1
        stream = await self.before.open(self.stage, opening(self.ticket(), 1, self._epoch))
        assert isinstance(await answer_of(stream), StageOpened)
        await stream.send(SequenceOpen(3, 16, 0, 0, 0, self.ticket()))
        known = len(self.behind.all(StageRows))
        await stream.send(StageRows(9, (Span(3, 0, 1),), rows=ROW))
        await wait_until(lambda: len(self.behind.all(StageRows)) > known)
        assert self.stage.engine.rows == rows + 1
        await stream.send(SequenceEnd((1, 2, 3)))
        await wait_until(lambda: not self.stage.engine.cells and not self.stage.stage.status()["kept_bytes"])


async def middle(net: StageNet) -> Middle:
    before, stage, behind = [await net.island() for _ in range(3)]
    stage.hold(LayerRange(1, 2))
    return Middle(net, before, stage, FakeStage(behind))


def rows(*spans: Span, data: bytes | None = None, **more: Any) -> StageRows:
    return StageRows(2, spans, rows=ROW * sum(span.count for span in spans) if data is None else data, **more)


FROM_BEFORE: dict[str, tuple[object, str]] = {
    "a row short": (rows(Span(1, 2, 2), data=ROW), "2 rows of 64 bytes do not make 64 bytes"),
    "a byte too many": (rows(Span(1, 2, 1), data=ROW + b"x"), "1 rows of 64 bytes do not make 65 bytes"),
    "no bytes": (rows(Span(1, 2, 1), data=b""), "do not make 0 bytes"),
    "behind what was declared": (rows(Span(1, 2, 15)), "declared 16"),
    "far behind": (rows(Span(1, 2**31, 1)), "declared 16"),
    "unknown sequence": (rows(Span(5, 0, 1)), "sequence 5, which is not open"),
    "fill with a hole": (StageRows(0, (Span(1, 5, 1),), fill=True, rows=ROW), "leaves a hole behind row 2"),
    "too many stages": (rows(Span(1, 2, 1), times=(StageTime(1, 1),) * limits.ROUTE_STAGES_MAX), "has passed 8 stages"),
    "wanted": (RowsWanted(1, 0, 1), "RowsWanted does not come from the stage before"),
    "report": (StageReport(1, 0, 0, 0, 0), "StageReport does not come from the stage before"),
    "opened": (StageOpened(()), "StageOpened does not come from the stage before"),
    "hello": (island_hello(NETWORK, "test"), "Hello does not come from the stage before"),
    "opening": (opening(b"x", 1, 7), "StageOpen does not come from the stage before"),
}


@pytest.mark.parametrize("name", FROM_BEFORE)
async def test_what_must_not_come_from_the_stage_before(name: str) -> None:
    message, words = FROM_BEFORE[name]
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        await stream.send(message)
        assert await place.end(stream) == []
        await _check_told(place, 0, words)
        await place.check_goes_on()


async def _check_told(place: Middle, index: int, words: str, code: Code = Code.BAD_INPUT) -> None:
    """The other side has heard who is at fault."""
    await wait_until(lambda: place.behind.lost)
    (fault,) = place.behind.all(StageFault)
    assert (fault.index, fault.sequence, fault.code) == (index, 0, code) and words in fault.message


FROM_BEHIND: dict[str, tuple[object, str]] = {
    "rows": (rows(Span(1, 2, 1)), "StageRows does not come from the next stage"),
    "sequence": (SequenceOpen(5, 16, 0, 0, 0, b"x"), "SequenceOpen does not come from the next stage"),
    "end": (SequenceEnd((1,)), "SequenceEnd does not come from the next stage"),
    "probe": (StageProbe(1), "StageProbe does not come from the next stage"),
    "opened": (StageOpened(()), "StageOpened does not come from the next stage"),
    "rows that nobody will have": (RowsWanted(1, 16, 17), "row 16 was asked for, of a sequence that declared 16"),
}


@pytest.mark.parametrize("name", FROM_BEHIND)
async def test_what_must_not_come_from_the_next_stage(name: str) -> None:
    message, words = FROM_BEHIND[name]
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        await place.behind.up.send(message)
        (fault,) = await place.end(stream)
        assert (fault.index, fault.code) == (2, Code.BAD_INPUT) and words in fault.message
        await place.check_goes_on()


@pytest.mark.parametrize("case", ["too many rows", "oversized", "garbage", "control characters"])
async def test_bytes_that_are_no_message(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        if case == "too many rows":
            with monkeypatch.context() as patched:
                patched.setattr(limits, "STAGE_ROWS_MAX", 2000)
                data = encode_frame(STAGE, rows(Span(1, 2, 1500), data=b""))
        elif case == "oversized":
            data = struct.pack(">II", 20, limits.FRAME_BODY_BYTES_MAX + 1)
        elif case == "garbage":
            data = struct.pack(">II", 4, 0) + b"\x93\x04\xc1\xc1"
        else:
            data = encode_frame(STAGE, StageFault(1, 0, Code.INTERNAL, "bell.bell")).replace(b"bell.bell", b"bell\x07bell")
        await stream.send_frames(data, 1)
        await place.end(stream)
        await _check_told(place, 0, {"too many rows": "count", "oversized": "outside the limits"}.get(case, ""))
        await place.check_goes_on()


async def test_rows_with_a_gap_are_asked_for_and_others_go_on() -> None:
    """The one before stays silent: only the sequence with the gap waits."""
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        await stream.send(rows(Span(1, 6, 1)))
        assert await answer_of(stream) == RowsWanted(1, 2, 6)
        await stream.send(StageRows(3, (Span(2, 0, 1),), rows=ROW))
        await wait_until(lambda: len(place.behind.all(StageRows)) == 2)
        assert place.stage.engine.rows == 3
        await stream.send(StageRows(0, (Span(1, 2, 4),), fill=True, rows=4 * ROW))
        await wait_until(lambda: len(place.behind.all(StageRows)) == 3)
        assert place.behind.all(StageRows)[-1].spans == (Span(1, 6, 1),) and place.stage.engine.rows == 8


async def test_rows_said_twice_are_computed_once() -> None:
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        first = place.behind.all(StageRows)[0]
        await stream.send(StageRows(1, (Span(1, 0, 2),), rows=b"\0" * 128))
        await wait_until(lambda: len(place.behind.all(StageRows)) == 2)
        assert place.behind.all(StageRows)[1].rows == first.rows and place.stage.engine.rows == 2, "what was kept is not changed"


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_numbers_that_are_none(value: float) -> None:
    async with open_stage_net() as net:
        place = await middle(net)
        stream = await place.open()
        await stream.send(rows(Span(1, 2, 1), Span(2, 0, 1), data=np.full(32, value, "<f4").tobytes()))
        fault = await answer_of(stream)
        assert (fault.index, fault.sequence, fault.code) == (0, 0, Code.BAD_INPUT)
        await wait_until(lambda: place.behind.all(StageFault))
        assert place.behind.all(StageFault) == [fault]
        await stream.send(StageProbe(1))
        report = await answer_of(stream)
        assert (report.busy_us, report.waiting) == (0, 0), "its engine is idle"
        await stream.send(StageRows(3, (Span(2, 0, 1),), rows=ROW))
        await wait_until(lambda: len(place.behind.all(StageRows)) == 2)
        assert place.stage.engine.length(1) == 2, "good rows in their place are welcome"


@pytest.mark.parametrize("liar", [0, 1])
async def test_a_stage_that_sends_no_numbers_is_blamed_and_replaced(liar: int) -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        spare = await net.island()
        spare.hold(LayerRange(liar, liar + 1))
        sequence = driver.begin(1, net.ticket(route, "job-1"))
        await driver.step((sequence, 0, [1, 2]))
        route[liar].engine.bad_rows = 1
        async with trio.open_nursery() as nursery:
            came = driver.step_nowait(nursery, (sequence, 2, [3]))
            await wait_until(lambda: driver.broken)
            assert driver.broken[0][:2] == (liar, Code.BAD_INPUT) and "no finite numbers" in driver.broken[0][2]
            route[liar] = spare
            driver.driver.mended(1, net.ticket(route, "job-1"))
        assert came == expected_rows([1, 2, 3], 2)[2:]
        assert route[1 - liar].engine.rows == 3, "the other one computed each row once"


OPENINGS: dict[str, Callable[[Any], Awaitable[None]]] = {}


def at_opening(answer: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """How an Island behaves that is asked to open its stage."""
    OPENINGS[answer.__name__.replace("_", " ").strip()] = answer
    return answer


@at_opening
async def _says_nothing(stream: Any) -> None:
    await trio.sleep_forever()


@at_opening
async def _is_silent_after_hello(stream: Any) -> None:
    await stream.receive()
    await stream.send(island_hello(NETWORK, "test"))
    await trio.sleep_forever()


@at_opening
async def _speaks_another_version(stream: Any) -> None:
    await stream.receive()
    await stream.send(Hello(PROTOCOL_VERSION + 1, NodeRole.ISLAND, NETWORK, "test"))
    await trio.sleep_forever()


@at_opening
async def _hangs_up(stream: Any) -> None:
    stream.abort()


@at_opening
async def _answers_something_else(stream: Any) -> None:
    await stream.receive()
    await stream.send(island_hello(NETWORK, "test"))
    await stream.receive()
    await stream.send(StageProbe(1))
    await trio.sleep_forever()


@at_opening
async def _answers_garbage(stream: Any) -> None:
    await stream.receive()
    await stream.send(island_hello(NETWORK, "test"))
    await stream.receive()
    await stream.send_frames(struct.pack(">II", 4, 0) + b"\x93\x04\xc1\xc1", 1)
    await trio.sleep_forever()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", OPENINGS)
async def test_a_stage_that_does_not_open_is_named(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(4)
        good = route[index]
        bad = route[index] = await net.island()
        bad.host.set_handler(STAGE_PROTOCOL, STAGE, OPENINGS[name])
        sequence = driver.begin(1, net.ticket(route, "job-1"))
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patched:
                patched.setattr(limits, "HELLO_TIMEOUT_S", 1.0)
                patched.setattr(limits, "ROUTE_OPEN_S", 1.5)
                came = driver.step_nowait(nursery, (sequence, 0, [1, 2]))
                await wait_until(lambda: driver.broken)
            assert driver.broken[0][0] == index and bad.peer in f"{driver.broken[0][2]} {driver.driver.last_break}"
            route[index] = good
            driver.driver.mended(1, net.ticket(route, "job-1"))
        assert came == expected_rows([1, 2], 3) and len(driver.broken) == 1
        await wait_until(lambda: [island.host.statistics().streams for island in (*route, bad)] == [2, 2, 2, 2, 0])


class Ring:
    """A ring whose stage 1, the last before the driver, only pretends; the step with rows 0 and 1 of sequence 1 is under way."""

    def __init__(self, net: StageNet, route: list[Island], driver: Any, fake: FakeStage, good: Island) -> None:
        self.net, self.route, self.driver, self.fake, self.good = net, route, driver, fake, good
        self.came: list[float] = []

    async def check_mends(self, index: int) -> None:
        await wait_until(lambda: self.driver.broken)
        assert [told[0] for told in self.driver.broken] == [index]
        self.route[1] = self.good
        self.driver.driver.mended(1, self.net.ticket(self.route, "job-1"))
        await wait_until(lambda: self.came)
        assert self.came == expected_rows([1, 2], 2) and self.route[0].engine.rows == 2


async def ring(net: StageNet, nursery: trio.Nursery) -> Ring:
    route, driver = await net.ring(3)
    good = route[1]
    bad = route[1] = await net.island()
    made = Ring(net, route, driver, FakeStage(bad, route[2]), good)
    sequence = driver.begin(1, net.ticket(route, "job-1"))
    made.came = driver.step_nowait(nursery, (sequence, 0, [1, 2]))
    await wait_until(lambda: made.fake.all(StageRows))
    return made


TO_THE_DRIVER: dict[str, tuple[object, str]] = {
    "a row short": (StageRows(1, (Span(1, 0, 2),), rows=ROW), "2 hidden states of 64 bytes do not make 64 bytes"),
    "other rows": (StageRows(1, (Span(1, 0, 3),), rows=3 * ROW), "other rows than were sent"),
    "rows of others": (StageRows(1, (Span(7, 0, 2),), rows=2 * ROW), "other rows than were sent"),
    "wanted": (RowsWanted(1, 0, 1), "RowsWanted does not come from stage 1"),
    "report": (StageReport(1, 1, 0, 0, 0), "StageReport does not come from stage 1"),
    "opened": (StageOpened(()), "StageOpened does not come from stage 1"),
    "no such stage": (StageFault(7, 0, Code.INTERNAL, "x"), "does not have"),
    "no such stage of a job": (StageFault(7, 1, Code.INTERNAL, "x"), "does not have"),
    "no numbers": (StageRows(1, (Span(1, 0, 2),), rows=np.full(32, np.nan, "<f4").tobytes()), "no finite numbers"),
}


@pytest.mark.parametrize("name", TO_THE_DRIVER)
async def test_what_must_not_come_to_the_driver(name: str) -> None:
    message, words = TO_THE_DRIVER[name]
    async with open_stage_net() as net, trio.open_nursery() as nursery:
        place = await ring(net, nursery)
        await place.fake.down.send(message)
        await place.check_mends(1)
        assert place.driver.broken[0][1] is Code.BAD_INPUT and words in place.driver.broken[0][2]
        assert not place.driver.failed


@pytest.mark.parametrize(
    "message", [RowsWanted(7, 0, 1), RowsWanted(1, 9, 12), StageReport(5, 6, 0, 0, 0), StageFault(1, 9, Code.INTERNAL, "x")]
)
async def test_words_about_nothing_change_nothing(message: object) -> None:
    async with open_stage_net() as net, trio.open_nursery() as nursery:
        place = await ring(net, nursery)
        await place.fake.up.send(message)
        await place.fake.down.send(StageRows(99, (Span(1, 0, 2),), rows=2 * ROW))
        await place.fake.down.send(StageRows(0, (Span(1, 0, 2),), fill=True, rows=2 * ROW))
        await place.fake.down.send(StageRows(1, (Span(1, 0, 2),), rows=2 * ROW))
        await wait_until(lambda: place.came)
        assert place.came == [0.0, 0.0] and not place.driver.broken and not place.driver.failed


@pytest.mark.parametrize("sequence", [0, 1])
@pytest.mark.parametrize("index", [3, 7])
async def test_a_first_stage_that_names_a_stage_that_is_not_there(index: int, sequence: int) -> None:
    async with open_stage_net() as net, trio.open_nursery() as nursery:
        route, driver = await net.ring(3)
        good = route[0]
        route[0] = await net.island()
        fake = FakeStage(route[0], route[1])
        number = driver.begin(1, net.ticket(route, "job-1"))
        came = driver.step_nowait(nursery, (number, 0, [1, 2]))
        await wait_until(lambda: fake.all(StageRows))
        await fake.up.send(StageFault(index, sequence, Code.INTERNAL, "x"))
        await wait_until(lambda: driver.broken)
        assert driver.broken[0][0] == 0 and not driver.failed
        route[0] = good
        driver.driver.mended(1, net.ticket(route, "job-1"))
        await wait_until(lambda: came)
        assert came == expected_rows([1, 2], 2)


async def test_what_comes_over_an_older_opening_is_not_heard() -> None:
    async with open_stage_net() as net, trio.open_nursery() as nursery:
        place = await ring(net, nursery)
        await place.route[0].host.disconnect(place.route[2].peer)  # the driver's way to its first stage
        await wait_until(lambda: place.driver.broken)
        place.route[1] = place.good
        place.good.engine.is_stopped = True
        place.driver.driver.mended(1, net.ticket(place.route, "job-1"))
        await wait_until(lambda: place.driver.driver.state is RouteState.UP)
        for message in (StageRows(1, (Span(1, 0, 2),), rows=2 * ROW), StageFault(0, 0, Code.LINK_LOST, "late")):
            with pytest.raises(LinkLost):
                for _ in range(100):  # until the end of the stream has come back
                    await place.fake.down.send(message)
                    await trio.sleep(0.002)
        place.good.engine.is_stopped = False
        await wait_until(lambda: place.came)
        assert place.came == expected_rows([1, 2], 2) and len(place.driver.broken) == 1
