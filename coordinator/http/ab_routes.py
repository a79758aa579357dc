"""``/api/v1/ab-tests``: tests of versions of a Cargo on real traffic; and what Consumers think of answers, one of their metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, TypeVarTuple

from aiohttp import web

from coordinator.abtests.errors import AbFault, AbRefused
from coordinator.abtests.reading import Part
from coordinator.abtests.results import Results
from coordinator.books.ab_tests import AbEvent, AbTest
from coordinator.books.jobs import Job
from coordinator.cargo_rules import RegistryRefused
from coordinator.http import schema
from coordinator.http.ab_json import event_json, results_json, test_json
from coordinator.http.ab_notes import RATINGS, ab_metadata, assigned_of, rating_text
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.cargo_routes import STATUS as REGISTRY_STATUS
from coordinator.http.errors import ApiError, bad_request
from coordinator.http.params import whole_number
from protocol import limits

Admit = Callable[[web.Request, str], Awaitable[str]]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LIST_DEFAULT = 20
_OFFSET_MAX = 1_000_000_000
_ANSWER_PREFIXES = ("chatcmpl-", "cmpl-")  # what stands before a job's id in OpenAI's answers
STATUS: dict[AbFault, int] = {
    AbFault.INVALID: 400,
    AbFault.SHARES: 400,
    AbFault.VARIANTS: 400,
    AbFault.KIND: 400,
    AbFault.NOT_YOURS: 403,
    AbFault.UNKNOWN_CARGO: 404,
    AbFault.UNKNOWN: 404,
    AbFault.STATE: 409,
    AbFault.BUSY: 409,
    AbFault.NOT_OFFERED: 409,
    AbFault.NOT_STARTED: 409,
    AbFault.BLOCKED: 409,
    AbFault.NO_WINNER: 409,
    AbFault.TOO_MANY: 409,
}


class Service(Protocol):
    """Whoever runs the tests; called on trio. Everything raises AbRefused, RegistryRefused, BooksRefused or BooksUnavailable."""

    async def create(self, account: str, body: Mapping[str, Any]) -> AbTest: ...

    async def find(self, account: str, id: str) -> AbTest: ...

    async def activate(self, account: str, id: str) -> AbTest: ...

    async def pause(self, account: str, id: str) -> AbTest: ...

    async def promote(self, account: str, id: str, variant: str, force: bool) -> AbTest:
        """``variant`` empty: the winner."""
        ...

    async def rollback(self, account: str, id: str) -> AbTest: ...

    async def results(self, account: str, id: str) -> Results: ...

    async def events(self, account: str, id: str) -> Sequence[AbEvent]:
        """Oldest first."""
        ...

    async def rate(self, account: str, job_id: str, rating: int) -> Job:
        """``rating``: 1 up, -1 down, 0 none."""
        ...

    async def list(self, account: str, limit: int, offset: int) -> tuple[Sequence[AbTest], int]:
        """The newest first, and how many there are."""
        ...


class AbRoutes:
    def __init__(self, admit: Admit, bridge: Bridge, service: Service) -> None:
        self._admit, self._bridge, self._service = admit, bridge, service

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        tests, one = f"{prefix}/ab-tests", prefix + "/ab-tests/{id}"
        return [
            web.post(tests, self.create),
            web.get(tests, self.list),
            web.get(one, self.get),
            web.post(one + "/activate", self.activate),
            web.post(one + "/pause", self.pause),
            web.post(one + "/promote", self.promote),
            web.post(one + "/rollback", self.rollback),
            web.get(one + "/results", self.results),
            web.get(one + "/events", self.events),
            web.post(prefix + "/jobs/{id}/feedback", self.feedback),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        body = schema.parse_json(await request.read())
        test = await self._told(self._service.create, account, body)
        return json_response(test_json(test), 201, {"Location": f"/api/v1/ab-tests/{test.id}"})

    async def get(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        return json_response(test_json(await self._told(self._service.find, account, _id(request))))

    async def activate(self, request: web.Request) -> web.StreamResponse:
        """A draft, or one that was paused."""
        account = await self._admit(request, "write")
        return json_response(test_json(await self._told(self._service.activate, account, _id(request))))

    async def pause(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        return json_response(test_json(await self._told(self._service.pause, account, _id(request))))

    async def promote(self, request: web.Request) -> web.StreamResponse:
        """The winner, or the variant that is named; ``force``: though it is not shown to be better."""
        account, test_id = await self._admit(request, "write"), _id(request)
        part = await _read(request, "variant", "force")
        try:
            variant = part.text("variant", chars_max=limits.AB_NAME_CHARS_MAX) if part.any_of("variant")[1] is not None else ""
            force = part.flag("force", False)
        except AbRefused as refused:
            raise _error(refused) from None
        return json_response(test_json(await self._told(self._service.promote, account, test_id, variant, force)))

    async def rollback(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        return json_response(test_json(await self._told(self._service.rollback, account, _id(request))))

    async def results(self, request: web.Request) -> web.StreamResponse:
        """They may be looked at as often as one likes."""
        account = await self._admit(request, "read")
        return json_response(results_json(await self._told(self._service.results, account, _id(request))))

    async def events(self, request: web.Request) -> web.StreamResponse:
        """The audit log, oldest first."""
        account = await self._admit(request, "read")
        found = await self._told(self._service.events, account, _id(request))
        return json_response({"data": [event_json(event) for event in found]})

    async def feedback(self, request: web.Request) -> web.StreamResponse:
        """What the account thinks of a job's answer; the last word counts."""
        account, job_id = await self._admit(request, "write"), _job_id(request)
        body = schema.parse_json(await request.read())
        rating = body.get("rating")
        if "rating" not in body or not (rating is None or (isinstance(rating, str) and rating in RATINGS)):
            code = "invalid_value" if "rating" in body else "missing_required_parameter"
            raise bad_request('rating is "up" or "down", or null to take it back', "rating", code)
        job = await self._told(self._service.rate, account, job_id, RATINGS.get(rating, 0) if rating is not None else 0)
        metadata = ab_metadata(assigned_of(job.ab_test, job.ab_arm))
        return json_response({"object": "feedback", "job_id": job.id, "rating": rating_text(job.rating), "metadata": metadata})

    async def _told(self, function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
        """``function(*arguments)`` on trio; what is refused as the client shall hear it."""
        try:
            return await self._bridge.call(function, *arguments)
        except AbRefused as refused:
            raise _error(refused) from None
        except RegistryRefused as refused:
            raise ApiError(REGISTRY_STATUS[refused.fault], refused.message, code=refused.fault.value) from None

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = whole_number(request, "limit", 1, limits.JOBS_LISTED_MAX) or _LIST_DEFAULT
        offset = whole_number(request, "offset", 0, _OFFSET_MAX) or 0
        tests, total = await self._told(self._service.list, account, limit, offset)
        return json_response({"data": [test_json(test) for test in tests], "meta": {"total": total, "limit": limit, "offset": offset}})


async def _read(request: web.Request, *known: str) -> Part:
    """A body that may be missing. Raises ApiError, also for fields that are not known: one that is misspelt must not be passed over."""
    raw = await request.read()
    try:
        return Part(schema.parse_json(raw) if raw else {}, "", known)
    except AbRefused as refused:
        raise _error(refused) from None


def _error(refused: AbRefused) -> ApiError:
    return ApiError(STATUS[refused.fault], refused.message, code=refused.fault.value, param=refused.param)


def _id(request: web.Request) -> str:
    """Raises ApiError 404 for what cannot be a test's id."""
    text = request.match_info["id"]
    if not _may_be_id(text):
        raise ApiError(404, "there is no such A/B test; see GET /api/v1/ab-tests", code=AbFault.UNKNOWN.value)
    return text


def _job_id(request: web.Request) -> str:
    """As it is, or as the ``id`` of a chat or a completion has it. Raises ApiError 404 for what cannot be one."""
    text = request.match_info["id"]
    for prefix in _ANSWER_PREFIXES:
        text = text.removeprefix(prefix)
    if not _may_be_id(text):
        raise ApiError(404, "there is no such job", code="unknown_job")
    return text


def _may_be_id(text: str) -> bool:
    return text.isascii() and text.isprintable() and 0 < len(text) <= limits.NAME_CHARS_MAX


assert set(STATUS) == set(AbFault)
