"""Prices in JSON bodies are what was written, wherever they come; and what is said of those that will not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.books.accounts import PairIsland
from coordinator.keys import ACCOUNT_DEFAULT
from protocol.prices import Ask
from tests.coordinator.clients import http
from tests.coordinator.desks import CHAT, JOBS, chat, error_of, opened, rows, url_of
from tests.coordinator.fakes import Running, island

MARKET = "/api/v1/market"
CHAT_BODY = '{"model": "echo", "max_tokens": 1, "messages": [{"role": "user", "content": "one"}], "bid_price": %s}'
BODIES = {
    f"POST {CHAT}": CHAT_BODY,
    f"POST {JOBS}": '{"cargo": "echo", "input": {"prompt": "one", "max_tokens": 1}, "bid_price": %s}',
    "POST /api/v1/quotes": CHAT_BODY,
    f"PUT {MARKET}/bids/echo": '{"bid_price": %s}',
}


async def send(running: Running, address: str, body: str) -> httpx.Response:
    method, path = address.split(" ")
    async with http(running) as client:
        return await client.request(method, path, content=body.encode(), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("address", BODIES)
async def test_a_bid_is_what_was_written(tmp_path: Path, address: str) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask(1))) as running:
        for number in ("0.00005", "0.000001", "1.500000"):
            answer = await send(running, address, BODIES[address] % number)
            assert answer.status_code in (200, 201), answer.text
        for number in ("1e3", "1E0", "5e-05"):
            error = error_of(await send(running, address, BODIES[address] % number), 400, "invalid_value", "bid_price")
            assert "without an exponent" in error["message"] and number in error["message"]
        for number in ("0.12345600000000000000001", "0.1000000", "-0.5"):
            error = error_of(await send(running, address, BODIES[address] % number), 400, "invalid_value", "bid_price")
            assert "at most 6 decimals" in error["message"] and number in error["message"]
        if address.endswith((CHAT, JOBS)):
            assert sorted(job.bid_micros for job in await rows(running)) == [1, 50, 1_500_000]


async def test_other_numbers_are_numbers_as_before(tmp_path: Path) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        answer = await send(running, f"POST {CHAT}", CHAT_BODY % '1, "temperature": 5e-1, "top_p": 0.90, "logit_bias": {"3": 1.5}')
        assert answer.status_code == 200, answer.text
        sampling = one.requests[0].sampling
        assert (sampling.temperature, sampling.top_p, sampling.logit_bias) == (0.5, 0.9, ((3, 1.5),))
        refused = await send(running, f"POST {CHAT}", CHAT_BODY % '1, "temperature": 1e999')
        assert "finite" in error_of(refused, 400, "invalid_value", "temperature")["message"]
        refused = await send(running, f"POST {CHAT}", CHAT_BODY % '1, "max_tokens": 1.0')
        error_of(refused, 400, "invalid_type", "max_tokens")


async def test_a_bid_for_several_choices_is_compared_by_the_choice(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=Ask(1000))) as running:
        error = error_of(await chat(running, n=3, bid_price="0.002"), 402, "bid_too_low", "bid_price")
        assert "for at most 0.000666 credits per choice" in error["message"]
        assert "the cheapest wants up to 0.001 for each" in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"host_id": "nobody"}, "host_id"),
        ({"host_id": 7}, "host_id"),
        ({"host_id": None}, "host_id"),
        ({"host_id": None, "island": "nobody"}, "island"),
        ({"host_id": None, "island": []}, "island"),
        ({"island": "twice"}, "host_id"),
        ({"workload_slug": "no name"}, "workload_slug"),
        ({"workload_slug": "a: b"}, "workload_slug"),
        ({"workload_slug": None, "cargo": "no name"}, "cargo"),
        ({"asking_price": -1}, "asking_price"),
        ({"asking_price": {"per_day": 1}}, "asking_price"),
    ],
)
async def test_a_complaint_of_an_asking_price_names_its_field(tmp_path: Path, change: dict[str, Any], param: str) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        body = {"workload_slug": "echo", "host_id": one.peer, "asking_price": "0.5", **change}
        error_of(await client.post(f"{MARKET}/asking-prices", json=body), 400, "invalid_value", param)


async def test_an_asking_price_is_what_was_written(tmp_path: Path) -> None:
    one = island(1)
    async with opened(url_of(tmp_path), one) as running:
        await chat(running)  # now the books know the Island
        await running.server.books.do(PairIsland(one.peer, ACCOUNT_DEFAULT))
        address, body = f"POST {MARKET}/asking-prices", '{"workload_slug": "echo", "host_id": "' + one.peer + '", "asking_price": %s}'
        for price in ("0.00005", '{"per_job": 0.00005}'):
            answer = await send(running, address, body % price)
            assert answer.status_code == 200 and answer.json()["asking_price"] == "0.00005+0+0", answer.text
        assert one.offers[0].ask == Ask(50)
        for price in ("5e-05", '{"per_second": 5e-05}'):
            error = error_of(await send(running, address, body % price), 400, "invalid_value", "asking_price")
            assert "without an exponent" in error["message"]
