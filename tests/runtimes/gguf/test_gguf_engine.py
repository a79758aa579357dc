"""The engine with the real model, in this process: answers do not depend on company, chunks, prefixes or where they were resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import Code, Refused
from protocol.generation import ChatMessage, FinishReason, GenerationRequest, Role, Sampling, pack_tokens
from runtimes.gguf.engine import Engine, Events, Job
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Stage
from runtimes.gguf.llama import ContextSize, Floats, Model
from runtimes.gguf.load import MICRO_BATCH_CPU
from runtimes.gguf.messages import Ended
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.shelf import Shelf
from runtimes.gguf.template import ChatTemplate

CELLS, SLOTS, SEQUENCES = 4096, 12, 24
SALT = b"account"
TOPICS = ("an island", "the sea", "a lighthouse", "three birds", "bread", "rain in spring", "a long war", "numbers")


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    end: Ended | None = None
    cached_tokens: int = 0


class Bench:
    """An engine over the real model, driven by hand."""

    def __init__(self, model: Model, stage: Stage, cells: int = CELLS, slots: int = SLOTS) -> None:
        self.model, self.stage = model, stage
        stage.context.clear()
        self.book = KvBook(cells, slots, SEQUENCES)
        self.shelf = Shelf(64 * 2**20)
        self.engine = Engine(
            stage, model, model.end_tokens(), self.book, TimeModel(0.02, 0.002), batch_rows=256, shelf=self.shelf
        )
        template = ChatTemplate(model.chat_template(100_000), model.special_text(model.bos()), model.special_text(model.eos()))
        self.preparer = Preparer(model, template, context_tokens=2048)
        self.answers: dict[int, Answer] = {}
        self._numbers = 0

    def start(self, request: GenerationRequest, salt: bytes = b"", gbnf: str = "") -> int:
        self._numbers += 1
        job = self.preparer.job(self._numbers, request, salt, gbnf)
        self.answers[self._numbers] = Answer()
        done = self.preparer.finished(job)
        if done is not None:
            self.answers[self._numbers].end = done
            return self._numbers
        self.engine.submit(job)
        return self._numbers

    def step(self) -> Events:
        events = self.engine.step()
        at = 0
        for admitted in events.admitted:
            self.answers[admitted.job].cached_tokens = admitted.cached_tokens
        for output in events.outputs:
            answer = self.answers[output.job]
            answer.tokens += events.tokens[at : at + output.count]
            answer.text += output.text
            at += output.count
        for over in events.over:
            assert isinstance(over, Ended)
            self.answers[over.job].end = over
            self.answers[over.job].text += over.text
        return events

    def drain(self) -> None:
        while not self.engine.is_idle:
            self.step()
        assert self.book.tokens_free == self.book.cells and self.book.slots_free == self.book.slots

    def logits_of(self, request: GenerationRequest) -> Floats:
        """Logits of the request's last token, as chosen from beside whatever else runs."""
        seen: list[Floats] = []
        choose = self.engine._choose

        def look(logits: Floats, jobs: Sequence[Job], events: Events) -> None:
            seen.extend(logits[i].copy() for i, job in enumerate(jobs) if job.number == number)
            choose(logits, jobs, events)

        self.engine._choose = look  # type: ignore[method-assign]
        number = self.start(request)
        while self.answers[number].end is None:
            self.step()
        self.engine._choose = choose  # type: ignore[method-assign]
        return seen[-1]

    def answer(self, request: GenerationRequest, salt: bytes = b"") -> Answer:
        number = self.start(request, salt)
        self.drain()
        return self.answers[number]


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Iterator[Model]:
    # plain: a build with a broken kernel must not end the test process; the worker's own fallback is tested with the worker
    model = Model(str(smollm2_path), plain=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def stage(model: Model) -> Iterator[Stage]:
    stage = Stage(model, ContextSize(CELLS, SEQUENCES, batch=256, micro_batch=MICRO_BATCH_CPU, outputs=256, threads=1))
    yield stage
    stage.close()


@pytest.fixture
def bench(model: Model, stage: Stage) -> Bench:
    return Bench(model, stage)


def chat(text: str, max_tokens: int = 24, **sampling: float) -> GenerationRequest:
    messages = (ChatMessage(Role.SYSTEM, "You are a helpful AI assistant."), ChatMessage(Role.USER, text))
    return GenerationRequest(messages=messages, max_tokens=max_tokens, sampling=Sampling(**({"temperature": 0.0} | sampling)))  # type: ignore[arg-type]


def completion(text: str, max_tokens: int = 24, **sampling: float) -> GenerationRequest:
    return GenerationRequest(prompt=text, max_tokens=max_tokens, sampling=Sampling(**({"temperature": 0.0} | sampling)))  # type: ignore[arg-type]


def test_the_capital_of_france(bench: Bench) -> None:
    answer = bench.answer(chat("What is the capital of France?", 64))
    assert "Paris" in answer.text
    assert answer.end is not None and answer.end.reason is FinishReason.STOP
    assert answer.end.completion_tokens == len(answer.tokens) < 64


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_company_changes_no_answer(bench: Bench, temperature: float) -> None:
    requests = [completion(f"Tell me about {topic}:", 16, temperature=temperature, seed=n) for n, topic in enumerate(TOPICS)]
    alone = [bench.answer(request) for request in requests]
    together = [bench.start(request, SALT) for request in requests]
    bench.drain()
    assert [bench.answers[n].tokens for n in together] == [answer.tokens for answer in alone]
    assert len({tuple(answer.tokens) for answer in alone}) > 5


@pytest.mark.parametrize("temperature", [0.0, 1.1])
@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_resumed_answer_equals_the_undisturbed_one(bench: Bench, temperature: float, cut: int) -> None:
    request = replace(chat("Write about the sea.", 20, temperature=temperature, seed=3, presence_penalty=0.4), stop=(" the ",))
    request = replace(request, stop=())
    whole = bench.answer(request)
    resumed = bench.answer(replace(request, resume=pack_tokens(whole.tokens[:cut])))
    assert whole.tokens[:cut] + resumed.tokens == whole.tokens
    assert whole.text.endswith(resumed.text) and len(resumed.text) < len(whole.text)
    assert resumed.end is not None and whole.end is not None
    assert resumed.end.completion_tokens == whole.end.completion_tokens
    assert resumed.end.prompt_tokens == whole.end.prompt_tokens


def test_held_back_text_is_sent_by_the_one_who_resumes(bench: Bench) -> None:
    """A stop string that began before the cut is recognised behind it."""
    request = completion("1 2 3 4 5 6 7 8", 24)
    plain = bench.answer(request)
    stop = plain.text[6:12]
    request = replace(request, stop=(stop,))
    whole = bench.answer(request)
    assert whole.text == plain.text[: plain.text.index(stop)] and whole.end is not None
    assert whole.end.reason is FinishReason.STOP
    for cut in range(1, len(whole.tokens)):
        resumed = bench.answer(replace(request, resume=pack_tokens(whole.tokens[:cut])))
        assert whole.text.endswith(resumed.text)
        assert whole.tokens[:cut] + resumed.tokens == whole.tokens


def test_an_answer_that_was_whole_already_ends_at_once(bench: Bench) -> None:
    request = chat("Write about the sea.", 6)
    whole = bench.answer(request)
    resumed = bench.answer(replace(request, resume=pack_tokens(whole.tokens)))
    assert resumed.tokens == [] and resumed.end is not None
    assert resumed.end.reason is FinishReason.LENGTH and resumed.end.completion_tokens == 6


def test_the_next_turn_reuses_the_prefix_under_the_same_salt_only(bench: Bench) -> None:
    first = completion("A long story about an island begins like this: the people", 12)
    told = bench.answer(first, SALT)
    longer = completion(first.prompt + told.text + " And then", 12)
    fresh = bench.answer(longer, b"")
    stranger = bench.answer(longer, b"other account")
    reused = bench.answer(longer, SALT)
    assert fresh.cached_tokens == stranger.cached_tokens == 0
    assert reused.cached_tokens >= len(told.tokens)
    assert reused.tokens == fresh.tokens == stranger.tokens
    assert reused.end is not None and reused.end.cached_tokens == reused.cached_tokens


def test_who_comes_in_a_crowd_shares_the_beginning_that_is_the_same(bench: Bench) -> None:
    opening = "You are a lighthouse keeper who answers all questions at length and with great patience. " * 3
    requests = [completion(opening + topic, 6) for topic in TOPICS]
    alone = [bench.answer(request).tokens for request in requests]
    crowd = [bench.start(request, SALT) for request in requests]
    bench.drain()
    assert [bench.answers[n].tokens for n in crowd] == alone
    cached = [bench.answers[n].cached_tokens for n in crowd]
    assert cached[0] == 0 and min(cached[2:]) >= 40, cached


def test_a_conversation_is_put_back_from_the_shelf(bench: Bench) -> None:
    first = completion("A long story about an island begins like this: the people " * 3, 12)
    told = bench.answer(first, SALT)
    longer = completion(first.prompt + told.text + " And then", 12)
    fresh = bench.answer(longer)
    bench.engine.tidy()
    assert bench.stage.context.length(0) == 0, "nothing lingers in the cells"
    stranger = bench.answer(longer, b"other account")
    assert stranger.cached_tokens == 0 and bench.shelf.statistics().found_total == 0
    restored = bench.answer(longer, SALT)
    assert bench.shelf.statistics().found_total == 1
    assert restored.cached_tokens >= len(told.tokens) + 30
    assert restored.tokens == fresh.tokens == stranger.tokens


def test_a_prefix_that_finds_no_room_is_computed_anew(model: Model, stage: Stage) -> None:
    bench = Bench(model, stage, cells=256, slots=2)
    text = "Here is a conversation of some length. " * 12
    told = bench.answer(completion(text, 100), SALT)
    bench.engine.tidy()
    assert told.cached_tokens == 0 and bench.shelf.statistics().put_total == 1
    endless = completion("A story is told here: ", 100)
    bias = tuple((token, -100.0) for token in model.end_tokens())
    blocker = bench.start(replace(endless, sampling=replace(endless.sampling, logit_bias=bias)), b"other account")
    while len(bench.answers[blocker].tokens) < 80:
        bench.step()
    again = bench.start(completion(text[: len(text) // 2], 4), SALT)
    bench.drain()
    assert told.end is not None and bench.answers[blocker].end is not None and bench.answers[again].end is not None
    assert bench.answers[again].cached_tokens == 0 and bench.shelf.statistics().found_total == 0


def test_a_cache_full_of_holes_holds_what_was_put_there(bench: Bench) -> None:
    """Prefixes are shared and forgotten, jobs cancelled; what remains must not read other sequences' cells.

    The next token of a running answer may then lie in a cell before those of earlier ones, and attention adds up in another order: the
    same up to the rounding of 16-bit sums, which is small against the difference that one wrong cell makes.
    """
    request = completion("The lighthouse stood on a rock far out in the sea, and its keeper", 8)
    expected = bench.logits_of(request)
    wrong = bench.logits_of(completion("The lighthouse stood on a rock far out in the sea, and his keeper", 8))
    tolerance = float(np.abs(expected - wrong).mean()) / 4
    chance = random.Random(7)
    running: list[int] = []
    for round_ in range(40):
        text = f"Story {chance.randrange(3)}: " + "word " * chance.randint(1, 90)
        try:
            running.append(bench.start(completion(text, chance.randint(1, 200)), chance.choice([SALT, b"b"])))
        except Refused as refusal:
            assert refusal.code is Code.NO_CAPACITY
        for _ in range(chance.randint(1, 4)):
            bench.step()
        if chance.random() < 0.5:
            bench.engine.cancel(running.pop(chance.randrange(len(running))))
        if round_ % 10 == 5:
            assert np.abs(bench.logits_of(request) - expected).mean() < tolerance
    for number in running:
        bench.engine.cancel(number)
    bench.drain()


def test_a_cancelled_job_gives_everything_back_at_once(bench: Bench) -> None:
    number = bench.start(completion("word " * 600, 400))
    waiting = bench.start(completion("other", 5))
    bench.step()
    assert bench.book.slots_free == SLOTS - 2
    assert bench.engine.cancel(number)
    assert bench.book.slots_free == SLOTS - 1
    assert not bench.engine.cancel(number)
    bench.drain()
    assert bench.answers[waiting].end is not None and bench.answers[number].end is None


def test_jobs_wait_for_room_in_order(model: Model, stage: Stage) -> None:
    bench = Bench(model, stage, cells=256, slots=2)
    jobs = [bench.start(completion(f"Number {n}", 100)) for n in range(4)]
    bench.step()
    assert bench.engine.room().waiting == 2
    bench.drain()
    assert all(bench.answers[n].end is not None for n in jobs)
    with pytest.raises(Refused) as caught:
        bench.start(completion("x", 300))
    assert caught.value.code is Code.CONTEXT_LENGTH


def test_the_queue_is_bounded(model: Model, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.limits.ENGINE_WAITING_MAX", 2)
    bench = Bench(model, stage, cells=256, slots=1)
    for n in range(3):
        bench.start(completion(f"Number {n}", 4))
        bench.engine._admit(Events())
    with pytest.raises(Refused) as caught:
        bench.start(completion("one more", 4))
    assert caught.value.code is Code.NO_CAPACITY


def test_lengths_are_refused_with_figures(bench: Bench) -> None:
    with pytest.raises(Refused, match=r"context length is 2048 tokens; the request has \d+ in its messages and asks for 2000") as caught:
        bench.start(chat("word " * 100, 2000))
    assert caught.value.code is Code.CONTEXT_LENGTH
    with pytest.raises(Refused) as caught:
        bench.start(GenerationRequest(messages=tuple(ChatMessage(Role.USER, "x" * 32_768) for _ in range(128)), max_tokens=10))
    assert caught.value.code is Code.CONTEXT_LENGTH


def test_echo_and_empty_prompts(bench: Bench) -> None:
    request = replace(completion("Once upon a time", 5), echo=True)
    plain, echoed = bench.answer(replace(request, echo=False)), bench.answer(request)
    assert echoed.text == "Once upon a time" + plain.text
    empty = bench.answer(completion("", 3))
    assert empty.end is not None and empty.end.prompt_tokens == 1


def test_stop_strings_end_the_answer_before_them(bench: Bench) -> None:
    plain = bench.answer(completion("1 2 3 4 5 6 7 8 9", 30))
    stop = plain.text[8:11]
    stopped = bench.answer(replace(completion("1 2 3 4 5 6 7 8 9", 30), stop=("never said", stop)))
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.end is not None and stopped.end.reason is FinishReason.STOP


def test_tokens_that_the_model_does_not_have_cannot_be_resumed(bench: Bench) -> None:
    with pytest.raises(Refused) as caught:
        bench.start(replace(completion("x"), resume=pack_tokens([10_000_000])))
    assert caught.value.code is Code.BAD_INPUT
