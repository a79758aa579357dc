"""The commands of workload.py as operations of the books, and what came of them in plain values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.books.accounts import (
    Account,
    Approve,
    CreateAccount,
    GrantCredits,
    IslandRecord,
    LimitAccount,
    PairIsland,
    Publisher,
    Refill,
    SetPublisher,
    Unpair,
)
from coordinator.books.jobs import (
    Adopt,
    Earned,
    Job,
    JobState,
    OpenJob,
    Outcome,
    Placed,
    SettleJob,
    StartJob,
    WantCancel,
)
from coordinator.books.ledger import (
    BALANCES,
    LOSSES,
    TRANSFERS,
    Empty,
    Hold,
    Move,
    PlaceHold,
    PostHold,
    Refund,
    ReleaseHold,
    Share,
    Transfer,
    TransferKind,
)
from coordinator.books.rows import Address, Operation, Rows
from protocol.prices import Ask
from tests.coordinator.books.workload import START_MS, Command

Args = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RefundHold:
    """Refunds whatever a hold was charged, as the books have it when their turn comes."""

    id: str
    shares: int

    def reads(self, rows: Rows) -> Iterable[Address]:
        yield BALANCES, LOSSES
        for index in range(self.shares):
            for end in ("", ":refund", ":refund:loss"):
                yield TRANSFERS, f"{self.id}:{index}{end}"
            charge = rows.peek(TRANSFERS, f"{self.id}:{index}")
            if charge is not None:
                yield BALANCES, charge.debit
                yield BALANCES, charge.credit

    def apply(self, rows: Rows, now_ms: int) -> int:
        found = (rows.get(TRANSFERS, f"{self.id}:{index}") for index in range(self.shares))
        return Refund(tuple(transfer for transfer in found if transfer is not None)).apply(rows, now_ms)


def operation_of(command: Command) -> Operation[Any]:
    return _OPERATIONS[command.verb](command.args)


def _trial(id: str) -> tuple[str, str, str]:
    """Every third job is of one of two A/B tests, and of one of a few units: many threads change the same row."""
    number = zlib.crc32(id.encode())
    return ("", "", "") if number % 3 else (f"t{number // 3 % 2}", f"arm{number // 6 % 2}", f"u{number // 12 % 5}")


def _open(args: Args) -> OpenJob:
    ab_test, ab_arm, ab_unit = _trial(args["id"])
    job = Job(
        id=args["id"],
        account=args["account"],
        cargo=args["cargo"],
        kind="chat",
        state=JobState.SUBMITTED,
        priority=50,
        bid_micros=args["bid"],
        bid_source="explicit",
        owner=args["owner"],
        owner_boot=args["boot"],
        created_at_ms=START_MS,
        can_rerun=args["rerun"],
        fingerprint=args["fingerprint"],
        input=args["input"],
        ab_test=ab_test,
        ab_arm=ab_arm,
        ab_unit=ab_unit,
    )
    return OpenJob(job, args["expires"], args["floor"], args["key"], args["key_expires"])


def _settle(args: Args) -> SettleJob:
    outcome = Outcome(
        JobState(args["state"]),
        completion_tokens=args["tokens"],
        error_code="" if args["state"] == "succeeded" else "some_error",
        output=args["output"],
        result_expires_at_ms=START_MS if args["output"] else 0,
        latency_us=1000 * args["tokens"],
        first_word_us=args["tokens"],
    )
    earned = tuple(Earned(*each) for each in args["earned"])
    trial = _trial(args["id"])
    unit = "/".join(trial) if trial[0] else ""
    return SettleJob(args["id"], args["account"], args["cargo"], args["owner"], args["boot"], outcome, earned, args["failed"], unit)


_OPERATIONS: dict[str, Callable[[Args], Operation[Any]]] = {
    "create": lambda a: CreateAccount(a["name"], a["rate"], a["grant"]),
    "grant": lambda a: GrantCredits(a["name"], a["amount"], a["id"]),
    "refill": lambda a: Refill(a["name"]),
    "limit": lambda a: LimitAccount(a["name"], a["rate"]),
    "move": lambda a: Move(a["id"], a["debit"], a["credit"], a["amount"], TransferKind.TRANSFER),
    "hold": lambda a: PlaceHold(a["id"], a["account"], a["amount"], a["expires"]),
    "post": lambda a: PostHold(a["id"], a["account"], tuple(Share(*share) for share in a["shares"])),
    "release": lambda a: ReleaseHold(a["id"], a["account"]),
    "refund": lambda a: RefundHold(a["id"], a["shares"]),
    "empty": lambda a: Empty(a["id"], a["source"], a["target"]),
    "pair": lambda a: PairIsland(a["peer"], a["account"]),
    "unpair": lambda a: Unpair(a["peer"], a["account"]),
    "approve": lambda a: Approve(a["peer"], a["yes"]),
    "publish": lambda a: SetPublisher(a["cargo"], a["account"], a["ppm"]),
    "open": _open,
    "start": lambda a: StartJob(a["id"], a["owner"], a["boot"], Placed(a["island"], "eu", Ask(1, 2, 3)), JobState(a["state"])),
    "settle": _settle,
    "adopt": lambda a: Adopt(a["id"], a["account"], a["from_owner"], a["from_boot"], a["owner"], a["boot"]),
    "cancel": lambda a: WantCancel(a["id"], a["account"]),
}


def told(result: Any) -> list[Any]:
    """What a caller learns, as JSON has it."""
    match result:
        case int():
            return [result]
        case Transfer():
            return [result.id, result.debit, result.credit, result.amount, result.at_ms]
        case Hold():
            return [result.id, result.state.value, result.amount, result.posted]
        case Account():
            return [result.name, result.rate_limit_per_minute, result.refilled_day]
        case IslandRecord():
            return [result.peer, result.account, result.approved, result.karma_milli, result.earned_micros]
        case Publisher():
            return [result.cargo, result.account, result.share_ppm]
        case Job():
            return [result.id, result.state.value, result.bid_micros, result.price_micros, result.tries, result.owner]
    raise TypeError(f"nobody foretells {type(result).__name__}")
