"""File batches over HTTP: what comes of good lines, bad lines and bad files; ended early, limited, and asked for in all ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from coordinator.books.ledger import escrow
from coordinator.books.schema import runs
from coordinator.cache.policy import CacheConfig
from coordinator.keys import create_key
from protocol import limits
from protocol.errors import Code
from protocol.prices import Ask, format_credits
from tests.coordinator.clients import http
from tests.coordinator.desks import CREDIT, balance, error_of, funds, opened, rows, set_funds, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.coordinator.file_desk import (
    BATCHES,
    CHAT,
    FILES,
    batch_of,
    begun,
    chat_line,
    content,
    file_of,
    jsonl,
    lines_in,
    over,
    said,
    shown,
)
from tests.coordinator.test_embeddings_http import maker

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100)
VOLATILE = ("id", "created", "metadata", "system_fingerprint")  # of an answer


async def test_a_bad_line_in_the_middle_is_told_by_its_line_and_the_rest_runs(database_url: str) -> None:
    lines: list[Any] = [chat_line(f"q-{index}", f"words of {index}") for index in range(12)]
    lines[2] = "this is not JSON"
    lines[4] = {"method": "POST", "url": CHAT, "body": {}}
    lines[5] = chat_line("q-1", "the same name again")
    lines[7] = chat_line("q-7", "elsewhere", url="/v1/embeddings")
    lines[8] = chat_line("q-8", "hot", temperature=9)
    lines[9] = chat_line("q-9", "flowing", stream=True)
    lines[10] = chat_line("q-10", "lost", model="nobody-has-this")
    async with opened(database_url, island(ask=ASK)) as running:
        batch = await over(running, await batch_of(running, lines))
        assert batch["status"] == "completed" and batch["request_counts"] == {"total": 12, "completed": 5, "failed": 7}
        assert [(each["line"], each["code"], each["param"]) for each in batch["errors"]["data"]] == [
            (3, "invalid_json_line", None),
            (5, "missing_required_parameter", "custom_id"),
            (6, "duplicate_custom_id", "custom_id"),
            (8, "url_mismatch", "url"),
        ]
        output = await lines_in(running, batch["output_file_id"])
        assert [(line["custom_id"], said(line)) for line in output] == [(f"q-{i}", f"words of {i}") for i in (0, 1, 3, 6, 11)]
        errors = await lines_in(running, batch["error_file_id"])
        assert [line["custom_id"] for line in errors] == [None, None, "q-1", "q-7", "q-8", "q-9", "q-10"]
        assert [line["error"]["line"] for line in errors[:4]] == [3, 5, 6, 8]
        told = [(line["response"]["status_code"], line["response"]["body"]["error"]) for line in errors[4:]]
        assert [(status, error["code"], error["param"]) for status, error in told] == [
            (400, "invalid_value", "temperature"),
            (400, "unsupported_parameter", "stream"),
            (404, "model_not_found", "model"),
        ]
        assert all(set(line) == {"id", "custom_id", "response", "error"} for line in output + errors)
        assert len({line["id"] for line in output + errors}) == 12
        assert await funds(running) == (ALL - 5 * ASK.per_job, 0) and batch["price"] == format_credits(5 * ASK.per_job)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "one two three"}], "n": 2, "seed": 5}),
        (CHAT, {"messages": [{"role": "user", "content": "explain yourself"}], "explain": True, "bid_price": "0.5", "policy": "eu"}),
        ("/v1/completions", {"prompt": ["one two", "three"], "echo": True, "max_tokens": 2}),
        ("/v1/completions", {"prompt": "one two three", "max_tokens": 2, "priority": 7}),
    ],
)
async def test_answers_are_the_endpoints_own(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    body = {"model": "echo", **body}
    one = island(ask=ASK)
    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        running.port.advertise(one, region="de-berlin")
        plain = (await client.post(path, json=body)).json()
        batch = await over(running, await batch_of(running, [{"custom_id": "a", "url": path, "body": body}], endpoint=path))
        (line,) = await lines_in(running, batch["output_file_id"])
        answer = line["response"]["body"]
        assert {name: value for name, value in answer.items() if name not in VOLATILE} == {
            name: value for name, value in plain.items() if name not in VOLATILE
        }
        assert answer["id"].endswith(f"{batch['id']}.0.0") and list(answer) == list(plain)
        for found in (answer, plain):
            found["metadata"].pop("job_id")
            found["metadata"].get("placement", {}).pop("considered", None)
        assert set(answer["metadata"]) == set(plain["metadata"]) and answer["metadata"]["price"] == plain["metadata"]["price"]
        assert (batch["usage"]["input_tokens"], batch["usage"]["output_tokens"]) == (
            plain["usage"]["prompt_tokens"],
            plain["usage"]["completion_tokens"],
        )


async def test_embeddings(tmp_path: Path) -> None:
    path, body = "/v1/embeddings", {"model": "vectors", "input": ["one", "two"]}
    lines = [{"custom_id": "a", "url": path, "body": body}, {"custom_id": "b", "url": path, "body": {**body, "input": []}}]
    async with opened(url_of(tmp_path), maker()) as running, http(running) as client:
        plain = (await client.post(path, json=body)).json()
        batch = await over(running, await batch_of(running, lines, endpoint=path))
        (line,) = await lines_in(running, batch["output_file_id"])
        assert line["response"]["body"]["data"] == plain["data"] and line["response"]["body"]["usage"] == plain["usage"]
        (wrong,) = await lines_in(running, batch["error_file_id"])
        assert wrong["response"]["body"]["error"]["code"] == "empty_array"
        assert batch["usage"]["input_tokens"] == plain["usage"]["prompt_tokens"]


async def test_inputs_for_any_cargo(tmp_path: Path) -> None:
    """Ours: lines are bodies of ``POST /api/v1/jobs``, and what they come to is what ``/output`` says."""
    path, one = "/api/v1/jobs", maker()
    texts = island(2, ask=ASK)
    bodies: list[dict[str, Any]] = [
        {"cargo": "vectors", "input": {"input": "one", "task": "embeddings"}, "priority": 3},
        {"workload": "echo", "input": {"prompt": "one two"}},
        {"cargo": "echo", "input": "no object"},
        {"cargo": "echo", "input": {"prompt": "x"}, "stream": True},
    ]
    lines = [{"custom_id": str(number), "url": path, "body": body} for number, body in enumerate(bodies)]
    async with opened(url_of(tmp_path), one, texts) as running:
        batch = await over(running, await batch_of(running, lines, endpoint=path, max_parallelism=1))
        vectors, text = (line["response"]["body"] for line in await lines_in(running, batch["output_file_id"]))
        assert vectors["output"]["result"]["task"] == "embeddings" and vectors["state"] == text["state"] == "succeeded"
        assert text["output"] == {
            "text": "one two",
            "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "credits_used": format_credits(ASK.per_job)},
        }
        errors = await lines_in(running, batch["error_file_id"])
        assert [line["response"]["body"]["error"]["param"] for line in errors] == ["input", "stream"]


async def test_no_more_lines_at_once_than_its_account_wants(tmp_path: Path) -> None:
    one = island(1, Script(token_s=0.002), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        lines = [chat_line(str(number), "one two") for number in range(20)]
        assert (await over(running, await batch_of(running, lines, max_parallelism=3)))["request_counts"]["completed"] == 20
        assert one.open_max == 3


async def test_lines_whose_jobs_fail_say_why_and_cost_nothing(tmp_path: Path) -> None:
    ends = Script(fail_after=1, failure=Code.CARGO_FAILED)
    async with opened(url_of(tmp_path), island(1, ends, ask=ASK)) as running:
        batch = await over(running, await batch_of(running, [chat_line("a", "one two")]))
        assert batch["status"] == "completed" and batch["output_file_id"] is None
        (line,) = await lines_in(running, batch["error_file_id"])
        assert line["response"]["status_code"] == 422 and line["response"]["body"]["error"]["code"] == "cargo_failed"
        assert batch["request_counts"] == {"total": 1, "completed": 0, "failed": 1} and await funds(running) == (ALL, 0)


async def test_an_account_without_credit(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(ask=ASK)) as running:
        await set_funds(running, 250)
        lines = [chat_line(str(number), "one", bid_price="0.0001") for number in range(4)]
        batch = await over(running, await batch_of(running, lines))
        assert batch["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
        for line in await lines_in(running, batch["error_file_id"]):
            assert line["response"]["status_code"] == 402
            assert line["response"]["body"]["error"]["code"] == "insufficient_credits"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"\n  \n\r\n", "empty_file"),
        (jsonl(chat_line(str(number), "x") for number in range(6)), "too_many_tasks"),
    ],
)
async def test_files_that_are_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, code: str) -> None:
    monkeypatch.setattr(limits, "FILE_LINES_MAX", 5)
    async with opened(url_of(tmp_path), island()) as running:
        batch = await over(running, await batch_of(running, data))
        assert batch["status"] == "failed" and batch["failed_at"] and batch["completed_at"] is None
        (error,) = batch["errors"]["data"]
        assert error["code"] == code and error["param"] == "input_file_id" and error["line"] is None and error["message"]
        assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)
        assert await rows(running) == []


async def test_a_file_of_nothing_but_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_BATCH_ERRORS_SHOWN_MAX", 2)
    async with opened(url_of(tmp_path), island()) as running:
        batch = await over(running, await batch_of(running, b"a\nb\nc\n"))
        assert batch["status"] == "failed" and batch["request_counts"]["total"] == 3
        assert [(each["line"], each["code"]) for each in batch["errors"]["data"]] == [(1, "invalid_json_line"), (2, "invalid_json_line")]


async def test_files_that_are_not_there_or_not_for_that(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        data = jsonl([chat_line("a", "b")])
        gone, wrong = await file_of(running, data), await file_of(running, data, purpose="user_data")
        other = create_key(running.database_url, "other")
        async with http(running) as client:
            await client.delete(f"{FILES}/{gone}")
        theirs = await file_of(Running(running.server, running.port, other, running.database_url), data)
        cases = ((gone, "file_not_found"), ("file-none", "file_not_found"), (theirs, "file_not_found"), (wrong, "invalid_file_purpose"))
        for file_id, code in cases:
            batch = await over(running, (await begun(running, file_id)).json()["id"])
            assert batch["status"] == "failed" and [each["code"] for each in batch["errors"]["data"]] == [code]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "\0"}, "input_file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(number): "v" for number in range(17)}}, "metadata"),
        ({"output_expires_after": 5}, "output_expires_after"),
        ({"max_parallelism": 0}, "max_parallelism"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
async def test_bodies_that_are_wrong(tmp_path: Path, changes: dict[str, Any], param: str) -> None:
    async with opened(url_of(tmp_path)) as running:
        response = await begun(running, "file-1", **changes)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


async def test_who_may_see_and_end_a_batch(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running, http(running, create_key(running.database_url, "other")) as client:
        batch = await over(running, await batch_of(running, [chat_line("a", "b")]))
        for path in (f"{BATCHES}/{batch['id']}", f"{BATCHES}/batch_none", f"{BATCHES}/%00"):
            error_of(await client.get(path), 404, "batch_not_found")
        error_of(await client.post(f"{BATCHES}/{batch['id']}/cancel"), 404, "batch_not_found")
        error_of(await client.get(f"{FILES}/{batch['output_file_id']}/content"), 404, "file_not_found")
        assert (await client.get(BATCHES)).json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        reader = create_key(running.database_url, scopes=("read",))
        async with http(running, reader) as looking:
            error_of(await looking.post(f"{BATCHES}/{batch['id']}/cancel"), 403, "insufficient_scope")


async def test_lists_go_on_where_the_last_one_ended(database_url: str) -> None:
    async with opened(database_url, island()) as running, http(running) as client:
        ids = [(await over(running, await batch_of(running, [chat_line("a", "b")])))["id"] for _ in range(3)]
        newest = [each["id"] for each in (await client.get(BATCHES)).json()["data"]]
        assert sorted(newest) == sorted(ids)
        page = (await client.get(BATCHES, params={"limit": 2})).json()
        assert ([each["id"] for each in page["data"]], page["has_more"], page["last_id"]) == (newest[:2], True, newest[1])
        page = (await client.get(BATCHES, params={"limit": 2, "after": newest[1]})).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (newest[2:], False)
        error_of(await client.get(BATCHES, params={"limit": 101}), 400, "invalid_value", "limit")


async def test_a_request_that_comes_again_makes_no_second_batch(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        file_id = await file_of(running, jsonl([chat_line("a", "b")]))
        first = (await begun(running, file_id)).json()["id"]
        assert (await begun(running, file_id, {"x-stainless-retry-count": "1"})).json()["id"] == first
        assert (await begun(running, file_id)).json()["id"] != first
        key = {"Idempotency-Key": "mine"}
        named = (await begun(running, file_id, key)).json()["id"]
        assert (await begun(running, file_id, key)).json()["id"] == named
        error_of(await begun(running, file_id, key, metadata={"another": "request"}), 422, "idempotency_key_reused")
        assert len(await rows(running)) == 0, "jobs of a batch are not among an account's own"


async def test_batches_under_way_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_BATCHES_OPEN_MAX", 1)
    hung = island(1, Script(hang_after=0))
    async with opened(url_of(tmp_path), hung) as running:
        await batch_of(running, [chat_line("a", "b")])
        error_of(await begun(running, "file-1"), 429, "too_many_batches")


async def ten_of(running: Running, hung: FakeIsland) -> str:
    """A batch of 10 lines of which 4 hang."""
    batch_id = await batch_of(running, [chat_line(f"q-{index}", f"one {index}") for index in range(10)])

    async def is_stuck() -> bool:
        return (await shown(running, batch_id))["request_counts"]["completed"] == 6 and hung.open_now == 4

    await until(is_stuck)
    return batch_id


async def test_what_is_done_when_it_is_cancelled_is_in_the_output(database_url: str) -> None:
    hung = island(1, Script(times=6), Script(hang_after=1), ask=ASK, slots_total=4, slots_free=4)
    async with opened(database_url, hung) as running, http(running) as client:
        batch_id = await ten_of(running, hung)
        batch = await shown(running, batch_id)
        assert batch["status"] == "in_progress" and batch["request_counts"]["total"] == 10 and batch["price"] == format_credits(600)
        assert batch["output_file_id"] is None and batch["usage"] is None and batch["in_progress_at"] >= batch["created_at"]
        batch = (await client.post(f"{BATCHES}/{batch_id}/cancel")).json()
        assert batch["status"] == "cancelled" and batch["cancelled_at"] >= batch["cancelling_at"] >= batch["created_at"]
        assert batch["request_counts"] == {"total": 10, "completed": 6, "failed": 0}
        output, errors = await lines_in(running, batch["output_file_id"]), await lines_in(running, batch["error_file_id"])
        assert len(output) == 6 and {said(line) for line in output} < {f"one {index}" for index in range(10)}
        assert [line["error"]["code"] for line in errors] == ["batch_cancelled"] * 4
        assert {line["custom_id"] for line in output + errors} == {f"q-{index}" for index in range(10)}
        assert (await client.post(f"{BATCHES}/{batch_id}/cancel")).json() == batch, "saying it again changes nothing"
        await until(lambda: hung.open_now == 0)
        assert await funds(running) == (ALL - 600, 0) and await balance(running, escrow(hung.peer)) == (600, 0)


async def test_a_batch_whose_time_is_over(tmp_path: Path) -> None:
    hung = island(1, Script(times=6), Script(hang_after=1), ask=ASK, slots_total=4, slots_free=4)
    async with opened(url_of(tmp_path), hung) as running:
        running.server._parts.file_batches.window_s = 1.0
        batch = await over(running, await ten_of(running, hung))
        assert batch["status"] == "expired" and batch["expired_at"] and batch["completed_at"] is None
        assert batch["request_counts"] == {"total": 10, "completed": 6, "failed": 0}
        assert len(await lines_in(running, batch["output_file_id"])) == 6
        errors = await lines_in(running, batch["error_file_id"])
        assert [line["error"]["code"] for line in errors] == ["batch_expired"] * 4
        assert await funds(running) == (ALL - 600, 0)


async def test_a_batch_that_is_not_kept_any_more_does_not_exist(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running, http(running) as client:
        batch = await over(running, await batch_of(running, [chat_line("a", "b")]))
        await running.server._parts.runs.forget(2**50)
        error_of(await client.get(f"{BATCHES}/{batch['id']}"), 404, "batch_not_found")
        assert (await client.get(BATCHES)).json()["data"] == []
        assert b"custom_id" in await content(running, batch["output_file_id"]), "its files have a time of their own"


async def test_nothing_new_while_it_drains(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        running.server._services.draining.set()
        error_of(await begun(running, "file-1"), 503, "draining")
        async with http(running) as client:
            error_of(await client.post(FILES, files={"file": b"x"}), 503, "draining")


async def test_requests_and_answers_are_sealed_at_rest(tmp_path: Path) -> None:
    words = "wombats wander westwards"
    async with opened(url_of(tmp_path), island()) as running:
        batch = await over(running, await batch_of(running, [chat_line("named-by-its-account", words)], metadata={"about": "wombats"}))
        assert words in (await content(running, batch["output_file_id"])).decode()

        def look(connection: sql.Connection) -> list[Any]:
            return [row for row in connection.execute(sql.select(runs.c.spec, runs.c.result, runs.c.name))]

        (row,) = await running.server.books.ask(look)
        assert row.spec and row.result and row.name == batch["input_file_id"]
    for file in tmp_path.glob("coordinator.db*"):
        for plain in (b"wombats", b"named-by-its-account", CHAT.encode()):
            assert plain not in file.read_bytes()


async def test_two_thousand_lines(tmp_path: Path) -> None:
    """Takes seconds: each of its jobs is held, settled and paid."""
    lines = [chat_line(f"q-{index}", f"question {index}") for index in range(2000)]
    one = island(1, ask=ASK, slots_total=128, slots_free=128)
    async with opened(url_of(tmp_path), one) as running:
        batch = await over(running, await batch_of(running, lines), timeout_s=60.0)
        assert batch["request_counts"] == {"total": 2000, "completed": 2000, "failed": 0}
        output = await lines_in(running, batch["output_file_id"])
        assert [(line["custom_id"], said(line)) for line in output] == [(f"q-{index}", f"question {index}") for index in range(2000)]
        assert one.open_max <= 128 and await funds(running) == (ALL - 2000 * ASK.per_job, 0)


async def test_lines_that_were_answered_before_cost_nothing(tmp_path: Path) -> None:
    one = island(ask=ASK)
    async with opened(url_of(tmp_path), one, cache=CacheConfig()) as running:
        lines = [chat_line(str(number), f"what was said {number % 2}", temperature=0) for number in range(6)]
        first = await over(running, await batch_of(running, lines))
        again = await over(running, await batch_of(running, lines))
        assert len(one.requests) == 2, "equal lines are one question, at once and later"
        assert (first["price"], again["price"]) == (format_credits(2 * ASK.per_job), "0")
        output = await lines_in(running, again["output_file_id"])
        assert [said(line) for line in output] == [f"what was said {number % 2}" for number in range(6)]
        for line in output:
            metadata = line["response"]["body"]["metadata"]
            assert (metadata["cache_hit"], metadata["cache_strategy"], metadata["price"]) == (True, "exact", "0")
            assert metadata["job_id"] == line["response"]["request_id"]
        assert await funds(running) == (ALL - 2 * ASK.per_job, 0)
