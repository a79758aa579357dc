"""The semantic step: the kept answer to a question that means the same.

The index names candidates that share words; the guards throw out those that must not stand in for what was asked; only then, and only where
some are left, vectors are made, and the nearest of them counts if it is near enough. So a question without candidates costs one look into
the index, and one whose candidates are all thrown out costs no vector either. Kept questions are read, and get their vectors, in the
background: no answer waits for that.

Runs on trio. Where anything of it does not work there is no hit, and nothing else.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from coordinator.cache.asking import CacheAsk
from coordinator.cache.budget import ErrorBudget
from coordinator.cache.guards import Reading, read, veto_of
from coordinator.cache.judging import unit
from coordinator.cache.normal import content_words, core
from coordinator.cache.policy import EXACT_MILLI, scopes_of
from coordinator.cache.table import AnswerTable, Entry
from coordinator.cache.versions import Versions
from protocol.cargos import CachePolicy
from protocol.errors import ArchipelagError

log = logging.getLogger(__name__)

ON = "on"
EMBED_S = 1.0  # vectors that take longer are done without
WAITING_MAX = 256  # kept questions that are still to be read
AT_ONCE_MAX = 16
PAUSE_S = 0.005  # before kept questions are read, so that their answers are told first


class Embedding(Protocol):
    """Whoever turns texts into vectors by which texts that mean the same are found. Called on trio."""

    @property
    def state(self) -> str:
        """``on``, or a sentence why there are no vectors."""
        ...

    async def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """A vector for each text. Raises ArchipelagError where it cannot."""
        ...


class Meaning:
    """``clock`` in seconds, only forward."""

    def __init__(
        self, embedding: Embedding | None, table: AnswerTable, budget: ErrorBudget, versions: Versions, clock: Callable[[], float]
    ) -> None:
        self._embedding, self._table, self._budget, self._versions, self._clock = embedding, table, budget, versions, clock
        self._send, self._receive = trio.open_memory_channel[Entry](WAITING_MAX)
        self.vetoed = 0  # questions whose candidates were all thrown out
        self.failures = 0
        self.learning = 0  # kept questions that are still being read

    def __repr__(self) -> str:
        return f"<Meaning {self.state}, {self.vetoed} vetoed, {self.failures} failures>"

    @property
    def state(self) -> str:
        """``on``, or why only equal questions get an answer that is kept."""
        return self._embedding.state if self._embedding is not None else "no model for embeddings was given"

    async def find(self, ask: CacheAsk, policy: CachePolicy) -> Entry | None:
        """The entry that may stand in for a question, if there is one."""
        try:
            return await self._find(ask, policy)
        except Exception as error:  # a bug makes a miss, and nothing else
            self._bug(error)
            return None

    async def _find(self, ask: CacheAsk, policy: CachePolicy) -> Entry | None:
        if not ask.context or self.state != ON or policy.similarity_milli >= EXACT_MILLI or self._budget.is_off(ask.cargo):
            return None
        if not any(self._table.knows(scope, ask.context) for scope in scopes_of(policy, ask.account, ask.is_private)):
            return None  # before the question is read, which costs most
        asked = core(ask.question)
        found = self._alike(ask, policy, asked)
        if not found:
            return None
        missing = [entry for entry in found if entry.vector is None]
        vectors = await self._embed_or_none([asked, *(entry.core for entry in missing)])
        if vectors is None:
            return None
        for entry, vector in zip(missing, vectors[1:], strict=True):
            self._set_vector(entry, vector)
        return self._nearest(ask, found, vectors[0], policy)

    def _alike(self, ask: CacheAsk, policy: CachePolicy, asked: str) -> list[Entry]:
        """Entries that may stand in for a question, as far as words tell."""
        words, now_s, is_vetoed = content_words(asked), self._clock(), False
        reading: Reading | None = None
        for scope in scopes_of(policy, ask.account, ask.is_private):
            found = self._table.candidates(scope, ask.context, words, now_s)
            counting = [entry for entry in found if self._versions.answers(ask, entry.content_hash)]
            if counting and reading is None:
                reading = read(ask.question)
            passed = [entry for entry in counting if reading and entry.reading and not veto_of(reading, entry.reading)]
            if passed:
                return passed
            is_vetoed = is_vetoed or bool(counting)
        self.vetoed += is_vetoed
        return []

    def _nearest(self, ask: CacheAsk, found: list[Entry], vector: Sequence[float], policy: CachePolicy) -> Entry | None:
        asked, best, best_score = unit(vector), None, policy.similarity_milli / EXACT_MILLI
        for entry in found:
            if asked is None or entry.vector is None or entry.vector.shape != asked.shape:
                continue
            score = float(entry.vector @ asked)
            if score >= best_score:
                best, best_score = entry, score
        # meanwhile it may have been deleted, or its Cargo suspended
        if best is None or self._table.get(best.slot, self._clock()) is not best:
            return None
        return best if self._versions.answers(ask, best.content_hash) else None

    async def _embed_or_none(self, texts: Sequence[str]) -> Sequence[Sequence[float]] | None:
        try:
            with trio.move_on_after(EMBED_S):
                return await self.embed(texts)
            log.debug("vectors took more than %s s", EMBED_S)
        except ArchipelagError as error:
            log.debug("there are no vectors: %s", type(error).__name__)
        self.failures += 1
        return None

    async def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """Raises ArchipelagError."""
        if self._embedding is None:
            raise ArchipelagError("no model for embeddings was given")
        vectors = await self._embedding.embed(texts)
        if len(vectors) != len(texts):
            raise ArchipelagError(f"{len(vectors)} vectors came for {len(texts)} texts")
        return vectors

    def _set_vector(self, entry: Entry, vector: Sequence[float]) -> None:
        found = unit(vector)
        if found is not None:
            self._table.set_vector(entry, found)

    # ---- what was kept

    def learn(self, entry: Entry) -> None:
        """An answer was kept: its question is read soon, and gets a vector, so that no other one waits for that."""
        if not entry.context or self._embedding is None:
            return
        try:
            self._send.send_nowait(entry)
            self.learning += 1
        except trio.WouldBlock:
            log.debug("too many questions at once: this one is kept for equal ones only")

    async def run(self) -> None:
        async for first in self._receive:
            entries = [first]
            while len(entries) < AT_ONCE_MAX and self._receive.statistics().current_buffer_used:
                entries.append(self._receive.receive_nowait())
            try:
                await self._study(entries)
            except Exception as error:  # a bug costs what these questions would have saved, and nothing else
                self._bug(error)
            self.learning -= len(entries)

    async def _study(self, entries: list[Entry]) -> None:
        await trio.sleep(PAUSE_S)
        for entry in entries:
            asked = core(entry.question)
            self._table.describe(entry, asked, content_words(asked), read(entry.question))
            await trio.lowlevel.checkpoint()  # others have their turn: reading takes some 0.5 ms
        vectors = await self._embed_or_none([entry.core for entry in entries]) if self.state == ON else None
        for entry, vector in zip(entries, vectors or (), strict=False):
            self._set_vector(entry, vector)

    def _bug(self, error: Exception) -> None:
        self.failures += 1
        trace = "".join(traceback.format_tb(error.__traceback__))  # no message: a foreign error's may quote the input
        log.error("the semantic cache: %s\n%s", type(error).__name__, trace)
