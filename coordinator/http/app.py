"""The aiohttp application: routes, and one middleware that gives every answer a request id and every error OpenAI's envelope."""

from __future__ import annotations

import asyncio
import base64
import functools
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.cache.asking import CacheAsk, ask_of
from coordinator.exchange.bids import Work
from coordinator.exchange.quotes import QuoteRefused
from coordinator.http import embeddings, images, models, schema
from coordinator.http.answers import Answer, Shape, StreamWriter, json_response, whole
from coordinator.http.auth import Gate
from coordinator.http.bridge import Bridge, Stream
from coordinator.http.cache_notes import CacheNote
from coordinator.http.chat import ChatShape
from coordinator.http.completions import CompletionShape
from coordinator.http.errors import ApiError, bad_request, from_books, from_quote, from_refusal, unavailable
from coordinator.http.image_address import CONTENT_TYPES, ImageAddress, read_name
from coordinator.http.line_answers import LineAnswer, LineRequest, line_order
from coordinator.http.metrics import CONTENT_TYPE, Metrics
from coordinator.http.sse import DONE, KEEP_ALIVE, EventStream, event
from coordinator.http.terms import Terms, need_cargo, read_terms
from coordinator.jobs import Accepted, Assigned, CacheHit, CachePassed, CacheWaits, Emit, Event, JobSpec, Replayed
from coordinator.matching import declared_tokens
from coordinator.orders import Order
from privacy.keys import cache_salt
from protocol import limits
from protocol.cargo_io import ImageLine
from protocol.errors import Refused

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Admit = Callable[[web.Request, str], Awaitable[str]]
Parser = Callable[[dict[str, Any], int], schema.ApiRequest]

_JSON = "application/json"
_PREFIXES = ("/v1", "/api/v1")
_REQUEST_ID_CHARS_MAX = 128
_ACCOUNTS_REMEMBERED = 1024
_FOREWORDS = Replayed | CacheHit | CachePassed | CacheWaits | Assigned  # what is said before an answer, of where it comes from


@dataclass(slots=True)
class _Call:
    """What is known of the request that the current task handles."""

    request_id: str
    rate: dict[str, str] = field(default_factory=dict)
    begun: bool = False  # the head of its answer has gone out

    def headers(self) -> dict[str, str]:
        return {"x-request-id": self.request_id, "Server": "archipelag", **self.rate}


_CALL: ContextVar[_Call] = ContextVar("archipelag_call")


class Worker(Protocol):
    """Whoever does a request's work and is paid for it; called on trio."""

    async def run(self, order: Order, emit: Emit) -> None:
        """Raises Refused, BooksRefused, QuoteRefused or BooksUnavailable."""
        ...

    async def collect(self, order: Order) -> list[Event]:
        """All events at once."""
        ...


class KeptLines(Protocol):
    """Answers of lines that are kept; called on trio. Raises BooksUnavailable."""

    async def kept_until(self, job_id: str) -> int:
        """Unix milliseconds; 0: it is not kept."""
        ...

    async def kept_image(self, job_id: str, index: int) -> ImageLine | None: ...


class AnyAnswer(Protocol):
    """What is known of an answer under way."""

    cache: CacheNote

    def note(self, event: Any) -> None: ...

    def headers(self) -> dict[str, str]: ...


class Writer(Protocol):
    """Bytes of a stream from its events. ``complete``: all was written but for the mark of the end."""

    @property
    def complete(self) -> bool: ...

    def feed(self, events: list[Event]) -> bytes: ...


class Routes(Protocol):
    """More addresses of the API."""

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]: ...


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers need. ``worker``, ``islands``, ``cargos``, ``well_known`` and ``has_books`` belong to trio and are only called
    through the bridge.

    ``islands()``: how many there are; ``cargos()``: name of each Cargo that is offered -> Unix time in seconds since when.
    ``more(admit)``: further addresses under /api/v1; ``admit(request, scope)`` gives the account. ``keep_s``: how long answers of chats and
    completions are kept for requests that come again, ``keep_images_s``: pictures that have an address; 0: none has. ``lines``: None where
    no jobs of lines can be run. ``cache()``: how the cache of answers stands; None: there is none. ``job_timeout_s``: how long a job may
    run. ``has_books()``: whether the database can be used at the moment.
    """

    bridge: Bridge
    worker: Worker
    islands: Callable[[], int]
    cargos: Callable[[], Awaitable[dict[str, int]]]
    gate: Gate
    metrics: Metrics
    well_known: Callable[[], dict[str, Any]]
    salt_secret: bytes
    version: str
    body_bytes_max: int
    keep_alive_comment_s: float
    keep_s: float = 0.0
    keep_images_s: float = 0.0
    lines: KeptLines | None = None
    cache: Callable[[], dict[str, Any]] | None = None
    job_timeout_s: float = limits.JOB_TIMEOUT_S
    more: Callable[[Admit], Sequence[Routes]] = lambda admit: ()
    has_books: Callable[[], bool] = lambda: True
    draining: threading.Event = field(default_factory=threading.Event)


class Api:
    """The handlers, one method each. ``answering``: requests that came before a drain and have still to be answered, for any thread."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.answering = 0
        self._salt = functools.lru_cache(_ACCOUNTS_REMEMBERED)(functools.partial(cache_salt, services.salt_secret))

    def application(self) -> web.Application:
        app = web.Application(client_max_size=self._services.body_bytes_max, middlewares=[self._middleware])
        routes: list[web.AbstractRouteDef] = [
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/.well-known/archipelag.json", self.well_known),
        ]
        for prefix in _PREFIXES:
            routes += [
                web.post(f"{prefix}/chat/completions", self.chat),
                web.post(f"{prefix}/completions", self.completions),
                web.post(f"{prefix}/embeddings", self.embeddings),
                web.post(f"{prefix}/images/generations", self.images),
                web.get(prefix + "/images/{name}", self.image),
                web.get(f"{prefix}/models", self.models),
                # a model's name may hold slashes
                web.get(prefix + "/models/{name:.+}", self.model),
            ]
        for more in self._services.more(self.admit):
            routes += more.routes("/api/v1")
        app.add_routes(routes)
        app.on_response_prepare.append(_with_call)
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Nothing leaves without a request id, no error without its envelope; a handler's bug ends one request only."""
        started_s = time.perf_counter()
        call = _Call(_request_id(request))
        _CALL.set(call)
        # what comes later may still look at things, but nobody waits for it to end
        counts = not self._services.draining.is_set()
        self.answering += counts
        try:
            response = await handler(request)
        except ApiError as error:
            response = _error(error)
        except Refused as refusal:
            response = _error(from_refusal(refusal))
        except (BooksRefused, BooksUnavailable, QuoteRefused) as error:
            response = _error(_told(error))
        except web.HTTPException as error:
            response = _error(_from_http(error, self._services.body_bytes_max))
        except web.RequestPayloadError:
            response = _error(ApiError(400, "the body could not be read: it is not what its headers say", code="invalid_body"))
        except ConnectionError:
            raise  # the client has gone; aiohttp cleans up
        except Exception as error:
            # no message: the text of a foreign error may quote the input
            trace = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %s: %s\n%s", call.request_id, type(error).__name__, trace)
            response = _error(ApiError(500, "internal error", code="internal_error", kind="server_error"))
        finally:
            self.answering -= counts
        if call.begun and not response.prepared:
            raise ConnectionResetError("an answer that has begun cannot become another one")
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "none"
        self._services.metrics.request(route, response.status, time.perf_counter() - started_s)
        return response

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, schema.parse_chat, ChatShape())

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, schema.parse_completion, CompletionShape())

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        account, raw, body = await self._read(request)
        asked = embeddings.parse_embeddings(body)
        order, answer = self._line_job(request, raw, body, account, asked, embeddings.KIND, self._services.keep_s)
        answer.note_all(await self._services.bridge.call(self._services.worker.collect, order))
        body_out = await asyncio.to_thread(embeddings.whole, answer, asked)
        return web.Response(body=body_out, headers={"Content-Type": _JSON, **answer.headers()})

    async def images(self, request: web.Request) -> web.StreamResponse:
        account, raw, body = await self._read(request)
        asked, services = images.parse_images(body), self._services
        has_address = asked.response_format == images.URL
        keep_s = services.keep_images_s if has_address else services.keep_s
        order, answer = self._line_job(request, raw, body, account, asked, images.KIND, keep_s)
        if has_address and not keep_s:
            raise bad_request("response_format: no pictures are kept here; ask for b64_json", "response_format")
        if asked.stream:
            return await self._stream(request, order, answer, images.ImageStream(answer), images.weight_of)
        answer.note_all(await services.bridge.call(services.worker.collect, order))
        address = await self._image_urls(request, answer.job_id) if has_address else None
        body_out = await asyncio.to_thread(images.whole, answer, address)
        return web.Response(body=body_out, headers={"Content-Type": _JSON, **answer.headers()})

    async def _image_urls(self, request: web.Request, job_id: str) -> Callable[[int, ImageLine], str]:
        """The address of each picture of a job, as this client reaches us."""
        services = self._services
        assert services.lines is not None
        until_ms = await services.bridge.call(services.lines.kept_until, job_id)
        folder = f"{services.gate.scheme(request)}://{request.host}{request.path.removesuffix('generations')}"
        return lambda index, image: folder + ImageAddress(job_id, index, until_ms).name(services.salt_secret, image.format)

    async def image(self, request: web.Request) -> web.StreamResponse:
        """A picture by its address, which is all that it takes. It is a stranger's file, so browsers are to run nothing of it."""
        services = self._services
        address = read_name(request.match_info["name"], services.salt_secret, time.time_ns() // 1_000_000)
        picture = None
        if address is not None and services.lines is not None:
            picture = await services.bridge.call(services.lines.kept_image, address.job_id, address.index)
        if picture is None:
            raise ApiError(404, "there is no such picture, or its time is over", code="not_found")
        headers = {
            "Content-Type": CONTENT_TYPES.get(picture.format, "application/octet-stream"),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(body=await asyncio.to_thread(base64.b64decode, picture.data), headers=headers)

    async def models(self, request: web.Request) -> web.StreamResponse:
        await self.admit(request, "read")
        return json_response(models.model_list(await self._cargos()))

    async def model(self, request: web.Request) -> web.StreamResponse:
        await self.admit(request, "read")
        return json_response(models.model(await self._cargos(), request.match_info["name"]))

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """503 where requests should go to another Coordinator."""
        services = self._services

        async def look() -> tuple[int, bool, dict[str, Any]]:
            cache = services.cache() if services.cache is not None else {"enabled": False, "semantic": "there is no cache here"}
            return services.islands(), services.has_books(), cache

        islands, has_books, cache = await services.bridge.call(look)
        if services.draining.is_set():
            status = "draining"
        else:
            status = "ok" if has_books else "books_unavailable"
        shown = {"status": status, "version": services.version, "islands": islands, "cache": cache}
        return json_response(shown, status=200 if status == "ok" else 503)

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._services.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def well_known(self, _request: web.Request) -> web.StreamResponse:
        async def ask() -> dict[str, Any]:
            return self._services.well_known()

        return json_response(await self._services.bridge.call(ask))

    async def _cargos(self) -> dict[str, int]:
        return await self._services.bridge.call(self._services.cargos)

    async def admit(self, request: web.Request, scope: str) -> str:
        """The account of the key. Raises ApiError."""
        key, headers = await self._services.gate.admit(request, scope)
        _CALL.get().rate = headers
        return key.account

    async def _read(self, request: web.Request) -> tuple[str, bytes, dict[str, Any]]:
        """Account and body of a request that runs something. Raises ApiError."""
        account = await self.admit(request, "write")
        if self._services.draining.is_set():
            raise ApiError(
                503,
                "the Coordinator is shutting down",
                code="draining",
                kind="server_error",
                headers={"Retry-After": "2"},
            )
        raw = await request.read()
        return account, raw, schema.parse_json(raw)

    def _line_job(
        self, request: web.Request, raw: bytes, body: dict[str, Any], account: str, asked: LineRequest, kind: str, keep_s: float
    ) -> tuple[Order, LineAnswer]:
        """Raises ApiError."""
        services = self._services
        if services.lines is None:
            raise ApiError(404, "embeddings and pictures come from a Coordinator; ask that instead of a bridge", code="not_found")
        terms = read_terms(request, raw, body, account, services.salt_secret)
        need_cargo(asked.model, "model")
        job_id, salt = secrets.token_hex(12), self._salt(account)
        ask = self._cache_ask(asked, kind, body, account, terms)
        order = line_order(job_id, kind, asked, terms, account, salt, keep_s, services.job_timeout_s, ask)
        return order, LineAnswer(asked.model, job_id, int(time.time()), terms.explain, cache=CacheNote.of(ask))

    def _cache_ask(self, asked: LineRequest, kind: str, body: dict[str, Any], account: str, terms: Terms) -> CacheAsk | None:
        """Pictures are kept where the client names their seed and takes them as they are: an address is one of a job's own."""
        if self._services.cache is None:
            return None
        if kind == images.KIND and (body.get("seed") is None or body.get("response_format") == images.URL):
            return None
        return ask_of(asked.model, asked.given, body, account, terms.policy_text, terms.cache, lines_by_default=True)

    async def _generate(self, request: web.Request, parse: Parser, shape: Shape) -> web.StreamResponse:
        account, raw, body = await self._read(request)
        api = parse(body, secrets.randbits(63))
        terms = read_terms(request, raw, body, account, self._services.salt_secret)
        need_cargo(api.model, "model")
        job_id, services = secrets.token_hex(12), self._services
        ask = None
        if services.cache is not None and len(api.choices) == 1:
            ask = ask_of(api.model, api.choices[0], body, account, terms.policy_text, terms.cache)
        order = order_of(job_id, api, terms, account, self._salt(account), shape.kind, services.keep_s, services.job_timeout_s, ask)
        answer = Answer(api, job_id, int(time.time()), explain=terms.explain, cache=CacheNote.of(ask))
        if api.stream:
            return await self._stream(request, order, answer, StreamWriter(answer, shape))
        events = await self._services.bridge.call(self._services.worker.collect, order)
        body_out = whole(answer, shape, events)
        return web.Response(body=body_out, headers={"Content-Type": _JSON, **answer.headers()})

    async def _stream(
        self, request: web.Request, order: Order, answer: AnyAnswer, writer: Writer, weigh: Callable[[Event], int] | None = None
    ) -> web.StreamResponse:
        """Waits for the first words before it sends headers: until then an error has a status, and the Island may be another."""
        worker = self._services.worker
        stream: Stream[Event] = self._services.bridge.stream(lambda send: worker.run(order, send), weigh)
        try:
            events = await _opening(stream)
            for said in (event for event in events if isinstance(event, _FOREWORDS)):
                answer.note(said)
            if not events or isinstance(events[-1], CacheWaits | Assigned):
                answer.cache.state = ""  # metadata will say what came of it
            if (accepted := _first_server(events)) is not None:
                answer.note(accepted)
            async with EventStream(request, answer.headers(), self._services.keep_alive_comment_s, stream.nudge) as output:
                await _pump(stream, events, writer, output)
                return output.response
        finally:
            if not writer.complete:
                stream.close()


def _first_server(events: list[Event]) -> Accepted | None:
    """The Island that gave the first words: the last one that took the first choice before anything was said."""
    found: Accepted | None = None
    for said in events:
        if isinstance(said, _FOREWORDS):
            continue
        if not isinstance(said, Accepted):
            break
        if found is None or said.choice == found.choice:
            found = said
    return found


async def _opening(stream: Stream[Event]) -> list[Event]:
    """Events up to the first that says something; after HEADERS_WAIT_S, while a long prompt is computed, what there is."""
    events = await stream.take()
    timer = asyncio.get_running_loop().call_later(limits.HEADERS_WAIT_S, stream.nudge)
    try:
        while all(isinstance(event, Accepted | _FOREWORDS) for event in events):
            more = await stream.take()
            if not more:
                break
            events += more
    finally:
        timer.cancel()
    return events


async def _pump(stream: Stream[Event], events: list[Event], writer: Writer, output: EventStream) -> None:
    """Writes events until the job has ended. An error is told in the stream, since its headers have gone out already."""
    while True:
        data = writer.feed(events)
        if writer.complete:
            await output.write(data + DONE)
            return
        if data:
            await output.write(data)
        try:
            events = await stream.take()
        except Refused as refusal:
            await output.write(event(from_refusal(refusal).body()))
            return
        except (BooksRefused, BooksUnavailable, QuoteRefused) as error:
            await output.write(event(_told(error).body()))
            return
        if not events:
            await output.write(KEEP_ALIVE)


def order_of(
    job_id: str,
    api: schema.ApiRequest,
    terms: Terms,
    account: str,
    salt: bytes,
    kind: str,
    keep_s: float,
    job_timeout_s: float = limits.JOB_TIMEOUT_S,
    cache: CacheAsk | None = None,
) -> Order:
    """A checked request as the desk takes it."""
    prompt_tokens = max(declared_tokens(choice.input_chars, 0) for choice in api.choices)
    output_tokens = max(choice.max_tokens for choice in api.choices)
    spec = JobSpec(
        job_id, api.model, salt, api.choices, account=account, policy=terms.policy, priority=terms.priority
    )
    return Order(
        spec=spec,
        work=Work(prompt_tokens, output_tokens, len(api.choices), job_timeout_s),
        kind=kind,
        bid_micros=terms.bid_micros,
        quote_id=terms.quote_id,
        policy_text=terms.policy_text,
        delivers=api.stream,
        keep_s=keep_s,
        idempotency_key=terms.idempotency_key,
        fingerprint=terms.fingerprint,
        is_retry=terms.is_retry,
        cache=cache,
        user=terms.user,
    )


def _told(error: BooksRefused | BooksUnavailable | QuoteRefused) -> ApiError:
    """What the books or the exchange say, as the client hears it."""
    if isinstance(error, BooksUnavailable):
        return unavailable(str(error))
    return from_quote(error) if isinstance(error, QuoteRefused) else from_books(error)


async def _with_call(_request: web.Request, response: web.StreamResponse) -> None:
    """Whatever answers, streams too, says whose it is."""
    call = _CALL.get(None)
    if call is not None:
        response.headers.update(call.headers())
        call.begun = True


def _request_id(request: web.Request) -> str:
    """The client's own, where it is a harmless one, so that both sides' logs can be laid side by side."""
    given = request.headers.get("x-request-id", "")
    if (
        0 < len(given) <= _REQUEST_ID_CHARS_MAX
        and given.isascii()
        and given.replace("-", "").replace("_", "").isalnum()
    ):
        return given
    return "req_" + secrets.token_hex(12)



def _error(error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), headers={"Content-Type": _JSON, **error.headers})


def _from_http(error: web.HTTPException, body_bytes_max: int) -> ApiError:
    """aiohttp's own refusals: no such route, wrong method, body too large."""
    if error.status == 404:
        return ApiError(404, "there is nothing at this address", code="not_found")
    if error.status == 405:
        allow = error.headers.get("Allow", "")
        return ApiError(405, f"this address takes {allow}", code="method_not_allowed", headers={"Allow": allow})
    if error.status == 413:
        return ApiError(413, f"the body is over {body_bytes_max} bytes", code="body_too_large")
    return ApiError(error.status, error.reason, code="http_error")
