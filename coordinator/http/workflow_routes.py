"""``/api/v1/workflows`` and ``/api/v1/workflow-definitions``: runs of many steps in one call, and what they are runs of."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from aiohttp import web

from coordinator.books.workflow_rows import SavedFlow
from coordinator.exchange.parsing import parse_bid
from coordinator.http import schema
from coordinator.http.answers import json_response, to_json
from coordinator.http.bridge import Bridge
from coordinator.http.errors import RETRY_AFTER_S, ApiError, bad_request
from coordinator.http.fields import text_of
from coordinator.http.params import whole_number
from coordinator.http.sse import relay
from coordinator.http.terms import Terms, read_terms
from coordinator.workflows.errors import FlowError
from coordinator.workflows.flows import Asked, FlowRefused, Flows, Once
from coordinator.workflows.store import FoundFlow, Reference, StoreRefused, check_name, parse_reference
from coordinator.workflows.view import listed_json, message_of, time_json
from privacy.sealed_rows import SealBroken
from protocol import limits

Admit = Callable[[web.Request, str], Awaitable[str]]

PREFIX = "wf_"  # of a run's id; its jobs have a dot behind it
_ID_LABEL = b"archipelag/workflow-run/1\0"
_ID_HEX = 24
_LIST_DEFAULT = 20
_OFFSET_MAX = 1_000_000_000
_INPUT_DEPTH_MAX = 64
_VERSION_MAX = 10_000_000
_REFUSED = {
    # code -> status, type
    "over_max_price": (402, "insufficient_quota"),
    "too_many_runs": (429, "rate_limit_error"),
    "run_running": (409, "invalid_request_error"),
    "run_expired": (410, "invalid_request_error"),
    "output_expired": (410, "invalid_request_error"),
    "unknown_step": (400, "invalid_request_error"),
    "outputs_too_large": (422, "invalid_request_error"),
    "unknown_workflow": (404, "invalid_request_error"),
    "workflow_published": (409, "invalid_request_error"),
    "too_many_workflows": (429, "rate_limit_error"),
    "bad_signature": (400, "invalid_request_error"),
    "invalid_value": (400, "invalid_request_error"),
}


class WorkflowRoutes:
    """``secret`` keys fingerprints, and the ids of runs that have an idempotency key."""

    def __init__(
        self, admit: Admit, bridge: Bridge, flows: Flows, secret: bytes, keep_alive_s: float, draining: Callable[[], bool]
    ) -> None:
        self._admit, self._bridge, self._flows, self._secret = admit, bridge, flows, secret
        self._keep_alive_s, self._draining = keep_alive_s, draining

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        runs, one = f"{prefix}/workflows", prefix + "/workflows/{id}"
        saved, named = f"{prefix}/workflow-definitions", prefix + "/workflow-definitions/{name}"
        return [
            web.post(runs, self.start),
            web.get(runs, self.list),
            web.post(f"{runs}/quote", self.quote),
            web.get(one, self.get),
            web.delete(one, self.cancel),
            web.post(one + "/rerun", self.rerun),
            web.get(one + "/stream", self.stream),
            web.get(one + "/timeline", self.timeline),
            web.get(saved, self.list_saved),
            # a published one is ACCOUNT/NAME@VERSION, and accounts may hold slashes
            web.post(named + "/publish", self.publish),
            web.get(named + "/versions", self.versions),
            web.put(named, self.save),
            web.delete(named, self.forget),
            web.get(prefix + "/workflow-definitions/{reference:.+}", self.get_saved),
        ]

    # ---- runs

    async def start(self, request: web.Request) -> web.StreamResponse:
        account, raw, body = await self._body(request)
        terms = read_terms(request, raw, body, account, self._secret)
        asked = _asked(account, body, len(raw), terms)
        run, is_new = await self._told(self._flows.start, asked, self._once(account, terms))
        return await self._started(account, run.id, is_new)

    async def rerun(self, request: web.Request) -> web.StreamResponse:
        account, raw, body = await self._body(request)
        terms = read_terms(request, raw, body, account, self._secret)
        step = body.get("from")
        if not isinstance(step, str) or not step:
            raise bad_request("you must provide from, the key of the first step to run again", "from", "missing_required_parameter")
        run, is_new = await self._told(self._flows.rerun, account, _id(request), step, self._once(account, terms))
        return await self._started(account, run.id, is_new)

    async def _started(self, account: str, run_id: str, is_new: bool) -> web.StreamResponse:
        shown = await self._told(self._flows.show, account, run_id)
        headers = {"Location": f"/api/v1/workflows/{run_id}"}
        if not is_new:
            headers["x-archipelag-replayed"] = "true"
        return json_response(shown, status=201, headers=headers)

    async def quote(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        raw = await request.read()
        body = schema.parse_json(raw)
        terms = read_terms(request, raw, body, account, self._secret)
        quoted = await self._told(self._flows.quote, _asked(account, body, len(raw), terms))
        return json_response({"object": "workflow.quote", **quoted.to_json()})

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = whole_number(request, "limit", 1, limits.JOBS_LISTED_MAX) or _LIST_DEFAULT
        offset = whole_number(request, "offset", 0, _OFFSET_MAX) or 0
        runs, total = await self._told(self._flows.runs, account, limit, offset)
        return json_response({"data": [listed_json(run) for run in runs], "meta": {"total": total, "limit": limit, "offset": offset}})

    async def get(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        shown = await self._told(self._flows.show, account, _id(request))
        body = await asyncio.to_thread(_to_json, shown)  # outputs may be large
        return web.Response(body=body, headers={"Content-Type": "application/json"})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        run = await self._told(self._flows.cancel, account, _id(request))
        return json_response({"id": run.id, "state": run.state.value, "message": message_of(run)})

    async def timeline(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        run, events = await self._told(self._flows.timeline, account, _id(request))
        return json_response({"id": run.id, "state": run.state.value, "events": events})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """SSE: the steps as they are, what changes of them, and the end, for any number of watchers."""
        account = await self._admit(request, "read")
        run_id = _id(request)
        await self._told(self._flows.timeline, account, run_id)  # an unknown one has a status

        async def watch(send: Callable[[bytes], Awaitable[None]]) -> None:
            async for event in self._flows.watch(account, run_id):
                await send(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _to_json(event)))

        events = self._bridge.stream(watch)
        return await relay(request, events, {}, self._keep_alive_s, b"".join)

    # ---- what is saved

    async def save(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        name = _name(request)
        raw = await request.read()
        asked = _asked(account, {"definition": schema.parse_json(raw).get("definition")}, len(raw), Terms())

        async def keep() -> tuple[SavedFlow, bool]:
            definition, _, _ = await self._flows.read(asked)
            return await self._flows.store.save(account, name, definition.to_json())

        row, is_new = await self._told(keep)
        return json_response({**saved_json(row), "is_new": is_new}, status=201 if is_new else 200)

    async def list_saved(self, request: web.Request) -> web.StreamResponse:
        """One's own, each name's newest version; ``published=true``: everybody's that are."""
        account = await self._admit(request, "read")
        if request.query.get("published") in ("1", "true"):
            limit = whole_number(request, "limit", 1, limits.JOBS_LISTED_MAX) or _LIST_DEFAULT
            offset = whole_number(request, "offset", 0, _OFFSET_MAX) or 0
            rows = await self._told(self._flows.store.published, limit, offset)
        else:
            rows = await self._told(self._flows.store.newest, account)
        return json_response({"data": [saved_json(row) for row in rows]})

    async def get_saved(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        try:
            reference = parse_reference(request.match_info["reference"])
        except StoreRefused as refused:
            raise ApiError(404, refused.message, code="unknown_workflow") from None
        return json_response(found_json(await self._told(self._flows.store.open, account, reference)))

    async def versions(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        rows = await self._told(self._flows.store.versions, account, _name(request))
        if not rows:
            raise ApiError(404, "there is no such workflow", code="unknown_workflow")
        return json_response({"data": [saved_json(row) for row in rows]})

    async def forget(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        name = _name(request)
        gone = await self._told(self._flows.store.forget, account, name)
        return json_response({"name": name, "deleted": gone})

    async def publish(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        name, raw = _name(request), await request.read()
        body = schema.parse_json(raw) if raw else {}
        version = body.get("version")
        if version is not None and not (type(version) is int and 0 < version < _VERSION_MAX):
            raise bad_request("version must be a whole number", "version")
        envelope = _hex(body.get("envelope"))
        found = await self._told(self._flows.store.publish, account, Reference("", name, version), envelope)
        return json_response(found_json(found))

    # ---- inside

    async def _body(self, request: web.Request) -> tuple[str, bytes, dict[str, Any]]:
        account = await self._admit(request, "write")
        if self._draining():
            raise ApiError(503, "the Coordinator is shutting down", code="draining", kind="server_error", headers={"Retry-After": "2"})
        raw = await request.read()
        return account, raw, schema.parse_json(raw)

    def _once(self, account: str, terms: Terms) -> Once:
        run_id = secrets.token_hex(_ID_HEX // 2)
        if terms.idempotency_key:
            label = _ID_LABEL + account.encode() + b"\0" + terms.idempotency_key.encode()
            run_id = hmac.digest(self._secret, label, "sha256").hex()[:_ID_HEX]
        return Once(PREFIX + run_id, terms.fingerprint, terms.is_retry, bool(terms.idempotency_key))

    async def _told(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """``function(*arguments)`` in trio; what is wrong with workflows as the client shall hear it."""
        try:
            return await self._bridge.call(function, *arguments)
        except FlowError as error:
            raise ApiError(400, str(error), code="invalid_workflow", param=error.where or None) from None
        except (FlowRefused, StoreRefused) as refused:
            _raise(refused)
        except SealBroken:
            raise ApiError(410, "what is kept of it cannot be read any more", code="run_expired") from None


def _raise(refused: FlowRefused | StoreRefused) -> NoReturn:
    status, kind = _REFUSED[refused.code]
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 429 else None
    param = refused.param if isinstance(refused, FlowRefused) else None
    raise ApiError(status, refused.message, code=refused.code, param=param, kind=kind, headers=headers) from None


def _asked(account: str, body: dict[str, Any], size: int, terms: Terms) -> Asked:
    """Raises ApiError 400."""
    if terms.quote_id:
        raise bad_request("a quote is for one job; a run takes max_price and bid_price", "quote")
    definition, reference = body.get("definition"), body.get("workflow")
    if (definition is None) == (reference is None):
        text = "you must provide definition, an object with steps, or workflow, the name of a saved one"
        raise bad_request(text, "definition", "missing_required_parameter" if definition is None else "invalid_value")
    if definition is not None and not isinstance(definition, dict):
        raise bad_request("definition must be an object with steps", "definition", "invalid_type")
    fail_mode = body.get("fail_mode")
    if fail_mode is not None and not isinstance(fail_mode, str):
        raise bad_request("fail_mode is fail_fast or best_effort", "fail_mode", "invalid_type")
    _check_input(body.get("input"))
    return Asked(
        account=account,
        name=_run_name(body.get("name")),
        definition=definition,
        reference=_reference(reference),
        input=body.get("input"),
        fail_mode=fail_mode,
        size=size,
        bid_micros=terms.bid_micros,
        max_price_micros=_max_price(body.get("max_price")),
        priority=terms.priority,
        policy=terms.policy_text,
    )


def _run_name(value: object) -> str:
    if value is None:
        return ""
    name = text_of(value, "name", limits.NAME_CHARS_MAX)
    if not name.isprintable():
        raise bad_request("name must be printable", "name")
    return name


def _reference(value: object) -> Reference | None:
    try:
        return parse_reference(value) if value is not None else None
    except StoreRefused as refused:
        raise ApiError(404 if refused.code == "unknown_workflow" else 400, refused.message, code=refused.code, param="workflow") from None


def _max_price(value: object) -> int | None:
    try:
        return parse_bid(value, "max_price") if value is not None else None
    except ValueError as error:
        raise bad_request(str(error), "max_price") from None


def _check_input(value: object) -> None:
    """Raises ApiError 400 for what templates cannot take: JSON may hold half a surrogate pair, and be deeper than anybody reads it."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _INPUT_DEPTH_MAX:
            raise bad_request("input is nested too deeply", "input")
        inner: list[object] = []
        for part in level:
            inner += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        level = inner
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad_request("input holds half of a surrogate pair", "input") from None


def _hex(value: object) -> bytes:
    if value is None:
        return b""
    try:
        if not isinstance(value, str) or len(value) > 2 * limits.ENVELOPE_BYTES_MAX:
            raise ValueError
        return bytes.fromhex(value)
    except ValueError:
        text = f"envelope is a signed envelope in hex, of at most {limits.ENVELOPE_BYTES_MAX} bytes"
        raise bad_request(text, "envelope") from None


def saved_json(row: SavedFlow) -> dict[str, Any]:
    """A saved version without what it says."""
    return {
        "id": row.id,
        "object": "workflow.definition",
        "account": row.account,
        "name": row.name,
        "version": row.version,
        "address": row.address,
        "is_published": row.is_published,
        "created_at": time_json(row.at_ms),
    }


def found_json(found: FoundFlow) -> dict[str, Any]:
    """With what it says. ``envelope``: the publisher's own, in hex, by which anybody can check it."""
    envelope = found.row.body.hex() if found.signer else None
    return {**saved_json(found.row), "definition": found.definition, "signer": found.signer or None, "envelope": envelope}


def _to_json(value: object) -> bytes:
    """An Island may have said half a surrogate pair."""
    try:
        return to_json(value)
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def _name(request: web.Request) -> str:
    try:
        return check_name(request.match_info["name"])
    except StoreRefused as refused:
        raise bad_request(refused.message, "name") from None


def _id(request: web.Request) -> str:
    """Raises ApiError 404 for what is no id of a run."""
    text = request.match_info["id"]
    if not (text.startswith(PREFIX) and text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise ApiError(404, "there is no such workflow run", code="unknown_job")
    return text
