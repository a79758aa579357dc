"""``/v1/images/generations``: OpenAI's request and answer over a Cargo that makes pictures.

Beside OpenAI's fields a request has ``negative_prompt``, ``steps``, ``guidance`` and ``seed``. ``quality``, ``style`` and ``moderation``
are wishes that no pipeline here knows: they are passed over, as other servers of this API do. What would make another picture than the
one that is asked for is refused: a transparent background, compression, partial pictures, formats that cannot be made.

A stream has our ``image_generation.progress`` and ``image_generation.status``, then OpenAI's ``image_generation.completed`` for each
picture; on the last one there is ``metadata``.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.http.answers import to_json
from coordinator.http.errors import bad_request, unsupported
from coordinator.http.fields import Fields, text_of
from coordinator.http.line_answers import LineAnswer, LineRequest
from coordinator.jobs import ChoiceResult, Event, Said
from protocol import limits
from protocol.cargo_io import ImageLine, ProgressLine, StatusLine, encode_input
from protocol.cargo_jobs import SEED_BYTES, CargoInput
from protocol.errors import Code, LocalProtocolError, Refused

KIND = "image"
PROMPT_CHARS_MAX = limits.PROMPT_CHARS_MAX
IMAGES_MAX = limits.IMAGES_MAX
SIDE_PX_MAX = limits.SIDE_PX_MAX
STEPS_MAX = limits.STEPS_MAX
GUIDANCE_MAX = limits.GUIDANCE_MAX
FORMATS = ("png", "jpeg")
B64, URL = "b64_json", "url"

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)
# of a Cargo's result, into metadata
_SHOWN: dict[str, tuple[type, ...]] = {"seeds": (list,), "steps": (int,), "guidance": (int, float), "filtered": (list,)}
_LIGHT_BYTES = 16 * 1024


@dataclass(slots=True)
class ImageCheck:
    """Whether a Cargo gives as many pictures as were asked for."""

    model: str
    count: int
    seen: int = 0

    def __call__(self, event: Event) -> None:
        """Raises Refused: BAD_INPUT where the Cargo does something else."""
        if isinstance(event, Said) and isinstance(event.line, ImageLine):
            self.seen += 1
        if not isinstance(event, ChoiceResult) or self.seen == self.count:
            return
        if not self.seen:
            raise Refused(Code.BAD_INPUT, f"{self.model} makes no pictures; name a model that does")
        raise Refused(Code.CARGO_FAILED, f"{self.model} made {self.seen} pictures, and {self.count} were asked for")


@dataclass(frozen=True, slots=True)
class ImageRequest(LineRequest):
    """``response_format``: how the client gets the pictures, ``b64_json`` or ``url``."""

    response_format: str = B64


def parse_images(body: Mapping[str, Any]) -> ImageRequest:
    """``POST /v1/images/generations``. Raises ApiError 400."""
    fields = Fields(body)
    model = fields.text("model", limits.NAME_CHARS_MAX, required=True)
    count = fields.integer("n", 1, IMAGES_MAX) or 1
    asked: dict[str, object] = {"prompt": _prompt(fields), "n": count, "format": _one_of(fields, "output_format", FORMATS)}
    optional: dict[str, object] = {
        "negative_prompt": fields.text("negative_prompt", PROMPT_CHARS_MAX) if fields.get("negative_prompt") != "" else None,
        "size": _size(fields.get("size")),
        "steps": fields.integer("steps", 1, STEPS_MAX),
        "guidance": None if fields.get("guidance") is None else fields.number("guidance", 0, GUIDANCE_MAX, 0.0),
        "seed": fields.integer("seed", 0, limits.SEED_MAX),
    }
    asked |= {name: value for name, value in optional.items() if value not in (None, "")}
    _refuse_unsupported(fields)
    stream, response_format = fields.flag("stream"), _one_of(fields, "response_format", (B64, URL))
    if stream and response_format == URL:
        raise unsupported("response_format", "of a stream is b64_json, as at OpenAI; leave stream out to get a url")
    try:
        given = CargoInput(encode_input(asked), secrets.token_bytes(SEED_BYTES))
    except (LocalProtocolError, ValueError) as error:
        raise bad_request(str(error), "prompt") from None
    return ImageRequest(model, given, ImageCheck(model, count), stream, response_format)


def _prompt(fields: Fields) -> str:
    prompt = fields.text("prompt", PROMPT_CHARS_MAX, required=True)
    if not prompt.strip():
        raise bad_request("prompt is empty; say in words what the picture shall show", "prompt")
    return prompt


def _one_of(fields: Fields, name: str, allowed: Sequence[str]) -> str:
    """The first one where nothing is said."""
    value = fields.get(name)
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise bad_request(f"{name} must be {' or '.join(allowed)}", name)
    return str(value)


def _size(value: object) -> str | None:
    """None: as the model likes it."""
    if value is None or value == "auto":
        return None
    found = _SIZE.fullmatch(text_of(value, "size", 16))
    if found is None or not all(1 <= int(side) <= SIDE_PX_MAX for side in found.groups()):
        raise bad_request(f"size must be auto, or WIDTHxHEIGHT with at most {SIDE_PX_MAX} pixels a side, such as 512x512", "size")
    return found[0]


def _refuse_unsupported(fields: Fields) -> None:
    if fields.get("background") not in (None, "auto", "opaque"):
        raise unsupported("background", "other than opaque is not supported here")
    if fields.get("output_compression") not in (None, 100):
        raise unsupported("output_compression", "is not supported here; leave it out")
    if fields.get("partial_images") not in (None, 0):
        raise unsupported("partial_images", "is not supported here: a stream tells the steps instead; leave it out")


def metadata(answer: LineAnswer) -> dict[str, Any]:
    """As of every answer, and what the Cargo says of how the pictures were made: ``seeds``, the first picture's first, by which the same
    can be had again."""
    result = json.loads(answer.done.result)
    shown = {name: result[name] for name, kinds in _SHOWN.items() if isinstance(result.get(name), kinds)}
    if "seeds" not in shown and answer.done.seed is not None:
        shown["seeds"] = [answer.done.seed]
    return answer.metadata() | shown


def usage(answer: LineAnswer) -> dict[str, Any] | None:
    """By the Cargo's own count; None where it does not count."""
    counts = answer.done.usage
    if counts is None:
        return None
    return {
        "input_tokens": counts.prompt_tokens,
        "output_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "input_tokens_details": {"text_tokens": counts.prompt_tokens, "image_tokens": 0},
    }


def whole(answer: LineAnswer, url_of: Callable[[int, ImageLine], str] | None) -> bytes:
    """The body of an answer. ``url_of(index, image)``: where a picture is to be had; None: it stands in the answer itself."""
    images = answer.images
    data = [{"b64_json": image.data} if url_of is None else {"url": url_of(index, image)} for index, image in enumerate(images)]
    body: dict[str, Any] = {
        "created": answer.created_s,
        "data": data,
        "background": "opaque",
        "output_format": images[0].format,
        "size": _size_of(images[0]),
    }
    if (counts := usage(answer)) is not None:
        body["usage"] = counts
    return to_json(body | {"metadata": metadata(answer)})


def _size_of(image: ImageLine) -> str:
    return f"{image.width}x{image.height}"


def weight_of(event: Event) -> int:
    """How much of a stream's room an event takes."""
    if isinstance(event, Said) and isinstance(event.line, ImageLine):
        return 1 + len(event.line.data) // _LIGHT_BYTES
    return 1


@dataclass(slots=True)
class ImageStream:
    """Bytes of a stream from its events. A picture is told when the next one is there, or the end: the last has what is known only then."""

    answer: LineAnswer
    _held: list[ImageLine] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.answer.result is not None

    def feed(self, events: Iterable[Event]) -> bytes:
        parts: list[bytes] = []
        for event in events:
            self.answer.note(event)
            if isinstance(event, ChoiceResult):
                parts += [self._completed(image, is_last=True) for image in self._held]
            elif isinstance(event, Said) and isinstance(event.line, ImageLine):
                parts += [self._completed(image, is_last=False) for image in self._held]
                self._held = [event.line]
                self.answer.images.clear()  # they have been told
            elif isinstance(event, Said) and isinstance(event.line, ProgressLine):
                parts.append(_event("image_generation.progress", step=event.line.step, total=event.line.total))
            elif isinstance(event, Said) and isinstance(event.line, StatusLine):
                parts.append(_event("image_generation.status", message=event.line.message))
        return b"".join(parts)

    def _completed(self, image: ImageLine, is_last: bool) -> bytes:
        shown: dict[str, Any] = {
            "b64_json": image.data,
            "created_at": self.answer.created_s,
            "size": _size_of(image),
            "quality": "auto",
            "background": "opaque",
            "output_format": image.format,
        }
        if is_last:
            shown["metadata"] = metadata(self.answer)
            if (counts := usage(self.answer)) is not None:
                shown["usage"] = counts
        return _event("image_generation.completed", **shown)


def _event(name: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **fields}))
