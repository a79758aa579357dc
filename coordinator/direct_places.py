"""What a Coordinator remembers of tickets in use: the places that they have taken on Islands, and what their holders have said of them.

All of it is in memory and bounded; a Coordinator that restarts knows nothing of it, and the books do without.

Theory of operation. A place is free again when the bridge says so, when its ticket is settled or has expired, and, since nobody may block
Islands by going away, ``DESK_GONE_S`` after the last desk stream of its holder has ended. A bridge that only lost its Coordinator goes on
with its jobs meanwhile: the Islands' own ads show that they are busy. What else is known of the ticket stays, so its route can be mended.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import trio

from coordinator.columns import Candidate
from coordinator.direct_due import counted_tokens
from coordinator.http.errors import ApiError
from coordinator.matching import Wish
from coordinator.placement import Placement, Placer
from protocol import limits
from protocol.direct import PlaceFreed
from protocol.errors import RemoteProtocolError
from protocol.tickets import peek_ticket

log = logging.getLogger(__name__)

PLACES_MAX = 20_000  # tickets of direct jobs that hold a place at once, and jobs that are remembered


@dataclass(slots=True, eq=False)
class Place:
    """A place that a ticket has taken. ``candidate``: its route as it is now; ``hashes``: of the ticket, and of those of mended routes."""

    placement: Placement
    candidate: Candidate
    ticket: bytes
    holder: str
    account: str
    job_id: str
    wish: Wish
    salt: bytes
    expires_s: float
    hashes: list[bytes]
    is_free: bool = False


class Places:
    """Takes nothing itself, and gives back to the placer."""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer
        self._places: dict[bytes, Place] = {}
        self._taken: Counter[str] = Counter()  # account -> places that are not free
        self._desks: Counter[str] = Counter()  # holder -> streams
        self._gone_s: dict[str, float] = {}  # holder -> when the last of them ended

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<Places {len(self._places)} tickets, {self._taken.total()} places taken>"

    def check_room(self, account: str) -> None:
        """Raises ApiError 503 for one ticket too many."""
        if len(self._places) >= PLACES_MAX or self._taken[account] >= limits.DESK_PLACES_PER_ACCOUNT_MAX:
            text = "too many tickets are in use"
            raise ApiError(503, text, code="no_capacity", kind="server_error", headers={"Retry-After": "2"})

    def add(self, place: Place) -> None:
        self._taken[place.account] += 1
        for known in place.hashes:
            self._places[known] = place
        if not self._desks[place.holder]:  # it went while its ticket was written down
            self._gone_s.setdefault(place.holder, trio.current_time())

    def get(self, hash_of_ticket: bytes, holder: str) -> Place | None:
        place = self._places.get(hash_of_ticket)
        return place if place is not None and place.holder == holder else None

    def mended(self, place: Place, hash_of_ticket: bytes) -> None:
        """The route has another ticket; it may be named by that."""
        place.hashes.append(hash_of_ticket)
        self._places[hash_of_ticket] = place

    def free(self, place: Place) -> None:
        """Its job has ended at the Island."""
        if not place.is_free:
            place.is_free = True
            self._taken[place.account] -= 1
            if not self._taken[place.account]:
                del self._taken[place.account]
            self._placer.release(place.placement)

    def forget(self, hash_of_ticket: bytes) -> None:
        """The ticket is settled."""
        place = self._places.get(hash_of_ticket)
        if place is not None:
            for known in place.hashes:
                self._places.pop(known, None)
            self.free(place)

    def opened(self, holder: str) -> None:
        self._desks[holder] += 1
        self._gone_s.pop(holder, None)

    def closed(self, holder: str, now_s: float) -> None:
        self._desks[holder] -= 1
        if self._desks[holder] <= 0:
            del self._desks[holder]
            self._gone_s[holder] = now_s

    def tend(self, now_s: float) -> None:
        """Frees what has expired (tickets expire in the order in which they were issued), and what holders have left."""
        while self._places:
            hash_of_ticket, place = next(iter(self._places.items()))
            if place.expires_s > now_s:
                break
            self.forget(hash_of_ticket)
        gone = {holder for holder, since_s in self._gone_s.items() if now_s - since_s >= limits.DESK_GONE_S}
        for place in [place for place in self._places.values() if place.holder in gone] if gone else ():
            self.free(place)
        for holder in gone:
            del self._gone_s[holder]


@dataclass(frozen=True, slots=True)
class Ended:
    """What a holder has said of a ticket whose job is over: the code that it failed with, or empty, and the last count that he signed."""

    ticket: bytes
    outcome: str
    count: bytes
    tokens: int


def ended_of(ticket: bytes, hash_of_ticket: bytes, freed: PlaceFreed) -> Ended:
    """A count that is no good says nothing."""
    try:
        tokens = counted_tokens(peek_ticket(ticket), hash_of_ticket, freed.count)
    except RemoteProtocolError as error:
        log.warning("a place is given back with a count that is no good: %s", error)
        return Ended(ticket, freed.outcome, b"", 0)
    return Ended(ticket, freed.outcome, freed.count, tokens)


@dataclass(slots=True, eq=False)
class JobNotes:
    """Of one job of one holder. ``asked``: for tickets; ``failed``: Islands that failed it, and the ads that do not count any more;
    ``ended``: by the ticket's id. ``lock``: while a ticket is written down."""

    choices: int
    asked: int = 0
    granted: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def is_beyond(self) -> bool:
        """Whether it has been asked for more tickets than an honest request needs: each further one counts as a request."""
        return self.asked >= self.choices * limits.JOB_ATTEMPTS_MAX

    @property
    def delivered_tokens(self) -> int:
        """That attempts brought which have failed; told apart for a job of one choice only."""
        return sum(ended.tokens for ended in self.ended.values() if ended.outcome) if self.choices == 1 else 0


class Notes:
    """Of jobs; those longest not asked for are forgotten first. Keyed by holder too: a job id is not secret."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[tuple[str, str], JobNotes] = OrderedDict()

    def get(self, holder: str, job_id: str) -> JobNotes | None:
        return self._jobs.get((holder, job_id))

    def of(self, holder: str, job_id: str, choices: int) -> JobNotes:
        """New ones where there are none."""
        notes = self._jobs.get((holder, job_id))
        if notes is None:
            notes = self._jobs[holder, job_id] = JobNotes(choices)
            if len(self._jobs) > PLACES_MAX:
                self._jobs.popitem(last=False)
        self._jobs.move_to_end((holder, job_id))
        return notes

    def forget(self, holder: str, job_id: str) -> None:
        self._jobs.pop((holder, job_id), None)
