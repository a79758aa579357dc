"""A Coordinator's registry and the network's news are kept alike: what one hears the other knows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.books import cargos as cargo_rows
from coordinator.books.errors import BooksUnavailable
from coordinator.cargo_rules import CargoState
from coordinator.registry import Registry
from node import cargo_listing
from node.bookkeeper import now_ms
from node.cargo_listing import CargoListing
from node.cargo_news import CargoNews
from protocol import limits
from protocol.cargo_news import About, key_of
from protocol.cargo_promotions import sign_promotion
from protocol.cargo_shelf import Why
from protocol.tickets import Delegation, sign_delegation
from tests.coordinator.desks import opened, url_of
from tests.coordinator.fakes import Running
from tests.node.cargo_net import until
from tests.protocol.cargo_samples import cargo, killed, listed, promoted, revocation, revoked
from tests.protocol.samples import COORDINATOR, NETWORK, NETWORK_KEY, NOW_MS


@dataclass
class Both:
    running: Running
    registry: Registry
    news: CargoNews


def delegation() -> bytes:
    expires_at_ms = now_ms() + int(limits.DELEGATION_LIFETIME_S * 1000)
    return sign_delegation(Delegation(NETWORK, COORDINATOR.peer_id, expires_at_ms), NETWORK_KEY)


@asynccontextmanager
async def both(folder: Path, **settings: Any) -> AsyncIterator[Both]:
    """A Coordinator and the news of its node, kept alike. Called again with the same folder it is the same."""
    (folder / "news").mkdir(exist_ok=True)
    async with opened(url_of(folder), **settings) as running:
        news = CargoNews(folder / "news", NETWORK)
        listing = CargoListing(running.server.registry, news, NETWORK, COORDINATOR, delegation, now_ms)
        async with listing.running():
            yield Both(running, running.server.registry, news)


async def test_what_is_published_is_listed_and_what_is_revoked_there_ends(tmp_path: Path) -> None:
    one = cargo()
    async with both(tmp_path) as it:
        await it.registry.publish("local", one.envelope)
        await until(lambda: it.news.cargo(one.address) == one)
        await it.registry.revoke(revocation(one))
        await until(lambda: it.news.may_run(one.address) is Why.REVOKED)


async def test_what_an_operator_has_still_to_see_is_not_listed(tmp_path: Path) -> None:
    one, two = cargo(), cargo("other")
    async with both(tmp_path, auto_approve_cargos=False) as it:
        for each in (one, two):
            await it.registry.publish("local", each.envelope)
        await it.running.server.books.change(cargo_rows.set_state, two.address, CargoState.APPROVED, NOW_MS)
        await it.registry.refresh()
        await until(lambda: it.news.cargo(two.address) is not None)
        assert it.news.may_run(one.address) is Why.UNKNOWN


async def test_a_publishers_word_from_the_network_reaches_the_registry(tmp_path: Path) -> None:
    one = cargo()
    async with both(tmp_path) as it:
        await it.registry.publish("local", one.envelope)
        await until(lambda: it.news.cargo(one.address) is not None)
        await it.news.hear([revoked(one)], "somebody")
        await until(lambda: it.registry.manifest("text-stats") is None and it.registry.knows_revocation(key_of(revoked(one))))
        entry = it.registry.find(one.address)
        assert entry is not None and entry.revoked_at_ms
    async with both(tmp_path) as again:
        assert again.registry.manifest(one.address) is None


async def test_another_coordinators_kill_switch_keeps_its_proof(tmp_path: Path) -> None:
    """It was heard from the network; a node that starts with nothing believes it all the same."""
    one = cargo()
    async with both(tmp_path) as it:
        await it.registry.publish("local", one.envelope)
        await until(lambda: it.news.cargo(one.address) is not None)
        await it.news.hear([killed(one)], "somebody")
        await until(lambda: it.registry.manifest("text-stats") is None)
    for file in (tmp_path / "news").iterdir():
        file.unlink()
    async with both(tmp_path) as again:
        await until(lambda: len(again.news.known[About.REVOCATION]) == 1)
        assert again.news.known[About.REVOCATION].all() == [(key_of(killed(one)), killed(one))]


async def test_promotions_go_out_with_the_proof_of_whoever_signed_them(tmp_path: Path) -> None:
    """Before the Cargos that they keep from being taken for what their name stands for; those of others stay out of the database."""
    one, two, three = (cargo(release=f"{number}.0.0") for number in (1, 2, 3))
    heard: list[About] = []
    async with both(tmp_path) as it:
        signer = Registry(
            it.running.server.books,
            now_ms,
            sign=lambda promotion: sign_promotion(promotion, COORDINATOR),
            delegation=delegation,
            network=NETWORK,
        )
        it.news.pass_on = lambda notices, sender: heard.extend(notice.about for notice in notices)
        for each, is_candidate in ((one, False), (two, True)):
            await signer.publish("local", each.envelope, is_candidate)
        await it.registry.refresh()
        await until(lambda: len(heard) == 3)
        assert heard[-2:] in ([About.PROMOTION, About.CARGO], [About.CARGO, About.CARGO]) and About.PROMOTION in heard[:2]
        assert it.news.stands_for("text-stats") == one
        for release in (two, one):
            await signer.promote("local", "text-stats", release.address, "ab:1")
            await it.registry.refresh()
            await until(lambda: it.news.stands_for("text-stats") == release)  # noqa: B023 (it is called at once)
        assert len(it.news.known[About.PROMOTION]) == 1
        await it.news.hear([listed(three), promoted(three, serial=2**50)], "another database's Coordinator")
        assert it.news.stands_for("text-stats") == three
        await it.registry.refresh()
        current = it.registry.current("text-stats")
        assert current is not None and current.cargo == one
    async with both(tmp_path) as again:
        assert again.news.stands_for("text-stats") == three, "the network's is newer than the database's"


async def test_a_database_that_is_away_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cargo_listing, "_AGAIN_S", 0.01)
    one, tries = cargo(), list[bytes]()
    async with both(tmp_path) as it:
        await it.registry.publish("local", one.envelope)
        await until(lambda: it.news.cargo(one.address) is not None)
        note = it.registry.note_revocation

        async def away(signed: object, proof: bytes) -> None:
            tries.append(proof)
            if len(tries) < 3:
                raise BooksUnavailable("as the test wants it")
            await note(signed, proof)  # type: ignore[arg-type]

        monkeypatch.setattr(it.registry, "note_revocation", away)
        await it.news.hear([killed(one)], "somebody")
        await until(lambda: it.registry.manifest("text-stats") is None)
        assert len(tries) == 3


async def test_what_the_news_do_not_take_is_not_tried_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_CARGOS_MAX", 1)
    async with both(tmp_path) as it:
        await it.registry.publish("local", cargo("aaa").envelope)
        await until(lambda: len(it.news.known[About.CARGO]) == 1)
        await it.registry.publish("local", cargo("bbb").envelope)
        await until(lambda: it.news.counts.refused == 1)
        await it.registry.publish("local", cargo("ccc").envelope)
        await until(lambda: it.news.counts.refused == 2)
        assert it.news.counts.new == 1
