"""Jobs over HTTP: submitted, watched, cancelled, listed; and each bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from coordinator.books.jobs import JobState
from coordinator.books.ledger import escrow
from coordinator.keys import create_key
from protocol import limits
from protocol.errors import Code, Refused
from protocol.generation import Role
from protocol.prices import Ask, format_credits
from protocol.receipts import read_receipt
from tests.coordinator.clients import HELLO, http
from tests.coordinator.desks import (
    A_JOB,
    CREDIT,
    JOBS,
    OTHER,
    TEXT,
    WHOLE,
    Event,
    balance,
    chat,
    ended,
    error_of,
    funds,
    get,
    opened,
    outline,
    row,
    rows,
    submit,
    until,
    url_of,
    watch,
)
from tests.coordinator.fakes import Running, Script, island, offer

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
PRICE = ASK.price(5, 0)
WORDS = ["one", " two", " three", " four", " five"]


async def test_a_job_from_beginning_to_end(database_url: str) -> None:
    one = island(1, ask=ASK)
    async with opened(database_url, one) as running, http(running) as client:
        running.port.advertise(one, region="de-berlin")
        body = {**A_JOB, "priority": 7, "policy": "eu", "bid_price": "0.5"}
        submitted = await client.post(JOBS, json=body)
        assert submitted.status_code == 201 and submitted.headers["x-archipelag-job"] == submitted.json()["id"]
        location = submitted.headers["location"]
        assert location == f"{JOBS}/{submitted.json()['id']}"
        assert submitted.json()["state"] == "submitted" and submitted.json()["price"] is None
        job = await ended(running, submitted.json()["id"])
        assert job == (await client.get(location)).json()
        for name in ("created_at", "started_at", "completed_at", "output_until"):
            assert job.pop(name) > "2020"
        assert job.pop("usage") == {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "compute_ms": (await row(running, job["id"])).compute_ms,
            "credits_used": format_credits(PRICE),
        }
        assert job == {
            "id": submitted.json()["id"],
            "object": "job",
            "kind": "job",
            "cargo": "echo",
            "state": "succeeded",
            "priority": 7,
            "policy": "eu",
            "bid_price": "0.5",
            "bid_source": "explicit",
            "price": format_credits(PRICE),
            "refunded": None,
            "cache_hit": False,
            "cache_strategy": None,
            "waiting_for": None,
            "island": one.peer,
            "region": "de-berlin",
            "tries": 1,
            "error": None,
            "metadata": {},
            "rating": None,
        }
        output = (await client.get(f"{location}/output")).json()
        assert output["output"]["text"] == TEXT and output["completed"] and output["error"] is None
        assert output["output"]["usage"]["credits_used"] == format_credits(PRICE)
        placement = (await client.get(f"{location}/placement")).json()
        assert placement["island"] == placement["placement"]["island"] == one.peer and placement["region"] == "de-berlin"
        assert placement["placement"]["reasons"] and placement["placement"]["considered"][0]["island"] == one.peer
        receipts = (await client.get(f"{location}/receipts")).json()
        assert receipts["price"] == format_credits(PRICE) and receipts["data"][0]["paid"] == format_credits(PRICE)
        assert read_receipt(bytes.fromhex(receipts["data"][0]["receipt"])).job_id == job["id"]
        assert await funds(running) == (ALL - PRICE, 0) and await balance(running, escrow(one.peer)) == (PRICE, 0)


async def test_the_input_is_what_the_island_gets(tmp_path: Path) -> None:
    one = island()
    async with opened(url_of(tmp_path), one) as running:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Grüße\0aus Köln"}]
        given = {"messages": messages, "max_tokens": 3, "temperature": 0, "seed": 5, "stop": ["x"], "stream": True, "model": "y"}
        job_id = await submit(running, input=given)
        assert (await ended(running, job_id))["state"] == "succeeded"
        await ended(running, await submit(running, workload="echo", cargo=None))
        (request, plain) = one.requests
        assert [(message.role, message.content) for message in request.messages] == [
            (Role.SYSTEM, "be brief"),
            (Role.USER, "Grüße\0aus Köln"),
        ]
        assert (request.max_tokens, request.sampling.temperature, request.sampling.seed, request.stop) == (3, 0.0, 5, ("x",))
        assert (plain.prompt, plain.max_tokens) == (TEXT, limits.COMPLETION_TOKENS_DEFAULT)


# Watching


async def test_a_watcher_sees_every_state_and_word_in_order(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more, accept_s=0.02), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        seen: list[list[Event]] = [[], []]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, running, job_id, seen[0])
            await until(lambda: one.open_now == 1 and len(seen[0]) == 5)
            nursery.start_soon(watch, running, job_id, seen[1])  # late: it has missed nothing
            await until(lambda: seen[1] == seen[0])
            more.set()
        assert [outline(events) for events in seen] == [WHOLE] * 2
        assert [data["content"] for name, data in seen[0] if name == "chunk"] == WORDS
        assert outline(await watch(running, job_id)) == WHOLE[3:], "after its end what is kept of it"


async def test_a_watcher_that_leaves_does_not_end_the_job(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        async with http(running) as client, client.stream("GET", f"{JOBS}/{job_id}/stream") as response:
            async for line in response.aiter_lines():
                if "two" in line:
                    break
        await until(lambda: running.server.statistics()["bridge_tasks"] == 0)
        more.set()
        assert (await ended(running, job_id))["state"] == "succeeded" and not one.cancelled


async def test_another_coordinator_tells_states_and_the_whole_answer(database_url: str) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=2, until=more))
    async with opened(database_url, one) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        job_id = await submit(first)
        await until(lambda: one.open_now == 1)
        await until(lambda: bool(first.server.desk.live) and first.server.desk.live[job_id].job.state is JobState.RUNNING)
        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, second, job_id, seen)
            await until(lambda: outline(seen) == ["state running"])
            more.set()
        assert outline(seen) == WHOLE[2:] and [name for name, _ in seen].count("chunk") == 1
        assert (await get(second, f"{JOBS}/{job_id}/output")).json()["output"]["text"] == TEXT


async def test_a_silent_job_keeps_its_watchers_with_comments(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=0))
    async with opened(url_of(tmp_path), one, keep_alive_comment_s=0.03) as running:
        job_id = await submit(running)
        comments = 0
        async with http(running) as client, client.stream("GET", f"{JOBS}/{job_id}/stream") as response:
            async for line in response.aiter_lines():
                comments += line.startswith(":")
                if comments == 3:
                    break
        assert (await get(running, f"{JOBS}/{job_id}")).json()["state"] == "assigned"


async def test_a_watcher_is_let_go_when_the_coordinator_ends(tmp_path: Path) -> None:
    """Without a word on how the job ended, and without half an answer of another kind."""
    one = island(1, Script(hang_after=2))
    seen: list[Event] = []
    async with trio.open_nursery() as nursery, opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        nursery.start_soon(watch, running, job_id, seen)
        await until(lambda: len(seen) == 5)
    assert outline(seen) == [*WHOLE[:3], "chunk one two"]


async def test_an_answer_that_breaks_off_is_no_other_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = island(1, Script(hang_after=2))

    def broken(_said: object) -> bytes:
        raise RuntimeError("a bug")

    async with opened(url_of(tmp_path), one) as running, http(running) as client:
        job_id = await submit(running)
        monkeypatch.setattr("coordinator.http.job_routes.sse", broken)
        with pytest.raises(httpx.RemoteProtocolError, match="without sending complete"):
            async with client.stream("GET", f"{JOBS}/{job_id}/stream") as response:
                assert response.status_code == 200
                await response.aread()
        assert (await client.get(f"{JOBS}/{job_id}")).status_code == 200


async def test_a_job_that_fails_says_why_to_everybody(tmp_path: Path) -> None:
    one = island(1, Script(refuse=Refused(Code.BAD_INPUT, "the schema is not ours")), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        job = await ended(running, job_id)
        error = {"code": "bad_input", "message": "the schema is not ours"}
        assert job["state"] == "failed" and job["error"] == error and job["price"] == "0"
        assert (await watch(running, job_id))[-1] == ("error", {"type": "error", "state": "failed", "error": error})
        output = (await get(running, f"{JOBS}/{job_id}/output")).json()
        assert output == {"job_id": job_id, "state": "failed", "output": None, "completed": True, "error": error}
        assert await funds(running) == (ALL, 0)


async def test_a_job_whose_island_is_going_down_has_failed_and_was_not_cancelled(tmp_path: Path) -> None:
    """``cancelled`` is also what an Island says that ends; the account has cancelled nothing."""
    islands = [island(number, Script(refuse=Refused(Code.CANCELLED, "going down"))) for number in range(1, 9)]
    async with opened(url_of(tmp_path), *islands) as running:
        job_id = await submit(running)
        assert (await ended(running, job_id))["state"] == "failed"
        assert (await watch(running, job_id))[-1][0] == "error"


# Cancelling


async def delete(running: Running, job_id: str) -> httpx.Response:
    async with http(running) as client:
        return await client.delete(f"{JOBS}/{job_id}")


async def test_a_job_that_waits_is_cancelled(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=0), slots_total=1, slots_free=1, ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        running_id = await submit(running)
        await until(lambda: one.open_now == 1)
        waiting_id = await submit(running)
        await until(lambda: running.server.statistics()["waiting"] == 1)
        answer = await delete(running, waiting_id)
        assert answer.status_code == 200
        assert answer.json() == {"id": waiting_id, "state": "cancelled", "message": "the job was cancelled", "price": "0"}
        assert outline(await watch(running, waiting_id)) == ["complete cancelled"]
        assert (await get(running, f"{JOBS}/{running_id}")).json()["state"] == "assigned"


@pytest.mark.parametrize("is_watched", [True, False])
async def test_a_job_that_runs_is_cancelled_and_costs_what_was_read(tmp_path: Path, is_watched: bool) -> None:
    one = island(1, Script(hang_after=3), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running)
        seen: list[Event] = []
        async with trio.open_nursery() as nursery:
            if is_watched:
                nursery.start_soon(watch, running, job_id, seen)
                await until(lambda: len(seen) == 6)
            await until(lambda: one.open_now == 1)
            assert (await delete(running, job_id)).json()["state"] == "cancelled"
        assert not is_watched or outline(seen)[-1] == "complete cancelled"
        assert one.cancelled == 1
        paid = ASK.price(3, 0) if is_watched else 0
        assert await funds(running) == (ALL - paid, 0)
        again = await delete(running, job_id)
        assert again.status_code == 200 and again.json()["state"] == "cancelled"
        assert (await row(running, job_id)).price_micros == paid


async def test_what_has_ended_stays_as_it_is(tmp_path: Path) -> None:
    one = island(1, Script(times=1), Script(refuse=Refused(Code.BAD_INPUT, "no"), times=1), ask=ASK)
    async with opened(url_of(tmp_path), one) as running:
        good, bad = await submit(running), ""
        await ended(running, good)
        bad = await submit(running)
        await ended(running, bad)
        told = [(await delete(running, job_id)).json() for job_id in (good, bad)]
        assert [(answer["state"], answer["message"]) for answer in told] == [
            ("succeeded", "the job had ended before"),
            ("failed", "the job had failed before"),
        ]
        assert told[0]["price"] == format_credits(PRICE) and await funds(running) == (ALL - PRICE, 0)


async def test_a_chat_can_be_cancelled_from_elsewhere(tmp_path: Path) -> None:
    one = island(1, Script(hang_after=3), ask=ASK)
    answers: list[httpx.Response] = []
    async with opened(url_of(tmp_path), one) as running:

        async def ask() -> None:
            answers.append(await chat(running))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await until(lambda: one.open_now == 1)
            (job,) = await rows(running)
            assert (await delete(running, job.id)).json()["state"] == "cancelled"
        error_of(answers[0], 409, "job_cancelled")
        assert answers[0].headers["x-should-retry"] == "false", "or OpenAI's clients would begin it again"


async def test_another_coordinator_cancels_too(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.upkeep.BEAT_S", 0.05)
    one = island(1, Script(hang_after=3))
    async with opened(database_url, one) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        job_id = await submit(first)
        await until(lambda: one.open_now == 1)
        answer = await delete(second, job_id)
        assert answer.json()["message"] == "the Coordinator that runs the job was told to cancel it"
        assert (await ended(second, job_id))["state"] == "cancelled" and one.cancelled == 1
        assert await funds(first) == (ALL, 0)


# Lists


async def test_lists_are_filtered_and_paged(database_url: str) -> None:
    one = island(1, Script(times=3), Script(refuse=Refused(Code.BAD_INPUT, "no"), times=1), ask=ASK)
    one.offers += (offer("other"),)
    async with opened(database_url, one) as running, http(running) as client:
        ids = [await submit(running) for _ in range(3)]
        for job_id in ids:
            await ended(running, job_id)
        bad = await submit(running)
        await ended(running, bad)
        other = await submit(running, cargo="other")
        await ended(running, other)
        chat_id = (await chat(running)).json()["metadata"]["job_id"]

        async def listed(query: str) -> tuple[list[str], dict[str, int]]:
            answer = (await client.get(f"{JOBS}?{query}")).json()
            return [job["id"] for job in answer["data"]], answer["meta"]

        found, meta = await listed("")
        assert found[0] == chat_id and set(found) == {*ids, bad, other, chat_id} and meta == {"total": 6, "limit": 20, "offset": 0}
        assert (await listed("limit=2&offset=1")) == (found[1:3], {"total": 6, "limit": 2, "offset": 1})
        assert (await listed("offset=99"))[0] == []
        assert (await listed("status=failed")) == ([bad], {"total": 1, "limit": 20, "offset": 0})
        assert (await listed("state=failed,running"))[0] == [bad]
        assert (await listed("cargo=other"))[0] == [other]
        assert (await listed("cargo=%27%20OR%201%3D1%20--"))[1]["total"] == 0
        kinds = [job["kind"] for job in (await client.get(JOBS)).json()["data"]]
        assert kinds == ["chat"] + 5 * ["job"]
        assert (await listed(f"limit={limits.JOBS_LISTED_MAX}"))[1]["limit"] == limits.JOBS_LISTED_MAX


BAD_QUERIES = [
    ("limit=0", "limit"),
    ("limit=101", "limit"),
    ("limit=-1", "limit"),
    ("limit=1e3", "limit"),
    ("limit=%C2%B2", "limit"),
    ("offset=-1", "offset"),
    ("offset=99999999999", "offset"),
    ("status=done", "status"),
    ("status=failed,", "status"),
    ("cargo=a%00b", "cargo"),
    ("cargo=a%0Ab", "cargo"),
]


async def test_bad_queries_are_told_by_name(database_url: str) -> None:
    async with opened(database_url) as running:
        for query, param in BAD_QUERIES:
            error_of(await get(running, f"{JOBS}?{query}"), 400, "invalid_value", param)


async def test_another_accounts_job_does_not_exist(database_url: str) -> None:
    async with opened(database_url, island(1, Script(hang_after=0))) as running:
        job_id = await submit(running)
        other = create_key(running.database_url, "other")
        names = [job_id, "nothing", "%00", "a%2Fb", "x" * 200, "' OR 1=1 --", "%F0%9F%98%80", "local"]
        async with http(running, other) as client:
            for name in names:
                for path in ("", "/output", "/stream", "/placement", "/receipts"):
                    error_of(await client.get(f"{JOBS}/{name}{path}"), 404, "unknown_job")
                error_of(await client.delete(f"{JOBS}/{name}"), 404, "unknown_job")
            assert (await client.get(JOBS)).json()["meta"]["total"] == 0
        assert (await row(running, job_id)).cancel_wanted is False


async def test_scopes(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        reader = create_key(running.database_url, scopes=("read",))
        writer = create_key(running.database_url, scopes=("write",))
        job_id = await submit(running)
        async with http(running, reader) as client:
            error_of(await client.post(JOBS, json=A_JOB), 403, "insufficient_scope")
            error_of(await client.delete(f"{JOBS}/{job_id}"), 403, "insufficient_scope")
            assert (await client.get(f"{JOBS}/{job_id}")).status_code == 200
        async with http(running, writer) as client:
            assert (await client.post(JOBS, json=A_JOB)).status_code == 201
            for path in ("", f"/{job_id}", f"/{job_id}/output", f"/{job_id}/stream", f"/{job_id}/placement", f"/{job_id}/receipts"):
                error_of(await client.get(JOBS + path), 403, "insufficient_scope")
        async with http(running, "") as client:
            error_of(await client.get(f"{JOBS}/{job_id}"), 401, "invalid_api_key")


# Bad input


def prompt(**changes: Any) -> dict[str, Any]:
    return {**A_JOB, "input": {"prompt": TEXT, **changes}}


LONG_POLICY = {"regions": [f"{'x' * 120}{number:03}" for number in range(10)]}
BAD: dict[str, tuple[Any, int, str, str | None]] = {
    "no object": ([], 400, "invalid_type", None),
    "no cargo": ({"input": {"prompt": "x"}}, 400, "missing_required_parameter", "cargo"),
    "a cargo that is a number": ({**A_JOB, "cargo": 7}, 400, "missing_required_parameter", "cargo"),
    "a cargo that is no name": ({**A_JOB, "cargo": "a b"}, 404, "model_not_found", "cargo"),
    "NUL in a cargo": ({**A_JOB, "cargo": "echo\0"}, 404, "model_not_found", "cargo"),
    "half a pair in a cargo": ({**A_JOB, "cargo": "\ud800"}, 404, "model_not_found", "cargo"),
    "a long cargo": ({**A_JOB, "cargo": "x" * 129}, 404, "model_not_found", "cargo"),
    "SQL in a cargo": ({**A_JOB, "cargo": "'; DROP TABLE jobs; --"}, 404, "model_not_found", "cargo"),
    "no input": ({"cargo": "echo"}, 400, "missing_required_parameter", "input"),
    "input that is text": ({"cargo": "echo", "input": "hello"}, 400, "missing_required_parameter", "input"),
    "an empty input": ({"cargo": "echo", "input": {}}, 400, "missing_required_parameter", "prompt"),
    "both": (prompt(messages=HELLO["messages"]), 400, "invalid_value", "input"),
    "two choices": (prompt(n=2), 400, "invalid_value", "input"),
    "two prompts": (prompt(prompt=["a", "b"]), 400, "invalid_value", "input"),
    "half a pair": (prompt(prompt="\ud800"), 400, "invalid_value", "prompt"),
    "a bad temperature": (prompt(temperature=3), 400, "invalid_value", "temperature"),
    "too many tokens": (prompt(max_tokens=4097), 400, "invalid_value", "max_tokens"),
    "too large": (prompt(note="x" * limits.JOB_INPUT_JSON_BYTES_MAX), 400, "input_too_large", "input"),
    "too large in bytes": (prompt(note="ü" * (limits.JOB_INPUT_JSON_BYTES_MAX // 2)), 400, "input_too_large", "input"),
    "priority 101": ({**A_JOB, "priority": 101}, 400, "invalid_value", "priority"),
    "priority -1": ({**A_JOB, "priority": -1}, 400, "invalid_value", "priority"),
    "priority 1.5": ({**A_JOB, "priority": 1.5}, 400, "invalid_value", "priority"),
    "priority true": ({**A_JOB, "priority": True}, 400, "invalid_value", "priority"),
    "policy of no region": ({**A_JOB, "policy": {"regions": []}}, 400, "invalid_value", "policy"),
    "policy that nobody knows": ({**A_JOB, "policy": "moon"}, 400, "invalid_value", "policy"),
    "policy that is long": ({**A_JOB, "policy": LONG_POLICY}, 400, "invalid_value", "policy"),
    "confidential": ({**A_JOB, "confidential": True}, 400, "unsupported_parameter", "confidential"),
    "a quote that is a number": ({**A_JOB, "quote": 1}, 400, "invalid_value", "quote"),
    "a quote with NUL": ({**A_JOB, "quote": "q\0"}, 400, "invalid_value", "quote"),
    "a quote that is none": ({**A_JOB, "quote": "qt_0"}, 404, "unknown_quote", "quote"),
    "quote and bid": ({**A_JOB, "quote": "qt_0", "bid_price": 1}, 400, "invalid_value", "bid_price"),
    "more than there is": ({**A_JOB, "bid_price": 10_001}, 402, "insufficient_credits", None),
}


async def test_each_bad_input_is_told_and_leaves_nothing(database_url: str) -> None:
    one = island()
    async with opened(database_url, one) as running, http(running) as client:
        for name, (body, status, code, param) in BAD.items():
            raw = json.dumps(body).encode()
            with trio.fail_after(3):
                answer = await client.post(JOBS, content=raw, headers={"Content-Type": "application/json"})
            try:
                error_of(answer, status, code, param)
            except AssertionError as error:
                raise AssertionError(name) from error
        deep = b'{"cargo":"echo","input":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}"
        assert (await client.post(JOBS, content=deep)).status_code == 400
        assert await rows(running) == [] and await funds(running) == (ALL, 0) and not one.requests


async def test_the_largest_input(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        fill = limits.JOB_INPUT_JSON_BYTES_MAX - len(json.dumps({"prompt": TEXT, "note": ""}, separators=(",", ":")))
        job_id = await submit(running, input={"prompt": TEXT, "note": "x" * fill})
        assert (await ended(running, job_id))["state"] == "succeeded"
