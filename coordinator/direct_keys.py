"""API keys of bridges: the same keys and limits as over HTTP, asked from trio. A peer id stands where HTTP has an address.

Requests over the two ways are counted apart: a key with a limit may send as many over each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import trio

from coordinator.books.errors import BooksUnavailable
from coordinator.http.errors import ApiError, unavailable
from coordinator.http.ratelimit import Limit, PerMinute, Standing, count_in_all, tightest
from coordinator.keys import ApiKey, KeyCache, KeyStore, hash_if_key
from protocol import limits
from protocol.direct import RateStanding

log = logging.getLogger(__name__)

USED_WRITTEN_S = 60.0  # when keys were last used is written this often at most


class DirectKeys:
    """``clock`` in seconds, only forward; ``wall_ms`` in Unix milliseconds."""

    def __init__(self, store: KeyStore, clock: Callable[[], float], wall_ms: Callable[[], int]) -> None:
        self._store, self._clock, self._wall_ms = store, clock, wall_ms
        self._cache = KeyCache(clock)
        self._used_ms: dict[int, int] = {}  # key id -> when, since it was written last
        self._of_keys, self._of_accounts, self._wrong_keys = PerMinute(), PerMinute(), PerMinute()

    async def admit(self, text: str, scope: str, peer: str, counts: bool = True) -> tuple[ApiKey, RateStanding]:
        """The key, and where it stands. ``counts``: it is a request, not a further step of one. Raises ApiError 401, 403, 429 or 503."""
        key = await self._find(text)
        if key is None:
            raise self._wrong_key(peer)
        if scope not in key.scopes:
            raise ApiError(403, f"this key lacks the scope {scope!r}", code="insufficient_scope", kind="permission_error")
        standing = self._count(key) if counts else RateStanding()
        self._used_ms[key.id] = self._wall_ms()
        return key, standing

    def forget(self, key_id: int) -> None:
        """The key was revoked here: it counts no more at once."""
        self._cache.forget(key_id)

    async def run(self) -> None:
        """Writes down when keys were last used, and once more at the end."""
        try:
            while True:
                await trio.sleep(USED_WRITTEN_S)
                await self._write_used()
        finally:
            with trio.CancelScope(shield=True):
                await self._write_used()

    async def _write_used(self) -> None:
        """What cannot be written waits for the next time."""
        batch, self._used_ms = self._used_ms, {}
        if not batch:
            return
        try:
            await trio.to_thread.run_sync(self._store.note_used, batch)
        except BooksUnavailable as error:
            log.warning("when keys were last used could not be written: %s", error)
            self._used_ms = batch | self._used_ms

    async def _find(self, text: str) -> ApiKey | None:
        key_hash = hash_if_key(text)
        if key_hash is None:
            return None
        key = self._cache.get(key_hash)
        if key is None:
            try:
                key = await trio.to_thread.run_sync(self._store.find, key_hash)
            except BooksUnavailable as error:
                raise unavailable(str(error)) from error
            if key is not None:
                self._cache.put(key_hash, key)
        return key

    def _wrong_key(self, peer: str) -> ApiError:
        standing = self._wrong_keys.count(peer, limits.DESK_WRONG_KEYS_PER_MINUTE, self._clock())
        if standing.allowed:
            return ApiError(401, "the API key is not known here", code="invalid_api_key", kind="authentication_error")
        return _too_many(standing, "too many wrong API keys from this bridge")

    def _count(self, key: ApiKey) -> RateStanding:
        per_key = Limit(self._of_keys, key.id, key.rate_limit_per_minute, "this key")
        per_account = Limit(self._of_accounts, key.account, key.account_limit_per_minute, "this account")
        wanted = [limit for limit in (per_key, per_account) if limit.per_minute]
        if not wanted:
            return RateStanding()
        standing = tightest(count_in_all(wanted, self._clock()))
        if not standing.allowed:
            raise _too_many(standing, f"{standing.whose} may send {standing.limit} requests a minute")
        return RateStanding(standing.limit, standing.remaining, math.ceil(standing.reset_s))


def _too_many(standing: Standing, what: str) -> ApiError:
    text = f"{what}; try again in {standing.reset_s:.0f} s"
    return ApiError(429, text, code="rate_limit_exceeded", kind="rate_limit_error", headers=standing.headers())
