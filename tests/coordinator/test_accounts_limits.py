"""Limits of requests: of a key, of an account over all its keys, of an address; and guessing of keys."""

from __future__ import annotations

import itertools
from pathlib import Path

import httpx
import pytest

from coordinator.books.accounts import LimitAccount
from coordinator.config import CoordinatorConfig
from coordinator.http.ratelimit import TRACKED_MAX, Limit, PerMinute, Standing, count_in_all, counted_as, tightest
from protocol.errors import ConfigError
from tests.coordinator.accounts_api import do, serving

WRONG = "ak_" + "B" * 43


def limits(*per_minute: int) -> list[Limit]:
    return [Limit(PerMinute(), "me", count, f"limit {number}") for number, count in enumerate(per_minute)]


def test_a_request_counts_against_every_limit_or_none() -> None:
    several = limits(3, 2)
    remaining = [[standing.remaining for standing in count_in_all(several, 0.0)] for _ in range(2)]
    refused = count_in_all(several, 10.0)
    assert remaining == [[2, 1], [1, 0]]
    assert refused == [Standing(False, 2, 0, 50.0, "limit 1")]
    # what was refused by one has used nothing up in the other
    assert [standing.remaining for standing in count_in_all(several[:1], 10.0)] == [0]


def test_a_refusal_names_every_limit_that_is_full_and_lasts_until_the_last_is_over() -> None:
    several = limits(1, 1)
    several[0].windows.count("me", 1, 0.0)
    several[1].windows.count("me", 1, 30.0)
    refused = count_in_all(several, 40.0)
    assert [standing.reset_s for standing in refused] == [20.0, 50.0]
    assert tightest(refused).headers() == {
        "X-RateLimit-Limit": "1",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "50",
        "Retry-After": "50",
    }


def test_the_tightest_has_the_fewest_left_then_lasts_longest() -> None:
    few, many = Standing(True, 100, 3, 10.0), Standing(True, 5, 4, 60.0)
    assert tightest([few, many]) is few and tightest([many, few]) is few
    late = Standing(True, 7, 3, 20.0)
    assert tightest([few, late]) is late and tightest([late, few]) is late


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),  # IPv4 through an IPv6 socket: not all of them together
        ("::1", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
        ("no:address", "no:address"),
    ],
)
def test_whoever_has_a_network_counts_once(address: str, who: str) -> None:
    assert counted_as(address) == who


def test_a_flood_of_strangers_takes_no_memory() -> None:
    windows = PerMinute()
    for number in range(3 * TRACKED_MAX):
        windows.count(f"stranger {number}", 5, 0.0)
    assert len(windows) == TRACKED_MAX
    asking = PerMinute()
    assert all(asking.has_room(number, 5, 0.0) for number in range(100)) and len(asking) == 0


async def statuses(client: httpx.AsyncClient, count: int) -> list[int]:
    return [(await client.get("/account")).status_code for _ in range(count)]


async def test_all_keys_of_an_account_share_its_limit(database_url: str) -> None:
    async with serving(database_url) as served:
        first, second, other = served.key("ann"), served.key("ann"), served.key("bob")
        do(served.database, LimitAccount("ann", 4))
        async with served.client(first) as one, served.client(second) as two, served.client(other) as bob:
            answers = [await client.get("/account") for client in (one, two, one, two, one, two)]
            assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
            assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["3", "2", "1", "0", "0", "0"]
            assert "this account may send 4 requests a minute" in answers[-1].json()["error"]["message"]
            assert answers[-1].headers["retry-after"] == answers[-1].headers["x-ratelimit-reset"] == "60"
            unlimited = await bob.get("/account")
            assert unlimited.status_code == 200 and "x-ratelimit-limit" not in unlimited.headers
            served.clock.ms += 60_000
            assert await statuses(two, 1) == [200]


async def test_the_headers_show_the_tightest_limit(database_url: str) -> None:
    async with serving(database_url, requests_per_minute_per_address=100) as served:
        key = served.key("ann", limit=3)
        do(served.database, LimitAccount("ann", 5))
        async with served.client(key) as limited, served.client(served.key("ann")) as free, served.client(served.key("bob")) as bob:
            seen = [(await client.get("/account")).headers for client in (limited, free, free, limited, bob)]
        assert [headers["x-ratelimit-limit"] for headers in seen] == ["3", "5", "5", "3", "100"]
        assert [headers["x-ratelimit-remaining"] for headers in seen] == ["2", "3", "2", "1", "95"]


async def test_what_a_key_is_refused_the_account_does_not_lose(database_url: str) -> None:
    async with serving(database_url) as served:
        limited, free = served.key("ann", limit=1), served.key("ann")
        do(served.database, LimitAccount("ann", 3))
        async with served.client(limited) as one, served.client(free) as two:
            assert await statuses(one, 5) == [200, 429, 429, 429, 429]
            assert await statuses(two, 3) == [200, 200, 429]


async def test_an_address_has_a_limit_for_all_its_requests(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'c.db'}"
    async with serving(url, requests_per_minute_per_address=4, trusted_proxies=("127.0.0.1",)) as served:
        ann, bob = served.key("ann"), served.key("bob")

        async def ask(key: str, address: str) -> httpx.Response:
            async with served.client(key) as client:
                return await client.get("/account", headers={"X-Forwarded-For": address})

        home = [await ask(key, "2001:db8::1") for key in (ann, bob, WRONG, ann)]
        assert [answer.status_code for answer in home] == [200, 200, 401, 200]
        blocked = await ask(bob, "2001:db8::ffff")  # the same /64
        assert blocked.status_code == 429 and "this address may send 4 requests" in blocked.json()["error"]["message"]
        assert (await ask(WRONG, "2001:db8::1")).status_code == 429
        assert (await ask(bob, "2001:db8:0:1::1")).status_code == 200
        served.clock.ms += 60_000
        assert (await ask(bob, "2001:db8::1")).status_code == 200


async def test_no_limits_unless_they_are_set(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path / 'c.db'}") as served, served.client(served.key()) as client:
        assert await statuses(client, 150) == [200] * 150


async def test_guessing_keys_is_slow_and_a_right_key_still_gets_in(tmp_path: Path) -> None:
    async with serving(f"sqlite:///{tmp_path / 'c.db'}") as served:
        right = served.key()
        guesses = itertools.cycle([WRONG, "ak_" + "C" * 43, "ak_x", "Bearer", "' OR 1=1 --", "ak_" + "é" * 20])
        seen = []
        for guess in itertools.islice(guesses, 12):
            async with httpx.AsyncClient(base_url=f"{served.url}/api/v1") as client:
                seen.append((await client.get("/account", headers={b"Authorization": b"Bearer " + guess.encode()})).status_code)
            async with served.client(right) as client:
                assert await statuses(client, 1) == [200]
        assert seen == [401] * 5 + [429] * 7
        served.clock.ms += 60_000
        async with served.client(WRONG) as client:
            assert await statuses(client, 6) == [401] * 5 + [429]


def test_runs_are_kept_for_some_time() -> None:
    with pytest.raises(ConfigError, match="--run-retention"):
        CoordinatorConfig("sqlite://", run_retention_s=0)


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="--address-limit"):
        CoordinatorConfig("sqlite://", requests_per_minute_per_address=-1)
