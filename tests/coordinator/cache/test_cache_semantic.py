"""The semantic step: what hits, what the guards throw out, what it costs, how hits are checked and when it is switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from coordinator.books import cache_rows
from coordinator.cache.judging import looks_the_same, says_the_same, unit
from coordinator.cache.meaning import WAITING_MAX
from coordinator.cache.policy import CacheConfig
from coordinator.cache.service import WARM_UP_CHECKS
from coordinator.cache.shadow import SHADOW_ACCOUNT
from coordinator.desk import Desk
from protocol.cargos import CachePolicy
from tests.coordinator.cache_net import FakeEmbedding, OneDirection, ask, body, cache_of, cached, said, stats, strategy
from tests.coordinator.clients import http
from tests.coordinator.desks import CHAT, JOBS, funds, rows, set_funds, until, url_of
from tests.coordinator.fakes import FakeIsland, Running, Script, island

KEPT = "How do I reset my password?"
SAME = "Could you please tell me how to reset my password?"
OTHER = "How do I change my postal address?"
ALL_CHECKED = CacheConfig(shadow_share=1.0)


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    return url_of(tmp_path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator says is heard soon."""
    monkeypatch.setattr("coordinator.cache.service.POLL_S", 0.02)


async def learnt(running: Running) -> None:
    """What was kept can be found."""
    await until(lambda: not cache_of(running)._meaning.learning)


async def keep(running: Running, text: str = KEPT, **changes: Any) -> None:
    assert strategy(await ask(running, text, **changes)) is None
    await learnt(running)


async def test_another_wording_of_the_same(books_url: str) -> None:
    one, embedding = island(), OneDirection()
    async with cached(books_url, one, embedding=embedding) as running:
        await keep(running)
        answer = await ask(running, SAME)
        assert strategy(answer) == "semantic" and said(answer) == KEPT and len(one.requests) == 1
        first = await ask(running, KEPT)
        assert answer.headers["x-archipelag-cache-key"] == first.headers["x-archipelag-cache-key"]  # of what is told, to delete it by
        assert answer.json()["metadata"]["price"] == "0" and (await stats(running))["hits_semantic"] == 1
        async with http(running) as client:
            streamed = await client.post(CHAT, json=body(SAME, stream=True))
            assert streamed.headers["x-archipelag-cache-strategy"] == "semantic" and '"cache_strategy":"semantic"' in streamed.text
            job = await client.post(JOBS, json={"cargo": "echo", "input": {k: v for k, v in body(SAME).items() if k != "model"}})
            assert (job.json()["cache_hit"], job.json()["cache_strategy"], job.json()["state"]) == (True, "semantic", "succeeded")
        assert len(one.requests) == 1


async def test_who_wants_the_same_question_gets_no_other_one(books_url: str) -> None:
    """A client that says so, and batches and workflows, whose inputs are data."""
    one = island()
    async with cached(books_url, one, embedding=OneDirection()) as running:
        await keep(running)
        async with http(running) as client:
            asked = await client.post(CHAT, json=body(SAME), headers={"x-archipelag-cache": "exact"})
            assert asked.json()["metadata"]["cache_hit"] is False and said(asked) == SAME and len(one.requests) == 2
            reworded = SAME + " Thanks!"
            inputs = [{k: v for k, v in body(text).items() if k != "model"} for text in (KEPT, reworded)]
            batch = (await client.post(f"{JOBS}/batch", json={"cargo": "echo", "inputs": inputs})).json()
            await until(lambda: not running.server._parts.runs.is_live(batch["id"]))
            outputs = (await client.get(f"{JOBS}/{batch['id']}/output")).json()["outputs"]
        assert [output["text"] for output in outputs] == [KEPT, reworded] and len(one.requests) == 3


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ("Turn on dark mode", "Turn off dark mode"),
        ("Convert 5 kg to pounds", "Convert 6 kg to pounds"),
        ("Convert 5 kg to pounds", "Convert 5 g to pounds"),
        ("Is aspirin safe for dogs?", "Is aspirin not safe for dogs?"),
        ("Did Italy beat France in the final?", "Did France beat Italy in the final?"),
        ("What is the capital of France?", "What is the capital of Spain?"),
        ("Explain `a < b` in Python", "Explain `a > b` in Python"),
    ],
)
async def test_the_guards_throw_out_what_only_looks_alike(books_url: str, kept: str, asked: str) -> None:
    """Although the vectors are the same."""
    one, embedding = island(), OneDirection()
    async with cached(books_url, one, embedding=embedding) as running:
        await keep(running, kept)
        embedding.calls = 0
        assert strategy(await ask(running, asked)) is None and len(one.requests) == 2
        found = await stats(running)
        assert found["hits"] == 0 and found["vetoed"] == 1 and embedding.calls <= 1  # for what is kept now, not to find something


async def test_the_nearest_counts_if_it_is_near_enough(books_url: str) -> None:
    embedding = FakeEmbedding()
    async with cached(books_url, island(), embedding=embedding) as running:
        await keep(running)
        assert strategy(await ask(running, SAME)) is None  # words and guards would have it, but the vectors are far apart
        assert any("reset" in text for text in embedding.asked)


async def test_a_miss_without_candidates_costs_no_vector(books_url: str) -> None:
    embedding = OneDirection()
    async with cached(books_url, island(), embedding=embedding) as running:
        await keep(running)
        cache_of(running)._meaning.learn = lambda entry: None  # type: ignore[method-assign]
        embedding.calls = 0
        assert strategy(await ask(running, "What is the weather like in Oslo?")) is None
        assert embedding.calls == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1},
        {"max_tokens": 9},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAME}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": SAME}]},
        {"seed": 5},
    ],
    ids=["temperature", "length", "system", "history", "seed"],
)
async def test_only_within_one_context(books_url: str, changes: dict[str, Any]) -> None:
    async with cached(books_url, island(), embedding=OneDirection()) as running:
        await keep(running)
        assert strategy(await ask(running, SAME, **changes)) is None


@pytest.mark.parametrize(("state", "fails"), [("the model is still being read", False), ("on", True)], ids=["off", "broken"])
async def test_without_vectors_it_is_off_and_says_so(books_url: str, state: str, fails: bool) -> None:
    embedding = OneDirection(state=state, fails=fails)
    async with cached(books_url, island(), embedding=embedding) as running:
        await keep(running)
        assert strategy(await ask(running, SAME)) is None and strategy(await ask(running, KEPT)) == "exact"
        async with http(running, "") as client:
            assert (await client.get("/health")).json()["cache"]["semantic"] == state
        if not fails:
            assert embedding.calls == 0
            embedding.state = "on"  # what was kept meanwhile gets its vector when it is looked at
            assert strategy(await ask(running, "Please, how do I reset my password?")) == "semantic"


async def test_a_bug_in_the_step_is_a_miss(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_text: str) -> str:
        raise KeyError("secret")

    async with cached(books_url, island(), embedding=OneDirection()) as running:
        await keep(running)
        monkeypatch.setattr("coordinator.cache.meaning.core", broken)
        assert said(await ask(running, SAME)) == SAME
        await learnt(running)
        assert cache_of(running)._meaning.failures == 2 and strategy(await ask(running, SAME)) == "exact"


async def test_vectors_that_do_not_come_are_done_without(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.cache.meaning.EMBED_S", 0.02)
    embedding = OneDirection()
    async with cached(books_url, island(), embedding=embedding) as running:
        await keep(running)
        embedding.gate = trio.Event()
        assert said(await ask(running, SAME)) == SAME and cache_of(running)._meaning.failures >= 1


async def test_more_questions_than_can_be_read(books_url: str) -> None:
    """They are kept for equal ones."""
    one, embedding = island(), OneDirection()
    async with cached(books_url, one, embedding=embedding) as running:
        meaning = cache_of(running)._meaning
        for _ in range(WAITING_MAX):
            meaning._send.send_nowait(None)  # type: ignore[arg-type]
            if meaning._receive.statistics().current_buffer_used == WAITING_MAX:
                break
        await ask(running, KEPT)
        assert strategy(await ask(running, KEPT)) == "exact"


@pytest.mark.parametrize("milli", [1000, 999])
async def test_the_policy_says_how_alike(books_url: str, milli: int) -> None:
    config = CacheConfig(similarity_milli=milli, shadow_share=0.0)
    async with cached(books_url, island(), embedding=OneDirection(), cache=config) as running:
        await keep(running)
        assert strategy(await ask(running, SAME)) == ("semantic" if milli < 1000 else None)


async def test_what_was_deleted_while_vectors_were_made(books_url: str) -> None:
    embedding = OneDirection()
    async with cached(books_url, island(), embedding=embedding) as running, trio.open_nursery() as nursery:
        await keep(running)
        embedding.gate, embedding.calls = trio.Event(), 0
        answers = []

        async def late() -> None:
            answers.append(await ask(running, SAME))

        nursery.start_soon(late)
        await until(lambda: embedding.calls == 1)
        await cache_of(running).delete("local")
        embedding.gate.set()
        await until(lambda: bool(answers))
        assert strategy(answers[0]) is None and said(answers[0]) == SAME


# ---- checks in the shadow


async def checks(running: Running, done: int) -> tuple[int, int]:
    """False, of how many, once so many are done."""
    counts = cache_of(running).statistics
    await until(lambda: counts.checks == done and not cache_of(running)._shadow.running)
    return counts.checks_false, counts.checks


def liar(*words: str) -> FakeIsland:
    """An Island that says the same to everything at first, and then something else."""
    return island(1, Script(words=("Open ", "the settings."), times=1), Script(words=words))


async def test_a_hit_is_checked_by_asking_an_island(books_url: str) -> None:
    one = liar("Open ", "the  settings.")
    async with cached(books_url, one, embedding=OneDirection(), cache=ALL_CHECKED) as running:
        await keep(running)
        before = await funds(running)
        assert strategy(await ask(running, SAME)) == "semantic"
        assert await checks(running, 1) == (0, 1) and len(one.requests) == 2
        assert one.requests[1].messages[-1].content == SAME
        (check,) = await rows(running, SHADOW_ACCOUNT)
        assert check.kind == "check" and check.price_micros > 0
        assert await funds(running) == before  # who has asked pays nothing
        assert one.tickets[0].cache_salt != one.tickets[1].cache_salt
        assert strategy(await ask(running, KEPT)) == "exact"  # exact hits are not checked
        assert (await stats(running))["checks"] == {"done": 1, "false": 0, "failed": 0}


async def test_drawn_answers_are_compared_without_chance(books_url: str) -> None:
    one = island(1, Script(words=("This ", "once."), times=1), Script(words=("Always ", "this.")))
    async with cached(books_url, one, embedding=OneDirection(), cache=ALL_CHECKED) as running:
        await keep(running, temperature=0.7)
        assert strategy(await ask(running, SAME, temperature=0.7)) == "semantic"
        assert await checks(running, 1) == (0, 1)
        asked = [(request.messages[-1].content, request.sampling.temperature) for request in one.requests]
        assert asked == [(KEPT, 0.7), (SAME, 0.0), (KEPT, 0.0)]


WORDINGS = (SAME, "Hello, how do I reset my password?", "How do I reset my password, please?", "Please tell me how to reset my password.")


async def test_the_step_switches_itself_off(books_url: str) -> None:
    """Each wording is answered from the kept one, and an Island says something else: two false of two are too many."""
    one = liar("No, ", "that cannot be done.")
    async with cached(books_url, one, embedding=OneDirection(), cache=ALL_CHECKED) as running:
        await keep(running, temperature=0)
        assert strategy(await ask(running, WORDINGS[0])) == "semantic"
        assert await checks(running, 1) == (1, 1)
        # what has stood in falsely stands in no more
        assert strategy(await ask(running, WORDINGS[1])) is None
        await learnt(running)
        one.scripts = [Script(words=("Ask ", "7 people."))]
        assert strategy(await ask(running, WORDINGS[2])) == "semantic"
        assert await checks(running, 2) == (2, 2)
        await cache_of(running).delete("local")
        await keep(running)
        assert strategy(await ask(running, WORDINGS[3])) is None
        found = await stats(running)
        assert found["semantic"] == "on" and found["semantic_off"] == ["echo"]
        assert found["cargos"]["echo"]["semantic"] == "off" and found["cargos"]["echo"]["checks"]["false"] == 2
        async with http(running, "") as client:
            assert (await client.get("/health")).json()["cache"] == {"enabled": True, "semantic": "on", "semantic_off": ["echo"]}
        assert strategy(await ask(running, KEPT)) == "exact"
        await said_again(running)
        assert strategy(await ask(running, WORDINGS[0])) == "semantic" and (await stats(running))["semantic_off"] == []


async def said_again(running: Running) -> None:
    """The operator sets the policy."""
    await running.server.books.change(cache_rows.set_policy, "echo", CachePolicy(), 1)
    await until(lambda: not cache_of(running)._budget.is_off("echo"))


async def test_without_credit_nothing_is_checked(books_url: str) -> None:
    one = liar("Open ", "the settings.")
    async with cached(books_url, one, embedding=OneDirection(), cache=ALL_CHECKED) as running:
        await keep(running)
        await ask(running, WORDINGS[0])
        await checks(running, 1)
        await set_funds(running, 0, SHADOW_ACCOUNT)
        assert strategy(await ask(running, WORDINGS[1])) == "semantic"
        await until(lambda: cache_of(running)._shadow.failed == 1)
        assert (await stats(running))["checks"] == {"done": 1, "false": 0, "failed": 1} and len(one.requests) == 2


async def test_a_share_of_the_hits_is_checked_and_a_larger_one_at_first(books_url: str) -> None:
    """Seeded: about half of the hits up to WARM_UP_CHECKS checks, then a quarter."""
    one = liar("Open ", "the settings.")
    async with cached(books_url, one, embedding=OneDirection(), cache=CacheConfig(shadow_share=0.25)) as running:
        cache = cache_of(running)
        cache._rng.seed(7)
        await keep(running)

        async def hits(count: int) -> int:
            """How many of so many are checked."""
            before = cache.statistics.checks
            for _ in range(count):
                assert strategy(await ask(running, SAME)) == "semantic"
                await until(lambda: not cache._shadow.running)
            return cache.statistics.checks - before

        assert 6 <= await hits(20) <= 14
        await hits(30)
        assert cache.statistics.checks >= WARM_UP_CHECKS
        assert 4 <= await hits(40) <= 16 and len(one.requests) == 1 + cache.statistics.checks


async def test_checks_do_not_pile_up(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = trio.Event()
    collect = Desk.collect

    async def slow(self: Desk, order: Any) -> Any:
        if order.account == SHADOW_ACCOUNT:
            await gate.wait()
        return await collect(self, order)

    monkeypatch.setattr(Desk, "collect", slow)
    async with cached(books_url, liar("Open ", "the settings."), embedding=OneDirection(), cache=ALL_CHECKED) as running:
        await keep(running)
        for _ in range(5):
            assert strategy(await ask(running, SAME)) == "semantic"
        assert cache_of(running)._shadow.running == 2
        gate.set()
        assert await checks(running, 2) == (0, 2)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Open the settings.", "open  the settings.", True),
        ("It takes 5 days.", "It takes 6 days.", False),
        ("It takes 5 days.", "It takes some days.", False),
        ("You can do that.", "You cannot do that.", False),
        ("You can do that.", "You can't do that.", False),
        ("You can\u2019t do that.", "You cannot do that.", None),
        ("Open the settings.", "Go to the settings.", None),
    ],
)
def test_what_words_tell_of_two_answers(one: str, other: str, same: bool | None) -> None:
    assert says_the_same(one, other) is same and says_the_same(other, one) is same


def test_what_vectors_tell_of_two_answers() -> None:
    assert looks_the_same([1, 0], [1, 0.4]) and not looks_the_same([1, 0], [1, 0.6])
    assert not looks_the_same([0, 0], [0, 0]) and unit([float("nan"), 1]) is None and unit([]) is None
