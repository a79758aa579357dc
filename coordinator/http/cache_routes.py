"""``/api/v1/cache``: how the cache of answers does, and deleting what an account has in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from coordinator.cache.service import AnswerCache, key_of
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError, bad_request
from protocol import checks, limits

Admit = Callable[[web.Request, str], Awaitable[str]]


class CacheRoutes:
    def __init__(self, admit: Admit, bridge: Bridge, cache: AnswerCache) -> None:
        self._admit, self._bridge, self._cache = admit, bridge, cache

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        cache = f"{prefix}/cache"
        return [
            web.get(f"{cache}/stats", self.stats),
            web.delete(cache, self.delete),
            web.delete(cache + "/{key}", self.delete_one),
        ]

    async def stats(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")

        async def look() -> dict[str, Any]:
            return self._cache.stats_json(account)

        return json_response(await self._bridge.call(look))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """All that the account's jobs have answered, or what they have of one Cargo."""
        account = await self._admit(request, "write")
        return json_response({"deleted": await self._bridge.call(self._cache.delete, account, _cargo(request))})

    async def delete_one(self, request: web.Request) -> web.StreamResponse:
        """By the key that headers and metadata name."""
        account = await self._admit(request, "write")
        key = key_of(request.match_info["key"])
        if not key:
            raise ApiError(404, "there is no such answer; its key stands in x-archipelag-cache-key", code="not_found")
        return json_response({"deleted": await self._bridge.call(self._cache.delete, account, "", key)})


def _cargo(request: web.Request) -> str:
    """Empty where none is named. Raises ApiError 400: what is misspelt must not delete everything."""
    unknown = sorted(set(request.query) - {"cargo"})
    if unknown:
        raise bad_request("this address takes the parameter cargo, and no other", unknown[0] if unknown[0].isprintable() else None)
    name = request.query.get("cargo")
    if name is None:
        return ""
    try:
        checks.label("cargo", name, limits.NAME_CHARS_MAX)
    except ValueError:
        raise bad_request("cargo is the name of a Cargo", "cargo") from None
    return name
