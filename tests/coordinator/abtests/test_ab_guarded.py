"""What may go wrong round an A/B test, and must not: bases that move, prices nobody agreed to, rows that nobody can read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.abtests import deciding, decision
from coordinator.books import schema
from coordinator.books.errors import BooksUnavailable
from coordinator.cargo_rules import Fault, RegistryRefused
from coordinator.keys import ACCOUNT_DEFAULT
from protocol.cargos import Runtime
from protocol.prices import Ask
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
    variants_of,
)
from tests.coordinator.desks import error_of, opened, until
from tests.coordinator.fakes import Running
from tests.protocol.cargo_samples import cargo

USERS = [f"user {number}" for number in range(16)]
THIRD = cargo(NAME, "3.0.0", runtime=Runtime.GGUF)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_looks(monkeypatch)


def stands_for(running: Running) -> str:
    current = running.server.registry.current(NAME)
    assert current is not None
    return current.cargo.manifest.release


async def shown(running: Running, id: str) -> dict[str, Any]:
    return await ok(running, "GET", f"{AB}/{id}")


async def test_a_base_that_moves_ends_the_comparison(books_url: str) -> None:
    """A third release is published plainly: what is measured against the first says nothing about that."""
    async with talking(books_url) as running:
        id = await started(running)
        await publish(running, THIRD)
        test = await reaches(running, id, "paused")
        assert "3.0.0" in test["note"] and test["reason"] == "base_changed" and stands_for(running) == "3.0.0"
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "new"}), 409, "wrong_state", "base_cargo")
        error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "wrong_state", "base_cargo")
        await ok(running, "POST", f"{AB}/{id}/rollback")
        assert stands_for(running) == "3.0.0", "what a test has not promoted it does not take back"


async def test_a_base_that_moved_before_the_start(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await create(running)
        await publish(running, THIRD)
        error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "wrong_state", "base_cargo")


async def test_a_promotion_does_not_overtake_one_that_just_came(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This Coordinator has not heard of the third release yet; the transaction has."""
    async with talking(books_url) as running:
        id = await started(running)
        await publish(running, THIRD)
        monkeypatch.setattr(decisions_of(running), "_moved", lambda test: "")
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "new"}), 409, "wrong_state", "base_cargo")
        assert stands_for(running) == "3.0.0"


async def test_a_rollback_does_not_overtake_what_came_after_the_promotion(books_url: str) -> None:
    async with talking(books_url) as running:
        id = await started(running)
        await ok(running, "POST", f"{AB}/{id}/promote", {"variant": "new"})
        await publish(running, THIRD)
        error_of(await call(running, "POST", f"{AB}/{id}/rollback", json={}), 409, "wrong_state")
        assert stands_for(running) == "3.0.0" and (await shown(running, id))["state"] == "promoted"


async def test_without_the_base_on_trial_nothing_is_promoted_by_itself(books_url: str) -> None:
    """The better of two candidates may still be worse than what everybody has."""
    async with talking(books_url, *islands(), offering(THIRD, 3, NEW_ASK)) as running:
        await publish(running, THIRD, candidate=True)
        variants = [{**VARIANTS[0], "cargo": f"{NAME}@3.0.0"}, VARIANTS[1]]
        made = await ok(running, "POST", AB, {"name": "x", "base_cargo": NAME, "variants": variants})
        assert made["auto_promote"] is False and stands_for(running) == "1.0.0"
        await ok(running, "POST", f"{AB}/{made['id']}/activate")
        await ok(running, "POST", f"{AB}/{made['id']}/promote", {"variant": "new"})
        assert stands_for(running) == "2.0.0", "by hand it may be"


async def test_nobody_pays_far_more_because_of_a_test(books_url: str) -> None:
    """Requests without a bid cost what Islands ask; Consumers know the base's price, not the variant's."""
    dear = offering(NEW, 2, Ask(per_1k_output=20 * NEW_ASK.per_1k_output))
    async with talking(books_url, offering(OLD, 1, NEW_ASK), dear) as running:
        id = await create(running)
        told = error_of(await call(running, "POST", f"{AB}/{id}/activate", json={}), 409, "variant_not_offered")
        assert "costs more than 3 times" in told["message"]


async def test_while_a_version_is_far_dearer_the_test_stands_still(books_url: str) -> None:
    old, new = islands()
    async with talking(books_url, old, new) as running:
        await started(running)
        new.offers = (replace(new.offers[0], ask=Ask(per_1k_output=2_000_000)),)
        running.port.advertise(new)
        assert set((await variants_of(running, USERS)).values()) == {None} and not new.requests


async def test_what_is_saved_for_the_base_holds_for_a_version_of_another_name(books_url: str) -> None:
    two = cargo("talk-two", "1.0.0", runtime=Runtime.GGUF)
    async with opened(books_url, offering(OLD, 1, OLD_ASK), offering(two, 2, NEW_ASK)) as running:
        name_tests(running)
        await publish(running, OLD, two)
        variants = [VARIANTS[0], {"name": "b", "cargo": "talk-two", "traffic_percent": 50}]
        await started(running, variants=variants)
        await running.server._parts.market.save_bid(ACCOUNT_DEFAULT, NAME, 60_000)
        found = await variants_of(running, USERS)
        assert set(found.values()) == {"control", "b"}
        jobs = await running.server.books.ask(lambda connection: connection.execute(schema.jobs.select()).all())
        assert {job.cargo for job in jobs} == {NAME, "talk-two"} and {job.bid_micros for job in jobs} == {60_000}


async def test_without_the_books_a_request_is_in_no_test(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be answered without a test is."""
    async with talking(books_url) as running:
        await started(running)

        async def away(account: str, name: str) -> int | None:
            raise BooksUnavailable("as the test wants it")

        monkeypatch.setattr(service_of(running), "_saved_bid", away)
        assert (await chat(running, "bo")).json()["metadata"].get("ab_variant_name") is None


async def test_a_held_test_is_not_promoted_by_hand(books_url: str) -> None:
    old, new = islands()
    async with talking(books_url, old, new) as running:
        id = await started(running)
        running.port.lose(new)
        error_of(await call(running, "POST", f"{AB}/{id}/promote", json={"variant": "new"}), 409, "ab_test_blocked", "variant")
        assert (await ok(running, "GET", f"{AB}/{id}/results"))["held_because"]


async def test_a_row_that_nobody_can_read_ends_nothing(books_url: str) -> None:
    """A later version of the program may have written it."""
    async with talking(books_url) as running:
        id, broken = await started(running), await create(running)

        def damage(connection: Any) -> None:
            table = schema.ab_tests
            connection.execute(table.update().where(table.c.id == broken).values(plan="{}", seq=1_000))

        await running.server.books.change(damage)
        await service_of(running).refresh()
        assert None not in (await variants_of(running, USERS[:4])).values()
        async with opened(books_url, *islands(), api_key=running.key) as again:
            assert None not in (await variants_of(again, USERS[:4])).values()
        await ok(running, "POST", f"{AB}/{id}/pause")
        assert set((await variants_of(running, USERS[:4])).values()) == {None}, "later changes are still heard"


async def test_a_look_that_goes_wrong_ends_no_other(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talking(books_url) as running:
        id = await started(running)
        judge, failed = decision.judge, [0]

        def wrong(*arguments: Any) -> Any:
            failed[0] += 1
            if failed[0] < 4:
                raise ValueError("as the test wants it")
            return judge(*arguments)

        monkeypatch.setattr(deciding, "judge", wrong)
        await until(lambda: failed[0] > 4)
        assert (await shown(running, id))["state"] == "active"


async def test_a_promotion_that_the_registry_refuses_is_told(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with talking(books_url) as running:
        id = await started(running)

        def refuse(*arguments: Any) -> None:
            raise RegistryRefused(Fault.STATE, "no key to sign with")

        monkeypatch.setattr(running.server.registry, "promote_within", refuse)
        await variants_of(running, [f"user {number}" for number in range(300)])
        test = await reaches(running, id, "paused")
        assert "no key to sign with" in test["note"] and stands_for(running) == "1.0.0"
        event = (await ok(running, "GET", f"{AB}/{id}/events"))["data"][-1]
        assert event["detail"]["reason"] == "promotion_refused"
