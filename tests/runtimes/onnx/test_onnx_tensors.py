"""Raw tensors in and out, and the many ways in which they do not fit."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtimes.lines.engine import BadJob, BrokenJob
from runtimes.onnx.engine import OnnxEngine
from runtimes.onnx.session import Port
from runtimes.onnx.tensors import read_tensor
from tests.runtimes.onnx.onnx_models import FLOAT, build, opened, run

_OPTIONS = {"task": "tensors"}


def _doubling(folder: Path) -> OnnxEngine:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)]
    return opened(folder, build(nodes, [("x", FLOAT, ["rows", 2])], [("y", FLOAT, ["rows", 2]), ("sum", FLOAT, [])]), _OPTIONS)


def test_lists_and_bytes_go_in_and_come_out(tmp_path: Path) -> None:
    engine = _doubling(tmp_path)
    assert run(engine, inputs={"x": [[1, 2.5], [3, 4]]}) == {"outputs": {"y": [[2, 5], [6, 8]], "sum": 10.5}, "task": "tensors"}
    data = base64.b64encode(np.array([[1, 2]], "<f4").tobytes()).decode()
    tensor = {"dtype": "float32", "shape": [1, 2], "data": data}
    result = run(engine, inputs={"x": tensor}, outputs=["y"], encoding="base64")["outputs"]
    assert result.keys() == {"y"} and result["y"]["dtype"] == "float32" and result["y"]["shape"] == [1, 2]
    assert np.frombuffer(base64.b64decode(result["y"]["data"]), "<f4").tolist() == [2, 4]


@pytest.mark.parametrize("dtype", "float64 float16 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool string".split())
def test_all_types_pass_unchanged(tmp_path: Path, dtype: str) -> None:
    kind = {"float64": "DOUBLE"}.get(dtype, dtype.upper())
    number = TensorProto.DataType.Value(kind)
    model = build([helper.make_node("Identity", ["x"], ["y"])], [("x", number, [2])], [("y", number, [2])])
    special: dict[str, list[Any]] = {"bool": [True, False], "string": ["é", ""]}
    value = special.get(dtype, [1, 100])
    engine = opened(tmp_path, model, _OPTIONS)
    assert run(engine, inputs={"x": value})["outputs"]["y"] == value
    if dtype != "string":
        raw = run(engine, inputs={"x": value}, encoding="base64")["outputs"]["y"]
        assert run(engine, inputs={"x": raw})["outputs"]["y"] == value


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": {"x": [[1, 2]], "z": 1}},
        {"inputs": {"x": [[1, 2]]}, "outputs": ["z"]},
        {"inputs": {"x": [[1, 2]]}, "outputs": []},
        {"inputs": {"x": [[1, 2]]}, "outputs": "y"},
        {"inputs": {"x": [[1, 2]]}, "encoding": "hex"},
        {"inputs": {"x": [[1, 2]]}, "steps": 2},
        {"inputs": {"x": [[1, 2, 3]]}},
        {"inputs": {"x": [1, 2]}},
        {"inputs": {"x": [[[1, 2]]]}},
    ],
)
def test_jobs_that_do_not_fit_the_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(BadJob):
        run(_doubling(tmp_path), **fields)


_DATA = base64.b64encode(bytes(8)).decode()


@pytest.mark.parametrize(
    "value",
    [
        "text",
        None,
        [[1, 2], [3]],
        [[1, 2], 3],
        [1, [2, 3]],
        [["1", "2"]],
        [[True, False]],
        [[1e39, 0]],
        [[float("nan"), 0]],
        [[10**400, 0]],
        [[]],
        [[[[[[[[[[1, 2]]]]]]]]]],
        {"dtype": "float32", "shape": [1, 2]},
        {"dtype": "float64", "shape": [1, 1], "data": _DATA},
        {"dtype": "float32", "shape": [1, 3], "data": _DATA},
        {"dtype": "float32", "shape": [-1, -2], "data": _DATA},
        {"dtype": "float32", "shape": [2**62, 2**62], "data": _DATA},
        {"dtype": "float32", "shape": [1, 2.0], "data": _DATA},
        {"dtype": "float32", "shape": "1,2", "data": _DATA},
        {"dtype": "float32", "shape": [1] * 9, "data": _DATA},
        {"dtype": "float32", "shape": [1, 2], "data": "*" * 12},
        {"dtype": "float32", "shape": [1, 2], "data": 5},
        {"dtype": "float32", "shape": [1, 2], "data": _DATA, "more": 1},
    ],
)
def test_tensors_that_do_not_fit_say_what_would(value: object) -> None:
    with pytest.raises(BadJob, match=r"^x "):
        read_tensor(value, Port("x", "float32", (None, 2)))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int8", [128]), ("uint8", [-1]), ("int64", [2**63]), ("int32", [1.5]), ("bool", [1]), ("string", [1])],
)
def test_numbers_that_the_type_does_not_hold(dtype: str, value: list[Any]) -> None:
    with pytest.raises(BadJob):
        read_tensor(value, Port("x", dtype, (1,)))


def test_booleans_are_bytes_of_0_and_1() -> None:
    with pytest.raises(BadJob, match="0 and 1"):
        read_tensor({"dtype": "bool", "shape": [1], "data": base64.b64encode(b"\x02").decode()}, Port("x", "bool", (1,)))


def test_bytes_are_not_copied() -> None:
    data = base64.b64encode(np.arange(4, dtype="<f4").tobytes()).decode()
    array = read_tensor({"dtype": "float32", "shape": [2, 2], "data": data}, Port("x", "float32", (None, 2)))
    assert array.base is not None and not array.flags.owndata


def test_infinite_numbers_come_back_as_bytes_only(tmp_path: Path) -> None:
    model = build([helper.make_node("Log", ["x"], ["y"])], [("x", FLOAT, [1])], [("y", FLOAT, [1])])
    engine = opened(tmp_path, model, _OPTIONS)
    with pytest.raises(BrokenJob, match="base64"):
        run(engine, inputs={"x": [0]})
    assert run(engine, inputs={"x": [0]}, encoding="base64")["outputs"]["y"]["shape"] == [1]


def test_outputs_larger_than_an_answer(tmp_path: Path) -> None:
    nodes = [helper.make_node("Expand", ["x", "shape"], ["y"])]
    model = build(nodes, [("x", FLOAT, [1])], [("y", FLOAT, ["n"])], {"shape": np.array([3_000_000], np.int64)})
    engine = opened(tmp_path, model, _OPTIONS)
    for encoding in ("list", "base64"):
        with pytest.raises(BadJob, match="larger"):
            run(engine, inputs={"x": [1]}, encoding=encoding)


def test_empty_rows_take_room_too(tmp_path: Path) -> None:
    node, shape = helper.make_node("Expand", ["x", "s"], ["y"]), np.array([9_000_000, 1])
    model = build([node], [("x", FLOAT, [1, "n"])], [("y", FLOAT, ["m", "n"])], {"s": shape})
    with pytest.raises(BadJob, match="larger"):
        run(opened(tmp_path, model, _OPTIONS), inputs={"x": {"dtype": "float32", "shape": [1, 0], "data": ""}})


def test_inputs_that_do_not_fit_one_another_are_the_jobs_fault(tmp_path: Path) -> None:
    model = build([helper.make_node("Add", ["a", "b"], ["y"])], [("a", FLOAT, ["n"]), ("b", FLOAT, ["n"])], [("y", FLOAT, ["n"])])
    with pytest.raises(BadJob, match="inputs"):
        run(opened(tmp_path, model, _OPTIONS), inputs={"a": [1, 2], "b": [1, 2, 3]})
