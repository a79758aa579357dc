"""A/B tests on a whole Coordinator: requests find their arms, counters keep, and a decision is what follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest
import trio

from coordinator.abtests import deciding
from coordinator.abtests.plan import AbState
from coordinator.books import ab_tests as rows
from coordinator.books import cargos as cargo_rows
from coordinator.books import schema
from coordinator.cache.policy import CacheConfig
from coordinator.cargo_rules import CargoState
from coordinator.keys import ACCOUNT_DEFAULT, create_key
from coordinator.orders import Order
from protocol.cargos import Runtime
from tests.coordinator.abtests.ab_net import (
    AB,
    NAME,
    NEW,
    NEW_ASK,
    OLD,
    OLD_ASK,
    VARIANTS,
    call,
    chat,
    create,
    decisions_of,
    islands,
    name_tests,
    offering,
    ok,
    publish,
    quick_looks,
    reaches,
    service_of,
    started,
    talking,
    units_of,
    variants_of,
)
from tests.coordinator.clients import http
from tests.coordinator.desks import OTHER, ended, error_of, mortal, opened, submit, until, url_of
from tests.coordinator.fakes import Running, Script
from tests.protocol.cargo_samples import cargo
from tests.protocol.samples import NOW_MS

USERS = [f"user {number}" for number in range(40)]
MANY = [f"user {number}" for number in range(320)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_looks(monkeypatch)


async def state_of(running: Running, id: str) -> str:
    return str((await ok(running, "GET", f"{AB}/{id}"))["state"])


async def test_users_are_sorted_into_arms_and_stay_there(database_url: str) -> None:
    old, new = islands()
    async with talking(database_url, old, new) as running:
        assert set((await variants_of(running, USERS[:4])).values()) == {None} and len(new.requests) == 0
        id = await started(running)
        first = await variants_of(running, USERS)
        got = Counter(first.values())
        assert set(got) == {"control", "new"} and min(got.values()) >= 10
        assert (len(old.requests), len(new.requests)) == (4 + got["control"], got["new"]), "metadata says what happened"
        assert await variants_of(running, USERS) == first
        async with opened(database_url, old, new, key=OTHER, api_key=running.key) as other:
            assert await variants_of(other, USERS) == first, "another Coordinator says the same"
        units = await units_of(running, id)
        assert len(units) == 40 and {unit.jobs for unit in units.values()} == {3}
        assert all(user not in str(units) for user in USERS[:9])


async def test_metadata_headers_and_jobs_say_which_arm(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await started(running)
        answer = await chat(running, "bo")
        metadata = answer.json()["metadata"]
        assert metadata["ab_test_id"] == id and answer.headers["x-archipelag-ab-variant"] == metadata["ab_variant_name"]
        job = await ok(running, "GET", f"/api/v1/jobs/{metadata['job_id']}")
        assert job["metadata"] == {"ab_test_id": id, "ab_variant_name": metadata["ab_variant_name"]}
        async with http(running) as client:
            body = {"model": NAME, "messages": [{"role": "user", "content": "one"}], "user": "bo", "stream": True}
            streamed = (await client.post("/v1/chat/completions", json=body)).text
        assert f'"ab_variant_name":"{metadata["ab_variant_name"]}"' in streamed
        submitted = await submit(running, cargo=NAME, user="bo")
        job = await ended(running, submitted)
        assert job["metadata"]["ab_variant_name"] == metadata["ab_variant_name"], "a job is a user's request like any other"
        (unit,) = (await units_of(running, id)).values()
        assert unit.jobs == 3


async def test_accounts_or_jobs_may_be_the_units(books_url: str) -> None:
    ann = create_key(books_url, "ann")
    async with talking(books_url) as running:
        id = await started(running, unit="account")
        assert len(set((await variants_of(running, USERS[:8])).values())) == 1
        await chat(running, "x")
        async with http(running, ann) as client:
            await chat(running, "x", client=client)
        assert len(await units_of(running, id)) == 2
        await ok(running, "POST", f"{AB}/{id}/rollback")
        id = await started(running, unit="job")
        async with http(running) as client:
            got = Counter([(await chat(running, "same", client=client)).json()["metadata"]["ab_variant_name"] for _ in range(24)])
        assert len(got) == 2 and len(await units_of(running, id)) == 24


async def test_a_better_version_is_promoted_by_itself(database_url: str) -> None:
    """It costs half as much; from then on the name stands for it, by a signed event."""
    old, new = islands()
    async with talking(database_url, old, new) as running:
        assert running.server.registry.current(NAME).cargo.address == OLD.address  # type: ignore[union-attr]
        id = await started(running)
        await variants_of(running, MANY)
        await reaches(running, id, "promoted")
        shown = await ok(running, "GET", f"{AB}/{id}/results")
        (comparison,) = shown["comparisons"]
        assert comparison["conclusive"] and comparison["interval"]["high"] < 0 and comparison["p_value"] < 0.05
        assert shown["decision"]["winner"] == shown["test"]["winner"] == "new"
        assert sum(variant["job_count"] for variant in shown["variants"]) == len(await units_of(running, id)) >= 200
        current = running.server.registry.current(NAME)
        assert current is not None and current.cargo.address == NEW.address
        before = len(new.requests)
        assert set((await variants_of(running, USERS)).values()) == {None}
        assert len(new.requests) == before + len(USERS), "everybody gets what won"
        kinds = [event["kind"] for event in (await ok(running, "GET", f"{AB}/{id}/events"))["data"]]
        assert kinds == ["created", "activated", "promoted"]
        await units_of(running, id)
        # and back again
        assert (await ok(running, "POST", f"{AB}/{id}/rollback"))["state"] == "rolled_back"
        before = len(old.requests)
        await variants_of(running, USERS[:5])
        assert len(old.requests) == before + 5


async def test_without_a_difference_nothing_happens(books_url: str) -> None:
    async with talking(books_url, offering(OLD, 1, OLD_ASK), offering(NEW, 2, OLD_ASK)) as running:
        id = await started(running)
        await variants_of(running, MANY)
        looks = decisions_of(running).looks
        await until(lambda: decisions_of(running).looks > looks + 5)
        assert await state_of(running, id) == "active"
        (comparison,) = (await ok(running, "GET", f"{AB}/{id}/results"))["comparisons"]
        assert not comparison["conclusive"]


@pytest.mark.parametrize(("change", "waiting"), [({"minimum_hours": 1}, "minimum_hours"), ({"minimum_samples": 1000}, "minimum_samples")])
async def test_no_promotion_before_the_minimums(books_url: str, change: dict[str, Any], waiting: str) -> None:
    async with talking(books_url) as running:
        id = await started(running, **change)
        await variants_of(running, MANY)
        looks = decisions_of(running).looks
        await until(lambda: decisions_of(running).looks > looks + 5)
        shown = await ok(running, "GET", f"{AB}/{id}/results")
        assert shown["test"]["state"] == "active" and waiting in str(shown["decision"]["waiting"])
        assert shown["comparisons"][0]["conclusive"], "the figures alone would do"


async def test_a_promotion_by_hand_needs_a_start_and_a_variant(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await create(running, auto_promote=False)
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={}), 409, "ab_test_not_started")
        error_of(await call(running, "POST", f"{AB}/{id}/pause", json={}), 409, "ab_test_not_started")
        await ok(running, "POST", f"{AB}/{id}/activate")
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={}), 409, "ab_test_has_no_winner", "variant")
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "none"}), 400, "invalid_ab_test", "variant")
        assert (await ok(running, "POST", f"{AB}/{id}/promote", {"variant": "new"}))["winner"] == "new"
        event = (await ok(running, "GET", f"{AB}/{id}/events"))["data"][-1]
        assert event["kind"] == "promoted" and event["account"] and event["detail"]["is_conclusive"] is False
        for action in ("activate", "pause"):
            error_of(await call(running, "POST", f"{AB}/{id}/{action}", json={}), 409, "wrong_state")
        assert (await ok(running, "POST", f"{AB}/{id}/promote"))["state"] == "promoted", "said again it changes nothing"


async def test_a_draft_just_ends(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await create(running)
        before = running.server.registry.promotion_of(NAME)
        assert (await ok(running, "POST", f"{AB}/{id}/rollback"))["state"] == "rolled_back"
        assert running.server.registry.promotion_of(NAME) == before
        error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "wrong_state")


async def test_a_crooked_ratio_blocks_everything(books_url: str) -> None:
    """Units that went astray: 4,600 and 5,400 in the counters."""
    async with talking(books_url) as running:
        id = await started(running, primary_metric="latency")
        await seed(running, id, {"control": 4_600, "new": 5_400})
        looks = decisions_of(running).looks
        await until(lambda: decisions_of(running).looks > looks + 3)
        shown = await ok(running, "GET", f"{AB}/{id}/results")
        assert shown["test"]["state"] == "active" and not shown["sample_ratio"]["ok"] and shown["sample_ratio"]["p_value"] < 1e-12
        assert shown["decision"]["verdict"] == "blocked" and shown["comparisons"][0]["conclusive"]
        told = error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "new", "force": True}), 409, "ab_test_blocked")
        assert "shares" in told["message"]
        kinds = [event["kind"] for event in (await ok(running, "GET", f"{AB}/{id}/events"))["data"]]
        assert kinds == ["created", "activated", "blocked"], "said once, not at each look"


async def seed(running: Running, id: str, units: dict[str, int], fails: int = 0) -> None:
    """Jobs of so many units, and their counters: those of the new arm take 80 ± 10 ms, the control's 100 ± 10. Of the new arm every
    ``fails``-th has failed."""
    await chat(running, "a template")
    template = await running.server.books.ask(_any_job)
    opened = {**template, "price_micros": 0, "completion_tokens": 0, "first_word_us": 0, "ab_test": id}

    def write(connection: Any) -> None:
        for arm, count in units.items():
            base_us = 80_000 if arm == "new" else 100_000
            rows_of_jobs = []
            for number in range(count):
                failed = bool(fails) and arm == "new" and number % fails == 0
                state, latency_us = ("failed", 0) if failed else ("succeeded", base_us + (10_000 if number % 2 else -10_000))
                own = {"id": f"{id}-{arm}-{number}", "ab_arm": arm, "ab_unit": str(number), "state": state, "latency_us": latency_us}
                rows_of_jobs.append({**opened, **own, "error_code": "cargo_failed" if failed else ""})
            connection.execute(schema.jobs.insert(), rows_of_jobs)
            held = {"account": f"user:{template['account']}", "amount": 0, "posted": 0, "state": "released", "created_at_ms": 1}
            connection.execute(schema.holds.insert(), [{**held, "id": one["id"], "expires_at_ms": 1} for one in rows_of_jobs])
        counted = [asdict(unit) for unit in rows.recount(connection, id).values()]
        connection.execute(schema.ab_units.delete().where(schema.ab_units.c.test == id))
        connection.execute(schema.ab_units.insert(), counted)

    await running.server.books.change(write)


def _any_job(connection: Any) -> dict[str, Any]:
    return dict(connection.execute(schema.jobs.select().limit(1)).mappings().one())


async def test_a_variant_that_is_suspended_gives_its_traffic_back_to_base(books_url: str) -> None:
    old, new = islands()
    async with talking(books_url, old, new) as running:
        id = await started(running)
        arms = await variants_of(running, USERS)
        await running.server.books.change(cargo_rows.set_state, NEW.address, CargoState.SUSPENDED, NOW_MS)
        await running.server.registry.refresh()
        before = len(new.requests)
        assert set((await variants_of(running, USERS)).values()) == {None}
        assert len(new.requests) == before and "new" in arms.values()
        await reaches(running, id, "paused")
        assert "suspended" in (await ok(running, "GET", f"{AB}/{id}"))["note"]
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "new"}), 409, "ab_test_blocked", "variant")
        error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "variant_not_offered")


async def test_while_nobody_offers_a_version_the_test_stands_still(books_url: str) -> None:
    old, new = islands()
    async with talking(books_url, old, new) as running:
        id = await started(running)
        await variants_of(running, USERS)
        running.port.lose(new)
        counted = await units_of(running, id)
        assert set((await variants_of(running, USERS)).values()) == {None}, "all of them: or the arms would not be alike"
        assert await units_of(running, id) == counted
        with trio.fail_after(5):
            while "no Island offers" not in ((await ok(running, "GET", f"{AB}/{id}"))["note"] or ""):
                await trio.sleep(0.01)
        hours = (await ok(running, "GET", f"{AB}/{id}"))["running_hours"]
        looks = decisions_of(running).looks
        await until(lambda: decisions_of(running).looks > looks + 3)
        assert (await ok(running, "GET", f"{AB}/{id}"))["running_hours"] == hours
        running.port.advertise(new)
        assert set((await variants_of(running, USERS)).values()) == {"control", "new"}
        with trio.fail_after(5):
            while (await ok(running, "GET", f"{AB}/{id}"))["reason"]:
                await trio.sleep(0.01)
        kinds = [event["kind"] for event in (await ok(running, "GET", f"{AB}/{id}/events"))["data"]]
        assert kinds == ["created", "activated", "held", "resumed"]


async def test_one_active_test_on_a_cargo(database_url: str) -> None:
    async with talking(database_url) as running:
        first, second = await started(running), await create(running)
        error_of(await call(running, "POST", f"{AB}/{second}/activate", json={}), 409, "cargo_has_active_test", "base_cargo")
        await ok(running, "POST", f"{AB}/{first}/pause")
        assert set((await variants_of(running, USERS[:9])).values()) == {None}
        await ok(running, "POST", f"{AB}/{second}/activate")
        error_of(await call(running, "POST", f"{AB}/{first}/activate", json={}), 409, "cargo_has_active_test", "base_cargo")


async def test_versions_have_to_be_offered_before_a_test_begins(books_url: str) -> None:
    async with talking(books_url, islands()[0]) as running:
        id = await create(running)
        error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "variant_not_offered")


async def test_nobody_tests_with_what_is_not_theirs(books_url: str) -> None:
    ann = create_key(books_url, "ann")
    async with talking(books_url) as running:
        id = await started(running)
        paths = ["GET ", "GET /results", "GET /events", "POST /pause", "POST /rollback", "POST /promote"]
        for method, _, path in (one.partition(" ") for one in paths):
            more: dict[str, Any] = {"json": {}} if method == "POST" else {}
            error_of(await call(running, method, f"{AB}/{id}{path}", key=ann, **more), 404, "unknown_ab_test")
        answer = await call(running, "POST", AB, key=ann, json={"name": "x", "base_cargo": NAME, "variants": VARIANTS})
        error_of(answer, 403, "not_your_cargo", "base_cargo")


async def test_a_variant_may_be_a_cargo_of_another_name(books_url: str) -> None:
    """And, once promoted, the base's name stands for it."""
    another = cargo("talk-two", "1.0.0", runtime=Runtime.GGUF)
    old, two = offering(OLD, 1, OLD_ASK), offering(another, 2, NEW_ASK)
    async with opened(books_url, old, two) as running:
        name_tests(running)
        await publish(running, OLD, another)
        variants = [{"name": "a", "cargo": NAME, "traffic_percent": 50}, {"name": "b", "cargo": "talk-two", "traffic_percent": 50}]
        id = await started(running, variants=variants, auto_promote=False)
        assert set((await variants_of(running, USERS)).values()) == {"a", "b"}
        await ok(running, "POST", f"{AB}/{id}/promote", {"variant": "b"})
        before = len(two.requests)
        await variants_of(running, USERS[:4])
        assert len(two.requests) == before + 4


async def test_answers_from_the_cache_count_apart(database_url: str) -> None:
    """And each unit has answers of its own (more in test_ab_cached.py)."""
    async with talking(database_url, cache=CacheConfig()) as running:
        id = await started(running)
        texts: dict[str, list[bool]] = {}
        async with http(running) as client:
            for _ in range(2):
                for user in USERS:
                    answer = (await chat(running, user, "the same question", client, temperature=0)).json()["metadata"]
                    texts.setdefault(answer["ab_variant_name"], []).append(answer["cache_hit"])
        assert all(hits == [False] * (len(hits) // 2) + [True] * (len(hits) // 2) for hits in texts.values()) and len(texts) == 2
        await service_of(running).flush()
        units = await units_of(running, id)
        assert len(units) == len(USERS) and {(unit.jobs, unit.cached) for unit in units.values()} == {(1, 1)}
        shown = await ok(running, "GET", f"{AB}/{id}/results")
        assert {row["name"]: (row["job_count"], row["cached_count"]) for row in shown["variants"]} == {
            arm: (len(hits) // 2, len(hits) // 2) for arm, hits in texts.items()
        }


async def test_after_a_promotion_the_old_versions_answers_are_not_told(books_url: str) -> None:
    old, new = islands()
    async with talking(books_url, old, new, cache=CacheConfig()) as running:
        before = (await chat(running, "", "a question", temperature=0)).json()["metadata"]
        assert (await chat(running, "", "a question", temperature=0)).json()["metadata"]["cache_hit"] and not before["cache_hit"]
        id = await started(running, auto_promote=False)
        await ok(running, "POST", f"{AB}/{id}/promote", {"variant": "new"})
        await running.server.registry.refresh()
        monkeypatched_offers = running.server.cache._versions._offered
        monkeypatched_offers.clear()  # what Islands offer is looked at once a second
        after = (await chat(running, "", "a question", temperature=0)).json()["metadata"]
        assert not after["cache_hit"] and len(new.requests) == 1


async def test_a_coordinator_is_killed_and_the_counters_equal_the_jobs(database_url: str) -> None:
    old, new = islands()
    hung = offering(NEW, 3, NEW_ASK, Script(hang_after=1))
    async with mortal(database_url, old, new) as first:
        name_tests(first.running)
        await publish(first.running, OLD)
        await publish(first.running, NEW, candidate=True)
        id = await started(first.running)
        arms = await variants_of(first.running, USERS)
        running = first.running
        async with opened(database_url, old, hung, key=OTHER, api_key=running.key) as second:
            await first.kill()
            units = await units_of(second, id)
            assert sum(unit.jobs for unit in units.values()) == len(USERS)
            control = [user for user, arm in arms.items() if arm == "control"]
            assert set((await variants_of(second, control)).values()) == {"control"}
            assert sum(unit.jobs for unit in (await units_of(second, id)).values()) == len(USERS) + len(control)


async def test_a_job_that_is_adopted_stays_in_its_arm(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.upkeep.BEAT_S", 0.04)
    monkeypatch.setattr("coordinator.upkeep.DEAD_S", 0.4)
    monkeypatch.setattr("coordinator.upkeep._SILENT_S", 0.1)
    old, new = islands()
    hanging = [offering(OLD, 3, OLD_ASK, Script(hang_after=1)), offering(NEW, 4, NEW_ASK, Script(hang_after=1))]
    async with mortal(database_url, *hanging) as first:
        name_tests(first.running)
        await publish(first.running, OLD)
        await publish(first.running, NEW, candidate=True)
        id = await started(first.running)
        jobs = [await submit(first.running, cargo=NAME, user=user) for user in USERS[:8]]
        await until(lambda: sum(one.open_now for one in hanging) == len(jobs))
        async with opened(database_url, old, new, key=OTHER, api_key=first.running.key) as second:
            await first.kill()
            shown = [await ended(second, job) for job in jobs]
            assert {job["state"] for job in shown} == {"succeeded"}
            got = Counter(job["metadata"]["ab_variant_name"] for job in shown)
            assert (len(old.requests), len(new.requests)) == (got["control"], got["new"])
            units = (await units_of(second, id)).values()
            assert Counter(unit.arm for unit in units) == got, "each unit is known in its arm"
            assert sum(unit.jobs for unit in units) == 0, "and no time of a second try counts"


@pytest.mark.parametrize("jump_ms", [30 * 24 * 3_600_000, -30 * 24 * 3_600_000])
async def test_a_clock_that_jumps_neither_ends_nor_stops_a_test(
    books_url: str, monkeypatch: pytest.MonkeyPatch, jump_ms: int
) -> None:
    async with talking(books_url) as running:
        id = await started(running, minimum_hours=24, primary_metric="latency")
        tests = decisions_of(running)
        real = tests._now_ms

        async def jumped() -> int:
            return await real() + jump_ms

        await seed(running, id, {"control": 500, "new": 500})
        monkeypatch.setattr(tests, "_now_ms", jumped)
        looks = tests.looks
        await until(lambda: tests.looks > looks + 3)
        test = await running.server.books.ask(rows.test_of, id)
        assert test is not None and test.state is AbState.ACTIVE
        assert test.active_ms <= 2 * deciding.STEP_MAX_MS and test.seen_at_ms - await jumped() <= 0, "time goes on from the new clock"
        assert "minimum_hours" in str((await ok(running, "GET", f"{AB}/{id}/results"))["decision"]["waiting"])


async def test_a_version_that_breaks_a_guardrail_is_stopped(books_url: str) -> None:
    """It is faster, and every second of its answers fails."""
    old = offering(OLD, 1, OLD_ASK)
    async with talking(books_url, old, offering(NEW, 2, NEW_ASK)) as running:
        id = await started(running, primary_metric="latency", guardrails=["success"], minimum_samples=5000)
        await seed(running, id, {"control": 400, "new": 400}, fails=2)
        await reaches(running, id, "paused")
        shown = await ok(running, "GET", f"{AB}/{id}")
        event = (await ok(running, "GET", f"{AB}/{id}/events"))["data"][-1]
        assert event["detail"]["reason"] == "harmful" and "guardrail" in shown["note"]
        assert set((await variants_of(running, USERS[:6])).values()) == {None}


async def test_a_ramp_begins_with_few(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await started(running, ramp=[{"percent": 20, "hours": 1}])
        arms = await variants_of(running, USERS)
        assert 0 < sum(arm is not None for arm in arms.values()) < 20
        assert (await ok(running, "GET", f"{AB}/{id}/results"))["exposure_percent"] == 20

        def later(connection: Any) -> None:
            test = rows.test_of(connection, id)
            assert test is not None
            rows.change(connection, replace(test, active_ms=3_600_000))

        with trio.fail_after(5):
            while True:
                try:
                    await running.server.books.change(later)
                    break
                except rows.Outrun:
                    continue
        await service_of(running).refresh()
        after = await variants_of(running, USERS)
        assert None not in after.values() and all(after[user] == arm for user, arm in arms.items() if arm is not None)


async def test_thumbs_of_consumers_count(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await started(running, primary_metric="thumbs")
        answer = (await chat(running, "bo")).json()
        for rating in ("up", "down", "up"):
            shown = await ok(running, "POST", f"/api/v1/jobs/{answer['id']}/feedback", {"rating": rating})
        assert shown["rating"] == "up"
        (unit,) = (await units_of(running, id)).values()
        assert (unit.ups, unit.rated) == (1, 1)
        variants = (await ok(running, "GET", f"{AB}/{id}/results"))["variants"]
        assert [row["thumbs_up_percent"] for row in variants if row["rated"]] == [100]


async def test_assigning_asks_no_database(books_url: str) -> None:
    """But once for what the account bids, which is then known for a while."""
    async with talking(books_url) as running:
        await started(running)
        tests, books = service_of(running), running.server.books
        assign, asked, questions, inside = tests.assign, books.ask, list[str](), set[trio.lowlevel.Task]()

        async def noting(order: Order) -> Order:
            inside.add(trio.lowlevel.current_task())
            try:
                return await assign(order)
            finally:
                inside.remove(trio.lowlevel.current_task())

        async def counting(question: Any, *arguments: Any) -> Any:
            if trio.lowlevel.current_task() in inside:
                questions.append(question.__name__)
            return await asked(question, *arguments)

        tests.assign, books.ask = noting, counting  # type: ignore[method-assign]
        assert None not in (await variants_of(running, USERS[:10])).values()
        tests.assign, books.ask = assign, asked  # type: ignore[method-assign]
        assert questions == ["saved_bid"]


QUICK: dict[str, Any] = {"island_wait_s": 0.01, "capacity_wait_s": 0.01}


@pytest.mark.parametrize(
    ("wish", "text", "status"),
    [
        # the new release asks twice as much, and has a context of 5,000 tokens; neither stands anywhere in particular
        ({"bid_price": 0.03}, "one two three", 200),
        ({}, "word " * 6_000, 200),
        ({"policy": {"regions": ["de"]}}, "one two three", 503),
    ],
)
async def test_a_request_that_not_every_arm_could_run_is_in_none(tmp_path: Any, wish: dict[str, Any], text: str, status: int) -> None:
    """It gets what it would get without the test, whatever arm its user is in; or the test would see other requests in each arm."""
    cheap, dear = offering(OLD, 1, NEW_ASK), offering(NEW, 2, OLD_ASK)
    dear.offers = (replace(dear.offers[0], context_tokens=5_000),)
    async with talking(url_of(tmp_path), cheap, dear, **QUICK) as running:
        await started(running)
        assert set((await variants_of(running, USERS[:12])).values()) == {"control", "new"}
        answers = [await chat(running, user, text, **wish) for user in USERS[:12]]
        assert {answer.status_code for answer in answers} == {status}, ("as without a test", answers[0].text[:500])
        assert status != 200 or not any("ab_variant_name" in answer.json()["metadata"] for answer in answers)
        assert service_of(running).unfit == 12


async def test_a_saved_bid_counts_as_a_bid(tmp_path: Any) -> None:
    cheap, dear = offering(OLD, 1, NEW_ASK), offering(NEW, 2, OLD_ASK)
    async with talking(url_of(tmp_path), cheap, dear) as running:
        await started(running)
        await running.server._parts.market.save_bid(ACCOUNT_DEFAULT, NAME, 30_000)
        assert set((await variants_of(running, USERS[:12])).values()) == {None}
