"""What an account holder sees and changes over HTTP: his own, all of it, and nothing of anybody else's."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
import trio

from coordinator.books.accounts import DAY_MS, CreateAccount, GrantCredits, LimitAccount, PairIsland, SetPublisher
from coordinator.books.audit import audit
from coordinator.books.errors import BooksUnavailable
from coordinator.books.ledger import Move, PlaceHold, TransferKind, user
from coordinator.books.queries import key_of
from coordinator.http.auth import USED_WRITTEN_S
from coordinator.keys import GRACE_S, KEYS_PER_ACCOUNT_MAX, ApiKey
from coordinator.statement import PAGE_LINES
from tests.coordinator.accounts_api import BOTH, TODAY_MS, Served, do, peer, run_job, serving

READ, WRITE = frozenset({"read"}), frozenset({"write"})
HOUR_MS = 3_600_000


async def error_of(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> tuple[int, str, str | None]:
    answer = await client.request(method, path, **more)
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert answer.headers["x-request-id"] and answer.headers["content-type"] == "application/json"
    return answer.status_code, body["error"]["code"], body["error"]["param"]


async def test_an_account(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        do(
            served.database,
            LimitAccount("ann", 600),
            PairIsland(peer(1), "ann"),
            PlaceHold("hold", user("ann"), 250_000, TODAY_MS + 1000),
            CreateAccount("bob"),
        )
        run_job(served.database, "job", "bob", (peer(1), 1_500), compute_ms=40 * 60_000)
        answer = await client.get("/account")
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-ratelimit-limit"] == "600"
        assert answer.json() == {
            "object": "account",
            "id": "ann",
            "name": "ann",
            "credits": "9999.75",
            "credits_posted": "10000",
            "credits_held": "0.25",
            "credits_in_escrow": "0.0015",
            "credits_earned": "0.0015",
            "karma": 1.0,
            "islands": 1,
            "islands_earning": 0,
            "rate_limit_per_minute": 600,
            "created_at": "2024-10-04T01:00:00.000Z",
        }


async def test_the_refill_of_the_day_comes_before_the_figures(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        run_job(served.database, "job", "ann", (peer(1), 400_000))
        assert (await client.get("/account")).json()["credits"] == "9999.6"
        served.clock.ms += DAY_MS
        answers = [(await client.get("/account")).json()["credits"] for _ in range(3)]
        kinds = [line["kind"] for line in (await client.get("/account/statement")).json()["data"]]
        served.clock.ms -= 5 * DAY_MS  # a clock that is set back refills nothing
        assert (await client.get("/account")).json()["credits"] == "10000"
    assert answers == ["10000"] * 3 and kinds == ["grant", "charge", "refill"]


async def test_scopes(database_url: str) -> None:
    async with serving(database_url) as served:
        read, write = served.key(scopes=READ), served.key(scopes=WRITE)
        async with served.client(read) as client:
            for path in ("/account", "/account/statement", "/islands"):
                assert (await client.get(path)).status_code == 200, path
            for method, path in (("GET", "/api-keys"), ("POST", "/api-keys"), ("DELETE", "/api-keys/1"), ("POST", "/api-keys/1/rotate")):
                assert await error_of(client, method, path) == (403, "insufficient_scope", None)
        async with served.client(write) as client:
            for path in ("/account", "/account/statement", "/islands", f"/islands/{peer(1)}/karma"):
                assert await error_of(client, "GET", path) == (403, "insufficient_scope", None)
        async with served.client("") as client:
            for path in ("/account", "/account/statement", "/islands", "/api-keys"):
                assert (await error_of(client, "GET", path))[:2] == (401, "invalid_api_key")


async def test_a_statement_has_every_transfer_and_balances_that_follow(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        do(served.database, PairIsland(peer(1), "ann"), CreateAccount("bob"), SetPublisher("echo", "ann", 100_000))
        run_job(served.database, "job-1", "ann", (peer(2), 1_000), now_ms=TODAY_MS + 1000)
        run_job(served.database, "job-2", "bob", (peer(2), 50_000), now_ms=TODAY_MS + 2000)
        do(served.database, GrantCredits("ann", 123_456, "grant:1"), now_ms=TODAY_MS + 3000)
        answer = await client.get("/account/statement")
        assert answer.headers["content-disposition"] == 'attachment; filename="statement-ann.json"'
        body = answer.json()
        lines = [(line["kind"], line["job"], line["amount"], line["balance"]) for line in body["data"]]
        assert lines == [
            ("grant", None, "10000", "10000"),
            ("charge", "job-1", "-0.0009", "9999.9991"),  # the publisher's own part is not moved
            ("earning", "job-2", "0.005", "10000.0041"),
            ("grant", None, "0.123456", "10000.127556"),
        ]
        assert (body["opening_balance"], body["closing_balance"], body["next_cursor"]) == ("0", "10000.127556", None)
        assert body["closing_balance"] == (await client.get("/account")).json()["credits_posted"]
        assert body["data"][1]["time"] == "2024-10-04T01:00:01.000Z"
        with served.database.snapshot() as connection:
            assert audit(connection) == []


async def test_a_statement_as_csv(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key("a/b:c@d")) as client:
        run_job(served.database, "job-1", "a/b:c@d", (peer(2), 1_000), now_ms=TODAY_MS + 1000)
        answer = await client.get("/account/statement", params={"format": "csv"})
        assert answer.headers["content-type"] == "text/csv; charset=utf-8" and answer.headers["x-request-id"]
        assert answer.headers["content-disposition"] == 'attachment; filename="statement-a_b_c_d.csv"'
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert list(rows[0]) == ["time", "kind", "job", "amount", "balance", "id"]
        assert [(row["kind"], row["job"], row["amount"]) for row in rows] == [("grant", "", "10000"), ("charge", "job-1", "-0.001")]
        plain = (await client.get("/account/statement")).json()["data"]
        assert [{**line, "job": line["job"] or ""} for line in plain] == rows


def _many_lines(served: Served, count: int) -> None:
    """Grants and charges of 1, 2, 3… micro-credits, ten in the same millisecond."""
    for number in range(1, count + 1):
        change = GrantCredits("ann", number, f"grant:{number:06}") if number % 3 else pay("ann", number, f"pay:{number:06}")
        do(served.database, change, now_ms=TODAY_MS + number // 10)


def pay(account: str, amount: int, id: str) -> Move:
    return Move(id, user(account), user("shop"), amount, TransferKind.TRANSFER)


async def test_pages_of_a_statement_are_the_whole(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        _many_lines(served, 60)
        whole = (await client.get("/account/statement")).json()["data"]
        assert len(whole) == 61
        for size in (1, 7, 61, 100):
            pages: list[dict[str, Any]] = []
            at: str | None = ""
            while at is not None:
                answer = await client.get("/account/statement", params={"limit": size} | ({"cursor": at} if at else {}))
                body = answer.json()
                assert len(body["data"]) <= size and answer.headers.get("x-next-cursor") == body["next_cursor"]
                assert body["opening_balance"] == (pages[-1]["balance"] if pages else "0")
                pages += body["data"]
                at = body["next_cursor"]
            assert pages == whole, size


async def test_a_long_statement_is_streamed_page_by_page(tmp_path: Any) -> None:
    async with serving(f"sqlite:///{tmp_path / 'c.db'}") as served, served.client(served.key()) as client:
        with served.database.writing() as connection:
            connection.exec_driver_sql(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) INSERT INTO transfers "
                f"SELECT 'x' || i, 'system:issue', 'user:ann', 1, 'grant', '', {TODAY_MS} + i / 7 FROM n"
            )
        async with client.stream("GET", "/account/statement") as answer:
            assert answer.headers["transfer-encoding"] == "chunked"
            lines = json.loads(await answer.aread())["data"]
        assert len(lines) == 2501 > 2 * PAGE_LINES
        assert lines[-1]["balance"] == "10000.0025" and len({line["id"] for line in lines}) == 2501
        rows = (await client.get("/account/statement", params={"format": "csv"})).text.splitlines()
        assert len(rows) == 2502


async def test_a_statement_of_some_days(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        for day in range(4):
            do(served.database, GrantCredits("ann", 1_000_000, f"grant:{day}"), now_ms=TODAY_MS + day * DAY_MS)
        served.clock.ms += 4 * DAY_MS

        async def ids(**params: str) -> tuple[str, list[str], str]:
            body = (await client.get("/account/statement", params=params)).json()
            return body["opening_balance"], [line["id"] for line in body["data"]][-9:], body["closing_balance"]

        assert await ids(since="2024-10-05") == ("10001", ["grant:1", "grant:2", "grant:3"], "10004")
        assert await ids(since="2024-10-05T01:00:00Z", until="2024-10-06T01:00:00Z") == ("10001", ["grant:1"], "10002")
        assert await ids(since="2024-10-05T01:00:00.001") == ("10002", ["grant:2", "grant:3"], "10004")
        assert await ids(since="2024-10-05T03:00:00+02:00", until="2024-10-05T01:00:00.001Z") == ("10001", ["grant:1"], "10002")
        assert await ids(since="2030-01-01") == ("10004", [], "10004")
        assert await ids(since="2024-10-06", until="2024-10-05") == ("10002", [], "10002")


def cursor(plain: str) -> str:
    return base64.urlsafe_b64encode(plain.encode()).rstrip(b"=").decode()


BAD_QUERIES = {
    "format": ["xml", "", "csv'; DROP TABLE transfers; --", "\0"],
    "since": ["yesterday", "", "2024-13-01", "1969-12-31", "' OR 1=1 --", "2024-10-05' OR '1'='1", "٢٠٢٤-١٠-٠٥", "9" * 400, "1e9", "-1"],
    "until": ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "NaN", "\0"],
    "limit": ["0", "-1", "1001", "1e3", "9" * 5000, "٣", "²", "", "1.5", "0x10", "1; DROP TABLE transfers", "\0"],
    "cursor": ["", "x", "=", "é", "A" * 600, *map(cursor, ("", "16", "12:", "1:a", "x:0:a", "1:2:a", "-1:0:a", "٣:0:a", "1:0:", "1:0:\0"))],
}


async def test_bad_queries_of_a_statement(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        for name, values in BAD_QUERIES.items():
            for value in values:
                got = await error_of(client, "GET", "/account/statement", params={name: value})
                assert got == (400, "invalid_value", name), (name, value)
        hostile = cursor("1:0:x'; DROP TABLE transfers; --")
        assert len((await client.get("/account/statement", params={"cursor": hostile})).json()["data"]) == 1


async def test_keys_are_made_listed_rotated_and_revoked(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        made = await client.post("/api-keys", json={"name": "laptop", "scopes": ["read"], "rate_limit_per_minute": 5})
        assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
        body = made.json()
        key = body.pop("key")
        assert body == {
            "object": "api_key",
            "id": 2,
            "name": "laptop",
            "hint": key[:7],
            "scopes": ["read"],
            "rate_limit_per_minute": 5,
            "state": "valid",
            "created_at": "2024-10-04T01:00:00.000Z",
            "last_used_at": None,
            "revoked_at": None,
        }
        async with served.client(key) as other:
            assert (await other.get("/account")).status_code == 200
        listed = (await client.get("/api-keys")).json()["data"]
        assert [entry["id"] for entry in listed] == [1, 2] and all("key" not in entry for entry in listed)
        assert listed[1]["last_used_at"] == "2024-10-04T01:00:00.000Z"
        rotated = (await client.post("/api-keys/2/rotate")).json()
        assert (rotated["id"], rotated["name"], rotated["scopes"], rotated["rate_limit_per_minute"]) == (3, "laptop", ["read"], 5)
        async with served.client(key) as other:
            assert (await other.get("/account")).status_code == 200  # for a day
            gone = (await client.delete("/api-keys/2")).json()
            assert gone["state"] == "revoked" and (await client.delete("/api-keys/2")).json() == gone
            assert (await other.get("/account")).status_code == 401
        states = [entry["state"] for entry in (await client.get("/api-keys")).json()["data"]]
    assert states == ["valid", "revoked", "valid"]


async def test_a_rotated_key_counts_until_its_time_is_over(database_url: str) -> None:
    async with serving(database_url) as served:
        key = served.key()
        async with served.client(key) as client:
            made = await client.post("/api-keys/1/rotate", json={"grace_s": 60})
            assert made.status_code == 201
            assert (await client.get("/api-keys")).json()["data"][0]["state"] == "ending"
            served.clock.ms += 59_000
            assert (await client.get("/account")).status_code == 200
            served.clock.ms += 4_000  # what was remembered of it, too
            assert (await client.get("/account")).status_code == 401
        async with served.client(made.json()["key"]) as client:
            assert (await client.get("/account")).status_code == 200
            assert await error_of(client, "POST", "/api-keys/1/rotate") == (409, "key_ended", None)


async def test_a_key_that_revokes_itself_is_out_at_once(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        assert (await client.delete("/api-keys/1")).status_code == 200
        assert (await client.get("/account")).status_code == 401


async def test_no_key_makes_one_that_may_do_more(database_url: str) -> None:
    refused = (403, "insufficient_scope", None)
    async with serving(database_url) as served:
        served.key()  # 1: may do everything
        async with served.client(served.key(scopes=WRITE)) as client:
            assert await error_of(client, "POST", "/api-keys", json={"scopes": ["read", "write"]}) == refused
            assert await error_of(client, "POST", "/api-keys", json={"scopes": ["read"]}) == refused
            assert await error_of(client, "POST", "/api-keys/1/rotate") == refused
            assert (await client.post("/api-keys", json={})).json()["scopes"] == ["write"]
        async with served.client(served.key(limit=10)) as client:
            for limit in (0, 11):
                assert await error_of(client, "POST", "/api-keys", json={"rate_limit_per_minute": limit}) == refused
            assert await error_of(client, "POST", "/api-keys/1/rotate") == refused
            assert (await client.post("/api-keys", json={"rate_limit_per_minute": 9})).status_code == 201
            assert (await client.post("/api-keys", content=b"")).json()["rate_limit_per_minute"] == 10


async def test_keys_and_islands_of_others_do_not_exist(database_url: str) -> None:
    async with serving(database_url) as served:
        bobs = served.key("bob")
        do(served.database, PairIsland(peer(1), "bob"))
        async with served.client(served.key("ann")) as client:
            for key_id in ("1", "99", "0", "2147483647", "2147483648", "9" * 400, "-1", "1e0", "٣", "x", "%00", "1%27%20OR%201=1"):
                assert (await error_of(client, "DELETE", f"/api-keys/{key_id}"))[:2] == (404, "unknown_key"), key_id
                assert (await error_of(client, "POST", f"/api-keys/{key_id}/rotate"))[:2] == (404, "unknown_key"), key_id
            for name in (peer(1), peer(2), "x", "%00", "'%20OR%20'1'='1", "é" * 50, "1" * 5000):
                got = await error_of(client, "GET", f"/islands/{name}/karma")
                assert got[:2] == (404, "unknown_island"), name
            assert (await client.get("/islands")).json() == {"data": []}
            assert [entry["id"] for entry in (await client.get("/api-keys")).json()["data"]] == [2]
        async with served.client(bobs) as client:
            assert (await client.get("/account")).status_code == 200


BAD_KEYS: list[tuple[Any, str | None]] = [
    ({"name": 3}, "name"),
    ({"name": "x" * 129}, "name"),
    ({"name": "two\nlines"}, "name"),
    ({"name": "nul\0"}, "name"),
    (b'{"name": "\\ud800"}', "name"),
    ({"scopes": "read"}, "scopes"),
    ({"scopes": []}, "scopes"),
    ({"scopes": ["admin"]}, "scopes"),
    ({"scopes": [["read"]]}, "scopes"),
    ({"scopes": ["read'; DROP TABLE api_keys; --"]}, "scopes"),
    ({"rate_limit_per_minute": -1}, "rate_limit_per_minute"),
    ({"rate_limit_per_minute": 1.5}, "rate_limit_per_minute"),
    ({"rate_limit_per_minute": True}, "rate_limit_per_minute"),
    ({"rate_limit_per_minute": "5"}, "rate_limit_per_minute"),
    ({"rate_limit_per_minute": 10**30}, "rate_limit_per_minute"),
    (b'{"rate_limit_per_minute": 1e400}', "rate_limit_per_minute"),
    (b'{"rate_limit_per_minute": NaN}', None),
    (b"[]", None),
    (b"{", None),
    (b'{"rate_limit_per_minute": ' + b"9" * 5000 + b"}", None),
]


async def test_bad_wishes_for_keys(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        for body, param in BAD_KEYS:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            status, code, got = await error_of(client, "POST", "/api-keys", content=raw)
            assert (status, got) == (400, param) and code, body
        for grace in (b"-1", b"1e9", b'"x"', b"true", b"[]", b"1e400", b"9" * 400):
            status, _, param = await error_of(client, "POST", "/api-keys/1/rotate", content=b'{"grace_s": %b}' % grace)
            assert (status, param) == (400, "grace_s"), grace
        assert len((await client.get("/api-keys")).json()["data"]) == 1
        hostile = "'); DROP TABLE api_keys; -- %s :x \\ \""
        assert (await client.post("/api-keys", json={"name": hostile})).json()["name"] == hostile
        assert (await client.get("/api-keys")).json()["data"][1]["name"] == hostile


async def test_too_many_keys(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        for _ in range(KEYS_PER_ACCOUNT_MAX - 1):
            served.keys.create(ApiKey(0, "ann", BOTH, 0))
        assert await error_of(client, "POST", "/api-keys", json={}) == (409, "too_many_keys", None)


async def test_islands_and_their_karma(database_url: str) -> None:
    async with serving(database_url) as served, served.client(served.key()) as client:
        do(served.database, PairIsland(peer(1), "ann"), CreateAccount("bob"))
        for number in range(7):  # of 2 hours each; below the threshold they count half as much again
            run_job(served.database, f"job-{number}", "bob", (peer(1), 1000), compute_ms=2 * HOUR_MS, now_ms=TODAY_MS + number)
        run_job(served.database, "own", "ann", (peer(1), 1000), compute_ms=HOUR_MS, now_ms=TODAY_MS + 100)
        (island,) = (await client.get("/islands")).json()["data"]
        assert island == {
            "object": "island",
            "peer": peer(1),
            "approved": False,
            "karma": 18.0,  # 4 × 3 reach the threshold, 3 × 2 follow
            "is_earning": True,
            "pending_minutes": 0.0,
            "compute_hours": 14.0,
            "jobs_succeeded": 7,
            "jobs_failed": 0,
            "credits_earned": "0.007",
            "credits_in_escrow": "0",
            "first_seen_at": "2024-10-04T01:00:00.000Z",
        }
        account = (await client.get("/account")).json()
        assert (account["credits"], account["islands_earning"], account["karma"]) == ("10000.007", 1, 18.0)
        kinds = [(line["kind"], line["amount"]) for line in (await client.get("/account/statement")).json()["data"][1:]]
        assert kinds == [("escrow", "0.004"), *[("earning", "0.001")] * 3]
        first = (await client.get(f"/islands/{peer(1)}/karma", params={"limit": 4})).json()
        rest = (await client.get(f"/islands/{peer(1)}/karma", params={"cursor": first["next_cursor"]})).json()
        assert first["island"] == island and rest["next_cursor"] is None
        events = first["data"] + rest["data"]
        assert [event["job"] for event in events] == [f"job-{number}" for number in reversed(range(7))]
        assert [event["karma"] for event in events] == [18, 16, 14, 12, 9, 6, 3] and events[0]["delta"] == 2
        assert await error_of(client, "GET", f"/islands/{peer(1)}/karma", params={"limit": "x"}) == (400, "invalid_value", "limit")
        with served.database.snapshot() as connection:
            assert audit(connection) == []


async def test_last_use_is_written_once_a_minute_and_at_the_end(database_url: str) -> None:
    async with serving(database_url) as served:
        key = served.key()
        async with served.client(key) as client:
            for _ in range(3):
                served.clock.ms += 1
                assert (await client.get("/account")).status_code == 200
            with served.database.reading() as connection:
                assert key_of(connection, 1).last_used_at_ms is None  # type: ignore[union-attr]
        served.gate.close()
        with served.database.reading() as connection:
            assert key_of(connection, 1).last_used_at_ms == TODAY_MS + 3  # type: ignore[union-attr]
    assert USED_WRITTEN_S >= 60


async def test_what_could_not_be_written_of_last_use_is_written_later(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.http.auth.USED_WRITTEN_S", 0.01)
    token, written, tries = trio.lowlevel.current_trio_token(), trio.Event(), 0
    async with serving(f"sqlite:///{tmp_path / 'c.db'}") as served, served.client(served.key()) as client:
        note_used = served.keys.note_used

        def fails_once(used_at_ms: Mapping[int, int]) -> None:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise BooksUnavailable("as the test says")
            note_used(used_at_ms)
            trio.from_thread.run_sync(written.set, trio_token=token)

        monkeypatch.setattr(served.keys, "note_used", fails_once)
        assert (await client.get("/account")).status_code == 200
        with trio.fail_after(30):
            await written.wait()
        with served.database.reading() as connection:
            assert key_of(connection, 1).last_used_at_ms == TODAY_MS  # type: ignore[union-attr]
    assert tries == 2


async def test_a_database_that_is_away_ends_neither_requests_nor_the_gate(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise BooksUnavailable("as the test says")

    async with serving(f"sqlite:///{tmp_path / 'c.db'}") as served, served.client(served.key()) as client:
        assert (await client.get("/account")).status_code == 200
        with monkeypatch.context() as broken:
            broken.setattr(served.database, "reading", away)
            for path in ("/account", "/account/statement", "/islands", "/api-keys"):
                answer = await client.get(path)
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0, path
            served.clock.ms += 10_000  # nobody remembers the key any more
            assert (await client.get("/account")).status_code == 503
        assert (await client.get("/account")).status_code == 200
        monkeypatch.setattr(served.keys, "note_used", away)


def test_the_grace_is_a_day() -> None:
    assert GRACE_S == 24 * 3600
