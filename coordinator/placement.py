"""Keeps count of the jobs that this Coordinator has open on Islands, and lets jobs wait for room.

Theory of operation. ``matching.choose`` decides; this shell gives it facts and remembers what it decided. An ad says how busy an Island
was when it was made, our own jobs of then included; so at each new ad our own count is noted, and what the ad shows beyond that count is
the work of others. Busy now = that of others + our own now.

Jobs that find all Islands full wait in order, for each Cargo. Whatever may have made room (a job ended, an ad came, a rest is over)
settles the queue: the first is served first, and a newcomer goes behind those who wait.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import trio

from coordinator.matching import Candidate, Choice, Refusal, Wish, choose
from coordinator.pipelines import Pipelines
from protocol import limits
from protocol.ads import Ad, CargoOffer
from protocol.book import Book, Entry
from protocol.errors import Code, Refused


@dataclass(slots=True)
class _Own:
    """Our own open jobs of one Cargo on one Island, now and when its newest ad was heard."""

    jobs: int = 0
    kv_tokens: int = 0
    sequence: int = 0
    jobs_at_ad: int = 0
    kv_at_ad: int = 0


@dataclass(slots=True)
class _Waiter:
    wish: Wish
    ready: trio.Event = field(default_factory=trio.Event)
    placement: Placement | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """A place on an Island, taken until it is released."""

    choice: Choice
    tokens: int

    @property
    def candidate(self) -> Candidate:
        return self.choice.candidate

    @property
    def island(self) -> str:
        return self.choice.candidate.island


class Placer:
    """Takes places on Islands. All calls come from one trio thread; nothing here blocks but ``place``."""

    def __init__(
        self,
        book: Callable[[], Book],
        rng: random.Random,
        clock: Callable[[], float] = trio.current_time,
        pipelines: Pipelines | None = None,
    ) -> None:
        """``pipelines``: of models that no Island offers whole."""
        self._book, self._rng, self._clock, self._pipelines = book, rng, clock, pipelines
        self._entries: Mapping[str, Entry] = {}
        self._offers: dict[str, dict[str, tuple[Ad, CargoOffer]]] = {}
        self._own: dict[tuple[str, str], _Own] = {}
        self._queues: dict[str, deque[_Waiter]] = {}
        self._last_offered_s: dict[str, float] = {}
        self.open_jobs = 0

    def __repr__(self) -> str:
        return f"<Placer {self.open_jobs} jobs open, {self.waiting} waiting, {len(self._offers)} Cargos>"

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

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
        for name, offers in self._offers.items():
            boots = [ad.boot for ad, _ in offers.values() if not ad.draining]
            if boots:
                found[name] = min(boots) // 1000
        for name in self._pipelines.names() if self._pipelines is not None else ():
            found.setdefault(name, 0)
        return found

    async def place(self, wish: Wish, capacity_wait_s: float, island_wait_s: float) -> Placement:
        """A place on the best Island.

        Waits up to ``capacity_wait_s`` where Islands are full, up to ``island_wait_s`` where none is left that could do it (one may
        come back). Raises Refused with UNKNOWN_CARGO, NO_CAPACITY or NO_ISLAND.
        """
        queue = self._queues.get(wish.cargo)
        outcome = self._take(wish) if not queue else None
        if isinstance(outcome, Placement):
            return outcome
        if outcome is not None and outcome.code is Code.UNKNOWN_CARGO:
            raise Refused(outcome.code, outcome.message)
        if self.waiting >= limits.WAITING_JOBS_MAX:
            raise Refused(Code.NO_CAPACITY, f"{self.waiting} jobs are waiting for an Island already")
        return await self._wait(_Waiter(wish, refusal=outcome), capacity_wait_s, island_wait_s)

    def release(self, placement: Placement) -> None:
        """The job there has ended; gives its place to whoever waits for it."""
        cargo = placement.candidate.offer.name
        own = self._own[placement.island, cargo]
        own.jobs -= 1
        own.kv_tokens -= placement.tokens
        self.open_jobs -= 1
        if not own.jobs and placement.island not in self._entries:
            del self._own[placement.island, cargo]
        self._settle(cargo)

    def book_changed(self) -> None:
        """Ads came or went."""
        self._refresh()
        for cargo in list(self._queues):
            self._settle(cargo)

    async def _wait(self, waiter: _Waiter, capacity_wait_s: float, island_wait_s: float) -> Placement:
        queue = self._queues.setdefault(waiter.wish.cargo, deque())
        queue.append(waiter)
        started = self._clock()
        try:
            self._settle(waiter.wish.cargo)
            while not waiter.ready.is_set():
                patience_s = capacity_wait_s if _is_full(waiter.refusal) else island_wait_s
                if self._pipelines is not None and self._pipelines.is_working(waiter.wish.cargo):
                    patience_s = limits.SHARD_LOAD_S  # the job's own time limit comes first
                left_s = started + patience_s - self._clock()
                if left_s <= 0:
                    break
                # the timer is for rests that run out; everything else settles the queue itself
                with trio.move_on_after(min(left_s, limits.PLACE_RETRY_S)):
                    await waiter.ready.wait()
                if not waiter.ready.is_set():
                    self._settle(waiter.wish.cargo)
        except BaseException:
            if waiter.placement is not None:
                self.release(waiter.placement)
            raise
        finally:
            if not waiter.ready.is_set():
                queue.remove(waiter)
            if not queue and self._queues.get(waiter.wish.cargo) is queue:
                del self._queues[waiter.wish.cargo]
        if waiter.placement is not None:
            return waiter.placement
        refusal = waiter.refusal or Refusal(Code.NO_CAPACITY, "no Island had room in time")
        raise Refused(refusal.code, refusal.message)

    def _settle(self, cargo: str) -> None:
        """Serves those who wait, in order. Equal wishes are tried once: where one finds no room, the next would not either."""
        queue = self._queues.get(cargo)
        if not queue:
            return
        plain_refusal: Refusal | None = None
        for waiter in list(queue):
            plain = _is_plain(waiter.wish)
            outcome = plain_refusal if plain and plain_refusal is not None else self._take(waiter.wish)
            if isinstance(outcome, Placement):
                waiter.placement = outcome
                queue.remove(waiter)
                waiter.ready.set()
                continue
            waiter.refusal = outcome
            if plain:
                plain_refusal = outcome

    def _take(self, wish: Wish) -> Placement | Refusal:
        facts = self._facts(wish)
        if not facts and self._pipelines is not None:
            candidate = self._pipelines.candidate(wish.cargo)
            if candidate is None:
                wanted = self._pipelines.want(wish.cargo, wish.tokens)
                if wanted is not None:
                    return wanted
            else:
                facts = [self._with_own(candidate)]
        outcome = choose(facts, wish, self._clock(), self._rng)
        if isinstance(outcome, Refusal):
            return self._soften(outcome, wish.cargo)
        candidate = outcome.candidate
        own = self._own.setdefault((candidate.island, wish.cargo), _Own(sequence=candidate.sequence))
        own.jobs += 1
        own.kv_tokens += wish.tokens
        self.open_jobs += 1
        return Placement(outcome, wish.tokens)

    def _soften(self, refusal: Refusal, cargo: str) -> Refusal:
        """A Cargo that was offered a moment ago is not unknown: its Island may be on its way back."""
        if refusal.code is Code.UNKNOWN_CARGO:
            last_s = self._last_offered_s.get(cargo)
            if last_s is not None and self._clock() - last_s < limits.CARGO_REMEMBERED_S:
                return Refusal(Code.NO_ISLAND, f"no Island offers the model {cargo!r} at the moment")
        return refusal

    def _facts(self, wish: Wish) -> list[Candidate]:
        self._refresh()
        offers = self._offers.get(wish.cargo, {})
        if len(offers) <= limits.CANDIDATES_MAX:
            return [self._candidate(ad, offer) for ad, offer in offers.values()]
        peers = set(self._rng.sample(list(offers), limits.CANDIDATES_MAX))
        if wish.affinity in offers:
            peers.add(wish.affinity)
        sample = [self._candidate(*offers[peer]) for peer in sorted(peers)]
        if any(c.slots_left > 0 and not c.draining and c.island not in wish.excluded for c in sample):
            return sample
        return [self._candidate(ad, offer) for ad, offer in offers.values()]

    def _candidate(self, ad: Ad, offer: CargoOffer) -> Candidate:
        own = self._own.get((ad.peer, offer.name))
        slots, kv = offer.slots_total - offer.slots_free, offer.kv_tokens_total - offer.kv_tokens_free
        if own is not None:
            slots = max(0, slots - own.jobs_at_ad) + own.jobs
            kv = max(0, kv - own.kv_at_ad) + own.kv_tokens
        return Candidate(ad.peer, ad.boot, ad.sequence, ad.draining, offer, slots, kv)

    def _with_own(self, candidate: Candidate) -> Candidate:
        """A pipeline works for this Coordinator alone, so its own jobs are all there are."""
        own = self._own.get((candidate.island, candidate.offer.name))
        return candidate if own is None else replace(candidate, busy_slots=own.jobs, busy_kv=own.kv_tokens)

    def _refresh(self) -> None:
        """Books are immutable: the same mapping means that nothing has changed."""
        entries = self._book().entries
        if entries is self._entries:
            return
        self._entries = entries
        now_s = self._clock()
        self._last_offered_s.update(dict.fromkeys(self._offers, now_s))
        offers: dict[str, dict[str, tuple[Ad, CargoOffer]]] = {}
        for peer, entry in entries.items():
            for offer in entry.ad.offers:
                offers.setdefault(offer.name, {})[peer] = (entry.ad, offer)
                self._note_ad(entry.ad, offer.name)
        self._offers = offers
        self._own = {key: own for key, own in self._own.items() if own.jobs or key[0] in entries}
        if len(self._last_offered_s) > limits.CARGOS_REMEMBERED_MAX:
            recent = sorted(self._last_offered_s.items(), key=lambda item: item[1])[
                -limits.CARGOS_REMEMBERED_MAX // 2 :
            ]
            self._last_offered_s = dict(recent)

    def _note_ad(self, ad: Ad, cargo: str) -> None:
        own = self._own.get((ad.peer, cargo))
        if own is not None and own.sequence != ad.sequence:
            own.sequence, own.jobs_at_ad, own.kv_at_ad = ad.sequence, own.jobs, own.kv_tokens


def _is_plain(wish: Wish) -> bool:
    return not (wish.excluded or wish.resting or wish.content_hash or wish.context_over)


def _is_full(refusal: Refusal | None) -> bool:
    return refusal is None or (refusal.code is Code.NO_CAPACITY and not refusal.is_lasting)
