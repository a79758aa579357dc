"""Who sends a request: the API key in ``Authorization: Bearer``, its scope, and the limits of key, account and address."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from aiohttp import web

from coordinator.books.errors import BooksUnavailable
from coordinator.config import CoordinatorConfig
from coordinator.http.errors import ApiError
from coordinator.http.ratelimit import Limit, PerMinute, Standing, count_in_all, counted_as, tightest
from coordinator.keys import ApiKey, KeyCache, hash_if_key

log = logging.getLogger(__name__)

USED_WRITTEN_S = 60.0  # when keys were last used is written this often at most
ADMITTED = web.RequestKey("archipelag_key", ApiKey)  # for handlers that ask more of a key than its account
_BEARER = "bearer "


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Keys(Protocol):
    """Where keys are looked up; called in threads. Raises BooksUnavailable."""

    def find(self, key_hash: str) -> ApiKey | None:
        """What is valid now."""
        ...

    def note_used(self, used_at_ms: Mapping[int, int]) -> None:
        """When keys were last used, by their id."""
        ...


class Gate:
    """Lets requests in. A right key is let in however many wrong ones came from its address; only the limit on all requests of an address,
    where the operator has set one, counts right and wrong ones alike.

    ``clock`` in seconds, only forward; ``wall_ms`` in Unix milliseconds.
    """

    def __init__(
        self,
        store: Keys,
        config: CoordinatorConfig,
        clock: Callable[[], float],
        wall_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self._store, self._clock, self._wall_ms = store, clock, wall_ms
        self._cache = KeyCache(clock)
        # tables of their own, so that a flood of addresses pushes no key out
        self._of_keys, self._of_accounts, self._of_addresses = PerMinute(), PerMinute(), PerMinute()
        self._wrong_keys = PerMinute()
        self._wrong_keys_per_minute = config.login_tries_per_minute
        self._per_address = config.requests_per_minute_per_address
        self._used_ms: dict[int, int] = {}  # key id -> when, since it was written last
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in config.trusted_proxies]
        self._pending: dict[str, asyncio.Task[ApiKey | None]] = {}
        self.on_forget: Callable[[int], object] = lambda _key_id: None  # others that remember keys
        # the database may be slow or far away; the event loop must not wait for it
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="key-lookup")

    def close(self) -> None:
        """Once nobody asks any more. Writes down when keys were last used."""
        self._lookups.shutdown(wait=True)
        if not self._used_ms:
            return
        try:
            self._store.note_used(self._used_ms)
        except BooksUnavailable as error:
            log.warning("when keys were last used could not be written: %s", error)

    async def admit(self, request: web.Request, scope: str) -> tuple[ApiKey, dict[str, str]]:
        """The key and headers for the answer. Raises ApiError 401, 403 or 429, BooksUnavailable."""
        standings = self._count(self._limits_of_address(request))
        key = await self._key(request)
        if scope not in key.scopes:
            raise ApiError(
                403, f"this key lacks the scope {scope!r}", code="insufficient_scope", kind="permission_error"
            )
        standings += self._count(self._limits_of_key(key))
        self._note_used(key.id)
        request[ADMITTED] = key
        return key, tightest(standings).headers() if standings else {}

    def forget(self, key_id: int) -> None:
        """The key was revoked here: it counts no more at once."""
        self._cache.forget(key_id)
        self.on_forget(key_id)

    def last_used_ms(self, key_id: int) -> int | None:
        """When a key was used last, where that has not been written yet."""
        return self._used_ms.get(key_id)

    def _limits_of_address(self, request: web.Request) -> list[Limit]:
        if not self._per_address:
            return []
        return [Limit(self._of_addresses, counted_as(self.address(request)), self._per_address, "this address")]

    def _limits_of_key(self, key: ApiKey) -> list[Limit]:
        limits = [
            Limit(self._of_keys, key.id, key.rate_limit_per_minute, "this key"),
            Limit(self._of_accounts, key.account, key.account_limit_per_minute, "this account"),
        ]
        return [limit for limit in limits if limit.per_minute]

    def _count(self, limits: Sequence[Limit]) -> list[Standing]:
        """Raises ApiError 429."""
        standings = count_in_all(limits, self._clock())
        if all(standing.allowed for standing in standings):
            return standings
        standing = tightest(standings)
        raise ApiError(
            429,
            f"{standing.whose} may send {standing.limit} requests a minute; try again in {standing.reset_s:.0f} s",
            code="rate_limit_exceeded",
            kind="rate_limit_error",
            headers=standing.headers(),
        )

    def _note_used(self, key_id: int) -> None:
        if not self._used_ms:
            asyncio.get_running_loop().call_later(USED_WRITTEN_S, self._write_used)
        self._used_ms[key_id] = self._wall_ms()

    def _write_used(self) -> None:
        batch, self._used_ms = self._used_ms, {}
        writing = asyncio.get_running_loop().run_in_executor(self._lookups, self._store.note_used, batch)
        writing.add_done_callback(functools.partial(self._used_written, batch))

    def _used_written(self, batch: dict[int, int], writing: asyncio.Future[None]) -> None:
        """What could not be written waits for the next time."""
        if writing.cancelled() or writing.exception() is None:
            return
        log.warning("when keys were last used could not be written: %s", writing.exception())
        if not self._used_ms:
            asyncio.get_running_loop().call_later(USED_WRITTEN_S, self._write_used)
        self._used_ms = batch | self._used_ms

    async def _key(self, request: web.Request) -> ApiKey:
        header = request.headers.get("Authorization", "")
        if not header:
            raise _unauthorized("you did not provide an API key: send it as 'Authorization: Bearer ak_…'")
        text = header[len(_BEARER) :].strip() if header[: len(_BEARER)].lower() == _BEARER else ""
        key_hash = hash_if_key(text)
        if key_hash is not None:
            key = self._cache.get(key_hash) or await self._look_up(key_hash)
            if key is not None:
                return key
        standing = self._wrong_keys.count(counted_as(self.address(request)), self._wrong_keys_per_minute, self._clock())
        if not standing.allowed:
            raise ApiError(
                429,
                f"too many wrong API keys from this address; try again in {standing.reset_s:.0f} s",
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                headers={"Retry-After": standing.headers()["Retry-After"]},
            )
        raise _unauthorized("the API key is not known here")

    async def _look_up(self, key_hash: str) -> ApiKey | None:
        """One question to the database for all requests that come with the same key at the same time."""
        task = self._pending.get(key_hash)
        if task is None:
            task = self._pending[key_hash] = asyncio.ensure_future(self._find(key_hash))
            task.add_done_callback(lambda _: self._pending.pop(key_hash, None))
        return await asyncio.shield(task)  # a client that hangs up must not take the answer from the others

    async def _find(self, key_hash: str) -> ApiKey | None:
        key = await asyncio.get_running_loop().run_in_executor(self._lookups, self._store.find, key_hash)
        if key is not None:
            self._cache.put(key_hash, key)
        return key

    def address(self, request: web.Request) -> str:
        """The client's address. X-Forwarded-For counts only as far as trusted proxies vouch for it, read from the right."""
        remote = request.remote or "unknown"
        if not self._proxies or not self._trusted(remote):
            return remote
        hops = [hop.strip() for line in request.headers.getall("X-Forwarded-For", []) for hop in line.split(",")]
        for hop in reversed(hops):
            try:
                ipaddress.ip_address(hop)
            except ValueError:
                return remote
            if not self._trusted(hop):
                return hop
            remote = hop
        return remote

    def scheme(self, request: web.Request) -> str:
        """http or https, as the client sees it: a trusted proxy that does TLS says so."""
        told = request.headers.get("X-Forwarded-Proto", "") if self._proxies and self._trusted(request.remote or "") else ""
        return "https" if request.secure or told.strip().lower() == "https" else "http"

    def _trusted(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._proxies)


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", kind="authentication_error", headers={"WWW-Authenticate": "Bearer"}
    )
