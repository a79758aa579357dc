"""How the Coordinator reaches Islands, an interface that node implements over libp2p and tests with a fake network; and what a dispatcher
asks of those that place, issue and mend, so that a bridge can put its own in their place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from coordinator.columns import Candidate
from coordinator.matching import Wish
from protocol.book import Book
from protocol.cargo_jobs import CargoInput
from protocol.hold import DropShard, HoldProgress, HoldShard, SetAsk, ShardHeld
from protocol.messages import JobAccepted, JobChunk, JobDone, JobLines, RouteBroken


class JobRun(Protocol):
    """One open job on one Island. Iterating yields JobAccepted first, then JobChunk… or JobLines…, then exactly one JobDone; RouteBroken
    anywhere before the end, answered with ``mend`` or by leaving. Who does not iterate holds an Island up that sends lines.

    Raises ``protocol.errors.Refused`` when the Island refuses or fails the job (its code travels), or with LINK_LOST when the
    connection ends before JobDone. The receipt in JobDone has been checked against what arrived.
    """

    def __aiter__(self) -> AsyncIterator[JobAccepted | JobChunk | JobLines | JobDone | RouteBroken]: ...

    def mend(self, ticket: bytes) -> None:
        """The job goes on over the route of this ticket. Raises Refused(LINK_LOST)."""
        ...


class JobPort(Protocol):
    """Opens jobs."""

    def run_job(self, island: str, ticket: bytes, payload: bytes | CargoInput) -> AbstractAsyncContextManager[JobRun]:
        """Opens a job on an Island's long-lived stream; leaving the context early cancels it there. ``payload``: an encoded
        GenerationRequest, or a CargoInput. Raises Refused(LINK_LOST) when there is no connection and none can be made."""
        ...


class IslandPort(JobPort, Protocol):
    def book(self) -> Book:
        """The Islands that can be reached now, as of the newest ads."""
        ...

    async def hold_shard(self, island: str, order: HoldShard, progress: Callable[[HoldProgress], None]) -> ShardHeld:
        """Has an Island load layers, and waits for it. Raises Refused with what the Island says, LINK_LOST where it cannot be reached."""
        ...

    async def drop_shard(self, island: str, order: DropShard) -> None:
        """Has an Island give layers up, which then takes no memory any more. Raises Refused."""
        ...

    async def set_ask(self, island: str, order: SetAsk) -> None:
        """Tells an Island what its owner wants it to ask. Raises Refused with its words, LINK_LOST where it cannot be reached."""
        ...

    async def wait_book_changed(self) -> None:
        """Returns after the next change of the book."""
        ...


class Issuing(Protocol):
    """Whoever has tickets."""

    def issue(self, job_id: str, candidate: Candidate, wish: Wish, cache_salt: bytes) -> bytes:
        """The signed envelope of a ticket for one Island, or for the Islands of a pipeline."""
        ...


class Mending(Protocol):
    """Whoever knows of pipelines."""

    async def mend(self, candidate: Candidate, broken: RouteBroken, /) -> Candidate:
        """Another route for a job of which a stage has failed. Raises Refused."""
        ...

    def driver_lost(self, candidate: Candidate) -> None:
        """The link to a job's driver was lost."""
        ...
