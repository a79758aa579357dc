"""Who may use a stage, and for what: every opening that must be refused, and that nothing is reached or left behind by it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from node.bookkeeper import now_ms
from node.jobs_served import island_hello
from privacy.keys import NodeKey
from protocol import limits
from protocol.errors import Code, LinkLost
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from protocol.prices import Ask
from protocol.shards import LayerRange
from protocol.stage_messages import (
    STAGE,
    STAGE_PROTOCOL,
    SequenceEnd,
    SequenceOpen,
    Span,
    StageFault,
    StageOpen,
    StageOpened,
    StageRows,
)
from protocol.tickets import TicketStage
from tests.node.stage_net import (
    BOOT,
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

STRANGER = NodeKey(b"x" * 32)


@dataclass
class Site:
    """A stage between an Island that says what a test wants and a driver that only listens, and somebody whom none of it concerns."""

    net: StageNet
    before: Island
    stage: Island
    behind: FakeStage
    outsider: Island

    @property
    def route(self) -> list[Island]:
        return [self.before, self.stage, self.behind.island]

    def ticket(self, **changes: Any) -> bytes:
        return self.net.ticket(changes.pop("islands", self.route), **changes)

    async def check_serves(self) -> None:
        """A good opening, and a good row."""
        stream = await self.before.open(self.stage, opening(self.ticket(), 1, session=b"g" * 16))
        assert await answer_of(stream) == StageOpened(("echo/1",))
        await _row(self, stream, self.ticket(), 1)
        await stream.aclose()


async def site(net: StageNet) -> Site:
    before, stage, behind, outsider = [await net.island() for _ in range(4)]
    stage.hold(LayerRange(1, 2))
    return Site(net, before, stage, FakeStage(behind), outsider)


async def _row(place: Site, stream: Any, ticket: bytes, sequence: int) -> None:
    """Opens a sequence and waits for its first row on the other side."""
    known = len(place.behind.all(StageRows))
    await stream.send(SequenceOpen(sequence, 16, 0, 0, 0, ticket))
    rows = struct.pack("<16f", *range(16))
    await stream.send(StageRows(1, (Span(sequence, 0, 1),), rows=rows))
    await wait_until(lambda: len(place.behind.all(StageRows)) > known)
    (value, *_) = struct.unpack("<16f", place.behind.all(StageRows)[-1].rows)
    assert value == (sum(range(16)) * 7.0 + 2.0) % 8191.0


BAD_OPENINGS: dict[str, tuple[dict[str, Any], Code, str]] = {
    "expired": ({"issued_at_ms": 1_000, "expires_at_ms": 2_000}, Code.BAD_TICKET, "expired"),
    "from the future": ({"issued_at_ms": 2**51, "expires_at_ms": 2**51 + 1}, Code.BAD_TICKET, "future"),
    "earlier boot": ({"boots": (BOOT, BOOT - 1, BOOT)}, Code.BAD_TICKET, "earlier run"),
    "another network": ({"network": "0" * 32}, Code.BAD_TICKET, "another network"),
    "no Coordinator": ({"signer": STRANGER}, Code.BAD_TICKET, "no Coordinator"),
    "signed by somebody else": ({"issuer": STRANGER.peer_id}, Code.BAD_TICKET, "somebody else"),
    "another model": ({"content_hash": "ab" * 32}, Code.UNKNOWN_CARGO, "does not hold"),
    "layers that are not held": (
        {"layers": [LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)]},
        Code.UNKNOWN_CARGO,
        "does not hold layers 1-2",
    ),
}


@pytest.mark.parametrize("name", BAD_OPENINGS)
async def test_a_ticket_that_is_no_good_opens_nothing(name: str) -> None:
    changes, code, words = BAD_OPENINGS[name]
    async with open_stage_net() as net:
        place = await site(net)
        stream = await place.before.open(place.stage, opening(place.ticket(**changes), 1))
        await _check_refused(place, stream, code, words)


@pytest.mark.parametrize(
    ("route", "sender", "index", "words"),
    [
        ("before behind", "before", 1, "another Island"),
        ("before stage behind", "before", 0, "does not make this Island stage 0"),
        ("before stage behind", "before", 2, "does not make this Island stage 2"),
        ("before stage behind", "before", 7, "does not make this Island stage 7"),
        ("before stage behind", "outsider", 1, "another Island as the stage before"),
        ("before stage behind", "behind", 1, "another Island as the stage before"),
        ("before stage outsider", "behind", 1, "another Island as the stage before"),
        ("stage behind outsider", "before", 0, "another Island as the stage before"),
    ],
)
async def test_who_is_not_the_stage_before_is_refused_and_no_hop_is_dialed(route: str, sender: str, index: int, words: str) -> None:
    async with open_stage_net() as net:
        place = await site(net)
        names = {"before": place.before, "stage": place.stage, "behind": place.behind.island, "outsider": place.outsider}
        ticket = net.ticket([names[name] for name in route.split()], layers=[LayerRange(n, n + 1) for n in range(len(route.split()))])
        stream = await names[sender].open(place.stage, opening(ticket, index))
        await _check_refused(place, stream, Code.BAD_TICKET, words, index)
        assert set(place.stage.host.connected_peers()) <= {names[sender].peer, place.before.peer, place.behind.island.peer}
        assert not place.outsider.served


@pytest.mark.parametrize("spoil", ["signature", "garbage", "no stages"])
async def test_a_forged_ticket(spoil: str) -> None:
    async with open_stage_net() as net:
        place = await site(net)
        ticket = place.ticket()
        if spoil == "signature":
            ticket = ticket[:-3] + bytes([ticket[-3] ^ 1]) + ticket[-2:]
        elif spoil == "garbage":
            ticket = b"\xc1 nonsense"
        else:
            ticket = net.ticket([place.stage], stages=())
        stream = await place.before.open(place.stage, opening(ticket, 1 if spoil != "no stages" else 0))
        answer = await answer_of(stream)
        assert isinstance(answer, StageFault) and answer.code is Code.BAD_TICKET and not answer.sequence
        assert not place.stage.neighbours.opened and place.stage.stage.is_free
        await place.check_serves()


async def _check_refused(place: Site, stream: Any, code: Code, words: str, index: int = 1) -> None:
    answer = await answer_of(stream)
    assert isinstance(answer, StageFault) and (answer.index, answer.sequence, answer.code) == (index, 0, code), answer
    assert words in answer.message
    with pytest.raises(LinkLost):
        await answer_of(stream)
    assert not place.stage.neighbours.opened, "nobody is dialed for it"
    assert not place.behind.island.served and place.stage.stage.is_free
    await place.check_serves()


async def test_an_older_opening_is_refused_and_a_newer_one_takes_over() -> None:
    async with open_stage_net() as net:
        place = await site(net)
        first = await place.before.open(place.stage, opening(place.ticket(), 1, epoch=2))
        assert isinstance(await answer_of(first), StageOpened)
        for epoch in (1, 2):
            again = await place.before.open(place.stage, opening(place.ticket(), 1, epoch=epoch))
            answer = await answer_of(again)
            assert answer.code is Code.BAD_TICKET and "comes after opening 2" in answer.message
        await _row(place, first, place.ticket(), 1)
        newer = await place.before.open(place.stage, opening(place.ticket(), 1, epoch=3))
        assert isinstance(await answer_of(newer), StageOpened)
        with pytest.raises(LinkLost):
            await answer_of(first)
        await _row(place, newer, place.ticket(), 2)
        assert place.stage.stage.status()["sessions"] == 1


async def test_a_second_session_while_one_is_at_work() -> None:
    async with open_stage_net() as net:
        place = await site(net)
        first = await place.before.open(place.stage, opening(place.ticket(), 1))
        assert isinstance(await answer_of(first), StageOpened)
        older = place.ticket(issued_at_ms=now_ms() - 5000)
        second = await place.before.open(place.stage, opening(older, 1, session=b"t" * 16))
        answer = await answer_of(second)
        assert answer.code is Code.NO_CAPACITY and "another pipeline uses layers 1-1" in answer.message
        await _row(place, first, place.ticket(), 1)
        await place.check_serves()  # the Coordinator's newer plan takes its place
        with pytest.raises(LinkLost):
            await answer_of(first)


async def test_a_link_that_is_lost_while_it_is_opened_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STAGE_ORPHAN_S", 0.05)
    monkeypatch.setattr(limits, "ROUTE_OPEN_S", 0.3)
    async with open_stage_net() as net:
        place = await site(net)
        behind, waits = place.behind.island, trio.Event()

        async def is_silent(stream: Any) -> None:
            waits.set()
            await trio.sleep_forever()

        behind.host.set_handler(STAGE_PROTOCOL, STAGE, is_silent)
        stream = await place.before.open(place.stage, opening(place.ticket(), 1))
        await waits.wait()
        assert place.stage.stage.status()["route"]
        stream.abort()
        await wait_until(lambda: not place.stage.stage.status()["route"])
        behind.host.set_handler(STAGE_PROTOCOL, STAGE, place.behind.serve)
        await place.check_serves()
        assert place.stage.stage.status()["sessions"] == 2, "the first one is gone, nothing was adopted"


@pytest.mark.parametrize("case", ["another version", "no hello", "no opening", "two hellos", "oversized", "garbage"])
async def test_who_breaks_the_protocol_before_the_opening_loses_the_stream(case: str) -> None:
    async with open_stage_net() as net:
        place = await site(net)
        place.before.host.remember(place.stage.peer, place.stage.host.addresses())
        stream = await place.before.host.open(place.stage.peer, STAGE_PROTOCOL, STAGE)
        hello = island_hello(NETWORK, "test")
        if case == "another version":
            await stream.send(Hello(PROTOCOL_VERSION + 1, NodeRole.ISLAND, NETWORK, "test"))
        elif case == "no hello":
            await stream.send(opening(place.ticket(), 1))
        elif case == "no opening":
            await stream.send(hello)
            await stream.send(SequenceEnd((1,)))
        elif case == "two hellos":
            await stream.send(hello)
            await stream.send(hello)
        elif case == "oversized":
            await stream.send_frames(struct.pack(">II", 10, 2**31), 1)
        else:
            await stream.send_frames(struct.pack(">II", 3, 0) + b"\xc1\xc1\xc1", 1)
        with pytest.raises(LinkLost):
            while True:
                await answer_of(stream)
        assert not place.stage.neighbours.opened and place.stage.stage.is_free
        await place.check_serves()


BAD_JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "another route": ({"turned": True}, "another route"),
    "other layers": ({"layers": [LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)]}, "another route"),
    "another model": ({"content_hash": "ab" * 32}, "another route"),
    "expired": ({"issued_at_ms": 1_000, "expires_at_ms": 2_000}, "expired"),
    "earlier boot": ({"boots": (BOOT, BOOT - 1, BOOT)}, "earlier run"),
    "no Coordinator": ({"signer": STRANGER}, "no Coordinator"),
    "used": ({}, "used before"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
async def test_a_job_whose_ticket_is_no_good_is_refused_and_others_go_on(name: str) -> None:
    changes, words = BAD_JOBS[name]
    async with open_stage_net() as net:
        place = await site(net)
        stream = await place.before.open(place.stage, opening(place.ticket(), 1))
        assert isinstance(await answer_of(stream), StageOpened)
        used = place.ticket()
        await _row(place, stream, used, 1)
        kept = place.stage.stage.status()["kept_bytes"]
        if changes.get("turned"):
            changes = {"islands": [place.before, place.stage, place.outsider]}
        await stream.send(SequenceOpen(2, 16, 0, 0, 0, used if name == "used" else place.ticket(**changes)))
        answer = await answer_of(stream)
        assert (answer.index, answer.sequence, answer.code) == (1, 2, Code.BAD_TICKET) and words in answer.message
        await stream.send(StageRows(2, (Span(1, 1, 1), Span(2, 0, 1)), rows=bytes(128)))
        await wait_until(lambda: len(place.behind.all(StageRows)) == 2)
        assert place.behind.all(StageRows)[-1].spans == (Span(1, 1, 1),), "rows of the refused job are dropped without a word"
        assert place.stage.stage.status()["kept_bytes"] == kept + 64 and place.stage.engine.rows == 2
        assert [message.sequence for message in place.behind.all(SequenceOpen)] == [1]
        await stream.send(SequenceEnd((1, 2)))
        await wait_until(lambda: not place.stage.engine.cells and not place.stage.stage.status()["kept_bytes"])


async def test_the_same_opening_said_again_is_no_second_use() -> None:
    async with open_stage_net() as net:
        place = await site(net)
        used = place.ticket()
        stream = await place.before.open(place.stage, opening(place.ticket(), 1))
        assert isinstance(await answer_of(stream), StageOpened)
        await _row(place, stream, used, 1)
        await stream.send(SequenceOpen(1, 16, 0, 0, 0, used))
        await wait_until(lambda: len(place.behind.all(SequenceOpen)) == 2)
        other = await place.before.open(place.stage, opening(place.ticket(), 1, epoch=2))
        assert isinstance(await answer_of(other), StageOpened)
        await other.send(SequenceOpen(1, 16, 0, 0, 0, used))
        await wait_until(lambda: len(place.behind.all(SequenceOpen)) == 3)
        assert place.stage.engine.rows == 1 and place.stage.guard.refused == 0


async def test_a_driver_takes_only_what_it_has_asked_for() -> None:
    async with open_stage_net() as net:
        route, driver = await net.ring(3)
        sequence = driver.begin(1, net.ticket(route))
        await driver.step((sequence, 0, [1]))
        before = len(route[-1].served)
        for session, epoch in ((b"s" * 16, 1), (driver.driver._session, 1), (driver.driver._session, 2)):
            stream = await route[1].open(route[2], StageOpen(session, epoch, 2, net.ticket(route)))
            answer = await answer_of(stream)
            assert answer.code is Code.BAD_TICKET and "has not asked for that" in answer.message
        assert len(route[-1].served) == before + 3
        assert await driver.values((sequence, 1, [2])) == expected_rows([1, 2], 2)[1:] and not driver.broken


async def test_what_stages_ask_stands_in_the_ticket() -> None:
    """Two jobs of one route with different prices share it, and the stage before the first is the driver."""
    async with open_stage_net() as net:
        route, driver = await net.ring(2)
        first = driver.begin(1, net.ticket(route))
        stages = tuple(TicketStage(LayerRange(n, n + 1), Ask(per_job=99)) for n in range(2))
        second = driver.begin(2, net.ticket(route, stages=stages, issued_at_ms=now_ms() - 1000))
        assert await driver.values((first, 0, [5]), (second, 0, [6])) == [*expected_rows([5], 1), *expected_rows([6], 1)]
