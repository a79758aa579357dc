"""Random changes of the books, drawn from a seed: the same for who makes them (book_operations.py) and for who foretells them (shadow.py).

A *command* is a verb and its arguments, in plain values; a *unit* is one or more commands that happen together or not at all. The maker
knows nothing of what became of earlier commands, so many of its commands are refused, which is part of the test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

START_MS = 20_000 * 86_400_000  # midnight of some day
UNIT_MS = 60_000  # so long a unit takes by the clock of these books
DAY_MS = 86_400_000
AMOUNT_MAX = 2**60
CREDIT = 1_000_000
SIGN_UP = 10_000 * CREDIT
_RECENT = 300  # how far back a command refers to others
_ODD_NAME = "'; DROP TABLE balances; -- %s %(x)s :y \\ \" ünï 🏝"


@dataclass(frozen=True, slots=True)
class Command:
    verb: str
    args: Mapping[str, Any]


Unit = tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    accounts: int
    units: int

    @property
    def islands(self) -> int:
        return max(4, self.accounts // 5)


def make_units(seed: int, scale: Scale) -> list[Unit]:
    """So many units; the first ones create the accounts."""
    maker = _Maker(random.Random(f"books {seed}"), scale)
    return [maker.unit(number) for number in range(scale.units)]


def account_name(number: int) -> str:
    return f"a{number}" if number % 50 else f"a{number} {_ODD_NAME}"


def clock_of(number: int, seed: int) -> Callable[[], int]:
    """A clock that goes on by up to an hour each time it is looked at, and is now and then days ahead or behind for a moment."""
    rng = random.Random(f"clock {seed}")
    now_ms = START_MS + number * UNIT_MS

    def clock_ms() -> int:
        nonlocal now_ms
        now_ms += rng.randrange(60 * 60_000)
        jump_days = rng.choice([-400, -3, -1, 1, 2, 30]) if rng.random() < 0.05 else 0
        return now_ms + jump_days * DAY_MS

    return clock_ms


@dataclass(slots=True)
class _Job:
    id: str
    account: str
    cargo: str
    bid: int
    owner: str = "c0"
    boot: int = 0


class _Maker:
    def __init__(self, rng: random.Random, scale: Scale) -> None:
        self._rng, self._scale = rng, scale
        self._number = 0
        self._units: list[Unit] = []
        self._holds: list[Mapping[str, Any]] = []
        self._posts: list[Mapping[str, Any]] = []
        self._jobs: list[_Job] = []
        self._pairs: list[Mapping[str, Any]] = []
        self._keys: list[Mapping[str, Any]] = []
        verbs: dict[Callable[[], Unit], int] = {
            self._grant: 2,
            self._refill: 4,
            self._limit: 1,
            self._move: 8,
            self._hold: 14,
            self._post: 11,
            self._release: 5,
            self._refund: 4,
            self._empty: 1,
            self._pair: 3,
            self._unpair: 2,
            self._approve: 1,
            self._publish: 1,
            self._open: 14,
            self._start: 6,
            self._settle: 13,
            self._adopt: 3,
            self._cancel: 1,
            self._again: 5,
            self._twisted: 4,
            self._bundle: 4,
        }
        self._verbs, self._weights = list(verbs), list(verbs.values())

    def unit(self, number: int) -> Unit:
        self._number = number
        if number < self._scale.accounts:
            unit = self._create(account_name(number))
        else:
            unit = self._rng.choices(self._verbs, self._weights)[0]()
        self._units.append(unit)
        return unit

    # What commands are about

    def _account(self) -> str:
        """Some accounts are in everything; a few do not exist."""
        rng, count = self._rng, self._scale.accounts
        if rng.random() < 0.2:
            return account_name(rng.randrange(min(5, count)))
        return account_name(rng.randrange(count + count // 50 + 1))

    def _user(self) -> str:
        return f"user:{self._account()}"

    def _peer(self) -> str:
        return f"p{self._rng.randrange(self._scale.islands)}"

    def _cargo(self) -> str:
        return f"cargo{self._rng.randrange(10)}"

    def _amount(self, most: int = SIGN_UP) -> int:
        """Micro-credits up to ``most``, small ones more often, and now and then what no amount can be."""
        rng = self._rng
        if rng.random() < 0.01:
            return rng.choice([0, -1, -(2**62), AMOUNT_MAX, AMOUNT_MAX + 1])
        return max(1, int(most * rng.random() ** 4))

    def _recent(self, things: list[Any]) -> Any:
        return things[-self._rng.randint(1, min(len(things), _RECENT))] if things else None

    def _soon_ms(self) -> int:
        return START_MS + (self._number + self._rng.randrange(-100, 400)) * UNIT_MS

    # Commands

    def _create(self, name: str) -> Unit:
        rng = self._rng
        return (Command("create", {"name": name, "rate": rng.randrange(3), "grant": rng.choice([SIGN_UP, SIGN_UP, 0, 7])}),)

    def _grant(self) -> Unit:
        return (Command("grant", {"name": self._account(), "amount": self._amount(), "id": f"g{self._number}"}),)

    def _refill(self) -> Unit:
        return (Command("refill", {"name": self._account()}),)

    def _limit(self) -> Unit:
        return (Command("limit", {"name": self._account(), "rate": self._rng.randrange(100)}),)

    def _move(self) -> Unit:
        sides = {"debit": self._user(), "credit": self._user()}
        return (Command("move", {"id": f"t{self._number}", **sides, "amount": self._amount()}),)

    def _hold(self) -> Unit:
        args = {"id": f"h{self._number}", "account": self._user(), "amount": self._amount(2 * SIGN_UP), "expires": self._soon_ms()}
        self._holds.append(args)
        return (Command("hold", args),)

    def _post_of(self, hold: Mapping[str, Any]) -> Command:
        rng, left, shares = self._rng, hold["amount"], []
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
            payee = self._user() if rng.random() < 0.7 else f"escrow:{self._peer()}"
            amount = self._amount(max(1, min(left, SIGN_UP)))
            left -= amount if rng.random() < 0.9 else 0
            shares.append((payee, amount))
        args = {"id": hold["id"], "account": hold["account"], "shares": tuple(shares)}
        self._posts.append(args)
        return Command("post", args)

    def _post(self) -> Unit:
        hold = self._recent(self._holds)
        return (self._post_of(hold),) if hold else self._hold()

    def _release(self) -> Unit:
        hold = self._recent(self._holds)
        return (Command("release", {"id": hold["id"], "account": hold["account"]}),) if hold else self._hold()

    def _refund(self) -> Unit:
        post = self._recent(self._posts)
        if not post:
            return self._hold()
        return (Command("refund", {"id": post["id"], "shares": len(post["shares"])}),)

    def _empty(self) -> Unit:
        return (Command("empty", {"id": f"e{self._number}", "source": self._user(), "target": self._user()}),)

    def _pair(self) -> Unit:
        args = {"peer": self._peer(), "account": self._account()}
        self._pairs.append(args)
        return (Command("pair", args),)

    def _unpair(self) -> Unit:
        pair = self._recent(self._pairs)
        return (Command("unpair", pair),) if pair else self._pair()

    def _approve(self) -> Unit:
        return (Command("approve", {"peer": self._peer(), "yes": self._rng.random() < 0.5}),)

    def _publish(self) -> Unit:
        ppm = self._rng.choice([0, 1, 100_000, 333_333, 999_999, 1_000_000, 1_000_001])
        return (Command("publish", {"cargo": self._cargo(), "account": self._account(), "ppm": ppm}),)

    def _open_job(self) -> tuple[_Job, Command]:
        rng = self._rng
        job = _Job(f"j{self._number}", self._account(), self._cargo(), self._amount(SIGN_UP // 4))
        keyed = self._recent(self._keys) if rng.random() < 0.3 else None
        key = f"k{self._number}" if rng.random() < 0.3 else ""
        args: dict[str, Any] = {
            "id": job.id,
            "account": keyed["account"] if keyed else job.account,
            "cargo": job.cargo,
            "bid": job.bid,
            "owner": job.owner,
            "boot": job.boot,
            "rerun": rng.random() < 0.5,
            "expires": self._soon_ms(),
            "floor": rng.choice([None, None, 0, job.bid // 2]),
            "key": keyed["key"] if keyed else key,
            "key_expires": self._soon_ms(),
            "fingerprint": keyed["fingerprint"] if keyed and rng.random() < 0.7 else f"f{rng.randrange(10)}",
            "input": rng.randbytes(rng.randrange(20)),
        }
        job.account = args["account"]
        if args["key"]:
            self._keys.append(args)
        return job, Command("open", args)

    def _open(self) -> Unit:
        job, command = self._open_job()
        self._jobs.append(job)
        return (command,)

    def _by(self, job: _Job) -> dict[str, Any]:
        """Who says something of a job: its owner, and sometimes one who is not."""
        boot = job.boot if self._rng.random() < 0.97 else job.boot + 1
        return {"id": job.id, "owner": job.owner, "boot": boot}

    def _start_of(self, job: _Job) -> Command:
        return Command("start", {**self._by(job), "island": self._peer(), "state": self._rng.choice(["assigned", "running"])})

    def _start(self) -> Unit:
        job = self._recent(self._jobs)
        return (self._start_of(job),) if job else self._open()

    def _settle_of(self, job: _Job) -> Command:
        rng, left, earned = self._rng, job.bid, []
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
            amount = self._amount(max(1, left))
            left -= amount if rng.random() < 0.9 else 0
            compute_ms = rng.randrange(-1, 3_600_000) if rng.random() < 0.99 else -5
            earned.append((self._peer(), amount if rng.random() < 0.95 else 0, compute_ms, rng.randbytes(rng.choice([0, 8]))))
        args = {
            **self._by(job),
            "account": job.account,
            "cargo": job.cargo,
            "state": rng.choices(["succeeded", "failed", "cancelled"], [8, 1, 1])[0],
            "earned": tuple(earned),
            "failed": tuple(self._peer() for _ in range(rng.choice([0] * 9 + [2]))),
            "output": rng.randbytes(rng.randrange(20)),
            "tokens": self._number,
        }
        return Command("settle", args)

    def _settle(self) -> Unit:
        job = self._recent(self._jobs)
        if not job:
            return self._open()
        if self._rng.random() < 0.9:
            self._jobs.remove(job)
        return (self._settle_of(job),)

    def _adopt(self) -> Unit:
        job = self._recent(self._jobs)
        if not job:
            return self._open()
        before = {"from_owner": job.owner, "from_boot": job.boot}
        job.owner, job.boot = f"c{self._rng.randrange(3)}", self._number
        return (Command("adopt", {"id": job.id, "account": job.account, **before, "owner": job.owner, "boot": job.boot}),)

    def _cancel(self) -> Unit:
        job = self._recent(self._jobs)
        return (Command("cancel", {"id": job.id, "account": job.account}),) if job else self._open()

    # Commands about commands

    def _again(self) -> Unit:
        """The very same once more, soon after or long after."""
        units = self._units
        unit: Unit = self._rng.choice(units) if self._rng.random() < 0.3 else self._recent(units)
        return unit

    def _twisted(self) -> Unit:
        """An earlier command with one argument changed."""
        for _ in range(20):
            command = self._rng.choice(self._recent(self._units))
            changes = self._changes(command)
            if changes:
                name = self._rng.choice(sorted(changes))
                return (Command(command.verb, {**command.args, name: changes[name]}),)
        return self._move()

    def _changes(self, command: Command) -> dict[str, Any]:
        args = command.args
        match command.verb:
            case "move":
                return {"amount": args["amount"] + 1, "credit": self._user()}
            case "grant":
                return {"amount": args["amount"] + 1, "name": self._account()}
            case "hold":
                return {"amount": args["amount"] + 1, "account": self._user(), "expires": args["expires"] + 1}
            case "post":
                shares = args["shares"]
                return {"shares": shares[:-1], "account": self._user()} | ({"shares": shares[::-1]} if len(shares) > 1 else {})
            case "release":
                return {"account": self._user()}
            case "settle":
                return {"state": self._rng.choice(["succeeded", "failed", "cancelled"]), "boot": args["boot"] + 1}
            case "adopt":
                return {"owner": "c9"}
            case _:
                return {}

    def _bundle(self) -> Unit:
        """Several together. All are new, so that none needs rows that only another of them would name."""
        match self._rng.randrange(4):
            case 0:
                hold = self._hold()[0]
                return hold, self._post_of(hold.args)
            case 1:
                job, command = self._open_job()
                return command, self._start_of(job), self._settle_of(job)
            case 2:
                return self._hold()[0], self._move()[0]
            case _:
                hold = self._hold()[0]
                return hold, Command("release", {"id": hold.args["id"], "account": hold.args["account"]}), self._move()[0]
