"""Accounts of people, and Islands as the books know them: who is paid for one, and what its karma is. Pure operations.

An Island earns from its first job on. Until it is paired with an account and has ``EARNING_KARMA_MILLI``, what it earns waits in escrow
under its peer id; the operation that makes the last of the two true empties the escrow into the owner's account.

Karma (mission.md): +1 for 60 minutes of successful compute, minutes below the threshold count half as much again, failures cost. It is
counted in thousandths and milliseconds, so nothing is lost to rounding. Jobs between an account and its own Islands earn none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator.books.errors import BooksRefused, Why
from coordinator.books.ledger import (
    BALANCES,
    ISSUE,
    SIGN_UP_MICROS,
    TRANSFERS,
    Empty,
    Move,
    Transfer,
    TransferKind,
    balance_of,
    escrow,
    grant,
    user,
)
from coordinator.books.rows import Address, Kind, Rows

DAY_MS = 86_400_000
KARMA_POINT_MS = 60 * 60_000  # one point of karma
EARNING_KARMA_MILLI = 10_000
YOUNG_PERCENT = 150  # of a minute of an Island below the threshold
FAILURE_COST_MILLI = 100  # a failure costs what six minutes bring
KARMA_MILLI_MIN = -10_000


@dataclass(frozen=True, slots=True)
class Account:
    """``rate_limit_per_minute``: requests of all its keys together, 0: no limit. ``refilled_day``: days since 1970, UTC."""

    name: str
    created_at_ms: int
    rate_limit_per_minute: int
    refilled_day: int


@dataclass(frozen=True, slots=True)
class IslandRecord:
    """``account``: its owner, empty before pairing. ``pending_ms``: effective compute since the last whole point of karma.

    ``earned_micros``: what it has earned in all, without the publishers' parts, wherever that went and whether or not it was refunded.
    """

    peer: str
    account: str = ""
    approved: bool = False
    karma_milli: int = 0
    pending_ms: int = 0
    compute_ms: int = 0
    jobs_done: int = 0
    jobs_failed: int = 0
    first_seen_ms: int = 0
    earned_micros: int = 0

    @property
    def earns(self) -> bool:
        """Whether its owner is paid at once."""
        return bool(self.account) and self.karma_milli >= EARNING_KARMA_MILLI

    @property
    def payee(self) -> str:
        """The ledger account that its earnings go to."""
        return user(self.account) if self.earns else escrow(self.peer)


@dataclass(frozen=True, slots=True)
class KarmaEvent:
    id: str
    peer: str
    kind: str
    delta_milli: int
    balance_milli: int
    job_id: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Publisher:
    """Who published a Cargo, and the share of its charges, in millionths."""

    cargo: str
    account: str
    share_ppm: int


ACCOUNTS = Kind("accounts", Account, "name")
ISLANDS = Kind("islands", IslandRecord, "peer")
KARMA_EVENTS = Kind("karma_events", KarmaEvent, "id")
PUBLISHERS = Kind("publishers", Publisher, "cargo")


def island_of(rows: Rows, peer: str, now_ms: int) -> IslandRecord:
    return rows.get(ISLANDS, peer) or IslandRecord(peer, first_seen_ms=now_ms)


@dataclass(frozen=True, slots=True)
class CreateAccount:
    """With its credits of sign-up. Saying it again changes nothing."""

    name: str
    rate_limit_per_minute: int = 0
    grant_micros: int = SIGN_UP_MICROS

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield ACCOUNTS, self.name
        yield from self._grant().reads(rows)

    def _grant(self) -> Move:
        return grant(user(self.name), self.grant_micros, f"sign-up:{self.name}")

    def apply(self, rows: Rows, now_ms: int) -> Account:
        known = rows.get(ACCOUNTS, self.name)
        if known is not None:
            return known
        if self.grant_micros:
            self._grant().apply(rows, now_ms)
        account = Account(self.name, now_ms, self.rate_limit_per_minute, now_ms // DAY_MS)
        rows.put(ACCOUNTS, account)
        return account


@dataclass(frozen=True, slots=True)
class Refill:
    """Tops an account up to the credits of sign-up, once a day (UTC). A clock that is set back refills nothing."""

    name: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield ACCOUNTS, self.name
        yield BALANCES, user(self.name)
        account = rows.peek(ACCOUNTS, self.name)
        if account is not None:
            yield BALANCES, ISSUE

    def apply(self, rows: Rows, now_ms: int) -> int:
        """Micro-credits that it got. Raises BooksRefused(NO_ACCOUNT)."""
        account = rows.get(ACCOUNTS, self.name)
        if account is None:
            raise BooksRefused(Why.NO_ACCOUNT, f"there is no account {self.name}")
        day = now_ms // DAY_MS
        if day <= account.refilled_day:
            return 0
        missing = SIGN_UP_MICROS - balance_of(rows, user(self.name)).posted
        rows.put(ACCOUNTS, replace(account, refilled_day=day))
        if missing <= 0:
            return 0
        id = f"refill:{self.name}:{day}"
        rows.load(TRANSFERS, id, None)  # the day in the account's row says that it is new
        grant(user(self.name), missing, id, TransferKind.REFILL).apply(rows, now_ms)
        return missing


@dataclass(frozen=True, slots=True)
class GrantCredits:
    """New credits for an account that exists. ``id`` names this one time."""

    name: str
    amount_micros: int
    id: str

    def _grant(self) -> Move:
        return grant(user(self.name), self.amount_micros, self.id)

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield ACCOUNTS, self.name
        yield from self._grant().reads(rows)

    def apply(self, rows: Rows, now_ms: int) -> Transfer:
        """Raises BooksRefused: NO_ACCOUNT, BAD_AMOUNT, DIFFERS."""
        _need_account(rows, self.name)
        return self._grant().apply(rows, now_ms)


@dataclass(frozen=True, slots=True)
class LimitAccount:
    """Requests a minute of all its keys together; 0 is no limit."""

    name: str
    rate_limit_per_minute: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((ACCOUNTS, self.name),)

    def apply(self, rows: Rows, now_ms: int) -> Account:
        """Raises BooksRefused(NO_ACCOUNT)."""
        account = replace(_need_account(rows, self.name), rate_limit_per_minute=self.rate_limit_per_minute)
        rows.put(ACCOUNTS, account)
        return account


def _need_account(rows: Rows, name: str) -> Account:
    account = rows.get(ACCOUNTS, name)
    if account is None:
        raise BooksRefused(Why.NO_ACCOUNT, f"there is no account {name}")
    return account


@dataclass(frozen=True, slots=True)
class PairIsland:
    """From now on the account earns what the Island earns. An Island belongs to one account; another takes it only after ``unpair``."""

    peer: str
    account: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield ISLANDS, self.peer
        yield ACCOUNTS, self.account
        if (island := rows.peek(ISLANDS, self.peer)) is not None:
            yield from self._pay_out(island).reads(rows)

    def _pay_out(self, island: IslandRecord) -> Empty:
        return pay_out(island, self.account, f"escrow:{self.peer}:{island.earned_micros}")

    def apply(self, rows: Rows, now_ms: int) -> IslandRecord:
        if rows.get(ACCOUNTS, self.account) is None:
            raise BooksRefused(Why.NO_ACCOUNT, f"there is no account {self.account}")
        island = island_of(rows, self.peer, now_ms)
        if island.account and island.account != self.account:
            raise BooksRefused(Why.NOT_OWNER, f"Island {self.peer} is paired with another account")
        island = replace(island, account=self.account)
        if island.earns:
            self._pay_out(island).apply(rows, now_ms)
        rows.put(ISLANDS, island)
        return island


def pay_out(island: IslandRecord, account: str, id: str) -> Empty:
    """What waits in escrow goes to the Island's owner."""
    return Empty(id, escrow(island.peer), user(account))


@dataclass(frozen=True, slots=True)
class Unpair:
    peer: str
    account: str

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((ISLANDS, self.peer),)

    def apply(self, rows: Rows, now_ms: int) -> IslandRecord:
        island = island_of(rows, self.peer, now_ms)
        if island.account != self.account:
            raise BooksRefused(Why.NOT_OWNER, f"Island {self.peer} is not paired with {self.account}")
        island = replace(island, account="")
        rows.put(ISLANDS, island)
        return island


@dataclass(frozen=True, slots=True)
class Approve:
    """Where the operator requires approval: the Island may (or may no longer) be given jobs."""

    peer: str
    approved: bool = True

    def reads(self, rows: Rows) -> Iterable[Address]:
        return ((ISLANDS, self.peer),)

    def apply(self, rows: Rows, now_ms: int) -> IslandRecord:
        island = replace(island_of(rows, self.peer, now_ms), approved=self.approved)
        rows.put(ISLANDS, island)
        return island


@dataclass(frozen=True, slots=True)
class SetPublisher:
    cargo: str
    account: str
    share_ppm: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        return (PUBLISHERS, self.cargo), (ACCOUNTS, self.account)

    def apply(self, rows: Rows, now_ms: int) -> Publisher:
        if rows.get(ACCOUNTS, self.account) is None:
            raise BooksRefused(Why.NO_ACCOUNT, f"there is no account {self.account}")
        if not 0 <= self.share_ppm <= 1_000_000:
            raise BooksRefused(Why.BAD_AMOUNT, "a publisher's share is 0 to 100 per cent")
        publisher = Publisher(self.cargo, self.account, self.share_ppm)
        rows.put(PUBLISHERS, publisher)
        return publisher


def earn_karma(island: IslandRecord, compute_ms: int) -> tuple[IslandRecord, int]:
    """The Island after so much successful compute, and the thousandths of karma that it gained: whole points only."""
    effective_ms = compute_ms
    if island.karma_milli < EARNING_KARMA_MILLI:
        effective_ms = compute_ms * YOUNG_PERCENT // 100
    points, pending_ms = divmod(island.pending_ms + effective_ms, KARMA_POINT_MS)
    gained = points * 1000
    changed = replace(
        island,
        pending_ms=pending_ms,
        karma_milli=island.karma_milli + gained,
        compute_ms=island.compute_ms + compute_ms,
        jobs_done=island.jobs_done + 1,
    )
    return changed, gained


def lose_karma(island: IslandRecord) -> tuple[IslandRecord, int]:
    """The Island after a failure, and what it lost (negative)."""
    karma = max(KARMA_MILLI_MIN, island.karma_milli - FAILURE_COST_MILLI)
    return replace(island, karma_milli=karma, jobs_failed=island.jobs_failed + 1), karma - island.karma_milli


def karma_rows(rows: Rows, peer: str, earned_ms: int | None, job_id: str, now_ms: int, index: int) -> IslandRecord:
    """Puts what a job did to an Island's karma: ``earned_ms`` of compute, or a failure (None)."""
    before = island_of(rows, peer, now_ms)
    after, delta = earn_karma(before, earned_ms) if earned_ms is not None else lose_karma(before)
    rows.put(ISLANDS, after)
    if delta:
        kind = "compute" if earned_ms is not None else "failure"
        rows.put(KARMA_EVENTS, KarmaEvent(f"{job_id}:{index}", peer, kind, delta, after.karma_milli, job_id, now_ms))
    return after
