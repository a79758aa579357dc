"""What a name stands for at the Coordinators of a database: releases, candidates, promotions and roll-backs, and who may say so."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
import trio
from alembic.migration import MigrationContext
from alembic.operations import Operations

from coordinator.books import cache_rows
from coordinator.books import cargos as cargo_rows
from coordinator.books.migrations.versions import v0005_ab_tests
from coordinator.books.schema import cargo_promotions
from coordinator.cargo_rules import CargoState, Fault, RegistryRefused
from coordinator.http.cargo_routes import STATUS
from coordinator.keys import create_key
from coordinator.registry import Registry
from protocol.cargo_promotions import Promotion, SignedPromotion, read_promotion, sign_promotion
from protocol.cargos import CachePolicy, Runtime, SignedCargo
from tests.coordinator.cache_net import ask, cached, said, strategy
from tests.coordinator.clients import http
from tests.coordinator.desks import OTHER, error_of, get, opened, until, url_of
from tests.coordinator.fakes import COORDINATOR, NETWORK, FakeIsland, Running, Script, island
from tests.protocol.cargo_samples import cargo, revocation
from tests.protocol.samples import FIRST, MIDDLE, NOW_MS

PATH = "/api/v1/cargos"
NAME = "text-stats"
ACCOUNT = "local"
ONE, TWO, THREE = (cargo(NAME, f"{number}.0.0") for number in (1, 2, 3))
ALIAS = cargo("another")


@pytest.fixture
def books_url(tmp_path: Path) -> str:
    """What only memory decides is tried with one kind of database."""
    return url_of(tmp_path)


async def published(running: Running, *cargos: SignedCargo, candidate: bool = False, account: str = ACCOUNT) -> None:
    for one in cargos:
        await running.server.registry.publish(account, one.envelope, candidate)


async def promote(running: Running, one: SignedCargo, name: str = NAME, account: str = ACCOUNT, origin: str = "ab:1") -> SignedPromotion:
    return await running.server.registry.promote(account, name, one.address, origin)


async def become(running: Running, one: SignedCargo, state: CargoState) -> None:
    """As an operator's command says it."""
    await running.server.books.change(cargo_rows.set_state, one.address, state, NOW_MS)
    await running.server.registry.refresh()


def standing(registry: Registry, name: str = NAME) -> list[str]:
    """Where jobs for a name may go, the best first: names and releases."""
    found = [registry.find(address) for address in registry.releases(name) or ()]
    return [f"{one.cargo.manifest.name} {one.cargo.manifest.release}".removeprefix(f"{NAME} ") for one in found if one is not None]


def serial(registry: Registry, name: str = NAME) -> int:
    known = registry.promotion_of(name)
    return known.signed.promotion.serial if known is not None else 0


async def test_without_a_promotion_a_name_stands_for_its_newest_release(books_url: str) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE, TWO)
        assert standing(registry) == ["2.0.0", "1.0.0"] and registry.promotions() == [] and registry.promotion_of(NAME) is None
        assert registry.manifest(NAME) == TWO.manifest and registry.current("nothing") is None and registry.releases("nothing") is None


async def test_a_candidate_leaves_its_name_where_it_is(database_url: str) -> None:
    async with opened(database_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await published(running, TWO, candidate=True)
        assert standing(registry) == ["1.0.0"] and registry.manifest(NAME) == ONE.manifest
        assert registry.manifest(f"{NAME}@2.0.0") == registry.manifest(TWO.address) == TWO.manifest, "who asks for it gets it"
        assert registry.may_run(TWO.address) and not registry.may_run("ab" * 32)
        (known,) = registry.promotions()
        assert known == registry.promotion_of(NAME) and read_promotion(known.signed.envelope) == known.signed
        said_, signer = known.signed.promotion, known.signed.signer
        assert (said_.cargo, said_.release, said_.origin, said_.network) == (ONE.address, "1.0.0", "candidate", NETWORK)
        assert signer == COORDINATOR.peer_id
        await published(running, THREE, candidate=True)
        assert standing(registry) == ["1.0.0"] and registry.promotions() == [known], "it was pinned once"


async def test_over_http(books_url: str) -> None:
    async with opened(books_url) as running, http(running) as client:
        headers = {"Content-Type": "application/octet-stream"}
        first = await client.post(f"{PATH}?candidate=true", content=ONE.envelope, headers=headers)
        told = error_of(first, STATUS[Fault.STATE], "wrong_state", "cargo")
        assert "publish this one without candidate" in told["message"]
        assert (await get(running, PATH, "")).json()["data"] == [], "nothing of it is left"
        error_of(await client.post(f"{PATH}?candidate=yes", content=ONE.envelope, headers=headers), 400, "invalid_value", "candidate")
        assert (await client.post(PATH, content=ONE.envelope, headers=headers)).json()["current"] is True
        second = await client.post(f"{PATH}?candidate=true", content=TWO.envelope, headers=headers)
        assert second.status_code == 201 and second.json()["current"] is False
        shown = {one["release"]: one["current"] for one in (await get(running, PATH, "")).json()["data"]}
        assert shown == {"2.0.0": False, "1.0.0": True}
        assert (await get(running, f"{PATH}/{NAME}", "")).json()["release"] == "1.0.0"
        await promote(running, TWO)
        assert (await get(running, f"{PATH}/{NAME}", "")).json()["release"] == "2.0.0"
        assert (await get(running, f"{PATH}/{NAME}@2.0.0", "")).json()["current"] is True
        assert (await get(running, f"{PATH}/{NAME}@1.0.0", "")).json()["current"] is False


async def test_promoted_and_rolled_back(database_url: str) -> None:
    async with opened(database_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await published(running, TWO, candidate=True)
        signed = await promote(running, TWO)
        assert standing(registry) == ["2.0.0", "1.0.0"] and signed.promotion.origin == "ab:1"
        back = await promote(running, ONE, origin="rollback:1")
        assert standing(registry) == ["1.0.0"] and back.promotion.serial > signed.promotion.serial
        await published(running, THREE)
        assert standing(registry) == ["3.0.0", "1.0.0"], "what was rolled back stands in for nothing"


async def test_what_is_published_plainly_moves_the_name(books_url: str) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await published(running, TWO, candidate=True)
        await published(running, THREE)
        assert standing(registry) == ["3.0.0", "1.0.0"]
        known = registry.promotion_of(NAME)
        assert known is not None and known.signed.promotion.origin == "publish"
        await published(running, THREE)
        assert registry.promotion_of(NAME) == known, "published once"


async def test_where_the_promoted_one_may_not_run_an_older_one_stands_in(books_url: str) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE, TWO)
        await promote(running, TWO)
        await published(running, THREE, candidate=True)
        await become(running, TWO, CargoState.SUSPENDED)
        assert standing(registry) == ["1.0.0"] and not registry.may_run(TWO.address)
        await become(running, TWO, CargoState.APPROVED)
        assert standing(registry) == ["2.0.0", "1.0.0"]
        await registry.revoke(revocation(TWO))
        assert standing(registry) == ["1.0.0"]
        await registry.revoke(revocation(ONE))
        assert standing(registry) == [] and registry.current(NAME) is None and registry.manifest(NAME) is None


async def test_a_name_may_stand_for_another_cargo_of_its_account(books_url: str) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE, ALIAS)
        await published(running, TWO, candidate=True)
        signed = await promote(running, ALIAS)
        assert standing(registry) == ["another 1.0.0", "1.0.0"] and signed.promotion.release == "1.0.0"
        current = registry.current(NAME)
        assert current is not None and current == registry.find(NAME) == registry.current("another")
        assert registry.manifest(NAME) == ALIAS.manifest and standing(registry, "another") == ["another 1.0.0"]
        await promote(running, TWO)
        assert standing(registry) == ["2.0.0", "1.0.0"]


async def refused(fault: Fault, call: Callable[[], Any]) -> None:
    with pytest.raises(RegistryRefused) as error:
        await call()
    assert error.value.fault is fault, error.value


async def test_who_may_promote_what(books_url: str) -> None:
    foreign, late = cargo("foreign", publisher=MIDDLE), cargo(NAME, "4.0.0", expires_at_ms=NOW_MS + 1)
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE, TWO)
        await published(running, foreign, account="ann")
        await registry.revoke(revocation(TWO))
        await become(running, await submitted(running, THREE), CargoState.REJECTED)
        await running.server.books.change(cargo_rows.publish, late, ACCOUNT, True, (), NOW_MS)
        for fault, one, name, account in (
            (Fault.NAME_TAKEN, ONE, NAME, "ann"),
            (Fault.NAME_TAKEN, foreign, NAME, ACCOUNT),
            (Fault.NAME_TAKEN, ONE, "foreign", ACCOUNT),
            (Fault.UNKNOWN, ALIAS, NAME, ACCOUNT),
            (Fault.UNKNOWN, ONE, "nobodys", ACCOUNT),
            (Fault.REVOKED, TWO, NAME, ACCOUNT),
            (Fault.STATE, THREE, NAME, ACCOUNT),
            (Fault.EXPIRED, late, NAME, ACCOUNT),
        ):
            await refused(fault, lambda: promote(running, one, name, account))  # noqa: B023 (it is called at once)
        assert registry.promotions() == [] and standing(registry) == ["1.0.0"]


async def submitted(running: Running, one: SignedCargo, candidate: bool = False) -> SignedCargo:
    """Published where an operator approves."""
    registry = running.server.registry
    registry._auto_approve = False
    await published(running, one, candidate=candidate)
    registry._auto_approve = True
    return one


async def test_what_an_operator_approves_later_moves_its_name_then(database_url: str) -> None:
    async with opened(database_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await submitted(running, TWO, candidate=True)
        pinned = serial(registry)
        assert pinned, "the pin does not wait"
        await submitted(running, THREE)
        assert standing(registry) == ["1.0.0"]
        await become(running, TWO, CargoState.APPROVED)
        assert standing(registry) == ["1.0.0"] and serial(registry) == pinned
        await become(running, THREE, CargoState.APPROVED)
        assert standing(registry) == ["3.0.0", "1.0.0"]
        moved = serial(registry)
        await promote(running, ONE, origin="rollback:1")
        await become(running, THREE, CargoState.SUSPENDED)
        await become(running, THREE, CargoState.APPROVED)
        assert standing(registry) == ["1.0.0"] and serial(registry) > moved, "approved again, it moves nothing a second time"


async def test_what_is_approved_after_a_newer_one_moves_nothing_back(books_url: str) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await published(running, TWO, candidate=True)
        late = await submitted(running, cargo(NAME, "2.5.0"))
        await published(running, THREE)
        await become(running, late, CargoState.APPROVED)
        assert standing(registry) == ["3.0.0", "1.0.0"]
        row = await running.server.books.ask(cargo_rows.cargo_row, late.address)
        assert row is not None and not row.moves_name


async def test_two_coordinators_that_notice_an_approval_promote_once(database_url: str) -> None:
    async with opened(database_url) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        await published(first, ONE)
        await published(first, TWO, candidate=True)
        await submitted(first, THREE)
        before = serial(first.server.registry)
        await first.server.books.change(cargo_rows.set_state, THREE.address, CargoState.APPROVED, NOW_MS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.server.registry.refresh)
            nursery.start_soon(second.server.registry.refresh)
        after = await first.server.books.ask(cargo_rows.promotion_of, NAME)
        for running in (first, second):
            await running.server.registry.refresh()
            assert standing(running.server.registry) == ["3.0.0", "1.0.0"]
            assert after is not None and serial(running.server.registry) == after.promotion.serial > before
        count = await first.server.books.ask(lambda connection: connection.execute(sql.select(cargo_promotions)).all())
        assert len(count) == 1


async def test_a_coordinator_that_notices_late_moves_nothing_again(books_url: str) -> None:
    """Another one has moved the name meanwhile, and its publisher has taken it back."""
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE)
        await published(running, TWO, candidate=True)
        await become(running, await submitted(running, THREE), CargoState.APPROVED)
        await promote(running, ONE, origin="rollback:1")
        await running.server.books.change(registry._move_names, [THREE.address])
        await registry.refresh()
        assert standing(registry) == ["1.0.0"]


async def test_other_coordinators_hear_of_it(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.registry.POLL_S", 0.02)
    async with opened(database_url) as first, opened(database_url, key=OTHER, api_key=first.key) as second:
        await published(first, ONE)
        await published(first, TWO, candidate=True)
        await until(lambda: standing(second.server.registry) == ["1.0.0"])
        signed = await promote(second, TWO)
        assert signed.signer == OTHER.peer_id
        await until(lambda: standing(first.server.registry) == ["2.0.0", "1.0.0"])
    async with opened(database_url, api_key=first.key) as third:
        assert standing(third.server.registry) == ["2.0.0", "1.0.0"], "after a start too"


async def test_within_a_transaction_of_somebody_else(database_url: str) -> None:
    async with opened(database_url) as running:
        registry, books = running.server.registry, running.server.books
        await published(running, ONE)
        await published(running, TWO, candidate=True)

        def fails(connection: sql.Connection) -> None:
            registry.promote_within(connection, NAME, TWO.address, "ab:1")
            raise ValueError("as the test wants it")

        with pytest.raises(ValueError, match="as the test"):
            await books.change(fails)
        await registry.refresh()
        assert standing(registry) == ["1.0.0"], "all of the transaction or nothing"
        signed = await books.change(registry.promote_within, NAME, TWO.address, "ab:1")
        await registry.refresh()
        known = registry.promotion_of(NAME)
        assert known is not None and known.signed == signed and standing(registry) == ["2.0.0", "1.0.0"]


async def test_in_a_transaction_a_name_stands_for_what_it_will_stand_for(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database and what is remembered of it say the same, whatever has happened to the Cargos; the latter knows by itself when time
    makes a difference."""
    rng, clock = random.Random(7), NOW_MS
    names, seen = (NAME, "another"), Counter[str]()
    async with opened(books_url) as running:
        registry, books = running.server.registry, running.server.books
        monkeypatch.setattr(registry, "_now_ms", lambda: clock)
        made: list[SignedCargo] = []
        for step in range(150):
            what = rng.choice(["publish", "candidate", "promote", "promote", "suspend", "approve", "revoke", "wait", "back"])
            one = rng.choice(made) if made else None
            try:
                if what in ("publish", "candidate"):
                    ends_ms = clock + rng.randrange(1, 9) * 1000 if rng.random() < 0.5 else 0
                    made.append(cargo(rng.choice(names), f"{step + 1}.0.0", expires_at_ms=ends_ms))
                    await published(running, made[-1], candidate=what == "candidate")
                elif what in ("wait", "back"):
                    clock += rng.randrange(0, 3000) if what == "wait" else -rng.randrange(0, 2000)
                elif one is None:
                    continue
                elif what == "promote":
                    await promote(running, one, rng.choice(names))
                elif what == "revoke":
                    if rng.random() < 0.2:
                        await registry.revoke(revocation(one))
                else:
                    await become(running, one, CargoState.SUSPENDED if what == "suspend" else CargoState.APPROVED)
            except RegistryRefused:
                continue
            seen[what] += 1
            for name in names:
                current = registry.current(name)
                address = current.cargo.address if current is not None else ""
                assert await books.ask(registry.current_within, name) == address, (step, what)
                behind = current.cargo.manifest.name if current is not None else name
                assert registry.name_behind(name) == behind and (name in registry.aliases()) is (behind != name)
                seen["another"] += behind != name
                seen["none"] += current is None
        assert await books.ask(registry.current_within, "nothing") == "" and registry.name_behind("nothing") == "nothing"
        assert min(seen.values()) >= 3 and len(seen) == 10, seen


async def test_what_a_name_stands_for_is_worked_out_once(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, worked = NOW_MS, Counter[str]()
    async with opened(books_url) as running:
        registry = running.server.registry
        monkeypatch.setattr(registry, "_now_ms", lambda: clock)
        work_out = registry._stand

        def counting(name: str, *more: Any) -> Any:
            worked[name] += 1
            return work_out(name, *more)

        monkeypatch.setattr(registry, "_stand", counting)
        await published(running, ONE, two := cargo(NAME, "2.0.0", expires_at_ms=NOW_MS + 10))
        worked.clear()
        for _ in range(3):
            assert registry.releases(NAME) == (two.address, ONE.address) and registry.releases("nothing") is None
        clock = NOW_MS + 10
        assert registry.releases(NAME) == (two.address, ONE.address) and worked == {NAME: 1}
        clock = NOW_MS + 11
        assert registry.releases(NAME) == registry.releases(NAME) == (ONE.address,) and worked == {NAME: 2}
        clock = NOW_MS
        assert registry.releases(NAME) == (two.address, ONE.address) and worked == {NAME: 3}, "a clock may be set back"
        await published(running, cargo("another"))
        registry.releases(NAME)
        assert worked == {NAME: 4}, "anything may have changed"


async def test_serials_go_up_though_the_clock_goes_back(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(books_url) as running:
        registry = running.server.registry
        await published(running, ONE, TWO)
        clock = NOW_MS + 1_000_000
        monkeypatch.setattr(registry, "_now_ms", lambda: clock)
        found = [(await promote(running, one)).promotion.serial for one in (ONE, TWO)]
        clock -= 900_000
        found += [(await promote(running, one)).promotion.serial for one in (ONE, TWO)]
        assert found == [clock + 900_000 + more for more in range(4)] and standing(registry) == ["2.0.0", "1.0.0"]


async def test_a_coordinator_without_a_key_promotes_nothing(books_url: str) -> None:
    async with opened(books_url) as running:
        await published(running, ONE)
        bare = Registry(running.server.books, lambda: NOW_MS)
        await bare.refresh()
        await refused(Fault.STATE, lambda: bare.promote(ACCOUNT, NAME, ONE.address, "ab:1"))
        assert bare.releases(NAME) == (ONE.address,)


async def test_a_promotion_comes_with_the_proof_of_who_signs_it(books_url: str) -> None:
    async with opened(books_url) as running:
        await published(running, ONE)
        signer = Registry(running.server.books, lambda: NOW_MS, sign=_signed_by_first, delegation=lambda: b"proof", network=NETWORK)
        await signer.promote(ACCOUNT, NAME, ONE.address, "ab:1")
        await running.server.registry.refresh()
        known = running.server.registry.promotion_of(NAME)
        assert known is not None and (known.delegation, known.signed.signer) == (b"proof", FIRST.peer_id)


def _signed_by_first(promotion: Promotion) -> bytes:
    return sign_promotion(promotion, FIRST)


def writer(release: SignedCargo, number: int, word: str) -> FakeIsland:
    return island(
        number, *(Script(words=(word,)) for _ in range(3)), name="helper", runtime="gguf", content_hash=release.address
    )


async def test_answers_that_are_kept_follow(books_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an old release has said is not told any more once its name stands for a new one that somebody offers. After a roll-back it is
    told again where it is still there: not where the new release has answered the same meanwhile."""
    monkeypatch.setattr("coordinator.cache.versions.OFFERED_S", 0.0)
    old, new = (cargo("helper", release, runtime=Runtime.GGUF) for release in ("1.0.0", "2.0.0"))
    islands = writer(old, 1, "old"), writer(new, 2, "new")

    async def told(running: Running, text: str) -> tuple[str, str | None]:
        answer = await ask(running, text, model="helper")
        return said(answer), strategy(answer)

    async with cached(books_url, *islands, island_wait_s=0.01, capacity_wait_s=0.01) as running:
        await published(running, old)
        await published(running, new, candidate=True)
        for text in ("again", "not asked meanwhile"):
            assert await told(running, text) == ("old", None)
        assert await told(running, "again") == ("old", "exact"), "a candidate changes nothing"
        await promote(running, new, "helper")
        assert await told(running, "again") == ("new", None)
        assert await told(running, "again") == ("new", "exact")
        await promote(running, old, "helper", origin="rollback:1")
        assert await told(running, "again") == ("old", None)
        assert await told(running, "not asked meanwhile") == ("old", "exact")


async def test_an_operator_is_shown_the_policy_of_what_the_name_stands_for(books_url: str) -> None:
    named = ((NAME, "1.0.0"), (NAME, "2.0.0"), ("another", "1.0.0"))
    one, two, alias = (cargo(*what, cache=CachePolicy(ttl_s=number)) for number, what in enumerate(named, 1))
    async with opened(books_url) as running:

        async def ttl() -> int:
            policy = await running.server.books.ask(cache_rows.published_policy, NAME)
            return policy.ttl_s if policy is not None else 0

        await published(running, one, alias)
        found = [await ttl()]
        await published(running, two, candidate=True)
        found.append(await ttl())
        for each in (two, alias):
            await promote(running, each)
            found.append(await ttl())
        await running.server.registry.revoke(revocation(alias))
        assert [*found, await ttl()] == [1, 1, 2, 3, 2], "2.0.0 stood for it before, and stands in"
        await running.server.registry.revoke(revocation(two))
        await running.server.registry.revoke(revocation(one))
        assert await ttl() == 0


async def test_an_account_of_its_own(books_url: str) -> None:
    """Names of other accounts stay where they are."""
    ann = create_key(books_url, "ann")
    theirs = cargo("theirs", publisher=MIDDLE)
    async with opened(books_url) as running, http(running, ann) as client:
        await published(running, ONE)
        made = await client.post(PATH, content=theirs.envelope, headers={"Content-Type": "application/octet-stream"})
        assert made.status_code == 201
        await refused(Fault.NAME_TAKEN, lambda: promote(running, theirs))
        await refused(Fault.NAME_TAKEN, lambda: promote(running, theirs, "theirs"))
        assert (await promote(running, theirs, "theirs", "ann")).promotion.cargo == theirs.address


def test_a_database_of_the_version_before(database_url: str) -> None:
    """What waits for its operator then moves its name when it is approved; the tables are those of the schema."""
    engine = sql.create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE cargos (address VARCHAR(64), state VARCHAR(16))")
        for state in CargoState:
            connection.execute(sql.text("INSERT INTO cargos VALUES (:state, :state)"), {"state": str(state)})
        with Operations.context(MigrationContext.configure(connection)):
            v0005_ab_tests._promotions()
        moves = sql.select(sql.text("address")).select_from(sql.text("cargos")).where(sql.text("moves_name"))
        assert set(connection.execute(moves).scalars()) == {"submitted", "rejected"}
        found = sql.inspect(connection).get_columns("cargo_promotions")
        made = {column["name"]: (str(column["type"]), column["nullable"]) for column in found}
        dialect = connection.dialect
    engine.dispose()
    want = {column.name: (column.type.compile(dialect), bool(column.nullable)) for column in cargo_promotions.columns}
    assert made == want
