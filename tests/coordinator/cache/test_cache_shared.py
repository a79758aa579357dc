"""What Coordinators of one database do together: deleting, the operator's policies, public Cargos, releases that come and go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.books import cache_rows
from coordinator.books import cargos as cargo_rows
from coordinator.cache.policy import CacheConfig
from coordinator.cargo_rules import CargoState
from coordinator.keys import create_key
from protocol.cargos import CachePolicy, Runtime, SignedCargo
from protocol.prices import Ask
from tests.coordinator.cache_net import CACHE, OneDirection, ask, cache_of, cached, said, stats, strategy
from tests.coordinator.clients import http
from tests.coordinator.desks import JOBS, OTHER, ended, error_of, until, url_of
from tests.coordinator.fake_lines import ENGINE, FakeLines, LineScript
from tests.coordinator.fakes import FakeIsland, Running, Script, island
from tests.protocol.cargo_samples import cargo
from tests.protocol.samples import NOW_MS

QUESTION = "How do I reset my password?"
NAME = "helper"
QUICK: dict[str, Any] = {"island_wait_s": 0.01, "capacity_wait_s": 0.01}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the database is heard soon, and what Islands offer is seen at once."""
    monkeypatch.setattr("coordinator.cache.service.POLL_S", 0.02)
    monkeypatch.setattr("coordinator.cache.versions.OFFERED_S", 0.0)


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    return url_of(tmp_path)


async def publish(running: Running, one: SignedCargo) -> None:
    async with http(running) as client:
        answer = await client.post("/api/v1/cargos", content=one.envelope, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code == 201, answer.text


async def become(running: Running, one: SignedCargo, state: CargoState) -> None:
    await running.server.books.change(cargo_rows.set_state, one.address, state, NOW_MS)
    await running.server.registry.refresh()


async def say(running: Running, policy: CachePolicy | None, name: str = "echo") -> None:
    """The operator sets a policy, and the Coordinator has heard of it."""
    await running.server.books.change(cache_rows.set_policy, name, policy, NOW_MS)
    await until(lambda: cache_of(running)._said.get(name, (None,))[0] == policy)


def writer(release: SignedCargo, number: int = 1, *scripts: Script) -> FakeIsland:
    """An Island that offers a release of a Cargo that writes texts."""
    return island(number, *scripts, name=NAME, runtime="gguf", content_hash=release.address)


def text_cargo(release: str = "1.0.0", **changes: Any) -> SignedCargo:
    return cargo(NAME, release, runtime=Runtime.GGUF, **changes)


async def test_what_is_deleted_here_is_deleted_everywhere(database_url: str) -> None:
    one, two, ann = island(1), island(1), create_key(database_url, "ann")
    async with cached(database_url, one) as first, cached(database_url, two, key=OTHER, api_key=first.key) as second:
        for text in ("one", "two"):
            await ask(second, text)
        await ask(second, "one", key=ann)
        key = (await ask(first, "one")).headers["x-archipelag-cache-key"]
        async with http(first) as client:
            assert (await client.delete(f"{CACHE}/{key}")).json() == {"deleted": 1}
            await until(lambda: len(cache_of(second)._table) == 2)
            assert strategy(await ask(second, "two")) == strategy(await ask(second, "one", key=ann)) == "exact"
            assert strategy(await ask(second, "one")) is None
            await ask(first, "three")
            await client.delete(CACHE, params={"cargo": "echo"})
            await until(lambda: len(cache_of(second)._table) == 1)
        await ask(first, "four")
        await first.server.books.change(cache_rows.purge, NOW_MS)  # the operator deletes everything
        await until(lambda: not len(cache_of(first)._table) and not len(cache_of(second)._table))


async def test_what_comes_after_a_deletion_stays(database_url: str) -> None:
    """A Coordinator does not take its own word for news a second later."""
    async with cached(database_url, island()) as running:
        await ask(running, QUESTION)
        await cache_of(running).delete("local")
        await ask(running, QUESTION)
        await until(lambda: not cache_of(running)._own)
        assert strategy(await ask(running, QUESTION)) == "exact"


async def test_a_purge_that_makes_no_sense_is_passed_over(books_url: str) -> None:
    async with cached(books_url, island()) as running:
        await ask(running, QUESTION)
        await running.server.books.change(cache_rows.purge, NOW_MS, "", "", "xyz")
        seq = await running.server.books.ask(cache_rows.last_purge)
        await until(lambda: cache_of(running)._seq == seq)
        assert strategy(await ask(running, QUESTION)) == "exact"


async def test_the_operators_word_counts_before_all_others(database_url: str) -> None:
    one = island()
    async with cached(database_url, one) as running:
        await ask(running, QUESTION)
        await say(running, CachePolicy(False))
        for _ in range(2):
            answer = await ask(running, QUESTION)
            assert strategy(answer) is None and answer.headers["x-archipelag-cache"] == "bypass"
        await say(running, None)
        assert strategy(await ask(running, QUESTION)) == "exact" and len(one.requests) == 3
        await say(running, CachePolicy(ttl_s=5))
        await ask(running, "Another question")
        cache, entry = cache_of(running), list(cache_of(running)._table._entries.values())[-1]
        assert entry.expires_at_s - entry.kept_at_s == 5 and cache.statistics.total.exact == 1


async def test_other_coordinators_hear_a_policy(database_url: str) -> None:
    async with cached(database_url, island()) as first, cached(database_url, island(), key=OTHER, api_key=first.key) as second:
        await say(first, CachePolicy(False))
        await until(lambda: "echo" in cache_of(second)._said)
        assert [strategy(await ask(second, QUESTION)) for _ in range(2)] == [None, None]
    async with cached(database_url, island(), api_key=first.key) as third:  # at once, after a start
        assert [strategy(await ask(third, QUESTION)) for _ in range(2)] == [None, None]


async def test_a_public_cargo_answers_all_accounts(books_url: str) -> None:
    one, ann, bob = island(), create_key(books_url, "ann"), create_key(books_url, "bob")
    async with cached(books_url, one, embedding=OneDirection()) as running:
        await say(running, CachePolicy(public=True))
        mine = await ask(running, QUESTION, key=ann)
        theirs = await ask(running, QUESTION, key=bob)
        assert strategy(theirs) == "exact" and len(one.requests) == 1
        # whose job it was is nobody else's business
        assert theirs.json()["metadata"]["job_id"] != mine.json()["metadata"]["job_id"]
        await until(lambda: not cache_of(running)._meaning.learning)
        assert strategy(await ask(running, "Please, how do I reset my password?", key=bob)) == "semantic"
        # who says private gets nobody's answer, and gives nobody his
        private = {"Cache-Control": "private"}
        assert strategy(await ask(running, QUESTION, key=bob, headers=private)) is None
        assert strategy(await ask(running, QUESTION, key=bob, headers=private)) == "exact"
        await ask(running, "A secret question", key=ann, headers=private)
        assert strategy(await ask(running, "A secret question", key=bob)) is None
        assert strategy(await ask(running, "A secret question", key=ann)) == "exact"
        # only who has paid for it can delete it
        async with http(running, bob) as client:
            await client.delete(f"{CACHE}/{theirs.headers['x-archipelag-cache-key']}")
        assert strategy(await ask(running, QUESTION, key=running.key)) == "exact"
        # and a policy that is not public any more holds at once
        await say(running, CachePolicy())
        assert strategy(await ask(running, QUESTION, key=running.key)) is None


@pytest.mark.parametrize("policy", [CachePolicy(False), CachePolicy(public=True)], ids=["off", "public"])
async def test_what_a_manifest_says(books_url: str, policy: CachePolicy) -> None:
    one, ann = text_cargo(cache=policy), create_key(books_url, "ann")
    async with cached(books_url, writer(one)) as running:
        await publish(running, one)
        assert strategy(await ask(running, QUESTION, model=NAME)) is None
        found = [strategy(await ask(running, QUESTION, model=NAME)), strategy(await ask(running, QUESTION, key=ann, model=NAME))]
        assert found == (["exact", "exact"] if policy.enabled else [None, None])
        await say(running, CachePolicy(enabled=not policy.enabled), NAME)
        states = [(await ask(running, "Another", model=NAME)).headers["x-archipelag-cache"] for _ in range(2)]
        assert states == (["bypass"] * 2 if policy.enabled else ["miss", "hit"])


@pytest.mark.parametrize("is_semantic", [False, True])
async def test_a_cargo_that_was_suspended_answers_as_without_a_cache(books_url: str, is_semantic: bool) -> None:
    one = text_cargo()
    asked = "Please, how do I reset my password?" if is_semantic else QUESTION
    async with cached(books_url, writer(one), embedding=OneDirection(), **QUICK) as running:
        await publish(running, one)
        await ask(running, QUESTION, model=NAME)
        await until(lambda: not cache_of(running)._meaning.learning)
        if not is_semantic:
            assert strategy(await ask(running, QUESTION, model=NAME)) == "exact"
        await become(running, one, CargoState.SUSPENDED)
        plain = await ask(running, asked, model=NAME, headers={"Cache-Control": "no-store"})
        refused = await ask(running, asked, model=NAME)
        assert refused.status_code == plain.status_code == 404
        assert error_of(refused, 404, "model_not_found", "model") == error_of(plain, 404, "model_not_found", "model")
        job = await submit(running, asked)
        assert job["state"] == "failed" and not job["cache_hit"]
        await until(lambda: not len(cache_of(running)._table))  # what was kept goes, asked for or not
        await become(running, one, CargoState.APPROVED)
        assert strategy(await ask(running, asked, model=NAME)) is None


async def submit(running: Running, text: str) -> dict[str, Any]:
    given = {"temperature": 0, "messages": [{"role": "user", "content": text}]}
    async with http(running) as client:
        answer: httpx.Response = await client.post(JOBS, json={"cargo": NAME, "input": given})
    assert answer.status_code == 201, answer.text
    return await ended(running, answer.json()["id"])


async def test_an_answer_of_a_release_counts_for_that_release(books_url: str) -> None:
    old, new = text_cargo("1.0.0"), text_cargo("1.1.0")
    islands = writer(old, 1, Script(words=("old",))), writer(new, 2, Script(words=("new",)))
    async with cached(books_url, *islands, **QUICK) as running:
        await publish(running, old)
        assert said(await ask(running, QUESTION, model=NAME)) == "old" and strategy(await ask(running, QUESTION, model=NAME)) == "exact"
        await publish(running, new)
        answer = await ask(running, QUESTION, model=NAME)
        assert strategy(answer) is None and said(answer) == "new"
        assert strategy(await ask(running, QUESTION, model=NAME)) == "exact" and [len(one.requests) for one in islands] == [1, 1]
        await become(running, new, CargoState.SUSPENDED)
        answer = await ask(running, QUESTION, model=NAME)
        assert strategy(answer) is None and said(answer) == "old"  # the newest that may run


async def test_an_unlisted_name_that_stands_for_something_else_now(books_url: str) -> None:
    one = island()
    async with cached(books_url, one) as running:
        await ask(running, QUESTION)
        one.offers = (replace(one.offers[0], content_hash="dd" * 32),)
        running.port.advertise(one)
        await until(lambda: cache_of(running)._versions.offered("echo") == {"dd" * 32})
        assert strategy(await ask(running, QUESTION)) is None and len(one.requests) == 2


async def test_lines_of_a_cargo_whose_manifest_allows_it(books_url: str) -> None:
    one = cargo("text-stats")
    here = island(1, name="text-stats", runtime="wasm", engine=ENGINE, ask=Ask(per_job=700), content_hash=one.address)
    here.lines = FakeLines([LineScript((b'{"type":"status","message":"working"}\n', b'{"type":"done","answer":42,"seed":7}\n'))])
    async with cached(books_url, here) as running, http(running) as client:
        await publish(running, one)
        given = {"cargo": "text-stats", "input": {"text": "One", "n": 1}}
        jobs = [await ended(running, (await client.post(JOBS, json=given)).json()["id"]) for _ in range(2)]
        assert [job["cache_hit"] for job in jobs] == [False, True] and len(here.lines.requests) == 1
        outputs = [(await client.get(f"{JOBS}/{job['id']}/output")).json()["output"] for job in jobs]
        assert outputs[0]["result"] == outputs[1]["result"] == {"answer": 42} and outputs[1]["seed"] == 7
        streamed = await client.post(JOBS, json={**given, "stream": True})
        assert streamed.headers["x-archipelag-cache"] == "hit" and '"answer":42' in streamed.text
        other = await client.post(JOBS, json={**given, "input": {"text": "one", "n": 1}})
        assert other.headers["x-archipelag-cache"] == "miss"
        found = await stats(running)
        assert json.dumps(found).count("text-stats") == 1


async def test_a_cache_of_its_own_per_coordinator(books_url: str) -> None:
    """Answers are not shared: they stand in memory, and go with it."""
    config = CacheConfig(shadow_share=0.0)
    async with cached(books_url, island(), cache=config) as first:
        await ask(first, QUESTION)
    async with cached(books_url, island(), cache=config, api_key=first.key) as again:
        assert strategy(await ask(again, QUESTION)) is None
