"""The model of shapes in a worker process, as an Island runs it. One worker for all: it takes seconds to import torch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from protocol.cargo_io import DoneLine, ImageLine, ProgressLine
from protocol.errors import Code, ConfigError, Refused
from runtimes.base import LineRequest
from runtimes.diffusers.shapes import FOLDER
from runtimes.diffusers.shapes.check import order_of, picture_of
from runtimes.diffusers.shapes.draw import Scene, read_scene
from runtimes.diffusers.shapes.write import STEPS
from runtimes.lines.cargo import LineKind, LineLimits, open_line_cargo
from runtimes.lines.process import starts

KIND = LineKind("diffusers", starts("runtimes.diffusers.worker", None))
MOST = LineLimits(60.0)


def asks(**fields: object) -> LineRequest:
    return LineRequest("job", json.dumps(fields).encode(), bytes(16))


async def test_a_worker_draws_refuses_is_cancelled_and_draws_again() -> None:
    """About 15 s, most of it the import of torch and diffusers in the worker."""
    scene = Scene("green", "triangle", "black")
    job = asks(prompt=scene.caption, seed=0)
    async with open_line_cargo(KIND, order_of(FOLDER, threads=1), most=MOST) as cargo:
        assert "StableDiffusionPipeline" in cargo.engine
        async with cargo.run_lines(job) as run:
            *progress, image, done = [line async for line in run]
        assert progress == [ProgressLine(step, STEPS) for step in range(1, STEPS + 1)]
        assert isinstance(image, ImageLine)
        assert read_scene(picture_of(image)).shows(scene)
        assert isinstance(done, DoneLine)
        assert done.seed == 0

        with pytest.raises(Refused) as refused:
            async with cargo.run_lines(asks(prompt="x", size="4096x4096")) as run:
                assert [line async for line in run] == []
        assert refused.value.code is Code.BAD_INPUT
        assert "width must be from 32 to 1024" in refused.value.message

        pids = cargo.worker_pids
        async with cargo.run_lines(asks(prompt="a red circle", steps=150, n=10)) as run:
            async for _ in run:
                break
        async with cargo.run_lines(job) as run:
            assert [line async for line in run] == [*progress, image, done]
        assert cargo.worker_pids == pids


async def test_a_folder_that_is_refused_says_why() -> None:
    order = order_of(FOLDER, threads=1)
    with pytest.raises(ConfigError, match="option 'custom_pipeline' is unknown"):
        async with open_line_cargo(KIND, replace(order, options={"custom_pipeline": "x"}), most=MOST):
            pass
