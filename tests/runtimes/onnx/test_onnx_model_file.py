"""What is refused before onnxruntime sees it: other formats, files outside the Cargo, operators from libraries, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from protocol.errors import ConfigError
from runtimes.onnx.engine import load
from runtimes.onnx.model_file import check_model
from runtimes.onnx.wire import read_notes
from tests.runtimes.onnx.onnx_models import FLOAT, build, opened, run, write_cargo

_OPTIONS = {"task": "tensors"}
_PORTS = [("x", FLOAT, [4])], [("y", FLOAT, [4])]


def _outside(location: str, offset: str | None = None, length: str | None = None) -> onnx.TensorProto:
    tensor = TensorProto(name="w", dims=[4], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    return tensor


def _adding(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = build([helper.make_node("Add", ["x", "w"], ["y"])], *_PORTS)
    model.graph.initializer.append(tensor)
    return model


def test_tensors_may_lie_in_files_of_the_cargo(tmp_path: Path) -> None:
    data = bytes(64) + np.arange(4, dtype="<f4").tobytes()
    engine = opened(tmp_path, _adding(_outside("weights/w.bin", "64", "16")), _OPTIONS, {"weights/w.bin": data})
    assert run(engine, inputs={"x": [1, 1, 1, 1]})["outputs"] == {"y": [1, 2, 3, 4]}


def test_locations_count_from_the_models_folder(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(_adding(_outside("w.bin")).SerializeToString())
    (tmp_path / "w").write_bytes(bytes(16))
    files = {"net/model.onnx": str(tmp_path / "m"), "net/w.bin": str(tmp_path / "w")}
    assert check_model("net/model.onnx", files).external == {"w.bin": str(tmp_path / "w")}
    with pytest.raises(ConfigError, match="does not list"):
        check_model("net/model.onnx", {"net/model.onnx": files["net/model.onnx"], "w.bin": files["net/w.bin"]})


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "a/../../secret", "..", "", ".", "w.bin/", "//w.bin", "a\\b", "*/_ORT_MEM_ADDR_/*", "w\0", "~/x", ".h"],
)
def test_no_file_outside_the_cargo_is_opened(tmp_path: Path, location: str) -> None:
    with pytest.raises(ConfigError, match="outside the Cargo"):
        opened(tmp_path, _adding(_outside(location)), _OPTIONS, {"w.bin": bytes(16)})


def test_a_file_that_the_manifest_does_not_list(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))  # it is there, but nobody signed it
    with pytest.raises(ConfigError, match="does not list"):
        opened(tmp_path, _adding(_outside("w.bin")), _OPTIONS)


@pytest.mark.parametrize(("offset", "length"), [("8", "16"), ("-4", "8"), ("0", "-1"), ("x", "4"), ("9" * 20, "4"), (None, "17")])
def test_places_beyond_the_end_of_a_file(tmp_path: Path, offset: str | None, length: str) -> None:
    with pytest.raises(ConfigError):
        opened(tmp_path, _adding(_outside("w.bin", offset, length)), _OPTIONS, {"w.bin": bytes(16)})


def _in_subgraph() -> onnx.ModelProto:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "inner", [], [helper.make_tensor_value_info("z", FLOAT, [4])], [_outside("../w")]
    )
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    return build([condition, helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], *_PORTS)


def _in_function() -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["b"], value=_outside("../w"))
    add = helper.make_node("Add", ["a", "b"], ["c"])
    function = helper.make_function("own", "Shift", ["a"], ["c"], [node, add], [helper.make_opsetid("", 17)])
    model = build([helper.make_node("Shift", ["x"], ["y"], domain="own")], *_PORTS)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def _in_constant() -> onnx.ModelProto:
    return build([helper.make_node("Constant", [], ["w"], value=_outside("../w")), helper.make_node("Add", ["x", "w"], ["y"])], *_PORTS)


def _in_sparse() -> onnx.ModelProto:
    model = build([helper.make_node("Identity", ["x"], ["y"])], *_PORTS)
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(_outside("../w"))
    return model


def _in_sparse_attribute() -> onnx.ModelProto:
    model = build([helper.make_node("Constant", [], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])], *_PORTS)
    attribute = model.graph.node[0].attribute.add()
    attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
    attribute.sparse_tensor.values.CopyFrom(_outside("../w"))
    return model


def _in_training() -> onnx.ModelProto:
    model = build([helper.make_node("Identity", ["x"], ["y"])], *_PORTS)
    model.training_info.add().initialization.initializer.append(_outside("../w"))
    return model


@pytest.mark.parametrize("make", [_in_subgraph, _in_function, _in_constant, _in_sparse, _in_sparse_attribute, _in_training])
def test_tensors_are_found_wherever_they_stand(tmp_path: Path, make: object) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match="outside the Cargo"):
        opened(tmp_path, make(), _OPTIONS)


def test_a_graph_in_two_pieces_is_walked_whole(tmp_path: Path) -> None:
    """protobuf joins a message that stands twice."""
    head = build([helper.make_node("Add", ["x", "w"], ["y"])], *_PORTS).SerializeToString()
    tail = onnx.ModelProto()
    tail.graph.initializer.append(_outside("../w"))
    with pytest.raises(ConfigError, match="outside the Cargo"):
        opened(tmp_path, head + tail.SerializeToString(), _OPTIONS)


def test_functions_of_the_model_itself_run(tmp_path: Path) -> None:
    model = _in_function()
    model.functions[0].node[0].attribute[0].t.CopyFrom(helper.make_tensor("b", FLOAT, [4], [1, 2, 3, 4]))
    assert run(opened(tmp_path, model, _OPTIONS), inputs={"x": [0, 0, 0, 0]})["outputs"]["y"] == [1, 2, 3, 4]


def test_operators_of_a_library_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need a library"):
        opened(tmp_path, build([helper.make_node("Evil", ["x"], ["y"], domain="com.evil")], *_PORTS), _OPTIONS)


def test_unknown_operators_are_an_error_of_the_cargo(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not take the model"):
        opened(tmp_path, build([helper.make_node("NoSuchThing", ["x"], ["y"])], *_PORTS), _OPTIONS)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x80\x04\x95" + bytes(64), "pickle"),
        (b"PK\x03\x04" + bytes(64), "zip"),
        (b"GGUF" + bytes(64), "GGUF"),
        (b"\x89HDF\r\n" + bytes(64), "HDF5"),
        (bytes(4) + b"ORTM" + bytes(64), "own format"),
        (b"", "empty"),
        (b"#!/bin/sh\necho", "no whole ONNX"),
        (b"\x08\x08", "no graph"),
        (bytes(64), "no whole ONNX"),
        (b"\xff" * 64, "no whole ONNX"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        opened(tmp_path, data, _OPTIONS)


def test_a_model_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = build([helper.make_node("Identity", ["x"], ["y"])], *_PORTS).SerializeToString()
    for end in range(1, len(data)):
        with pytest.raises(ConfigError):
            opened(tmp_path, data[:end], _OPTIONS)


def test_graphs_nested_without_end() -> None:
    graph = b""
    for _ in range(500):
        attribute = b"\x32" + _length(graph) + graph
        node = b"\x2a" + _length(attribute) + attribute
        graph = b"\x0a" + _length(node) + node
    with pytest.raises(ConfigError, match="nests"):
        read_notes(memoryview(b"\x08\x08\x3a" + _length(graph) + graph))


def _length(data: bytes) -> bytes:
    size, out = len(data), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


def test_real_models_are_walked_as_the_onnx_package_reads_them(minilm_files: dict[str, str]) -> None:
    data = Path(minilm_files["model.onnx"]).read_bytes()
    notes, model = read_notes(memoryview(data)), onnx.ModelProto.FromString(data)
    assert notes.ir_version == model.ir_version
    assert notes.domains == {node.domain for node in model.graph.node} | {opset.domain for opset in model.opset_import}
    assert notes.external == []


def test_a_model_that_is_none_of_the_files(tmp_path: Path) -> None:
    order = write_cargo(tmp_path, build([helper.make_node("Identity", ["x"], ["y"])], *_PORTS), _OPTIONS)
    with pytest.raises(ConfigError, match="none of the Cargo's files"):
        check_model("other.onnx", order.files)
    Path(order.files["model.onnx"]).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load(order)
