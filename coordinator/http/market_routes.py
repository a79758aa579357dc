"""``/api/v1/market`` and ``/api/v1/quotes``: rates, history, order book, suggestions; quotes and saved bids of an account."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from coordinator.exchange import answers, parsing
from coordinator.exchange.bids import Work
from coordinator.exchange.hardware import Tier
from coordinator.http import schema
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.errors import bad_request
from coordinator.http.terms import need_cargo, read_policy
from coordinator.market import MarketShell
from coordinator.matching import Wish, declared_tokens
from protocol import limits
from protocol.prices import format_ask, format_credits

Admit = Callable[[web.Request, str], Awaitable[str]]

_BIDS_MAX = 1000
# field -> its other name
_ASKING_FIELDS = {"workload_slug": "cargo", "cargo": "", "host_id": "island", "island": "", "asking_price": ""}


class MarketRoutes:
    """What the market shows is public; what is an account's needs its key."""

    def __init__(self, admit: Admit, bridge: Bridge, market: MarketShell, job_timeout_s: float) -> None:
        self._admit, self._bridge, self._market, self._job_timeout_s = admit, bridge, market, job_timeout_s

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        market = f"{prefix}/market"
        return [
            web.get(f"{market}/rates", self.rates),
            web.get(market + "/rates/{cargo:.+}", self.rate),
            web.get(market + "/history/{cargo:.+}", self.history),
            web.get(market + "/orderbook/{cargo:.+}", self.order_book),
            web.get(f"{market}/suggestions", self.suggestions),
            web.get(f"{market}/bids", self.bids),
            web.put(market + "/bids/{cargo:.+}", self.save_bid),
            web.delete(market + "/bids/{cargo:.+}", self.forget_bid),
            web.post(f"{market}/asking-prices", self.set_ask),
            web.post(f"{prefix}/quotes", self.quote),
        ]

    async def rates(self, _request: web.Request) -> web.StreamResponse:
        async def ask() -> Any:
            return answers.rates_answer(self._market.listings())

        return json_response(await self._bridge.call(ask))

    async def rate(self, request: web.Request) -> web.StreamResponse:
        cargo = _cargo(request)

        async def ask() -> Any:
            return answers.rate_answer(self._market.listing(cargo), self._market.snapshot(cargo))

        return json_response(await self._bridge.call(ask))

    async def history(self, request: web.Request) -> web.StreamResponse:
        try:
            hours = parsing.parse_hours(request.query.get("hours"))
        except ValueError as error:
            raise bad_request(str(error), "hours") from None
        return json_response(answers.history_answer(await self._bridge.call(self._market.history, _cargo(request), hours)))

    async def order_book(self, request: web.Request) -> web.StreamResponse:
        cargo = _cargo(request)

        async def ask() -> Any:
            return answers.order_book_answer(cargo, self._market.order_book(cargo))

        return json_response(await self._bridge.call(ask))

    async def suggestions(self, request: web.Request) -> web.StreamResponse:
        tier = _tier(request.query.get("hardware"))

        async def ask() -> Any:
            return answers.suggestions_answer(self._market.listings(), tier)

        return json_response(await self._bridge.call(ask))

    async def bids(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        saved = await self._bridge.call(self._market.saved_bids, account)
        return json_response({"data": [{"cargo": cargo, "bid_price": format_credits(micros)} for cargo, micros in saved.items()]})

    async def save_bid(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        cargo, body = _cargo(request), schema.parse_json(await request.read())
        try:
            micros = parsing.parse_bid(body.get("bid_price"))
        except ValueError as error:
            raise bad_request(str(error), "bid_price") from None
        saved = await self._bridge.call(self._market.saved_bids, account)
        if cargo not in saved and len(saved) >= _BIDS_MAX:
            raise bad_request(f"an account may save {_BIDS_MAX} bids", "cargo")
        await self._bridge.call(self._market.save_bid, account, cargo, micros)
        return json_response({"cargo": cargo, "bid_price": format_credits(micros)})

    async def forget_bid(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        await self._bridge.call(self._market.save_bid, account, _cargo(request), None)
        return web.Response(status=204)

    async def set_ask(self, request: web.Request) -> web.StreamResponse:
        """What an Island of this account is to ask for a Cargo; its owner has to have allowed that where it runs."""
        account = await self._admit(request, "write")
        body = schema.parse_json(await request.read())
        try:
            wanted = parsing.parse_asking_price(body)
        except ValueError as error:
            raise bad_request(str(error), _field_of(str(error), body)) from None
        await self._bridge.call(self._market.set_ask, account, wanted)
        return json_response({"workload_slug": wanted.cargo, "host_id": wanted.island, "asking_price": format_ask(wanted.ask)})

    async def quote(self, request: web.Request) -> web.StreamResponse:
        """What a request would cost at most, and where it would run: the request's own body, or ``max_tokens`` and ``prompt_tokens``."""
        account = await self._admit(request, "write")
        body = schema.parse_json(await request.read())

        async def gives_lines(name: str) -> bool:
            return self._market.gives_lines(name)

        cargo = quoted_cargo(body)
        work = quoted_work(cargo, body, self._job_timeout_s, await self._bridge.call(gives_lines, cargo))
        try:
            explicit = parsing.parse_bid(body["bid_price"]) if body.get("bid_price") is not None else None
        except ValueError as error:
            raise bad_request(str(error), "bid_price") from None
        policy, _ = read_policy(body.get("policy"))
        wish = Wish(
            cargo,
            work.prompt_tokens + work.output_tokens,
            prompt_tokens=work.prompt_tokens,
            output_tokens=work.output_tokens,
            policy=policy,
            account=account,
            job_s_max=self._job_timeout_s,
        )
        return json_response(answers.quote_answer(await self._bridge.call(self._market.make_quote, wish, work, explicit)), 201)


def _field_of(message: str, body: Mapping[str, Any]) -> str | None:
    """The field of an asking price that a complaint begins with, by the name that the client gave it."""
    name = message.split(" ", 1)[0].rstrip(":")
    if name not in _ASKING_FIELDS:
        return None
    other = _ASKING_FIELDS[name]
    return other if other and body.get(name) is None and body.get(other) is not None else name


def quoted_cargo(body: dict[str, Any]) -> str:
    """Of a request that is to be quoted. Raises ApiError 400 or 404."""
    cargo = body.get("model") if body.get("cargo") is None else body["cargo"]
    if not isinstance(cargo, str) or not cargo:
        raise bad_request("you must provide cargo, the name of what is to run", "cargo", "missing_required_parameter")
    need_cargo(cargo, "cargo")
    return cargo


def quoted_work(cargo: str, body: dict[str, Any], job_timeout_s: float, gives_lines: bool) -> Work:
    """Size of a request that is to be quoted: of a chat, a completion, or, where the Cargo ``gives_lines`` or ``input`` is what embeddings
    take, of a job whose size nobody knows beforehand. Raises ApiError 400."""
    if gives_lines or isinstance(body.get("input"), str | list):
        return Work(0, limits.COMPLETION_TOKENS_MAX, job_s_max=job_timeout_s)
    inner = body["input"] if isinstance(body.get("input"), dict) else body
    if inner.get("messages") is None and inner.get("prompt") is None:
        output = _count(inner.get("max_tokens"), "max_tokens", 1, limits.COMPLETION_TOKENS_MAX, limits.COMPLETION_TOKENS_DEFAULT)
        return Work(_count(inner.get("prompt_tokens"), "prompt_tokens", 0, 2**31, 0), output, job_s_max=job_timeout_s)
    parse = schema.parse_chat if inner.get("messages") is not None else schema.parse_completion
    plain = {name: value for name, value in inner.items() if name not in ("stream", "stream_options")}
    api = parse({**plain, "model": cargo}, secrets.randbits(63))
    prompt_tokens = max(declared_tokens(choice.input_chars, 0) for choice in api.choices)
    return Work(prompt_tokens, max(choice.max_tokens for choice in api.choices), len(api.choices), job_timeout_s)


def _count(value: object, name: str, low: int, high: int, default: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise bad_request(f"{name} must be an integer between {low} and {high}", name)
    return value


def _cargo(request: web.Request) -> str:
    cargo = request.match_info["cargo"]
    need_cargo(cargo, "cargo")
    return cargo


def _tier(text: str | None) -> Tier | None:
    if text is None:
        return None
    try:
        return Tier(text)
    except ValueError:
        raise bad_request(f"hardware must be one of {', '.join(Tier)}", "hardware") from None

