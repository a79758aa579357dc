"""Errors as OpenAI's API says them: an envelope with all four fields, and the status that fits."""

from __future__ import annotations

import json
from collections.abc import Mapping

from coordinator.books.errors import BooksRefused, Why
from coordinator.exchange.quotes import QuoteFault, QuoteRefused
from coordinator.orders import JobCancelled
from coordinator.placement import NotPlaced
from protocol.errors import Code, Refused

RETRY_AFTER_S = 2


class ApiError(Exception):
    """Something to tell the client. ``param`` names the field that is wrong, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return envelope(self.message, self.kind, self.param, self.code)


def envelope(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """``{"error": {...}}`` with all four fields, null where there is nothing to say."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def bad_request(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str = "is not supported here") -> ApiError:
    return ApiError(400, f"{param} {why}", param=param, code="unsupported_parameter")


_STATUS: dict[Code, tuple[int, str, str, str | None]] = {
    # code -> status, type, code for the client, param
    Code.BAD_INPUT: (400, "invalid_request_error", "invalid_value", None),
    Code.NO_TOOLS: (400, "invalid_request_error", "tools_not_supported", "tools"),
    Code.CONTEXT_LENGTH: (400, "invalid_request_error", "context_length_exceeded", "messages"),
    Code.UNKNOWN_CARGO: (404, "invalid_request_error", "model_not_found", "model"),
    Code.NO_CAPACITY: (503, "server_error", "no_capacity", None),
    Code.NO_ISLAND: (503, "server_error", "no_island", None),
    Code.DRAINING: (503, "server_error", "draining", None),
    Code.CANCELLED: (503, "server_error", "cancelled", None),
    Code.WORKER_DIED: (502, "server_error", "worker_died", None),
    Code.LINK_LOST: (502, "server_error", "link_lost", None),
    Code.LEASE_LOST: (502, "server_error", "lease_lost", None),
    Code.UNSIGNED: (502, "server_error", "unsigned", None),
    Code.BAD_TICKET: (502, "server_error", "bad_ticket", None),
    Code.CARGO_FAILED: (422, "invalid_request_error", "cargo_failed", None),
    Code.TIMEOUT: (504, "server_error", "timeout", None),
    Code.INTERNAL: (500, "server_error", "internal_error", None),
}


def from_refusal(refusal: Refused) -> ApiError:
    """How a failed job looks to the client."""
    if isinstance(refusal, NotPlaced) and refusal.refusal.by_price:
        return ApiError(402, refusal.message, code="bid_too_low", param="bid_price", kind="insufficient_quota")
    if isinstance(refusal, JobCancelled):  # OpenAI's clients would ask again after most statuses
        return ApiError(409, refusal.message, code="job_cancelled", headers={"x-should-retry": "false"})
    status, kind, code, param = _STATUS[refusal.code]
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return ApiError(status, refusal.message, code=code, param=param, kind=kind, headers=headers)


_BOOKS: dict[Why, tuple[int, str, str | None]] = {
    # why -> status, type, param
    Why.NO_CREDIT: (402, "insufficient_quota", None),
    Why.NO_ACCOUNT: (404, "invalid_request_error", None),
    Why.NO_JOB: (404, "invalid_request_error", None),
    Why.NO_ISLAND: (404, "invalid_request_error", None),
    Why.REUSED: (422, "invalid_request_error", None),
    Why.RUNNING: (409, "invalid_request_error", None),
    Why.NOT_OWNER: (409, "invalid_request_error", None),
    Why.STATE: (409, "invalid_request_error", None),
    Why.BAD_AMOUNT: (400, "invalid_request_error", None),
}


def from_books(refused: BooksRefused) -> ApiError:
    """How a refusal of the books looks to the client."""
    status, kind, param = _BOOKS.get(refused.why, (500, "server_error", None))
    headers = {"Retry-After": str(RETRY_AFTER_S)} if refused.why is Why.RUNNING else None
    return ApiError(status, refused.message, code=refused.why.value, param=param, kind=kind, headers=headers)


def from_quote(refused: QuoteRefused) -> ApiError:
    status = 404 if refused.fault is QuoteFault.NOT_YOURS else 409
    return ApiError(status, refused.message, code=refused.fault.value, param="quote")


def unavailable(message: str) -> ApiError:
    """503: the database cannot be used at the moment."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, message, code="books_unavailable", kind="server_error", headers=headers)
