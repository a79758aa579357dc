"""A loaded model: named arrays in, named arrays out. onnxruntime's errors end here, without what they tell of a job's input.

One thread pool of the size that the order says, nothing run beside it; it does not spin once a run has ended, for its cores may be another
engine's. The memory arena stays on: without it MiniLM took 1.2 to 2 times as long. Nothing is written, no provider but the CPU's is asked,
and nothing is logged: onnxruntime's warnings name shapes and values.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from protocol.checks import made_printable
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob
from runtimes.onnx.model_file import ModelFile

Array = npt.NDArray[Any]

ENGINE_NAME = f"onnxruntime-{version('onnxruntime')}"
_FATAL = 4
_METADATA_MAX = 256  # entries that are looked at
_FAULTS = (
    *(ort_errors.Fail, ort_errors.RuntimeException, ort_errors.InvalidGraph, ort_errors.InvalidProtobuf, ort_errors.InvalidArgument),
    *(ort_errors.NoModel, ort_errors.NoSuchFile, ort_errors.NotImplemented, ort_errors.EPFail, ort_errors.EngineError),
    *(RuntimeError, ValueError, MemoryError),
)
_NODE = re.compile(r"while running (\w+) node")
_TYPES: Mapping[str, str] = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bool": "bool",
    "string": "string",
    **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. ``dtype``: numpy's name, or ``string``; ``shape``: None where any length goes."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def takes(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(want in (None, have) for want, have in zip(self.shape, shape, strict=True))

    @property
    def shape_text(self) -> str:
        return "[" + ", ".join("any" if size is None else str(size) for size in self.shape) + "]"


class Session:
    """See the module. ``inputs`` and ``outputs`` by name, in the model's order; ``metadata``: the model's own notes."""

    def __init__(self, model: ModelFile, threads: int) -> None:
        """Raises ConfigError where onnxruntime does not take the model."""
        onnxruntime.set_default_logger_severity(_FATAL)
        settings = _settings(threads)
        self._external = _map_all(model.external)  # kept: tensors may lie in it
        try:
            if self._external:
                names, blocks = list(self._external), list(self._external.values())
                settings.add_external_initializers_from_files_in_memory(names, blocks, [len(block) for block in blocks])
            self._session = onnxruntime.InferenceSession(model.place, settings, providers=["CPUExecutionProvider"])
        except _FAULTS as error:
            raise ConfigError(f"onnxruntime does not take the model: {made_printable(str(error), 300)}") from None
        self.inputs = {port.name: port for port in map(_port, self._session.get_inputs())}
        self.outputs = {port.name: port for port in map(_port, self._session.get_outputs())}
        found = self._session.get_modelmeta().custom_metadata_map
        self.metadata: Mapping[str, str] = {str(key): str(found[key]) for key in sorted(found)[:_METADATA_MAX]}

    def __repr__(self) -> str:
        return f"<Session {len(self.inputs)} inputs, {len(self.outputs)} outputs>"

    def run(self, arrays: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Raises BrokenJob: what the tasks give is of the model's own types and shapes."""
        try:
            return [np.asarray(each) for each in self._session.run(list(outputs), dict(arrays))]
        except _FAULTS as error:
            raise BrokenJob(f"the model failed{_where(error)}") from None

    def run_given(self, arrays: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """As ``run``, for arrays of the job's own. Raises BadJob where they are at fault, as far as onnxruntime tells."""
        try:
            return [np.asarray(each) for each in self._session.run(list(outputs), dict(arrays))]
        except (ort_errors.InvalidArgument, ValueError):
            raise BadJob("inputs do not fit the model or one another; see its card for what it takes") from None
        except _FAULTS as error:
            raise BadJob(f"the model failed on these inputs{_where(error)}") from None


def _settings(threads: int) -> Any:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    settings.use_deterministic_compute = True
    settings.log_severity_level = _FATAL
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return settings


def _map_all(places: Mapping[str, str]) -> dict[str, mmap.mmap]:
    """The files that tensors lie in. They are handed over as memory since their places in a store have other names than the model knows."""
    found = {}
    for name, place in places.items():
        try:
            with open(place, "rb") as file:
                found[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name} cannot be read: {made_printable(str(error), 100)}") from error
    return found


def _port(raw: Any) -> Port:
    kind = str(raw.type)
    dtype = _TYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
    if dtype is None or not kind.startswith("tensor("):
        raise ConfigError(f"the model has {raw.name[:80]!r} of type {kind[:80]}; only tensors of numbers, booleans and texts are taken")
    return Port(str(raw.name), dtype, tuple(size if isinstance(size, int) and size >= 0 else None for size in raw.shape or ()))


def _where(error: BaseException) -> str:
    """Which operator it was; the rest of onnxruntime's text may hold values of the input."""
    found = _NODE.search(str(error))
    return f" in a node {found.group(1)}" if found else ""
