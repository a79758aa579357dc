"""What a request says beside its input: what it may cost, where it may run, how urgent it is, and whether it is a second try."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from coordinator.cache.asking import CacheUse, cache_use
from coordinator.exchange.parsing import parse_bid
from coordinator.http.errors import ApiError, bad_request, unsupported
from coordinator.regions import Residency, parse_policy
from protocol import checks, limits

PRIORITY_MAX = 100
IDEMPOTENCY_KEY_CHARS_MAX = 128
QUOTE_ID_CHARS_MAX = 64
RETRY_HEADER = "x-stainless-retry-count"  # OpenAI's clients say so which try it is, and nothing else
UNIT_HEADER = "x-archipelag-unit"
_FINGERPRINT_LABEL = b"archipelag/fingerprint/1\0"


@dataclass(frozen=True, slots=True)
class Terms:
    """``bid_micros`` None: the account's own bid, or the market's. ``explain``: tell why this Island was chosen. ``user``: whom of its
    account the request is for, as it says it; it gets the same version of a Cargo every time (coordinator/abtests), by a hash alone."""

    bid_micros: int | None = None
    priority: int = 0
    policy: Residency | None = None
    policy_text: str = ""
    quote_id: str = ""
    explain: bool = False
    idempotency_key: str = ""
    fingerprint: str = ""
    is_retry: bool = False
    cache: CacheUse = field(default_factory=CacheUse)
    user: str = ""


def read_terms(request: web.Request, raw: bytes, body: Mapping[str, Any], account: str, secret: bytes) -> Terms:
    """Of a request's body and headers. ``secret`` keys the fingerprint, so that it says nothing about the prompt. Raises ApiError 400."""
    return replace(
        body_terms(body),
        idempotency_key=_idempotency_key(request.headers.get("Idempotency-Key", "")),
        fingerprint=_fingerprint(secret, account, request.path, raw),
        is_retry=_is_retry(request.headers.get(RETRY_HEADER, "")),
        cache=cache_use(request.headers.getall("Cache-Control", ()), request.headers.get("x-archipelag-cache", "")),
        user=_user(request.headers.get(UNIT_HEADER), body.get("safety_identifier"), body.get("user")),
    )


def body_terms(body: Mapping[str, Any]) -> Terms:
    """What a body alone says. Raises ApiError 400."""
    bid = _bid(body.get("bid_price"))
    quote_id = _quote(body.get("quote"))
    if bid is not None and quote_id:
        raise bad_request("a quote names its price: send either quote or bid_price", "bid_price")
    policy, policy_text = read_policy(body.get("policy"))
    if body.get("confidential"):
        raise unsupported("confidential", "jobs are not supported yet")
    return Terms(
        bid_micros=bid,
        priority=_priority(body.get("priority")),
        policy=policy,
        policy_text=policy_text,
        quote_id=quote_id,
        explain=read_flag(body.get("explain"), "explain"),
    )


def _bid(value: object) -> int | None:
    if value is None:
        return None
    try:
        return parse_bid(value)
    except ValueError as error:
        raise bad_request(str(error), "bid_price") from None


def _priority(value: object) -> int:
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= PRIORITY_MAX:
        raise bad_request(f"priority must be an integer from 0 to {PRIORITY_MAX}", "priority")
    return value


def read_policy(value: object) -> tuple[Residency | None, str]:
    """The policy, and its JSON. Raises ApiError 400."""
    if value is None:
        return None, ""
    try:
        policy = parse_policy(value)
    except ValueError as error:
        raise bad_request(f"policy: {error}", "policy") from None
    text = json.dumps(policy.as_json(), separators=(",", ":"))
    if len(text) > limits.TEXT_CHARS_MAX:
        raise bad_request(f"policy: all regions together may have {limits.TEXT_CHARS_MAX} characters", "policy")
    return policy, text


def need_cargo(name: str, param: str) -> None:
    """Raises ApiError 404 for what cannot be the name of a Cargo, so that no database is asked for it."""
    try:
        checks.label(param, name, limits.NAME_CHARS_MAX)
    except ValueError:
        raise ApiError(404, f"no Island offers the model {name[:limits.NAME_CHARS_MAX]!r}", code="model_not_found", param=param) from None


def _quote(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= QUOTE_ID_CHARS_MAX or not value.isascii() or not value.isprintable():
        raise bad_request("quote must be the id of a quote", "quote")
    return value


def read_flag(value: object, name: str) -> bool:
    """False where there is none. Raises ApiError 400."""
    if value is not None and type(value) is not bool:
        raise bad_request(f"{name} must be a boolean", name, "invalid_type")
    return bool(value)


def _idempotency_key(text: str) -> str:
    if len(text) > IDEMPOTENCY_KEY_CHARS_MAX or not text.isascii() or not text.isprintable():
        raise bad_request(f"Idempotency-Key takes at most {IDEMPOTENCY_KEY_CHARS_MAX} printable ASCII characters", None)
    return text


def _user(*said: object) -> str:
    """The first that says anything. What is no text is no user here: schemas complain of it where they know the field."""
    return next((one[: limits.AB_UNIT_CHARS_MAX] for one in said if isinstance(one, str) and one), "")


def _is_retry(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and int(text) > 0


def _fingerprint(secret: bytes, account: str, path: str, raw: bytes) -> str:
    return hmac.digest(secret, b"\0".join((_FINGERPRINT_LABEL + account.encode(), path.encode(), raw)), "sha256").hex()
