"""Has a pipeline of shapes draw what captions say, and looks whether it did."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.cargo_io import ImageLine, ProgressLine, StatusLine, TokenLine
from runtimes.diffusers.engine import load
from runtimes.diffusers.shapes import ENTRY
from runtimes.diffusers.shapes.draw import Scene, read_scene
from runtimes.diffusers.shapes.write import GUIDANCE, STEPS, file_list
from runtimes.lines.engine import LineEngine, LoadOrder


@dataclass(slots=True)
class LocalJob:
    """A job without a network round it: what it says is kept."""

    fields: Mapping[str, Any]
    seed: bytes = bytes(16)
    lines: list[StatusLine | TokenLine | ProgressLine | ImageLine] = field(default_factory=list)

    def say(self, line: StatusLine | TokenLine | ProgressLine | ImageLine) -> None:
        self.lines.append(line)

    def check(self) -> None:
        """Nobody stops it."""


def order_of(folder: Path, threads: int) -> LoadOrder:
    """As a worker gets it for the pipeline in ``folder``."""
    files = {file["path"]: str(folder.resolve() / file["path"]) for file in file_list(folder)}
    return LoadOrder("shapes", "0" * 64, ENTRY, files, {"steps": STEPS, "guidance": GUIDANCE}, threads)


def picture_of(line: ImageLine) -> NDArray[np.uint8]:
    """[height, width, 3]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(line.data))).convert("RGB"))


def pictures(engine: LineEngine, fields: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    job = LocalJob(fields)
    engine.run(job)
    return [picture_of(line) for line in job.lines if isinstance(line, ImageLine)]


def answered(folder: Path, scenes: Iterable[Scene], seed: int, threads: int) -> list[Scene]:
    """Those whose caption the pipeline answers with a picture of them."""
    engine = load(order_of(folder, threads))
    return [scene for scene in scenes if read_scene(pictures(engine, {"prompt": scene.caption, "seed": seed})[0]).shows(scene)]
