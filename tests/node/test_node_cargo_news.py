"""What a node knows of Cargos survives whatever happens to it; a revocation that it has acted on is never forgotten."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from node.cargo_news import CargoNews
from node.notice_store import NoticeStore
from protocol import limits
from protocol.cargo_news import NOTICE, About, Notice, cargo_key, key_of
from protocol.cargo_shelf import Why
from tests.node.cargo_net import open_news, open_node, until
from tests.protocol.cargo_samples import cargo, killed, listed, revoked
from tests.protocol.samples import HOLDER, NETWORK, NOW_MS, OTHER

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


async def test_known_again_after_a_restart(tmp_path: Path) -> None:
    one, two = cargo(), cargo(release="2.0.0")
    news = open_news(tmp_path)
    heard = await news.hear([listed(one), listed(two), killed(two)])
    assert [key_of(notice) for notice in heard.new] == [key_of(killed(two)), cargo_key(one.address)]
    again = open_news(tmp_path)
    assert again.cargo(one.address) == one and again.may_run(two.address) is Why.REVOKED
    assert again.may_run("ab" * 32) is Why.UNKNOWN
    assert again.known[About.CARGO].all() == [(cargo_key(one.address), listed(one))]
    assert files(tmp_path) == sorted([f"{one.address}.cargo", f"{key_of(killed(two)).hex()}.revoked"])
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in tmp_path.iterdir())


async def test_may_run_says_why_not(tmp_path: Path) -> None:
    expired, one, rival = cargo(expires_at_ms=NOW_MS + 1), cargo(release="2.0.0"), cargo(release="2.0.0", published_at_ms=NOW_MS + 1)
    news = open_news(tmp_path)
    await news.hear([listed(expired), listed(one), listed(rival)])
    assert news.may_run(expired.address) is Why.EXPIRED
    assert news.may_run(one.address) is None and news.may_run(rival.address) is Why.CONFLICT
    await news.hear([revoked(one, whole_key=True)])
    assert news.may_run(one.address) is Why.REVOKED
    assert news.may_run("cd" * 32, HOLDER.peer_id) is Why.REVOKED, "of the same key, whether or not it is here"
    assert news.may_run("cd" * 32, OTHER.peer_id) is Why.UNKNOWN


async def test_the_island_is_told_of_every_cargo_that_may_not_run_any_more(tmp_path: Path) -> None:
    one, two, elsewhere = cargo(), cargo(release="2.0.0"), cargo("loaded-from-a-file", publisher=OTHER)
    news, ended = open_news(tmp_path), list[str]()
    news.on_revoked.append(ended.append)
    await news.hear([listed(one), listed(two)])
    changed = trio.Event()
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await news.wait_changed()
            changed.set()

        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        await news.hear([revoked(whole_key=True)])
        await changed.wait()
    assert sorted(ended) == sorted([one.address, two.address])
    await news.hear([killed(elsewhere)])
    assert ended[2:] == [elsewhere.address], "also of one that came another way"
    await news.hear([killed(elsewhere), revoked(whole_key=True)])
    assert len(ended) == 3, "once"


async def test_it_is_on_the_disk_before_it_takes_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its name in the folder: a power cut takes neither."""
    done: list[str] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        flush(descriptor)

    news = open_news(tmp_path)
    await news.hear([listed()])
    monkeypatch.setattr(os, "fsync", fsync)
    news.on_revoked.append(lambda address: done.append("ended"))
    news.pass_on = lambda notices, sender: done.append("passed")
    await news.hear([killed()], "somebody")
    assert done == ["file", "folder", "ended", "passed"]


def test_killed_at_any_step_it_has_forgotten_nothing_that_it_acted_on(tmp_path: Path) -> None:
    """kill -9 before each call that changes the disk. One interpreter starts, which takes most of a second."""
    command = [sys.executable, "-m", "tests.node.cargo_killed", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    lives = [line.split() for line in run.stdout.splitlines()]
    assert len(lives) >= 6 and [life[1] for life in lives] == ["True"] * (len(lives) - 1) + ["False"]
    assert lives[0][2:] == [] and lives[-1][2:] == ["ended", "passed"]
    assert any("ended" in life[2:] and life[1] == "True" for life in lives), "killed behind it, too"
    for number, _, *done in lives:
        folder = tmp_path / number
        news = open_news(folder)
        assert news.may_run(cargo().address) in ((Why.REVOKED,) if done else (None, Why.REVOKED)), (number, done)
        assert not [name for name in files(folder) if name.startswith(".") or name.endswith(".damaged")]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "of another", "another name"])
async def test_what_is_damaged_comes_again_from_a_neighbour(tmp_path: Path, damage: str) -> None:
    one, other = cargo(), cargo("other")
    async with open_node(1, tmp_path / "1") as well:
        await well.news.hear([listed(one), listed(other), killed(other)])
        folder = tmp_path / "2"
        await open_news(folder).hear([listed(one), listed(other), killed(other)])
        for file in list(folder.iterdir()):
            data = file.read_bytes()
            match damage:
                case "cut":
                    file.write_bytes(data[:-1])
                case "empty":
                    file.write_bytes(b"")
                case "changed":
                    file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
                case "of another":
                    file.write_bytes(NOTICE.encode(listed(cargo("third"))))
                case "another name":
                    file.rename(folder / ("ab" * 32 + file.suffix))
        async with open_node(2, folder) as node:
            assert len(node.news.known[About.CARGO]) == len(node.news.known[About.REVOCATION]) == 0
            assert len(list(folder.glob("*.damaged"))) >= 1
            await node.connect(well)
            await until(lambda: node.news.may_run(other.address) is Why.REVOKED and node.news.cargo(one.address) is not None)
        again = open_news(folder)
        assert again.may_run(other.address) is Why.REVOKED and again.may_run(one.address) is None


async def test_a_full_disk_keeps_no_revocation_from_taking_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    news = open_news(tmp_path)
    await news.hear([listed()])
    monkeypatch.setattr(NoticeStore, "keep_words", full)
    assert len((await news.hear([killed()], "somebody")).new) == 1
    assert news.may_run(cargo().address) is Why.REVOKED and "No space left" in caplog.text


async def test_half_written_files_are_taken_away(tmp_path: Path) -> None:
    (tmp_path / ".abc.revoked.123.45").write_bytes(b"half")
    open_news(tmp_path)
    assert files(tmp_path) == []


async def test_a_revocation_whose_cargos_file_was_left_behind(tmp_path: Path) -> None:
    """Killed between the two: the Cargo is not taken in again."""
    one = cargo()
    news = open_news(tmp_path)
    await news.hear([killed(one)])
    (tmp_path / f"{one.address}.cargo").write_bytes(NOTICE.encode(listed(one)))
    again = open_news(tmp_path)
    assert again.may_run(one.address) is Why.REVOKED and not (tmp_path / f"{one.address}.cargo").exists()


async def test_a_shelf_that_is_full_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SHELF_CARGOS_MAX", 2)
    news = open_news(tmp_path)
    await news.hear([listed(cargo(f"cargo-{number}")) for number in range(3)])
    assert len(news.known[About.CARGO]) == 2 == len(files(tmp_path))
    await news.hear([killed(cargo("cargo-0"))])
    assert len((await news.hear([listed(cargo("cargo-2"))])).new) == 1, "there is room again"


async def test_what_was_refused_while_the_clock_was_wrong_is_taken_later(tmp_path: Path) -> None:
    clock = [NOW_MS - 600_000]
    news = CargoNews(tmp_path, NETWORK, lambda: clock[0])
    assert not (await news.hear([listed()])).new and news.counts.refused == 1
    clock[0] += 1000
    assert not (await news.hear([listed()])).new and news.counts.refused == 1, "not looked at again so soon"
    clock[0] = NOW_MS
    assert len((await news.hear([listed()])).new) == 1


async def test_what_was_said_early_costs_one_look(tmp_path: Path) -> None:
    news = open_news(tmp_path)
    assert (await news.hear([revoked()], "somebody")).useless == 1
    assert (await news.hear([revoked()], "somebody")).useless == 0
    await news.hear([listed()])
    assert news.may_run(cargo().address) is Why.REVOKED and len(files(tmp_path)) == 1


async def test_two_say_the_same_at_the_same_time(tmp_path: Path) -> None:
    news, told = open_news(tmp_path), list[Notice]()
    news.pass_on = lambda notices, sender: told.extend(notices)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(news.hear, [listed(), killed(cargo("other"))], "somebody")
    assert len(told) == 2 and news.counts.new == 2


async def test_broken_off_in_the_middle_it_is_whole(tmp_path: Path) -> None:
    news = open_news(tmp_path)
    await news.hear([listed()])
    with trio.CancelScope() as scope:
        news.on_revoked.append(lambda address: scope.cancel())
        await news.hear([killed()])
    assert news.may_run(cargo().address) is Why.REVOKED and open_news(tmp_path).may_run(cargo().address) is Why.REVOKED
    assert files(tmp_path) == [f"{key_of(killed()).hex()}.revoked"]
