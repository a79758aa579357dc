"""Embedding jobs beside the engine: a little of them between two of its steps, so that chats go on.

Jobs take turns by texts, so a large one does not hold up a small one. The model's second context is made for the first job; its memory was
set aside when the model was loaded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from protocol import limits
from protocol.errors import Code, Refused
from runtimes.gguf.embed_input import EmbeddingInput, normalized, read_input, result, written
from runtimes.gguf.embed_model import Text, Vectors
from runtimes.gguf.engine import Events, Job
from runtimes.gguf.llama import LlamaError, Model
from runtimes.gguf.messages import Embed, Embedded, Rejected, Room
from runtimes.gguf.scheduler import STEP_S

_LEARN = 0.2  # weight of a new observation of the time of a row


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """``texts`` wait, ``open`` ones are under way; ``vectors`` are written as they come."""

    number: int
    given: EmbeddingInput
    texts: list[Text]
    begun: int = 0
    vectors: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<EmbeddingJob {self.number}: {len(self.vectors)} of {len(self.texts)} texts>"

    @property
    def tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)


class Embedder:
    """Not thread-safe but for ``prepare``. ``make`` gives the context when it is first needed, with ``tokens_max`` cells; ``row_s``: what a
    row may cost, until it is known."""

    def __init__(
        self,
        model: Model,
        dimensions: int,
        tokens_max: int,
        make: Callable[[], Vectors],
        row_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._dimensions, self.tokens_max, self._make = model, dimensions, tokens_max, make
        self._row_s, self._clock = max(row_s, 1e-7), clock
        self._vectors: Vectors | None = None
        self._jobs: deque[EmbeddingJob] = deque()
        self._open: list[tuple[EmbeddingJob, int]] = []

    def __repr__(self) -> str:
        return f"<Embedder {len(self._jobs)} jobs, {len(self._open)} texts under way>"

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def prepare(self, order: Embed) -> EmbeddingJob:
        """From input to tokens. Raises Refused(bad_input, context_length_exceeded). Any thread."""
        given = read_input(bytes(order.input), self._dimensions)
        texts = []
        for number, words in enumerate(given.texts):
            tokens = self._model.tokenize(words, add_special=True, parse_special=False)
            if not tokens:
                raise Refused(Code.BAD_INPUT, f"text {number} of the input has nothing in it that this model can read")
            if len(tokens) > self.tokens_max:
                text = f"text {number} of the input has {len(tokens)} tokens; at most {self.tokens_max} are allowed here"
                raise Refused(Code.CONTEXT_LENGTH, text)
            texts.append(Text(np.asarray(tokens, np.int32)))
        return EmbeddingJob(order.job, given, texts)

    def submit(self, job: EmbeddingJob) -> None:
        """Raises Refused(no_capacity)."""
        if len(self._jobs) >= limits.ENGINE_WAITING_MAX:
            raise Refused(Code.NO_CAPACITY, f"{len(self._jobs)} embedding jobs are waiting already")
        self._jobs.append(job)

    def cancel(self, number: int) -> None:
        for job in [job for job in self._jobs if job.number == number]:
            self._leave(job)

    def step(self, spare_s: float) -> list[Embedded | Rejected]:
        """Computes for about so long, at least one row; says which jobs are over. Does nothing when idle."""
        if self.is_idle:
            return []
        try:
            vectors = self._vectors = self._vectors or self._make()
            self._begin(vectors)
            started = self._clock()
            rows = vectors.compute([job.texts[index] for job, index in self._open], int(spare_s / self._row_s))
            self._row_s += _LEARN * (max(1e-7, (self._clock() - started) / rows) - self._row_s)
        except LlamaError as error:
            return self._give_up(str(error))
        return self._collect(vectors)

    def _begin(self, vectors: Vectors) -> None:
        """Begins texts, one of each job in turn, as long as there is room for all of them."""
        room = vectors.tokens_max - sum(len(job.texts[index].tokens) for job, index in self._open)
        while len(self._open) < vectors.texts_max and any(job.begun < len(job.texts) for job in self._jobs):
            job = self._jobs[0]
            if job.begun < len(job.texts):
                room -= len(job.texts[job.begun].tokens)
                if room < 0:
                    return
                self._open.append((job, job.begun))
                job.begun += 1
            self._jobs.rotate(-1)

    def _collect(self, vectors: Vectors) -> list[Embedded | Rejected]:
        over: list[Embedded | Rejected] = []
        for job, index in [(job, index) for job, index in self._open if job.texts[index].vector is not None]:
            vector = job.texts[index].vector
            self._open.remove((job, index))
            vectors.forget(job.texts[index])
            if vector is None or not np.isfinite(vector).all():
                over.append(Rejected(job.number, Code.CARGO_FAILED, "the model gave a vector of numbers that are not finite"))
                self._leave(job)
                continue
            job.vectors[index] = written(normalized(vector), job.given.is_base64)
            if len(job.vectors) == len(job.texts) and job in self._jobs:
                over.append(Embedded(job.number, job.tokens, _result(job, self._dimensions)))
                self._jobs.remove(job)
        return over

    def _give_up(self, why: str) -> list[Embedded | Rejected]:
        """The library refused: what is under way is over."""
        jobs = list(self._jobs)
        for job in jobs:
            self._leave(job)
        return [Rejected(job.number, Code.INTERNAL, f"llama.cpp could not compute embeddings ({why})"[:500]) for job in jobs]

    def _leave(self, job: EmbeddingJob) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        for mine, index in [entry for entry in self._open if entry[0] is job]:
            self._open.remove((mine, index))
            if self._vectors is not None:
                self._vectors.forget(job.texts[index])


def _result(job: EmbeddingJob, dimensions: int) -> bytes:
    return result([job.vectors[index] for index in range(len(job.texts))], dimensions, job.given.is_one).encode()


class NoEngine:
    """In the place of an Engine where a model writes no text."""

    is_idle, is_waiting_for_stages, tokens_per_s = True, False, 0.0

    def __init__(self, room: Room) -> None:
        self._room = room

    def room(self) -> Room:
        return self._room

    def submit(self, job: Job) -> None:
        raise Refused(Code.BAD_INPUT, "this model makes embeddings and writes no text; ask it through /v1/embeddings")

    def cancel(self, number: int) -> bool:
        return False

    def tidy(self) -> None: ...

    def admit(self) -> Events:
        return Events()

    def step(self) -> Events:
        return Events()

    @property
    def spare_s(self) -> float:
        return STEP_S
