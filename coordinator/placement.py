"""Keeps count of the jobs that this Coordinator has open on Islands, and lets jobs wait for room.

Theory of operation. ``matching.choose`` decides; this shell gives it facts and remembers what it decided. Facts are columns, one set a
Cargo, and only what has changed is written: rows of Islands whose entry in the book is another object than before, of which the standing
says something new, or where a job of ours came or went.

An ad says how busy an Island was when it was made, our own jobs of then included; so at each new ad our own count is noted, and what the ad
shows beyond that count is the work of others. Busy now = that of others + our own now.

Jobs that find all Islands full wait in order, for each Cargo: higher priority first, then who came first. Waiting raises priority by
``PRIORITY_PER_WAITED_S``, so a job of priority 0 is passed only by what comes within so many seconds, and the order of two that wait never
changes. Whatever may have made room (a job ended, an ad came, a rest is over, a newcomer joined) settles the queue, first to last. A job
that cannot pay what Islands ask waits like for room, since asks may fall; a caller that wants to know at once passes no patience.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import trio

from coordinator.columns import Candidate, Columns, Known, kv_used, memory_used
from coordinator.crowds import Crowds
from coordinator.matching import Choice, Refusal, Wish, choose
from coordinator.offered import Offered
from coordinator.pipelines import Pipelines
from coordinator.regions import Residency
from coordinator.standing import Standing
from protocol import limits
from protocol.ads import Ad, CargoOffer
from protocol.book import Book, Entry
from protocol.cargo_jobs import TEXT_RUNTIMES
from protocol.errors import Code, Refused
from protocol.prices import Ask

PRIORITY_PER_WAITED_S = 2.0  # the highest priority, 100, passes those of 0 that have waited for less than 50 s
ROUND_TRIPS_READ_S = 5.0
MEASURED_STEP = 0.02  # a measured speed that has moved by less is not worth a new row
_ITS_TURN = "other jobs are before it"
SETTLE_TRIES_MAX = 64  # wishes unlike each other that are tried in vain at a time; the next time begins behind them
SETTLE_ROWS_MAX = 32_000  # Islands that are looked at for them, some 4 ms; each job that ends settles
_SETTLE_TRIES_MIN = 2


class NotPlaced(Refused):
    """No Island took the job; ``refusal`` says more, such as the cheapest price."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code, refusal.message)
        self.refusal = refusal


@dataclass(slots=True)
class _Own:
    """Our own open jobs of one Cargo on one Island, now and when its newest ad was heard."""

    jobs: int = 0
    kv_tokens: int = 0
    sequence: int = 0
    jobs_at_ad: int = 0
    kv_at_ad: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    """``rank``: the smallest is served first."""

    wish: Wish
    rank: float
    ready: trio.Event = field(default_factory=trio.Event)
    placement: Placement | None = None
    refusal: Refusal | None = None


@dataclass(slots=True, eq=False)
class _Queue:
    """``waiters``: by rank. ``start``: where the next settling begins, 0 unless the last one broke off."""

    waiters: list[_Waiter] = field(default_factory=list)
    start: int = 0
    settled_s: float = 0.0

    def add(self, waiter: _Waiter) -> None:
        bisect.insort_right(self.waiters, waiter, key=lambda other: other.rank)

    def in_turn(self) -> list[_Waiter]:
        return self.waiters[self.start :] + self.waiters[: self.start]


@dataclass(frozen=True, slots=True)
class Placement:
    """A place on an Island, taken until it is released."""

    choice: Choice
    tokens: int
    group: str = ""

    @property
    def candidate(self) -> Candidate:
        return self.choice.candidate

    @property
    def island(self) -> str:
        return self.choice.candidate.island


@dataclass(frozen=True, slots=True)
class PriceRange:
    """What Islands ask for one choice of a job, in micro-credits, None where there are none; and the slots of all of them."""

    cheapest: int | None = None
    median: int | None = None
    slots: int = 0


class Placing(Protocol):
    """What a dispatcher asks of whoever places its jobs. ``standing`` hears how Islands did."""

    standing: Standing

    @property
    def waiting(self) -> int: ...

    async def place(self, wish: Wish, capacity_wait_s: float, island_wait_s: float) -> Placement:
        """Raises Refused."""
        ...

    def release(self, placement: Placement) -> None: ...

    def newest_sequence(self, island: str) -> int: ...

    def region_of(self, island: str) -> str: ...


class Placer:
    """Takes places on Islands. All calls come from one trio thread; nothing here blocks but ``place``."""

    def __init__(
        self,
        book: Callable[[], Book],
        rng: random.Random,
        clock: Callable[[], float] = trio.current_time,
        pipelines: Pipelines | None = None,
        standing: Standing | None = None,
        round_trips_s: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """``pipelines``: of models that no Island offers whole. ``standing``: what was seen of Islands, by the same ``clock``.
        ``round_trips_s``: to Islands, as measured now; read every ROUND_TRIPS_READ_S."""
        self._book, self._rng, self._clock, self._pipelines = book, rng, clock, pipelines
        self.standing = standing if standing is not None else Standing()
        self._round_trips_s = round_trips_s
        self._entries: Mapping[str, Entry] = {}
        self._facts: dict[str, Columns] = {}
        self._own: dict[tuple[str, str], _Own] = {}
        self._queues: dict[str, _Queue] = {}
        self._crowds = Crowds()
        self._last_offered_s: dict[str, float] = {}
        self._trips_read_s = float("-inf")
        self.offered = Offered(self._columns)
        self.open_jobs = 0

    def __repr__(self) -> str:
        return f"<Placer {self.open_jobs} jobs open, {self.waiting} waiting, {len(self._facts)} Cargos>"

    @property
    def waiting(self) -> int:
        return sum(len(queue.waiters) for queue in self._queues.values())

    @property
    def islands_seen(self) -> int:
        """Islands in the book when it was last looked at. A plain number, for any thread."""
        return len(self._entries)

    def newest_sequence(self, island: str) -> int:
        """Of the Island's newest ad; 0 where it is not in the book."""
        entry = self._book().entries.get(island)
        return entry.ad.sequence if entry is not None else 0

    def islands(self) -> int:
        """Islands in the book."""
        self._refresh()
        return len(self._entries)

    def cargos(self) -> dict[str, int]:
        """Name of each Cargo that somebody offers -> Unix time in seconds since when, as far as the ads tell."""
        self._refresh()
        found: dict[str, int] = {}
        for name, facts in self._facts.items():
            boots = facts.boot[facts.is_staying & facts.is_approved]
            if len(boots):
                found[name] = int(boots.min()) // 1000
        for name in self._pipelines.names() if self._pipelines is not None else ():
            found.setdefault(name, 0)
        for name in self.offered.aliases():
            other = self.offered.name(name)
            if other in found:
                found.setdefault(name, found[other])
        return found

    def writes_text(self, cargo: str) -> bool | None:
        """Whether a Cargo writes texts, and takes no JSON object; None where nobody offers it."""
        self._refresh()
        cargo = self.offered.name(cargo)
        facts = self._facts.get(cargo)
        runtime = facts.runtime if facts is not None else ""
        if runtime:
            return runtime in TEXT_RUNTIMES
        return True if self._pipelines is not None and cargo in self._pipelines.names() else None

    def asks(self, cargo: str) -> list[tuple[str, Ask, float, int, int]]:
        """The order book of a Cargo: Island, ask, tokens/s that its ad says (0.0 unknown), free slots, all slots. Islands that drain or
        are not approved are left out; a pipeline stands under the name of its last stage."""
        return self._columns(self.offered.name(cargo)).order_book()

    def region_of(self, island: str) -> str:
        """As its ad says; empty where it says none or is not in the book."""
        entry = self._book().entries.get(island)
        return entry.ad.region if entry is not None else ""

    def content_hashes(self, cargo: str) -> set[str]:
        """Of all that is offered under a name now, or under the one that it stands for, by Islands that stay and are approved."""
        return self.offered.content_hashes(cargo)

    def price_range(
        self, cargo: str, prompt_tokens: int, output_tokens: int, job_s_max: float, content_hash: str = ""
    ) -> PriceRange:
        """What Islands ask for such a job now; for this version, or for the one that it would get. The cheapest is one with a free slot,
        where there is one: a bid that reaches only an Island that is full would wait beside idle ones."""
        wish = self.offered.pinned(Wish(cargo, 0, content_hash=content_hash), self._clock())
        if isinstance(wish, Refusal):
            return PriceRange()
        facts = self._columns(wish.cargo)
        chosen = facts.is_staying & facts.is_approved
        if wish.content_hash:
            chosen = chosen & facts.has_content(wish.content_hash)
        if not chosen.any():
            return PriceRange()
        prices = facts.prices(prompt_tokens, output_tokens, job_s_max)
        free = chosen & (facts.slots_left > 0)
        cheapest = int(prices[free if free.any() else chosen].min())
        ordered = np.sort(prices[chosen])
        slots = int(facts.slots_total[chosen].sum()) if content_hash else self.slots(cargo)
        return PriceRange(cheapest, int(ordered[(len(ordered) - 1) // 2]), slots)

    def slots(self, cargo: str, policy: Residency | None = None) -> int:
        """Jobs of a Cargo that run at once, at most, on the Islands that offer it now, free or busy; 0 where there are none."""
        return self.offered.slots(cargo, policy)

    def largest_context(self, cargo: str, content_hash: str) -> int:
        """Tokens that the roomiest Island with this version takes when it is idle."""
        return self._columns(self.offered.name(cargo, content_hash)).largest_context(content_hash)

    def addresses_of(self, island: str) -> tuple[str, ...]:
        """Where it is reached, as its ad says; none where it is not in the book."""
        entry = self._book().entries.get(island)
        return entry.ad.addresses if entry is not None else ()

    def remember_offered(self, cargos: Iterable[str]) -> None:
        """Cargos that were served a while ago, before this Coordinator started: their Islands may be on their way here."""
        names = (name for cargo in cargos for name in self.offered.names(cargo))
        self._last_offered_s.update(dict.fromkeys(names, self._clock()))

    def queued(self, cargo: str) -> int:
        """Jobs that wait for an Island with this Cargo, or with the one that its name stands for."""
        return sum(len(self._queues[name].waiters) for name in self.offered.names(cargo) if name in self._queues)

    def waiting_bids(self, cargo: str) -> list[int]:
        """What those who wait would pay at most, micro-credits; first in turn first, without those who would pay anything."""
        limits_micros = (waiter.wish.price_max_micros for waiter in self._waiters(cargo))
        return [micros for micros in limits_micros if micros is not None]

    def why_waiting(self, jobs: Mapping[str, str]) -> dict[str, str]:
        """Of these jobs (id -> Cargo) those that wait here: id -> for what, in words for their Consumers."""
        found: dict[str, str] = {}
        for cargo in set(jobs.values()):
            for waiter in self._waiters(cargo):
                if waiter.wish.job_id in jobs:
                    found[waiter.wish.job_id] = waiter.refusal.message if waiter.refusal is not None else _ITS_TURN
        return found

    def _waiters(self, cargo: str) -> list[_Waiter]:
        """Of each queue those first in turn come first."""
        queues = (self._queues[name] for name in self.offered.names(cargo) if name in self._queues)
        return [waiter for queue in queues for waiter in queue.waiters]

    def preview(self, wish: Wish, price_max_micros: int | None) -> Choice | Refusal:
        """What ``place`` would decide at this price if nobody waited; nothing is taken. For quotes."""
        pinned = self.offered.pinned(replace(wish, price_max_micros=price_max_micros), self._clock())
        if isinstance(pinned, Refusal):
            return pinned
        wish = pinned
        return self._soften(choose(self._columns(wish.cargo), wish, self._clock(), self._rng), wish.cargo)

    async def place(self, wish: Wish, capacity_wait_s: float, island_wait_s: float) -> Placement:
        """A place on the best Island.

        Waits up to ``capacity_wait_s`` where Islands are full, or want more than a job may cost that waits for that; up to
        ``island_wait_s`` where none is left that could do it (one may come back).

        Raises NotPlaced, a Refused, with UNKNOWN_CARGO, NO_CAPACITY or NO_ISLAND.
        """
        pinned = self.offered.pinned(wish, self._clock())
        if isinstance(pinned, Refusal):
            raise NotPlaced(pinned)
        wish = pinned
        waiter = _Waiter(wish, self._clock() * PRIORITY_PER_WAITED_S - wish.priority)
        queue = self._queues.get(wish.cargo)
        if queue is None or not queue.waiters:
            outcome = self._take(wish)
            if isinstance(outcome, Placement):
                return outcome
            if outcome.code is Code.UNKNOWN_CARGO:
                raise NotPlaced(outcome)
            waiter.refusal = outcome
        if self.waiting >= limits.WAITING_JOBS_MAX:
            raise NotPlaced(Refusal(Code.NO_CAPACITY, f"{self.waiting} jobs are waiting for an Island already"))
        return await self._wait(waiter, capacity_wait_s, island_wait_s)

    def release(self, placement: Placement) -> None:
        """The job there has ended; gives its place to whoever waits for it."""
        cargo = placement.candidate.offer.name
        self._count(placement.island, cargo, -1, -placement.tokens)
        self._crowds.left(placement.group, placement.island)
        self._settle(cargo)

    def book_changed(self) -> None:
        """Ads came or went."""
        self._refresh()
        for cargo in list(self._queues):
            self._settle(cargo)

    # -- waiting

    async def _wait(self, waiter: _Waiter, capacity_wait_s: float, island_wait_s: float) -> Placement:
        cargo = waiter.wish.cargo
        queue = self._queues.setdefault(cargo, _Queue())
        queue.add(waiter)
        started_s = self._clock()
        try:
            self._settle(cargo)
            while not waiter.ready.is_set():
                patience_s = capacity_wait_s if _is_full(waiter.refusal) else island_wait_s
                if self._pipelines is not None and self._pipelines.is_working(cargo):
                    patience_s = limits.SHARD_LOAD_S  # the job's own time limit comes first
                if waiter.refusal is not None and waiter.refusal.by_price and not waiter.wish.waits_for_price:
                    patience_s = 0.0
                left_s = started_s + patience_s - self._clock()
                if left_s <= 0:
                    break
                # the timer is for rests that run out; everything else settles the queue itself
                with trio.move_on_after(min(left_s, limits.PLACE_RETRY_S)):
                    await waiter.ready.wait()
                if not waiter.ready.is_set() and self._is_due(queue, left_s):
                    self._settle(cargo)
        except BaseException:
            if waiter.placement is not None:
                self.release(waiter.placement)
            raise
        finally:
            if not waiter.ready.is_set():
                queue.waiters.remove(waiter)
            if not queue.waiters and self._queues.get(cargo) is queue:
                del self._queues[cargo]
        if waiter.placement is not None:
            return waiter.placement
        raise NotPlaced(waiter.refusal or Refusal(Code.NO_CAPACITY, "no Island had room in time"))

    def _is_due(self, queue: _Queue, left_s: float) -> bool:
        """One timer settles for all who wait; half a period, since timers are not exact. Whoever has to go looks once more."""
        return left_s <= limits.PLACE_RETRY_S or self._clock() - queue.settled_s >= limits.PLACE_RETRY_S / 2

    def _settle(self, cargo: str) -> None:
        """Serves those who wait, in order. Equal wishes are tried once: where one finds no room, the next would not either."""
        queue = self._queues.get(cargo)
        if queue is None or not queue.waiters:
            return
        queue.settled_s = self._clock()
        self._refresh()
        vain: dict[object, Refusal] = {}
        tries_max = self._tries_max(cargo)
        has_room = self._has_room(cargo)
        for waiter in queue.in_turn():
            if not has_room and waiter.refusal is not None and _is_full(waiter.refusal):
                continue
            kind = _kind(waiter.wish)
            outcome = vain.get(kind) or self._take(waiter.wish)
            if isinstance(outcome, Placement):
                self._serve(queue, waiter, outcome)
                has_room = self._has_room(cargo)
                continue
            waiter.refusal = outcome
            vain[kind if kind is not None else waiter] = outcome
            if len(vain) >= tries_max:
                queue.start = queue.waiters.index(waiter) + 1
                return
        queue.start = 0

    def _tries_max(self, cargo: str) -> int:
        """So that a line of hopeless bids costs the jobs that run no more than a moment, however many Islands there are."""
        facts = self._facts.get(cargo)
        islands = len(facts) if facts is not None else 0
        return min(SETTLE_TRIES_MAX, max(_SETTLE_TRIES_MIN, SETTLE_ROWS_MAX // max(1, islands)))

    def _serve(self, queue: _Queue, waiter: _Waiter, placement: Placement) -> None:
        waiter.placement = placement
        queue.waiters.remove(waiter)
        waiter.ready.set()

    def _has_room(self, cargo: str) -> bool:
        """Whether trying makes sense: some slot is free, or it is not a matter of slots."""
        facts = self._facts.get(cargo)
        return facts is None or bool(((facts.slots_left > 0) & facts.is_staying & facts.is_approved).any())

    # -- taking

    def _take(self, wish: Wish) -> Placement | Refusal:
        facts = self._columns(wish.cargo)
        if not len(facts) and self._pipelines is not None:
            wanted = self._pipelines.want(wish.cargo, wish.tokens)
            if wanted is not None:
                return wanted
        wish = replace(wish, crowd=self._crowds.of(wish.group)) if wish.group else wish
        outcome = self._soften(choose(facts, wish, self._clock(), self._rng), wish.cargo)
        if isinstance(outcome, Refusal):
            return outcome
        candidate = outcome.candidate
        self._own.setdefault((candidate.island, wish.cargo), _Own(sequence=candidate.sequence))
        self._count(candidate.island, wish.cargo, 1, wish.tokens)
        self._crowds.came(wish.group, candidate.island)
        return Placement(outcome, wish.tokens, wish.group)

    def _columns(self, cargo: str) -> Columns:
        """The facts of a Cargo as they are now; of the pipeline where no Island offers it whole."""
        self._refresh()
        facts = self._facts.get(cargo)
        if facts is not None:
            return facts
        candidate = self._pipelines.candidate(cargo) if self._pipelines is not None else None
        return Columns.of(cargo, [self._with_own(candidate)] if candidate is not None else [])

    def _with_own(self, candidate: Candidate) -> Candidate:
        """A pipeline works for this Coordinator alone, so its own jobs are all there are."""
        own = self._own.get((candidate.island, candidate.offer.name))
        return candidate if own is None else replace(candidate, busy_slots=own.jobs, busy_kv=own.kv_tokens)

    def _soften(self, outcome: Choice | Refusal, cargo: str) -> Choice | Refusal:
        """A Cargo that was offered a moment ago is not unknown: its Island may be on its way back."""
        if isinstance(outcome, Refusal) and outcome.code is Code.UNKNOWN_CARGO:
            last_s = self._last_offered_s.get(cargo)
            if last_s is not None and self._clock() - last_s < limits.CARGO_REMEMBERED_S:
                return Refusal(Code.NO_ISLAND, f"no Island offers the model {cargo!r} at the moment")
        return outcome

    def _count(self, island: str, cargo: str, jobs: int, kv_tokens: int) -> None:
        """So many more of our own jobs, or fewer."""
        self.open_jobs += jobs
        own = self._own[island, cargo]
        own.jobs += jobs
        own.kv_tokens += kv_tokens
        facts = self._facts.get(cargo)
        row = facts.row(island) if facts is not None else None
        if facts is not None and row is not None:
            facts.set_busy(island, *self._busy(island, facts.candidate(row).offer))
        elif not own.jobs:
            del self._own[island, cargo]

    def _busy(self, island: str, offer: CargoOffer) -> tuple[int, int]:
        """Slots and KV tokens in use."""
        own = self._own.get((island, offer.name))
        slots, kv = offer.slots_total - offer.slots_free, offer.kv_tokens_total - offer.kv_tokens_free
        if own is None:
            return slots, kv
        return max(0, slots - own.jobs_at_ad) + own.jobs, max(0, kv - own.kv_at_ad) + own.kv_tokens

    # -- facts

    def _refresh(self) -> None:
        """Books are immutable: the same mapping means that nothing has changed, and so does the same entry."""
        entries = self._book().entries
        if entries is not self._entries:
            self._read_book(entries)
        for peer in self.standing.take_changed():
            self._read_standing(peer)
        if self._clock() - self._trips_read_s >= ROUND_TRIPS_READ_S:
            self._read_round_trips()

    def _read_book(self, entries: Mapping[str, Entry]) -> None:
        before, self._entries = self._entries, entries
        self._remember_offered()
        changed = [entry.ad for peer, entry in entries.items() if before.get(peer) is not entry]
        if len(before) + sum(ad.peer not in before for ad in changed) > len(entries):
            for peer, entry in before.items():
                if peer not in entries:
                    self._drop_offers(entry.ad, None)
        for ad in changed:
            if ad.peer in before:
                self._drop_offers(before[ad.peer].ad, ad)
            used = memory_used(ad)
            for offer in ad.offers:
                self._put(ad, offer, used)

    def _drop_offers(self, old: Ad, new: Ad | None) -> None:
        """Those that an Island made before and does not make now."""
        for offer in old.offers:
            if new is None or new.offer(offer.name) is None:
                self._drop(old.peer, offer.name)

    def _put(self, ad: Ad, offer: CargoOffer, memory_used: int) -> None:
        own = self._own.get((ad.peer, offer.name))
        if own is not None and own.sequence != ad.sequence:
            own.sequence, own.jobs_at_ad, own.kv_at_ad = ad.sequence, own.jobs, own.kv_tokens
        facts = self._facts.get(offer.name)
        if facts is None:
            facts = self._facts[offer.name] = Columns(offer.name)
        candidate = Candidate(ad.peer, ad.boot, ad.sequence, ad.draining, offer, *self._busy(ad.peer, offer))
        facts.put(candidate, self._known(ad, offer, memory_used))

    def _drop(self, island: str, cargo: str) -> None:
        facts = self._facts[cargo]
        facts.drop(island)
        if not len(facts):
            del self._facts[cargo]
        own = self._own.get((island, cargo))
        if own is not None and not own.jobs:
            del self._own[island, cargo]

    def _known(self, ad: Ad, offer: CargoOffer, memory_used: int, measured_before: float = 0.0) -> Known:
        standing = self.standing
        measured = standing.tokens_per_s(ad.peer, offer.name, self._clock())
        if abs(measured - measured_before) <= MEASURED_STEP * measured_before:
            measured = measured_before
        return Known(
            region=ad.region,
            memory_offered_bytes=ad.memory_offered_bytes,
            memory_other_bytes=memory_used - kv_used(offer),
            measured_tokens_per_s=measured,
            cool_until_s=standing.cool_until_s(ad.peer),
            karma_milli=standing.karma_milli(ad.peer),
            is_approved=standing.is_approved(ad.peer),
        )

    def _read_standing(self, peer: str) -> None:
        entry = self._entries.get(peer)
        if entry is None:
            return
        used = memory_used(entry.ad)
        for offer in entry.ad.offers:
            facts = self._facts[offer.name]
            before = facts.known(facts.row_of(peer))
            known = self._known(entry.ad, offer, used, before.measured_tokens_per_s)
            if known != before:
                facts.know(peer, known)

    def _read_round_trips(self) -> None:
        self._trips_read_s = self._clock()
        trips_s = self._round_trips_s()
        for facts in self._facts.values():
            facts.set_round_trips(trips_s)

    def _remember_offered(self) -> None:
        """Of the Cargos that have been on offer until now."""
        self._last_offered_s.update(dict.fromkeys(self._facts, self._clock()))
        if len(self._last_offered_s) > limits.CARGOS_REMEMBERED_MAX:
            by_time = sorted(self._last_offered_s.items(), key=lambda item: item[1])
            self._last_offered_s = dict(by_time[-limits.CARGOS_REMEMBERED_MAX // 2 :])


def _kind(wish: Wish) -> object | None:
    """Wishes of one kind share a refusal; None where a wish is like no other."""
    if wish.excluded or wish.resting:
        return None
    price = (wish.price_max_micros, wish.prompt_tokens, wish.output_tokens, wish.job_s_max)
    return (wish.content_hash, wish.context_over, wish.island, wish.policy, price)


def _is_full(refusal: Refusal | None) -> bool:
    """Whether room, or asks, may become what the job needs; unlike Islands that would have to come."""
    return refusal is None or refusal.by_price or (refusal.code is Code.NO_CAPACITY and not refusal.is_lasting)
