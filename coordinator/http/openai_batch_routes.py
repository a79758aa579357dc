"""OpenAI's ``/v1/batches``: a file of requests in, a file of answers out."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from aiohttp import web

from coordinator.batches.file_batch import BatchSpec, BatchView, FileBatches, Status
from coordinator.batches.file_requests import ENDPOINTS
from coordinator.books import file_rows
from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused
from coordinator.books.runs import Run, RunKind
from coordinator.http import params, schema
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError, bad_request
from coordinator.http.fields import Fields, text_of, wrong_type
from coordinator.http.file_routes import expiry_s, page_json
from coordinator.http.terms import Terms, read_terms
from coordinator.runs.board import RunBoard
from privacy.sealed_rows import SealBroken
from protocol import limits
from protocol.prices import format_credits

Admit = Callable[[web.Request, str], Awaitable[str]]

WINDOW = "24h"
METADATA_MAX = 16
METADATA_KEY_CHARS_MAX = 64
METADATA_VALUE_CHARS_MAX = 512
_LIST_DEFAULT = 20
_ID_CHARS = 24
_ID_LABEL = b"archipelag/batch-id/1\0"
_CANCEL_WAIT_S = 2.0  # so long a cancelled batch may write what is done before its client hears "cancelling"


class OpenaiBatchRoutes:
    """``secret`` keys fingerprints and ids; ``retention_s``: how long files are kept; ``draining()``: nothing new is taken."""

    def __init__(
        self,
        admit: Admit,
        bridge: Bridge,
        books: Books,
        board: RunBoard,
        batches: FileBatches,
        secret: bytes,
        retention_s: float,
        draining: Callable[[], bool],
    ) -> None:
        self._admit, self._bridge, self._books, self._board, self._batches = admit, bridge, books, board, batches
        self._secret, self._retention_s, self._draining = secret, retention_s, draining

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        """Under /v1, and under /api/v1 too."""
        return [
            route
            for base in (prefix, prefix.removeprefix("/api"))
            for route in (
                web.post(f"{base}/batches", self.create),
                web.get(f"{base}/batches", self.list),
                web.get(base + "/batches/{id}", self.get),
                web.post(base + "/batches/{id}/cancel", self.cancel),
            )
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        if self._draining():
            raise ApiError(503, "the Coordinator is shutting down", code="draining", kind="server_error", headers={"Retry-After": "2"})
        raw = await request.read()
        body = schema.parse_json(raw)
        spec = parse_batch(body, self._retention_s)
        terms = read_terms(request, raw, {}, account, self._secret)
        view = await self._bridge.call(self._submit, account, spec, terms)
        return json_response(batch_json(view))

    async def _submit(self, account: str, spec: BatchSpec, terms: Terms) -> BatchView:
        """trio. Raises ApiError, BooksRefused, BooksUnavailable."""
        run_id = self._run_id(account, terms.idempotency_key)
        if await self._books.ask(file_rows.open_batches_of, account) >= limits.FILE_BATCHES_OPEN_MAX:
            text = f"the account has {limits.FILE_BATCHES_OPEN_MAX} batches under way, which is the limit; wait for one to end"
            raise ApiError(429, text, code="too_many_batches", kind="rate_limit_error", headers={"x-should-retry": "false"})
        run, _ = await self._board.submit(
            run_id,
            account,
            RunKind.FILE_BATCH,
            spec.input_file_id,  # the file stays while a batch bears its name
            0,
            spec.pack(),
            fingerprint=terms.fingerprint,
            is_retry=terms.is_retry,
        )
        return await self._view(run)

    def _run_id(self, account: str, key: str) -> str:
        """Where it names an idempotency key, always the same."""
        if not key:
            return f"batch_{secrets.token_hex(_ID_CHARS // 2)}"
        named = b"\0".join((_ID_LABEL + account.encode(), key.encode()))
        return f"batch_{hmac.digest(self._secret, named, 'sha256').hex()[:_ID_CHARS]}"

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = params.whole_number(request, "limit", 1, limits.FILE_BATCHES_LISTED_MAX) or _LIST_DEFAULT
        after = request.query.get("after", "")
        if not (after.isascii() and after.isprintable() and len(after) <= limits.NAME_CHARS_MAX):
            raise bad_request("after is the id of a batch", "after")

        async def ask() -> tuple[list[BatchView], bool]:
            runs = await self._books.ask(file_rows.batches_of, account, after, limit + 1)
            return [await self._view(run) for run in runs[:limit]], len(runs) > limit

        views, has_more = await self._bridge.call(ask)
        return json_response(page_json([batch_json(view) for view in views], has_more))

    async def get(self, request: web.Request) -> web.StreamResponse:
        account, run_id = await self._admit(request, "read"), _id(request)

        async def ask() -> BatchView:
            return await self._view(await self._find(run_id, account))

        return json_response(batch_json(await self._bridge.call(ask)))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """What is done by then is in the output file."""
        account, run_id = await self._admit(request, "write"), _id(request)

        async def end() -> BatchView:
            view = await self._view(await self._find(run_id, account))
            if view.run.ended:
                return view
            with trio.move_on_after(_CANCEL_WAIT_S):
                await self._board.cancel(run_id, account, RunKind.FILE_BATCH)
            return await self._view(await self._find(run_id, account))

        view = await self._bridge.call(end)
        if view.status not in (Status.CANCELLED, Status.CANCELLING):
            raise ApiError(409, f"the batch is {view.status} already and cannot be cancelled", code="batch_ended")
        return json_response(batch_json(view))

    async def _find(self, run_id: str, account: str) -> Run:
        """trio. Raises ApiError 404."""
        try:
            run = await self._board.find(run_id, account, RunKind.FILE_BATCH)
        except BooksRefused:
            raise _unknown() from None
        if not run.spec:  # its time is over
            raise _unknown()
        return run

    async def _view(self, run: Run) -> BatchView:
        """trio. Raises ApiError."""
        try:
            spec, result = BatchSpec.read(self._board.spec_of(run)), self._board.result_of(run)
        except SealBroken:
            raise _unknown() from None
        return await self._batches.view(run, spec, result, self._board.is_live(run.id))


def parse_batch(body: Mapping[str, Any], retention_s: float) -> BatchSpec:
    """``POST /v1/batches``; ``max_parallelism`` is ours. Raises ApiError 400."""
    fields = Fields(body)
    file_id = fields.text("input_file_id", limits.NAME_CHARS_MAX, required=True)
    if not (file_id.isascii() and file_id.isprintable()):
        raise bad_request("input_file_id is the id of a file", "input_file_id")
    endpoint = fields.text("endpoint", limits.NAME_CHARS_MAX, required=True)
    if endpoint not in ENDPOINTS:
        raise bad_request(f"endpoint must be one of {', '.join(ENDPOINTS)}", "endpoint")
    if fields.text("completion_window", limits.NAME_CHARS_MAX, required=True) != WINDOW:
        raise bad_request(f"completion_window must be {WINDOW}", "completion_window")
    return BatchSpec(
        file_id,
        endpoint,
        WINDOW,
        _output_expiry_s(fields.get("output_expires_after"), retention_s),
        _metadata(fields.get("metadata")),
        fields.integer("max_parallelism", 1, limits.BATCH_RUNNING_MAX),
    )


def _output_expiry_s(value: object, retention_s: float) -> float:
    if value is None:
        return retention_s
    if not isinstance(value, dict):
        raise wrong_type("output_expires_after", "an object", value)
    return expiry_s(value.get("anchor"), value.get("seconds"), "output_expires_after", retention_s)


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type("metadata", "an object", value)
    if len(value) > METADATA_MAX:
        raise bad_request(f"metadata may have {METADATA_MAX} entries", "metadata")
    return {
        text_of(name, "metadata", METADATA_KEY_CHARS_MAX): text_of(entry, "metadata", METADATA_VALUE_CHARS_MAX)
        for name, entry in value.items()
    }


def _id(request: web.Request) -> str:
    text = request.match_info["id"]
    if not (text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise _unknown()
    return text


def _unknown() -> ApiError:
    return ApiError(404, "there is no such batch, or its time is over", code="batch_not_found")


def batch_json(view: BatchView) -> dict[str, Any]:
    """As OpenAI shows it, and what its lines have cost so far (``price``, credits)."""
    run, spec, status = view.run, view.spec, view.status
    ended_at = run.finished_at_ms // 1000 if run.ended else None
    total, completed, failed = view.counts
    return {
        "id": run.id,
        "object": "batch",
        "endpoint": spec.endpoint,
        "errors": {"object": "list", "data": list(view.errors)} if view.errors else None,
        "input_file_id": spec.input_file_id,
        "completion_window": spec.completion_window,
        "status": status.value,
        "output_file_id": view.output_file_id,
        "error_file_id": view.error_file_id,
        "created_at": run.created_at_ms // 1000,
        "in_progress_at": view.in_progress_at_ms // 1000 or None,
        "expires_at": (run.created_at_ms + int(limits.FILE_BATCH_WINDOW_S * 1000)) // 1000,
        "finalizing_at": view.finalizing_at_ms // 1000 or None,
        "completed_at": ended_at if status is Status.COMPLETED else None,
        "failed_at": ended_at if status is Status.FAILED else None,
        "expired_at": ended_at if status is Status.EXPIRED else None,
        "cancelling_at": view.finalizing_at_ms // 1000 or None if status in (Status.CANCELLING, Status.CANCELLED) else None,
        "cancelled_at": ended_at if status is Status.CANCELLED else None,
        "request_counts": {"total": total, "completed": completed, "failed": failed},
        "usage": _usage(view) if view.tokens is not None else None,
        "metadata": spec.metadata,
        "price": format_credits(view.price_micros),
    }


def _usage(view: BatchView) -> dict[str, Any]:
    tokens = view.tokens
    assert tokens is not None
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens.prompt + tokens.completion,
    }
