"""``text-recognition``: the text of a line in a picture, from models whose output is read by CTC.

The model gives, for each column, how likely each character is, or that there is none (the blank). The likeliest of each column is taken,
repeats fall together, blanks fall out (Graves et al., "Connectionist Temporal Classification", ICML 2006, best path decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from protocol.cargo_io import DoneLine, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.classify import activate
from runtimes.onnx.images import Preparation, only_input, open_preparation, read_image
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session

WIDTH_MAX = 4096  # of a line at the model's height
LINES_MAX = 64
_METADATA_KEY = "character"  # where PaddleOCR's exports keep theirs


def decode_columns(scores: npt.NDArray[np.float32], characters: Sequence[str], blank: int) -> tuple[str, float]:
    """``scores``: [columns, classes]. The text, and the mean probability of the columns that gave its characters (0 for an empty text)."""
    best = scores.argmax(axis=1)
    begins = np.concatenate(([True], best[1:] != best[:-1])) & (best != blank)
    places = np.flatnonzero(begins)
    text = "".join(characters[number] for number in best[places])
    return text, float(scores[places, best[places]].mean()) if len(places) else 0.0


@dataclass(frozen=True, slots=True)
class TextRecognition:
    """``characters``: by class; the blank's place holds an empty text. ``width_min``: narrower lines are filled up with zeros."""

    task: str
    session: Session
    input: str
    output: str
    preparation: Preparation
    characters: tuple[str, ...]
    blank: int
    width_min: int
    activation: str

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("image", "images"))
        many = job.fields.get("images")
        if many is None:
            text, score = self._read(read_image(job.fields))
            return done({"text": text, "score": score, "task": self.task})
        if not isinstance(many, list) or not 1 <= len(many) <= LINES_MAX or job.fields.get("image") is not None:
            raise BadJob(f"images must be a list of 1 to {LINES_MAX} pictures in base64, without image")
        results = []
        for each in many:
            job.check()
            text, score = self._read(read_image({"images": each}, "images"))
            results.append({"text": text, "score": score})
        lines = "\n".join(str(result["text"]) for result in results)
        return done({"text": lines, "results": results, "count": len(results), "task": self.task})

    def _read(self, image: Image.Image) -> tuple[str, float]:
        (scores,) = self.session.run({self.input: self._array(image)}, [self.output])
        classes = len(self.characters)
        if scores.ndim != 3 or scores.shape[0] != 1 or scores.shape[2] != classes or not scores.shape[1] or scores.dtype.kind != "f":
            raise BrokenJob(f"the model's {self.output} has shape {scores.shape}; it must be (1, columns, {classes}) of floats")
        found = activate(scores[0], self.activation)
        if not np.isfinite(found).all():
            raise BrokenJob("the model gave scores that are not finite numbers")
        return decode_columns(found, self.characters, self.blank)

    def _array(self, image: Image.Image) -> Array:
        """The line at the model's height, as wide as it then is."""
        height = self.preparation.height
        width = max(1, min(WIDTH_MAX, round(image.width * height / image.height)))
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        values = self.preparation.values(pixels)
        columns = 1 if self.preparation.is_last else 2
        missing = max(0, self.width_min - width)
        pads = [(0, missing if axis == columns else 0) for axis in range(3)]
        return np.pad(values, pads)[None]


def open_text_recognition(task: str, session: Session, options: OptionReader) -> TextRecognition:
    """Reads the options of pictures and labels, and ``blank``, ``space``, ``width_min``, ``activation``. Raises ConfigError."""
    port = only_input(session.inputs)
    width_min = options.integer("width_min", 320, 1, WIDTH_MAX)
    if port.shape[2:] and port.shape[-1] not in (None, 3):
        raise ConfigError(f"the model's {port.name} has shape {port.shape_text}; lines of text need a width that may vary")
    preparation = open_preparation(port, options, "stretch", width_min)
    output = next(iter(session.outputs))
    classes = (*session.outputs[output].shape, None, None, None)[2]
    characters = options.labels(session.metadata, _METADATA_KEY)
    space = options.flag("space", True)
    if not characters or classes is None:
        raise ConfigError("text-recognition needs labels, the model's characters, and a model that says how many classes it has")
    blank = options.integer("blank", 0, 0, classes - 1)
    table = [*characters, " "] if space else list(characters)
    table.insert(blank, "")
    if len(table) != classes:
        and_space = " and the space" if space else ""
        raise ConfigError(f"there are {len(table)} characters with the blank{and_space}, and the model has {classes}")
    return TextRecognition(
        task, session, port.name, output, preparation, tuple(table), blank, width_min, options.choice("activation", ("none", "softmax"))
    )
