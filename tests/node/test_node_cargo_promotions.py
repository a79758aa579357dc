"""What a node has heard of promotions: the newest of a name counts, on every node, after whatever happens to it."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path
from typing import Any

import pytest

from node.cargo_news import CargoNews
from node.notice_store import NoticeStore
from protocol import limits
from protocol.cargo_news import NOTICE, About, Notice, key_of
from protocol.cargo_news import CargoNews as News
from tests.node.cargo_net import open_news, open_node, open_stranger, until
from tests.protocol.cargo_samples import cargo, killed, listed, promoted, promotion, signed_delegation
from tests.protocol.samples import COORDINATOR, FIRST, HOLDER, NETWORK, NOW_MS, OTHER

ONE, TWO, THREE = (cargo(release=f"{number}.0.0") for number in (1, 2, 3))
NAME = ONE.manifest.name
CARGOS = [listed(ONE), listed(TWO), listed(THREE)]
OLD, NEW = promoted(ONE, serial=5), promoted(TWO, serial=6, release="1.0.0")


def kept(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.promoted"))


def file_of(notice: Notice) -> str:
    return f"{key_of(notice).hex()}.promoted"


async def test_the_newest_counts_and_is_known_again_after_a_restart(tmp_path: Path) -> None:
    news = open_news(tmp_path)
    await news.hear(CARGOS)
    assert news.stands_for(NAME) == THREE
    for notice, stands in ((OLD, ONE), (NEW, TWO)):
        assert (await news.hear([notice])).new == [notice]
        assert news.stands_for(NAME) == stands
    assert kept(tmp_path) == [file_of(NEW)] and news.known[About.PROMOTION].all() == [(key_of(NEW), NEW)]
    assert stat.S_IMODE((tmp_path / file_of(NEW)).stat().st_mode) == 0o600
    again = open_news(tmp_path)
    assert again.stands_for(NAME) == TWO and again.status()["promotions"] == 1
    assert (await again.hear([OLD], "somebody")).new == [], "a node that was away hears old gossip first"
    assert again.stands_for(NAME) == TWO and kept(tmp_path) == [file_of(NEW)]


async def test_what_was_replaced_is_not_passed_on(tmp_path: Path) -> None:
    passed, news = list[Notice](), open_news(tmp_path)
    news.pass_on = lambda notices, sender: passed.extend(notices)
    await news.hear([NEW])
    hearing = await news.hear([OLD], "somebody")
    assert (hearing.new, hearing.useless) == ([], 1) and passed == [NEW] and not news.is_fresh(OLD) and news.is_fresh(NEW)


@pytest.mark.parametrize("order", list(itertools.permutations([OLD, NEW, promoted(THREE, serial=4)])))
async def test_in_one_message_the_newest_counts(tmp_path: Path, order: tuple[Notice, ...]) -> None:
    news = open_news(tmp_path)
    await news.hear([*CARGOS, *order, *order])
    assert news.stands_for(NAME) == TWO and kept(tmp_path) == [file_of(NEW)]


async def test_a_promotion_counts_before_the_cargos_of_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that comes with the pin of its name is at no moment what the name stands for."""
    news, stood = open_news(tmp_path), list[Any]()
    add = news.shelf.add

    def watched(one: Any) -> bool:
        is_new = add(one)
        stood.append(news.stands_for(NAME))
        return is_new

    monkeypatch.setattr(news.shelf, "add", watched)
    await news.hear([listed(ONE), listed(TWO), promoted(ONE)])
    assert stood == [ONE, ONE]


@pytest.mark.parametrize(
    "forged",
    [
        Notice(About.PROMOTION, promotion(TWO, OTHER, serial=9).envelope, b"", signed_delegation(COORDINATOR)),
        Notice(About.PROMOTION, promotion(TWO, HOLDER, serial=9).envelope, b"", signed_delegation(HOLDER, HOLDER)),
        Notice(About.PROMOTION, promotion(TWO, serial=9).envelope),
        promoted(TWO, serial=9, network="f" * 32),
        promoted(TWO, serial=9, at_ms=2**53),
        Notice(About.PROMOTION, b"rubbish", b"", signed_delegation(COORDINATOR)),
    ],
    ids=["a stranger", "the publisher", "no proof", "another network", "the future", "rubbish"],
)
async def test_what_no_coordinator_says_changes_nothing(tmp_path: Path, forged: Notice) -> None:
    news = open_news(tmp_path)
    await news.hear([*CARGOS, OLD])
    assert (await news.hear([forged], "somebody")).new == []
    assert news.stands_for(NAME) == ONE and kept(tmp_path) == [file_of(OLD)] and news.counts.refused == 1


async def test_it_is_on_the_disk_before_it_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    news, stood = open_news(tmp_path), list[Any]()
    await news.hear([*CARGOS, OLD])
    keep = NoticeStore.keep_words

    def watched(self: NoticeStore, words: Any) -> None:
        keep(self, words)
        stood.append((kept(tmp_path), news.stands_for(NAME)))

    monkeypatch.setattr(NoticeStore, "keep_words", watched)
    await news.hear([NEW])
    assert (sorted([file_of(OLD), file_of(NEW)]), ONE) in stood and news.stands_for(NAME) == TWO


@pytest.mark.parametrize("order", [(OLD, NEW), (NEW, OLD)])
async def test_killed_between_the_new_file_and_the_end_of_the_old_one(tmp_path: Path, order: tuple[Notice, Notice]) -> None:
    await open_news(tmp_path).hear([*CARGOS, order[0]])
    for notice in order:
        (tmp_path / file_of(notice)).write_bytes(NOTICE.encode(notice))
    again = open_news(tmp_path)
    assert again.stands_for(NAME) == TWO and kept(tmp_path) == [file_of(NEW)]
    assert again.known[About.PROMOTION].all() == [(key_of(NEW), NEW)]


async def test_a_full_disk_keeps_no_promotion_from_taking_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    news = open_news(tmp_path)
    await news.hear([*CARGOS, OLD])
    monkeypatch.setattr(NoticeStore, "keep_words", full)
    monkeypatch.setattr(NoticeStore, "drop_promotions", full)
    assert (await news.hear([NEW])).new == [NEW] and news.stands_for(NAME) == TWO and "No space left" in caplog.text


async def test_a_shelf_that_is_full_takes_no_more_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_PROMOTIONS_MAX", 1)
    news = open_news(tmp_path)
    assert (await news.hear([OLD, promoted(cargo("other")), NEW])).new == [NEW]
    assert (await news.hear([promoted(TWO, serial=7)])).new and news.status()["promotions"] == 1


async def test_of_two_coordinators_that_share_no_database_all_choose_the_same(tmp_path: Path) -> None:
    said = promoted(ONE, serial=5), promoted(TWO, FIRST, serial=5)
    chosen = set()
    for number, order in enumerate((said, said[::-1])):
        (tmp_path / str(number)).mkdir()
        news = CargoNews(tmp_path / str(number), NETWORK, lambda: NOW_MS)
        for notice in (*CARGOS, *order):
            await news.hear([notice])
        chosen.add(news.stands_for(NAME))
    assert len(chosen) == 1 and chosen <= {ONE, TWO}


async def test_a_revoked_one_gives_way(tmp_path: Path) -> None:
    news = open_news(tmp_path)
    await news.hear([*CARGOS, NEW, killed(TWO)])
    assert news.stands_for(NAME) == ONE
    assert open_news(tmp_path).stands_for(NAME) == ONE


async def test_neighbours_that_know_different_ones_end_up_with_the_newest(tmp_path: Path) -> None:
    """By catching up: each had its own before they met."""
    async with open_node(1, tmp_path / "1") as one, open_node(2, tmp_path / "2") as two:
        await one.news.hear([*CARGOS, OLD])
        await two.news.hear([*CARGOS, NEW])
        await one.connect(two)
        await until(lambda: one.news.stands_for(NAME) == TWO)
        assert two.news.stands_for(NAME) == TWO and kept(tmp_path / "1") == kept(tmp_path / "2") == [file_of(NEW)]
        await two.news.hear([promoted(ONE, serial=7)])
        await until(lambda: one.news.stands_for(NAME) == ONE)


async def test_a_stranger_who_replays_and_forges_moves_nothing(tmp_path: Path) -> None:
    async with open_node(1, tmp_path / "1") as node:
        await node.news.hear([*CARGOS, NEW])
        async with open_stranger(node) as stranger:
            forged = Notice(About.PROMOTION, promotion(ONE, OTHER, serial=9).envelope, b"", signed_delegation(OTHER, OTHER))
            await stranger.send(News((OLD, forged)))
            await stranger.send(News((promoted(cargo("marker")),)))
            await until(lambda: node.news.shelf.promotion("marker") is not None)
        assert node.news.stands_for(NAME) == TWO
