"""``/api/v1/jobs``: work that is submitted, runs by itself, and is looked at when the client likes; chats are listed here too."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from coordinator.books import job_queries
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.books.jobs import Job, JobState
from coordinator.cache.asking import ask_of
from coordinator.desk import CACHED
from coordinator.http import schema
from coordinator.http.ab_notes import ab_headers, ab_metadata, assigned_of, rating_text
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge, Stream
from coordinator.http.cache_notes import CacheNote
from coordinator.http.errors import ApiError, bad_request, from_books, from_refusal, unavailable
from coordinator.http.job_events import failed, output_json, sse, weight_of
from coordinator.http.job_input import Asked, job_order, lines_asked, read_body, text_asked, wants_text
from coordinator.http.sse import HEADERS, KEEP_ALIVE, EventStream, relay
from coordinator.http.terms import read_flag, read_terms
from coordinator.job_board import JobBoard, JobEvent, Output, StateChange
from coordinator.jobs import Assigned, CacheHit
from coordinator.orders import Order
from coordinator.statement import time_text
from protocol import limits
from protocol.errors import Refused
from protocol.prices import format_credits

Admit = Callable[[web.Request, str], Awaitable[str]]
WhyWaiting = Callable[[Mapping[str, str]], Mapping[str, str]]

_LIST_DEFAULT = 20
_KIND_S = 1.0
_KINDS_MAX = 1000
_OFFSET_MAX = 1_000_000_000


class Others(Protocol):
    """What stands under the addresses of jobs and is none: batches."""

    def has(self, request: web.Request) -> bool: ...

    async def get(self, request: web.Request) -> web.StreamResponse: ...

    async def cancel(self, request: web.Request) -> web.StreamResponse: ...

    async def output(self, request: web.Request) -> web.StreamResponse: ...

    async def stream(self, request: web.Request) -> web.StreamResponse: ...


class JobRoutes:
    """``salt(account)`` is the account's cache salt; ``secret`` keys fingerprints; ``keep_s`` is how long results are kept.

    ``writes_text(cargo)``: whether it does, None where nobody knows; ``why_waiting(jobs)`` says of those that wait here (id -> Cargo) for
    what; both belong to trio.
    """

    def __init__(
        self,
        admit: Admit,
        bridge: Bridge,
        board: JobBoard,
        salt: Callable[[str], bytes],
        writes_text: Callable[[str], bool | None],
        secret: bytes,
        keep_s: float,
        job_timeout_s: float,
        keep_alive_s: float,
        draining: Callable[[], bool],
        why_waiting: WhyWaiting,
        others: Others | None = None,
        has_cache: bool = False,
    ) -> None:
        self._admit, self._bridge, self._board, self._salt, self._secret = admit, bridge, board, salt, secret
        self._keep_s, self._job_timeout_s, self._keep_alive_s, self._draining = keep_s, job_timeout_s, keep_alive_s, draining
        self._why_waiting, self._writes_text, self._others, self._has_cache = why_waiting, writes_text, others, has_cache
        self._kinds: dict[str, tuple[bool | None, float]] = {}

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        jobs, one = f"{prefix}/jobs", prefix + "/jobs/{id}"
        return [
            web.post(jobs, self.submit),
            web.get(jobs, self.list),
            web.get(one, self.get),
            web.delete(one, self.cancel),
            web.get(one + "/output", self.output),
            web.get(one + "/stream", self.stream),
            web.get(one + "/placement", self.placement),
            web.get(one + "/receipts", self.receipts),
        ]

    async def submit(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        if self._draining():
            raise ApiError(503, "the Coordinator is shutting down", code="draining", kind="server_error", headers={"Retry-After": "2"})
        raw = await request.read()
        body = schema.parse_json(raw)
        cargo, given = read_body(body)
        terms = read_terms(request, raw, body, account, self._secret)
        asked = await self._asked(cargo, given)
        salt, is_streamed = self._salt(account), read_flag(body.get("stream"), "stream")
        ask = ask_of(cargo, asked, given, account, terms.policy_text, terms.cache) if self._has_cache else None
        order = job_order(
            secrets.token_hex(12), cargo, asked, terms, account, salt, self._keep_s, self._job_timeout_s, is_streamed, ask
        )
        if is_streamed:
            return await self._stream_now(request, order)
        job = await self._bridge.call(self._board.submit, order)
        headers = {"Location": f"/api/v1/jobs/{job.id}", "x-archipelag-job": job.id, **_cache_headers(job, order)}
        headers |= ab_headers(assigned_of(job.ab_test, job.ab_arm))
        if job.id != order.spec.job_id:
            headers["x-archipelag-replayed"] = "true"
        (shown,) = await self._shown(job)
        return json_response(shown, status=201, headers=headers)

    async def _asked(self, cargo: str, given: dict[str, Any]) -> Asked:
        return text_asked(cargo, given) if wants_text(given, await self._look(cargo)) else lines_asked(given)

    async def _look(self, cargo: str) -> bool | None:
        """``writes_text`` as it was within the last _KIND_S: asking trio takes half a millisecond, and Cargos hardly ever change."""

        async def ask() -> bool | None:
            return self._writes_text(cargo)

        known, until_s = self._kinds.get(cargo, (None, 0.0))
        now_s = asyncio.get_running_loop().time()
        if known is None or until_s < now_s:
            known = await self._bridge.call(ask)
            if len(self._kinds) >= _KINDS_MAX:
                self._kinds.clear()
            self._kinds[cargo] = known, now_s + _KIND_S
        return known

    async def _stream_now(self, request: web.Request, order: Order) -> web.StreamResponse:
        """The job's events in the answer itself. A client that does not read holds the Cargo up; one that hangs up ends the job."""
        events: Stream[JobEvent] = self._bridge.stream(lambda send: self._board.run_now(order, send), weight_of)
        try:
            said = await _first_words(events)
            note, assigned = CacheNote.of(order.cache), next((event for event in said if isinstance(event, Assigned)), None)
            job_id = next((note.note(event) for event in said if isinstance(event, CacheHit)), order.spec.job_id)
            headers = {"x-archipelag-job": job_id, **note.headers(), **ab_headers(assigned)}
            if events.ended:  # all of it is here already
                return web.Response(body=b"".join(map(sse, said)), headers={**HEADERS, **headers})
            async with EventStream(request, headers, self._keep_alive_s, events.nudge) as output:
                await _pump(events, said, output)
            return output.response
        finally:
            events.close()

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = _number(request, "limit", _LIST_DEFAULT, 1, limits.JOBS_LISTED_MAX)
        offset = _number(request, "offset", 0, 0, _OFFSET_MAX)
        states = _states(request.query.get("status") or request.query.get("state"))
        cargo = request.query.get("cargo", "")
        if not cargo.isprintable():
            raise bad_request("cargo is the name of a Cargo", "cargo")
        jobs, total = await self._bridge.call(self._board.ask, job_queries.jobs_of, account, limit, offset, states, cargo)
        meta = {"total": total, "limit": limit, "offset": offset}
        return json_response({"data": await self._shown(*jobs), "meta": meta})

    async def get(self, request: web.Request) -> web.StreamResponse:
        if self._others is not None and self._others.has(request):
            return await self._others.get(request)
        (shown,) = await self._shown(await self._find(request))
        return json_response(shown)

    async def _shown(self, *jobs: Job) -> Sequence[dict[str, Any]]:
        """As their account sees them, with what is not in their rows: what was given back, and what they wait for."""
        paid = [job.id for job in jobs if job.price_micros]
        waiting = {job.id: job.cargo for job in jobs if not job.ended}

        async def look() -> tuple[Mapping[str, int], Mapping[str, str]]:
            refunded = await self._board.ask(job_queries.refunded_of, paid) if paid else {}
            return refunded, self._why_waiting(waiting)

        refunded, why = await self._bridge.call(look)
        return [job_json(job, refunded.get(job.id, 0), why.get(job.id)) for job in jobs]

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        if self._others is not None and self._others.has(request):
            return await self._others.cancel(request)
        account = await self._admit(request, "write")
        job = await self._bridge.call(self._board.cancel, _id(request), account)
        texts = {
            JobState.CANCELLED: "the job was cancelled",
            JobState.SUCCEEDED: "the job had ended before",
            JobState.FAILED: "the job had failed before",
        }
        message = texts.get(job.state, "the Coordinator that runs the job was told to cancel it")
        return json_response({"id": job.id, "state": job.state.value, "message": message, "price": format_credits(job.price_micros)})

    async def output(self, request: web.Request) -> web.StreamResponse:
        if self._others is not None and self._others.has(request):
            return await self._others.output(request)
        job = await self._find(request)
        if job.holder:
            raise ApiError(404, "this job's answer went straight from its Island to its bridge; it was never here", code="output_not_here")
        said = await self._bridge.call(self._board.answer, job)
        if job.state is JobState.SUCCEEDED and said is None:
            raise ApiError(410, "the output of this job is not kept any more", code="output_expired")
        output = output_json(said, _usage(job)) if said is not None else None
        return json_response({"job_id": job.id, "state": job.state.value, "output": output, "completed": job.ended, "error": _error(job)})

    async def placement(self, request: web.Request) -> web.StreamResponse:
        """Why this Island?"""
        job = await self._find(request)
        why = json.loads(job.placement) if job.placement else None
        return json_response({"job_id": job.id, "island": job.island or None, "region": job.region or None, "placement": why})

    async def receipts(self, request: web.Request) -> web.StreamResponse:
        job = await self._find(request)
        rows = await self._bridge.call(self._board.ask, job_queries.receipts_of, job.id)
        data = [
            {"island": island, "receipt": envelope.hex(), "paid": format_credits(paid)} for island, envelope, paid in rows
        ]
        return json_response({"job_id": job.id, "price": format_credits(job.price_micros), "data": data})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """SSE from the job's beginning to its end, for any number of watchers."""
        if self._others is not None and self._others.has(request):
            return await self._others.stream(request)
        account = await self._admit(request, "read")
        job = await self._bridge.call(self._board.find, _id(request), account)

        async def watch(send: Callable[[JobEvent], Awaitable[None]]) -> None:
            async for said in self._board.watch(job.id, account):
                await send(said)

        events = self._bridge.stream(watch, weight_of)
        return await relay(request, events, {"x-archipelag-job": job.id}, self._keep_alive_s, lambda said: b"".join(map(sse, said)))

    async def _find(self, request: web.Request) -> Job:
        account = await self._admit(request, "read")
        return await self._bridge.call(self._board.find, _id(request), account)


async def _first_words(events: Stream[JobEvent]) -> list[JobEvent]:
    """Events up to the first that says more than that an Island has the job, so that until then an error has a status; after HEADERS_WAIT_S
    what there is."""
    said: list[JobEvent] = []
    timer = asyncio.get_running_loop().call_later(limits.HEADERS_WAIT_S, events.nudge)
    try:
        # behind an output comes the end
        while all(isinstance(event, StateChange | Output | CacheHit | Assigned) for event in said) and not events.ended:
            more = await events.take()
            if not more:
                break
            said += more
    finally:
        timer.cancel()
    return said


async def _pump(events: Stream[JobEvent], said: Sequence[JobEvent], output: EventStream) -> None:
    """Writes what comes to the end of the job. An error is told in the stream, since its headers have gone out already."""
    while True:
        if data := b"".join(map(sse, said)):
            await output.write(data)
        if events.ended:
            return
        try:
            said = await events.take()
            if not said and not events.ended:
                await output.write(KEEP_ALIVE)
        except Refused as refusal:
            await output.write(failed(from_refusal(refusal)))
            return
        except BooksRefused as refused:
            await output.write(failed(from_books(refused)))
            return
        except BooksUnavailable as error:
            await output.write(failed(unavailable(str(error))))
            return


def job_json(job: Job, refunded_micros: int, waiting_for: str | None) -> dict[str, Any]:
    """A job as its account sees it; without its output, which has an address of its own."""
    return {
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "cargo": job.cargo,
        "state": job.state.value,
        "priority": job.priority,
        "policy": json.loads(job.policy) if job.policy else None,
        "bid_price": format_credits(job.bid_micros),
        "bid_source": job.bid_source,
        "price": format_credits(job.price_micros) if job.ended else None,
        "refunded": format_credits(refunded_micros) if refunded_micros else None,
        "cache_hit": job.bid_source == CACHED,
        "cache_strategy": _strategy(job),
        "waiting_for": waiting_for,
        "island": job.island or None,
        "region": job.region or None,
        "tries": job.tries,
        "usage": _usage(job) if job.ended else None,
        "error": _error(job),
        "created_at": _time(job.created_at_ms),
        "started_at": _time(job.started_at_ms) if job.island else None,
        "completed_at": _time(job.finished_at_ms),
        "output_until": _time(job.result_expires_at_ms),
        "metadata": ab_metadata(assigned_of(job.ab_test, job.ab_arm)),
        "rating": rating_text(job.rating),
    }


def _strategy(job: Job) -> str | None:
    """How the cache has found the answer of a job."""
    if job.bid_source != CACHED or not job.placement:
        return None
    found = json.loads(job.placement).get("cache_strategy")
    return found if isinstance(found, str) else None


def _cache_headers(job: Job, order: Order) -> dict[str, str]:
    """What a job that was submitted says of the cache."""
    note = CacheNote.of(order.cache if job.id == order.spec.job_id else None)
    if job.id == order.spec.job_id and job.bid_source == CACHED:
        note.note(CacheHit(_strategy(job) or "", "", job.id))
    return note.headers()


def _usage(job: Job) -> dict[str, Any]:
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": job.completion_tokens,
        "total_tokens": job.prompt_tokens + job.completion_tokens,
        "compute_ms": job.compute_ms,
        "credits_used": format_credits(job.price_micros),
    }


def _error(job: Job) -> dict[str, str] | None:
    if not job.error_code:
        return None
    text = "the job was cancelled, or its client left" if job.state is JobState.CANCELLED else "no more is known"
    return {"code": job.error_code, "message": job.error_message or text}


def _time(unix_ms: int) -> str | None:
    return time_text(unix_ms) if unix_ms else None


def _id(request: web.Request) -> str:
    """Raises ApiError 404 for what is no id of a job."""
    text = request.match_info["id"]
    if not (text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise ApiError(404, "there is no such job", code="unknown_job")
    return text


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise bad_request(f"{name} must be between {low} and {high}", name)
    return int(text)


def _states(text: str | None) -> tuple[JobState, ...]:
    if not text:
        return ()
    try:
        return tuple(JobState(part.strip()) for part in text.split(","))
    except ValueError:
        raise bad_request(f"status takes some of {', '.join(JobState)}", "status") from None



