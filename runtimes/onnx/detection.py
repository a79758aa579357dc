"""``object-detection``: boxes with labels, from models of YOLO's forms and from those that give boxes, scores and classes apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from protocol.cargo_io import DoneLine, done
from protocol.errors import ConfigError
from runtimes.lines.engine import BrokenJob, LineJob
from runtimes.onnx import fields
from runtimes.onnx.images import Placement, Preparation, only_input, open_preparation, read_image
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session

DETECTIONS_MAX = 1000
CANDIDATES_MAX = 5000  # of the highest score, before overlapping ones are left out
_CLASS_NUMBERS_MAX = 100_000

Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidates:
    """``boxes``: [n, 4] as x1, y1, x2, y2 in pixels of the model's input; ``scores``: [n]; ``classes``: [n]."""

    boxes: Boxes
    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]

    def taken(self, places: npt.NDArray[np.int64]) -> Candidates:
        return Candidates(self.boxes[places], self.scores[places], self.classes[places])


def corners(boxes: Boxes) -> Boxes:
    """From middle and size (cx, cy, w, h) to corners."""
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate((middle - half, middle + half), axis=1)


def of_yolo(output: Array, has_objectness: bool) -> Candidates:
    """``yolov8``: [1, 4 + classes, n]; ``yolov5``: [1, n, 5 + classes], whose fifth number is how sure it is that there is anything.

    Raises BrokenJob. Sources: https://docs.ultralytics.com/models/yolov8 and /yolov5, outputs of their ONNX exports.
    """
    if output.ndim != 3 or output.shape[0] != 1 or output.dtype.kind != "f":
        raise BrokenJob(f"the model gave shape {output.shape}; a YOLO model gives (1, numbers, boxes) or (1, boxes, numbers)")
    rows = (output[0] if has_objectness else output[0].T).astype(np.float32)
    first = 5 if has_objectness else 4
    if rows.shape[1] <= first:
        raise BrokenJob(f"the model gave {rows.shape[1]} numbers a box; at least {first + 1} are needed")
    scores = rows[:, first:] * rows[:, 4:5] if has_objectness else rows[:, first:]
    classes = scores.argmax(axis=1)
    return Candidates(corners(rows[:, :4]), scores[np.arange(len(rows)), classes], classes)


def of_parts(boxes: Array, scores: Array, classes: Array, is_middle: bool, scale: tuple[float, float]) -> Candidates:
    """``boxes``: [1, n, 4] or [n, 4]; ``scores`` and ``classes``: [1, n] or [n]. ``scale``: by x and y to pixels. Raises BrokenJob."""
    flat = boxes.reshape(-1, 4) if boxes.size % 4 == 0 and boxes.shape[-1:] == (4,) else None
    if flat is None or scores.size != len(flat) or classes.size != len(flat) or boxes.dtype.kind != "f" or scores.dtype.kind != "f":
        raise BrokenJob(f"the model gave boxes {boxes.shape}, scores {scores.shape}, classes {classes.shape}; they must be of one length")
    floats = flat.astype(np.float32)
    pixels = (corners(floats) if is_middle else floats) * np.array((*scale, *scale), np.float32)
    if classes.dtype.kind not in "iuf" or not np.isfinite(classes).all():
        raise BrokenJob("the model gave classes that are not numbers")
    return Candidates(pixels, scores.reshape(-1).astype(np.float32), classes.reshape(-1).astype(np.int64))


def overlaps(box: Boxes, others: Boxes) -> npt.NDArray[np.float32]:
    """Intersection over union of [4] with each of [n, 4]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    union = np.prod(box[2:] - box[:2]) + areas - shared
    ratio: npt.NDArray[np.float32] = shared / np.maximum(union, np.float32(1e-9))
    return ratio


def best_of(found: Candidates, threshold: float, overlap: float) -> Candidates:
    """Those above the threshold, the best first, each alone of its class in its place (non-maximum suppression, greedy)."""
    above = np.flatnonzero(found.scores > threshold)
    order = above[np.argsort(-found.scores[above], kind="stable")][:CANDIDATES_MAX]
    kept: list[int] = []
    while len(order) and len(kept) < DETECTIONS_MAX:
        first, rest = int(order[0]), order[1:]
        kept.append(first)
        same = found.classes[rest] == found.classes[first]
        order = rest[~(same & (overlaps(found.boxes[first], found.boxes[rest]) > overlap))]
    return found.taken(np.array(kept, np.int64))


@dataclass(frozen=True, slots=True)
class ObjectDetection:
    task: str
    session: Session
    input: str
    outputs: tuple[str, ...]
    preparation: Preparation
    style: str
    is_middle: bool
    is_unit: bool
    labels: tuple[str, ...]
    threshold: float
    overlap: float

    def run(self, job: LineJob) -> DoneLine:
        fields.only(job.fields, ("image", "threshold", "iou"))
        threshold = fields.number(job.fields, "threshold", self.threshold, 0.0, 1.0)
        overlap = fields.number(job.fields, "iou", self.overlap, 0.0, 1.0)
        image = read_image(job.fields)
        array, placed = self.preparation.array(image)
        job.check()
        found = best_of(self._candidates(array), threshold, overlap)
        if not np.isfinite(found.boxes).all() or not np.isfinite(found.scores).all():
            raise BrokenJob("the model gave boxes that are not of finite numbers")
        made = self._named(found, placed, image)
        return done({"detections": made, "count": len(made), "task": self.task})

    def _candidates(self, array: Array) -> Candidates:
        given = self.session.run({self.input: array}, self.outputs)
        if self.style != "boxes":
            return of_yolo(given[0], self.style == "yolov5")
        height, width = array.shape[1:3] if self.preparation.is_last else array.shape[2:4]
        return of_parts(given[0], given[1], given[2], self.is_middle, (width, height) if self.is_unit else (1.0, 1.0))

    def _named(self, found: Candidates, placed: Placement, image: Image.Image) -> list[dict[str, object]]:
        """In pixels of the job's picture."""
        scale = np.array((placed.scale_x, placed.scale_y) * 2)
        boxes = (found.boxes - np.array((placed.left, placed.top) * 2)) / scale
        boxes = np.clip(boxes, 0, np.array(image.size * 2))
        rows = zip(boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
        return [self._detection([round(side, 2) for side in box], score, number) for box, score, number in rows]

    def _detection(self, box: list[float], score: float, number: int) -> dict[str, object]:
        label = self.labels[number] if 0 <= number < len(self.labels) else f"LABEL_{number}"
        return {"label": label, "score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}


def open_object_detection(task: str, session: Session, options: OptionReader) -> ObjectDetection:
    """Reads the options of pictures and labels, and ``style``, ``output``, ``boxes``, ``scores``, ``classes``, ``box_format``,
    ``box_scale``, ``threshold``, ``iou``. Raises ConfigError."""
    port = only_input(session.inputs)
    preparation = open_preparation(port, options, "letterbox")
    style = options.choice("style", ("yolov8", "yolov5", "boxes"))
    first = next(iter(session.outputs))
    named = tuple(options.text(name, name) for name in ("boxes", "scores", "classes"))
    outputs = named if style == "boxes" else (options.text("output", first),)
    if missing := [name for name in outputs if name not in session.outputs]:
        raise ConfigError(f"the model gives no {missing[0]}; it gives {', '.join(session.outputs)[:200]}")
    return ObjectDetection(
        task,
        session,
        port.name,
        outputs,
        preparation,
        style,
        options.choice("box_format", ("xyxy", "cxcywh")) == "cxcywh",
        options.choice("box_scale", ("pixels", "unit")) == "unit",
        options.labels(session.metadata)[:_CLASS_NUMBERS_MAX],
        options.number("threshold", 0.5, 0.0, 1.0),
        options.number("iou", 0.45, 0.0, 1.0),
    )
