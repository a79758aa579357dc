"""What a line of a batch asks for, as a job, and its answer, byte for byte as the endpoint itself would have written it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from coordinator.books.jobs import JobState
from coordinator.books.runs import Run
from coordinator.cache.asking import CacheAsk, CacheUse, ask_of
from coordinator.http import embeddings, schema
from coordinator.http.answers import Answer, Shape, to_json, whole
from coordinator.http.app import order_of
from coordinator.http.chat import ChatShape
from coordinator.http.child_orders import ChildOrders, ChildTerms
from coordinator.http.completions import CompletionShape
from coordinator.http.errors import unsupported
from coordinator.http.job_events import output_json
from coordinator.http.job_input import PATIENCE_SHARE, read_body
from coordinator.http.line_answers import LineAnswer, line_order
from coordinator.http.terms import Terms, body_terms, need_cargo, read_flag
from coordinator.job_board import said_in
from coordinator.jobs import CacheHit, ChoiceResult, Event, Settled
from coordinator.orders import Order
from protocol.prices import format_credits

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
JOBS = "/api/v1/jobs"  # ours: any Cargo
ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS, JOBS)

_AS_USUAL = CacheUse(is_exact=True)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What answers used."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prompt + other.prompt, self.cached + other.cached, self.completion + other.completion)


@dataclass(frozen=True, slots=True)
class Whose:
    """For whom a job is ordered, and how. ``keep_s``: how long its output is kept; ``orders``: of inputs for any Cargo."""

    run: Run
    orders: ChildOrders
    keep_s: float
    job_timeout_s: float


class Endpoint(Protocol):
    """One of OpenAI's."""

    def order(self, job_id: str, body: Mapping[str, Any], whose: Whose) -> Order:
        """Raises ApiError."""
        ...

    def answer(self, job_id: str, created_s: int, body: Mapping[str, Any], events: Sequence[Event]) -> tuple[bytes, Tokens]:
        """JSON, and what it used. Of a body that was ordered before. Takes long for large ones, so it is for a thread. Raises ApiError, or
        Refused for what is no answer."""
        ...


def endpoint_of(name: str) -> Endpoint:
    """One of ENDPOINTS."""
    if name == JOBS:
        return _Jobs()
    if name == EMBEDDINGS:
        return _Embeddings()
    return _Texts(schema.parse_chat, ChatShape) if name == CHAT else _Texts(schema.parse_completion, CompletionShape)


@dataclass(frozen=True, slots=True)
class _Texts:
    parse: Callable[[Mapping[str, Any], int], schema.ApiRequest]
    shape: Callable[[], Shape]

    def order(self, job_id: str, body: Mapping[str, Any], whose: Whose) -> Order:
        api, terms = self.parse(body, secrets.randbits(63)), _terms(body)
        if api.stream:
            raise unsupported("stream", "is not for batches; leave it out")
        need_cargo(api.model, "model")
        account, kind = whose.run.account, self.shape().kind
        plain = order_of(job_id, api, terms, account, whose.orders.salt(account), kind, whose.keep_s, whose.job_timeout_s)
        return _child(plain, whose, self._cache(api, body, terms, account))

    @staticmethod
    def _cache(api: schema.ApiRequest, body: Mapping[str, Any], terms: Terms, account: str) -> CacheAsk | None:
        if len(api.choices) != 1:
            return None
        return ask_of(api.model, api.choices[0], body, account, terms.policy_text, _AS_USUAL)

    def answer(self, job_id: str, created_s: int, body: Mapping[str, Any], events: Sequence[Event]) -> tuple[bytes, Tokens]:
        api = self.parse(body, 0)
        answer = Answer(api, job_id, created_s, explain=_terms(body).explain)
        data = whole(answer, self.shape(), _told_again(events))
        usage = answer.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return data, Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"])


class _Embeddings:
    def order(self, job_id: str, body: Mapping[str, Any], whose: Whose) -> Order:
        asked, terms = embeddings.parse_embeddings(body), _terms(body)
        need_cargo(asked.model, "model")
        account = whose.run.account
        salt = whose.orders.salt(account)
        plain = line_order(job_id, embeddings.KIND, asked, terms, account, salt, whose.keep_s, whose.job_timeout_s)
        return _child(plain, whose, ask_of(asked.model, asked.given, body, account, terms.policy_text, _AS_USUAL, lines_by_default=True))

    def answer(self, job_id: str, created_s: int, body: Mapping[str, Any], events: Sequence[Event]) -> tuple[bytes, Tokens]:
        asked = embeddings.parse_embeddings(body)
        answer = LineAnswer(asked.model, job_id, created_s, _terms(body).explain)
        answer.note_all(_told_again(events))
        return embeddings.whole(answer, asked), Tokens(answer.prompt_tokens)


class _Jobs:
    """An input for any Cargo; its answer is what ``GET /api/v1/jobs/{id}/output`` says of such a job."""

    def order(self, job_id: str, body: Mapping[str, Any], whose: Whose) -> Order:
        cargo, given = read_body(dict(body))
        terms = _terms(body)
        if read_flag(body.get("stream"), "stream"):
            raise unsupported("stream", "is not for batches; leave it out")
        child = ChildTerms(terms.bid_micros, terms.policy, terms.policy_text, terms.priority)
        return replace(whose.orders.order(whose.run, job_id, cargo, given, child), keep_s=whose.keep_s)

    def answer(self, job_id: str, created_s: int, body: Mapping[str, Any], events: Sequence[Event]) -> tuple[bytes, Tokens]:
        results = [event for event in events if isinstance(event, ChoiceResult)]
        tokens = Tokens(
            sum(result.prompt_tokens for result in results),
            sum(result.cached_tokens for result in results),
            sum(result.completion_tokens for result in results),
        )
        price = sum(event.price_micros for event in events if isinstance(event, Settled))
        usage = {
            "prompt_tokens": tokens.prompt,
            "completion_tokens": tokens.completion,
            "total_tokens": tokens.prompt + tokens.completion,
            "credits_used": format_credits(price),
        }
        output = output_json(said_in(events), usage)
        return to_json({"job_id": job_id, "state": JobState.SUCCEEDED.value, "output": output, "completed": True, "error": None}), tokens


def _told_again(events: Sequence[Event]) -> list[Event]:
    """What a job has said, as it was told at first: of one that the cache answered its row says by which strategy, in place of why it ran
    where it did."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Settled) and event.placement:
            strategy = json.loads(event.placement).get("cache_strategy")
            if strategy is not None:
                found.insert(0, CacheHit(strategy, ""))
                event = replace(event, placement="")
        found.append(event)
    return found


def _terms(body: Mapping[str, Any]) -> Terms:
    terms = body_terms(body)
    if terms.quote_id:
        raise unsupported("quote", "is not for batches: a quote is for one job, now; send bid_price")
    return terms


def _child(order: Order, whose: Whose, cache: CacheAsk | None) -> Order:
    """A job of the run: it waits for an Island nearly as long as it may run, since nobody waits for it."""
    patience_s = PATIENCE_SHARE * whose.job_timeout_s
    return replace(order, spec=replace(order.spec, patience_s=patience_s), parent=whose.run.id, cache=cache)
