"""What an Island is owed is kept until somebody has settled it: on disk, in bounds, in time, and handed in again and again."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from coordinator.direct_port import ClaimOutcome
from coordinator.http.errors import ApiError
from node.claims import HAND_IN_AFTER_S, Claims, SettleClient
from node.direct_served import DirectServer
from node.net.host import open_host
from privacy.keys import NodeKey
from protocol import limits
from protocol.direct import SETTLE, SETTLE_PROTOCOL, Claim, ClaimAnswer, Verdict
from protocol.errors import Code, LinkLost, Refused, RemoteProtocolError, SignatureError
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole
from protocol.receipts import sign_receipt
from protocol.tickets import sign_ticket, ticket_hash
from tests.protocol import samples
from tests.protocol.samples import NOW_MS

DAY_MS = int(limits.CLAIM_LIFETIME_S * 1000)


def claim(number: int = 1, **changes: Any) -> Claim:
    ticket = sign_ticket(samples.ticket(nonce=number.to_bytes(16, "big")), samples.COORDINATOR)
    receipt = samples.receipt(ticket_hash=ticket_hash(ticket), **changes)
    return Claim(ticket, sign_receipt(receipt, samples.ISLAND), b"count")


def key_of(made: Claim) -> bytes:
    return ticket_hash(made.ticket)


class Desk:
    """Answers claims as the test says; ``await_claims`` returns when so many have come."""

    def __init__(self, answer: Callable[[Claim], ClaimAnswer | Exception] | None = None) -> None:
        self.heard: list[Claim] = []
        self.answer = answer or (lambda said: ClaimAnswer(key_of(said), Verdict.SETTLED, 100))
        self._changed = trio.Event()

    async def claim(self, said: Claim) -> ClaimAnswer:
        await trio.lowlevel.checkpoint()
        self.heard.append(said)
        self._changed.set()
        self._changed = trio.Event()
        answer = self.answer(said)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def await_claims(self, count: int) -> None:
        with trio.fail_after(1000):
            while len(self.heard) < count:
                await self._changed.wait()
        await trio.testing.wait_all_tasks_blocked()


def open_claims(folder: Path, clock_ms: Callable[[], int] = lambda: NOW_MS) -> Claims:
    return Claims(folder, clock_ms, random.Random(1), hand_in_after_s=0.0)


@asynccontextmanager
async def running(claims: Claims, desk: Any) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(claims.run, desk)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


async def test_a_final_claim_is_handed_in_and_forgotten(tmp_path: Path) -> None:
    claims, desk = open_claims(tmp_path), Desk()
    async with running(claims, desk):
        claims.put_nowait(claim(), final=True)
        await desk.await_claims(1)
    assert desk.heard == [claim()] and len(claims) == 0 and files(tmp_path) == []
    assert (claims.counts.made, claims.counts.settled, claims.counts.paid_micros) == (1, 1, 100)


async def test_claims_wait_a_moment_and_go_together(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    claims, desk = Claims(tmp_path, lambda: NOW_MS, random.Random(1)), Desk()
    async with running(claims, desk):
        started_s = trio.current_time()
        claims.put_nowait(claim(1), final=True)
        await trio.sleep(HAND_IN_AFTER_S / 2)
        claims.put_nowait(claim(2), final=True)
        assert not desk.heard
        await desk.await_claims(2)
        assert trio.current_time() - started_s == pytest.approx(HAND_IN_AFTER_S)


async def test_an_open_claim_waits_for_its_last_count(tmp_path: Path) -> None:
    claims, desk = open_claims(tmp_path), Desk()
    newer = Claim(claim().ticket, claim().receipt, b"a newer count")
    async with running(claims, desk):
        claims.put_nowait(claim(), final=False)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not desk.heard and files(tmp_path) == [f"{key_of(claim()).hex()}.claim"]
        claims.put_nowait(newer, final=True)
        await desk.await_claims(1)
    assert desk.heard == [newer] and claims.counts.made == 1


async def test_an_open_claim_does_not_go_with_a_final_one(tmp_path: Path) -> None:
    claims, desk = open_claims(tmp_path), Desk()
    async with running(claims, desk):
        claims.put_nowait(claim(1), final=False)
        claims.put_nowait(claim(2), final=True)
        await desk.await_claims(1)
    assert desk.heard == [claim(2)] and len(claims) == 1


async def test_claims_survive_their_node(tmp_path: Path) -> None:
    """Open ones too: whoever is killed between JobDone and the last count still has what was signed before."""
    claims = open_claims(tmp_path)
    claims.put_nowait(claim(1), final=True)
    claims.put_nowait(claim(2), final=False)
    again, desk = open_claims(tmp_path), Desk()
    assert len(again) == 2
    async with running(again, desk):
        await desk.await_claims(2)
    assert desk.heard == [claim(1), claim(2)] and files(tmp_path) == []


async def test_what_ends_with_the_node_is_written_all_the_same(tmp_path: Path) -> None:
    claims, desk = open_claims(tmp_path), Desk(lambda said: LinkLost("away"))
    async with running(claims, desk):
        claims.put_nowait(claim(1), final=False)
    claims.put_nowait(claim(2), final=True)  # by a job that is cancelled after the keeper was
    assert len(files(tmp_path)) == 2


async def test_files_are_private(tmp_path: Path) -> None:
    open_claims(tmp_path).put_nowait(claim(), final=True)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o600]


async def test_a_coordinator_that_is_away_is_asked_again_at_growing_intervals(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    claims, asked_s = open_claims(tmp_path), []

    def away(said: Claim) -> ClaimAnswer | Exception:
        asked_s.append(trio.current_time())
        back = len(asked_s) > 12
        return ClaimAnswer(key_of(said), Verdict.SETTLED, 1) if back else trio.TooSlowError()

    desk = Desk(away)
    async with running(claims, desk):
        claims.put_nowait(claim(), final=True)
        await desk.await_claims(13)
    pauses = [after - before for before, after in pairwise(asked_s)]
    assert pauses[0] <= 0.4 and 15 <= pauses[-1] <= 30, "at most half a minute"
    assert len(claims) == 0 and files(tmp_path) == []


async def test_one_that_cannot_be_settled_now_does_not_hold_up_the_others(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    stubborn = [2]

    def answer(said: Claim) -> ClaimAnswer:
        if said == claim(1) and stubborn[0]:
            stubborn[0] -= 1
            return ClaimAnswer(key_of(said), Verdict.LATER, 0, "the books are locked")
        return ClaimAnswer(key_of(said), Verdict.SETTLED, 1)

    claims, desk = open_claims(tmp_path), Desk(answer)
    for number in (1, 2, 3):
        claims.put_nowait(claim(number), final=True)
    async with running(claims, desk):
        await desk.await_claims(5)
    assert desk.heard == [claim(1), claim(2), claim(3), claim(1), claim(1)]
    assert claims.counts.settled == 3


async def test_what_is_refused_is_not_said_again(tmp_path: Path) -> None:
    desk = Desk(lambda said: ClaimAnswer(key_of(said), Verdict.REFUSED, 0, "unknown"))
    claims = open_claims(tmp_path)
    async with running(claims, desk):
        claims.put_nowait(claim(), final=True)
        await desk.await_claims(1)
    assert claims.counts.refused == 1 and len(claims) == 0 and files(tmp_path) == []


async def test_an_answer_to_another_claim_settles_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    desk = Desk(lambda said: ClaimAnswer(bytes(32), Verdict.SETTLED, 10**9))
    claims = open_claims(tmp_path)
    async with running(claims, desk):
        claims.put_nowait(claim(), final=True)
        await desk.await_claims(2)
    assert len(claims) == 1 and claims.counts.settled == 0


async def test_claims_expire(tmp_path: Path) -> None:
    claims = open_claims(tmp_path)
    claims.put_nowait(claim(1, finished_at_ms=NOW_MS), final=True)
    claims.put_nowait(claim(2, finished_at_ms=NOW_MS + 1), final=True)
    desk = Desk()
    later = open_claims(tmp_path, lambda: NOW_MS + DAY_MS + 1)
    async with running(later, desk):
        await desk.await_claims(1)
    assert desk.heard == [claim(2, finished_at_ms=NOW_MS + 1)] and later.counts.expired == 1 and files(tmp_path) == []


async def test_the_number_of_claims_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CLAIMS_KEPT_MAX", 3)
    claims = open_claims(tmp_path)
    for number in range(1, 6):
        claims.put_nowait(claim(number), final=True)
    assert len(claims) == 3 and claims.counts.dropped == 2
    assert set(files(tmp_path)) == {f"{key_of(claim(number)).hex()}.claim" for number in (3, 4, 5)}, "the oldest go"


async def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    open_claims(tmp_path).put_nowait(claim(1), final=True)
    (tmp_path / f"{'ab' * 32}.claim").write_bytes(b"half a cl")
    (tmp_path / ".x.claim.12.tmp").write_bytes(b"of a write that was cut")
    again = open_claims(tmp_path)
    assert len(again) == 1 and (tmp_path / f"{'ab' * 32}.damaged").exists()


async def test_a_full_disk_is_said_and_costs_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    claims, desk = open_claims(tmp_path / "gone"), Desk()
    claims.put_nowait(claim(), final=True)
    assert "cannot be kept on disk" in caplog.text
    async with running(claims, desk):
        await desk.await_claims(1)
    assert claims.counts.settled == 1, "it was kept in memory"


# -- over libp2p

NETWORK = samples.NETWORK


class Books:
    """The half of DirectDesk that settles."""

    def __init__(self) -> None:
        self.said: list[tuple[Claim, str]] = []
        self.outcome: ClaimOutcome | Exception = ClaimOutcome(True, 1_160)

    async def claim(self, said: Claim, sender: str) -> ClaimOutcome:
        await trio.lowlevel.checkpoint()
        self.said.append((said, sender))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def hello(role: NodeRole, network: str = NETWORK) -> Hello:
    return Hello(PROTOCOL_VERSION, role, network, "test")


def trusting(said: Hello, sender: str) -> None:
    if said.role is not NodeRole.COORDINATOR:
        raise SignatureError("no Coordinator")


@asynccontextmanager
async def settlement(role: NodeRole = NodeRole.COORDINATOR, network: str = NETWORK) -> AsyncIterator[Any]:
    books: Any = Books()
    server = DirectServer(books, lambda: hello(role))
    async with open_host(NodeKey(b"c" * 32).seed) as coordinator, open_host(NodeKey(b"i" * 32).seed) as island:
        coordinator.set_handler(SETTLE_PROTOCOL, SETTLE, server.serve_settle)
        await island.connect(coordinator.addresses()[0])
        client = SettleClient(island, lambda: coordinator.peer_id, lambda: hello(NodeRole.ISLAND, network), trusting)
        async with client.opened() as desk:
            yield books, server, desk, island.peer_id


async def test_a_claim_over_the_wire() -> None:
    async with settlement() as (books, server, desk, island):
        for number in (1, 2):
            answer = await desk.claim(claim(number))
            assert answer == ClaimAnswer(key_of(claim(number)), Verdict.SETTLED, 1_160)
        assert books.said == [(claim(1), island), (claim(2), island)], "the sender is whom the connection has proved"
        assert desk.sessions_total == 1 and server.counts.claims == 2


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (ClaimOutcome(True, 0, "paid before"), Verdict.SETTLED),
        (ClaimOutcome(False, 0, "another network's\nticket"), Verdict.REFUSED),
        (ApiError(503, "the books cannot be reached"), Verdict.LATER),
        (Refused(Code.NO_CAPACITY, "busy"), Verdict.LATER),
    ],
)
async def test_what_the_books_say(outcome: Any, verdict: Verdict) -> None:
    async with settlement() as (books, _, desk, _):
        books.outcome = outcome
        assert (await desk.claim(claim())).verdict is verdict


async def test_books_that_break_end_the_stream_and_it_is_said_again() -> None:
    async with settlement() as (books, _, desk, _):
        books.outcome = ZeroDivisionError("a bug")
        with pytest.raises(LinkLost):
            await desk.claim(claim())
        books.outcome = ClaimOutcome(True, 5)
        assert (await desk.claim(claim())).paid_micros == 5
        assert desk.sessions_total == 2


async def test_a_peer_that_is_no_coordinator_gets_no_claim() -> None:
    async with settlement(NodeRole.ISLAND) as (books, _, desk, _):
        with pytest.raises(SignatureError):
            await desk.claim(claim())
        assert not books.said


async def test_an_island_of_another_network_is_not_heard() -> None:
    async with settlement(network="elsewhere") as (books, _, desk, _):
        with pytest.raises((LinkLost, RemoteProtocolError)):
            await desk.claim(claim())
        assert not books.said
