"""The engine's loop, one step at a time: choose rows, compute them, choose tokens. No sockets, no threads, no processes.

A job's life: prepared (template, tokens, sampler; any thread) → waiting for cells → prefilling → answering → over. Every step computes
one row for each answering job and a chunk of the prompts that the scheduler allows. A cancelled job is gone before the next step.

Where the layers are a pipeline of several Islands, as many steps are under way as keep them busy: each with a share of the answers, and
with chunks of the prompts one behind the other. An answer waits for its token before its next row is sent; a prompt does not.

A resumed job (GenerationRequest.resume) treats the tokens that were already delivered as part of its prompt; its sampler, grammar and
text stream have seen them, so what follows is what would have followed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from protocol import limits
from protocol.errors import Code, Refused
from protocol.generation import FinishReason, GenerationRequest, pack_tokens
from runtimes.gguf.detokenize import TextStream
from runtimes.gguf.kv import Admission, Forgotten, KvBook
from runtimes.gguf.layers import Landed, Layers, Rows
from runtimes.gguf.llama import Floats
from runtimes.gguf.messages import Admitted, Ended, Output, Rejected, Room, Step
from runtimes.gguf.sampler import Grammar, Sampler, logprob_entry
from runtimes.gguf.scheduler import SHARED_STEP_S, STEP_S, STRETCH, TimeModel, Waiting, plan
from runtimes.gguf.shelf import Shelf, Shelved
from runtimes.gguf.tool_parser import CallParser

_SPEED_LEARN = 0.1  # weight of one finished job in the advertised tokens/s
_PROMPTS_AT_ONCE = 2  # so that a long one does not hold up a short one
_RESTORE_GAIN_MIN = 32  # tokens that a shelved prefix must save beyond one in cells, which costs nothing to share
_SPEED_TOKENS_MIN = 8  # shorter answers say nothing about speed


class Tokens(Protocol):
    """What the engine asks of a vocabulary."""

    def piece(self, token: int) -> bytes: ...


class AnswerGrammar(Grammar, Protocol):
    """A grammar that also knows when the answer is whole."""

    def is_complete(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Job:
    """One answer. ``tokens``: prompt and resumed tokens, all of which are computed before the first new token. ``calls`` reads its calls of
    tools; ``marks``: tokens that have a text for that, and none otherwise."""

    number: int
    request: GenerationRequest
    salt: bytes
    prompt_tokens: int
    tokens: list[int]
    sampler: Sampler
    grammar: AnswerGrammar | None
    text: TextStream
    echo: str = ""
    calls: CallParser | None = None
    marks: Mapping[int, bytes] = field(default_factory=dict)
    resumed: int = 0
    made: int = 0  # tokens of the answer, resumed ones included
    sequence: int = -1
    cached_tokens: int = 0
    next_token: int = -1  # chosen, not yet computed
    arrived_s: float = 0.0
    first_token_s: float = 0.0
    under_way: int = 0  # steps that hold rows of it
    is_over: bool = False  # cancelled; what is under way is still to land
    is_damaged: bool = False  # what the cells hold is of no use to anybody else
    compute_s: float = 0.0

    @property
    def declared(self) -> int:
        return self.prompt_tokens + self.request.max_tokens

    def said(self, token: int, piece: bytes) -> str:
        """Text that is certain after this token, whose bytes are ``piece``."""
        text = self.text.feed(self.marks.get(token, piece))
        return text if self.calls is None else self.calls.feed(text)

    def rest(self) -> str:
        """The rest of the text, when the answer is over."""
        text = self.text.finish()
        return text if self.calls is None else self.calls.feed(text) + self.calls.finish()

    def __repr__(self) -> str:
        return f"<Job {self.number}: prompt {self.prompt_tokens}, answer {self.made}/{self.request.max_tokens}>"


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way. ``reads``: the jobs whose logits are read, in the order of their rows."""

    jobs: tuple[Job, ...]
    reads: tuple[Job, ...]
    decode_rows: int
    prefill_rows: int


@dataclass(slots=True)
class Events:
    """What one call gave: frames for the node, in order."""

    admitted: list[Admitted] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    over: list[Ended | Rejected] = field(default_factory=list)

    def messages(self) -> Iterable[object]:
        yield from self.admitted
        if self.outputs:
            yield Step(tuple(self.outputs), pack_tokens(self.tokens))
        yield from self.over


class Engine:
    """Continuous batching over ``layers``. Not thread-safe: one thread calls it.

    >>> engine.submit(job); events = engine.step()
    """

    def __init__(
        self,
        layers: Layers,
        vocabulary: Tokens,
        end_tokens: frozenset[int],
        book: KvBook,
        times: TimeModel,
        batch_rows: int,
        shelf: Shelf | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._layers, self._vocabulary, self._end_tokens = layers, vocabulary, end_tokens
        self._book, self._times, self._batch_rows, self._clock = book, times, batch_rows, clock
        self.shelf = shelf or Shelf(0)
        self._waiting: deque[Job] = deque()
        self._prefilling: list[Job] = []
        self._answering: list[Job] = []
        self._flights: dict[int, _Flight] = {}
        self._is_stuck = False
        self.tokens_per_s = 0.0
        self.steps = 0

    def __repr__(self) -> str:
        jobs = f"{len(self._answering)} answering, {len(self._prefilling)} prefilling, {len(self._waiting)} waiting"
        return f"<Engine {jobs}; {self._book!r}>"

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._prefilling or self._answering or self._flights)

    @property
    def is_waiting_for_stages(self) -> bool:
        """Whether the last step found nothing to do but to wait for what is under way."""
        return self._is_stuck and bool(self._flights)

    def room(self) -> Room:
        return Room(self._book.tokens_free, self._book.slots_free, len(self._waiting), self.tokens_per_s)

    @property
    def spare_s(self) -> float:
        """How long something else may take before the next step, by the rule for prompts beside answers."""
        if self._answering:
            return (STRETCH - 1.0) * self._times.decode_s(len(self._answering))
        return STEP_S if self.is_idle else SHARED_STEP_S

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises Refused(no_capacity) when the queue is full or the job could never fit."""
        if job.declared > self._book.cells:
            raise Refused(Code.CONTEXT_LENGTH, f"{job.declared} tokens are more than this Island's memory holds ({self._book.cells})")
        if len(self._waiting) >= limits.ENGINE_WAITING_MAX:
            raise Refused(Code.NO_CAPACITY, f"{len(self._waiting)} jobs are waiting already")
        job.arrived_s = self._clock()
        self._waiting.append(job)

    def cancel(self, number: int) -> bool:
        """Ends a job wherever it is and frees its cells, after the steps that hold rows of it. False when there is no such job."""
        for jobs in (self._answering, self._prefilling, self._waiting):
            for job in jobs:
                if job.number == number:
                    jobs.remove(job)
                    self._leave(job)
                    return True
        return False

    def admit(self) -> Events:
        """Gives room to who waits, so that it can be told before the step that computes its prompt."""
        events = Events()
        self._admit(events)
        return events

    def step(self) -> Events:
        """Admits, begins as many steps as there are stages to work on them, and takes those that have landed: chooses their tokens.

        Does nothing when idle. With one stage, that is one step each time.
        """
        events = Events()
        self._admit(events)
        self._is_stuck = not self._launch_all()
        while (landed := self._layers.collect()) is not None:
            self._land(landed, events)
            self._is_stuck = False
        if self._layers.stages > 1:
            self._launch_all()  # before anybody is told what has landed: the other stages wait for it
        return events

    def _launch_all(self) -> bool:
        """Whether any step was begun."""
        before = self.steps
        while len(self._flights) < self._flights_max() and self._launch():
            pass
        return self.steps > before

    def _flights_max(self) -> int:
        """Two more than stages: what travels between them keeps none busy."""
        stages = self._layers.stages
        return 1 if stages == 1 else stages + 2

    def _launch(self) -> bool:
        rows, flight = self._gather()
        if rows is None:
            return False
        self.steps += 1
        for job in flight.jobs:
            job.under_way += 1
        self._flights[self.steps] = flight
        self._layers.launch(self.steps, rows)
        return True

    def _land(self, landed: Landed, events: Events) -> None:
        flight = self._flights.pop(landed.step)
        for job in flight.jobs:
            job.under_way -= 1
            job.compute_s += landed.own_seconds
        self._choose(landed.logits, flight.reads, events)
        self._times.observe(flight.decode_rows, flight.prefill_rows, landed.seconds)
        for job in flight.jobs:
            if job.is_over and not job.under_way:
                job.is_damaged = True  # rows of a job that was given up may have come round as zeros
                self._release(job)

    def _leave(self, job: Job) -> None:
        job.is_over = True
        if not job.under_way:
            self._release(job)

    def tidy(self) -> None:
        """To be called when idle: takes the prefixes that linger out of the cells. Whoever comes next begins in an empty cache, where its
        cells lie in the order of its tokens."""
        for forgotten in self._book.tidy():
            self._forget(forgotten)

    def _admit(self, events: Events) -> None:
        """In order of arrival; a large job at the head is not overtaken, so it cannot starve.

        Not more than can be computed soon: who comes in later shares what those before have computed of the same beginning by then.
        """
        while self._waiting and self._wants_prompts():
            job = self._waiting[0]
            shelved = self._worth_restoring(job)
            admission = self._book.admit(job.tokens, job.declared, job.salt, shares=shelved is None)
            if admission is None:
                return
            self._waiting.popleft()
            self._enter(job, admission, shelved)
            events.admitted.append(Admitted(job.number, job.prompt_tokens, job.cached_tokens))

    def _wants_prompts(self) -> bool:
        left = sum(len(job.tokens) - self._book.length(job.sequence) for job in self._prefilling)
        return len(self._prefilling) < _PROMPTS_AT_ONCE or left < self._times.tokens_in(SHARED_STEP_S)

    def _worth_restoring(self, job: Job) -> tuple[Shelved, int] | None:
        """The shelved prefix that saves clearly more than what stands in cells."""
        found = self.shelf.find(job.salt, np.asarray(job.tokens[:-1], np.int32)) if job.salt else None
        if found is None or found[1] < self._book.shareable(job.tokens, job.salt) + _RESTORE_GAIN_MIN:
            return None
        return found

    def _enter(self, job: Job, admission: Admission, shelved: tuple[Shelved, int] | None) -> None:
        for forgotten in admission.evicted:
            self._forget(forgotten)
        job.sequence, cached = admission.sequence, admission.cached_tokens
        self._layers.begin(job.sequence, job.number, job.declared, len(job.tokens), admission.source, cached)
        if not cached and shelved is not None:
            cached = self._restore(job, *shelved)
        job.cached_tokens = min(cached, job.prompt_tokens)
        self._prefilling.append(job)

    def _restore(self, job: Job, shelved: Shelved, length: int) -> int:
        """Puts a prefix back into cells; 0 when there is no room for all of it, which it needs for a moment."""
        room = self._book.make_room(len(shelved.tokens))
        if room is None:
            return 0
        self.shelf.taken(shelved)  # first, so that what is forgotten for it does not push it out
        for forgotten in room:
            self._forget(forgotten)
        self._layers.restore(job.sequence, shelved.state)
        self._layers.cut(job.sequence, length)
        self._book.append(job.sequence, job.tokens[:length])
        return length

    def _forget(self, forgotten: Forgotten) -> None:
        if self.shelf.wants(forgotten.salt, forgotten.tokens):
            self.shelf.put(forgotten.salt, forgotten.tokens, self._layers.save(forgotten.sequence))
        self._layers.cut(forgotten.sequence)

    def _gather(self) -> tuple[Rows | None, _Flight]:
        """The rows of a step: answers that wait for their next token, a share of them where several stages are to be busy, and prompts."""
        ready = [job for job in self._answering if not job.under_way]
        share = -(-len(self._answering) // self._layers.stages)
        parts: list[tuple[Job, list[int], bool]] = [(job, [job.next_token], True) for job in ready[:share]]
        decode_rows = len(parts)
        left = {job.number: (job, len(job.tokens) - self._book.length(job.sequence)) for job in self._prefilling}
        waiting = [Waiting(number, tokens) for number, (_, tokens) in left.items() if tokens]
        for number, count in plan(decode_rows, waiting, self._batch_rows, self._times, len(self._waiting)):
            job = left[number][0]
            start = self._book.length(job.sequence)
            parts.append((job, job.tokens[start : start + count], start + count == len(job.tokens)))
        if not parts:
            return None, _Flight((), (), 0, 0)
        rows = self._rows(parts)
        reads = tuple(job for job, _, is_read in parts if is_read)
        return rows, _Flight(tuple(job for job, _, _ in parts), reads, decode_rows, len(rows) - decode_rows)

    def _rows(self, parts: list[tuple[Job, list[int], bool]]) -> Rows:
        total = sum(len(tokens) for _, tokens, _ in parts)
        values, positions, sequences = (np.empty(total, np.int32) for _ in range(3))
        wanted = np.zeros(total, np.int8)
        at = 0
        for job, tokens, reads in parts:
            end, start = at + len(tokens), self._book.length(job.sequence)
            values[at:end], sequences[at:end] = tokens, job.sequence
            positions[at:end] = np.arange(start, start + len(tokens))
            wanted[end - 1] = reads
            for forgotten in self._book.append(job.sequence, tokens):
                self._forget(forgotten)
            at = end
        return Rows(values, positions, sequences, wanted)

    def _choose(self, logits: Floats, jobs: Sequence[Job], events: Events) -> None:
        plain = [i for i, job in enumerate(jobs) if job.sampler.is_plain]
        best = logits.argmax(axis=1) if len(plain) > 1 else None
        now = self._clock()
        for i, job in enumerate(jobs):
            if job.is_over:
                continue
            if not job.first_token_s:
                self._prefilling.remove(job)
                self._answering.append(job)
                job.first_token_s = now
            raw = logits[i].copy() if job.request.top_logprobs >= 0 and not job.sampler.is_plain else logits[i]
            token = int(best[i]) if best is not None and job.sampler.is_plain else job.sampler.choose(logits[i])
            if not self._take(job, token, raw, events):
                self._answering.remove(job)

    def _take(self, job: Job, token: int, logits: Floats, events: Events) -> bool:
        """Adds a chosen token to its answer. Returns whether the answer goes on."""
        if token in self._end_tokens:
            self._end(job, FinishReason.STOP, job.rest(), events)
            return False
        job.sampler.accept(token)
        text = job.echo + job.said(token, self._vocabulary.piece(token))
        job.echo, job.made, job.next_token = "", job.made + 1, token
        top = job.request.top_logprobs
        entry = b"[" + logprob_entry(logits, token, top, self._vocabulary.piece) + b"]" if top >= 0 else b""
        events.outputs.append(Output(job.number, 1, text, entry))
        events.tokens.append(token)
        reason = reason_to_end(job)
        if reason is None:
            return True
        self._end(job, reason, job.rest(), events)
        return False

    def _end(self, job: Job, reason: FinishReason, text: str, events: Events) -> None:
        now = self._clock()
        first = job.first_token_s or now
        new = job.made - job.resumed
        if new >= _SPEED_TOKENS_MIN and now > first:
            speed = (new - 1) / (now - first)
            self.tokens_per_s += _SPEED_LEARN * (speed - self.tokens_per_s) if self.tokens_per_s else speed
        events.over.append(
            Ended(
                job=job.number,
                reason=reason,
                prompt_tokens=job.prompt_tokens,
                completion_tokens=job.made,
                cached_tokens=job.cached_tokens,
                text=job.echo + text,
                prefill_s=first - job.arrived_s,
                decode_s=now - first,
                compute_us=int(job.compute_s * 1e6),
            )
        )
        self._release(job)

    def _release(self, job: Job) -> None:
        if job.sequence >= 0:
            for forgotten in self._book.finish(job.sequence, is_sound=not job.is_damaged):
                self._forget(forgotten)
            job.sequence = -1


def reason_to_end(job: Job) -> FinishReason | None:
    """Why the answer is over after its last token, or None. Also asked of a resumed answer, which may be complete already."""
    if job.text.stopped or (job.calls is not None and job.calls.is_over):
        return FinishReason.STOP
    if job.grammar is not None and job.made and job.grammar.is_complete():
        return FinishReason.STOP
    return FinishReason.LENGTH if job.made >= job.request.max_tokens else None
