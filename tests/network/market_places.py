"""Three ways of choosing an Island for a job, and the line in which jobs wait: what a simulated day compares, and what it has in common.

``ours`` is production's ``choose``. The other two choose among the same Islands, ``eligible``, which says in a few lines what the sieve of
``coordinator.matching`` does; tests hold the two against one another. The line is the rule of ``coordinator.placement`` without trio;
a test holds it against the Placer.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from coordinator.columns import Bools, Candidate, Columns, Ints
from coordinator.matching import Refusal, Wish, choose
from coordinator.placement import SETTLE_TRIES_MAX, Placer
from protocol.book import Book
from protocol.errors import Code

J = TypeVar("J")
_BUSY = Refusal(Code.NO_CAPACITY, "all are busy")
_EMPTY_BOOK = Book("simulated", {})
Picker = Callable[[Columns, Wish, float, random.Random], Candidate | Refusal]


def ours(facts: Columns, wish: Wish, now_s: float, rng: random.Random) -> Candidate | Refusal:
    outcome = choose(facts, wish, now_s, rng)
    return outcome if isinstance(outcome, Refusal) else outcome.candidate


def at_random(facts: Columns, wish: Wish, now_s: float, rng: random.Random) -> Candidate | Refusal:
    found = eligible(facts, wish, now_s)
    if isinstance(found, Refusal):
        return found
    rows = np.flatnonzero(found[0])
    return facts.candidate(int(rows[rng.randrange(len(rows))]))


def cheapest(facts: Columns, wish: Wish, now_s: float, rng: random.Random) -> Candidate | Refusal:
    """The lowest price that the job can have; drawn among equals."""
    found = eligible(facts, wish, now_s)
    if isinstance(found, Refusal):
        return found
    mask, prices = found
    rows = np.flatnonzero(mask & (prices == prices[mask].min()))
    return facts.candidate(int(rows[rng.randrange(len(rows))]))


PICKERS: dict[str, Picker] = {"ours": ours, "random": at_random, "cheapest": cheapest}


def affordable(facts: Columns, wish: Wish) -> tuple[Bools, Ints] | Refusal:
    """Rows that could do the job for its bid if they had a slot, and the prices of all. For jobs without a quote."""
    if not len(facts):
        return Refusal(Code.UNKNOWN_CARGO, "nobody offers it")
    mask = facts.is_approved & facts.is_staying
    for island, sequence in wish.excluded.items():
        row = facts.row(island)
        if row is not None and facts.sequence[row] <= sequence:
            mask[row] = False
    if wish.content_hash:
        mask &= facts.has_content(wish.content_hash)
    if wish.context_over:
        mask &= facts.context > wish.context_over
    if wish.policy is not None:
        mask &= facts.is_allowed(wish.policy)
    if not mask.any():
        return Refusal(Code.NO_ISLAND, "nobody can do it")
    prices = facts.prices(wish.prompt_tokens, wish.output_tokens, wish.job_s_max)
    if wish.price_max_micros is not None:
        paid = mask & (prices <= wish.price_max_micros)
        if not paid.any():
            return Refusal(Code.NO_ISLAND, "too dear", by_price=True, cheapest_micros=int(prices[mask].min()))
        mask = paid
    return mask, prices


def eligible(facts: Columns, wish: Wish, now_s: float) -> tuple[Bools, Ints] | Refusal:
    """Rows that may take the job now, and the prices of all."""
    found = affordable(facts, wish)
    if isinstance(found, Refusal):
        return found
    mask, prices = found
    mask = _prefer(mask, facts.cool_until_s <= now_s) & (facts.slots_left > 0)
    for island, until_s in wish.resting.items():
        row = facts.row(island)
        if row is not None and until_s > now_s:
            mask[row] = False
    if not mask.any():
        return _BUSY
    mask = _prefer(mask, facts.room >= wish.tokens)
    return (_prefer(mask, facts.has_engine(wish.engine)) if wish.engine else mask), prices


def _prefer(mask: Bools, passes: Bools) -> Bools:
    both = mask & passes
    return both if both.any() else mask


class Prices(Placer):
    """What Islands ask, as production reads it from columns; these are kept by somebody else."""

    def __init__(self, facts: Iterable[Columns]) -> None:
        super().__init__(lambda: _EMPTY_BOOK, random.Random(0), clock=float)
        self._columns_of = {each.cargo: each for each in facts}

    def _columns(self, cargo: str) -> Columns:
        return self._columns_of[cargo]


# -- waiting


@dataclass(slots=True, eq=False)
class Waiter(Generic[J]):
    """``rank``: the smallest is served first. ``refusal``: why it waits, None before it was tried. ``is_here``: until served or gone.
    ``is_tried``: only room or asks could make a difference. ``reach``: bits of the rows that could do it and that it could pay, as of that
    version of rows and asks."""

    job: J
    wish: Wish
    rank: float
    since_s: float
    refusal: Refusal | None = None
    is_here: bool = True
    is_tried: bool = False
    reach: int = 0
    version: int = -1

    def look(self, facts: Columns, version: int) -> None:
        self.version = version
        found = affordable(facts, self.wish)
        self.reach = 0 if isinstance(found, Refusal) else _bits(found[0])


class Line(Generic[J]):
    """The jobs that wait for one Cargo.

    Whoever could go to some Islands, but to none of those that have a slot now, is passed over without asking ``choose``, which would say
    that they are busy, and counts as tried. That makes a million jobs bearable and changes nothing; a test shows it.
    """

    def __init__(self) -> None:
        self.waiters: list[Waiter[J]] = []
        self._restless: set[Waiter[J]] = set()  # those that may be served, or sent away, though no slot is free
        self._start = 0

    def __len__(self) -> int:
        return len(self.waiters)

    def __repr__(self) -> str:
        return f"<Line of {len(self)}>"

    def add(self, waiter: Waiter[J]) -> None:
        bisect.insort_right(self.waiters, waiter, key=lambda other: other.rank)
        self._note(waiter)

    def leave(self, waiter: Waiter[J]) -> None:
        self.waiters.remove(waiter)
        self._restless.discard(waiter)
        waiter.is_here = False

    def clear(self) -> None:
        for waiter in list(self.waiters):
            self.leave(waiter)

    def _note(self, waiter: Waiter[J]) -> None:
        waiter.is_tried = waiter.refusal is not None and is_full(waiter.refusal)
        if waiter.is_tried:
            self._restless.discard(waiter)
        else:
            self._restless.add(waiter)

    def settle(
        self, facts: Columns, version: int, take: Callable[[Waiter[J]], Refusal | None]
    ) -> list[tuple[Waiter[J], Refusal]]:
        """Serves in order whom ``take`` gives a place. Gives those whom all Islands are too dear for by now; they stay in the line.
        ``version``: another one whenever rows or asks are others."""
        refused: list[tuple[Waiter[J], Refusal]] = []
        vain: dict[object, Refusal] = {}
        passed, free = 0, _free(facts)
        order = self.waiters[self._start :] + self.waiters[: self._start]
        for waiter in order if free else [each for each in order if each in self._restless]:
            if waiter.version != version and free:
                waiter.look(facts, version)
            if waiter.is_tried and waiter.reach and not free & waiter.reach:
                waiter.refusal = _BUSY
                passed += 1
            else:
                kind = _kind(waiter.wish)
                outcome = vain.get(kind) or take(waiter)
                if outcome is None:
                    self.leave(waiter)
                    free = _free(facts)
                    continue
                waiter.refusal = outcome
                self._note(waiter)
                vain[kind if kind is not None else waiter] = outcome
                if outcome.by_price:
                    refused.append((waiter, outcome))
            if len(vain) + passed >= SETTLE_TRIES_MAX:
                self._start = self.waiters.index(waiter) + 1
                return refused
        self._start = 0
        return refused


def _free(facts: Columns) -> int:
    """Bits of the rows with a free slot."""
    return _bits((facts.slots_left > 0) & facts.is_staying & facts.is_approved)


def _bits(mask: Bools) -> int:
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


def is_full(refusal: Refusal) -> bool:
    """Whether room, or asks, may become what the job needs; unlike Islands that would have to come."""
    return refusal.by_price or (refusal.code is Code.NO_CAPACITY and not refusal.is_lasting)


def _kind(wish: Wish) -> Any:
    """Wishes of one kind share a refusal; None where a wish is like no other."""
    if wish.excluded or wish.resting:
        return None
    price = (wish.price_max_micros, wish.prompt_tokens, wish.output_tokens, wish.job_s_max)
    return (wish.content_hash, wish.context_over, wish.island, wish.policy, price)
