"""API keys: kept hashed, seen at once, limited, and cheap."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from coordinator.http.ratelimit import TRACKED_MAX, PerMinute
from coordinator.keys import (
    REMEMBERED_MAX,
    REMEMBERED_S,
    ApiKey,
    KeyCache,
    KeyStore,
    create_key,
    database_url_of,
    hash_if_key,
)
from privacy.keys import api_key_hash
from protocol.errors import ConfigError
from tests.coordinator.clients import HELLO, http
from tests.coordinator.fakes import coordinator, island


def test_only_the_hash_is_stored(tmp_path: Path) -> None:
    key = create_key(database_url_of(tmp_path), account="ann", scopes=["read"], rate_limit_per_minute=7)
    store = KeyStore(database_url_of(tmp_path))
    assert store.find(api_key_hash(key)) == ApiKey(1, "ann", frozenset({"read"}), 7)
    store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.encode() not in everything and key[3:].encode() not in everything


def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    os.umask(0o022)
    create_key(database_url_of(tmp_path))
    store = KeyStore(database_url_of(tmp_path))
    store.find("x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    store.close()
    assert "coordinator.db" in modes and set(modes.values()) == {0o600}, modes


def test_revoked_keys_are_not_found(tmp_path: Path) -> None:
    key = create_key(database_url_of(tmp_path))
    store = KeyStore(database_url_of(tmp_path))
    assert store.revoke(key) and not store.revoke(key)
    assert store.find(api_key_hash(key)) is None
    store.close()


@pytest.mark.parametrize(
    "wrong", [{"scopes": []}, {"scopes": ["admin"]}, {"account": "a b"}, {"account": ""}, {"rate_limit_per_minute": -1}]
)
def test_wrong_wishes_are_refused_with_a_sentence(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_key(database_url_of(tmp_path), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "oddbase://host/x"])
def test_a_database_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(ConfigError, match="database-url"):
        KeyStore(url)


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    create_key(database_url_of(tmp_path))
    with sqlite3.connect(tmp_path / "coordinator.db") as connection:
        connection.execute("UPDATE coordinator_schema SET version = 99")
    with pytest.raises(ConfigError, match="newer version"):
        KeyStore(database_url_of(tmp_path))


def test_many_processes_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    code = "import sys; from coordinator.keys import create_key; print(create_key(sys.argv[1]))"
    url = database_url_of(tmp_path)
    children = [
        subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(4)
    ]
    keys = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    store = KeyStore(url)
    assert all(store.find(api_key_hash(key)) for key in keys) and len(set(keys)) == 4
    store.close()


def test_the_cache_forgets_and_is_bounded() -> None:
    now = [0.0]
    cache, key = KeyCache(lambda: now[0]), ApiKey(1, "a", frozenset({"read"}), 0)
    for number in range(REMEMBERED_MAX + 5):
        cache.put(str(number), key)
    assert len(cache) == REMEMBERED_MAX and cache.get("0") is None and cache.get("100") is key
    now[0] = REMEMBERED_S
    assert cache.get("100") is None


def test_only_what_may_be_a_key_is_looked_up() -> None:
    assert hash_if_key("ak_short") is None and hash_if_key("") is None and hash_if_key("ak_" + "é" * 43) is None
    assert hash_if_key("ak_" + "A" * 43) is not None


async def test_a_key_from_another_process_counts_at_once(tmp_path: Path) -> None:
    code = "import sys; from coordinator.keys import create_key; print(create_key(sys.argv[1]))"
    async with coordinator(tmp_path, island()) as running:
        made = subprocess.run([sys.executable, "-c", code, running.database_url], capture_output=True, text=True)
        async with http(running, made.stdout.strip()) as client:
            assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200


def test_a_minute_is_counted_from_its_first_request() -> None:
    window = PerMinute()
    standings = [window.count("a", 2, now_s) for now_s in (10.0, 20.0, 69.9, 70.0)]
    assert [(s.allowed, s.remaining) for s in standings] == [(True, 1), (True, 0), (False, 0), (True, 1)]
    assert standings[1].reset_s == 50.0
    assert standings[2].headers() == {
        "X-RateLimit-Limit": "2",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "1",
        "Retry-After": "1",
    }
    for number in range(TRACKED_MAX + 5):
        window.count(number, 2, 100.0)
    assert len(window) == TRACKED_MAX


async def test_a_keys_request_limit(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        limited = create_key(running.database_url, rate_limit_per_minute=3)
        async with http(running, limited) as client:
            answers = [await client.get("/v1/models") for _ in range(4)]
            stream = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
        async with http(running) as client:
            assert "x-ratelimit-limit" not in (await client.get("/v1/models")).headers
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    assert 0 < int(answers[3].headers["retry-after"]) <= 60 and stream.status_code == 429
    assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"


async def test_wrong_keys_of_an_address_are_limited_and_right_ones_pass(tmp_path: Path) -> None:
    async with coordinator(tmp_path, island()) as running:
        async with http(running, "ak_" + "B" * 43) as client:
            statuses = [(await client.get("/v1/models")).status_code for _ in range(7)]
            blocked = await client.get("/v1/models")
        async with http(running) as client:
            good = await client.get("/v1/models")
        async with http(running, "") as client:
            missing = await client.get("/v1/models")
    assert statuses == [401] * 5 + [429] * 2
    assert 0 < int(blocked.headers["retry-after"]) <= 60 and blocked.json()["error"]["code"] == "rate_limit_exceeded"
    assert good.status_code == 200 and missing.status_code == 401


@pytest.mark.parametrize(
    ("proxies", "header", "limited_together"),
    [
        ((), "10.9.9.{}", True),  # nobody is trusted: the header means nothing
        (("127.0.0.0/8",), "10.9.9.{}", False),
        (("127.0.0.1",), "6.6.6.{}, 10.9.9.9", True),  # what the client put in front of the proxy's word is its own
        (("127.0.0.1", "10.9.9.9"), "6.6.6.{}, 10.9.9.9", False),
        (("127.0.0.1",), "{} nonsense", True),
    ],
)
async def test_forwarded_addresses_count_only_from_trusted_proxies(
    tmp_path: Path, proxies: tuple[str, ...], header: str, limited_together: bool
) -> None:
    async with (
        coordinator(tmp_path, island(), trusted_proxies=proxies) as running,
        httpx.AsyncClient(base_url=running.url, headers={"Authorization": "Bearer wrong"}) as client,
    ):
        statuses = [
            (await client.get("/v1/models", headers={"X-Forwarded-For": header.format(number)})).status_code
            for number in range(8)
        ]
    assert statuses == ([401] * 5 + [429] * 3 if limited_together else [401] * 8)
