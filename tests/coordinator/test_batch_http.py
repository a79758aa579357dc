"""Batches over HTTP: begun, watched, read while they run, cancelled, begun twice, and what they cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.cache.policy import CacheConfig
from coordinator.keys import create_key
from protocol import limits
from protocol.errors import Code, Refused
from protocol.prices import format_credits
from tests.coordinator.batch_desk import (
    ALL,
    ASK,
    BATCH,
    asked,
    begin,
    inputs,
    lane,
    output,
    over,
    paced,
    paid,
    post,
    said,
    status,
    texts,
    watched,
    watching,
)
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, Event, error_of, funds, get, opened, rows, set_funds, until, url_of
from tests.coordinator.fake_lines import ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Running, Script

KEY = {"Idempotency-Key": "batch-1"}
PAIRS = [[10, 11], [20, 21], [30, 31]]
AGAIN = {"x-stainless-retry-count": "1"}


async def test_a_batch_from_its_inputs_to_its_outputs(database_url: str) -> None:
    one, two = lane(1, paced(0.01)), lane(2, paced(0.01))
    async with opened(database_url, one, two) as running, http(running) as client:
        answer = await post(running, {"cargo": "echo", "inputs": inputs(5), "priority": 7})
        begun = answer.json()
        assert answer.status_code == 201 and begun["id"].startswith("batch_")
        assert answer.headers["location"] == f"{JOBS}/{begun['id']}" and answer.headers["x-archipelag-job"] == begun["id"]
        assert (begun["object"], begun["kind"], begun["cargo"], begun["state"]) == ("job", "batch", "echo", "running")
        assert begun["batch"]["chunk_count"] == 5 and len(begun["children"]) == 5
        assert (begun["batch"]["merge_strategy"], begun["batch"]["fail_mode"]) == ("concat", "best_effort")
        found = await over(running, begun["id"])
        assert (found["parent_id"], found["parent_state"], found["child_states"]) == (begun["id"], "succeeded", {"succeeded": 5})
        assert [child["batch_index"] for child in found["children"]] == list(range(5))
        assert {child["island"] for child in found["children"]} == {one.peer, two.peer}
        out = await output(running, begun["id"])
        assert said(out) == texts(5) and out["merged"] == "\n".join(texts(5)) and out["errors"] == [] and out["completed"]
        assert out["price"] == out["usage"]["credits_used"] == format_credits(500) and out["usage"]["completion_tokens"] == 10
        assert await funds(running) == (ALL - 500, 0)
        whole = (await client.get(f"{JOBS}/{begun['id']}")).json()
        assert (whole["state"], whole["price"], whole["batch"]["completed"], whole["error"]) == ("succeeded", format_credits(500), 5, None)
        assert whole["completed_at"] > "2020" and whole["output_until"] > "2020"
        child = (await client.get(f"{JOBS}/{found['children'][3]['id']}")).json()
        assert (child["kind"], child["state"], child["priority"]) == ("job", "succeeded", 7)
        assert (await client.get(f"{JOBS}/{child['id']}/output")).json()["output"]["text"] == "input 3"
        listed = (await client.get(BATCH)).json()
        assert [each["id"] for each in listed["data"]] == [begun["id"]] and listed["meta"] == {"total": 1, "limit": 20, "offset": 0}
        assert await rows(running) == [], "its jobs are not listed among those that were submitted"


@pytest.mark.parametrize("slots", [4, 4096])
async def test_each_input_goes_to_another_island(slots: int, tmp_path: Path) -> None:
    """As long as there are Islands, however many slots each has, and of more inputs each gets as many."""
    gate = trio.Event()
    lanes = [lane(number, Script(hang_after=0, until=gate), slots=slots) for number in range(1, 6)]
    async with opened(url_of(tmp_path), *lanes) as running:
        batch_id = await begin(running, 5)
        await until(lambda: sum(one.open_now for one in lanes) == 5)
        assert [one.open_now for one in lanes] == [1] * 5
        shown = await status(running, batch_id)
        assert shown["child_states"] == {"running": 5} and {child["island"] for child in shown["children"]} == {one.peer for one in lanes}
        more = await begin(running, 10)
        await until(lambda: sum(one.open_now for one in lanes) == 15)
        assert [one.open_now for one in lanes] == [3] * 5
        gate.set()
        for each in (batch_id, more):
            assert (await over(running, each))["parent_state"] == "succeeded"
        assert repr(running.server._placer._crowds) == "<Crowds of 0 groups>"


async def test_parts_are_there_while_it_runs(tmp_path: Path) -> None:
    gate = trio.Event()
    one = lane(1, Script(times=2), Script(hang_after=0, until=gate))
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 4)
        await until(lambda: len(one.requests) == 3)
        await paid(running, batch_id, 2)
        out = await output(running, batch_id)
        assert said(out) == ["input 0", "input 1", None, None] and out["merged"] == "input 0\ninput 1"
        assert (out["state"], out["completed"]) == ("running", False)
        shown = await status(running, batch_id)
        assert (shown["parent_state"], shown["child_states"]) == ("running", {"succeeded": 2, "running": 1, "pending": 1})
        assert shown["children"][3] == {
            "id": None,
            "batch_index": 3,
            "state": "pending",
            "error": None,
            "host_id": None,
            "island": None,
            "price": None,
            "started_at": None,
            "completed_at": None,
        }
        gate.set()
        await over(running, batch_id)
        assert said(await output(running, batch_id)) == texts(4)


async def test_watchers_hear_each_change_once_and_late_ones_what_there_is(tmp_path: Path) -> None:
    gate = trio.Event()
    one = lane(1, Script(times=1), Script(hang_after=0, until=gate, times=1))
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 3)
        await until(lambda: len(one.requests) == 2)
        await paid(running, batch_id, 1)
        async with watching(running, batch_id) as heard:
            await until(lambda: len(heard) >= 4)
            assert heard[0][0] == "state" and heard[0][1]["child_states"] == {"succeeded": 1, "running": 1, "pending": 1}
            assert [(name, data["batch_index"], data["state"]) for name, data in heard[1:4]] == [
                ("child", 0, "succeeded"),
                ("child", 1, "running"),
                ("child", 2, "pending"),
            ]
            gate.set()
        assert heard[-1][0] == "complete" and heard[-1][1]["child_states"] == {"succeeded": 3}
        changes = [(data["batch_index"], data["state"], data["island"]) for name, data in heard if name == "child"]
        assert len(set(changes)) == len(changes), "nothing is said twice"
        assert [data["step"] for name, data in heard if name == "progress"] == sorted(
            data["step"] for name, data in heard if name == "progress"
        )
        late: list[Event] = []
        await watched(running, batch_id, late)
        assert [name for name, _ in late] == ["state", "child", "child", "child", "complete"]
        assert late[-1][1]["price"] == format_credits(3 * ASK.per_job)


async def test_a_watcher_who_goes_costs_nothing(tmp_path: Path) -> None:
    gate = trio.Event()
    one = lane(1, Script(hang_after=0, until=gate, times=1))
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 2)
        with trio.move_on_after(0.2):
            await watched(running, batch_id, [])
        await until(lambda: running.server.statistics()["bridge_tasks"] == 0)
        gate.set()
        assert (await over(running, batch_id))["child_states"] == {"succeeded": 2}


async def test_cancel_ends_all_that_runs(database_url: str) -> None:
    one, two = lane(1, Script(times=1), Script(hang_after=1)), lane(2, Script(hang_after=1))
    async with opened(database_url, one, two) as running, http(running) as client:
        batch_id = await begin(running, 6)
        await until(lambda: one.open_now == two.open_now == 1 and len(one.requests) == 2)
        await paid(running, batch_id, 1)
        async with watching(running, batch_id) as heard:
            await until(lambda: bool(heard))
            answer = await client.delete(f"{JOBS}/{batch_id}")
        assert answer.json() == {
            "id": batch_id,
            "state": "cancelled",
            "message": "the batch was cancelled",
            "price": format_credits(ASK.per_job),
        }
        assert heard[-1][0] == "complete" and heard[-1][1]["state"] == "cancelled"
        assert one.open_now == two.open_now == 0 and one.cancelled == two.cancelled == 1
        found = await status(running, batch_id)
        assert (found["parent_state"], found["child_states"]) == ("cancelled", {"succeeded": 1, "cancelled": 5})
        assert await funds(running) == (ALL - ASK.per_job, 0), "what was done is paid, and nothing is held any more"
        assert len([text for text in said(await output(running, batch_id)) if text]) == 1
        again = (await client.delete(f"{JOBS}/{batch_id}")).json()
        assert (again["state"], again["message"]) == ("cancelled", "the batch was cancelled")


async def test_fail_fast_and_best_effort(tmp_path: Path) -> None:
    bad = {"prompt": "no", "max_tokens": 1}
    for mode, state, states in (("fail_fast", "failed", {"succeeded": 2, "failed": 1, "cancelled": 2}), ("best_effort", "succeeded", {})):
        one = lane(1, Script(times=2), Script(refuse=refused(Code.BAD_INPUT), times=1))
        folder = tmp_path / mode
        folder.mkdir()
        async with opened(url_of(folder), one) as running:
            batch_id = await begin(running, inputs=[*inputs(2), bad, *inputs(2)], fail_mode=mode)
            found = await over(running, batch_id)
            assert found["parent_state"] == state and found["child_states"] == (states or {"succeeded": 4, "failed": 1})
            assert found["children"][2]["error"] == {"code": "bad_input", "message": "as the test wants it"}
            out = await output(running, batch_id)
            assert out["outputs"][2] is None
            assert out["errors"] == [{"batch_index": 2, "code": "bad_input", "message": "as the test wants it"}]
            whole = (await get(running, f"{JOBS}/{batch_id}")).json()
            expected = {"code": "bad_input", "message": "an input failed: input 2: as the test wants it"}
            assert whole["error"] == (expected if mode == "fail_fast" else None)
            assert len(one.requests) == (3 if mode == "fail_fast" else 5)


async def test_best_effort_fails_where_nothing_succeeds(tmp_path: Path) -> None:
    one = lane(1, Script(refuse=refused(Code.CARGO_FAILED)))
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 3)
        async with watching(running, batch_id) as heard:
            pass
        assert heard[-1][0] == "error" and heard[-1][1]["error"]["code"] == "cargo_failed"
        found = await over(running, batch_id)
        assert (found["parent_state"], found["child_states"]) == ("failed", {"failed": 3}) and await funds(running) == (ALL, 0)


async def test_an_idempotency_key_makes_one_batch(database_url: str) -> None:
    one = lane(1)
    async with opened(database_url, one) as running:
        first = await post(running, {"cargo": "echo", "inputs": inputs(2)}, KEY)
        second = await post(running, {"cargo": "echo", "inputs": inputs(2)}, KEY)
        assert first.json()["id"] == second.json()["id"] and second.headers["x-archipelag-replayed"] == "true"
        assert "x-archipelag-replayed" not in first.headers
        await over(running, first.json()["id"])
        third = await post(running, {"cargo": "echo", "inputs": inputs(2)}, KEY)
        assert third.status_code == 201 and third.json()["state"] == "succeeded" and asked(one) == Counter(texts(2))
        error_of(await post(running, {"cargo": "echo", "inputs": inputs(3)}, KEY), 422, "idempotency_key_reused")
        other = await post(running, {"cargo": "echo", "inputs": inputs(2)}, KEY, create_key(running.database_url, account="ben"))
        assert other.status_code == 201 and other.json()["id"] != first.json()["id"]
        plain = await post(running, {"cargo": "echo", "inputs": inputs(2)})
        assert plain.json()["id"] not in (first.json()["id"], other.json()["id"])


async def test_a_clients_own_retry_makes_no_second_batch(tmp_path: Path) -> None:
    one = lane(1)
    async with opened(url_of(tmp_path), one) as running:
        batch_id = await begin(running, 2)
        assert await begin(running, 2, AGAIN) == batch_id and await begin(running, 2) != batch_id
        assert await begin(running, 3, AGAIN) != batch_id


async def test_outputs_are_kept_so_long_and_no_longer(tmp_path: Path) -> None:
    """What became of each input is told for good."""
    async with opened(url_of(tmp_path), lane(1), run_retention_s=0.2) as running:
        batch_id = await begin(running, 2, merge_strategy="flatten")
        before = await over(running, batch_id)
        await until(lambda: _is_over(running, batch_id))
        error_of(await get(running, f"{JOBS}/{batch_id}/output"), 410, "output_expired")
        await running.server._parts.runs.forget(2**52)
        running.server._parts.batches._heads.clear()
        after = await status(running, batch_id)
        assert after["child_states"] == before["child_states"] == {"succeeded": 2}
        assert (before["merge_strategy"], after["merge_strategy"]) == ("flatten", None)
        error_of(await get(running, f"{JOBS}/{batch_id}/output"), 410, "output_expired")


async def test_outputs_that_are_too_large_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url_of(tmp_path), lane(1)) as running:
        batch_id = await begin(running, 3)
        found = await over(running, batch_id)
        monkeypatch.setattr(limits, "BATCH_OUTPUT_BYTES_MAX", 10)
        error_of(await get(running, f"{JOBS}/{batch_id}/output"), 422, "output_too_large")
        assert (await get(running, f"{JOBS}/{found['children'][2]['id']}/output")).json()["output"]["text"] == "input 2"


async def test_max_parallelism(tmp_path: Path) -> None:
    one = lane(1, paced(0.001), slots=8)
    async with opened(url_of(tmp_path), one) as running:
        await over(running, await begin(running, 12, max_parallelism=2))
        assert one.open_max == 2
        await over(running, await begin(running, 12))
        assert one.open_max == 8


async def test_credit_for_two_at_a_time_does_the_whole_batch(tmp_path: Path) -> None:
    """Each input holds its bid while it runs and pays the tenth of it."""
    one = lane(1, paced(0.001), slots=8)
    async with opened(url_of(tmp_path), one) as running:
        await set_funds(running, 2500)
        found = await over(running, await begin(running, 10, bid_price="0.001"))
        assert found["child_states"] == {"succeeded": 10} and await funds(running) == (1500, 0)
        await set_funds(running, 950)
        found = await over(running, await begin(running, 3, bid_price="0.001"))
        assert (found["parent_state"], found["child_states"]) == ("failed", {"failed": 3})
        assert {child["error"]["code"] for child in found["children"]} == {"insufficient_credits"}


async def test_what_the_whole_batch_may_cost(tmp_path: Path) -> None:
    one = lane(1)
    async with opened(url_of(tmp_path), one) as running:
        body: dict[str, Any] = {"cargo": "echo", "inputs": inputs(10), "bid_price": "0.001"}
        error_of(await post(running, {**body, "max_price": "0.009"}), 402, "over_max_price", "max_price")
        assert (await post(running, {**body, "max_price": "0.01"})).status_code == 201
        del body["bid_price"]
        error_of(await post(running, {**body, "max_price": "0.000999"}), 402, "over_max_price", "max_price")
        answer = await post(running, {**body, "max_price": "0.005"})
        assert answer.status_code == 201, answer.text
        assert (await over(running, answer.json()["id"]))["parent_state"] == "succeeded"
        error_of(await post(running, {**body, "max_price": -1}), 400, "invalid_value", "max_price")


async def test_a_region_and_a_policy(tmp_path: Path) -> None:
    one, two = lane(1), lane(2)
    async with opened(url_of(tmp_path), one, two) as running:
        running.port.advertise(one, region="de-berlin")
        running.port.advertise(two, region="us-east")
        await over(running, await begin(running, 4, region="us"))
        await over(running, await begin(running, 3, policy="eu"))
        assert (len(one.requests), len(two.requests)) == (3, 4)
        body = {"cargo": "echo", "inputs": inputs(1)}
        error_of(await post(running, {**body, "region": "us", "policy": "eu"}), 400, "invalid_value", "region")
        error_of(await post(running, {**body, "region": "??"}), 400, "invalid_value", "region")


async def test_equal_inputs_cost_one_job(tmp_path: Path) -> None:
    """Through the cache of answers, one flight: ten at once come to one Island once."""
    one, two = lane(1, paced(0.01), slots=8), lane(2, paced(0.01), slots=8)
    async with opened(url_of(tmp_path), one, two, cache=CacheConfig()) as running:
        batch_id = await begin(running, inputs=[{"prompt": "the same", "temperature": 0}] * 10)
        found = await over(running, batch_id)
        assert found["child_states"] == {"succeeded": 10} and asked(one, two) == {"the same": 1}
        assert said(await output(running, batch_id)) == ["the same"] * 10 and await funds(running) == (ALL - ASK.per_job, 0)
        assert sum(child["price"] == "0" for child in found["children"]) == 9
        again = await begin(running, inputs=[{"prompt": "the same", "temperature": 0}] * 3)
        assert (await over(running, again))["child_states"] == {"succeeded": 3} and asked(one, two) == {"the same": 1}


async def test_lines_are_merged(tmp_path: Path) -> None:
    lists = [(b'{"type":"done","found":[%d,%d]}\n' % (number, number + 1),) for number in (10, 20, 30)]
    for strategy, merged in (("concat", PAIRS), ("flatten", [10, 11, 20, 21, 30, 31])):
        one = lane(1, name="finder", runtime="wasm", engine=ENGINE)
        one.lines = FakeLines([*map(LineScript, lists)])
        folder = tmp_path / strategy
        folder.mkdir()
        async with opened(url_of(folder), one) as running:
            batch_id = await begin(running, cargo=None, workload="finder", inputs=[{"n": 1}, {"n": 2}, {"n": 3}], merge_strategy=strategy)
            await over(running, batch_id)
            out = await output(running, batch_id)
            assert out["merged"] == merged and [each["result"]["found"] for each in out["outputs"]] == PAIRS


async def test_an_island_five_times_slower_does_not_hold_the_batch_up(tmp_path: Path) -> None:
    """At its end the batch sends what the slow one has to a fast one, and does not pay the slow one for it."""
    fast: list[FakeIsland] = [lane(number, paced(0.01)) for number in (1, 2)]
    slow = lane(3, paced(0.5))
    async with opened(url_of(tmp_path), *fast, slow) as running:
        started_s = trio.current_time()
        batch_id = await begin(running, 12)
        found = await over(running, batch_id)
        assert trio.current_time() - started_s < 1.0, "less than one input takes on the slow one"
        assert found["child_states"] == {"succeeded": 12} and found["stragglers"] >= 1
        assert slow.cancelled >= 1 and said(await output(running, batch_id)) == texts(12)
        assert await funds(running) == (ALL - 12 * ASK.per_job, 0)


async def _is_over(running: Running, batch_id: str) -> bool:
    return (await get(running, f"{JOBS}/{batch_id}/output")).status_code == 410


def refused(code: Code) -> Refused:
    return Refused(code, "as the test wants it")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.batches.board._POLL_S", 0.01)
