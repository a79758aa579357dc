"""What whoever distributes requests sees of a Coordinator that cannot take them: one that drains, and one whose database has gone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from coordinator import upkeep
from coordinator.books import database as books_database
from coordinator.books import writer as books_writer
from coordinator.books.database import TROUBLE_FORGOTTEN_S, Database, Trouble
from protocol.errors import ConfigError
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import CHAT, JOBS, chat, error_of, opened, submit, until, url_of
from tests.coordinator.fakes import Running, Script, island
from tests.postgres import PostgresServer

TOLD = "the database cannot be used at the moment"


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upkeep looks every 20 ms, a commit is tried for 0.1 s."""
    monkeypatch.setattr(books_database, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(books_writer, "RETRY_S", 0.1)
    monkeypatch.setattr(upkeep, "BEAT_S", 0.02)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)


async def health(running: Running) -> tuple[int, str]:
    """Over a connection of its own, as load balancers ask."""
    async with http(running, "") as client:
        answer = await client.get("/health")
    assert answer.json()["version"] == "0" and answer.json()["islands"] == 1
    return answer.status_code, answer.json()["status"]


# Draining


async def test_a_drain_is_seen_while_it_lasts(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    async with opened(url_of(tmp_path), one) as running:
        assert await health(running) == (200, "ok")
        answers: list[httpx.Response] = []
        drained: list[bool] = []

        async def ask() -> None:
            answers.append(await chat(running))

        async def drain() -> None:
            drained.append(await running.server.drain(10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: one.open_now == 1)
            nursery.start_soon(drain)
            await until(lambda: running.server._services.draining.is_set())
            assert await health(running) == (503, "draining")
            async with http(running) as client:
                error_of(await client.post(CHAT, json=HELLO), 503, "draining")
                assert (await client.get("/v1/models")).status_code == 200, "who looks is answered"
            assert not drained and not answers
            more.set()
        assert drained == [True] and answers[0].status_code == 200
        with pytest.raises(httpx.ConnectError):
            await health(running)


async def test_who_only_looks_does_not_hold_a_drain_up(tmp_path: Path) -> None:
    """A job that waits for its Island is left to others; whoever asks for it meanwhile does not keep us."""
    more = trio.Event()
    one = island(1, Script(hang_after=1, until=more), slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), one) as running, http(running) as client, trio.open_nursery() as nursery:
        nursery.start_soon(chat, running)
        await until(lambda: one.open_now == 1)
        waiting = await submit(running)
        drained: list[bool] = []

        async def drain() -> None:
            drained.append(await running.server.drain(10))

        nursery.start_soon(drain)
        await until(lambda: running.server._services.draining.is_set())
        async with client.stream("GET", f"{JOBS}/{waiting}/stream") as watched:
            assert watched.status_code == 200
            # its place is taken by nobody else: the Island has gone before its slot is free
            running.port.lose(one)
            more.set()
            await until(lambda: bool(drained))
        assert drained == [True]


# The database


@pytest.mark.usefixtures("hurry")
async def test_a_database_that_has_gone_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.db"
    async with opened(url_of(tmp_path), island(1)) as running:
        assert await health(running) == (200, "ok")
        file.rename(tmp_path / "elsewhere.db")
        await until(lambda: not running.server._parts.upkeep.healthy)
        assert await health(running) == (503, "books_unavailable")
        (tmp_path / "elsewhere.db").rename(file)
        await until(lambda: running.server._parts.upkeep.healthy)
        assert await health(running) == (200, "ok")


@pytest.mark.usefixtures("hurry")
async def test_a_database_that_says_nothing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its machine was switched off: no error comes, for minutes."""
    monkeypatch.setattr(upkeep, "DEAD_S", 0.3)
    async with opened(url_of(tmp_path), island(1)) as running:

        async def silent(*_arguments: object) -> None:
            await trio.sleep_forever()

        with monkeypatch.context() as patch:
            patch.setattr(running.server.books, "change", silent)
            await until(lambda: not running.server._parts.upkeep.healthy)
            assert await health(running) == (503, "books_unavailable")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.new_database()
    yield url
    if not postgres_server.running:
        postgres_server.restart()
    postgres_server.drop(url)


@pytest.mark.usefixtures("hurry")
async def test_clients_do_not_hear_where_the_database_is(
    postgres_server: PostgresServer, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(postgres_url, island(1)) as running, http(running) as client:
        assert (await chat(running)).status_code == 200, "the key is known from now on"
        with caplog.at_level(logging.WARNING, "coordinator.books.database"):
            await trio.to_thread.run_sync(postgres_server.kill)
            for _ in range(3):
                for path in ("/api/v1/market/history/echo", JOBS, "/api/v1/account", "/api/v1/api-keys"):
                    assert error_of(await client.get(path), 503, "books_unavailable")["message"] == TOLD
                assert error_of(await client.post(CHAT, json=HELLO), 503, "books_unavailable")["message"] == TOLD
            await until(lambda: not running.server._parts.upkeep.healthy)
            assert await health(running) == (503, "books_unavailable")
        said = [entry.getMessage() for entry in caplog.records if entry.name == "coordinator.books.database"]
        assert any(str(postgres_server.folder) in text for text in said), "the log says where"
        assert len(said) == len(set(said)) < 10, "each reason once, not for each of many requests"
        await trio.to_thread.run_sync(postgres_server.restart)
        await until(lambda: running.server._parts.upkeep.healthy)
        assert await health(running) == (200, "ok")


def test_each_trouble_is_told_once_and_again_when_it_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    trouble = Trouble(lambda: now_s)

    def said(*reasons: str) -> list[str]:
        caplog.clear()
        for reason in reasons:
            trouble.note(reason)
        return [entry.getMessage().removeprefix("the database cannot be used: ") for entry in caplog.records]

    with caplog.at_level(logging.WARNING, "coordinator.books.database"):
        assert said("locked", "locked", "gone", "locked", "gone") == ["locked", "gone"]
        for _ in range(100):  # it goes on for more than an hour
            now_s += TROUBLE_FORGOTTEN_S
            assert said("gone", "gone") == []
        assert said("locked") == ["locked"], "it was over"
        many = [f"reason {number}" for number in range(1000)]
        assert said(*many) == many and len(trouble._seen_s) <= books_database._TROUBLES_MAX


def test_an_operator_hears_at_once_what_keeps_a_database_from_opening(tmp_path: Path) -> None:
    (tmp_path / "coordinator.db").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        Database(f"sqlite:///{tmp_path / 'coordinator.db'}")
