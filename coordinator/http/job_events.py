"""A job's words as server-sent events and as one output, the same for texts and for lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from coordinator.books.jobs import ENDED, JobState
from coordinator.http.ab_notes import ab_metadata
from coordinator.http.answers import to_json
from coordinator.http.errors import ApiError
from coordinator.job_board import JobEvent, Output, StateChange
from coordinator.jobs import Assigned, CacheHit, Said, Text
from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, TokenLine

_LIGHT_BYTES = 16 * 1024


def sse(said: JobEvent) -> bytes:
    """One event of a job's stream; ``type`` says again what ``event`` does, for clients that only read data."""
    match said:
        case Text(_, text, _):
            return _event("chunk", content=text)
        case Said(_, line):
            return _line(line)
        case Output(done):
            return _event("output", **done_json(done))
        case CacheHit(strategy, key):
            return _event("cache", cache_hit=True, cache_strategy=strategy, cache_key=key)
        case Assigned():
            return _event("assigned", **ab_metadata(said))
        case StateChange(JobState.FAILED, code, message):
            return _event("error", state=said.state.value, error={"code": code, "message": message})
        case StateChange(state):
            return _event("complete" if state in ENDED else "state", state=state.value)


def weight_of(said: JobEvent) -> int:
    """How much of a stream's room it takes: large lines take more."""
    if isinstance(said, Said) and isinstance(said.line, ImageLine):
        return 1 + len(said.line.data) // _LIGHT_BYTES
    if isinstance(said, Output):
        return 1 + len(said.done.result) // _LIGHT_BYTES
    return 1


def failed(error: ApiError) -> bytes:
    """The last event of a job whose headers have gone out."""
    return _event("error", state=JobState.FAILED.value, error={"code": error.code, "message": error.message})


def _line(line: StatusLine | TokenLine | ProgressLine | ImageLine) -> bytes:
    match line:
        case TokenLine(content):
            return _event("chunk", content=content)
        case StatusLine(message):
            return _event("status", message=message)
        case ProgressLine(step, total):
            return _event("progress", step=step, total=total)
        case ImageLine():
            return _event("image", **image_json(line))


def _event(name: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **fields}))


def image_json(image: ImageLine) -> dict[str, Any]:
    return {"data": image.data, "format": image.format, "width": image.width, "height": image.height}


def done_json(done: DoneLine) -> dict[str, Any]:
    """What a Cargo says at its end: its result, and the seed where it names one."""
    shown: dict[str, Any] = {"result": json.loads(done.result)}
    if done.seed is not None:
        shown["seed"] = done.seed
    return shown


def output_json(said: Iterable[Text | Said | Output], usage: dict[str, Any]) -> dict[str, Any]:
    """All of it at once: ``text``, and of Cargos that give lines ``result``, ``images`` and ``seed``."""
    text: list[str] = []
    images: list[dict[str, Any]] = []
    further: dict[str, Any] = {}
    for event in said:
        match event:
            case Text(_, words, _) | Said(_, TokenLine(words)):
                text.append(words)
            case Said(_, ImageLine() as image):
                images.append(image_json(image))
            case Output(done):
                further = done_json(done)
            case _:
                pass  # how far it was is of no interest any more
    return {"text": "".join(text), "usage": usage, **further, **({"images": images} if images else {})}
