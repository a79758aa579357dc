"""MiniLM in a worker process, as an Island runs it, with its sandbox and without."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import trio

from protocol.cargo_io import DoneLine, encode_input
from protocol.errors import Code, ConfigError, Refused
from runtimes.base import LineRequest
from runtimes.lines.cargo import LineKind, LineLimits, LineWorkers, open_line_cargo
from runtimes.lines.engine import LoadOrder
from runtimes.lines.process import starts
from runtimes.onnx.engine import OnnxEngine
from runtimes.sandbox.command import Bind
from runtimes.sandbox.probe import Level, probe
from runtimes.sandbox.tiers import tier_of
from runtimes.worker_process import Walls
from tests.runtimes.onnx.onnx_models import run

_MODULE = "runtimes.onnx.worker"
_MOST = LineLimits(60.0)
_TRUST_LEVEL = 1  # 1 GB


def _order(places: Mapping[str, str], **options: object) -> LoadOrder:
    return LoadOrder("minilm-l6-v2", "ab" * 32, "model.onnx", places, {"task": "embeddings", "max_tokens": 128, **options}, 1)


@pytest.fixture(params=["bare", "walled"])
def kind_and_places(request: pytest.FixtureRequest, minilm_files: dict[str, str]) -> Iterator[tuple[LineKind, dict[str, str]]]:
    if request.param == "bare":
        yield LineKind("onnx", starts(_MODULE, None)), minilm_files
        return
    sandbox = probe()
    assert sandbox.level is not Level.NONE, sandbox.reason
    inside = {path: f"/cargo/{path}" for path in minilm_files} if sandbox.level is Level.NAMESPACES else minilm_files
    reads = tuple(Bind(place, inside[path]) for path, place in minilm_files.items())
    yield LineKind("onnx", starts(_MODULE, Walls(sandbox, tier_of(_TRUST_LEVEL, "onnx"), reads))), inside


async def _result(cargo: LineWorkers, **fields: object) -> DoneLine:
    async with cargo.run_lines(LineRequest("job", encode_input(fields), bytes(16))) as running:
        (done,) = [line async for line in running]
    assert isinstance(done, DoneLine)
    return done


async def test_a_worker_embeds_as_the_engine_does(kind_and_places: tuple[LineKind, dict[str, str]], minilm: OnnxEngine) -> None:
    kind, places = kind_and_places
    texts = ["A harbour at night.", "Ships and containers", "x"]
    expected = run(minilm, input=texts, encoding_format="base64")
    with trio.fail_after(60):
        async with open_line_cargo(kind, _order(places), most=_MOST) as cargo:
            assert cargo.engine == minilm.label
            done = await _result(cargo, input=texts, encoding_format="base64")
            assert json.loads(done.result) == expected and done.usage is not None and done.usage.prompt_tokens > 6
            floats = json.loads((await _result(cargo, input=texts)).result)["embeddings"]
            assert np.array(floats, np.float32).tobytes() == b"".join(map(base64.b64decode, expected["embeddings"]))
            with pytest.raises(Refused) as refused:
                await _result(cargo, input=[])
            assert refused.value.code is Code.BAD_INPUT and "1 to 2048" in refused.value.message
            assert cargo.restarts == 0


async def test_options_that_make_no_sense_say_so(minilm_files: dict[str, str]) -> None:
    kind = LineKind("onnx", starts(_MODULE, None))
    with trio.fail_after(60), pytest.raises(ConfigError, match="pooling must be one of"):
        async with open_line_cargo(kind, _order(minilm_files, pooling="max"), most=_MOST):
            pass
