"""Tasks that answer with places in a text: ``token-classification``, ``question-answering``, and ``fill-mask``.

``start`` and ``end`` count characters (Unicode code points) of the text as it was sent; ``end`` is the first that is no longer part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from protocol.cargo_io import DoneLine, Usage, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.classify import Scores, checked_labels, ranked
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session
from runtimes.onnx.texts import TextModel, softmax

ANSWER_TOKENS_DEFAULT = 30
TOP_MAX = 100
_STRIDE_TOKENS_DEFAULT = 64  # so many tokens of a long context stand in two windows, so that no short answer is cut in two
_QUESTION_CHARS_MAX = 10_000


def states_of(array: Array, rows: int, tokens: int, classes: int, name: str) -> Scores:
    """Raises BrokenJob where an output is not [rows, tokens, classes]."""
    if array.shape != (rows, tokens, classes) or array.dtype.kind != "f":
        raise BrokenJob(f"the model's {name} has shape {array.shape}; it must be ({rows}, {tokens}, {classes}) of floats")
    return array.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Entity:
    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Tagged:
    """A word, or a token that is none, with its tag. Scores of 0 to 1."""

    tag: str
    score: float
    start: int
    end: int


def tag_words(row: Encoding, probabilities: Scores, labels: Sequence[str]) -> list[Tagged]:
    """A word has the tag of its first token, as such models are trained; tokens without a word (special ones) are left out."""
    words: list[Tagged] = []
    last: int | None = None
    for place, (word, (start, end)) in enumerate(zip(row.word_ids, row.offsets, strict=True)):
        if word is None or start == end:
            continue
        if word == last:
            words[-1] = Tagged(words[-1].tag, words[-1].score, words[-1].start, end)
            continue
        best = int(np.argmax(probabilities[place]))
        words.append(Tagged(labels[best], float(probabilities[place, best]), start, end))
        last = word
    return words


def join_tags(words: Sequence[Tagged], outside: str) -> list[Entity]:
    """B-X begins an entity, I-X goes on with one of X or begins it; a tag without prefix counts as I-. The score is the words' mean."""
    entities: list[Entity] = []
    scores: list[float] = []
    previous = outside
    for word in words:
        label = word.tag[2:] if word.tag[:2] in ("B-", "I-") else word.tag
        if word.tag == outside:
            previous = outside
            continue
        if label == previous and not word.tag.startswith("B-"):
            scores.append(word.score)
            entities[-1] = Entity(label, sum(scores) / len(scores), entities[-1].start, word.end)
        else:
            scores = [word.score]
            entities.append(Entity(label, word.score, word.start, word.end))
        previous = label
    return entities


@dataclass(frozen=True, slots=True)
class TokenClassification:
    task: str
    model: TextModel
    output: str
    labels: tuple[str, ...]
    outside: str

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("text", "input"))
        text = fields.text(job.fields, "text", "input")
        (row,) = self.model.encode([text], fast=False)
        job.check()
        (states,) = self.model.session.run(self.model.arrays([row]), [self.output])
        logits = states_of(states, 1, len(row.ids), len(self.labels), self.output)
        entities = join_tags(tag_words(row, softmax(logits[0]), self.labels), self.outside)
        return done(self._result(text, entities) | {"truncated": bool(row.overflowing)}, Usage(len(row.ids), 0))

    def _result(self, text: str, entities: Sequence[Entity]) -> dict[str, object]:
        """``label``, ``score``: of the surest entity; ``scores``: the surest of each label."""
        found = [{"label": e.label, "score": e.score, "start": e.start, "end": e.end, "text": text[e.start : e.end]} for e in entities]
        scores: dict[str, float] = {}
        for entity in sorted(entities, key=lambda entity: -entity.score):
            scores.setdefault(entity.label, entity.score)
        label = next(iter(scores), None)
        score = scores[label] if label is not None else 0.0
        return {"entities": found, "count": len(found), "label": label, "score": score, "scores": scores, "task": self.task}


@dataclass(frozen=True, slots=True)
class Answer:
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class QuestionAnswering:
    """The likeliest span of the context (Devlin et al., "BERT", 4.2). A long context is read in windows that overlap."""

    task: str
    model: TextModel
    outputs: tuple[str, str]
    answer_tokens: int
    may_have_none: bool

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("question", "context"))
        question, context = fields.text(job.fields, "question"), fields.text(job.fields, "context")
        if len(question) > _QUESTION_CHARS_MAX:
            raise BadJob(f"question has {len(question)} characters; at most {_QUESTION_CHARS_MAX} are allowed")
        rows = self._windows(question, context)
        best = Answer(-1.0, 0, 0)
        for places, arrays in self.model.batches(rows, job.check):
            starts, ends = self.model.session.run(arrays, list(self.outputs))
            shape = arrays["input_ids"].shape
            if starts.shape != shape or ends.shape != shape:
                raise BrokenJob(f"the model's outputs have shapes {starts.shape} and {ends.shape}; they must be {shape}")
            for index, place in enumerate(places):
                found = best_span(rows[place], starts[index], ends[index], self.answer_tokens, self.may_have_none)
                best = max(best, found, key=lambda answer: answer.score)
        usage = Usage(sum(len(row.ids) for row in rows), 0)
        span = {"answer": context[best.start : best.end], "score": best.score, "start": best.start, "end": best.end}
        return done(span | {"task": self.task}, usage)

    def _windows(self, question: str, context: str) -> list[Encoding]:
        try:
            row = self.model.tokenizer.encode(question, context)
        except Exception:  # the library raises no narrower one where the question alone leaves no room
            raise BadJob(f"question is too long for the {self.model.max_tokens} tokens that this model takes") from None
        if row.overflowing and self.model.refuses_long:
            raise BadJob(f"context has more than the {self.model.max_tokens} tokens that this model takes; send it in parts")
        return [row, *row.overflowing]


def best_span(row: Encoding, starts: Array, ends: Array, most: int, may_have_none: bool) -> Answer:
    """Of one window. Probabilities are over the context's tokens and, where an answer may be missing, the first token."""
    inside = np.array([sequence == 1 for sequence in row.sequence_ids])
    if not inside.any():
        return Answer(0.0, 0, 0)
    taken = inside.copy()
    taken[0] |= may_have_none
    length = len(inside)
    p_start, p_end = (softmax(np.where(taken, each[:length].astype(np.float32), -np.inf)) for each in (starts, ends))
    table = np.triu(np.outer(p_start, p_end)) - np.triu(np.outer(p_start, p_end), most)
    table[~inside] = 0.0
    first, last = divmod(int(np.argmax(table)), length)
    if not np.isfinite(table).all():
        raise BrokenJob("the model gave scores that are not finite numbers")
    if may_have_none and p_start[0] * p_end[0] >= table[first, last]:
        return Answer(float(p_start[0] * p_end[0]), 0, 0)
    return Answer(float(table[first, last]), row.offsets[first][0], row.offsets[last][1])


@dataclass(frozen=True, slots=True)
class FillMask:
    task: str
    model: TextModel
    output: str
    mask: str
    mask_id: int

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("text", "input", "top_k"))
        text = fields.text(job.fields, "text", "input")
        most = fields.integer(job.fields, "top_k", 5, 1, TOP_MAX)
        (row,) = self.model.encode([text], fast=False)
        places = [place for place, token in enumerate(row.ids) if token == self.mask_id]
        if len(places) != 1 or text.count(self.mask) != 1:
            raise BadJob(f"text must have {self.mask} once, within the first {self.model.max_tokens} tokens")
        job.check()
        (states,) = self.model.session.run(self.model.arrays([row]), [self.output])
        words = self.model.tokenizer.get_vocab_size()
        if states.ndim != 3 or states.shape[:2] != (1, len(row.ids)) or states.shape[2] < most:
            raise BrokenJob(f"the model's {self.output} has shape {states.shape}; it must be (1, {len(row.ids)}, {words}) of floats")
        return done(self._result(text, softmax(states[0, places[0]]), most), Usage(len(row.ids), 0))

    def _result(self, text: str, scores: npt.NDArray[np.float32], most: int) -> dict[str, object]:
        best = [int(token) for token in np.argsort(-scores, kind="stable")[:most]]
        names = [self.model.tokenizer.decode([token]).strip() or f"[{token}]" for token in best]
        unique = list(dict.fromkeys(names))
        kept = np.array([scores[best[names.index(name)]] for name in unique], np.float32)
        return ranked(unique, kept) | {"sequence": text.replace(self.mask, unique[0]), "task": self.task}


def open_token_classification(task: str, session: Session, options: OptionReader, model: TextModel) -> TokenClassification:
    """Reads the options of labels and ``outside``. Raises ConfigError."""
    labels = checked_labels(options.labels(session.metadata), session)
    return TokenClassification(task, model, next(iter(session.outputs)), labels, options.text("outside", "O"))


def open_question_answering(task: str, session: Session, options: OptionReader, model: TextModel) -> QuestionAnswering:
    """Reads options ``start_output``, ``end_output``, ``answer_tokens``, ``no_answer``, ``stride``. Raises ConfigError."""
    names = [*session.outputs, "", ""]
    outputs = options.text("start_output", _named(names, "start", 0)), options.text("end_output", _named(names, "end", 1))
    if outputs[0] == outputs[1] or not set(outputs) <= set(session.outputs):
        raise ConfigError("question-answering needs a model with two outputs, of starts and of ends")
    stride = options.integer("stride", min(_STRIDE_TOKENS_DEFAULT, model.max_tokens // 4), 0, model.max_tokens // 2)
    model.tokenizer.enable_truncation(model.max_tokens, stride=stride, strategy="only_second")
    most = options.integer("answer_tokens", ANSWER_TOKENS_DEFAULT, 1, 1000)
    return QuestionAnswering(task, model, outputs, most, options.flag("no_answer", False))


def _named(names: Sequence[str], part: str, default: int) -> str:
    return next((name for name in names if part in name), names[default])


def open_fill_mask(task: str, session: Session, options: OptionReader, model: TextModel) -> FillMask:
    """Reads option ``mask_token``. Raises ConfigError."""
    mask = options.text("mask_token", "[MASK]")
    token = model.tokenizer.token_to_id(mask)
    if token is None:
        raise ConfigError(f"option mask_token names {mask}, which the tokenizer does not know")
    return FillMask(task, model, next(iter(session.outputs)), mask, token)
