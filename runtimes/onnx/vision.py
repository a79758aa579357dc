"""``image-classification`` and ``image-segmentation``."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from protocol import limits
from protocol.cargo_io import DoneLine, ImageLine, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.classify import ACTIVATIONS, activate, checked_labels, classes_of, ranked
from runtimes.onnx.images import Placement, Preparation, only_input, open_preparation, read_image
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session

TOP_MAX = 1000
CLASSES_MAX = 256  # a mask has one byte a pixel
_ROOM_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ImageClassification:
    task: str
    session: Session
    input: str
    output: str
    preparation: Preparation
    labels: tuple[str, ...]
    activation: str

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("image", "top_k"))
        most = fields.integer(job.fields, "top_k", 5, 1, TOP_MAX)
        array, _ = self.preparation.array(read_image(job.fields))
        job.check()
        (logits,) = self.session.run({self.input: array}, [self.output])
        scores = activate(classes_of(logits, 1, len(self.labels))[0], self.activation)
        return done(ranked(self.labels, scores, most) | {"task": self.task})


@dataclass(frozen=True, slots=True)
class ImageSegmentation:
    """The result says how much of the picture each class has; the mask itself comes before it as a picture of the job's size, one byte a
    pixel: the number of the class, or 255 and 0 where there is one class only."""

    task: str
    session: Session
    input: str
    output: str
    preparation: Preparation
    labels: tuple[str, ...]
    activation: str
    threshold: float

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("image", "threshold"))
        threshold = fields.number(job.fields, "threshold", self.threshold, 0.0, 1.0)
        image = read_image(job.fields)
        array, placement = self.preparation.array(image)
        job.check()
        (maps,) = self.session.run({self.input: array}, [self.output])
        if maps.ndim != 4 or maps.shape[0] != 1 or maps.dtype.kind != "f" or not 1 <= maps.shape[1] <= CLASSES_MAX or not maps.size:
            raise BrokenJob(f"the model's {self.output} has shape {maps.shape}; it must be (1, 1 to {CLASSES_MAX}, height, width)")
        classes = int(maps.shape[1])
        mask = mask_of(maps[0], classes, self.activation, threshold)
        sized = unplaced(mask, placement, image.size, array.shape[1:3] if self.preparation.is_last else array.shape[2:4])
        job.say(_mask_line(sized))
        facts = {"output_shape": list(maps.shape), "num_classes": classes, "original_size": list(image.size)}
        return done(facts | {"shares": self._shares(sized, classes), "task": self.task})

    def _shares(self, mask: npt.NDArray[np.uint8], classes: int) -> dict[str, float]:
        """Of the picture's pixels, by class; classes that are not there are left out."""
        counts = np.bincount(mask.ravel(), minlength=256) / mask.size
        if classes == 1:
            return {self.labels[0] if self.labels else "foreground": float(counts[255])}
        names = self.labels if len(self.labels) == classes else [f"LABEL_{index}" for index in range(classes)]
        return {name: float(share) for name, share in zip(names, counts[:classes], strict=True) if share}


def mask_of(maps: Array, classes: int, activation: str, threshold: float) -> npt.NDArray[np.uint8]:
    """Of [classes, height, width]: which class is the largest; of one class where it is above the threshold."""
    if classes > 1:
        numbers: npt.NDArray[np.uint8] = maps.argmax(axis=0).astype(np.uint8)
        return numbers
    values = activate(maps[0], "none" if activation == "none" else "sigmoid")
    return np.where(values > threshold, 255, 0).astype(np.uint8)


def unplaced(mask: npt.NDArray[np.uint8], placed: Placement, size: tuple[int, int], inputs: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The mask at the picture's ``size`` (width, height): each pixel takes the nearest one of the model's ``inputs`` (height, width);
    what was cropped away takes the edge's."""
    width, height = size
    grid = mask.shape[0] / inputs[0], mask.shape[1] / inputs[1]
    rows = ((np.arange(height) + 0.5) * placed.scale_y + placed.top) * grid[0]
    columns = ((np.arange(width) + 0.5) * placed.scale_x + placed.left) * grid[1]
    nearest = (np.clip(at.astype(np.int64), 0, side - 1) for at, side in zip((rows, columns), mask.shape, strict=True))
    found: npt.NDArray[np.uint8] = mask[np.ix_(*nearest)]
    return found


def _mask_line(mask: npt.NDArray[np.uint8]) -> ImageLine:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if len(data) > limits.CARGO_LINE_BYTES_MAX - _ROOM_BYTES:
        raise BadJob("the mask of this picture is larger than one answer holds; send a smaller picture")
    return ImageLine(data, "png", mask.shape[1], mask.shape[0])


def open_image_classification(task: str, session: Session, options: OptionReader) -> ImageClassification:
    """Reads the options of pictures and labels, and ``activation``. Raises ConfigError."""
    port = only_input(session.inputs)
    preparation = open_preparation(port, options, "crop")
    labels = checked_labels(options.labels(session.metadata), session)
    output = next(iter(session.outputs))
    return ImageClassification(task, session, port.name, output, preparation, labels, options.choice("activation", ACTIVATIONS))


def open_image_segmentation(task: str, session: Session, options: OptionReader) -> ImageSegmentation:
    """Reads the options of pictures and labels, ``activation`` (sigmoid or none, for one class) and ``threshold``. Raises ConfigError."""
    port = only_input(session.inputs)
    preparation = open_preparation(port, options, "stretch")
    labels = options.labels(session.metadata)
    output = next(iter(session.outputs))
    classes = (*session.outputs[output].shape, None, None)[1]
    if labels and classes is not None and len(labels) != classes:
        raise ConfigError(f"there are {len(labels)} labels, and the model has {classes} classes")
    activation, threshold = options.choice("activation", ("sigmoid", "none")), options.number("threshold", 0.5, 0.0, 1.0)
    return ImageSegmentation(task, session, port.name, output, preparation, labels, activation, threshold)
