"""``/api/v1/account``, ``/api-keys`` and ``/islands``: what an account holder sees and changes by an API key of his. Only his own.

A key never makes one that may do more than itself: no other scopes, and no higher limit of requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web

from coordinator.books import queries
from coordinator.books.accounts import DAY_MS, KarmaEvent, Refill
from coordinator.books.database import Database
from coordinator.books.queries import AccountView, IslandView, KeyRecord, Line, Position
from coordinator.books.writer import Writer
from coordinator.http.answers import to_json
from coordinator.http.auth import ADMITTED, Gate
from coordinator.http.errors import ApiError, bad_request
from coordinator.http.fields import Fields
from coordinator.http.params import one_of, parsed, whole, whole_number
from coordinator.http.schema import parse_json
from coordinator.keys import (
    GRACE_MAX_S,
    GRACE_S,
    RATE_LIMIT_MAX,
    SCOPES,
    ApiKey,
    KeyFault,
    KeyRefused,
    KeyStore,
    MadeKey,
    check_key_name,
)
from coordinator.statement import (
    PAGE_LINES,
    RENDERINGS,
    Rendering,
    StatementReader,
    cursor_of,
    parse_cursor,
    parse_time,
    time_text,
    until_now,
)
from protocol import checks, limits
from protocol.prices import format_credits

T = TypeVar("T")

Admit = Callable[[web.Request, str], Awaitable[str]]
"""Gives the account whose key came with a request; raises ApiError."""

_THREADS = 4
_KARMA_LINES_DEFAULT = 100
_KEY_ID_MAX = 2**31 - 1
_STATUS = {KeyFault.UNKNOWN: 404, KeyFault.ENDED: 409, KeyFault.TOO_MANY: 409}
_PRIVATE = {"Content-Type": "application/json", "Cache-Control": "no-store"}
_IN_FILE_NAMES = str.maketrans("/:@", "___")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class AccountRoutes:
    """Asks the database in threads of its own; ``close`` ends them."""

    def __init__(
        self, admit: Admit, database: Database, writer: Writer, gate: Gate, now_ms: Callable[[], int] = _now_ms
    ) -> None:
        self._admit, self._database, self._writer, self._gate, self._now_ms = admit, database, writer, gate, now_ms
        self._keys = KeyStore(database, now_ms)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="accounts")

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        return [
            web.get(f"{prefix}/account", self.account),
            web.get(f"{prefix}/account/statement", self.statement),
            web.get(f"{prefix}/api-keys", self.list_keys),
            web.post(f"{prefix}/api-keys", self.create_key),
            web.delete(prefix + "/api-keys/{id}", self.revoke_key),
            web.post(prefix + "/api-keys/{id}/rotate", self.rotate_key),
            web.get(f"{prefix}/islands", self.islands),
            web.get(prefix + "/islands/{peer}/karma", self.karma),
        ]

    async def account(self, request: web.Request) -> web.StreamResponse:
        """With the day's refill, which is due by now."""
        name = await self._admit(request, "read")
        view = await self._view(name)
        if view.refilled_day < self._now_ms() // DAY_MS:
            await self._in_thread(self._writer.do, Refill(name))
            view = await self._view(name)
        return _json(account_to_json(view))

    async def _view(self, name: str) -> AccountView:
        view = await self._ask(queries.account_view, name)
        if view is None:
            raise ApiError(404, f"there is no account {name}", code="unknown_account")
        return view

    async def statement(self, request: web.Request) -> web.StreamResponse:
        """Streamed; the first page is read before anything is sent, so that a database that is away has a status."""
        account = await self._admit(request, "read")
        form = one_of(request, "format", RENDERINGS, "json")
        reader = StatementReader(
            account,
            parsed(request, "since", parse_time) or 0,
            parsed(request, "until", parse_time) or until_now(self._now_ms()),
            parsed(request, "cursor", parse_cursor),
            whole_number(request, "limit", 1, PAGE_LINES),
        )
        rendering = RENDERINGS[form]()
        await self._ask(reader.open)
        opening = rendering.begin(reader)
        first = await self._ask(reader.next_page)
        headers = {
            "Content-Type": rendering.content_type,
            "Content-Disposition": f'attachment; filename="statement-{account.translate(_IN_FILE_NAMES)}.{form}"',
            "Cache-Control": "no-store",
        }
        if "limit" in request.query and reader.next_cursor is not None:
            headers["X-Next-Cursor"] = reader.next_cursor
        return web.Response(body=self._pieces(rendering, reader, opening, first), headers=headers)

    async def _pieces(
        self, rendering: Rendering, reader: StatementReader, opening: str, page: list[Line]
    ) -> AsyncIterator[bytes]:
        yield opening.encode()
        while page:
            yield rendering.lines(page).encode()
            page = await self._ask(reader.next_page)
        yield rendering.end(reader).encode()

    async def list_keys(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        records = await self._ask(queries.keys_of, account)
        return _json({"data": [self._key_to_json(record) for record in records]})

    async def create_key(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        maker = request[ADMITTED]
        name, wanted = wanted_key(parse_json(await request.read() or b"{}"), maker)
        try:
            made = await self._in_thread(self._keys.create, ApiKey(0, account, *wanted), name)
        except KeyRefused as refused:
            raise _refused(refused) from None
        return self._made(made)

    async def revoke_key(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        try:
            record = await self._in_thread(self._keys.revoke, _key_id(request), account)
        except KeyRefused as refused:
            raise _refused(refused) from None
        self._gate.forget(record.id)
        return _json(self._key_to_json(record))

    async def rotate_key(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        key_id, maker = _key_id(request), request[ADMITTED]
        body = Fields(parse_json(await request.read() or b"{}"))
        grace_s = body.number("grace_s", 0, GRACE_MAX_S, GRACE_S)
        old = await self._ask(queries.key_of, key_id)
        if old is not None and old.account == account:
            need_within(maker, frozenset(old.scopes), old.rate_limit_per_minute)
        try:
            made = await self._in_thread(self._keys.rotate, key_id, account, grace_s)
        except KeyRefused as refused:
            raise _refused(refused) from None
        self._gate.forget(key_id)
        return self._made(made)

    def _made(self, made: MadeKey) -> web.StreamResponse:
        return _json({**self._key_to_json(made.record), "key": made.key}, status=201)

    def _key_to_json(self, record: KeyRecord) -> dict[str, Any]:
        return key_to_json(record, self._gate.last_used_ms(record.id), self._now_ms())

    async def islands(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        views = await self._ask(queries.islands_of, account)
        return _json({"data": [island_to_json(view) for view in views]})

    async def karma(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = whole_number(request, "limit", 1, PAGE_LINES) or _KARMA_LINES_DEFAULT
        before = parsed(request, "cursor", parse_cursor)
        view = await self._own_island(request.match_info["peer"], account)
        events = await self._ask(queries.karma_of, view.record.peer, before, limit + 1)
        shown = events[:limit]
        last = cursor_of(Position(shown[-1].at_ms, id=shown[-1].id)) if len(events) > limit else None
        return _json({"island": island_to_json(view), "data": [event_to_json(event) for event in shown], "next_cursor": last})

    async def _own_island(self, peer: str, account: str) -> IslandView:
        unknown = ApiError(404, "no Island of this peer id is paired with your account", code="unknown_island")
        try:
            checks.peer_id("peer", peer)
        except ValueError:
            raise unknown from None
        view = await self._ask(queries.island_view, peer)
        if view is None or view.record.account != account:
            raise unknown
        return view

    async def _ask(self, question: Callable[..., T], *arguments: Any) -> T:
        """``question(connection, *arguments)``. Raises BooksUnavailable."""

        def read() -> T:
            with self._database.reading() as connection:
                return question(connection, *arguments)

        return await self._in_thread(read)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def wanted_key(body: dict[str, Any], maker: ApiKey) -> tuple[str, tuple[frozenset[str], int]]:
    """The name, scopes and limit of ``POST /api-keys``; what it does not say is as the maker has it. Raises ApiError."""
    fields = Fields(body)
    name = fields.text("name", limits.NAME_CHARS_MAX)
    try:
        check_key_name(name)
    except ValueError as error:
        raise bad_request(str(error), "name") from None
    given = fields.integer("rate_limit_per_minute", 0, RATE_LIMIT_MAX)
    scopes, limit = _scopes(fields.get("scopes"), maker), maker.rate_limit_per_minute if given is None else given
    need_within(maker, scopes, limit)
    return name, (scopes, limit)


def _scopes(value: object, maker: ApiKey) -> frozenset[str]:
    if value is None:
        return maker.scopes
    if not isinstance(value, list) or not value or not all(isinstance(scope, str) and scope in SCOPES for scope in value):
        raise bad_request(f"scopes must be an array of {' and '.join(sorted(SCOPES))}", "scopes")
    return frozenset(value)


def need_within(maker: ApiKey, scopes: frozenset[str], rate_limit_per_minute: int) -> None:
    """Raises ApiError 403 where a key would get more than its maker has. A limit of 0 is none."""
    most = maker.rate_limit_per_minute
    if scopes <= maker.scopes and (not most or 0 < rate_limit_per_minute <= most):
        return
    raise ApiError(
        403,
        "a key cannot make or rotate one that may do more than itself",
        code="insufficient_scope",
        kind="permission_error",
    )


def account_to_json(view: AccountView) -> dict[str, Any]:
    return {
        "object": "account",
        "id": view.name,
        "name": view.name,
        "credits": format_credits(view.credits),
        "credits_posted": format_credits(view.posted),
        "credits_held": format_credits(view.held),
        "credits_in_escrow": format_credits(view.escrow),
        "credits_earned": format_credits(view.earned),
        "karma": view.karma_milli / 1000,
        "islands": view.islands,
        "islands_earning": view.earning,
        "rate_limit_per_minute": view.rate_limit_per_minute,
        "created_at": time_text(view.created_at_ms),
    }


def key_to_json(record: KeyRecord, used_ms: int | None, now_ms: int) -> dict[str, Any]:
    """``used_ms``: a use that is not written yet."""
    uses = [at for at in (record.last_used_at_ms, used_ms) if at is not None]
    ends = record.revoked_at_ms
    return {
        "object": "api_key",
        "id": record.id,
        "name": record.name,
        "hint": record.hint,
        "scopes": list(record.scopes),
        "rate_limit_per_minute": record.rate_limit_per_minute,
        "state": record.state(now_ms),
        "created_at": time_text(record.created_at_ms),
        "last_used_at": time_text(max(uses)) if uses else None,
        "revoked_at": time_text(ends) if ends is not None else None,
    }


def island_to_json(view: IslandView) -> dict[str, Any]:
    record = view.record
    return {
        "object": "island",
        "peer": record.peer,
        "approved": record.approved,
        "karma": record.karma_milli / 1000,
        "is_earning": record.earns,
        "pending_minutes": round(record.pending_ms / 60_000, 3),
        "compute_hours": round(record.compute_ms / 3_600_000, 4),
        "jobs_succeeded": record.jobs_done,
        "jobs_failed": record.jobs_failed,
        "credits_earned": format_credits(record.earned_micros),
        "credits_in_escrow": format_credits(view.escrow),
        "first_seen_at": time_text(record.first_seen_ms),
    }


def event_to_json(event: KarmaEvent) -> dict[str, Any]:
    return {
        "time": time_text(event.at_ms),
        "kind": event.kind,
        "delta": event.delta_milli / 1000,
        "karma": event.balance_milli / 1000,
        "job": event.job_id or None,
    }


def _key_id(request: web.Request) -> int:
    key_id = whole(request.match_info["id"])
    if key_id is None or key_id > _KEY_ID_MAX:
        raise ApiError(404, "there is no such key", code=KeyFault.UNKNOWN.value)
    return key_id


def _refused(refused: KeyRefused) -> ApiError:
    return ApiError(_STATUS[refused.fault], refused.message, code=refused.fault.value)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=to_json(value), headers=_PRIVATE)
