"""Keys of bridges: when they were used last is written, and a key that is revoked over HTTP counts no more at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest
import trio

from coordinator import direct_keys
from coordinator.books.accounts import CreateAccount
from coordinator.books.database import Database
from coordinator.books.errors import BooksUnavailable
from coordinator.books.queries import key_of
from coordinator.books.stored import apply_together
from coordinator.direct_keys import DirectKeys
from coordinator.http.errors import ApiError
from coordinator.keys import ApiKey, KeyStore
from tests.coordinator.clients import http
from tests.coordinator.desks import opened, until, url_of
from tests.coordinator.fakes import island

WRITE = frozenset({"read", "write"})
USED_MS = 1_728_000_000_000


@pytest.fixture
def store(database_url: str) -> Iterator[KeyStore]:
    with closing(Database(database_url)) as database:
        with database.writing() as connection:
            apply_together(connection, (CreateAccount("ada"),), USED_MS)
        yield KeyStore(database)


def used_ms(store: KeyStore, key_id: int) -> int | None:
    with store._database.reading() as connection:
        record = key_of(connection, key_id)
    assert record is not None
    return record.last_used_at_ms


async def test_last_use_is_written_now_and_then_and_at_the_end(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct_keys.USED_WRITTEN_S >= 60
    made = store.create(ApiKey(0, "ada", WRITE, 0), "")
    now_ms = [USED_MS]
    keys = DirectKeys(store, trio.current_time, lambda: now_ms[0])
    note_used = store.note_used
    lost: list[Mapping[int, int]] = []

    def away_once(batch: Mapping[int, int]) -> None:
        if not lost:
            lost.append(batch)
            raise BooksUnavailable("away")
        note_used(batch)

    monkeypatch.setattr(store, "note_used", away_once)
    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr(direct_keys, "USED_WRITTEN_S", 0.01)
            nursery.start_soon(keys.run)
            await keys.admit(made.key, "write", "peer")
            await until(lambda: used_ms(store, made.record.id) == USED_MS)
            assert lost == [{made.record.id: USED_MS}], "what could not be written waited for the next time"
        now_ms[0] += 5
        await keys.admit(made.key, "write", "peer")
        nursery.cancel_scope.cancel()
    assert used_ms(store, made.record.id) == USED_MS + 5


async def test_a_key_that_is_refused_was_not_used(store: KeyStore) -> None:
    made = store.create(ApiKey(0, "ada", frozenset({"read"}), 0), "")
    keys = DirectKeys(store, trio.current_time, lambda: USED_MS)
    with pytest.raises(ApiError, match="scope"):
        await keys.admit(made.key, "write", "peer")
    await keys._write_used()
    assert used_ms(store, made.record.id) is None


async def test_a_key_revoked_over_http_opens_no_desk_either(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1)) as running, http(running) as client:
        made = (await client.post("/api/v1/api-keys", json={"name": "bridge"})).json()
        keys = running.server._parts.direct_keys
        await keys.admit(made["key"], "write", "peer")
        assert (await client.delete(f"/api/v1/api-keys/{made['id']}")).status_code == 200
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ApiError) as refused:
            await keys.admit(made["key"], "write", "peer")
        assert refused.value.status == 401
