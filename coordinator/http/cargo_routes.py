"""``/api/v1/cargos``: publish, look up, revoke. What is published is public, since it is signed and Islands tell it to everybody."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from coordinator.cargo_rules import Fault, RegistryRefused
from coordinator.http import schema
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError, bad_request
from coordinator.http.params import one_of, whole_number
from coordinator.registry import Entry, Registry
from coordinator.statement import time_text
from protocol import limits
from protocol.cargos import CargoFile, CargoManifest, Runtime
from protocol.prices import format_ask

Admit = Callable[[web.Request, str], Awaitable[str]]

LISTED_DEFAULT = 50
LISTED_MAX = 200
_OFFSET_MAX = 1_000_000
_BYTES = "application/octet-stream"
STATUS: dict[Fault, int] = {
    Fault.INVALID: 400,
    Fault.SIGNATURE: 400,
    Fault.SOURCE: 400,
    Fault.EXPIRED: 400,
    Fault.TOO_LARGE: 413,
    Fault.UNKNOWN: 404,
    Fault.REVOKED: 409,
    Fault.ROLLBACK: 409,
    Fault.CONFLICT: 409,
    Fault.NAME_TAKEN: 409,
    Fault.KEY_TAKEN: 409,
    Fault.TOO_MANY: 409,
    Fault.REJECTED: 409,
    Fault.STATE: 409,
}


class CargoRoutes:
    def __init__(self, admit: Admit, bridge: Bridge, registry: Registry) -> None:
        self._admit, self._bridge, self._registry = admit, bridge, registry

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        return [
            web.post(f"{prefix}/cargos", self.publish),
            web.get(f"{prefix}/cargos", self.list),
            web.post(f"{prefix}/cargos/revoke", self.revoke),
            web.get(prefix + "/cargos/{cargo}", self.show),
            web.get(prefix + "/cargos/{cargo}/envelope", self.envelope),
        ]

    async def publish(self, request: web.Request) -> web.StreamResponse:
        """201 for a new one, 200 where this account has published it before. ``candidate=true``: its name goes on to stand for what it
        stands for."""
        is_candidate = one_of(request, "candidate", ("true", "false"), "false") == "true"
        account = await self._admit(request, "write")
        data = await _sent(request, "cargo")
        try:
            entry, is_new = await self._bridge.call(self._registry.publish, account, data, is_candidate)
        except RegistryRefused as refused:
            raise _told(refused) from None
        headers = {"Location": f"/api/v1/cargos/{entry.cargo.address}"}
        return json_response((await self._shown(entry))[0], 201 if is_new else 200, headers)

    async def revoke(self, request: web.Request) -> web.StreamResponse:
        """A publisher's signed word; whoever holds the key may say it by any account's API key."""
        await self._admit(request, "write")
        data = await _sent(request, "revocation")
        try:
            signed, hit = await self._bridge.call(self._registry.revoke, data)
        except RegistryRefused as refused:
            raise _told(refused) from None
        revocation = signed.revocation
        return json_response(
            {
                "object": "revocation",
                "publisher": revocation.publisher,
                "cargo": revocation.cargo or None,
                "reason": revocation.reason,
                "revoked": hit,
            }
        )

    async def list(self, request: web.Request) -> web.StreamResponse:
        """What Islands may have; with ``mine=true`` all of the key's own account, in whatever state."""
        mine = one_of(request, "mine", ("true", "false"), "false") == "true"
        account = await self._admit(request, "read") if mine else ""
        runtime, name = one_of(request, "runtime", ("", *Runtime), ""), request.query.get("name", "")
        limit = whole_number(request, "limit", 1, LISTED_MAX) or LISTED_DEFAULT
        offset = whole_number(request, "offset", 0, _OFFSET_MAX) or 0

        async def ask() -> tuple[Entry, ...]:
            return self._registry.entries()

        chosen = [
            entry
            for entry in await self._bridge.call(ask)
            if (entry.account == account if mine else entry.is_listed)
            and runtime in ("", entry.cargo.manifest.runtime)
            and name in ("", entry.cargo.manifest.name)
        ]
        data = await self._shown(*chosen[offset : offset + limit])
        return json_response({"data": data, "meta": {"total": len(chosen), "limit": limit, "offset": offset}})

    async def show(self, request: web.Request) -> web.StreamResponse:
        entry = await self._find(request)
        return json_response({**(await self._shown(entry))[0], "manifest": manifest_to_json(entry.cargo.manifest)})

    async def envelope(self, request: web.Request) -> web.StreamResponse:
        """The bytes that were signed, to be checked by whoever gets them."""
        entry = await self._find(request)
        return web.Response(body=entry.cargo.envelope, headers={"Content-Type": _BYTES})

    async def _shown(self, *entries: Entry) -> tuple[dict[str, Any], ...]:
        async def ask() -> tuple[bool, ...]:
            return tuple(map(self._registry.is_current, entries))

        return tuple(entry_to_json(*pair) for pair in zip(entries, await self._bridge.call(ask), strict=True))

    async def _find(self, request: web.Request) -> Entry:
        """By name, ``NAME@RELEASE`` or address; what was not approved only its own account sees. Raises ApiError."""
        reference = request.match_info["cargo"]

        async def ask() -> Entry | None:
            return self._registry.find(reference)

        entry = await self._bridge.call(ask)
        if entry is not None and not entry.is_public and entry.account != await self._asker(request):
            entry = None
        if entry is None:
            raise ApiError(404, "there is no such Cargo; see GET /api/v1/cargos", code=Fault.UNKNOWN.value, param="cargo")
        return entry

    async def _asker(self, request: web.Request) -> str:
        return await self._admit(request, "read") if "Authorization" in request.headers else ""


async def _sent(request: web.Request, field: str) -> bytes:
    """The envelope of a body, as it is or as base64 in JSON. Raises ApiError."""
    raw = await request.read()
    if request.content_type == _BYTES:
        return raw
    body = schema.parse_json(raw)
    text = body.get(field)
    if not isinstance(text, str):
        raise bad_request(f"send the signed bytes as {_BYTES}, or as base64 in {field}", field, "missing_required_parameter")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{field} is no base64", field) from None


def _told(refused: RegistryRefused) -> ApiError:
    return ApiError(STATUS[refused.fault], refused.message, code=refused.fault.value, param="cargo")


def entry_to_json(entry: Entry, is_current: bool) -> dict[str, Any]:
    manifest = entry.cargo.manifest
    return {
        "object": "cargo",
        "address": entry.cargo.address,
        "name": manifest.name,
        "release": manifest.release,
        "publisher": manifest.publisher,
        "runtime": str(manifest.runtime),
        "state": str(entry.state),
        "current": is_current,
        "revoked_at": time_text(entry.revoked_at_ms) if entry.revoked_at_ms else None,
        "description": manifest.description,
        "licence": manifest.licence,
        "ask": format_ask(manifest.ask),
        "trust_level": manifest.trust_level,
        "size_bytes": manifest.size_bytes,
        "published_at": time_text(manifest.published_at_ms),
        "expires_at": time_text(manifest.expires_at_ms) if manifest.expires_at_ms else None,
    }


def manifest_to_json(manifest: CargoManifest) -> dict[str, Any]:
    """What is signed, as JSON; schemas and options as objects."""
    needs, cache = manifest.needs, manifest.cache
    return {
        "entry": manifest.entry,
        "files": [_file_to_json(file) for file in manifest.files],
        "needs": {
            "memory_bytes": needs.memory_bytes,
            "time_s": needs.time_s,
            "cpu_threads": needs.cpu_threads,
            "disk_bytes": needs.disk_bytes,
            "gpu_memory_bytes": needs.gpu_memory_bytes,
            "output_bytes": needs.output_bytes,
        },
        "options": schema.parse_json(manifest.options.encode()),
        "input_schema": schema.parse_json(manifest.input_schema.encode()),
        "output_schema": schema.parse_json(manifest.output_schema.encode()),
        "cache": {
            "enabled": cache.enabled,
            "ttl_s": cache.ttl_s,
            "similarity_milli": cache.similarity_milli,
            "public": cache.public,
        },
    }


def _file_to_json(file: CargoFile) -> dict[str, Any]:
    return {
        "path": file.path,
        "sha256": file.sha256,
        "size_bytes": file.size_bytes,
        "root": file.root or None,
        "sources": list(file.sources),
    }


assert set(STATUS) == set(Fault) and limits.ENVELOPE_BYTES_MAX * 4 // 3 < limits.BODY_BYTES_MAX
