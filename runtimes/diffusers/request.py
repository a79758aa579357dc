"""What a job of pictures asks for, read from its input: OpenAI's names (prompt, n, size, output_format) and the original's (num_steps,
guidance_scale, width, height, negative_prompt). Fields that are not known are passed over, as OpenAI's clients send some of their own.

Pure; every refusal is a BadJob that names the field and says what would do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol import limits
from runtimes.lines.engine import BadJob

IMAGES_MAX = limits.IMAGES_MAX
SIDE_PX_MAX = limits.SIDE_PX_MAX
STEPS_MAX = limits.STEPS_MAX
GUIDANCE_MAX = limits.GUIDANCE_MAX
PROMPT_CHARS_MAX = limits.PROMPT_CHARS_MAX
FORMATS = ("png", "jpeg", "webp")

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})\Z")
_STEP_NAMES = ("steps", "num_steps", "num_inference_steps")
_GUIDANCE_NAMES = ("guidance", "guidance_scale")
_FORMAT_NAMES = ("format", "output_format")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a loaded pipeline can do, and what it does unless told. Sides in pixels; ``side_multiple`` divides both."""

    side_multiple: int
    side_min: int
    side_max: int
    side_default: int
    steps_default: int
    guidance_default: float


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One job. ``seed``: of the first picture; the next has the next, see ``seeds``."""

    prompt: str
    negative_prompt: str
    count: int
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    image_format: str

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple((self.seed + index) % (limits.SEED_MAX + 1) for index in range(self.count))


def read_request(fields: Mapping[str, Any], bounds: Bounds, chance: bytes) -> ImageRequest:
    """``chance``: 16 bytes, of which the seed is made where the input has none. Raises BadJob."""
    prompt = _text(fields, "prompt")
    if not prompt.strip():
        raise BadJob("prompt is needed: what the picture shall show, in words")
    width, height = _size(fields, bounds)
    # 32 bits, which every client's JSON keeps as they are
    seed = _integer(fields, ("seed",), int.from_bytes(chance[:4], "big"), 0, limits.SEED_MAX)
    return ImageRequest(
        prompt=prompt,
        negative_prompt=_text(fields, "negative_prompt"),
        count=_integer(fields, ("n",), 1, 1, IMAGES_MAX),
        width=width,
        height=height,
        steps=_integer(fields, _STEP_NAMES, bounds.steps_default, 1, STEPS_MAX),
        guidance=_guidance(fields, bounds),
        seed=seed,
        image_format=_format(fields),
    )


def _given(fields: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The field under the one of its names that is used, and its value; null is as good as nothing."""
    given = [(name, fields[name]) for name in names if fields.get(name) is not None]
    if len(given) > 1:
        raise BadJob(f"{' and '.join(name for name, _ in given)} are the same; give one of them")
    return given[0] if given else (names[0], None)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = "" if fields.get(name) is None else fields[name]
    if not isinstance(value, str) or len(value) > PROMPT_CHARS_MAX:
        raise BadJob(f"{name} must be a text of at most {PROMPT_CHARS_MAX} characters")
    return value


def _integer(fields: Mapping[str, Any], names: tuple[str, ...], default: int, low: int, high: int) -> int:
    name, value = _given(fields, names)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise BadJob(f"{name} must be an integer from {low} to {high}")
    return value


def _guidance(fields: Mapping[str, Any], bounds: Bounds) -> float:
    name, value = _given(fields, _GUIDANCE_NAMES)
    if value is None:
        return bounds.guidance_default
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= GUIDANCE_MAX:
        raise BadJob(f"{name} must be a number from 0 to {GUIDANCE_MAX:g}")
    return float(value)


def _format(fields: Mapping[str, Any]) -> str:
    name, value = _given(fields, _FORMAT_NAMES)
    if value is None:
        return FORMATS[0]
    if value == "jpg":
        return "jpeg"
    if value not in FORMATS:
        raise BadJob(f"{name} must be one of {', '.join(FORMATS)}")
    return str(value)


def _size(fields: Mapping[str, Any], bounds: Bounds) -> tuple[int, int]:
    """Width and height, from ``size`` or from fields of their own, of which one alone is meant for both."""
    size = fields.get("size")
    sides = [fields.get("width"), fields.get("height")]
    if size not in (None, "auto"):
        found = _SIZE.match(size) if isinstance(size, str) else None
        if found is None:
            raise BadJob(f"size must be WIDTHxHEIGHT such as {bounds.side_default}x{bounds.side_default}")
        if sides != [None, None]:
            raise BadJob("give either size or width and height")
        sides = [int(found[1]), int(found[2])]
    width, height = (_side(name, side, bounds) for name, side in zip(("width", "height"), sides, strict=True))
    default = bounds.side_default
    return width or height or default, height or width or default


def _side(name: str, side: Any, bounds: Bounds) -> int:
    """0 where it is not given."""
    if side is None:
        return 0
    low, high, multiple = bounds.side_min, bounds.side_max, bounds.side_multiple
    if type(side) is not int or not low <= side <= high or side % multiple:
        raise BadJob(f"{name} must be from {low} to {high} pixels, a multiple of {multiple}")
    return side
