"""Who sends a request: the API key in ``Authorization: Bearer``, its scope, its request limit."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from coordinator.http.errors import ApiError
from coordinator.http.ratelimit import PerMinute
from coordinator.keys import ApiKey, KeyCache, KeyStore, hash_if_key

_BEARER = "bearer "


class Gate:
    """Lets requests in. Only wrong keys count against an address, and a right key is let in however many wrong ones came before it."""

    def __init__(
        self,
        store: KeyStore,
        wrong_keys_per_minute: int,
        trusted_proxies: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._clock = store, clock
        self._cache = KeyCache(clock)
        self._requests, self._wrong_keys = PerMinute(), PerMinute()
        self._wrong_keys_per_minute = wrong_keys_per_minute
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in trusted_proxies]
        self._pending: dict[str, asyncio.Task[ApiKey | None]] = {}
        # the database may be slow or far away; the event loop must not wait for it
        self._lookups = ThreadPoolExecutor(2, thread_name_prefix="key-lookup")

    def close(self) -> None:
        self._lookups.shutdown(wait=True)

    async def admit(self, request: web.Request, scope: str) -> tuple[ApiKey, dict[str, str]]:
        """The key and headers for the answer. Raises ApiError 401, 403 or 429."""
        key = await self._key(request)
        if scope not in key.scopes:
            raise ApiError(
                403, f"this key lacks the scope {scope!r}", code="insufficient_scope", kind="permission_error"
            )
        if not key.rate_limit_per_minute:
            return key, {}
        standing = self._requests.count(key.id, key.rate_limit_per_minute, self._clock())
        if not standing.allowed:
            raise ApiError(
                429,
                f"this key may send {standing.limit} requests a minute; try again in {standing.reset_s:.0f} s",
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                headers=standing.headers(),
            )
        return key, standing.headers()

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
        standing = self._wrong_keys.count(self.address(request), self._wrong_keys_per_minute, self._clock())
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
