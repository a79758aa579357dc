"""API keys: kept hashed, seen at once, limited, and cheap."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sql

from coordinator.books.audit import audit
from coordinator.books.database import Database
from coordinator.books.ledger import SIGN_UP_MICROS
from coordinator.books.queries import account_view, account_views, key_of, keys_of
from coordinator.http.ratelimit import TRACKED_MAX, PerMinute
from coordinator.keys import (
    GRACE_S,
    KEYS_PER_ACCOUNT_MAX,
    REMEMBERED_MAX,
    REMEMBERED_S,
    ApiKey,
    KeyCache,
    KeyFault,
    KeyRefused,
    KeyStore,
    create_key,
    database_url_of,
    hash_if_key,
)
from privacy.keys import api_key_hash
from protocol.errors import ConfigError
from tests.coordinator.clients import HELLO, http
from tests.coordinator.fakes import coordinator, island

DAY_MS = 86_400_000
BOTH = frozenset({"read", "write"})


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


class Clock:
    """Unix milliseconds, by hand."""

    def __init__(self) -> None:
        self.ms = 20_000 * DAY_MS

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> KeyStore:
    return KeyStore(database, clock)


def wanted(account: str = "ann", scopes: frozenset[str] = BOTH, limit: int = 0) -> ApiKey:
    return ApiKey(0, account, scopes, limit)


def test_only_the_hash_is_stored(tmp_path: Path) -> None:
    key = create_key(database_url_of(tmp_path), account="ann", scopes=["read"], rate_limit_per_minute=7, name="laptop")
    database = Database(database_url_of(tmp_path))
    assert KeyStore(database).find(api_key_hash(key)) == ApiKey(1, "ann", frozenset({"read"}), 7)
    database.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"laptop" in everything
    assert key.encode() not in everything and key[3:].encode() not in everything


def test_a_made_key_does_not_show_in_its_repr(store: KeyStore) -> None:
    made = store.create(wanted())
    assert made.key not in repr(made) and made.record.hint == made.key[:7]


def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    os.umask(0o022)
    create_key(database_url_of(tmp_path))
    database = Database(database_url_of(tmp_path))
    KeyStore(database).find("x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    database.close()
    assert "coordinator.db" in modes and set(modes.values()) == {0o600}, modes


def test_a_key_makes_its_account_once(store: KeyStore, database: Database) -> None:
    store.create(wanted("ann"))
    store.create(wanted("ann"))
    store.create(wanted("bob"))
    with database.snapshot() as connection:
        views = account_views(connection)
        assert [(view.name, view.credits, view.keys) for view in views] == [("ann", SIGN_UP_MICROS, 2), ("bob", SIGN_UP_MICROS, 1)]
        assert audit(connection) == []


def test_lists_show_everything_but_the_key(store: KeyStore, database: Database, clock: Clock) -> None:
    made = store.create(wanted("ann", frozenset({"read"}), 9), "Löwe's laptop")
    store.create(wanted("bob"))
    with database.reading() as connection:
        (record,) = keys_of(connection, "ann")
        assert len(keys_of(connection)) == 2
    assert record == made.record
    assert (record.name, record.scopes, record.rate_limit_per_minute) == ("Löwe's laptop", ("read",), 9)
    assert (record.created_at_ms, record.last_used_at_ms, record.revoked_at_ms) == (clock.ms, None, None)


def test_the_limit_of_the_account_comes_with_its_keys(store: KeyStore, database: Database) -> None:
    made = store.create(wanted("ann"))
    with database.writing() as connection:
        connection.execute(sql.text("UPDATE accounts SET rate_limit_per_minute = 30"))
    found = store.find(api_key_hash(made.key))
    assert found == ApiKey(made.record.id, "ann", BOTH, 0, 30)


def test_revoked_keys_are_not_found(store: KeyStore) -> None:
    made = store.create(wanted())
    once = store.revoke(made.record.id)
    assert once.revoked_at_ms is not None and store.revoke(made.record.id) == once
    assert store.find(api_key_hash(made.key)) is None


def test_a_rotated_key_ends_when_its_time_is_over(store: KeyStore, database: Database, clock: Clock) -> None:
    old = store.create(wanted("ann", frozenset({"read"}), 5), "laptop")
    new = store.rotate(old.record.id)
    assert new.key != old.key and new.record.id != old.record.id
    assert (new.record.name, new.record.scopes, new.record.rate_limit_per_minute) == ("laptop", ("read",), 5)
    clock.ms += round(GRACE_S * 1000) - 1
    assert store.find(api_key_hash(old.key)) is not None
    with database.reading() as connection:
        assert key_of(connection, old.record.id).state(clock.ms) == "ending"  # type: ignore[union-attr]
    clock.ms += 1
    assert store.find(api_key_hash(old.key)) is None and store.find(api_key_hash(new.key)) is not None


def test_a_key_is_rotated_once(store: KeyStore) -> None:
    made = store.create(wanted())
    store.rotate(made.record.id, grace_s=0)
    assert store.find(api_key_hash(made.key)) is None
    with pytest.raises(KeyRefused) as refused:
        store.rotate(made.record.id)
    assert refused.value.fault is KeyFault.ENDED


def test_a_rotated_key_can_be_revoked_before_its_time(store: KeyStore, clock: Clock) -> None:
    made = store.create(wanted())
    store.rotate(made.record.id)
    assert store.revoke(made.record.id).revoked_at_ms == clock.ms
    assert store.find(api_key_hash(made.key)) is None


def test_keys_of_others_are_as_good_as_none(store: KeyStore) -> None:
    made = store.create(wanted("ann"))
    for change in (store.revoke, store.rotate):
        for key_id, account in ((made.record.id, "bob"), (made.record.id + 1, "ann"), (2**31 - 1, None)):
            with pytest.raises(KeyRefused) as refused:
                change(key_id, account)
            assert refused.value.fault is KeyFault.UNKNOWN
    assert store.find(api_key_hash(made.key)) is not None


def test_an_account_has_a_bounded_number_of_valid_keys(store: KeyStore, clock: Clock) -> None:
    ids = [store.create(wanted()).record.id for _ in range(KEYS_PER_ACCOUNT_MAX)]
    with pytest.raises(KeyRefused) as refused:
        store.create(wanted())
    assert refused.value.fault is KeyFault.TOO_MANY
    store.create(wanted("bob"))
    store.revoke(ids[0])
    store.rotate(ids[1])  # two are valid for a while
    with pytest.raises(KeyRefused):
        store.rotate(ids[2])
    clock.ms += round(GRACE_S * 1000)
    store.rotate(ids[2])


def test_last_use_only_goes_forward(store: KeyStore, database: Database) -> None:
    first, second = store.create(wanted()).record.id, store.create(wanted()).record.id
    store.note_used({first: 1000, second: 1000, 77: 1000})
    store.note_used({first: 500, second: 2000})
    with database.reading() as connection:
        assert [record.last_used_at_ms for record in keys_of(connection)] == [1000, 2000]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["admin"]},
        {"account": "a b"},
        {"account": ""},
        {"account": "x'; DROP TABLE api_keys; --"},
        {"account": "a" * 129},
        {"account": "nul\0"},
        {"rate_limit_per_minute": -1},
        {"rate_limit_per_minute": 10**30},
        {"rate_limit_per_minute": float("nan")},
        {"name": "two\nlines"},
        {"name": "nul\0"},
        {"name": "\ud800"},
        {"name": "x" * 129},
    ],
)
def test_wrong_wishes_are_refused_with_a_sentence(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_key(database_url_of(tmp_path), **wrong)  # type: ignore[arg-type]


def test_any_printable_name_is_kept_as_it_is(store: KeyStore, database: Database) -> None:
    for name in ("'; DROP TABLE api_keys; --", '"', "%s", ":name", "\\", "Robert'); --", "𝕬 ümlaut ☂"):
        made = store.create(wanted(), name)
        with database.reading() as connection:
            assert key_of(connection, made.record.id).name == name  # type: ignore[union-attr]
        assert store.find(api_key_hash(made.key)) is not None


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "oddbase://host/x"])
def test_a_database_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(ConfigError, match="database-url"):
        create_key(url)


_FIRST_SCHEMA = sql.MetaData()
_FIRST_VERSION = sql.Table("coordinator_schema", _FIRST_SCHEMA, sql.Column("version", sql.Integer, nullable=False))
_FIRST_KEYS = sql.Table(
    "api_keys",
    _FIRST_SCHEMA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("hash", sql.String(64), nullable=False, unique=True),
    sql.Column("hint", sql.String(12), nullable=False),
    sql.Column("account", sql.String(128), nullable=False),
    sql.Column("scopes", sql.String(64), nullable=False),
    sql.Column("rate_limit_per_minute", sql.Integer, nullable=False),
    sql.Column("created_at_ms", sql.BigInteger, nullable=False),
    sql.Column("revoked_at_ms", sql.BigInteger, nullable=True),
)


def first_version(url: str, version: int, *keys: tuple[str, str, int | None]) -> None:
    """Leaves a database as the first version did, with keys: (key, account, when revoked)."""
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        _FIRST_SCHEMA.create_all(connection)
        connection.execute(sql.insert(_FIRST_VERSION), {"version": version})
        for key, account, revoked in keys:
            row = {"hash": api_key_hash(key), "hint": key[:7], "account": account, "revoked_at_ms": revoked}
            rights = {"scopes": "read,write", "rate_limit_per_minute": 60, "created_at_ms": 1000}
            connection.execute(sql.insert(_FIRST_KEYS), {**row, **rights})
    engine.dispose()


def test_a_database_of_the_first_version_keeps_its_keys_and_its_accounts_get_credits(database_url: str) -> None:
    one, two, three, gone = (f"ak_{letter * 43}" for letter in "abcd")
    first_version(database_url, 1, (one, "ann", None), (two, "ann", None), (three, "bob", None), (gone, "eve", 5))
    for _ in range(2):  # the second time there is nothing left to do
        database = Database(database_url)
        store = KeyStore(database)
        assert store.find(api_key_hash(one)) == ApiKey(1, "ann", BOTH, 60)
        assert store.find(api_key_hash(three)) == ApiKey(3, "bob", BOTH, 60) and store.find(api_key_hash(gone)) is None
        with database.snapshot() as connection:
            views = account_views(connection)
            assert [(view.name, view.credits) for view in views] == [(name, SIGN_UP_MICROS) for name in ("ann", "bob", "eve")]
            assert audit(connection) == []
            assert [record.name for record in keys_of(connection, "ann")] == ["", ""]
        database.close()


def test_keys_can_be_made_in_a_database_of_the_first_version(database_url: str) -> None:
    first_version(database_url, 1, ("ak_" + "a" * 43, "ann", None))
    database = Database(database_url)
    made = KeyStore(database).rotate(1)
    assert made.record.id == 2 and KeyStore(database).find(api_key_hash(made.key)) is not None
    database.close()


def test_an_empty_database_of_the_first_version(database_url: str) -> None:
    first_version(database_url, 1)
    database = Database(database_url)
    with database.reading() as connection:
        assert account_views(connection) == [] and account_view(connection, "local") is None
    database.close()


def test_a_newer_database_is_refused(database_url: str) -> None:
    first_version(database_url, 99)
    with pytest.raises(ConfigError, match="newer version"):
        create_key(database_url)


def test_a_newer_database_of_these_migrations_is_refused(database_url: str) -> None:
    database = Database(database_url)
    with database.writing() as connection:
        connection.execute(sql.text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(ConfigError, match="newer version"):
        create_key(database_url)


def test_many_processes_may_open_a_new_database_at_once(database_url: str) -> None:
    code = "import sys; from coordinator.keys import create_key; print(create_key(sys.argv[1]))"
    children = [
        subprocess.Popen([sys.executable, "-c", code, database_url], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(4)
    ]
    keys = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    database = Database(database_url)
    store = KeyStore(database)
    assert all(store.find(api_key_hash(key)) for key in keys) and len(set(keys)) == 4
    with database.snapshot() as connection:
        assert [view.credits for view in account_views(connection)] == [SIGN_UP_MICROS] and audit(connection) == []
    database.close()


def test_the_cache_forgets_and_is_bounded() -> None:
    now = [0.0]
    cache, key = KeyCache(lambda: now[0]), ApiKey(1, "a", frozenset({"read"}), 0)
    for number in range(REMEMBERED_MAX + 5):
        cache.put(str(number), key)
    assert len(cache) == REMEMBERED_MAX and cache.get("0") is None and cache.get("100") is key
    cache.put("other", ApiKey(2, "a", frozenset({"read"}), 0))
    cache.forget(1)
    assert len(cache) == 1 and cache.get("other") is not None
    now[0] = REMEMBERED_S
    assert cache.get("other") is None


def test_only_what_may_be_a_key_is_looked_up() -> None:
    assert hash_if_key("ak_short") is None and hash_if_key("") is None and hash_if_key("ak_" + "é" * 43) is None
    assert hash_if_key("ak_" + "A" * 43) is not None


async def test_a_key_from_another_process_counts_at_once(tmp_path: Path) -> None:
    code = "import sys; from coordinator.keys import create_key; print(create_key(sys.argv[1]))"
    async with coordinator(tmp_path, island()) as running:
        made = subprocess.run([sys.executable, "-c", code, running.database_url], capture_output=True, text=True)
        async with http(running, made.stdout.strip()) as client:
            assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200


def test_a_minute_is_counted_from_its_first_request() -> None:
    window = PerMinute()
    standings = [window.count("a", 2, now_s) for now_s in (10.0, 20.0, 69.9, 70.0)]
    assert [(s.allowed, s.remaining) for s in standings] == [(True, 1), (True, 0), (False, 0), (True, 1)]
    assert standings[1].reset_s == 50.0
    assert standings[2].headers() == {
        "X-RateLimit-Limit": "2",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "1",
        "Retry-After": "1",
    }
    for number in range(TRACKED_MAX + 5):
        window.count(number, 2, 100.0)
    assert len(window) == TRACKED_MAX


async def test_a_keys_request_limit(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        limited = create_key(running.database_url, rate_limit_per_minute=3)
        async with http(running, limited) as client:
            answers = [await client.get("/v1/models") for _ in range(4)]
            stream = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
        async with http(running) as client:
            assert "x-ratelimit-limit" not in (await client.get("/v1/models")).headers
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    assert 0 < int(answers[3].headers["retry-after"]) <= 60 and stream.status_code == 429
    assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"


async def test_wrong_keys_of_an_address_are_limited_and_right_ones_pass(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        async with http(running, "ak_" + "B" * 43) as client:
            statuses = [(await client.get("/v1/models")).status_code for _ in range(7)]
            blocked = await client.get("/v1/models")
        async with http(running) as client:
            good = await client.get("/v1/models")
        async with http(running, "") as client:
            missing = await client.get("/v1/models")
    assert statuses == [401] * 5 + [429] * 2
    assert 0 < int(blocked.headers["retry-after"]) <= 60 and blocked.json()["error"]["code"] == "rate_limit_exceeded"
    assert good.status_code == 200 and missing.status_code == 401


@pytest.mark.parametrize(
    ("proxies", "header", "limited_together"),
    [
        ((), "10.9.9.{}", True),  # nobody is trusted: the header means nothing
        (("127.0.0.0/8",), "10.9.9.{}", False),
        (("127.0.0.1",), "6.6.6.{}, 10.9.9.9", True),  # what the client put in front of the proxy's word is its own
        (("127.0.0.1", "10.9.9.9"), "6.6.6.{}, 10.9.9.9", False),
        (("127.0.0.1",), "{} nonsense", True),
    ],
)
async def test_forwarded_addresses_count_only_from_trusted_proxies(
    tmp_path: Path, proxies: tuple[str, ...], header: str, limited_together: bool
) -> None:
    async with (
        coordinator(tmp_path, island(), trusted_proxies=proxies) as running,
        httpx.AsyncClient(base_url=running.url, headers={"Authorization": "Bearer wrong"}) as client,
    ):
        statuses = [
            (await client.get("/v1/models", headers={"X-Forwarded-For": header.format(number)})).status_code
            for number in range(8)
        ]
    assert statuses == ([401] * 5 + [429] * 3 if limited_together else [401] * 8)
