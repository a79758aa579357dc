"""``/api/v1/jobs/batch``: many inputs in one call. A batch is looked at under ``/api/v1/jobs/{id}`` like a job; what that says is here."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from coordinator.batches.board import BatchBoard, BatchView, TooDear, TooLarge, TooManyBatches
from coordinator.batches.shown import batch_json, outputs_json, price_text, run_json, sse, status_json
from coordinator.batches.spec import BatchSpec, check_inputs, read_batch, read_max_price
from coordinator.books.runs import RunState
from coordinator.http import schema
from coordinator.http.answers import json_response, to_json
from coordinator.http.bridge import Bridge
from coordinator.http.errors import RETRY_AFTER_S, ApiError, bad_request
from coordinator.http.params import whole_number
from coordinator.http.sse import relay
from coordinator.http.terms import Terms, read_policy, read_terms
from protocol import limits
from protocol.prices import format_credits

Admit = Callable[[web.Request, str], Awaitable[str]]

PREFIX = "batch_"  # of a batch's id; its jobs have a dot behind it
_ID_LABEL = b"archipelag/batch-id/1\0"
_ID_HEX = 24
_LARGE_AT_ONCE_MAX = 4  # bodies over the usual limit that are read at the same time
_LIST_DEFAULT = 20
_OFFSET_MAX = 1_000_000_000


class BatchRoutes:
    """``look(cargo)``, of trio: whether somebody offers a Cargo or did a moment ago, and whether it writes texts (None: nobody knows);
    ``secret`` keys fingerprints and the ids of batches that have an idempotency key."""

    def __init__(
        self,
        admit: Admit,
        bridge: Bridge,
        board: BatchBoard,
        look: Callable[[str], tuple[bool, bool | None]],
        secret: bytes,
        keep_alive_s: float,
        draining: Callable[[], bool],
    ) -> None:
        self._admit, self._bridge, self._board, self._look, self._secret = admit, bridge, board, look, secret
        self._keep_alive_s, self._draining = keep_alive_s, draining
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE_MAX)

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        batches = f"{prefix}/jobs/batch"
        return [web.post(batches, self.submit), web.get(batches, self.list), web.get(prefix + "/jobs/{id}/batch-status", self.status)]

    def has(self, request: web.Request) -> bool:
        """Whether the address of a job names a batch."""
        return _is_batch(request.match_info["id"])

    async def submit(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        if self._draining():
            raise ApiError(503, "the Coordinator is shutting down", code="draining", kind="server_error", headers={"Retry-After": "2"})
        raw = await self._body(request)
        spec, terms, max_price = await asyncio.to_thread(self._read, request, raw, account)
        await self._check(spec)
        run_id = PREFIX + self._id(account, terms.idempotency_key)
        try:
            view, is_new = await self._bridge.call(
                self._board.submit, run_id, account, spec, terms.fingerprint, terms.is_retry, max_price
            )
        except TooManyBatches:
            text = f"{limits.BATCHES_OPEN_MAX} batches of this account run already; wait for one to end"
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(429, text, code="too_many_batches", kind="rate_limit_error", headers=headers) from None
        except TooDear as dear:
            text = f"all inputs may cost {format_credits(dear.sum_micros)} credits, which is over max_price; lower bid_price or send fewer"
            raise ApiError(402, text, code="over_max_price", param="max_price", kind="insufficient_quota") from None
        headers = {"Location": f"/api/v1/jobs/{view.run.id}", "x-archipelag-job": view.run.id}
        if not is_new:
            headers["x-archipelag-replayed"] = "true"
        return json_response(batch_json(view), status=201, headers=headers)

    def _read(self, request: web.Request, raw: bytes, account: str) -> tuple[BatchSpec, Terms, int | None]:
        """In a thread: a large body takes a while."""
        body = schema.parse_json(raw)
        terms = read_terms(request, raw, body, account, self._secret)
        policy_text = _policy_text(body, terms)
        return read_batch(body, terms.bid_micros, policy_text, terms.priority), terms, read_max_price(body.get("max_price"))

    async def _check(self, spec: BatchSpec) -> None:
        async def look() -> tuple[bool, bool | None]:
            return self._look(spec.cargo)

        is_known, writes_text = await self._bridge.call(look)
        if not is_known:
            raise ApiError(404, f"no Island offers the Cargo {spec.cargo!r}", code="model_not_found", param="cargo")
        await asyncio.to_thread(check_inputs, spec, writes_text)

    def _id(self, account: str, key: str) -> str:
        if not key:
            return secrets.token_hex(_ID_HEX // 2)
        return hmac.digest(self._secret, _ID_LABEL + account.encode() + b"\0" + key.encode(), "sha256").hex()[:_ID_HEX]

    async def _body(self, request: web.Request) -> bytes:
        """Up to a limit of its own. Raises ApiError 413."""
        length = request.content_length
        if length is not None and length <= limits.BODY_BYTES_MAX:
            return await request.read()
        if length is not None and length > limits.BATCH_BODY_BYTES_MAX:
            raise _too_large()
        async with self._large:
            read = bytearray()
            async for piece in request.content.iter_any():
                read += piece
                if len(read) > limits.BATCH_BODY_BYTES_MAX:
                    raise _too_large()
            return bytes(read)

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = whole_number(request, "limit", 1, limits.JOBS_LISTED_MAX) or _LIST_DEFAULT
        offset = whole_number(request, "offset", 0, _OFFSET_MAX) or 0
        runs, total = await self._bridge.call(self._board.list, account, limit, offset)
        return json_response({"data": [run_json(run) for run in runs], "meta": {"total": total, "limit": limit, "offset": offset}})

    async def status(self, request: web.Request) -> web.StreamResponse:
        return json_response(status_json(await self._find(request)))

    # ---- what JobRoutes hands on

    async def get(self, request: web.Request) -> web.StreamResponse:
        return json_response(batch_json(await self._find(request)))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        view = await self._bridge.call(self._board.cancel, _id(request), account)
        texts = {
            RunState.CANCELLED: "the batch was cancelled",
            RunState.SUCCEEDED: "the batch had ended before",
            RunState.FAILED: "the batch had failed before",
        }
        message = texts.get(view.run.state, "the Coordinator that runs the batch was told to cancel it")
        return json_response({"id": view.run.id, "state": view.run.state.value, "message": message, "price": price_text(view)})

    async def output(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        try:
            outputs = await self._bridge.call(self._board.outputs, _id(request), account)
        except TooLarge:
            text = "all outputs together are too large for one answer; read each child's at /api/v1/jobs/{id}/output"
            raise ApiError(422, text, code="output_too_large") from None
        if outputs.is_expired:
            raise ApiError(410, "the outputs of this batch are not kept any more", code="output_expired")
        body = await asyncio.to_thread(lambda: to_json(outputs_json(outputs)))
        return web.Response(body=body, headers={"Content-Type": "application/json"})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """SSE: the batch as it is, and what changes, for any number of watchers."""
        account = await self._admit(request, "read")
        view: BatchView = await self._bridge.call(self._board.find, _id(request), account)

        async def watch(send: Callable[[bytes], Awaitable[None]]) -> None:
            is_first = True
            async for change in self._board.watch(view.run.id, account):
                if told := sse(change, is_first):  # made at once: what it shows goes on changing
                    await send(told)
                is_first = False

        events = self._bridge.stream(watch)
        return await relay(request, events, {"x-archipelag-job": view.run.id}, self._keep_alive_s, b"".join)

    async def _find(self, request: web.Request) -> BatchView:
        account = await self._admit(request, "read")
        return await self._bridge.call(self._board.find, _id(request), account)


def _policy_text(body: dict[str, Any], terms: Terms) -> str:
    """``region`` is short for a policy with one region. Raises ApiError 400."""
    region = body.get("region")
    if region is None:
        return terms.policy_text
    if terms.policy_text:
        raise bad_request("send either policy or region", "region")
    try:
        return read_policy({"regions": [region]})[1]
    except ApiError as error:
        raise bad_request(error.message.replace("policy", "region", 1), "region") from None


def _is_batch(text: str) -> bool:
    return text.startswith(PREFIX) and "." not in text


def _id(request: web.Request) -> str:
    """Raises ApiError 404 for what is no id of a batch."""
    text = request.match_info["id"]
    if not (_is_batch(text) and text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise ApiError(404, "there is no such batch", code="unknown_job")
    return text


def _too_large() -> ApiError:
    return ApiError(413, f"the body is over {limits.BATCH_BODY_BYTES_MAX} bytes", code="body_too_large")
