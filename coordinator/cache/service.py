"""The cache at work, in front of the desk: whoever runs orders asks here first.

Theory of operation. An order says under which key its answer would stand (asking.py). Where one stands there that may be used, it is told
again and the desk hears nothing of it: no bid, no hold, no Island, and a row in the books only where somebody looks for the job later.
Else one of all equal orders of an account goes on, and the others wait for it (*one flight*): ten equal questions at once cost one job. The
one that goes on looks for a question that means the same: the index finds some that share words, the guards throw out what must not stand
in, and only then the vectors rank what is left. Then the desk has it, and tells ``keep`` what was paid for.

Rules. An answer counts only while the content hash that gave it would be chosen under that name, so a Cargo that was suspended, revoked or
replaced is asked as if there were no cache. Nothing is kept that was cut off. Whoever waits for another one's job gets a job of his own
where that fails. A policy is looked at when an answer is kept and when it is used. Where anything of the cache does not work, the order
goes to the desk.

Runs on trio; ``serve`` owns what goes on in the background.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import trio

from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.jobs import Job
from coordinator.cache.asking import CacheAsk
from coordinator.cache.budget import ErrorBudget
from coordinator.cache.meaning import Embedding, Meaning
from coordinator.cache.policy import CacheConfig, policy_of, scopes_of
from coordinator.cache.purge import POLL_S, News, order_purge, read_news
from coordinator.cache.shadow import Hit as CheckedHit
from coordinator.cache.shadow import Shadow
from coordinator.cache.statistics import CacheStatistics, Counts
from coordinator.cache.table import AnswerTable, Entry
from coordinator.cache.versions import Cargos, Versions
from coordinator.desk import Desk, retold
from coordinator.jobs import CacheHit, CachePassed, CacheWaits, Emit, Event, Text, collected
from coordinator.orders import Order
from coordinator.transcript import Transcript, replay
from protocol.cargos import CachePolicy
from protocol.generation import FinishReason

__all__ = ["AnswerCache", "Cargos", "Embedding", "key_of"]

log = logging.getLogger(__name__)

KEY_BYTES = 32
WARM_UP_CHECKS = 20
WARM_UP_SHARE = 0.5  # of a Cargo's semantic hits that are checked until it has had so many checks
HANDOVERS_MAX = 2  # so many may fail before all who wait go on by themselves
SMALL_BYTES = 64 * 1024  # larger answers are read in a thread
_Name = tuple[str, bytes, bool]  # of a flight: account, key, and whether it is private


class _Outcome(Enum):
    FAILED = "failed"
    KEPT = "kept"
    UNKEPT = "unkept"  # it ended well, and nothing was kept


@dataclass(frozen=True, slots=True)
class _Hit:
    strategy: str
    entry: Entry


@dataclass(slots=True)
class _Flight:
    """An order that others wait for. ``hit``: what was found for it."""

    ended: trio.Event = field(default_factory=trio.Event)
    outcome: _Outcome = _Outcome.FAILED
    hit: _Hit | None = None


class AnswerCache:
    """``clock`` in seconds, only forward; ``rng`` chooses the hits that are checked; ``salt(account)``: its cache salt."""

    def __init__(
        self,
        config: CacheConfig,
        desk: Desk,
        books: Books,
        cargos: Cargos,
        embedding: Embedding | None,
        salt: Callable[[str], bytes],
        clock: Callable[[], float],
        rng: random.Random,
        new_id: Callable[[], str],
    ) -> None:
        self.config, self._desk, self._books, self._clock, self._rng = config, desk, books, clock, rng
        self.statistics = CacheStatistics()
        self._table = AnswerTable(config.entries_max, config.bytes_max)
        self._budget = ErrorBudget(config.error_budget, config.confidence)
        self._versions = Versions(cargos, clock)
        self._meaning = Meaning(embedding, self._table, self._budget, self._versions, clock)
        self._shadow = Shadow(desk, salt, new_id, self._meaning.embed, self._note_check)
        self._flights: dict[_Name, _Flight] = {}
        self._said: dict[str, tuple[CachePolicy, int]] = {}
        self._seq: int | None = None
        self._own: set[int] = set()  # purges that we have ordered ourselves
        self._lock = trio.Lock()
        self._nursery: trio.Nursery | None = None

    def __repr__(self) -> str:
        return f"<AnswerCache {len(self._table)} answers, {self.statistics.total.hits} hits, semantic: {self.semantic_state}>"

    # ---- running orders, as the desk does

    async def run(self, order: Order, emit: Emit) -> None:
        """Raises what Desk.run raises."""
        ask = order.cache
        if ask is None:
            self.statistics.bypassed += 1
            await self._desk.run(order, emit)
            return
        policy = self.policy_of(ask)
        if not policy.enabled:
            self.statistics.bypassed += 1
            await emit(CachePassed())
            await self._desk.run(replace(order, cache=None), emit)
            return
        if (events := await self._first_try(order)) is not None:
            await _tell(events, emit)
        elif not ask.reads:
            self.statistics.bypassed += 1
            await self._desk.run(order, emit)
        else:
            await self._fly(order, ask, policy, emit)

    async def collect(self, order: Order) -> list[Event]:
        """All events at once, for answers that are not streamed."""
        return await collected(self.run, order)

    async def look(self, order: Order) -> list[Event] | None:
        """The answer that is kept for a job that is being submitted; None where there is none, or it was submitted before. Raises
        BooksUnavailable, BooksRefused."""
        ask = order.cache
        policy = self.policy_of(ask) if ask is not None else None
        if ask is None or policy is None or not (policy.enabled and ask.reads):
            self.statistics.bypassed += 1
            return None
        if (order.is_retry or order.idempotency_key) and await self._desk.first_try(order, waits=False) is not None:
            return None
        hit = self._exact(ask, policy) or await self._semantic(ask, policy)
        if hit is None:
            self._missed(ask)
            return None
        self._count(hit, ask)
        self._check_some(hit, order)
        return await self._events(hit, order.spec.job_id)

    async def _first_try(self, order: Order) -> Sequence[Event] | None:
        """What the same request came to before, where it says that it comes again."""
        if not (order.is_retry or order.idempotency_key):
            return None
        opened = await self._desk.first_try(order)
        return None if opened is None or opened.earlier is None else retold(opened)

    async def _fly(self, order: Order, ask: CacheAsk, policy: CachePolicy, emit: Emit) -> None:
        """Waits for an equal order that is under way, or goes on itself."""
        name, failures, waited = _name(ask), 0, False
        while True:
            hit = self._exact(ask, policy)
            flight = self._flights.get(name)
            if hit is not None or flight is None:
                break
            if not waited:
                self.statistics.waited, waited = self.statistics.waited + 1, True
                await emit(CacheWaits())
                continue  # the flight may have ended meanwhile
            await flight.ended.wait()
            if flight.hit is not None:
                hit = flight.hit
                break
            failures += flight.outcome is _Outcome.FAILED
            if flight.outcome is _Outcome.UNKEPT or failures >= HANDOVERS_MAX:
                self._missed(ask)
                await self._desk.run(order, emit)
                return
        if hit is not None:
            await self._answer(hit, order, ask, emit)
        else:
            await self._lead(name, order, ask, policy, emit)

    async def _lead(self, name: _Name, order: Order, ask: CacheAsk, policy: CachePolicy, emit: Emit) -> None:
        flight = self._flights[name] = _Flight()
        try:
            flight.hit = hit = await self._semantic(ask, policy)
            if hit is None:
                self._missed(ask)
                await self._desk.run(order, emit)
                if flight.outcome is _Outcome.FAILED:
                    flight.outcome = _Outcome.UNKEPT  # or keep() would have said otherwise
        finally:
            self._land(name, flight)
        if hit is not None:
            await self._answer(hit, order, ask, emit)

    def _land(self, name: _Name, flight: _Flight) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        flight.ended.set()

    # ---- what is kept

    def policy_of(self, ask: CacheAsk) -> CachePolicy:
        """What holds for the Cargo at the moment."""
        if not self.config.enabled:
            return policy_of(self.config, None, None, False)
        said = self._said.get(ask.cargo)
        return policy_of(self.config, self._versions.cargos.manifest(ask.cargo), said[0] if said is not None else None, ask.by_default)

    def _exact(self, ask: CacheAsk, policy: CachePolicy) -> _Hit | None:
        now_s = self._clock()
        for scope in scopes_of(policy, ask.account, ask.is_private):
            entry = self._table.get((scope, ask.key), now_s)
            if entry is None:
                continue
            if self._versions.answers(ask, entry.content_hash):
                return _Hit("exact", entry)
            self._table.drop(entry.slot)
        return None

    async def _semantic(self, ask: CacheAsk, policy: CachePolicy) -> _Hit | None:
        entry = await self._meaning.find(ask, policy)
        return _Hit("semantic", entry) if entry is not None else None

    def keep(self, ask: CacheAsk, job: Job, content_hash: str, transcript: Transcript) -> None:
        """As desk.Answers: a job has succeeded and is paid for."""
        name = _name(ask)
        flight = self._flights.get(name)
        is_kept = self._kept(ask, job, content_hash, transcript)
        if flight is not None:
            flight.outcome = _Outcome.KEPT if is_kept else _Outcome.UNKEPT
            self._land(name, flight)  # whoever waits need not wait until the client of this one has read all

    def _kept(self, ask: CacheAsk, job: Job, content_hash: str, transcript: Transcript) -> bool:
        policy = self.policy_of(ask)
        if not (policy.enabled and ask.writes and content_hash):
            return False
        if not _is_whole(transcript):
            self.statistics.refused += 1
            return False
        if not self._versions.answers(ask, content_hash):
            return False
        entry = self._entry(ask, policy, job, content_hash, transcript)
        if not self._table.put(entry, self._clock()):
            self.statistics.refused += 1
            return False
        self.statistics.kept += 1
        self._meaning.learn(entry)
        return True

    def _entry(self, ask: CacheAsk, policy: CachePolicy, job: Job, content_hash: str, transcript: Transcript) -> Entry:
        now_s = self._clock()
        return Entry(
            scope=scopes_of(policy, ask.account, ask.is_private)[0],
            key=ask.key,
            account=ask.account,
            cargo=ask.cargo,
            content_hash=content_hash,
            job_id=job.id,
            packed=transcript.nameless().pack(),
            kept_at_s=now_s,
            expires_at_s=now_s + policy.ttl_s,
            context=ask.context,
            question=ask.question if ask.context else "",
        )

    # ---- answering

    async def _answer(self, hit: _Hit, order: Order, ask: CacheAsk, emit: Emit) -> None:
        """Tells a kept answer. Where somebody will look for the job it comes into the books, at no price."""
        self._count(hit, ask)
        self._check_some(hit, order)
        is_recorded = bool(order.parent or order.input or order.idempotency_key)
        same_account = hit.entry.account == ask.account
        job_id = order.spec.job_id if is_recorded or not same_account else hit.entry.job_id
        events: Sequence[Event] = await self._events(hit, job_id)
        if is_recorded:
            job = await self._desk.record(order, events)
            if job.id != order.spec.job_id:  # another one of the same idempotency key was quicker
                earlier = await self._first_try(order)
                if earlier is None:
                    raise BooksRefused(Why.REUSED, "the answer to this idempotency key is not kept any more; ask again with another key")
                events = earlier
        await _tell(events, emit)

    async def _events(self, hit: _Hit, job_id: str) -> list[Event]:
        entry = hit.entry
        head = CacheHit(hit.strategy, entry.key.hex(), job_id, max(0.0, self._clock() - entry.kept_at_s))
        if len(entry.packed) <= SMALL_BYTES:
            return [head, *replay(entry.packed, 0)]
        return [head, *await trio.to_thread.run_sync(replay, entry.packed, 0)]

    def _counts(self, cargo: str) -> tuple[Counts, ...]:
        return self.statistics.of(cargo, cargo in self.statistics.per_cargo or bool(self._versions.offered(cargo)))

    def _count(self, hit: _Hit, ask: CacheAsk) -> None:
        for counts in self._counts(ask.cargo):
            if hit.strategy == "exact":
                counts.exact += 1
            else:
                counts.semantic += 1

    def _missed(self, ask: CacheAsk) -> None:
        for counts in self._counts(ask.cargo):
            counts.misses += 1

    # ---- checking hits

    def _check_some(self, hit: _Hit, order: Order) -> None:
        """A share of the semantic hits is checked in the background."""
        if hit.strategy == "exact" or self._nursery is None or not self._shadow.has_room:
            return
        if self._rng.random() < self._share(order.spec.cargo):
            text = "".join(event.text for event in replay(hit.entry.packed, 0) if isinstance(event, Text))
            self._nursery.start_soon(self._shadow.check, CheckedHit(order, hit.entry.question, text, hit.entry.slot))

    def _share(self, cargo: str) -> float:
        """Larger until so much is known of a Cargo that a share of wrong answers would show."""
        share = self.config.shadow_share
        return max(share, WARM_UP_SHARE) if share and self._budget.checks(cargo)[1] < WARM_UP_CHECKS else share

    def _note_check(self, checked: CheckedHit, is_false: bool) -> None:
        cargo = checked.order.spec.cargo
        self.statistics.checks += 1
        self.statistics.checks_false += is_false
        if is_false:
            self._table.blind(checked.slot)  # this one has stood in for another question for the last time
        if self._budget.note(cargo, is_false):
            false, checks = self._budget.checks(cargo)
            log.warning("the semantic cache of %s is off: %d of %d hits that were checked were false", cargo, false, checks)

    # ---- deleting, and what the operator says

    async def delete(self, account: str, cargo: str = "", key: bytes = b"") -> int:
        """Here at once, elsewhere within a second; how many went here. Raises BooksUnavailable."""
        count = self._table.delete(account, cargo, key)
        self.statistics.deleted += count
        now_ms = await self._books.now_ms()
        async with self._lock:
            number = await self._books.change(order_purge, now_ms, account, cargo, key.hex())
            if self.config.enabled:
                self._own.add(number)
        return count

    def take_in(self, news: News) -> None:
        """What the database says. A policy that is said anew begins with a clean record."""
        self._seq = news.seq
        for purge in news.purges:
            if purge.seq in self._own:  # done when it was ordered; what was kept since stays
                self._own.discard(purge.seq)
                continue
            key = key_of(purge.key)
            if key is not None:
                self.statistics.deleted += self._table.delete(purge.account, purge.cargo, key)
        for cargo in self._said.keys() | news.said.keys():
            if self._said.get(cargo) != news.said.get(cargo):
                self._budget.reset(cargo)
        self._said = news.said

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once the policies are read. Runs until cancelled. Raises BooksUnavailable where they cannot be at first."""
        if not self.config.enabled:
            task_status.started()
            return
        self.take_in(await self._books.ask(read_news, None))
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._meaning.run)
            task_status.started()
            while True:
                await trio.sleep(POLL_S)
                self._tidy()
                try:
                    async with self._lock:
                        self.take_in(await self._books.ask(read_news, self._seq))
                except BooksUnavailable as error:
                    log.debug("the cache does not hear what is to be deleted: %s", error)

    def _tidy(self) -> None:
        """What is too old goes, and all of Cargos that may not run any more."""
        self._table.expire(self._clock())
        for cargo in self._table.per_cargo():
            releases = self._versions.cargos.releases(cargo)
            if releases is not None and not releases:
                self.statistics.deleted += self._table.delete(cargo=cargo)

    # ---- what it says of itself

    @property
    def semantic_state(self) -> str:
        """``on``, or why only equal questions get an answer that is kept."""
        return self._meaning.state if self.config.enabled else "the cache is switched off"

    def state_json(self) -> dict[str, Any]:
        """For /health."""
        off = self._budget.switched_off()
        return {"enabled": self.config.enabled, "semantic": self.semantic_state, **({"semantic_off": off} if off else {})}

    def stats_json(self, account: str) -> dict[str, Any]:
        """For an account: counts of all, and how much of what is kept is its own."""
        counts, table = self.statistics, self._table
        return {
            **counts.total.as_json(),
            "size": len(table),
            "size_bytes": table.size_bytes,
            "entries_max": self.config.entries_max,
            "bytes_max": self.config.bytes_max,
            "own": table.held_by(account),
            "bypassed": counts.bypassed,
            "waited": counts.waited,
            "evicted": table.evicted,
            "expired": table.expired,
            "vetoed": self._meaning.vetoed,
            "learning": self._meaning.learning,
            "enabled": self.config.enabled,
            "semantic": self.semantic_state,
            "semantic_off": self._budget.switched_off(),
            "checks": {"done": counts.checks, "false": counts.checks_false, "failed": self._shadow.failed},
            "cargos": self._cargos_json(),
        }

    def _cargos_json(self) -> dict[str, Any]:
        sizes = self._table.per_cargo()
        shown = {}
        for cargo, counts in sorted(self.statistics.per_cargo.items()):
            size, size_bytes = sizes.get(cargo, (0, 0))
            false, checks = self._budget.checks(cargo)
            low, high = self._budget.bounds(cargo)
            shown[cargo] = {
                **counts.as_json(),
                "size": size,
                "size_bytes": size_bytes,
                "semantic": "off" if self._budget.is_off(cargo) else "on",
                "checks": {"done": checks, "false": false, "false_share_low": round(low, 4), "false_share_high": round(high, 4)},
            }
        return shown

    def gauges(self) -> dict[str, float]:
        """For /metrics; any thread may read them."""
        counts, table = self.statistics, self._table
        return {
            "cache_hits_exact": counts.total.exact,
            "cache_hits_semantic": counts.total.semantic,
            "cache_misses": counts.total.misses,
            "cache_vetoed": self._meaning.vetoed,
            "cache_bypassed": counts.bypassed,
            "cache_waited": counts.waited,
            "cache_entries": len(table),
            "cache_bytes": table.size_bytes,
            "cache_evicted": table.evicted,
            "cache_expired": table.expired,
            "cache_deleted": counts.deleted,
            "cache_checks": counts.checks,
            "cache_checks_false": counts.checks_false,
            "cache_embed_failures": self._meaning.failures,
        }


def _name(ask: CacheAsk) -> _Name:
    """Only an account's own questions wait for one another: a client that does not read holds its job up, but no stranger's."""
    return ask.account, ask.key, ask.is_private


def key_of(text: str) -> bytes | None:
    """The key of an answer as it is shown, hex; empty for none; None for what is no key."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        return None
    return key if len(key) in (0, KEY_BYTES) else None


def _is_whole(transcript: Transcript) -> bool:
    """Whether an answer is one that may be told again: it ended by itself, and says something."""
    results = transcript.results
    if len(results) != 1 or results[0].finish_reason is not FinishReason.STOP:
        return False
    return results[0].done is not None or bool(transcript.text(0))


async def _tell(events: Iterable[Event], emit: Emit) -> None:
    for event in events:
        await emit(event)
