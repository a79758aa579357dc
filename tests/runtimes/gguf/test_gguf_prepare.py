"""From requests to jobs: what is refused, with which figures, before anything is computed."""

from __future__ import annotations

from typing import Any, cast

import pytest

from protocol.errors import Code, Refused
from protocol.generation import ChatMessage, FinishReason, GenerationRequest, Role, Sampling, pack_tokens
from runtimes.gguf.llama import Model
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.template import ChatTemplate

CONTROL = "<|a control token with a long name|>"


class Letters:
    """A vocabulary: a and b, an end and a control token, which have no text in an answer."""

    n_vocab = 4

    def __init__(self, bos: int = -1) -> None:
        self._bos = bos

    def piece(self, token: int) -> bytes:
        return (b"a", b"b", b"", b"")[token]

    def special_text(self, token: int) -> str:
        return ("a", "b", "<end>", CONTROL)[token] if token >= 0 else ""

    def end_tokens(self) -> frozenset[int]:
        return frozenset({2})

    def bos(self) -> int:
        return self._bos

    def adds_bos(self) -> bool:
        return self._bos >= 0

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        letters = text.replace(CONTROL, "c")
        return ([self._bos] if add_special and self._bos >= 0 else []) + ["abec".index(letter) for letter in letters]


def preparer(model: Letters | None = None, template: str = "{{ messages[0].content }}") -> Preparer:
    return Preparer(cast(Model, model or Letters()), ChatTemplate(template) if template else None, context_tokens=10)


def completion(prompt: str, max_tokens: int = 1, **options: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_tokens=max_tokens, sampling=Sampling(temperature=0.0), **options)


def test_exact_lengths_are_taken_and_one_token_more_is_not() -> None:
    assert preparer().job(1, completion("ab" * 4, 2), b"", "").declared == 10
    with pytest.raises(Refused, match="is 10 tokens; the request has 8 in its messages and asks for 3") as caught:
        preparer().job(1, completion("ab" * 4, 3), b"", "")
    assert caught.value.code is Code.CONTEXT_LENGTH


def test_what_is_certainly_too_long_is_refused_untokenized() -> None:
    class Untouchable(Letters):
        def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
            raise AssertionError

    with pytest.raises(Refused, match="the request has at least 27 in its messages") as caught:
        preparer(Untouchable()).job(1, completion("a" * 27 * len(CONTROL)), b"", "")
    assert caught.value.code is Code.CONTEXT_LENGTH


def test_control_tokens_in_a_prompt_are_long_text_and_one_token() -> None:
    assert preparer().job(1, completion(CONTROL * 9), b"", "").tokens == [3] * 9


def test_a_chat_has_one_beginning() -> None:
    class Twice(Letters):
        def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
            return [self._bos, *super().tokenize(text, add_special, parse_special)]

    request = GenerationRequest(messages=(ChatMessage(Role.USER, "ab"),), max_tokens=1)
    assert preparer(Letters(bos=3)).job(1, request, b"", "").tokens == [3, 0, 1]
    assert preparer(Twice(bos=3)).job(1, request, b"", "").tokens == [3, 0, 1]


def test_an_empty_prompt_begins_with_the_beginning() -> None:
    class Bare(Letters):
        def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
            return []

    assert preparer(Bare(bos=3)).job(1, completion(""), b"", "").tokens == [3]
    with pytest.raises(Refused, match="the prompt is empty") as caught:
        preparer(Bare()).job(1, completion(""), b"", "")
    assert caught.value.code is Code.BAD_INPUT


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (GenerationRequest(messages=(ChatMessage(Role.USER, "ab"),), max_tokens=1), "no chat template; ask it through /v1/completions"),
        (completion("a", 5, resume=pack_tokens([4])), "tokens that this model does not have"),
        (completion("a", 5, resume=pack_tokens([-1])), "tokens that this model does not have"),
        (completion("€" * 25_000, echo=True), "cannot be echoed; ask without echo"),
    ],
)
def test_what_cannot_be_done_is_refused(request_: GenerationRequest, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence) as caught:
        preparer(template="").job(1, request_, b"", "")
    assert caught.value.code is Code.BAD_INPUT


def test_a_resumed_job_has_seen_what_was_delivered() -> None:
    prepare = preparer()
    job = prepare.job(1, completion("a", 5, resume=pack_tokens([0, 1]), stop=("bb",), echo=True), b"", "")
    assert (job.tokens, job.prompt_tokens, job.made, job.resumed, job.echo) == ([0, 0, 1], 1, 2, 2, "")
    assert job.text.feed(b"b") == "" and job.text.stopped, "the stop string began before the cut"
    assert prepare.finished(prepare.job(1, completion("a", 5), b"", "")) is None


@pytest.mark.parametrize(
    ("resume", "stop", "reason"),
    [([0, 1, 0], (), FinishReason.LENGTH), ([0, 2], (), FinishReason.STOP), ([1, 1], ("bb",), FinishReason.STOP), ([1, 1], (), None)],
)
def test_an_answer_that_is_whole_is_finished_without_computing(
    resume: list[int], stop: tuple[str, ...], reason: FinishReason | None
) -> None:
    prepare = preparer()
    done = prepare.finished(prepare.job(7, completion("a", 3, resume=pack_tokens(resume), stop=stop), b"", ""))
    assert (done.reason if done else None) == reason
    if done:
        assert (done.job, done.prompt_tokens, done.completion_tokens, done.text) == (7, 1, len(resume), "")
