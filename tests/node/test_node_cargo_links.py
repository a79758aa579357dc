"""News of Cargos between real hosts: it reaches whoever is connected to anybody, in time, and nothing that is false or too much does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from node import cargo_links, cargo_news
from node.cargo_links import SERVED_PER_PEER_MAX
from node.greeting import answer_hello, exchange_hello
from node.net.frames import FrameStream
from node.net.host import open_host
from protocol import limits
from protocol.cargo_news import (
    CARGOS,
    CARGOS_PROTOCOL,
    About,
    CargoNews,
    CargosKnown,
    CargosWanted,
    Notice,
    Told,
    key_of,
    read_notice,
)
from protocol.cargo_shelf import Why
from protocol.errors import LinkLost
from protocol.messages import Hello
from tests.node.cargo_net import Node, hello, open_node, open_stranger, receive, until
from tests.protocol.cargo_samples import cargo, killed, listed, revoked
from tests.protocol.samples import COORDINATOR, HOLDER, NOW_MS, OTHER


@asynccontextmanager
async def chain(folder: Path, count: int, gossips: bool = False) -> AsyncIterator[list[Node]]:
    """Nodes in a row, each connected to the next only."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(open_node(n + 1, folder / str(n), gossips)) for n in range(count)]
        for one, two in pairwise(nodes):
            await one.connect(two)
        yield nodes


async def linked(*nodes: Node) -> None:
    await until(lambda: all(node.links.linked() for node in nodes))


async def test_published_and_killed_at_one_end_heard_at_the_other(tmp_path: Path) -> None:
    """The last one has only an Island as neighbour."""
    one, other = cargo(), cargo("other")
    async with chain(tmp_path, 4) as nodes:
        await linked(*nodes)
        await nodes[0].news.hear([listed(one), listed(other)])
        for node in nodes:
            await node.wait_has(one)
            await node.wait_has(other)
            assert node.news.may_run(one.address) is None
        await nodes[0].news.hear([killed(one)])
        for node in nodes:
            await node.wait_ended(one)
            assert node.ended == [one.address] and node.news.may_run(one.address) is Why.REVOKED
            assert node.news.may_run(other.address) is None


async def test_a_publishers_own_word_goes_everywhere_too(tmp_path: Path) -> None:
    one, two = cargo(), cargo(release="2.0.0")
    async with chain(tmp_path, 3) as nodes:
        await linked(*nodes)
        await nodes[2].news.hear([listed(one), listed(two)])
        await nodes[0].wait_has(two)
        await nodes[0].news.hear([revoked(whole_key=True)])
        await nodes[2].wait_ended(one)
        await nodes[2].wait_ended(two)


async def test_an_island_that_was_away_catches_up_at_once(tmp_path: Path) -> None:
    one = cargo()
    async with open_node(1, tmp_path / "1") as stays:
        async with open_node(2, tmp_path / "2") as island:
            await island.connect(stays)
            await stays.news.hear([listed(one)])
            await island.wait_has(one)
        await stays.news.hear([killed(one)])
        async with open_node(2, tmp_path / "2") as island:
            assert island.news.may_run(one.address) is None, "it does not know yet"
            await island.connect(stays)
            await island.wait_ended(one)
        async with open_node(2, tmp_path / "2") as island:
            assert island.news.may_run(one.address) is Why.REVOKED and not island.ended, "known from its disk"


async def test_more_than_fits_into_one_answer_comes_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARGO_NOTICES_MAX", 3)
    monkeypatch.setattr(limits, "CARGO_KEYS_MAX", 4)
    cargos = [cargo(f"cargo-{number}") for number in range(20)]
    async with open_node(1, tmp_path / "1") as one, open_node(2, tmp_path / "2") as two:
        await one.news.hear([listed(each) for each in cargos[:14]])
        await two.news.hear([listed(each) for each in cargos[10:]])
        await one.news.hear([killed(each) for each in cargos[:7]])
        await one.connect(two)
        for node in (one, two):
            await until(partial(_knows, node, 13, 7))


async def test_gossip_alone_carries_it_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody holds a link: only the topic is there."""
    monkeypatch.setattr(cargo_links, "LINKS_MAX", 0)
    one = cargo()
    async with chain(tmp_path, 3, gossips=True) as nodes:
        topic = nodes[0].links._topic
        await until(lambda: all(_meshed(node, topic) for node in nodes))
        assert not any(node.links.linked() for node in nodes)
        await nodes[0].news.hear([listed(one)])
        await nodes[2].wait_has(one)
        await nodes[0].news.hear([killed(one)])
        await nodes[2].wait_ended(one)
        # what does not count goes no further than the first
        false = replace(killed(cargo("other"), OTHER), delegation=killed().delegation)
        assert nodes[0].gossip is not None
        nodes[0].links._publish.send_nowait(false)
        await until(lambda: nodes[1].news.counts.refused == 1)
        await nodes[0].news.hear([listed(cargo("last"))])
        await nodes[2].wait_has(cargo("last"))
        assert nodes[2].news.counts.refused == 0


def _knows(node: Node, cargos: int, revocations: int) -> bool:
    return (len(node.news.known[About.CARGO]), len(node.news.known[About.REVOCATION])) == (cargos, revocations)


def _meshed(node: Node, topic: str) -> bool:
    assert node.gossip is not None and node.gossip._pubsub is not None
    router: object = node.gossip._pubsub.router
    return bool(getattr(router, "mesh", {}).get(topic))


FALSE: dict[str, Notice] = {
    "a kill switch by a stranger": replace(killed(coordinator=OTHER), delegation=killed().delegation),
    "a kill switch without a delegation": replace(killed(), delegation=b""),
    "a kill switch of another network": killed(network="0" * 32),
    "a stranger's own word": revoked(signer=OTHER, publisher=OTHER.peer_id),
    "a stranger's own word on all": revoked(signer=OTHER, publisher=OTHER.peer_id, whole_key=True),
    "an unlisted Cargo": replace(listed(cargo("unlisted")), listing=b""),
    "a Cargo listed by a stranger": replace(listed(cargo("unlisted"), OTHER), delegation=listed().delegation),
    "rubbish": Notice(About.REVOCATION, b"rubbish"),
}


@pytest.mark.parametrize("name", FALSE)
async def test_what_is_false_goes_no_further(tmp_path: Path, name: str) -> None:
    one = cargo()
    async with chain(tmp_path, 2) as nodes:
        await linked(*nodes)
        await nodes[0].news.hear([listed(one)])
        await nodes[1].wait_has(one)
        async with open_stranger(nodes[0]) as stranger:
            await stranger.send(CargoNews((FALSE[name],)))
            await stranger.send(CargoNews((listed(cargo("last")),)))
            await nodes[1].wait_has(cargo("last"))
        for node in nodes:
            assert node.news.may_run(one.address) is None and node.ended == []
            assert len(node.news.known[About.REVOCATION]) == 0 and len(node.news.known[About.CARGO]) == 2
        assert nodes[1].news.counts.refused == 0, "it was not even told"


async def test_a_revocation_that_comes_before_its_cargo_counts_when_that_comes(tmp_path: Path) -> None:
    one = cargo()
    async with chain(tmp_path, 2) as nodes:
        await linked(*nodes)
        async with open_stranger(nodes[0]) as stranger:
            await stranger.send(CargoNews((revoked(one),)))
            await stranger.send(CargoNews((listed(one),)))
            await until(lambda: len(nodes[0].news.known[About.REVOCATION]) == 1)
        assert nodes[0].news.may_run(one.address) is Why.REVOKED
        await until(lambda: len(nodes[1].news._early) == 1)  # told now that it counts; there the Cargo never was
    async with open_node(1, tmp_path / "0") as again:
        assert again.news.may_run(one.address, HOLDER.peer_id) is Why.REVOKED, "from its disk"


async def test_a_flood_is_read_ever_more_slowly_and_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARGO_USELESS_BURST", 60.0)
    one = cargo()
    async with chain(tmp_path, 2) as nodes:
        await linked(*nodes)
        await nodes[0].news.hear([listed(one)])
        await nodes[1].wait_has(one)
        async with open_stranger(nodes[1]) as flooder, trio.open_nursery() as nursery:
            rubbish = [revoked(signer=OTHER, publisher=OTHER.peer_id, at_ms=NOW_MS + n, cargo=f"{n:064x}") for n in range(300)]

            async def flood() -> None:
                for notice in rubbish:
                    await flooder.send(CargoNews((notice,)))

            started_s = trio.current_time()
            nursery.start_soon(flood)
            await until(lambda: len(nodes[1].news._early) >= 60)
            await nodes[0].news.hear([killed(one)])
            await nodes[1].wait_ended(one)
            passed_s = trio.current_time() - started_s
            assert len(nodes[1].news._early) <= 60 + passed_s * limits.CARGO_USELESS_PER_S + 2
            nursery.cancel_scope.cancel()
        assert len(nodes[0].news._early) == 0, "none of it was passed on"


async def test_an_early_word_is_kept_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_EARLY_MAX", 10)
    async with open_node(1, tmp_path / "1") as node:
        for number in range(30):
            await node.news.hear([revoked(signer=OTHER, publisher=OTHER.peer_id, cargo=f"{number:064x}")], "somebody")
        assert len(node.news._early) == 10 and list((tmp_path / "1").iterdir()) == [], "and writes nothing"


async def test_a_notice_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bytes] = []

    def read(notice: Notice, *more: Any) -> Told:
        looked.append(notice.envelope)
        return read_notice(notice, *more)

    monkeypatch.setattr(cargo_news, "read_notice", read)
    good, bad = listed(), replace(listed(cargo("other")), listing=b"")
    async with open_node(1, tmp_path / "1") as node:
        for _ in range(5):
            await node.news.hear([good, bad], "somebody")
        assert len(looked) == 2 and node.news.counts.known == 8
        assert (await node.news.hear([good])).useless == 0, "what everybody repeats costs nobody anything"


# -- what may be said on the stream


async def test_who_asks_is_answered(tmp_path: Path) -> None:
    one, two = cargo(), cargo("other")
    async with open_node(1, tmp_path / "1") as node, open_stranger(node) as stranger:
        await node.news.hear([listed(one), listed(two), killed(two)])
        pushed = await receive(stranger)
        assert {key_of(notice) for notice in pushed.notices} <= {key_of(each) for each in (listed(one), listed(two), killed(two))}
        await stranger.send(CargosWanted(About.CARGO))
        told = await receive(stranger)
        while isinstance(told, CargoNews):
            told = await receive(stranger)
        assert told == CargosKnown((listed(one),))
        await stranger.send(CargosWanted(About.CARGO, known=key_of(listed(one))))
        assert await receive(stranger) == CargosKnown(())


@pytest.mark.parametrize("said", [CargosKnown(()), hello()])
async def test_what_nobody_asked_for_ends_the_stream(tmp_path: Path, said: object) -> None:
    async with open_node(1, tmp_path / "1") as node, open_stranger(node) as stranger:
        await stranger.send(said)
        with pytest.raises(LinkLost):
            await receive(stranger)
        await until(lambda: node.links.linked() == ())


async def test_nodes_of_another_network_and_too_many_streams_are_turned_away(tmp_path: Path) -> None:
    foreign = Hello(1, hello().role, "0" * 32, "test")
    async with open_node(1, tmp_path / "1") as node:
        with pytest.raises(LinkLost):
            async with open_stranger(node, 201, foreign):
                pass
        async with open_stranger(node) as first, open_another(first) as second:
            for stream in (first, second):
                await stream.send(CargosWanted(About.CARGO))
                assert await receive(stream) == CargosKnown(())
            async with open_another(first) as third:
                with pytest.raises(LinkLost):
                    await receive(third)
            assert SERVED_PER_PEER_MAX == 2


@asynccontextmanager
async def open_another(stream: FrameStream) -> AsyncIterator[FrameStream]:
    """One more stream of the same stranger."""
    one: Any = stream
    more = await one.opener.open(stream.remote_peer, CARGOS_PROTOCOL, CARGOS)
    more.opener = one.opener
    try:
        await exchange_hello(more, hello())
        yield more
    finally:
        more.abort()


async def test_a_neighbour_that_goes_round_in_circles_is_left(tmp_path: Path) -> None:
    """It answers every question with the same Cargo and says that there is more."""
    asked: list[CargosWanted] = []

    async def serve(stream: FrameStream) -> None:
        await answer_hello(stream, hello)
        while True:
            asked.append(await stream.receive())
            await stream.send(CargosKnown((listed(),), more=True))

    async with open_host((77).to_bytes(32, "big")) as host, open_node(1, tmp_path / "1") as node:
        host.set_handler(CARGOS_PROTOCOL, CARGOS, serve)
        await host.connect(node.host.addresses()[0])
        await until(lambda: len(asked) >= 2 and not node.links.linked())
        assert len(asked) == 2, "the second answer leads nowhere"
        assert COORDINATOR.peer_id in node.news._coordinators
