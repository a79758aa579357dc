"""An Island that was given a name follows it: what it serves, what it lets end first, and what it does when something goes wrong.

The deck, the news and the tasks are real; what is scripted is the loading of Cargos, the bringing of files, and the jobs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock as Clock

from node import cargo_deck, manifest_cargos
from node.cargo_deck import Deck, open_deck
from node.cargo_news import CargoNews
from node.cargo_runtimes import Grants
from node.cargo_store import CargoStore
from node.jobs_served import JobServer, Terms
from node.manifest_cargos import ManifestCargos
from protocol.cargos import CargoManifest, SignedCargo
from protocol.errors import Code, ConfigError, Refused
from protocol.prices import Ask
from runtimes.store.errors import FetchError
from tests.node.cargo_net import open_news, until
from tests.protocol.cargo_samples import cargo, killed, listed, promoted

ONE, TWO, THREE = (cargo(release=f"{number}.0.0") for number in (1, 2, 3))
ALIAS = cargo("another")
NAME = ONE.manifest.name


@dataclass
class FakeCargo:
    address: str

    def facts(self) -> Any:
        return SimpleNamespace(content_hash=self.address)

    async def wait_changed(self) -> None:
        await trio.sleep_forever()


@dataclass
class FakeJobs:
    """``running``: how many run, by address."""

    running: dict[str, int] = field(default_factory=dict)
    ended: list[tuple[str, Code]] = field(default_factory=list)
    _changed: trio.Event = field(default_factory=trio.Event)

    def set(self, address: str, count: int) -> None:
        self.running[address] = count
        self._changed.set()
        self._changed = trio.Event()

    async def wait_ended_of(self, address: str) -> None:
        while self.running.get(address):
            await self._changed.wait()

    def end_all_of(self, address: str, why: Refused) -> int:
        count = self.running.pop(address, 0)
        if count:
            self.ended.append((address, why.code))
        return count


@dataclass
class Bench:
    """An Island's Cargos. ``bad``: addresses that cannot be loaded; ``missing``: that nobody has the files of; ``slow``: whose files come
    when ``arrive`` is set."""

    news: CargoNews
    jobs: FakeJobs = field(default_factory=FakeJobs)
    terms: dict[str, Terms] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    arrive: trio.Event = field(default_factory=trio.Event)
    asked: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    ads: int = 0
    deck: Deck = field(init=False)
    manifests: ManifestCargos = field(init=False)

    def offered(self) -> dict[str, str]:
        """Releases by name."""
        known = {one.address: one.manifest.release for one in (ONE, TWO, THREE, ALIAS)}
        return {name: known[terms.cargo.facts().content_hash] for name, terms in self.terms.items()}

    @asynccontextmanager
    async def held(self, manifest: CargoManifest, progress: Any) -> AsyncIterator[Mapping[str, Path]]:
        address = address_of[manifest]
        self.asked.append(address)
        if address in self.slow:
            await self.arrive.wait()
        if address in self.missing:
            raise FetchError("nobody has it")
        yield {}

    @asynccontextmanager
    async def opened(self, address: str) -> AsyncIterator[FakeCargo]:
        await trio.lowlevel.checkpoint()
        if address in self.bad:
            raise ConfigError("it does not load")
        self.open.append(address)
        try:
            yield FakeCargo(address)
        finally:
            self.open.remove(address)

    def changed(self) -> None:
        self.ads += 1


address_of: dict[CargoManifest, str] = {one.manifest: one.address for one in (ONE, TWO, THREE, ALIAS)}


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(open_news(tmp_path))
    monkeypatch.setattr(cargo_deck, "open_cargo", lambda manifest, address, files, runtimes, grants: made.opened(address))

    async def runtimes(deck: Deck, manifest: CargoManifest) -> None:
        return None

    async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(Deck, "_runtimes_for", runtimes)
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)  # the clock would jump while a thread writes
    await made.news.hear([listed(ONE), listed(TWO), listed(THREE), listed(ALIAS)])
    return made


@asynccontextmanager
async def serving(bench: Bench, *references: str) -> AsyncIterator[None]:
    async with open_deck("island", Grants(1, 1)) as bench.deck, trio.open_nursery() as nursery:
        files = cast(CargoStore, SimpleNamespace(held=bench.held))
        jobs = cast(JobServer, bench.jobs)
        bench.manifests = ManifestCargos(
            bench.deck, references, bench.terms, lambda name: Ask(1000), bench.news, files, jobs, bench.changed
        )
        bench.manifests.begin(nursery)
        await bench.manifests.loaded.wait()
        yield
        nursery.cancel_scope.cancel()


async def move(bench: Bench, one: SignedCargo, serial: int, name: str = NAME, release: str = "1.0.0") -> None:
    assert (await bench.news.hear([promoted(one, name=name, serial=serial, release=release)])).new


async def test_a_name_is_followed_there_and_back(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        assert bench.offered() == {NAME: "1.0.0"} and bench.open == [ONE.address], "not the newest, which is a candidate"
        for serial, one in ((2, TWO), (3, ONE), (4, THREE)):
            ads = bench.ads
            await move(bench, one, serial)
            await until(lambda: bench.open == [one.address])  # noqa: B023 (it is called at once)
            assert bench.offered() == {NAME: one.manifest.release} and bench.ads > ads


async def test_without_a_promotion_the_newest_is_served_and_stays(autojump_clock: Clock, bench: Bench) -> None:
    async with serving(bench, NAME):
        assert bench.offered() == {NAME: "3.0.0"}
        await bench.news.hear([killed(TWO)])
        await trio.testing.wait_all_tasks_blocked()
        assert bench.offered() == {NAME: "3.0.0"}


@pytest.mark.parametrize("reference", [f"{NAME}@2.0.0", TWO.address])
async def test_a_release_or_an_address_is_not_followed(autojump_clock: Clock, bench: Bench, reference: str) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, reference):
        assert bench.offered() == {NAME: "2.0.0"}
        await move(bench, THREE, 2)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert bench.offered() == {NAME: "2.0.0"} and bench.asked == [TWO.address]


async def test_jobs_that_run_end_first(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        bench.jobs.set(ONE.address, 1)
        await move(bench, TWO, 2)
        await until(lambda: bench.offered() == {NAME: "2.0.0"})
        await trio.sleep(manifest_cargos._LEAVE_S / 2)
        assert bench.open == [ONE.address, TWO.address] and list(bench.deck.cargos) == [NAME]
        bench.jobs.set(ONE.address, 0)
        await until(lambda: bench.open == [TWO.address])
        assert bench.jobs.ended == []


async def test_jobs_that_do_not_end_are_ended(autojump_clock: Clock, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        bench.jobs.set(ONE.address, 1)
        await move(bench, TWO, 2)
        await trio.sleep(manifest_cargos._LEAVE_S + 1)
        assert bench.open == [TWO.address] and bench.jobs.ended == [(ONE.address, Code.DRAINING)]
        assert "did not end within 600 s" in caplog.text


async def test_one_that_is_leaving_can_be_revoked(autojump_clock: Clock, bench: Bench) -> None:
    """What runs of it ends at once, and the new one, which has its name, goes on."""
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        bench.jobs.set(ONE.address, 1)
        await move(bench, TWO, 2)
        await until(lambda: bench.offered() == {NAME: "2.0.0"})
        await bench.news.hear([killed(ONE)])
        await until(lambda: bench.open == [TWO.address])
        assert bench.jobs.ended == [(ONE.address, Code.CARGO_FAILED)] and bench.offered() == {NAME: "2.0.0"}


async def test_one_that_is_leaving_can_come_back(autojump_clock: Clock, bench: Bench) -> None:
    """A roll-back while jobs of the old one still run: it is not loaded a second time, and not closed when they end."""
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        bench.jobs.set(ONE.address, 1)
        await move(bench, TWO, 2)
        await until(lambda: bench.offered() == {NAME: "2.0.0"})
        await move(bench, ONE, 3)
        await until(lambda: bench.open == [ONE.address])
        bench.jobs.set(ONE.address, 0)
        await trio.sleep(2 * manifest_cargos._LEAVE_S)
        assert bench.open == [ONE.address] and bench.offered() == {NAME: "1.0.0"} and bench.jobs.ended == []


@pytest.mark.parametrize("how", ["missing", "bad"])
async def test_what_cannot_be_had_is_tried_again_and_the_old_one_served(
    autojump_clock: Clock, bench: Bench, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        broken: set[str] = getattr(bench, how)
        broken.add(TWO.address)
        await move(bench, TWO, 2)
        await trio.sleep(100)
        assert bench.offered() == {NAME: "1.0.0"} and bench.open == [ONE.address] and 5 < bench.asked.count(TWO.address) < 15
        assert "nobody has it; trying again" in caplog.text or "is served as before" in caplog.text
        broken.clear()
        await trio.sleep(61)
        assert bench.offered() == {NAME: "2.0.0"} and bench.open == [TWO.address]


async def test_a_roll_back_ends_what_is_being_fetched(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        bench.slow.add(TWO.address)
        await move(bench, TWO, 2)
        await until(lambda: bench.asked[-1] == TWO.address)
        await move(bench, THREE, 3)
        await until(lambda: bench.open == [THREE.address])
        bench.arrive.set()
        await trio.sleep(100)
        assert bench.offered() == {NAME: "3.0.0"} and bench.open == [THREE.address]


async def test_where_the_promoted_one_is_revoked_the_next_older_one_is_served(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, TWO, 1)
    async with serving(bench, NAME):
        assert bench.offered() == {NAME: "2.0.0"}
        await bench.news.hear([killed(TWO)])
        await until(lambda: bench.offered() == {NAME: "1.0.0"} and bench.open == [ONE.address])


async def test_nothing_moves_before_the_promoted_one_has_been_heard_of(autojump_clock: Clock, bench: Bench) -> None:
    late = cargo(release="4.0.0")
    address_of[late.manifest] = late.address
    await move(bench, TWO, 1)
    async with serving(bench, NAME):
        await move(bench, late, 2)
        await trio.sleep(100)
        assert bench.offered() == {NAME: "2.0.0"} and bench.asked == [TWO.address], "not the older one that stands in"
        await bench.news.hear([listed(late)])
        await until(lambda: bench.open == [late.address])


async def test_a_start_waits_for_the_promoted_one_and_then_takes_what_stands_in(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, cargo(release="4.0.0"), 1)
    started_s = trio.current_time()
    async with serving(bench, NAME):
        assert bench.offered() == {NAME: "1.0.0"} and trio.current_time() - started_s == pytest.approx(manifest_cargos._TOLD_S, abs=1)


async def test_a_name_that_stands_for_another_cargo(autojump_clock: Clock, bench: Bench) -> None:
    """It is offered under its own name."""
    await move(bench, ONE, 1)
    async with serving(bench, NAME):
        await move(bench, ALIAS, 2)
        await until(lambda: bench.open == [ALIAS.address])
        assert bench.offered() == {"another": "1.0.0"}
        await move(bench, TWO, 3)
        await until(lambda: bench.open == [TWO.address])
        assert bench.offered() == {NAME: "2.0.0"}


async def test_two_names_that_stand_for_the_same_cargo(autojump_clock: Clock, bench: Bench) -> None:
    """It is loaded once, and stays as long as one of them stands for it."""
    await move(bench, ALIAS, 1)
    async with serving(bench, NAME, "another"):
        assert bench.offered() == {"another": "1.0.0"} and bench.open == [ALIAS.address]
        await move(bench, TWO, 2)
        await until(lambda: bench.open == [ALIAS.address, TWO.address])
        await trio.sleep(2 * manifest_cargos._LEAVE_S)
        assert bench.offered() == {"another": "1.0.0", NAME: "2.0.0"}


async def test_the_release_that_its_owner_named_as_well_is_not_pushed_aside(autojump_clock: Clock, bench: Bench) -> None:
    await move(bench, ONE, 1)
    async with serving(bench, NAME, f"{NAME}@1.0.0"):
        await move(bench, TWO, 2)
        await trio.sleep(2 * manifest_cargos._LEAVE_S)
        assert bench.offered() == {NAME: "1.0.0"} and bench.open == [ONE.address]


async def test_another_release_of_its_name_is_not_pushed_aside(
    autojump_clock: Clock, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one name an Island holds one release, and this one was named by its owner."""
    rival = cargo("another", "2.0.0")
    address_of[rival.manifest] = rival.address
    await bench.news.hear([listed(rival)])
    await move(bench, ONE, 1)
    async with serving(bench, NAME, "another@1.0.0"):
        await move(bench, rival, 2)
        await trio.sleep(10)
        assert bench.offered() == {NAME: "1.0.0", "another": "1.0.0"} and "serves another release" in caplog.text
        await move(bench, TWO, 3)
        await until(lambda: bench.offered() == {NAME: "2.0.0", "another": "1.0.0"})
