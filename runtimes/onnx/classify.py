"""``text-classification`` and ``zero-shot-classification``: a label with its probability, and those of all labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.cargo_io import DoneLine, Usage, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Session
from runtimes.onnx.texts import TextModel, sigmoid, softmax

Scores = npt.NDArray[np.float32]

ZERO_SHOT_LABELS_MAX = 100
ACTIVATIONS = ("softmax", "sigmoid", "none")


def activate(logits: Scores, activation: str) -> Scores:
    """Probabilities along the last axis; ``none``: the model gives them itself."""
    if activation == "softmax":
        return softmax(logits)
    return sigmoid(logits) if activation == "sigmoid" else logits.astype(np.float32)


def ranked(labels: Sequence[str], scores: Scores, most: int = 1000) -> dict[str, object]:
    """``label``, ``score`` and ``scores``, the best first; among equals the earlier label."""
    if not np.isfinite(scores).all():
        raise BrokenJob("the model gave scores that are not finite numbers")
    order = np.argsort(-scores, kind="stable")[:most]
    named = {labels[place]: float(scores[place]) for place in order}
    return {"label": labels[order[0]], "score": float(scores[order[0]]), "scores": named}


def checked_labels(labels: tuple[str, ...], session: Session, axis: int = -1) -> tuple[str, ...]:
    """Those of the manifest, or LABEL_0, …; they have to be as many as the model's first output has classes. Raises ConfigError."""
    port = next(iter(session.outputs.values()))
    classes = port.shape[axis] if port.shape else None
    if not labels and classes is None:
        raise ConfigError("option labels is missing, and the model does not say how many classes it has")
    named = labels or tuple(f"LABEL_{index}" for index in range(classes or 0))
    if not named or (classes is not None and len(named) != classes):
        raise ConfigError(f"there are {len(named)} labels, and the model has {classes} classes")
    if len(set(named)) != len(named):
        raise ConfigError("option labels has a label twice")
    return named


def classes_of(logits: npt.NDArray[np.generic], rows: int, classes: int) -> Scores:
    """Raises BrokenJob where the model's first output is not [rows, classes]."""
    if logits.shape != (rows, classes) or logits.dtype.kind != "f":
        raise BrokenJob(f"the model gave shape {logits.shape} of {logits.dtype}; it must be ({rows}, {classes}) of floats")
    return logits.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class TextClassification:
    task: str
    model: TextModel
    output: str
    labels: tuple[str, ...]
    activation: str

    def run(self, job: LineJob) -> DoneLine:
        """For a list ``results`` has what one text has directly."""
        fields.only(job.fields, ("text", "input"))
        texts, is_one = fields.texts(job.fields, "text", "input")
        rows = self.model.encode(texts)
        scores = np.empty((len(rows), len(self.labels)), np.float32)
        for places, arrays in self.model.batches(rows, job.check):
            (logits,) = self.model.session.run(arrays, [self.output])
            scores[places] = classes_of(logits, len(places), len(self.labels))
        made = [ranked(self.labels, activate(row, self.activation)) for row in scores]
        result: Mapping[str, object] = made[0] if is_one else {"results": made, "count": len(made)}
        return done({**result, "task": self.task}, Usage(sum(len(row.ids) for row in rows), 0))


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """A model of inference (NLI): how well a text entails "This example is {label}.". ``contradiction`` -1: the model has no such class.

    Source: Yin, Hay, Roth, "Benchmarking Zero-shot Text Classification", EMNLP 2019.
    """

    task: str
    model: TextModel
    output: str
    classes: int
    entailment: int
    contradiction: int
    template: str

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("text", "input", "labels", "candidate_labels", "multi_label"))
        text = fields.text(job.fields, "text", "input")
        name = "candidate_labels" if job.fields.get("candidate_labels") is not None else "labels"
        labels = fields.labels(job.fields, name, ZERO_SHOT_LABELS_MAX)
        alone = fields.flag(job.fields, "multi_label", False) or len(labels) == 1
        rows = self.model.encode_pairs([(text, self.template.replace("{}", label)) for label in labels])
        logits = np.empty((len(rows), self.classes), np.float32)
        for places, arrays in self.model.batches(rows, job.check):
            (found,) = self.model.session.run(arrays, [self.output])
            logits[places] = classes_of(found, len(places), self.classes)
        result = ranked(labels, self._scores(logits, alone))
        return done({**result, "task": self.task}, Usage(sum(len(row.ids) for row in rows), 0))

    def _scores(self, logits: Scores, alone: bool) -> Scores:
        """``alone``: each label against its own contradiction; else all labels against one another."""
        entailed = logits[:, self.entailment]
        if not alone:
            return softmax(entailed)
        return sigmoid(entailed - logits[:, self.contradiction] if self.contradiction >= 0 else entailed)


def open_text_classification(task: str, session: Session, options: OptionReader, model: TextModel) -> TextClassification:
    """Reads the options of labels and ``activation``. Raises ConfigError."""
    labels = checked_labels(options.labels(session.metadata), session)
    return TextClassification(task, model, next(iter(session.outputs)), labels, options.choice("activation", ACTIVATIONS))


def open_zero_shot(task: str, session: Session, options: OptionReader, model: TextModel) -> ZeroShot:
    """Reads the options of labels and ``hypothesis_template``. Raises ConfigError."""
    lower = [label.lower() for label in checked_labels(options.labels(session.metadata), session)]
    entailment = [index for index, label in enumerate(lower) if label.startswith("entail")]
    contradiction = [index for index, label in enumerate(lower) if label.startswith(("contradict", "not_entail", "not-entail"))]
    if len(entailment) != 1:
        raise ConfigError("zero-shot-classification needs labels of which one begins with entail")
    template = options.text("hypothesis_template", "This example is {}.")
    if "{}" not in template:
        raise ConfigError("option hypothesis_template has no {} where the label goes")
    return ZeroShot(task, model, next(iter(session.outputs)), len(lower), entailment[0], (*contradiction, -1)[0], template)
