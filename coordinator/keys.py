"""API keys: made once, stored hashed, looked up by every request.

The table is part of the books, in SQLite (WAL, so that ``archipelag-node keys create`` works beside a running Coordinator) or PostgreSQL.
A key that was found is remembered for ``REMEMBERED_S`` seconds; one that was not is looked up each time, so that a new key counts at
once. Revoking takes effect after ``REMEMBERED_S`` at other Coordinators, and at once where it was asked for over HTTP.

Rotation: a new key takes over what the old one may do, and the old one stays valid for ``GRACE_S``, so that nobody is locked out while
programs learn the new one. Its ``revoked_at_ms`` lies ahead meanwhile; by it alone a key is judged.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sql

from coordinator.books.accounts import CreateAccount
from coordinator.books.database import Database, sqlite_url
from coordinator.books.queries import KeyRecord, key_of, valid_keys
from coordinator.books.schema import accounts, api_keys
from coordinator.books.stored import apply_together
from privacy.keys import API_KEY_ENTROPY_BYTES, api_key, api_key_hash, looks_like_api_key, same
from protocol import checks, limits
from protocol.errors import ArchipelagError, ConfigError

SCOPES = frozenset({"read", "write"})
ACCOUNT_DEFAULT = "local"
GRACE_S = 86_400.0
GRACE_MAX_S = 30 * 86_400.0
KEYS_PER_ACCOUNT_MAX = 100  # that are valid at the same time
REMEMBERED_S = 3.0
REMEMBERED_MAX = 10_000
RATE_LIMIT_MAX = 10_000_000  # a minute
_HINT_CHARS = 7

_FIND = (
    sql.select(
        api_keys.c.id,
        api_keys.c.hash,
        api_keys.c.account,
        api_keys.c.scopes,
        api_keys.c.rate_limit_per_minute,
        sql.func.coalesce(accounts.c.rate_limit_per_minute, 0).label("account_limit_per_minute"),
    )
    .select_from(api_keys.outerjoin(accounts, accounts.c.name == api_keys.c.account))
    .where(
        api_keys.c.hash == sql.bindparam("wanted"),
        sql.or_(api_keys.c.revoked_at_ms.is_(None), api_keys.c.revoked_at_ms > sql.bindparam("now_ms")),
    )
)
_NOTE_USED = (
    sql.update(api_keys)
    .where(
        api_keys.c.id == sql.bindparam("key_id"),
        sql.or_(api_keys.c.last_used_at_ms.is_(None), api_keys.c.last_used_at_ms < sql.bindparam("used_at_ms")),
    )
    .values(last_used_at_ms=sql.bindparam("used_at_ms"))
)


class KeyFault(StrEnum):
    """Why a change of keys is refused."""

    UNKNOWN = "unknown_key"
    ENDED = "key_ended"
    TOO_MANY = "too_many_keys"


class KeyRefused(ArchipelagError):
    """Nothing has changed; the message says why."""

    def __init__(self, fault: KeyFault, message: str) -> None:
        super().__init__(message)
        self.fault, self.message = fault, message


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key may do. Limits are requests a minute, of this key and of all keys of its account together; 0 means no limit."""

    id: int
    account: str
    scopes: frozenset[str]
    rate_limit_per_minute: int
    account_limit_per_minute: int = 0

    def __post_init__(self) -> None:
        checks.label("account", self.account, limits.NAME_CHARS_MAX)
        checks.in_range("rate_limit_per_minute", self.rate_limit_per_minute, 0, RATE_LIMIT_MAX)
        if not self.scopes or not self.scopes <= SCOPES:
            raise ValueError(f"scopes must be some of {', '.join(sorted(SCOPES))}, not {sorted(self.scopes)}")


@dataclass(frozen=True, slots=True)
class MadeKey:
    """A new key, the only time that it is seen, and what is kept of it."""

    key: str = field(repr=False)
    record: KeyRecord


def database_url_of(data_dir: Path) -> str:
    """Where a Coordinator keeps its books unless told otherwise."""
    return sqlite_url(data_dir)


def create_key(
    database_url: str,
    account: str = ACCOUNT_DEFAULT,
    scopes: Iterable[str] = ("read", "write"),
    rate_limit_per_minute: int = 0,
    name: str = "",
) -> str:
    """Makes a key, and its account where there is none, and returns the key. Works beside a running Coordinator.

    Raises ConfigError, BooksUnavailable.
    """
    try:
        wanted = ApiKey(0, account, frozenset(scopes), rate_limit_per_minute)
        check_key_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with closing(Database(database_url)) as database:
        try:
            return KeyStore(database).create(wanted, name).key
        except KeyRefused as refused:
            raise ConfigError(f"{refused}; see archipelag-node keys list") from refused


def check_key_name(name: str) -> None:
    """What its owner calls a key; may be empty. Raises ValueError."""
    checks.printable("name", name, limits.NAME_CHARS_MAX)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class KeyStore:
    """The table of keys. Calls block for a fraction of a millisecond on SQLite; any thread may make them.

    All of them raise BooksUnavailable where the database cannot be used.
    """

    def __init__(self, database: Database, clock_ms: Callable[[], int] = _now_ms) -> None:
        self._database, self._clock_ms = database, clock_ms

    def __repr__(self) -> str:
        return f"<KeyStore of {self._database!r}>"

    def create(self, wanted: ApiKey, name: str = "") -> MadeKey:
        """For the account of ``wanted``, which is made where there is none. Raises KeyRefused when it has too many keys."""
        now_ms = self._clock_ms()
        with self._database.writing() as connection:
            apply_together(connection, [CreateAccount(wanted.account)], now_ms)
            _need_room(connection, wanted.account, now_ms)
            return _insert(connection, wanted, name, now_ms)

    def find(self, key_hash: str) -> ApiKey | None:
        """What is valid now."""
        with self._database.reading() as connection:
            row = connection.execute(_FIND, {"wanted": key_hash, "now_ms": self._clock_ms()}).first()
        # the index has compared already; this comparison takes the same time wherever two hashes differ
        if row is None or not same(row.hash, key_hash):
            return None
        return ApiKey(
            row.id, row.account, frozenset(row.scopes.split(",")), row.rate_limit_per_minute, row.account_limit_per_minute
        )

    def revoke(self, key_id: int, account: str | None = None) -> KeyRecord:
        """From now on. ``account``: whose key it has to be. Saying it again changes nothing. Raises KeyRefused."""
        now_ms = self._clock_ms()
        with self._database.writing() as connection:
            record = _need_key(connection, key_id, account)
            if record.is_valid(now_ms):
                connection.execute(_revoking(key_id, now_ms))
                record = _need_key(connection, key_id, account)
            return record

    def rotate(self, key_id: int, account: str | None = None, grace_s: float = GRACE_S) -> MadeKey:
        """A new key that may do what this one may, which ends after ``grace_s`` seconds. Raises KeyRefused."""
        now_ms = self._clock_ms()
        with self._database.writing() as connection:
            old = _need_key(connection, key_id, account)
            if old.revoked_at_ms is not None:
                raise KeyRefused(KeyFault.ENDED, f"key {key_id} has been revoked or rotated before")
            _need_room(connection, old.account, now_ms)
            connection.execute(_revoking(key_id, now_ms + round(grace_s * 1000)))
            wanted = ApiKey(0, old.account, frozenset(old.scopes), old.rate_limit_per_minute)
            return _insert(connection, wanted, old.name, now_ms)

    def note_used(self, used_at_ms: Mapping[int, int]) -> None:
        """When keys were last used, by their id, in one transaction. Later figures of other Coordinators stay."""
        with self._database.writing() as connection:
            rows = [{"key_id": key_id, "used_at_ms": at_ms} for key_id, at_ms in sorted(used_at_ms.items())]
            connection.execute(_NOTE_USED, rows)


def _revoking(key_id: int, at_ms: int) -> sql.Update:
    return sql.update(api_keys).where(api_keys.c.id == key_id).values(revoked_at_ms=at_ms)


def _need_key(connection: sql.Connection, key_id: int, account: str | None) -> KeyRecord:
    record = key_of(connection, key_id)
    if record is None or account not in (None, record.account):
        # the same for another account's: it is nobody's business that it exists
        raise KeyRefused(KeyFault.UNKNOWN, f"there is no key {key_id}")
    return record


def _need_room(connection: sql.Connection, account: str, now_ms: int) -> None:
    if valid_keys(connection, account, now_ms) >= KEYS_PER_ACCOUNT_MAX:
        text = f"account {account} has {KEYS_PER_ACCOUNT_MAX} valid keys, the most there can be; revoke one first"
        raise KeyRefused(KeyFault.TOO_MANY, text)


def _insert(connection: sql.Connection, wanted: ApiKey, name: str, now_ms: int) -> MadeKey:
    key = api_key(secrets.token_bytes(API_KEY_ENTROPY_BYTES))
    row = {
        "hash": api_key_hash(key),
        "hint": key[:_HINT_CHARS],
        "account": wanted.account,
        "scopes": ",".join(sorted(wanted.scopes)),
        "rate_limit_per_minute": wanted.rate_limit_per_minute,
        "created_at_ms": now_ms,
        "name": name,
    }
    made = connection.execute(sql.insert(api_keys).returning(api_keys.c.id), row)
    return MadeKey(key, _need_key(connection, made.scalar_one(), wanted.account))


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

    def forget(self, key_id: int) -> None:
        """The key was revoked: ask the database again."""
        for key_hash in [key_hash for key_hash, (key, _) in self._found.items() if key.id == key_id]:
            del self._found[key_hash]


def hash_if_key(text: str) -> str | None:
    """The stored form of what may be a key; None for anything that cannot be one."""
    return api_key_hash(text) if looks_like_api_key(text) else None
