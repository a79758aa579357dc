"""A/B tests and answers that are told again: each unit's cache is its own, and an answer names the arm of the job that gave it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio

from coordinator.abtests.assignment import arm_of, unit_key
from coordinator.abtests.router import AbRouter
from coordinator.abtests.service import AbTests
from coordinator.books import cache_rows
from coordinator.cache.asking import CacheAsk
from coordinator.cache.policy import CacheConfig
from coordinator.http.answers import Answer
from coordinator.http.line_answers import LineAnswer
from coordinator.jobs import Accepted, Assigned, CacheHit, CachePassed, CacheWaits, Event, JobSpec, Replayed
from coordinator.keys import ACCOUNT_DEFAULT, create_key
from coordinator.orders import AbArm, Order
from protocol.cargos import CachePolicy
from tests.coordinator.abtests.ab_net import (
    AB,
    NAME,
    OLD,
    OLD_ASK,
    VARIANTS,
    chat,
    islands,
    offering,
    ok,
    quick_looks,
    service_of,
    started,
    talking,
    units_of,
)
from tests.coordinator.cache_net import OneDirection, cache_of
from tests.coordinator.clients import http
from tests.coordinator.desks import CHAT, JOBS, until, url_of
from tests.coordinator.fakes import NO_CACHE, Running, Script
from tests.protocol.samples import NOW_MS

CACHE = CacheConfig(shadow_share=0.0)
UNEQUAL = [{**VARIANTS[0], "traffic_percent": 90}, {**VARIANTS[1], "traffic_percent": 10}]
KEPT = "How do I reset my password?"
SAME = "Could you please tell me how to reset my password?"
KEY, AGAIN = {"Idempotency-Key": "order-1"}, {"x-stainless-retry-count": "1"}
ROUNDS = 8  # of coins that have to fall the same way: by chance once in 256


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_looks(monkeypatch)
    monkeypatch.setattr("coordinator.cache.service.POLL_S", 0.02)


def users_of(running: Running, id: str, arm: str, account: str = ACCOUNT_DEFAULT) -> Iterator[str]:
    """Users of an account that are in an arm."""
    tests = service_of(running)
    plan = tests._tests[id].plan

    def is_in(user: str) -> bool:
        return arm_of(plan, id, unit_key(tests._secret, plan.unit, id, account, user, "")).name == arm

    return (user for number in count() if is_in(user := f"user {number}"))


async def told(running: Running, user: str, text: str, **more: Any) -> dict[str, Any]:
    """The metadata of an answer that the cache may keep."""
    answer = await chat(running, user, text, temperature=0, **more)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["metadata"]
    return found


async def hits(running: Running, user: str, *texts: str) -> list[str | None]:
    return [(await told(running, user, text))["cache_strategy"] for text in texts]


async def counted(running: Running, id: str) -> Counter[tuple[str, int, int]]:
    """Arm, jobs and cached answers of each unit."""
    await service_of(running).flush()
    return Counter((unit.arm, unit.jobs, unit.cached) for unit in (await units_of(running, id)).values())


# ---- answers from the cache


async def test_arms_of_unequal_shares_see_the_same_kinds_of_jobs(database_url: str) -> None:
    """What everybody asks is as often among the jobs of a unit of the small arm as of the large one."""
    old, new = islands()
    async with talking(database_url, old, new, cache=CACHE) as running:
        id = await started(running, variants=UNEQUAL)
        control, trial = [users_of(running, id, arm) for arm in ("control", "new")]
        users = {**dict.fromkeys(islice(control, 9), "control"), **dict.fromkeys(islice(trial, 3), "new")}
        for user, arm in users.items():
            texts = ["popular", "popular", f"rare words of {user}", "popular", f"rare words of {user}"]
            said = [await told(running, user, text) for text in texts]
            assert {one["ab_variant_name"] for one in said} == {arm}
            assert [one["cache_hit"] for one in said] == [False, True, False, True, True]
        assert await counted(running, id) == {("control", 2, 3): 9, ("new", 2, 3): 3}
        popular = [[request.messages[-1].content for request in one.requests].count("popular") for one in (old, new)]
        assert popular == [9, 3] and (len(old.requests), len(new.requests)) == (18, 6)


async def test_no_unit_is_told_what_another_one_was(database_url: str) -> None:
    """Although both are in one arm and of one account; neither the same question nor another wording of it."""
    async with talking(database_url, cache=CACHE, embedding=OneDirection()) as running:
        id = await started(running)
        ann, bo, cy = islice(users_of(running, id, "new"), 3)
        assert await hits(running, ann, KEPT, KEPT) == [None, "exact"]
        await until(lambda: not cache_of(running)._meaning.learning)
        assert await hits(running, ann, SAME) == ["semantic"]
        assert await hits(running, bo, SAME) == await hits(running, cy, KEPT) == [None]
        await until(lambda: not cache_of(running)._meaning.learning)
        assert await hits(running, bo, SAME, KEPT) == await hits(running, cy, KEPT, SAME) == ["exact", "semantic"]


async def test_in_a_public_cargo_too(database_url: str) -> None:
    ann = create_key(database_url, "ann")
    async with talking(database_url, cache=CACHE) as running:
        await running.server.books.change(cache_rows.set_policy, NAME, CachePolicy(public=True), NOW_MS)
        await until(lambda: NAME in cache_of(running)._said)

        async def of_ann(text: str, user: str = "") -> bool:
            async with http(running, ann) as client:
                return bool((await chat(running, user, text, client, temperature=0)).json()["metadata"]["cache_hit"])

        assert await hits(running, "", "before") == [None] and await of_ann("before")
        id = await started(running)
        one, other = next(users_of(running, id, "new")), next(users_of(running, id, "new", "ann"))
        assert await hits(running, one, "meanwhile", "meanwhile") == [None, "exact"]
        assert [await of_ann("meanwhile", other) for _ in range(2)] == [False, True]
        await ok(running, "POST", f"{AB}/{id}/rollback")
        assert await hits(running, "", "after") == [None] and await of_ann("after")


async def test_before_and_after_a_test_everything_is_shared(database_url: str) -> None:
    async with talking(database_url, cache=CACHE) as running:
        assert await hits(running, "ann", "first") == [None] and await hits(running, "bo", "first") == ["exact"]
        id = await started(running)
        assert await hits(running, "bo", "first", "first", "second") == [None, "exact", None]
        await ok(running, "POST", f"{AB}/{id}/pause")
        assert await hits(running, "cy", "first", "second") == ["exact", None], "what a test has kept is the unit's own"
        assert await hits(running, "ann", "second") == ["exact"]
        await ok(running, "POST", f"{AB}/{id}/activate")
        assert await hits(running, "bo", "second") == ["exact"], "and counts again when it goes on"
        await ok(running, "POST", f"{AB}/{id}/rollback")
        assert await hits(running, "dan", "first", "second") == ["exact", "exact"]


async def test_equal_questions_at_once_are_one_job_within_a_unit(tmp_path: Path) -> None:
    gate = trio.Event()
    one = offering(OLD, 1, OLD_ASK, Script(hang_after=1, until=gate))
    async with talking(url_of(tmp_path), one, islands()[1], cache=CACHE) as running:
        id = await started(running)
        ann, bo = islice(users_of(running, id, "control"), 2)
        found: list[tuple[str, bool]] = []

        async def ask(user: str) -> None:
            found.append((user, (await told(running, user, "one two three"))["cache_hit"]))

        async with trio.open_nursery() as nursery:
            for user in (ann, ann, bo, bo):
                nursery.start_soon(ask, user)
            await until(lambda: cache_of(running).statistics.waited == 2 and len(one.requests) == 2)
            gate.set()
        assert sorted(found) == sorted([(ann, False), (ann, True), (bo, False), (bo, True)]) and len(one.requests) == 2


async def test_where_each_job_is_a_unit_nothing_is_told_again(database_url: str) -> None:
    async with talking(database_url, cache=CACHE) as running:
        id = await started(running, unit="job")
        assert await hits(running, "ann", *["the same"] * 4) == [None] * 4
        found = await counted(running, id)
        assert sum(found.values()) == 4 and {(jobs, cached) for _, jobs, cached in found} == {(1, 0)}


def test_keys_of_a_version_of_a_unit_and_of_another_test() -> None:
    ask = CacheAsk("talk", "ann", b"k" * 32, b"c" * 32, "a question")
    made = [ask, ask.pinned("talk", "aa"), ask.pinned("talk", "bb"), ask.pinned("talk-2", "aa")]
    made += [ask.pinned("talk", "aa", unit) for unit in ("ab_1/u", "ab_1/v", "ab_2/u")] + [ask.pinned("talk", "bb", "ab_1/u")]
    assert len({one.key for one in made}) == len({one.context for one in made}) == len(made)
    assert not replace(ask, context=b"").pinned("talk", "aa", "ab_1/u").context, "where only an equal question will do that stays so"


# ---- answers of an earlier job

Ask = Callable[[Running, dict[str, str] | None], Awaitable[tuple[dict[str, Any], httpx.Headers]]]


async def whole(running: Running, headers: dict[str, str] | None) -> tuple[dict[str, Any], httpx.Headers]:
    body = {"model": NAME, "messages": [{"role": "user", "content": "one two"}], "user": "bo", "temperature": 0}
    async with http(running) as client:
        answer = await client.post(CHAT, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["metadata"], answer.headers


async def streamed(running: Running, headers: dict[str, str] | None) -> tuple[dict[str, Any], httpx.Headers]:
    body = {"model": NAME, "messages": [{"role": "user", "content": "one two"}], "user": "bo", "temperature": 0, "stream": True}
    async with http(running) as client:
        answer = await client.post(CHAT, json=body, headers=headers)
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]
    return chunks[-1]["metadata"], answer.headers


async def submitted(running: Running, headers: dict[str, str] | None) -> tuple[dict[str, Any], httpx.Headers]:
    async with http(running) as client:
        answer = await client.post(JOBS, json={"cargo": NAME, "input": {"prompt": "one two"}}, headers=headers)
    job = answer.json()
    return {**job["metadata"], "job_id": job["id"]}, answer.headers


def arm_said(metadata: dict[str, Any], headers: httpx.Headers) -> tuple[str, str, str] | None:
    """Job, test and variant, which metadata and headers have to agree on; None for a job that is in no test."""
    test, variant = metadata.get("ab_test_id"), metadata.get("ab_variant_name")
    assert (headers.get("x-archipelag-ab-test"), headers.get("x-archipelag-ab-variant")) == (test, variant)
    assert headers["x-archipelag-job"] == metadata["job_id"]
    return None if test is None else (metadata["job_id"], test, str(variant))


@pytest.mark.parametrize("cache", [NO_CACHE, CACHE], ids=["no cache", "cache"])
@pytest.mark.parametrize("how", [whole, streamed, submitted])
async def test_a_request_that_comes_again_names_the_arm_of_its_job(tmp_path: Path, how: Ask, cache: CacheConfig) -> None:
    """Each try would be a unit of its own, and half of them in the other arm."""
    async with talking(url_of(tmp_path), cache=cache) as running:
        id = await started(running, unit="job")
        for number in range(ROUNDS):
            key = {"Idempotency-Key": f"order-{number}"}
            first, second = [arm_said(*await how(running, key)) for _ in range(2)]
            assert first is not None and first == second and first[1] == id
        await until(lambda: not running.server._parts.desk.live)
        found = await counted(running, id)
        assert sum(found.values()) == ROUNDS and {(jobs, cached) for _, jobs, cached in found} == {(1, 0)}, "a replay is no job"


async def test_a_retry_of_openais_clients_names_the_arm_of_its_job(tmp_path: Path) -> None:
    async with talking(url_of(tmp_path)) as running:
        id = await started(running, unit="job")
        first = arm_said(*await whole(running, None))
        again = [await whole(running, AGAIN) for _ in range(ROUNDS)]
        assert first is not None and {arm_said(*one) for one in again} == {first}
        assert {headers["x-archipelag-replayed"] for _, headers in again} == {"true"}
        assert sum((await counted(running, id)).values()) == 1


@pytest.mark.parametrize("cache", [NO_CACHE, CACHE], ids=["no cache", "cache"])
@pytest.mark.parametrize("how", [whole, streamed, submitted])
async def test_an_answer_from_before_a_test_names_none(tmp_path: Path, how: Ask, cache: CacheConfig) -> None:
    """And one from the test names it when the test has ended."""
    async with talking(url_of(tmp_path), cache=cache) as running:
        before = await how(running, KEY)
        id = await started(running)
        again = await how(running, KEY)
        assert arm_said(*before) is arm_said(*again) is None and again[0]["job_id"] == before[0]["job_id"]
        assert await counted(running, id) == {}
        within = {"Idempotency-Key": "order-2"}
        said = arm_said(*await how(running, within))
        await ok(running, "POST", f"{AB}/{id}/rollback")
        assert said is not None and arm_said(*await how(running, within)) == said


async def test_of_jobs_of_one_key_at_once_one_counts_as_cached(tmp_path: Path) -> None:
    """All have found the answer before the first of them is in the books."""
    async with talking(url_of(tmp_path), cache=CACHE) as running:
        id = await started(running, unit="account")
        await submitted(running, None)
        await until(lambda: cache_of(running).statistics.kept == 1)
        look, together, looked = cache_of(running).look, trio.Event(), list[Order]()

        async def look_together(order: Order) -> list[Event] | None:
            found = await look(order)
            looked.append(order)
            if len(looked) == 3:
                together.set()
            await together.wait()
            return found

        cache_of(running).look = look_together  # type: ignore[method-assign]
        jobs = list[str]()

        async def ask() -> None:
            jobs.append((await submitted(running, KEY))[0]["job_id"])

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert len(jobs) == 3 and len(set(jobs)) == 1
        ((_, ran, cached), units) = next(iter((await counted(running, id)).items()))
        assert (ran, cached, units) == (1, 1, 1)


# ---- who says it


@pytest.mark.parametrize("answer", [Answer(cast("Any", None), "j", 0), LineAnswer("talk", "j", 0)], ids=["texts", "lines"])
def test_an_earlier_job_has_the_last_word(answer: Answer | LineAnswer) -> None:
    answer.note(Assigned("ab_1", "new"))
    answer.note(Replayed("j0", "ab_0", "old"))
    assert (answer.job_id, answer.assigned, answer.is_replay) == ("j0", Assigned("ab_0", "old"), True)
    answer.note(Replayed("j1"))
    assert (answer.job_id, answer.assigned) == ("j1", None)


class _Tests:
    """Puts every order into one arm."""

    def __init__(self) -> None:
        self.cached = 0

    async def assign(self, order: Order) -> Order:
        return replace(order, arm=AbArm("ab_1", "new", "u"))

    def note_cached(self, _arm: AbArm) -> None:
        self.cached += 1


class _Telling:
    def __init__(self, events: list[Event]) -> None:
        self._events = events

    async def run(self, _order: Order, emit: Callable[[Event], Awaitable[None]]) -> None:
        for event in self._events:
            await emit(event)


ORDER = Order(JobSpec("j", "talk", bytes(32), (cast("Any", None),)), cast("Any", None), "chat")
ASSIGNED, ACCEPTED, HIT = Assigned("ab_1", "new"), Accepted(0, "i", "e", 0.1), CacheHit("exact", "aa")
OLD_ONE = Replayed("j0", "ab_0", "old")


@pytest.mark.parametrize(
    ("may_come_again", "events", "said", "cached"),
    [
        (False, [CacheWaits(), ACCEPTED], [ASSIGNED, CacheWaits(), ACCEPTED], 0),
        (False, [HIT, ACCEPTED], [ASSIGNED, HIT, ACCEPTED], 1),
        (True, [CacheWaits(), ACCEPTED, ACCEPTED], [CacheWaits(), ASSIGNED, ACCEPTED, ACCEPTED], 0),
        (True, [HIT, ACCEPTED], [ASSIGNED, HIT, ACCEPTED], 1),
        (True, [OLD_ONE, ACCEPTED], [OLD_ONE, ACCEPTED], 0),
        (True, [CachePassed(), OLD_ONE, ACCEPTED], [CachePassed(), OLD_ONE, ACCEPTED], 0),
    ],
)
@pytest.mark.parametrize("how", ["key", "retry"])
async def test_no_arm_is_said_before_it_is_known(
    may_come_again: bool, events: list[Event], said: list[Event], cached: int, how: str
) -> None:
    """The head of a stream, which may go out before its words, has it too."""
    tests = _Tests()
    router = AbRouter(cast("AbTests", tests), _Telling(events))
    change: dict[str, Any] = {"idempotency_key": "order-1"} if how == "key" else {"is_retry": True}
    assert await router.collect(replace(ORDER, **change) if may_come_again else ORDER) == said
    assert tests.cached == cached
