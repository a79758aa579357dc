"""Loads a Cargo of runtime onnx: its model is checked, its options are read, and one of the tasks stands ready."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from protocol import limits
from protocol.cargo_io import DoneLine
from protocol.errors import ConfigError, LocalProtocolError
from runtimes.lines.engine import BadJob, LineJob, LoadOrder
from runtimes.onnx.classify import open_text_classification, open_zero_shot
from runtimes.onnx.detection import open_object_detection
from runtimes.onnx.embeddings import open_embeddings
from runtimes.onnx.model_file import check_model
from runtimes.onnx.options import OptionReader
from runtimes.onnx.recognition import open_text_recognition
from runtimes.onnx.session import ENGINE_NAME, Session
from runtimes.onnx.spans import open_fill_mask, open_question_answering, open_token_classification
from runtimes.onnx.tensors import open_tensors
from runtimes.onnx.texts import TextModel, open_text_model
from runtimes.onnx.vision import open_image_classification, open_image_segmentation

_HASH_CHARS = 16
_ROOM_BYTES = 1024  # for type and usage beside the result


class Task(Protocol):
    def run(self, job: LineJob) -> DoneLine: ...


OpenText = Callable[[str, Session, OptionReader, TextModel], Task]
OpenOther = Callable[[str, Session, OptionReader], Task]

TEXT_TASKS: Mapping[str, OpenText] = MappingProxyType(
    {
        "embeddings": open_embeddings,
        "feature-extraction": open_embeddings,
        "text-classification": open_text_classification,
        "token-classification": open_token_classification,
        "zero-shot-classification": open_zero_shot,
        "question-answering": open_question_answering,
        "fill-mask": open_fill_mask,
    }
)
OTHER_TASKS: Mapping[str, OpenOther] = MappingProxyType(
    {
        "image-classification": open_image_classification,
        "object-detection": open_object_detection,
        "image-segmentation": open_image_segmentation,
        "text-recognition": open_text_recognition,
        "tensors": open_tensors,
    }
)


class OnnxEngine:
    """One loaded Cargo; one job at a time."""

    def __init__(self, label: str, task: Task) -> None:
        self._label = label
        self._task = task

    def __repr__(self) -> str:
        return f"<OnnxEngine {self._label} {type(self._task).__name__}>"

    @property
    def label(self) -> str:
        return self._label

    def run(self, job: LineJob) -> DoneLine:
        """Raises BadJob, BrokenJob, JobStopped."""
        try:
            line = self._task.run(job)
        except LocalProtocolError:  # of protocol.cargo_io.done: the tasks have checked that numbers are finite and texts are Unicode
            raise BadJob(_TOO_LARGE) from None
        if len(line.result.encode()) > limits.CARGO_LINE_BYTES_MAX - _ROOM_BYTES:
            raise BadJob(_TOO_LARGE)
        return line


_TOO_LARGE = f"the answer has more than {limits.CARGO_LINE_BYTES_MAX} bytes; send less at a time"


def load(order: LoadOrder) -> OnnxEngine:
    """Raises ConfigError with what is wrong with the model, the options or the files."""
    options = OptionReader(order.options, order.files)
    task = options.text("task")
    if task not in TEXT_TASKS and task not in OTHER_TASKS:
        raise ConfigError(f"option task must be one of {', '.join([*TEXT_TASKS, *OTHER_TASKS])}")
    session = Session(check_model(order.entry, order.files), order.threads)
    if not session.outputs:
        raise ConfigError("the model has no output")
    opened = _open(task, session, options, order.threads)
    options.finish()
    return OnnxEngine(f"{ENGINE_NAME}-{platform.machine()}/{order.content_hash[:_HASH_CHARS]}", opened)


def _open(task: str, session: Session, options: OptionReader, threads: int) -> Task:
    if task in OTHER_TASKS:
        return OTHER_TASKS[task](task, session, options)
    return TEXT_TASKS[task](task, session, options, open_text_model(session, options, threads))
