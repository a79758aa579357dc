"""API keys: made once, stored hashed, looked up by every request.

The table lives in SQLite (WAL, so that ``archipelag-node keys create`` works beside a running Coordinator) or in any database that
SQLAlchemy reaches. A key that was found is remembered for ``REMEMBERED_S`` seconds; one that was not is looked up each time, so that a
new key counts at once. Revoking takes effect after ``REMEMBERED_S``.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from privacy.keys import API_KEY_ENTROPY_BYTES, api_key, api_key_hash, looks_like_api_key, same
from protocol import checks, limits
from protocol.errors import ConfigError

SCOPES = frozenset({"read", "write"})
ACCOUNT_DEFAULT = "local"
SCHEMA_VERSION = 1
REMEMBERED_S = 3.0
REMEMBERED_MAX = 10_000
_RATE_LIMIT_MAX = 10_000_000

_metadata = sql.MetaData()
_versions = sql.Table("coordinator_schema", _metadata, sql.Column("version", sql.Integer, nullable=False))
_keys = sql.Table(
    "api_keys",
    _metadata,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("hash", sql.String(64), nullable=False, unique=True),
    sql.Column("hint", sql.String(12), nullable=False),  # the key's first characters, to tell keys apart in a list
    sql.Column("account", sql.String(limits.NAME_CHARS_MAX), nullable=False),
    sql.Column("scopes", sql.String(64), nullable=False),
    sql.Column("rate_limit_per_minute", sql.Integer, nullable=False),  # 0: none
    sql.Column("created_at_ms", sql.BigInteger, nullable=False),
    sql.Column("revoked_at_ms", sql.BigInteger, nullable=True),
)
_HINT_CHARS = 7
_FIND = sql.select(_keys.c.id, _keys.c.hash, _keys.c.account, _keys.c.scopes, _keys.c.rate_limit_per_minute).where(
    _keys.c.hash == sql.bindparam("wanted"), _keys.c.revoked_at_ms.is_(None)
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key may do. ``rate_limit_per_minute`` 0 means no limit."""

    id: int
    account: str
    scopes: frozenset[str]
    rate_limit_per_minute: int

    def __post_init__(self) -> None:
        checks.label("account", self.account, limits.NAME_CHARS_MAX)
        checks.in_range("rate_limit_per_minute", self.rate_limit_per_minute, 0, _RATE_LIMIT_MAX)
        if not self.scopes or not self.scopes <= SCOPES:
            raise ValueError(f"scopes must be some of {', '.join(sorted(SCOPES))}, not {sorted(self.scopes)}")


def database_url_of(data_dir: Path) -> str:
    """Where a Coordinator keeps its books unless told otherwise."""
    return f"sqlite:///{data_dir / 'coordinator.db'}"


def create_key(
    database_url: str,
    account: str = ACCOUNT_DEFAULT,
    scopes: Iterable[str] = ("read", "write"),
    rate_limit_per_minute: int = 0,
) -> str:
    """Makes a key and returns it, the only time that it is seen. Works beside a running Coordinator. Raises ConfigError."""
    try:
        wanted = ApiKey(0, account, frozenset(scopes), rate_limit_per_minute)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with closing(KeyStore(database_url)) as store:
        return store.create(wanted)


class KeyStore:
    """The table of keys. Calls block for a fraction of a millisecond on SQLite; any thread may make them."""

    def __init__(self, database_url: str) -> None:
        """Opens the database and creates or checks its tables. Raises ConfigError when that is not possible."""
        try:
            self._engine = _open_engine(database_url)
            self._check_schema()
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise ConfigError(
                f"the database could not be opened ({type(error).__name__}); check --database-url"
            ) from error

    def create(self, wanted: ApiKey) -> str:
        key = api_key(secrets.token_bytes(API_KEY_ENTROPY_BYTES))
        row = {
            "hash": api_key_hash(key),
            "hint": key[:_HINT_CHARS],
            "account": wanted.account,
            "scopes": ",".join(sorted(wanted.scopes)),
            "rate_limit_per_minute": wanted.rate_limit_per_minute,
            "created_at_ms": time.time_ns() // 1_000_000,
        }
        with self._engine.begin() as connection:
            connection.execute(sql.insert(_keys), row)
        return key

    def find(self, key_hash: str) -> ApiKey | None:
        with self._engine.connect() as connection:
            row = connection.execute(_FIND, {"wanted": key_hash}).first()
        # the index has compared already; this comparison takes the same time wherever two hashes differ
        if row is None or not same(row.hash, key_hash):
            return None
        return ApiKey(row.id, row.account, frozenset(row.scopes.split(",")), row.rate_limit_per_minute)

    def revoke(self, key: str) -> bool:
        """False when there is no such key."""
        change = sql.update(_keys).where(_keys.c.hash == api_key_hash(key), _keys.c.revoked_at_ms.is_(None))
        with self._engine.begin() as connection:
            return connection.execute(change.values(revoked_at_ms=time.time_ns() // 1_000_000)).rowcount > 0

    def close(self) -> None:
        self._engine.dispose()

    def _check_schema(self) -> None:
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "sqlite":
                # two processes may come first at the same time: one of them waits here
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            _metadata.create_all(connection)
            version = connection.execute(sql.select(_versions.c.version)).scalar()
            if version is None:
                connection.execute(sql.insert(_versions), {"version": SCHEMA_VERSION})
            elif version > SCHEMA_VERSION:
                raise ConfigError(
                    f"the database was written by a newer version (schema {version}); upgrade this program"
                )


def _open_engine(database_url: str) -> sql.Engine:
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite":
        return sql.create_engine(url, pool_pre_ping=True)
    if url.database:
        # made before SQLite does it, so that nobody else can read it for a moment; WAL files take over its mode
        os.close(os.open(url.database, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        os.chmod(url.database, 0o600)
    engine = sql.create_engine(url, connect_args={"timeout": 10.0})

    @sql.event.listens_for(engine, "connect")
    def prepare(connection: sql.pool.PoolProxiedConnection, _record: object) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined]  # we begin transactions ourselves, see _check_schema
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


class KeyCache:
    """Keys that were found a moment ago. Bounded; ``clock`` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key_hash: str) -> ApiKey | None:
        entry = self._found.get(key_hash)
        if entry is None:
            return None
        key, until_s = entry
        if self._clock() >= until_s:
            del self._found[key_hash]
            return None
        return key

    def put(self, key_hash: str, key: ApiKey) -> None:
        self._found[key_hash] = key, self._clock() + REMEMBERED_S
        self._found.move_to_end(key_hash)
        if len(self._found) > REMEMBERED_MAX:
            self._found.popitem(last=False)


def hash_if_key(text: str) -> str | None:
    """The stored form of what may be a key; None for anything that cannot be one."""
    return api_key_hash(text) if looks_like_api_key(text) else None
