"""The books once more, written from what they promise and not from how they do it: plain tables in dictionaries, one method a verb.

What it shares with the books are the names of tables, columns, ids and reasons. It tells what each command of workload.py has to answer,
and what every table has to hold afterwards; a unit that a crash may or may not have taken back can be undone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.coordinator.books.workload import AMOUNT_MAX, DAY_MS, SIGN_UP, START_MS, Unit

ISSUE, LOSSES = "system:issue", "system:losses"
POINT_MS = 3_600_000
EARNING = 10_000
ENDED = ("succeeded", "failed", "cancelled")
TRIES_MAX = 3


class AccountRow(NamedTuple):
    name: str
    created_at_ms: int
    rate_limit_per_minute: int
    refilled_day: int


class BalanceRow(NamedTuple):
    account: str
    posted: int = 0
    held: int = 0

    @property
    def free(self) -> int:
        return self.posted - self.held


class TransferRow(NamedTuple):
    id: str
    debit: str
    credit: str
    amount: int
    kind: str
    reference: str
    at_ms: int


class HoldRow(NamedTuple):
    id: str
    account: str
    amount: int
    posted: int
    state: str
    created_at_ms: int
    expires_at_ms: int


class IslandRow(NamedTuple):
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
    def payee(self) -> str:
        return f"user:{self.account}" if self.account and self.karma_milli >= EARNING else f"escrow:{self.peer}"


class KarmaRow(NamedTuple):
    id: str
    peer: str
    kind: str
    delta_milli: int
    balance_milli: int
    job_id: str
    at_ms: int


class PublisherRow(NamedTuple):
    cargo: str
    account: str
    share_ppm: int


class JobRow(NamedTuple):
    id: str
    account: str
    cargo: str
    owner: str
    owner_boot: int
    bid_micros: int
    can_rerun: bool
    fingerprint: str
    input: bytes
    state: str = "submitted"
    cancel_wanted: bool = False
    tries: int = 1
    price_micros: int = 0
    island: str = ""
    region: str = ""
    ask_per_job: int = 0
    ask_per_1k_output: int = 0
    ask_per_second: int = 0
    started_at_ms: int = 0
    finished_at_ms: int = 0
    completion_tokens: int = 0
    error_code: str = ""
    output: bytes = b""
    result_expires_at_ms: int = 0


class RequestRow(NamedTuple):
    id: str
    fingerprint: str
    job_id: str
    expires_at_ms: int


class ReceiptRow(NamedTuple):
    id: str
    job_id: str
    island: str
    envelope: bytes
    paid_micros: int
    at_ms: int


COLUMNS: dict[str, tuple[str, ...]] = {
    "accounts": AccountRow._fields,
    "balances": BalanceRow._fields,
    "transfers": TransferRow._fields,
    "holds": HoldRow._fields,
    "islands": IslandRow._fields,
    "karma_events": KarmaRow._fields,
    "publishers": PublisherRow._fields,
    "jobs": JobRow._fields,
    "requests": RequestRow._fields,
    "receipts": ReceiptRow._fields,
}
Tables = dict[str, dict[str, tuple[Any, ...]]]
Answer = list[Any]  # ["ok", what each command tells…], or ["no", why]


def with_balances(found: Tables) -> Tables:
    """An account that has nothing is as good as none."""
    return {**found, "balances": {key: row for key, row in found["balances"].items() if any(row[1:3])}}


class No(Exception):
    """A refusal, by its word."""


def _amount(amount: int, least: int = 1) -> None:
    if not least <= amount <= AMOUNT_MAX:
        raise No("bad_amount")


class Shadow:
    """``tables``: rows by their key, in the columns of ``COLUMNS``."""

    def __init__(self) -> None:
        self.tables: Tables = {name: {} for name in COLUMNS}
        self._undo: list[tuple[str, str, tuple[Any, ...] | None]] = []

    def apply(self, unit: Unit, now_ms: int) -> Answer:
        """All of its commands, or none."""
        mark = len(self._undo)
        try:
            return ["ok", *(getattr(self, f"_{command.verb}")(now_ms, **command.args) for command in unit)]
        except No as no:
            self.undo(mark)
            return ["no", str(no)]

    @property
    def mark(self) -> int:
        """For ``undo``: now."""
        return len(self._undo)

    def undo(self, mark: int) -> None:
        while len(self._undo) > mark:
            name, key, row = self._undo.pop()
            if row is None:
                del self.tables[name][key]
            else:
                self.tables[name][key] = row

    def before(self, mark: int) -> Tables:
        """The tables as they were then."""
        tables = {name: dict(rows) for name, rows in self.tables.items()}
        for name, key, row in reversed(self._undo[mark:]):
            if row is None:
                del tables[name][key]
            else:
                tables[name][key] = row
        return tables

    def forget(self) -> None:
        """What happened until now is certain."""
        self._undo.clear()

    def _get(self, name: str, key: str) -> Any:
        return self.tables[name].get(key)

    def _set(self, name: str, row: tuple[Any, ...]) -> None:
        key = row[0]
        self._undo.append((name, key, self.tables[name].get(key)))
        self.tables[name][key] = row

    # Money

    def _balance(self, account: str) -> BalanceRow:
        return self._get("balances", account) or BalanceRow(account)

    def _pay(self, id: str, debit: str, credit: str, amount: int, kind: str, reference: str, now_ms: int) -> TransferRow:
        for account, change in ((debit, -amount), (credit, amount)):
            row = self._balance(account)
            if abs(row.posted + change) > AMOUNT_MAX:
                raise No("bad_amount")
            self._set("balances", row._replace(posted=row.posted + change))
        transfer = TransferRow(id, debit, credit, amount, kind, reference, now_ms)
        self._set("transfers", transfer)
        return transfer

    def _moved(self, id: str, debit: str, credit: str, amount: int, kind: str, now_ms: int) -> TransferRow:
        _amount(amount)
        known: TransferRow | None = self._get("transfers", id)
        if known:
            if known[1:6] != (debit, credit, amount, kind, ""):
                raise No("id_reused")
            return known
        if debit == credit:
            raise No("bad_amount")
        if not debit.startswith("system:") and self._balance(debit).free < amount:
            raise No("insufficient_credits")
        return self._pay(id, debit, credit, amount, kind, "", now_ms)

    def _move(self, now_ms: int, id: str, debit: str, credit: str, amount: int) -> Answer:
        row = self._moved(id, debit, credit, amount, "transfer", now_ms)
        return [*row[:4], row.at_ms]

    def _hold(self, now_ms: int, id: str, account: str, amount: int, expires: int) -> Answer:
        _amount(amount, least=0)
        row: HoldRow | None = self._get("holds", id)
        if row is None:
            balance = self._balance(account)
            if balance.free < amount:
                raise No("insufficient_credits")
            self._set("balances", balance._replace(held=balance.held + amount))
            row = HoldRow(id, account, amount, 0, "pending", now_ms, expires)
            self._set("holds", row)
        elif (row.account, row.amount, row.expires_at_ms) != (account, amount, expires):
            raise No("id_reused")
        return [id, row.state, row.amount, row.posted]

    def _hold_of(self, id: str, account: str) -> HoldRow:
        row: HoldRow | None = self._get("holds", id)
        if row is None or row.account != account:
            raise No("unknown_hold")
        return row

    def _resolve(self, hold: HoldRow, state: str, posted: int) -> HoldRow:
        balance = self._balance(hold.account)
        self._set("balances", balance._replace(held=balance.held - hold.amount))
        hold = hold._replace(state=state, posted=posted)
        self._set("holds", hold)
        return hold

    def _post(self, now_ms: int, id: str, account: str, shares: tuple[tuple[str, int], ...]) -> Answer:
        for payee, amount in shares:
            _amount(amount)
            if payee == account:
                raise No("bad_amount")
        hold = self._hold_of(id, account)
        total = sum(amount for _, amount in shares)
        chain = [(f"{id}:{index}", account, payee, amount, "charge", id) for index, (payee, amount) in enumerate(shares)]
        before = [self._get("transfers", link[0]) for link in chain]
        if hold.state == "released":
            raise No("hold_resolved")
        if hold.state == "posted":
            if hold.posted != total:
                raise No("hold_resolved")
            for known, link in zip(before, chain, strict=True):
                if known is None:
                    raise No("hold_resolved")
                if known[:6] != link:
                    raise No("id_reused")
        else:
            if total > hold.amount:
                raise No("over_hold")
            if any(before):
                raise No("id_reused")
            hold = self._resolve(hold, "posted", total)
            for link in chain:
                self._pay(*link, now_ms)
        return [id, hold.state, hold.amount, hold.posted]

    def _release(self, now_ms: int, id: str, account: str) -> Answer:
        hold = self._hold_of(id, account)
        if hold.state == "posted":
            raise No("hold_resolved")
        if hold.state == "pending":
            hold = self._resolve(hold, "released", 0)
        return [id, hold.state, hold.amount, hold.posted]

    def _refund(self, now_ms: int, id: str, shares: int) -> Answer:
        given = 0
        for index in range(shares):
            charge: TransferRow | None = self._get("transfers", f"{id}:{index}")
            if charge is None or any(self._get("transfers", charge.id + end) for end in (":refund", ":refund:loss")):
                continue
            taken = max(0, min(charge.amount, self._balance(charge.credit).free))
            if taken:
                self._pay(f"{charge.id}:refund", charge.credit, charge.debit, taken, "refund", id, now_ms)
            if taken < charge.amount:
                self._pay(f"{charge.id}:refund:loss", LOSSES, charge.debit, charge.amount - taken, "refund", id, now_ms)
            given += charge.amount
        return [given]

    def _empty(self, now_ms: int, id: str, source: str, target: str) -> Answer:
        known: TransferRow | None = self._get("transfers", id)
        if known:
            return [known.amount]
        free = max(0, self._balance(source).free)
        if free and source != target:
            self._pay(id, source, target, free, "escrow", source, now_ms)
        return [free]

    # Accounts and Islands

    def _account_of(self, name: str) -> AccountRow:
        row: AccountRow | None = self._get("accounts", name)
        if row is None:
            raise No("unknown_account")
        return row

    def _create(self, now_ms: int, name: str, rate: int, grant: int) -> Answer:
        row: AccountRow | None = self._get("accounts", name)
        if row is None:
            if grant:
                self._moved(f"sign-up:{name}", ISSUE, f"user:{name}", grant, "grant", now_ms)
            row = AccountRow(name, now_ms, rate, now_ms // DAY_MS)
            self._set("accounts", row)
        return [name, row.rate_limit_per_minute, row.refilled_day]

    def _grant(self, now_ms: int, name: str, amount: int, id: str) -> Answer:
        self._account_of(name)
        row = self._moved(id, ISSUE, f"user:{name}", amount, "grant", now_ms)
        return [*row[:4], row.at_ms]

    def _limit(self, now_ms: int, name: str, rate: int) -> Answer:
        row = self._account_of(name)._replace(rate_limit_per_minute=rate)
        self._set("accounts", row)
        return [name, rate, row.refilled_day]

    def _refill(self, now_ms: int, name: str) -> Answer:
        row, day = self._account_of(name), now_ms // DAY_MS
        if day <= row.refilled_day:
            return [0]
        self._set("accounts", row._replace(refilled_day=day))
        missing = max(0, SIGN_UP - self._balance(f"user:{name}").posted)
        if missing:
            self._pay(f"refill:{name}:{day}", ISSUE, f"user:{name}", missing, "refill", "", now_ms)
        return [missing]

    def _island(self, peer: str, now_ms: int) -> IslandRow:
        return self._get("islands", peer) or IslandRow(peer, first_seen_ms=now_ms)

    def _put_island(self, row: IslandRow) -> Answer:
        self._set("islands", row)
        return [row.peer, row.account, row.approved, row.karma_milli, row.earned_micros]

    def _pair(self, now_ms: int, peer: str, account: str) -> Answer:
        self._account_of(account)
        row = self._island(peer, now_ms)
        if row.account not in ("", account):
            raise No("not_owner")
        row = row._replace(account=account)
        if row.payee.startswith("user:"):
            self._empty(now_ms, f"escrow:{peer}:{row.earned_micros}", f"escrow:{peer}", f"user:{account}")
        return self._put_island(row)

    def _unpair(self, now_ms: int, peer: str, account: str) -> Answer:
        row = self._island(peer, now_ms)
        if row.account != account:
            raise No("not_owner")
        return self._put_island(row._replace(account=""))

    def _approve(self, now_ms: int, peer: str, yes: bool) -> Answer:
        return self._put_island(self._island(peer, now_ms)._replace(approved=yes))

    def _publish(self, now_ms: int, cargo: str, account: str, ppm: int) -> Answer:
        self._account_of(account)
        if not 0 <= ppm <= 1_000_000:
            raise No("bad_amount")
        self._set("publishers", PublisherRow(cargo, account, ppm))
        return [cargo, account, ppm]

    # Jobs

    def _put_job(self, row: JobRow) -> Answer:
        self._set("jobs", row)
        return self._job_told(row)

    @staticmethod
    def _job_told(row: JobRow) -> Answer:
        return [row.id, row.state, row.bid_micros, row.price_micros, row.tries, row.owner]

    def _open(
        self,
        now_ms: int,
        id: str,
        account: str,
        cargo: str,
        bid: int,
        owner: str,
        boot: int,
        rerun: bool,
        expires: int,
        floor: int | None,
        key: str,
        key_expires: int,
        fingerprint: str,
        input: bytes,
    ) -> Answer:
        known: JobRow | None = self._get("jobs", id)
        request: RequestRow | None = self._get("requests", f"{account}/{key}") if key else None
        if known is None and request and request.expires_at_ms >= now_ms:
            if request.fingerprint != fingerprint:
                raise No("idempotency_key_reused")
            earlier: JobRow = self._get("jobs", request.job_id)
            if earlier.state not in ENDED and not earlier.can_rerun:
                raise No("idempotency_key_in_use")
            known = earlier if earlier.state not in ("failed", "cancelled") else None
        if known is not None:
            return self._job_told(known)
        self._refill(now_ms, account)
        free = self._balance(f"user:{account}").free
        if floor is not None and floor <= free < bid:
            bid = free
        self._hold(now_ms, id, f"user:{account}", bid, expires)
        if key:
            self._set("requests", RequestRow(f"{account}/{key}", fingerprint, id, key_expires))
        return self._put_job(JobRow(id, account, cargo, owner, boot, bid, rerun, fingerprint, input))

    def _job_of(self, id: str, owner: str, boot: int) -> JobRow:
        row: JobRow | None = self._get("jobs", id)
        if row is None:
            raise No("unknown_job")
        if (row.owner, row.owner_boot) != (owner, boot):
            raise No("not_owner")
        return row

    def _start(self, now_ms: int, id: str, owner: str, boot: int, island: str, state: str) -> Answer:
        row = self._job_of(id, owner, boot)
        if row.state in ENDED:
            raise No("wrong_state")
        row = row._replace(state=state, island=island, region="eu", started_at_ms=row.started_at_ms or now_ms)
        return self._put_job(row._replace(ask_per_job=1, ask_per_1k_output=2, ask_per_second=3))

    def _settle(
        self,
        now_ms: int,
        id: str,
        owner: str,
        boot: int,
        account: str,
        cargo: str,
        state: str,
        earned: tuple[tuple[str, int, int, bytes], ...],
        failed: tuple[str, ...],
        output: bytes,
        tokens: int,
    ) -> Answer:
        job = self._job_of(id, owner, boot)
        if job.state == state:
            return self._job_told(job)
        if job.state in ENDED:
            raise No("wrong_state")
        for _, amount, compute_ms, _ in earned:
            _amount(amount, least=0)
            _amount(compute_ms, least=0)
        price = self._charge(now_ms, id, account, cargo, earned)
        events: list[tuple[str, int | None]] = [(peer, ms) for peer, _, ms, _ in earned if state == "succeeded"]
        for index, (peer, compute_ms_) in enumerate([*events, *((peer, None) for peer in failed)]):
            self._karma(now_ms, id, index, peer, account, compute_ms_)
        for index, (peer, amount, _, receipt) in enumerate(earned):
            if receipt:
                cost = self._cost(peer, amount, account, cargo, now_ms)
                self._set("receipts", ReceiptRow(f"{id}:{index}", id, peer, receipt, cost, now_ms))
        return self._put_job(
            job._replace(
                state=state,
                price_micros=price,
                finished_at_ms=now_ms,
                completion_tokens=tokens,
                error_code="" if state == "succeeded" else "some_error",
                input=b"",
                output=output,
                result_expires_at_ms=START_MS if output else 0,
            )
        )

    def _charge(self, now_ms: int, id: str, account: str, cargo: str, earned: tuple[tuple[str, int, int, bytes], ...]) -> int:
        publisher: PublisherRow | None = self._get("publishers", cargo)
        owed: dict[str, int] = {}
        own = f"user:{account}"
        for peer, amount, _, _ in earned:
            island, cut = self._island(peer, now_ms), amount * publisher.share_ppm // 1_000_000 if publisher else 0
            if amount > cut and island.account != account:
                owed[island.payee] = owed.get(island.payee, 0) + amount - cut
            if publisher and cut:
                owed[f"user:{publisher.account}"] = owed.get(f"user:{publisher.account}", 0) + cut
        shares = tuple((payee, amount) for payee, amount in owed.items() if payee != own)
        if shares:
            self._post(now_ms, id, own, shares)
        else:
            self._release(now_ms, id, own)
        for peer, amount, _, _ in earned:
            island, cut = self._island(peer, now_ms), amount * publisher.share_ppm // 1_000_000 if publisher else 0
            if amount and island.account != account:
                self._set("islands", island._replace(earned_micros=island.earned_micros + amount - cut))
        return sum(amount for _, amount in shares)

    def _cost(self, peer: str, amount: int, account: str, cargo: str, now_ms: int) -> int:
        """What a charge costs: nothing that would go to the account itself."""
        publisher: PublisherRow | None = self._get("publishers", cargo)
        cut = amount * publisher.share_ppm // 1_000_000 if publisher else 0
        to_publisher = cut if publisher and publisher.account != account else 0
        return to_publisher + (amount - cut if self._island(peer, now_ms).account != account else 0)

    def _karma(self, now_ms: int, job_id: str, index: int, peer: str, account: str, compute_ms: int | None) -> None:
        row = before = self._island(peer, now_ms)
        if before.account == account:
            return
        if compute_ms is None:
            lost = min(100, before.karma_milli + 10_000)
            row = before._replace(karma_milli=before.karma_milli - lost, jobs_failed=before.jobs_failed + 1)
        else:
            worth_ms = before.pending_ms + (compute_ms if before.karma_milli >= EARNING else compute_ms + compute_ms // 2)
            row = before._replace(
                karma_milli=before.karma_milli + 1000 * (worth_ms // POINT_MS),
                pending_ms=worth_ms % POINT_MS,
                compute_ms=before.compute_ms + compute_ms,
                jobs_done=before.jobs_done + 1,
            )
        self._set("islands", row)
        delta = row.karma_milli - before.karma_milli
        if delta:
            kind = "failure" if compute_ms is None else "compute"
            self._set("karma_events", KarmaRow(f"{job_id}:{index}", peer, kind, delta, row.karma_milli, job_id, now_ms))
        if before.account and before.karma_milli < EARNING <= row.karma_milli:
            self._empty(now_ms, f"escrow:{job_id}:{peer}", f"escrow:{peer}", f"user:{before.account}")

    def _adopt(self, now_ms: int, id: str, account: str, from_owner: str, from_boot: int, owner: str, boot: int) -> Answer:
        known: JobRow | None = self._get("jobs", id)
        if known and (known.owner, known.owner_boot) == (owner, boot):
            return self._job_told(known)
        row = self._job_of(id, from_owner, from_boot)
        if row.state in ENDED:
            raise No("wrong_state")
        row = row._replace(owner=owner, owner_boot=boot)
        if not row.cancel_wanted and row.can_rerun and row.tries < TRIES_MAX:
            return self._put_job(row._replace(state="submitted", tries=row.tries + 1, island="", region=""))
        self._release(now_ms, id, f"user:{account}")
        row = row._replace(state="cancelled") if row.cancel_wanted else row._replace(state="failed", error_code="coordinator_lost")
        return self._put_job(row._replace(finished_at_ms=now_ms, input=b""))

    def _cancel(self, now_ms: int, id: str, account: str) -> Answer:
        row: JobRow | None = self._get("jobs", id)
        if row is None or row.account != account:
            raise No("unknown_job")
        return self._put_job(row if row.state in ENDED else row._replace(cancel_wanted=True))
