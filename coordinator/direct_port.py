"""What the books do for the direct path: an interface that node's stream handlers call (node/direct_served.py) and the Coordinator fulfils.

All calls come from trio, in any number at once; each may be cancelled (the peer has gone), which must leave nothing half-done. ``holder``
and ``sender`` are peer ids that the connection has proved. Nothing here ever sees a prompt or a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocol.direct import (
    Claim,
    JobBilled,
    JobDropped,
    JobSettled,
    MendWanted,
    Models,
    ModelsWanted,
    PlaceFreed,
    TicketGranted,
    TicketWanted,
)


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """``accepted``: the ticket is settled, now or before, with ``paid_micros`` to its Islands in all (0 where nothing was due). Not
    accepted: nothing will ever be paid, ``reason`` says why; the Island forgets the claim."""

    accepted: bool
    paid_micros: int
    reason: str = ""


class DirectDesk(Protocol):
    """Methods raise ``protocol.errors.Refused`` (its code reaches the bridge) or ``coordinator.http.errors.ApiError`` (status, type, code,
    param and headers reach the bridge's own client as if it had asked the Coordinator). Where the books cannot be reached, ApiError 503."""

    async def grant(self, wanted: TicketWanted, holder: str) -> TicketGranted:
        """Checks the key and its rate, opens the job with its hold where ``job_id`` is new, takes a place on an Island (waiting for one at
        most ``wait_ms``), and issues the ticket for ``holder``, with ``count_every`` set.

        A further ticket of the job settles first what an earlier one has cost that its holder has said to be over, and is limited to what
        the job's bid leaves.

        Raises ApiError: 401, 402, 403, 429, and 409 for a job that is another account's or holder's, or over; Refused of the placement.
        Cancelled (the bridge has withdrawn, or is gone): the place is given back. A job that has got no ticket yet ends with either: the
        bridge says nothing more of it.
        """
        ...

    async def mend(self, wanted: MendWanted, holder: str) -> TicketGranted:
        """Another Island takes the place of a stage; a ticket of the same job for the mended route. Raises Refused, ApiError."""
        ...

    def opened(self, holder: str) -> None:
        """A stream of this holder begins. Never raises."""
        ...

    def closed(self, holder: str) -> None:
        """One of them has ended. When it was the last, and none comes back, his places are free a little later. Never raises."""
        ...

    def freed(self, freed: PlaceFreed, holder: str) -> None:
        """The job of a ticket has ended at its Island, so its place there is free. Unknown tickets are passed over. Never raises.

        With an outcome the Island failed; where the job asks again with it among ``excluded``, its ad of this moment does not count, be it
        newer than the sequence that the bridge knows: taking the job has changed its room, and so made it send one.
        """
        ...

    async def settle(self, settled: JobSettled, holder: str) -> JobBilled:
        """Ends a job that was done: checks each receipt against its ticket and count, pays, releases the rest of the hold. The second time
        it gives what the first one gave. Raises ApiError 404 for a job that is not this holder's."""
        ...

    async def drop(self, dropped: JobDropped, holder: str) -> JobBilled:
        """Ends a job that was not done: what was signed is paid, the rest of the hold released. As ``settle``."""
        ...

    async def models(self, wanted: ModelsWanted, holder: str) -> Models:
        """What is offered now. Raises ApiError 401, 403, 429."""
        ...

    async def claim(self, claim: Claim, sender: str) -> ClaimOutcome:
        """An Island wants to be paid for a ticket. The envelopes are unchecked. Pays the ticket once, by what the holder signed last: a
        receipt for more than that is paid up to the count, one without a count not at all. Raises Refused or ApiError where the books
        cannot say now: the Island will claim again."""
        ...
