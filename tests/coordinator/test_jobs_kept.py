"""Jobs over HTTP, as time goes by: what is kept of them and how long, who comes first, and what becomes of them at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.books import job_queries
from coordinator.books.jobs import JobState
from protocol.prices import Ask, format_credits
from tests.coordinator.clients import http
from tests.coordinator.desks import (
    A_JOB,
    CREDIT,
    JOBS,
    TEXT,
    chat,
    ended,
    error_of,
    funds,
    get,
    opened,
    outline,
    row,
    submit,
    until,
    url_of,
    watch,
)
from tests.coordinator.fakes import Script, island

ALL = 10_000 * CREDIT
ASK = Ask(per_job=100, per_1k_output=20_000)
PRICE = ASK.price(5, 0)


async def test_an_output_is_gone_after_its_time(database_url: str) -> None:
    async with opened(database_url, island(1, ask=ASK), result_retention_s=60.0) as running:
        job_id = await submit(running)
        await ended(running, job_id)
        now_ms = running.server.desk._clock_ms()
        until_ms = (await row(running, job_id)).result_expires_at_ms
        assert 55_000 < until_ms - now_ms <= 60_000
        running.server.desk._clock_ms = lambda: until_ms - 1
        assert (await get(running, f"{JOBS}/{job_id}/output")).status_code == 200
        running.server.desk._clock_ms = lambda: until_ms
        error_of(await get(running, f"{JOBS}/{job_id}/output"), 410, "output_expired")
        assert outline(await watch(running, job_id)) == ["complete succeeded"]
        assert await running.server.books.change(job_queries.forget_results, until_ms + 1) == 1
        job = await row(running, job_id)
        assert job.output == job.input == b"" and job.price_micros == PRICE
        error_of(await get(running, f"{JOBS}/{job_id}/output"), 410, "output_expired")
        assert (await get(running, f"{JOBS}/{job_id}")).json()["output_until"] is None


async def test_upkeep_forgets_by_itself(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, ask=ASK), result_retention_s=0.001) as running:
        job_id = await submit(running)
        await ended(running, job_id)
        await trio.sleep(0.005)
        await running.server._parts.upkeep._round(sweep=True)
        assert (await row(running, job_id)).output == b""


async def test_neither_prompt_nor_answer_stands_in_the_database(tmp_path: Path) -> None:
    secret, answer = "the-secret-of-the-prompt", "the-secret-of-the-answer"
    more = trio.Event()
    one = island(1, Script(words=(answer,), hang_after=1, until=more))

    def found() -> list[str]:
        files = [file for file in tmp_path.iterdir() if file.is_file()]
        assert any(file.name.endswith("-wal") for file in files)
        return [word for word in (secret, answer) for file in files if word.encode() in file.read_bytes()]

    async with opened(url_of(tmp_path), one) as running:
        job_id = await submit(running, input={"prompt": secret})
        await until(lambda: one.open_now == 1)
        sealed = (await row(running, job_id)).input
        assert sealed and secret.encode() not in sealed and found() == []
        more.set()
        await ended(running, job_id)
        kept = await row(running, job_id)
        assert kept.input == b"" and kept.output and found() == []
        assert (await get(running, f"{JOBS}/{job_id}/output")).json()["output"]["text"] == answer
        one.scripts = [Script(words=(answer,))]
        await chat(running, messages=[{"role": "user", "content": secret}])
        assert found() == []


# Order, policies, credits


async def test_higher_priority_runs_first(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=0, until=more), slots_total=1, slots_free=1)
    async with opened(url_of(tmp_path), one) as running:
        await submit(running, input={"prompt": "first"})
        await until(lambda: one.open_now == 1)
        for waiting, (name, priority) in enumerate([("low", 0), ("middle", 50), ("high", 100), ("low too", 0)], 1):
            await submit(running, input={"prompt": name}, priority=priority)
            await until(lambda waiting=waiting: running.server.statistics()["waiting"] == waiting)
        more.set()
        await until(lambda: len(one.requests) == 5)
        await until(lambda: not running.server.desk.live)
        assert [request.prompt for request in one.requests] == ["first", "high", "middle", "low", "low too"]


async def test_a_policy_is_kept_and_no_other_island_taken(tmp_path: Path) -> None:
    here, away = island(1, tokens_per_s=1.0), island(2, tokens_per_s=99.0)
    async with opened(url_of(tmp_path), here, away, job_timeout_s=0.5, island_wait_s=0.01) as running:
        running.port.advertise(here, region="ch-zurich")
        running.port.advertise(away, region="us-east-1")
        job_id = await submit(running, policy="switzerland")
        job = await ended(running, job_id)
        assert (job["island"], job["region"], job["policy"]) == (here.peer, "ch-zurich", "switzerland")
        answer = await chat(running, policy={"regions": ["ch"]}, explain=True)
        assert answer.json()["metadata"]["placement"]["filtered"] == {"policy": 1}
        error = error_of(await chat(running, policy={"regions": ["fr"]}), 503, "no_island")
        assert "policy" in error["message"]
        nowhere = await ended(running, await submit(running, policy={"regions": ["fr", "de"]}))
        assert nowhere["error"]["code"] == "no_island" and "policy" in nowhere["error"]["message"]
        assert nowhere["policy"] == {"regions": ["de", "fr"]}
        assert not away.requests


async def test_a_job_waits_for_an_island_as_long_as_it_may_run(tmp_path: Path) -> None:
    one = island()
    async with opened(url_of(tmp_path), one, island_wait_s=0.01, capacity_wait_s=0.01) as running:
        await chat(running)
        running.port.lose(one)
        job_id = await submit(running)
        await trio.sleep(0.1)
        assert (await get(running, f"{JOBS}/{job_id}")).json()["state"] == "submitted"
        running.port.advertise(one)
        assert (await ended(running, job_id))["state"] == "succeeded"


async def test_a_job_for_a_cargo_that_nobody_has_ever_offered_fails(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island()) as running:
        job = await ended(running, await submit(running, cargo="nobody/has-it"))
        assert job["state"] == "failed" and job["error"]["code"] == "unknown_cargo" and job["price"] == "0"
        assert await funds(running) == (ALL, 0)


async def test_a_bug_in_one_job_ends_that_job_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing of its input, which the text of an error may quote."""
    one = island()
    async with opened(url_of(tmp_path), one) as running:
        async def broken(*_arguments: Any) -> Any:
            raise RuntimeError(TEXT)

        with monkeypatch.context() as patch:
            patch.setattr(running.server.desk, "_succeed", broken)
            bad = await submit(running)
            await until(lambda: "RuntimeError" in caplog.text)
        assert (await ended(running, await submit(running)))["state"] == "succeeded"
        for _ in range(3):
            await running.server._parts.upkeep._round(sweep=False)
        assert (await ended(running, bad))["state"] == "succeeded", "begun again"
    assert TEXT not in caplog.text


async def test_draining_refuses_new_jobs_and_waits_for_those_that_run(tmp_path: Path) -> None:
    more = trio.Event()
    one = island(1, Script(hang_after=1, until=more), ask=ASK)
    async with opened(url_of(tmp_path), one) as running, http(running) as idle, trio.open_nursery() as nursery:
        job_id = await submit(running)
        await until(lambda: one.open_now == 1 and running.server.desk.is_busy)
        await idle.get("/health")
        drained: list[bool] = []

        async def drain() -> None:
            drained.append(await running.server.drain(10))

        nursery.start_soon(drain)
        await trio.sleep(0.1)
        assert not drained
        error_of(await idle.post(JOBS, json=A_JOB), 503, "draining")
        more.set()
        await until(lambda: bool(drained))
        assert drained == [True] and (await row(running, job_id)).state is JobState.SUCCEEDED


async def test_a_job_that_runs_when_the_coordinator_ends_is_not_lost(database_url: str) -> None:
    """In good order or not: the next run of the same Coordinator takes it up, and it is billed once."""
    one = island(1, Script(hang_after=2, times=1), ask=ASK)
    async with opened(database_url, one) as running:
        job_id, key = await submit(running), running.key
        await until(lambda: one.open_now == 1)
    async with opened(database_url, one, api_key=key) as running:
        job = await ended(running, job_id)
        assert (job["state"], job["tries"], job["price"]) == ("succeeded", 2, format_credits(PRICE))
        assert await funds(running) == (ALL - PRICE, 0)
