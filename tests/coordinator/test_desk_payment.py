"""What an answer costs, when it is charged, and to whom it goes: chats and completions over HTTP, down to the books."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator.books import queries
from coordinator.books.accounts import ISLANDS, IslandRecord, PairIsland, SetPublisher
from coordinator.books.errors import BooksRefused, Why
from coordinator.books.jobs import JobState, OpenJob
from coordinator.books.ledger import escrow, user
from coordinator.books.stored import Stored
from coordinator.books.writer import Pending
from coordinator.http.errors import from_refusal
from coordinator.keys import create_key
from protocol.errors import Code, Refused
from protocol.prices import Ask, format_credits, parse_credits
from protocol.receipts import read_receipt
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import (
    CHAT,
    CREDIT,
    TEXT,
    balance,
    chat,
    chunks_of,
    error_of,
    funds,
    get,
    opened,
    row,
    rows,
    set_funds,
    text_of,
    until,
    url_of,
)
from tests.coordinator.fakes import BIG, Running, Script, island, roomy

ALL = 10_000 * CREDIT  # of sign-up
ASK = Ask(per_job=100, per_1k_output=20_000)  # 20 micro-credits a token
PRICE = ASK.price(5, 0)  # of TEXT
STREAM: dict[str, Any] = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}


async def test_an_answer_costs_what_its_receipt_its_metadata_and_the_statement_say(database_url: str) -> None:
    one = island(1, Script(token_s=0.002), ask=Ask(100, 20_000, 1_000_000))
    async with opened(database_url, one) as running:
        answer = await chat(running)
        job_id, price = answer.json()["metadata"]["job_id"], parse_credits(answer.json()["metadata"]["price"])
        assert answer.headers["x-archipelag-job"] == job_id
        assert price == PRICE + 3000, "3 ms, as the receipt says"
        assert await funds(running) == (ALL - price, 0)
        assert await balance(running, escrow(one.peer)) == (price, 0)
        account = (await get(running, "/api/v1/account")).json()
        assert parse_credits(account["credits"]) == ALL - price
        lines = (await get(running, "/api/v1/account/statement")).json()["data"]
        assert [(line["kind"], line["job"], line["amount"]) for line in lines[1:]] == [("charge", job_id, f"-{format_credits(price)}")]
        receipts = (await get(running, f"/api/v1/jobs/{job_id}/receipts")).json()
        assert receipts["price"] == receipts["data"][0]["paid"] == format_credits(price)
        receipt = read_receipt(bytes.fromhex(receipts["data"][0]["receipt"]))
        assert (receipt.island, receipt.job_id, receipt.price_micros) == (one.peer, job_id, price)
        job = await row(running, job_id)
        assert (job.state, job.price_micros, job.island, job.completion_tokens) == (JobState.SUCCEEDED, price, one.peer, 5)
        assert (job.kind, job.compute_ms, job.ask) == ("chat", 3, one.offers[0].ask)


async def test_the_most_is_held_from_the_first_word_and_the_price_is_charged_before_the_last(database_url: str) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=3, until=more), ask=ASK)
    body = {**STREAM, "bid_price": "0.25"}
    text, seen = "", []
    async with (
        opened(database_url, one) as running,
        http(running) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            text += text_of([chunk])
            seen.append((bool(chunk["choices"] and chunk["choices"][0]["finish_reason"]), await funds(running)))
            if text == "one two three":
                more.set()
    before = [said for finished, said in seen if not finished]
    assert before[0] == before[1] == (ALL, 250_000), "until the Island goes on"
    assert seen[-2] == (True, (ALL - PRICE, 0)) and seen[-1][1] == (ALL - PRICE, 0)
    assert chunk["metadata"]["price"] == format_credits(PRICE) and chunk["usage"]["completion_tokens"] == 5


@dataclass
class Late:
    """An opening that takes as long as a test likes, and then goes its way, or is refused."""

    begin: Callable[[], Pending]
    ready: trio.Event = field(default_factory=trio.Event)
    refused: BooksRefused | None = None

    async def wait(self) -> list[Any]:
        await self.ready.wait()
        if self.refused is not None:
            raise self.refused
        return await self.begin().wait()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("refused", [None, BooksRefused(Why.NO_CREDIT, "by now it has no more")])
async def test_an_island_may_begin_while_the_hold_is_written_and_nothing_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, refused: BooksRefused | None
) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        await chat(running, max_tokens=9)  # from now on it is known how much the account has
        books, begin = running.server.books, running.server.books.begin
        late, answers = [], []

        def slowly(*operations: Any) -> Late:
            if isinstance(operations[0], OpenJob):
                late.append(Late(functools.partial(begin, *operations), refused=refused))
                return late[0]
            return begin(*operations)  # type: ignore[return-value]

        async def ask() -> None:
            answers.append(await chat(running, stream=stream))

        async def ask_again() -> None:
            again.append(await chat(running, {"x-stainless-retry-count": "1"}, stream=stream))

        again: list[httpx.Response] = []
        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(books, "begin", slowly)
            nursery.start_soon(ask)
            await until(lambda: len(one.requests) == 2)
            nursery.start_soon(ask_again)
            await trio.sleep(0.1)
            assert not answers and not again and len(await rows(running)) == 1 and len(late) == 1
            late[0].ready.set()
            await until(lambda: bool(answers) and (refused is None or len(late) == 2))
            for each in late:
                each.ready.set()
        if refused is None:
            assert answers[0].status_code == 200 and "five" in answers[0].text and await funds(running) == (ALL - 2 * PRICE, 0)
            assert again[0].headers["x-archipelag-replayed"] == "true"
        else:
            error_of(answers[0], 402, "insufficient_credits")
            assert await funds(running) == (ALL - PRICE, 0) and len(await rows(running)) == 1
        assert running.server.statistics()["open_jobs"] == 0 and one.open_now == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_choices_are_paid_each_and_none_for_more_than_its_part_of_the_bid(tmp_path: Path, stream: bool) -> None:
    one = island(1, Script(receipt={"price_micros": 10**12}), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        body: dict[str, Any] = {"n": 4, "max_tokens": 9, "bid_price": "0.0013"}
        if stream:
            chunks = await chunks_of(await chat(running, **STREAM | body))
            metadata, texts = chunks[-1]["metadata"], [text_of(chunks, choice) for choice in range(4)]
        else:
            answer = (await chat(running, **body)).json()
            metadata, texts = answer["metadata"], [choice["message"]["content"] for choice in answer["choices"]]
        assert texts == [TEXT] * 4 and metadata["price"] == format_credits(4 * PRICE)
        assert [ticket.price_limit_micros for ticket in one.tickets] == [ASK.price(9, 0)] * 4
        assert await funds(running) == (ALL - 4 * PRICE, 0)
        assert len((await get(running, f"/api/v1/jobs/{metadata['job_id']}/receipts")).json()["data"]) == 4
        refused = await chat(running, **body | {"bid_price": "0.001119"})
        error_of(refused, 402, "bid_too_low", "bid_price")


@pytest.mark.parametrize("stream", [True, False])
async def test_one_choice_that_fails_costs_nothing_and_neither_do_the_others(tmp_path: Path, stream: bool) -> None:
    bad = Script(refuse=Refused(Code.BAD_INPUT, "not this one"), times=1)
    one = island(1, Script(times=1), bad, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        await chat(running, n=3, stream=stream)
        (job,) = await rows(running)
        assert (job.state, job.error_code, job.price_micros) == (JobState.FAILED, "bad_input", 0)
        assert await funds(running) == (ALL, 0) and await balance(running, escrow(one.peer)) == (0, 0)


LIES: list[dict[str, Any]] = [
    {"price_micros": 10**15},
    {"price_micros": 10**15, "compute_ms": 2**40, "sent_tokens": 4096},
    {"price_micros": PRICE + 1},
]


@pytest.mark.parametrize("lie", LIES)
async def test_a_lying_island_is_paid_what_arrived_by_its_ask(tmp_path: Path, lie: dict[str, Any]) -> None:
    liar = island(1, Script(receipt=lie), ask=ASK)
    async with opened(url_of(tmp_path), liar) as running:
        answer = await chat(running, bid_price="100")
        assert answer.json()["metadata"]["price"] == format_credits(PRICE)
        assert await funds(running) == (ALL - PRICE, 0) and await balance(running, escrow(liar.peer)) == (PRICE, 0)


async def test_an_island_that_claims_hours_gets_the_bid_at_most(tmp_path: Path) -> None:
    liar = island(1, Script(accept_s=0.01, token_s=0.005, receipt={"price_micros": 10**15, "compute_ms": 2**40}), tokens_per_s=1000.0)
    liar.offers = (island(1, ask=Ask(per_second=10**9), tokens_per_s=10**6).offers[0],)  # 1 credit a millisecond
    async with opened(url_of(tmp_path), liar) as running:
        answer = await chat(running, max_tokens=5)
        price = parse_credits(answer.json()["metadata"]["price"])
        (job,) = await rows(running)
        assert 25 * CREDIT <= price <= job.bid_micros < 1100 * CREDIT
        assert await funds(running) == (ALL - price, 0)


async def test_a_choice_that_ends_early_is_not_paid_for_the_time_of_the_others(tmp_path: Path) -> None:
    lie = {"price_micros": 10**15, "compute_ms": 2**40}
    quick = island(1, Script(receipt=lie), ask=Ask(per_second=1000), slots_total=1, slots_free=1)
    slow = island(2, Script(accept_s=0.6, receipt={"price_micros": 0}), ask=Ask(per_second=1000), slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), quick, slow) as running:
        answer = await chat(running, n=2, bid_price=10)
        assert answer.status_code == 200 and len(quick.tickets) == len(slow.tickets) == 1
        assert (await balance(running, escrow(quick.peer)))[0] < 300, "micro-credits, one a millisecond"


async def test_who_finishes_is_paid_and_who_broke_loses_karma(tmp_path: Path) -> None:
    shaky = island(1, Script(fail_after=2, times=1), tokens_per_s=90.0, ask=ASK)
    steady = island(2, tokens_per_s=1.0, ask=ASK)
    async with opened(url_of(tmp_path), shaky, steady) as running:
        chunks = await chunks_of(await chat(running, **STREAM))
        assert text_of(chunks) == TEXT and chunks[-1]["metadata"]["islands"] == [shaky.peer, steady.peer]
        price = ASK.price(3, 0)
        assert chunks[-1]["metadata"]["price"] == format_credits(price) and await funds(running) == (ALL - price, 0)
        assert await balance(running, escrow(steady.peer)) == (price, 0) and await balance(running, escrow(shaky.peer)) == (0, 0)
        broke, finished = [
            await running.server.books.ask(queries.island_view, peer) for peer in (shaky.peer, steady.peer)
        ]
        assert broke is not None and (broke.record.karma_milli, broke.record.jobs_failed) == (-100, 1)
        assert finished is not None and (finished.record.pending_ms > 0, finished.record.jobs_done) == (True, 1)


async def big_chat(running: Running, **changes: Any) -> httpx.Response:
    return await chat(running, **{"model": "big", "bid_price": "1", **changes})


async def test_a_pipeline_is_paid_by_what_its_stages_ask(tmp_path: Path) -> None:
    first, second = roomy(1, ask=Ask(300)), roomy(2, ask=Ask(100, 20_000))
    async with opened(url_of(tmp_path), first, second, manifests={"big": BIG}) as running:
        answer = await big_chat(running)
        assert answer.json()["metadata"]["price"] == format_credits(500)
        assert await balance(running, escrow(first.peer)) == (300, 0)
        assert await balance(running, escrow(second.peer)) == (200, 0)
        assert await funds(running) == (ALL - 500, 0)


@pytest.mark.parametrize("names", [(), (1,), (1, 1, 1), (0, 0, 1)])
async def test_a_driver_cannot_take_what_is_another_stages(tmp_path: Path, names: tuple[int, ...]) -> None:
    islands = [roomy(number, 8, ask=Ask(100 * number)) for number in (1, 2)]
    for it in islands:
        it.scripts.append(Script(names=names))
    async with opened(url_of(tmp_path), *islands, manifests={"big": BIG}) as running:
        assert (await big_chat(running)).json()["metadata"]["price"] == format_credits(300)
        assert [(await balance(running, escrow(it.peer)))[0] for it in islands] == [100, 200]


async def test_a_stage_that_took_a_place_is_paid_and_who_left_is_not(tmp_path: Path) -> None:
    islands = [roomy(number, 8, ask=Ask(100 * number)) for number in (1, 2)]
    async with opened(url_of(tmp_path), *islands, manifests={"big": BIG}) as running:
        await big_chat(running)
        helper = roomy(3, ask=Ask(100))
        running.port.advertise(helper)
        driver = next(it for it in islands if it.tickets)
        left = next(it for it in islands if it is not driver)
        before = {it.peer: (await balance(running, escrow(it.peer)))[0] for it in (left, driver, helper)}
        driver.scripts = [Script(complain_after=2, complaint=(0, Code.LINK_LOST), times=1)]
        price = parse_credits((await big_chat(running)).json()["metadata"]["price"])
        gained = {peer: (await balance(running, escrow(peer)))[0] - had for peer, had in before.items()}
        assert sum(gained.values()) == price and gained[left.peer] == 0 and gained[driver.peer] > 0 and gained[helper.peer] > 0


async def test_the_publisher_has_his_share(tmp_path: Path) -> None:
    one = island(1, ask=Ask(999))
    async with opened(url_of(tmp_path), one) as running:
        create_key(running.database_url, "publisher")
        await running.server.books.do(SetPublisher("echo", "publisher", 100_000))
        answer = await chat(running)
        assert answer.json()["metadata"]["price"] == "0.000999"
        assert await funds(running, "publisher") == (ALL + 99, 0)
        assert await balance(running, escrow(one.peer)) == (900, 0)


async def test_an_owner_that_earns_is_paid_at_once(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        create_key(running.database_url, "owner")
        await running.server.books.do(PairIsland(one.peer, "owner"))
        await chat(running)
        assert await balance(running, escrow(one.peer)) == (PRICE, 0), "it has no karma yet"

        def trust(connection: Any) -> None:
            Stored(ISLANDS).update(connection, [IslandRecord(one.peer, "owner", karma_milli=10_000)])

        await running.server.books.change(trust)
        await chat(running)
        assert await funds(running, "owner") == (ALL + PRICE, 0)


async def test_ones_own_island_costs_nothing(tmp_path: Path) -> None:
    one = island(1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:

        def pair(connection: Any) -> None:
            Stored(ISLANDS).insert(connection, [IslandRecord(one.peer, "local", karma_milli=10_000)])

        await running.server.books.change(pair)
        answer = await chat(running)
        assert answer.json()["metadata"]["price"] == "0" and await funds(running) == (ALL, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_what_costs_nothing_needs_no_credits(tmp_path: Path, stream: bool) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask())) as running:
        await set_funds(running, 0)
        answer = await chat(running, stream=stream, bid_price=0)
        assert answer.status_code == 200 and '"price":"0"' in answer.text
        assert (await chat(running)).json()["metadata"]["price"] == "0", "the bid that nobody named is nothing as well"
        assert await funds(running) == (0, 0) and len(await rows(running)) == 2


# Failures


@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_gives_the_hold_back(tmp_path: Path, stream: bool) -> None:
    one = island(1, Script(refuse=Refused(Code.BAD_INPUT, "not\0this\ud800")), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        assert (await chat(running, stream=stream)).status_code == 400
        (job,) = await rows(running)
        assert (job.state, job.error_code, job.error_message) == (JobState.FAILED, "bad_input", "not this ")
        assert await funds(running) == (ALL, 0)


async def test_a_time_out_gives_the_hold_back(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, Script(hang_after=3), ask=ASK), job_timeout_s=0.3) as running:
        error_of(await chat(running), 504, "timeout")
        chunks = await chunks_of(await chat(running, **STREAM))
        assert text_of(chunks) == "one two three" and chunks[-1]["error"]["code"] == "timeout"
        assert {job.state for job in await rows(running)} == {JobState.FAILED}
        assert await funds(running) == (ALL, 0), "what was not ended is not paid"


async def test_no_capacity_and_no_island_give_the_hold_back(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=0), ask=ASK, slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), one, capacity_wait_s=0.05, island_wait_s=0.05) as running, trio.open_nursery() as nursery:
        nursery.start_soon(chat, running)
        await until(lambda: one.open_now == 1)
        _, held = await funds(running)
        full = await chat(running)
        error_of(full, 503, "no_capacity")
        assert full.headers["retry-after"]
        running.port.lose(one)
        error_of(await chat(running), 503, "no_island")
        error_of(await chat(running, model="nobody-has-it"), 404, "model_not_found", "model")
        assert await funds(running) == (ALL, held)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", Code)
def test_every_way_to_fail_has_a_status(code: Code) -> None:
    error = from_refusal(Refused(code, "no"))
    assert 400 <= error.status < 600 and error.code and (error.status != 503 or error.headers["Retry-After"])


@pytest.mark.parametrize("code", [Code.LEASE_LOST, Code.UNSIGNED])
async def test_a_job_that_nobody_brings_to_its_end(tmp_path: Path, code: Code) -> None:
    islands = [island(number, Script(refuse=Refused(code, "no")), ask=ASK) for number in range(1, 10)]
    async with opened(url_of(tmp_path), *islands) as running:
        error_of(await chat(running), 502, code.value)
        assert await funds(running) == (ALL, 0)


# Clients that leave


async def leave_after(running: Running, text: str, **changes: Any) -> None:
    async with http(running) as client, client.stream("POST", CHAT, json={**STREAM, **changes}) as response:
        said = ""
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                said += text_of([json.loads(line[6:])])
            if said == text:
                return


@pytest.mark.parametrize("words", [1, 3])
async def test_who_leaves_a_stream_pays_what_was_delivered(tmp_path: Path, words: int) -> None:
    one = island(1, Script(hang_after=words), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        await leave_after(running, " ".join(TEXT.split()[:words]))
        await until(lambda: one.cancelled == 1)

        async def is_settled() -> bool:
            return (await funds(running))[1] == 0

        await until(is_settled)
        price = ASK.price(words, 0)
        assert await funds(running) == (ALL - price, 0) and await balance(running, escrow(one.peer)) == (price, 0)
        (job,) = await rows(running)
        assert (job.state, job.price_micros, job.completion_tokens) == (JobState.CANCELLED, price, words)


async def test_who_leaves_one_of_several_choices_pays_those_that_ended_too(tmp_path: Path) -> None:
    one = island(1, Script(times=1), Script(hang_after=2, token_s=0.01), ask=ASK)
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        async with client.stream("POST", CHAT, json={**STREAM, "n": 2}) as response:
            chunks: list[dict[str, Any]] = []
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line[6:]))
                if sorted(map(len, (text_of(chunks, 0), text_of(chunks, 1)))) == [len("one two"), len(TEXT)]:
                    break
        await until(lambda: running.server.statistics()["jobs_cancelled"] == 1)
        await until(lambda: not running.server.desk.live)
        assert await funds(running) == (ALL - ASK.price(5, 0) - ASK.price(2, 0), 0)


@pytest.mark.parametrize(("stream", "hang_after"), [(True, 0), (False, 0), (False, 3)])
async def test_who_leaves_without_a_word_pays_nothing(tmp_path: Path, stream: bool, hang_after: int) -> None:
    one = island(1, Script(hang_after=hang_after, token_s=0.001), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: chat(running, stream=stream))
            await until(lambda: one.open_now == 1)
            await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        await until(lambda: not running.server.desk.live)
        (job,) = await rows(running)
        assert job.state is JobState.CANCELLED and await funds(running) == (ALL, 0)
        assert await balance(running, escrow(one.peer)) == (0, 0)


# Credits


async def test_without_credits_nothing_is_left_behind(database_url: str) -> None:
    one = island(1, ask=ASK)
    async with opened(database_url, one) as running:
        await set_funds(running, 500)
        for bid in ({"bid_price": "0.000501"}, {"bid_price": "999999999"}, {"n": 16}, {}):
            error_of(await chat(running, max_tokens=64, **bid), 402, "insufficient_credits")
        assert await rows(running) == [] and await funds(running) == (500, 0) and not one.tickets
        assert (await chat(running, max_tokens=5, bid_price="0.0005")).status_code == 200


async def test_a_bid_that_nobody_named_is_cut_to_the_balance(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask(1000))) as running:
        await set_funds(running, 1020)
        assert (await chat(running)).status_code == 200
        (job,) = await rows(running)
        assert (job.bid_micros, job.price_micros) == (1020, 1000) and await funds(running) == (20, 0)
        error_of(await chat(running), 402, "insufficient_credits")


async def test_sixty_four_at_once_get_exactly_what_can_be_paid(database_url: str) -> None:
    """10 of 64: each costs all of its bid, so whatever the order, no eleventh can be paid."""
    lowest = ALL
    async with opened(database_url, island(1, Script(token_s=0.002), ask=Ask(1000))) as running:
        await set_funds(running, 10_999)
        codes: list[int] = []

        async def ask(client: httpx.AsyncClient, stream: bool) -> None:
            answer = await client.post(CHAT, json={**HELLO, "bid_price": "0.001", "stream": stream})
            codes.append(answer.status_code)

        async def look() -> None:
            nonlocal lowest
            while len(codes) < 64:
                posted, held = await funds(running)
                lowest = min(lowest, posted - held)
                await trio.sleep(0.002)

        async with http(running) as client, trio.open_nursery() as nursery:
            nursery.start_soon(look)
            for number in range(64):
                nursery.start_soon(ask, client, number % 2 == 0)
        assert sorted(codes) == [200] * 10 + [402] * 54
        assert await funds(running) == (999, 0) and lowest == 999
        assert len(await rows(running)) == 10


async def test_the_credits_of_the_account_are_those_of_all_its_keys(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK)) as running:
        second = create_key(running.database_url)
        other = create_key(running.database_url, "other")
        for key in (running.key, second, other):
            async with http(running, key) as client:
                assert (await client.post(CHAT, json=HELLO)).status_code == 200
        assert await balance(running, user("local")) == (ALL - 2 * PRICE, 0)
        assert await balance(running, user("other")) == (ALL - PRICE, 0)
