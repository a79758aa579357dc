"""The books of a simulated day: the operations of the real ones on rows in dictionaries, and an audit of all that they have done.

Theory of operation. ``DayBooks.do`` is the writer's transaction without a database: load the rows that an operation names, apply it, keep
what it changed. What is final (transfers, and jobs that have ended with their holds) goes into a *journal* of plain integer columns, and
jobs and holds leave the dictionaries, so that a million of them take some hundred megabytes. The audit adds up the whole journal with
numpy and compares it with the rows: nothing is believed for having been added up on the way.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from coordinator.books.accounts import ISLANDS, KARMA_EVENTS, PUBLISHERS, IslandRecord, KarmaEvent
from coordinator.books.jobs import JOBS, Job, JobState
from coordinator.books.ledger import BALANCES, HOLDS, TRANSFERS, Balance, Hold, HoldState, Transfer, TransferKind, user
from coordinator.books.rows import Kind, Operation, Rows
from coordinator.books.schema import KINDS

T = TypeVar("T")
Ints = npt.NDArray[np.int64]

SHOWN_MAX = 5  # complaints of one kind that are told
_STATES = list(JobState)
_KINDS = list(TransferKind)
_HOLD_STATES = list(HoldState)
_STATE_CODE = {state: code for code, state in enumerate(_STATES)}
_KIND_CODE = {kind: code for code, kind in enumerate(_KINDS)}
_HOLD_CODE = {state: code for code, state in enumerate(_HOLD_STATES)}
_CHARGE = _KIND_CODE[TransferKind.CHARGE]
_NO_HOLD = -1


class Journal:
    """Integer columns of equal length."""

    def __init__(self, *names: str) -> None:
        self._columns = {name: array("q") for name in names}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def add(self, *values: int) -> None:
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def __getitem__(self, name: str) -> Ints:
        return np.array(self._columns[name], np.int64)

    def change(self, row: int, name: str, value: int) -> None:
        """For tests of the audit."""
        self._columns[name][row] = value


class DayBooks:
    """Job ids are ``j`` and a number. ``keep``: jobs and holds that have ended, karma events and transfers stay in ``tables`` too."""

    def __init__(self, keep: bool = False) -> None:
        self.tables: dict[str, dict[str, Any]] = {kind.name: {} for kind in KINDS}
        self.jobs = Journal("number", "account", "state", "price", "bid", "hold_account", "hold", "posted", "hold_state")
        self.transfers = Journal("number", "part", "debit", "credit", "amount", "kind")
        self.karma_milli: Counter[str] = Counter()  # of events, by Island
        self.opened = 0
        self._keep = keep
        self._names: dict[str, int] = {}
        self._karma_before: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<DayBooks {self.opened} jobs opened, {len(self.jobs)} ended, {len(self.transfers)} transfers>"

    def start_with(self, islands: list[IslandRecord]) -> None:
        """Islands that have been there on the days before."""
        for record in islands:
            self.tables[ISLANDS.name][record.peer] = record
            self._karma_before[record.peer] = record.karma_milli

    def do(self, operation: Operation[T], now_ms: int) -> T:
        """Raises BooksRefused, and nothing has changed."""
        rows = Rows()
        for kind, key in operation.reads(rows):  # at once, so it goes on with what it has named so far
            rows.load(kind, key, self.tables[kind.name].get(key))
        result = operation.apply(rows, now_ms)
        ended: list[Job] = []
        for kind, row in rows.changes():
            self._store(kind, row, ended)
        for job in ended:
            self._retire(job)
        return result

    def all_of(self, kind: Kind[T]) -> dict[str, T]:
        """The rows of a table, by key."""
        return self.tables[kind.name]

    def _store(self, kind: Kind[Any], row: Any, ended: list[Job]) -> None:
        if kind is TRANSFERS:
            self._post(row)
            if not self._keep:
                return
        elif kind is KARMA_EVENTS:
            self._note_karma(row)
            return
        table, key = self.tables[kind.name], kind.key_of(row)
        if kind is JOBS:
            self.opened += key not in table
            if row.ended:
                ended.append(row)
        table[key] = row

    def _post(self, transfer: Transfer) -> None:
        job, _, part = transfer.id.rpartition(":")
        is_charge = transfer.kind is TransferKind.CHARGE
        self.transfers.add(
            _number(job) if is_charge else -1,
            int(part) if is_charge else len(self.transfers),
            self.code(transfer.debit),
            self.code(transfer.credit),
            transfer.amount,
            _KIND_CODE[transfer.kind],
        )

    def _note_karma(self, event: KarmaEvent) -> None:
        self.karma_milli[event.peer] += event.delta_milli
        if self._keep:
            self.tables[KARMA_EVENTS.name][event.id] = event

    def _retire(self, job: Job) -> None:
        holds = self.tables[HOLDS.name]
        hold: Hold | None = holds.get(job.id)
        account = self.code(user(job.account))
        start = (_number(job.id), account, _STATE_CODE[job.state], job.price_micros, job.bid_micros)
        if hold is None:
            self.jobs.add(*start, _NO_HOLD, 0, 0, _NO_HOLD)
        else:
            self.jobs.add(*start, self.code(hold.account), hold.amount, hold.posted, _HOLD_CODE[hold.state])
        if not self._keep:
            del self.tables[JOBS.name][job.id]
            holds.pop(job.id, None)

    def code(self, account: str) -> int:
        """The number of a ledger account in the journal."""
        return self._names.setdefault(account, len(self._names))

    # -- audit

    def audit(self) -> list[str]:
        """What does not add up, in sentences; nothing where all is well. For a day that is over: every job has ended."""
        return [*self._audit_balances(), *self._audit_jobs(), *self._audit_charges(), *self._audit_islands()]

    def _audit_balances(self) -> list[str]:
        """All balances together are 0; each is what its transfers add up to; nothing is held; only the network's own are below 0."""
        balances: dict[str, Balance] = self.tables[BALANCES.name]
        moved = np.zeros(len(self._names), np.int64)
        np.add.at(moved, self.transfers["credit"], self.transfers["amount"])
        np.subtract.at(moved, self.transfers["debit"], self.transfers["amount"])
        found = []
        total = sum(balance.posted for balance in balances.values())
        if total:
            found.append(f"all balances together are {total} micro-credits instead of 0")
        for name, code in self._names.items():
            posted = balances[name].posted if name in balances else 0
            if posted != moved[code]:
                found.append(f"the balance of {name} is {posted}, its transfers add up to {moved[code]}")
        for name, balance in balances.items():
            if balance.held:
                found.append(f"{name} has {balance.held} micro-credits held, and no job is left")
            if balance.posted < 0 and not name.startswith("system:"):
                found.append(f"{name} is below zero: {balance.posted}")
            if name not in self._names and balance.posted:
                found.append(f"{name} has {balance.posted} micro-credits and no transfer")
        if (self.transfers["amount"] <= 0).any() or (self.transfers["debit"] == self.transfers["credit"]).any():
            found.append("some transfer moves nothing")
        return found

    def _audit_jobs(self) -> list[str]:
        """Every job that was opened has ended, once; its hold is resolved, its own, and posted for its price, within its bid."""
        jobs, found = self.jobs, []
        still = self.opened - len(jobs)
        if still:
            found.append(f"{still} jobs have not ended")
        numbers = jobs["number"]
        if len(np.unique(numbers)) < len(numbers):
            found.append("a job has ended twice")
        pending, posted = _HOLD_CODE[HoldState.PENDING], _HOLD_CODE[HoldState.POSTED]
        is_posted = jobs["hold_state"] == posted
        for what, wrong in (
            ("its hold is missing or another account's", jobs["hold_account"] != jobs["account"]),
            ("its hold is pending", jobs["hold_state"] == pending),
            ("its price is not what its hold was posted with", jobs["price"] != jobs["posted"]),
            ("it cost something, and its hold was released", (jobs["price"] > 0) & ~is_posted),
            ("more was posted than held", jobs["posted"] > jobs["hold"]),
            ("its hold is not its bid", jobs["hold"] != jobs["bid"]),
            ("it failed, and cost something", (jobs["state"] == _STATE_CODE[JobState.FAILED]) & (jobs["price"] > 0)),
        ):
            found += [f"job j{number}: {what}" for number in numbers[wrong][:SHOWN_MAX].tolist()]
        return found

    def _audit_charges(self) -> list[str]:
        """The chain of each job's charges adds up to its price, is taken from its account, and no part of it is there twice."""
        jobs, transfers = self.jobs, self.transfers
        is_charge = transfers["kind"] == _CHARGE
        number, part = transfers["number"][is_charge], transfers["part"][is_charge]
        room = 1 + max(int(number.max(initial=0)), int(jobs["number"].max(initial=0)))
        charged, price, payer = np.zeros(room, np.int64), np.zeros(room, np.int64), np.full(room, -1, np.int64)
        np.add.at(charged, number, transfers["amount"][is_charge])
        price[jobs["number"]], payer[jobs["number"]] = jobs["price"], jobs["account"]
        found = [
            f"job j{job} cost {price[job]} micro-credits, its charges add up to {charged[job]}"
            for job in np.flatnonzero(charged != price)[:SHOWN_MAX].tolist()
        ]
        wrong = number[payer[number] != transfers["debit"][is_charge]]
        found += [f"a charge of job j{job} was taken from another account" for job in wrong[:SHOWN_MAX].tolist()]
        parts = number * (1 + part.max(initial=0)) + part
        if len(np.unique(parts)) < len(parts):
            found.append("a part of a charge was taken twice")
        return found

    def _audit_islands(self) -> list[str]:
        """What was charged is what Islands earned and publishers got; karma is what its events add up to."""
        islands: dict[str, IslandRecord] = self.tables[ISLANDS.name]
        charged = self.charged_micros()
        earned = sum(island.earned_micros for island in islands.values())
        found = []
        if charged != earned + self.published_micros():
            found.append(f"{charged} micro-credits were charged, {earned} earned by Islands, {self.published_micros()} by publishers")
        for peer, island in islands.items():
            expected = self._karma_before.get(peer, 0) + self.karma_milli[peer]
            if island.karma_milli != expected:
                found.append(f"the karma of {peer} is {island.karma_milli}, its events add up to {expected}")
        return found

    def charged_micros(self) -> int:
        return int(self.transfers["amount"][self.transfers["kind"] == _CHARGE].sum())

    def published_micros(self) -> int:
        """What charges brought to publishers; they have nothing else in common with Islands' owners."""
        names = [user(publisher.account) for publisher in self.all_of(PUBLISHERS).values()]
        codes = np.array([self.code(name) for name in names], np.int64)
        mine = np.isin(self.transfers["credit"], codes) & (self.transfers["kind"] == _CHARGE)
        return int(self.transfers["amount"][mine].sum())

    def totals(self) -> dict[str, int]:
        """Micro-credits by whom they belong to; together 0."""
        publishers = {user(publisher.account) for publisher in self.all_of(PUBLISHERS).values()}
        sums = dict.fromkeys(("users", "publishers", "escrow", "system"), 0)
        for name, balance in self.all_of(BALANCES).items():
            group = "publishers" if name in publishers else {"user": "users"}.get(name.partition(":")[0], name.partition(":")[0])
            sums[group] += balance.posted
        return sums


def _number(job_id: str) -> int:
    return int(job_id[1:])
