"""Tiny ONNX models whose right answers are known, tokenizers to go with them, and a job as an engine sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, TokenLine
from runtimes.lines.engine import JobStopped, LoadOrder
from runtimes.onnx.engine import OnnxEngine, load

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
TEXT_INPUTS = (("input_ids", INT64, ["rows", "tokens"]), ("attention_mask", INT64, ["rows", "tokens"]))
_WORDS = "red green blue paris anna in lives bad good the is capital of france .".split()
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS)

PortSpec = tuple[str, int, Sequence[Any]]
Blobs = Mapping[str, bytes]


def word(token: str) -> int:
    return VOCABULARY.index(token)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[PortSpec],
    outputs: Sequence[PortSpec],
    constants: Mapping[str, npt.NDArray[Any]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    values = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    takes, gives = ([helper.make_tensor_value_info(*port) for port in ports] for ports in (inputs, outputs))
    graph = helper.make_graph(list(nodes), "tiny", takes, gives, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, dict(metadata or {}))
    return model


def lookup(table: npt.NDArray[np.float32], outputs: Sequence[PortSpec], then: Sequence[onnx.NodeProto] = ()) -> onnx.ModelProto:
    """Each token's state is its row of the table; ``then``: what makes the outputs of ``states``."""
    gather = helper.make_node("Gather", ["table", "input_ids"], ["states"])
    return build([gather, *then], TEXT_INPUTS, outputs, {"table": table.astype(np.float32), "axis1": np.array([1], np.int64)})


def summed() -> onnx.NodeProto:
    """Logits of a row: the sum of its tokens' states (padding's are zeros)."""
    return helper.make_node("ReduceSum", ["states", "axis1"], ["logits"], keepdims=0)


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(VOCABULARY[:5]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def write_cargo(folder: Path, model: onnx.ModelProto | bytes, options: Mapping[str, Any], extra: Blobs | None = None) -> LoadOrder:
    """The files lie under names of their own, as in a store of contents."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    contents = {"model.onnx": data, "tokenizer.json": tiny_tokenizer().to_str().encode(), **(extra or {})}
    files = {}
    for index, (path, content) in enumerate(contents.items()):
        files[path] = str(folder / f"blob-{index}")
        Path(files[path]).write_bytes(content)
    return LoadOrder("tiny", "ab" * 32, "model.onnx", files, options, 1)


def opened(folder: Path, model: onnx.ModelProto | bytes, options: Mapping[str, Any], extra: Blobs | None = None) -> OnnxEngine:
    return load(write_cargo(folder, model, options, extra))


@dataclass
class FakeJob:
    """``stop_after``: so many checks pass, then the job has to end."""

    fields: Mapping[str, Any]
    seed: bytes = bytes(16)
    stop_after: int = 1_000_000
    checks: int = 0
    said: list[StatusLine | TokenLine | ProgressLine | ImageLine] = field(default_factory=list)

    def say(self, line: StatusLine | TokenLine | ProgressLine | ImageLine) -> None:
        self.said.append(line)

    def check(self) -> None:
        self.checks += 1
        if self.checks > self.stop_after:
            raise JobStopped


def run(engine: OnnxEngine, **fields: Any) -> dict[str, Any]:
    """The result of one job."""
    return result_of(engine.run(FakeJob(fields)))


def result_of(line: DoneLine) -> dict[str, Any]:
    value = json.loads(line.result)
    assert isinstance(value, dict)
    return value
