"""A bridge and its Islands without a network, at the desk of a Coordinator of desks.py: they say what the test says."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from coordinator.books import direct_queries
from coordinator.books.direct import TicketRecord
from coordinator.books.jobs import Job
from coordinator.direct_port import ClaimOutcome
from privacy.keys import NodeKey
from protocol.counts import CountSigner
from protocol.direct import (
    Attempt,
    Claim,
    Excluded,
    JobBilled,
    JobDropped,
    JobSettled,
    PlaceFreed,
    TicketGranted,
    TicketWanted,
)
from protocol.errors import Code
from protocol.receipts import RECEIPT_VERSION, Ending, Receipt, sign_receipt
from protocol.tickets import read_ticket, ticket_hash
from tests.coordinator.fakes import FakeIsland, Running

HOLDER = NodeKey(b"h" * 32)
JOB_ID = "ab" * 12
_DIGEST = bytes(32)


@dataclass
class Bridge:
    """Of one Consumer. ``excluded``: Islands that it does not want any more."""

    running: Running
    key: NodeKey = HOLDER
    api_key: str = ""
    excluded: list[FakeIsland] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def desk(self) -> Any:
        return self.running.server.direct

    async def ticket(self, job_id: str = JOB_ID, **changes: Any) -> TicketGranted:
        plain: dict[str, Any] = {
            "request": next(self._numbers),
            "api_key": self.api_key or self.running.key,
            "job_id": job_id,
            "choices": 1,
            "kind": "chat",
            "cargo": "echo",
            "prompt_tokens": 3,
            "output_tokens": 1000,
            "excluded": tuple(Excluded(island.peer, 2**52) for island in self.excluded),
        }
        granted: TicketGranted = await self.desk.grant(TicketWanted(**(plain | changes)), self.key.peer_id)
        return granted

    def count(self, granted: TicketGranted, tokens: int) -> bytes:
        signed = CountSigner(read_ticket(granted.ticket), granted.ticket, self.key).sign(tokens, _DIGEST)
        assert signed is not None
        return signed

    def give_back(self, granted: TicketGranted, outcome: str = "", tokens: int | None = None) -> None:
        """``tokens``: that were signed; None: nothing was."""
        count = self.count(granted, tokens) if tokens is not None else b""
        job_id = read_ticket(granted.ticket).job_id.partition(".")[0]
        self.desk.freed(PlaceFreed(job_id, ticket_hash(granted.ticket), outcome, count), self.key.peer_id)

    def attempt(self, granted: TicketGranted, tokens: int, receipt: bytes = b"") -> Attempt:
        return Attempt(granted.ticket, receipt, self.count(granted, tokens))

    async def settle(self, *attempts: Attempt, job_id: str = JOB_ID) -> JobBilled:
        billed: JobBilled = await self.desk.settle(JobSettled(next(self._numbers), job_id, attempts), self.key.peer_id)
        return billed

    async def drop(self, *attempts: Attempt, job_id: str = JOB_ID) -> JobBilled:
        dropped = JobDropped(next(self._numbers), job_id, Code.CANCELLED, attempts)
        billed: JobBilled = await self.desk.drop(dropped, self.key.peer_id)
        return billed

    async def claim(self, island: FakeIsland, granted: TicketGranted, tokens: int, ending: Ending = Ending.CUT) -> ClaimOutcome:
        """The Island shows a count for so many tokens."""
        receipt = receipt_of(island, granted, tokens, ending)
        outcome: ClaimOutcome = await self.desk.claim(Claim(granted.ticket, receipt, self.count(granted, tokens)), island.peer)
        return outcome

    async def books(self, job_id: str = JOB_ID) -> tuple[Job, list[TicketRecord]]:
        found = await self.running.server.books.ask(direct_queries.job_of, job_id, self.key.peer_id)
        assert found is not None
        return found


def receipt_of(island: FakeIsland, granted: TicketGranted, tokens: int, ending: Ending = Ending.STOP) -> bytes:
    """An Island's word for so many tokens in 3 ms, at what it asks."""
    ticket = read_ticket(granted.ticket)
    receipt = Receipt(
        version=RECEIPT_VERSION,
        network=ticket.network,
        island=island.peer,
        job_id=ticket.job_id,
        ticket_hash=ticket_hash(granted.ticket),
        content_hash=ticket.content_hash,
        prompt_tokens=3,
        cached_tokens=0,
        sent_tokens=tokens,
        output_hash=_DIGEST,
        compute_ms=3,
        price_micros=min(granted.offer.ask.price(tokens, 3), ticket.price_limit_micros),
        finish_reason=ending,
        finished_at_ms=time.time_ns() // 1_000_000,
    )
    return sign_receipt(receipt, island.key)


def driver_of(granted: TicketGranted) -> str:
    return read_ticket(granted.ticket).driver


def limit_of(granted: TicketGranted) -> int:
    return read_ticket(granted.ticket).price_limit_micros
