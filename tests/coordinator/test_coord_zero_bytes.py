"""A zero byte in every name of a path, on both databases: PostgreSQL takes none in a text, and nobody may hear of that as our failure."""

from __future__ import annotations

import re

import pytest

from coordinator.http.app import Api
from tests.coordinator.clients import http
from tests.coordinator.desks import opened
from tests.coordinator.fakes import island

QUERIES = ["cargo", "state", "cursor", "limit", "since", "until", "format", "period", "account", "kind"]


@pytest.mark.parametrize("text", ["%00", "a%00b", "%ED%A0%80", "%FF", "%F4%8F%BF%BF"])
async def test_no_address_breaks(database_url: str, text: str) -> None:
    """The last ones: half of a surrogate pair, a byte that is no UTF-8, the last code point."""
    async with opened(database_url, island(1)) as running, http(running) as client:
        application = Api(running.server._services).application()
        routes = [(route.method, route.resource.canonical) for route in application.router.routes() if route.resource is not None]
        tried = 0
        for method, path in routes:
            address = re.sub(r"\{[^}]*\}", text, path)
            if method == "HEAD":
                continue
            if address != path:
                answer = await client.request(method, address, json={"bid_price": 1} if method in ("PUT", "POST") else None)
                assert 400 <= answer.status_code < 500 or answer.status_code == 200, (method, address, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"], (method, address)
                tried += 1
            if method == "GET":
                for name in QUERIES:
                    answer = await client.get(re.sub(r"\{[^}]*\}", "echo", path), params=f"{name}={text}")
                    assert answer.status_code < 500, (path, name, answer.text)
        assert tried >= 15
        assert running.server.books.writer.statistics.failed == 0
