"""The exchange over HTTP: quotes and bids of accounts, and what the market shows to everybody."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.books.accounts import PairIsland
from coordinator.books.errors import BooksUnavailable
from coordinator.books.jobs import JobState
from coordinator.books.ledger import escrow
from coordinator.books.market_queries import clearings
from coordinator.books.schema import jobs, market_snapshots
from coordinator.exchange.snapshots import SNAPSHOT_INTERVAL_MS
from coordinator.keys import create_key
from protocol.prices import Ask, format_credits, parse_credits
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import (
    CHAT,
    CREDIT,
    JOBS,
    OTHER,
    TEXT,
    balance,
    chat,
    chunks_of,
    ended,
    error_of,
    funds,
    get,
    opened,
    row,
    rows,
    set_funds,
    submit,
    url_of,
)
from tests.coordinator.fakes import FakeIsland, Running, Script, island, offer

ALL = 10_000 * CREDIT
API = "/api/v1"
MARKET = f"{API}/market"
ASK = Ask(per_job=100, per_1k_output=20_000)
DEAR = Ask(per_job=5000, per_1k_output=900_000)
PRICE = ASK.price(5, 0)
SHORT: dict[str, Any] = {"max_tokens": 10}


async def quoted(running: Running, **changes: Any) -> dict[str, Any]:
    async with http(running) as client:
        answer = await client.post(f"{API}/quotes", json={**HELLO, **SHORT, **changes})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def asks(it: FakeIsland, ask: Ask) -> None:
    it.offers = tuple(offer(one.name, ask=ask) for one in it.offers)


# Quotes


async def test_a_quote_names_price_island_and_expiry(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one, island(2, ask=DEAR)) as running:
        quote = await quoted(running, n=2)
        assert (quote["cargo"], quote["island"], quote["n"], quote["max_tokens"]) == ("echo", one.peer, 2, 10)
        assert quote["price"] == format_credits(2 * ASK.price(10, 0)) and quote["ask"]["per_1k_output"] == "0.02"
        assert quote["reasons"] and quote["expires_at"] > quote["created_at"]
        assert await rows(running) == [] and await funds(running) == (ALL, 0), "it reserves nothing"


@pytest.mark.parametrize("how", ["chat", "stream", "job"])
async def test_a_quote_is_honoured_after_the_island_has_raised_its_ask(tmp_path: Path, how: str) -> None:
    one, cheaper = island(1, ask=ASK), island(2, ask=Ask(1, 1))
    async with opened(url_of(tmp_path), one) as running:
        quote = await quoted(running)
        asks(one, DEAR)
        running.port.advertise(one)
        running.port.advertise(cheaper)
        if how == "job":
            job_id = await submit(running, input={"prompt": TEXT, **SHORT}, quote=quote["id"])
            job = await ended(running, job_id)
            price, island_of = job["price"], job["island"]
            assert job["bid_source"] == "quote" and job["bid_price"] == quote["price"]
        else:
            answer = await chat(running, **SHORT, quote=quote["id"], stream=how == "stream")
            body = answer.json() if how == "chat" else (await chunks_of(answer))[-1]
            price, island_of = body["metadata"]["price"], answer.headers["x-archipelag-island"]
        assert price == format_credits(PRICE) and island_of == quote["island"] == one.peer
        assert one.tickets[0].price_limit_micros == parse_credits(quote["price"]) and not cheaper.tickets
        assert await funds(running) == (ALL - PRICE, 0) and await balance(running, escrow(one.peer)) == (PRICE, 0)
        error_of(await chat(running, bid_price=quote["price"], model="nobody-has-it"), 404, "model_not_found", "model")


async def test_where_the_quoted_island_has_gone_another_may_do_it_for_no_more(tmp_path: Path) -> None:
    one, same, dear = island(1, ask=ASK), island(2, ask=Ask(50, 20_000)), island(3, ask=DEAR)
    async with opened(url_of(tmp_path), one, island_wait_s=0.02) as running:
        quote = await quoted(running)
        running.port.lose(one)
        running.port.advertise(dear)
        error_of(await chat(running, **SHORT, quote=quote["id"]), 402, "bid_too_low", "bid_price")
        running.port.advertise(same)
        answer = await chat(running, **SHORT, quote=quote["id"])
        assert answer.json()["metadata"]["price"] == format_credits(Ask(50, 20_000).price(5, 0)), "by its own ask"
        assert not dear.tickets


async def test_a_busy_island_keeps_its_quotes(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=0, times=1), ask=ASK, tokens_per_s=90.0, slots_total=1, slots_free=1)
    other = island(2, ask=ASK, tokens_per_s=0.1)
    async with opened(url_of(tmp_path), one, other, capacity_wait_s=0.05) as running:
        quote = await quoted(running)
        assert quote["island"] == one.peer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: chat(running, **SHORT, quote=quote["id"]))
            while not one.open_now:
                await trio.sleep(0.005)
            error_of(await chat(running, **SHORT, quote=quote["id"]), 503, "no_capacity")
            assert not other.tickets
            nursery.cancel_scope.cancel()


async def test_a_quote_is_for_its_account_its_work_and_its_minute(database_url: str) -> None:
    one = island(1, ask=ASK)
    one.offers += (offer("other", ask=ASK),)
    async with opened(database_url, one) as running:
        quote = (await quoted(running))["id"]
        for changes in ({"max_tokens": 11}, {"n": 2, **SHORT}, {**SHORT, "model": "other"}, {**SHORT, "messages": [_long()]}):
            error_of(await chat(running, **{**changes, "quote": quote}), 409, "quote_mismatch", "quote")
        async with http(running, create_key(running.database_url, "other")) as client:
            error_of(await client.post(CHAT, json={**HELLO, **SHORT, "quote": quote}), 404, "unknown_quote", "quote")
        error_of(await chat(running, **SHORT, quote="qt_guessed"), 404, "unknown_quote", "quote")
        error_of(await chat(running, **SHORT, quote=quote, bid_price=1), 400, "invalid_value", "bid_price")
        for bad in (7, "", "x" * 65, "q\0", "q\n", [quote], "'; DROP TABLE quotes; --ü"):
            error_of(await chat(running, **SHORT, quote=bad), 400, "invalid_value", "quote")
        market = running.server._parts.market
        now_ms = market._clock_ms()
        for moved_ms in (60_001, -120_000):
            market._clock_ms = functools.partial(int, now_ms + moved_ms)
            error_of(await chat(running, **SHORT, quote=quote), 409, "quote_expired", "quote")
        market._clock_ms = lambda: now_ms + 30_000
        assert (await chat(running, **SHORT, quote=quote)).status_code == 200
        assert len(await rows(running)) == 1 and await funds(running) == (ALL - PRICE, 0)


def _long() -> dict[str, str]:
    return {"role": "user", "content": "word " * 100}


async def test_what_can_be_quoted(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one, island(2, ask=DEAR)) as running:
        running.port.advertise(one, region="de")
        full = Ask(100, 20_000).price(1024, 0)
        quotable: list[tuple[dict[str, Any], int]] = [
            ({"messages": None, "max_tokens": 50, "prompt_tokens": 7}, ASK.price(50, 0)),
            ({"messages": None, "max_tokens": None}, full),
            ({"messages": None, "prompt": ["a", "b"]}, 2 * ASK.price(10, 0)),
            ({"model": None, "cargo": "echo", "input": {"prompt": "x", "max_tokens": 3}}, ASK.price(3, 0)),
            ({"stream": True, "stream_options": {"include_usage": True}}, ASK.price(10, 0)),
            ({"policy": "eu"}, ASK.price(10, 0)),
        ]
        for body, price in quotable:
            assert (await quoted(running, **body))["price"] == format_credits(price), body
        bad: list[tuple[dict[str, Any], int, str, str | None]] = [
            ({"bid_price": "0.0001"}, 402, "bid_too_low", "bid_price"),
            ({"policy": "switzerland"}, 503, "no_island", None),
            ({"policy": 7}, 400, "invalid_value", "policy"),
            ({"model": "nobody-has-it"}, 404, "model_not_found", "model"),
            ({"model": "no name"}, 404, "model_not_found", "cargo"),
            ({"model": None}, 400, "missing_required_parameter", "cargo"),
            ({"messages": "text"}, 400, "invalid_type", "messages"),
            ({"messages": None, "prompt_tokens": -1}, 400, "invalid_value", "prompt_tokens"),
            ({"messages": None, "max_tokens": 1.5}, 400, "invalid_value", "max_tokens"),
            ({"messages": None, "max_tokens": 4097}, 400, "invalid_value", "max_tokens"),
        ]
        async with http(running) as client:
            for body, status, code, param in bad:
                error_of(await client.post(f"{API}/quotes", json={**HELLO, **SHORT, **body}), status, code, param)
        async with http(running, create_key(running.database_url, scopes=("read",))) as client:
            error_of(await client.post(f"{API}/quotes", json=HELLO), 403, "insufficient_scope")


@pytest.mark.parametrize("how", ["chat", "job", "quote"])
async def test_quotes_bids_and_placement_agree_on_how_long_a_job_may_run(tmp_path: Path, how: str) -> None:
    """An Island that asks by the second, and is slow: what it can cost depends on the operator's time limit."""
    slow = island(1, Script(token_s=0.002), ask=Ask(per_second=1000), tokens_per_s=0.01)
    async with opened(url_of(tmp_path), slow, job_timeout_s=2000.0) as running:
        if how == "job":
            assert (await ended(running, await submit(running, input={"prompt": TEXT, **SHORT})))["state"] == "succeeded"
        else:
            quote = await quoted(running)
            assert quote["price"] == format_credits(2000 * 1000)
            answer = await chat(running, **SHORT, quote=quote["id"] if how == "quote" else None)
            assert answer.status_code == 200, answer.text


async def test_old_quotes_are_swept(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        quote = (await quoted(running))["id"]
        market, upkeep = running.server._parts.market, running.server._parts.upkeep
        await upkeep._round(sweep=True)
        assert (await chat(running, **SHORT, quote=quote)).status_code == 200
        hours_ago = market._clock_ms() - 3 * 3_600_000
        market._clock_ms = lambda: hours_ago
        old = (await quoted(running))["id"]
        market._clock_ms = lambda: hours_ago + 60_000
        error_of(await chat(running, **SHORT, quote=old), 409, "quote_expired", "quote")
        await upkeep._round(sweep=True)
        error_of(await chat(running, **SHORT, quote=old), 404, "unknown_quote", "quote")


# Bids


async def test_saved_bids(database_url: str) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(database_url, one) as running, http(running) as client:
        put = await client.put(f"{MARKET}/bids/echo", json={"bid_price": "0.002"})
        assert put.status_code == 200 and put.json() == {"cargo": "echo", "bid_price": "0.002"}
        await client.put(f"{MARKET}/bids/library/model:7b", json={"bid_price": 1})
        saved = (await client.get(f"{MARKET}/bids")).json()["data"]
        assert saved == [{"cargo": "echo", "bid_price": "0.002"}, {"cargo": "library/model:7b", "bid_price": "1"}]
        await chat(running)
        await chat(running, bid_price="0.003")
        assert [(job.bid_micros, job.bid_source) for job in await rows(running)] == [(3000, "explicit"), (2000, "saved")]
        await client.put(f"{MARKET}/bids/echo", json={"bid_price": "0.0009"})
        error_of(await chat(running), 402, "bid_too_low", "bid_price")
        error_of(await client.post(f"{API}/quotes", json=HELLO), 402, "bid_too_low", "bid_price")
        assert (await client.delete(f"{MARKET}/bids/echo")).status_code == 204
        assert (await client.delete(f"{MARKET}/bids/echo")).status_code == 204
        await chat(running)
        assert (await rows(running))[0].bid_source == "market", "what others paid"
        async with http(running, create_key(running.database_url, "other")) as other:
            assert (await other.get(f"{MARKET}/bids")).json() == {"data": []}
        async with http(running, create_key(running.database_url, scopes=("read",))) as reader:
            error_of(await reader.put(f"{MARKET}/bids/echo", json={"bid_price": 1}), 403, "insufficient_scope")
            error_of(await reader.delete(f"{MARKET}/bids/echo"), 403, "insufficient_scope")
        error_of(await client.put(f"{MARKET}/bids/a%20b", json={"bid_price": 1}), 404, "model_not_found", "cargo")
        error_of(await client.put(f"{MARKET}/bids/a%00b", json={"bid_price": 1}), 404, "model_not_found", "cargo")


async def test_a_saved_bid_is_cut_to_what_the_account_has(tmp_path: Path) -> None:
    """As exchange.md has it: only a bid that the request itself names is refused."""
    async with opened(url_of(tmp_path), island(1, ask=Ask(1000))) as running, http(running) as client:
        await client.put(f"{MARKET}/bids/echo", json={"bid_price": 20_000})
        await set_funds(running, 1500)
        assert (await chat(running)).status_code == 200
        (job,) = await rows(running)
        assert (job.bid_micros, job.bid_source) == (1500, "saved")
        error_of(await chat(running), 402, "insufficient_credits")
        error_of(await chat(running, bid_price="0.001"), 402, "insufficient_credits")


async def test_an_account_may_save_only_so_many_bids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.http.market_routes._BIDS_MAX", 2)
    async with opened(url_of(tmp_path)) as running, http(running) as client:
        for name in ("a", "b", "a"):
            assert (await client.put(f"{MARKET}/bids/{name}", json={"bid_price": 1})).status_code == 200
        error_of(await client.put(f"{MARKET}/bids/c", json={"bid_price": 1}), 400, "invalid_value", "cargo")


BAD_BIDS = [
    "-1",
    "-0.000001",
    "1e30",
    "1e-7",
    "0.0000001",
    "0.1234567",
    "1e999",
    f"1{'0' * 30}",
    "1000000000",
    "true",
    "[1]",
    '{"micros":1}',
    '"-1"',
    '"+1"',
    '"NaN"',
    '"Infinity"',
    '"1e30"',
    '"1E3"',
    '"0.0000001"',
    '"1000000000"',
    '""',
    '" 1"',
    '"1 "',
    '"1,5"',
    '"1_000"',
    '"0x10"',
    '"١"',
    "\"1'; DROP TABLE bids; --\"",
    '"1\\u0000"',
    '"\\ud800"',
]


async def test_bad_bids_are_refused_everywhere_and_leave_nothing(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    chat_json = '{"model":"echo","messages":[{"role":"user","content":"hi"}],"bid_price":%s}'
    places = [
        ("POST", CHAT, chat_json),
        ("POST", "/v1/completions", '{"model":"echo","prompt":"hi","bid_price":%s}'),
        ("POST", JOBS, '{"cargo":"echo","input":{"prompt":"hi"},"bid_price":%s}'),
        ("POST", f"{API}/quotes", chat_json),
        ("PUT", f"{MARKET}/bids/echo", '{"bid_price":%s}'),
    ]
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        for method, path, body in places:
            for bad in BAD_BIDS:
                with trio.fail_after(5):
                    answer = await client.request(method, path, content=(body % bad).encode())
                try:
                    error_of(answer, 400, "invalid_value", "bid_price")
                except AssertionError as error:
                    raise AssertionError(f"{path} {bad}") from error
            for constant in ("NaN", "Infinity", "-Infinity"):
                error_of(await client.request(method, path, content=(body % constant).encode()), 400, "invalid_json")
        error_of(await client.put(f"{MARKET}/bids/echo", json={}), 400, "invalid_value", "bid_price")
        assert await rows(running) == [] and not one.requests and await funds(running) == (ALL, 0)
        assert (await client.get(f"{MARKET}/bids")).json() == {"data": []}
        for good in ("0", "0.0001", '"0.000001"', "0.1", "100", '"100.000000"'):
            assert (await client.put(f"{MARKET}/bids/echo", content=b'{"bid_price":%b}' % good.encode())).status_code == 200


# What everybody sees


async def test_the_market_is_public(tmp_path: Path) -> None:
    one = island(1, ask=ASK, slots_total=4, slots_free=4)
    async with opened(url_of(tmp_path), one, island(2, ask=DEAR, slots_total=2, slots_free=2)) as running:
        empty = (await get(running, f"{MARKET}/rates/echo", key="")).json()["data"]
        assert empty["current_rate"] is None and (empty["supply"], empty["active_asks"]) == (6, 2)
        for _ in range(3):
            await chat(running, **SHORT)
        rate = (await get(running, f"{MARKET}/rates/echo", key="")).json()["data"]
        assert rate["rate"] == {"per_job": "0.0001", "per_1k_output": "0.02", "per_second": "0"}
        assert (rate["jobs_cleared"], rate["avg_clearing_price"], rate["supply"]) == (3, format_credits(PRICE), 6)
        listed = (await get(running, f"{MARKET}/rates", key="")).json()["data"]
        assert [entry["workload"]["slug"] for entry in listed] == ["echo"] and listed[0]["rate"] == rate["rate"]
        book = (await get(running, f"{MARKET}/orderbook/echo", key="")).json()
        assert (book["active_asks"], book["slots"], sum(step["asks"] for step in book["data"])) == (2, 6, 2)
        assert book["min_ask_price"] == format_credits(ASK.price(1000, 0)) and "peer" not in str(book)
        suggestions = (await get(running, f"{MARKET}/suggestions?hardware=cpu_only", key="")).json()["data"][0]
        assert suggestions["suggested_bid"] == format_credits(ASK.price(1000, 0) * 105 // 100)
        assert suggestions["suggested_ask"] == "0.00005+0.01+0"
        error_of(await get(running, f"{MARKET}/suggestions?hardware=abacus", key=""), 400, "invalid_value", "hardware")
        for path in ("rates", "history", "orderbook"):
            unknown = await get(running, f"{MARKET}/{path}/never/heard-of", key="")
            assert unknown.status_code == 200
            for name in ("a%00b", "a%20b", "x" * 129, "%F0%9F%98%80"):
                error_of(await get(running, f"{MARKET}/{path}/{name}", key=""), 404, "model_not_found", "cargo")
        for hours in ("0", "721", "-1", "1.5", "1e2", "", "%C2%B2", "1%00"):
            error_of(await get(running, f"{MARKET}/history/echo?hours={hours}", key=""), 400, "invalid_value", "hours")
        error_of(await get(running, f"{MARKET}/bids", key=""), 401, "invalid_api_key")


async def test_the_next_bid_follows_the_market(tmp_path: Path) -> None:
    """And reaches an Island that asks more by itself only up to four times the rate."""
    one = island(1, ask=Ask(1000))
    async with opened(url_of(tmp_path), one, island_wait_s=0.01) as running:
        await chat(running)
        assert (await rows(running))[0].bid_source == "default"
        await chat(running)
        newest = (await rows(running))[0]
        assert (newest.bid_source, newest.bid_micros) == ("market", 1050)
        asks(one, Ask(4000))
        running.port.advertise(one)
        assert (await chat(running)).status_code == 200
        asks(one, Ask(50_000))
        running.port.advertise(one)
        error_of(await chat(running), 402, "bid_too_low", "bid_price")
        assert (await chat(running, bid_price="0.05")).status_code == 200


async def test_what_an_owner_pays_his_own_island_is_no_price(tmp_path: Path) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(url_of(tmp_path), one) as running:
        await chat(running)
        await running.server.books.do(PairIsland(one.peer, "local"))
        await running.server._parts.upkeep._round(sweep=True)
        asks(one, Ask(777_000))
        running.port.advertise(one)
        assert (await chat(running, bid_price=1)).status_code == 200
        rate = (await get(running, f"{MARKET}/rates/echo")).json()["data"]
        assert rate["rate"]["per_job"] == "0.001" and rate["jobs_cleared"] == 1
        assert await running.server.books.ask(clearings, 0, "") == {}, "by now all of them are"


async def test_a_coordinator_knows_the_prices_of_before_and_of_the_others(database_url: str) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(database_url, one) as first:
        key = first.key
        await chat(first)
    async with (
        opened(database_url, one, api_key=key) as first,
        opened(database_url, island(2, ask=Ask(3000)), key=OTHER, api_key=key) as second,
    ):
        for running in (first, second):
            rate = (await get(running, f"{MARKET}/rates/echo")).json()["data"]
            assert (rate["jobs_cleared"], rate["rate"]["per_job"]) == (1, "0.001")
        await chat(second, bid_price=1)
        await chat(first, bid_price=1)
        # a third Coordinator's clock is half a minute behind, and what it wrote came late
        late = await row(second, (await rows(second))[1].id)

        def put_back(connection: Any) -> None:
            connection.execute(jobs.update().where(jobs.c.id == late.id).values(finished_at_ms=late.finished_at_ms - 30_000))

        for _ in range(3):
            for running in (first, second):
                market = running.server._parts.market
                await market._read_clearings(market._read_ms - 180_000, market._owner)
            await first.server.books.change(put_back)
        for running in (first, second):
            rate = (await get(running, f"{MARKET}/rates/echo")).json()["data"]
            assert (rate["jobs_cleared"], rate["rate"]["per_job"]) == (3, "0.001667"), "each counted once"


async def test_history_is_made_of_snapshots(database_url: str) -> None:
    one = island(1, ask=Ask(1000))
    async with opened(database_url, one) as running:
        await chat(running)
        market, books = running.server._parts.market, running.server.books
        now_ms = market._clock_ms()
        end_ms = now_ms - now_ms % SNAPSHOT_INTERVAL_MS + SNAPSHOT_INTERVAL_MS
        market._clock_ms = lambda: end_ms + 1000
        await market._take_snapshots()
        await market._take_snapshots()
        history = (await get(running, f"{MARKET}/history/echo?hours=1", key="")).json()
        assert len(history["data"]) == 1 and history["hours"] == 1
        assert (history["summary"]["jobs_cleared"], history["summary"]["avg_clearing_price"]) == (1, "0.001")
        market._last_slot_ms = None  # as another Coordinator
        await market._take_snapshots()
        assert len(await books.ask(lambda connection: connection.execute(market_snapshots.select()).all())) == 1
        market._clock_ms = lambda: end_ms + 32 * 24 * 3_600_000
        await market._take_snapshots()
        assert [it.at_ms for it in await books.ask(_snapshots)] == [market._last_slot_ms], "a month is enough"


def _snapshots(connection: Any) -> list[Any]:
    return list(connection.execute(market_snapshots.select()).all())


async def test_a_snapshot_that_could_not_be_written_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask(1000))) as running:
        market, books = running.server._parts.market, running.server.books

        async def away(*_arguments: Any) -> Any:
            raise BooksUnavailable("away")

        with monkeypatch.context() as patch, pytest.raises(BooksUnavailable):
            patch.setattr(books, "change", away)
            await market._take_snapshots()
        await market._take_snapshots()
        assert len(await books.ask(_snapshots)) == 1


async def test_waiting_jobs_make_a_surge(tmp_path: Path) -> None:
    one = island(1, Script(times=1), Script(hang_after=0), ask=Ask(1000), slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), one) as running:
        await chat(running)
        market, now_ms = running.server._parts.market, running.server._parts.market._clock_ms()
        ids = [await submit(running) for _ in range(4)]
        while running.server.statistics()["waiting"] < 3:
            await trio.sleep(0.005)
        market._clock_ms = lambda: now_ms + 31_000
        rate = (await get(running, f"{MARKET}/rates/echo")).json()["data"]
        assert rate["surge"]["active"] and rate["surge"]["multiplier"] == "1.25" and rate["demand"] >= 3
        ids.append(await submit(running))
        assert (await row(running, ids[-1])).bid_micros == 1313, "1.05 x 1.25, rounded up"
        for job_id in ids:
            async with http(running) as client:
                await client.delete(f"{JOBS}/{job_id}")
        assert {job.state for job in await rows(running)} == {JobState.SUCCEEDED, JobState.CANCELLED}
