"""File batches whose Coordinator dies, goes down, or is another one than the client asks: every line is answered and paid once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator import upkeep
from coordinator.books.ledger import escrow
from coordinator.keys import create_key
from protocol.prices import Ask
from tests.coordinator.clients import http
from tests.coordinator.desks import CREDIT, OTHER, balance, funds, mortal, opened, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.coordinator.file_desk import BATCHES, FILES, batch_of, chat_line, lines_in, over, said, shown

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100)
LINES: list[Any] = [chat_line(f"q-{index}", f"one {index}") for index in range(10)]
LINES[3] = "not a request"
GOOD = [f"q-{index}" for index in range(10) if index != 3]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats of 40 ms; who is silent for 0.4 s is dead."""
    monkeypatch.setattr(upkeep, "BEAT_S", 0.04)
    monkeypatch.setattr(upkeep, "DEAD_S", 0.4)
    monkeypatch.setattr(upkeep, "_SILENT_S", 0.1)
    monkeypatch.setattr("coordinator.runs.board._POLL_S", 0.01)


def stuck_after(good: int, number: int = 1) -> FakeIsland:
    """Answers so many lines and hangs in the next ones."""
    return island(number, Script(times=good), Script(hang_after=1), ask=ASK, slots_total=3, slots_free=3)


async def until_done(running: Running, batch_id: str, lines: int, hung: FakeIsland) -> None:
    async def is_so() -> bool:
        return (await shown(running, batch_id))["request_counts"]["completed"] == lines and hung.open_now == 3

    await until(is_so)


async def check(running: Running, batch: dict[str, Any]) -> None:
    """All lines are answered, by index, and the bad one is told."""
    assert batch["status"] == "completed" and batch["request_counts"] == {"total": 10, "completed": 9, "failed": 1}
    output = await lines_in(running, batch["output_file_id"])
    assert [line["custom_id"] for line in output] == GOOD
    assert [said(line) for line in output] == [f"one {custom_id.removeprefix('q-')}" for custom_id in GOOD]
    (wrong,) = await lines_in(running, batch["error_file_id"])
    assert wrong["error"]["code"] == "invalid_json_line" and wrong["error"]["line"] == 4


async def test_another_coordinator_does_what_is_left_of_a_batch(database_url: str) -> None:
    hung, fresh = stuck_after(5), island(2, ask=ASK)
    async with mortal(database_url, hung) as first, opened(database_url, fresh, key=OTHER, api_key=first.running.key) as second:
        batch_id = await batch_of(first.running, LINES)
        await until_done(first.running, batch_id, 5, hung)
        seen = await shown(second, batch_id)
        assert seen["status"] == "in_progress" and seen["request_counts"] == {"total": 10, "completed": 5, "failed": 0}
        await first.kill()
        await check(second, await over(second, batch_id))
        assert len(fresh.requests) == 4, "what was done is not done again"
        assert await funds(second) == (ALL - 900, 0)
        assert [(await balance(second, escrow(one.peer)))[0] for one in (hung, fresh)] == [500, 400]


async def test_a_coordinator_goes_on_after_its_restart(database_url: str) -> None:
    hung, fresh, key = stuck_after(5), island(2, ask=ASK), create_key(database_url)
    async with opened(database_url, hung, api_key=key) as running:
        batch_id = await batch_of(running, LINES)
        await until_done(running, batch_id, 5, hung)
    async with opened(database_url, api_key=key) as running:
        await until(lambda: running.server._parts.placer.waiting > 0)  # its lines wait for Islands, which take a moment
        running.port.advertise(fresh)
        await check(running, await over(running, batch_id))
        assert len(fresh.requests) == 4 and await funds(running) == (ALL - 900, 0)


async def test_a_coordinator_that_dies_while_it_writes_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, one = url_of(tmp_path), island(ask=ASK)
    writes = trio.Event()
    async with mortal(url, one) as first:
        files = first.running.server._parts.files
        finish = files.finish

        async def finish_one(row: Any, expires_after_s: float) -> Any:
            if row.purpose == "batch":
                return await finish(row, expires_after_s)
            if not row.filename.endswith("_output.jsonl"):
                writes.set()
                await trio.sleep_forever()
            return await finish(row, expires_after_s)

        monkeypatch.setattr(files, "finish", finish_one)
        batch_id = await batch_of(first.running, LINES)
        await writes.wait()
        seen = await shown(first.running, batch_id)
        assert seen["status"] == "finalizing" and seen["output_file_id"] is None
        await first.kill()
    async with opened(url, island(2, ask=ASK), api_key=first.running.key) as running, http(running) as client:
        await check(running, await over(running, batch_id))
        assert len((await client.get(FILES)).json()["data"]) == 3
        assert await funds(running) == (ALL - 900, 0)


async def test_a_batch_is_cancelled_at_another_coordinator(database_url: str) -> None:
    hung = stuck_after(5)
    async with opened(database_url, hung) as first, opened(database_url, key=OTHER, api_key=first.key) as second, http(second) as client:
        batch_id = await batch_of(first, LINES)
        await until_done(first, batch_id, 5, hung)
        assert (await client.post(f"{BATCHES}/{batch_id}/cancel")).json()["status"] in ("cancelling", "cancelled")
        batch = await over(second, batch_id)
        assert batch["status"] == "cancelled" and batch["request_counts"] == {"total": 10, "completed": 5, "failed": 1}
        assert len(await lines_in(second, batch["output_file_id"])) == 5
        assert [line["error"]["code"] for line in await lines_in(second, batch["error_file_id"])].count("batch_cancelled") == 4


async def test_a_batch_that_was_cancelled_while_nobody_had_it(database_url: str) -> None:
    hung, key = stuck_after(5), create_key(database_url)
    async with opened(database_url, key=OTHER, api_key=key) as second, http(second) as client:
        async with mortal(database_url, hung, api_key=key) as first:
            batch_id = await batch_of(first.running, LINES)
            await until_done(first.running, batch_id, 5, hung)
            second.server._parts.runs.draining = True
            await first.kill()
        assert (await client.post(f"{BATCHES}/{batch_id}/cancel")).json()["status"] == "cancelling"
        second.server._parts.runs.draining = False
        batch = await over(second, batch_id)
        assert batch["status"] == "cancelled" and batch["request_counts"] == {"total": 10, "completed": 5, "failed": 1}
        assert len(await lines_in(second, batch["output_file_id"])) == 5
