"""Pictures of strangers to arrays: checked before they are decoded, then sized and scaled as the model wants.

A PNG of a few hundred bytes may say that it has 100,000 x 100,000 pixels, so the size in its header is read first, and no other format
than PNG and JPEG is even looked at.
"""

from __future__ import annotations

import binascii
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from protocol import limits
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Port

IMAGE_BYTES_MAX = 4 * 1024 * 1024
IMAGE_PIXELS_MAX = 4096 * 4096
IMAGE_SIDE_MAX = limits.CARGO_IMAGE_SIDE_MAX
INPUT_SIDE_MAX = 4096  # of what a model gets

_FORMATS = ("PNG", "JPEG")
_FAULTS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error)
_CHANNELS = 3

Pixels = npt.NDArray[np.float32]


def read_image(fields: Mapping[str, Any], name: str = "image") -> Image.Image:
    """The picture in a field, in RGB, the right way up, on white where it is transparent. Raises BadJob."""
    data = _bytes(fields, name)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as probe:
            _check_size(name, probe.size)
            probe.verify()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise BadJob(f"{name} has too many pixels; at most {IMAGE_PIXELS_MAX} are allowed") from None
    except _FAULTS:
        raise BadJob(f"{name} is no whole PNG or JPEG; send such a file in base64") from None


def _bytes(fields: Mapping[str, Any], name: str) -> bytes:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise BadJob(f"{name} must be a PNG or JPEG file in base64")
    if value.startswith("data:image/"):
        value = value.partition(",")[2]
    if len(value) > IMAGE_BYTES_MAX * 4 // 3 + 4:
        raise BadJob(f"{name} is over {IMAGE_BYTES_MAX} bytes; send a smaller file")
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        raise BadJob(f"{name} is not base64; send a PNG or JPEG file in base64") from None


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > IMAGE_PIXELS_MAX or max(size) > IMAGE_SIDE_MAX:
        raise BadJob(f"{name} has {width} x {height} pixels; at most {IMAGE_PIXELS_MAX} and {IMAGE_SIDE_MAX} a side are allowed")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would cut at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "A" not in image.mode and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    ground = Image.new("RGB", layered.size, (255, 255, 255))
    ground.paste(layered, mask=layered.getchannel("A"))
    return ground


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the picture lies in the model's input: ``x = left + scale_x * (x of the picture)``, in pixels."""

    scale_x: float
    scale_y: float
    left: int = 0
    top: int = 0


@dataclass(frozen=True, slots=True)
class Preparation:
    """From a picture to the model's input, of [1, 3, height, width] or [1, height, width, 3].

    ``resize``: stretch; crop (the shorter side fits, the middle is taken); letterbox (the longer side fits, the rest is ``pad``); or
    multiple (at most ``height`` x ``width``, each side a multiple of 32, for models that take any size).
    A value is ``(byte * scale - mean) / std``.
    """

    height: int
    width: int
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    is_bgr: bool
    is_last: bool  # channels last
    dtype: str
    pad: int = 114

    def array(self, image: Image.Image) -> tuple[Array, Placement]:
        sized, placement = self._sized(image)
        return self.values(np.asarray(sized, np.float32))[None], placement

    def values(self, pixels: Pixels) -> Array:
        """Of [height, width, 3] bytes as floats."""
        ordered = pixels[..., ::-1] if self.is_bgr else pixels
        scaled = (ordered * np.float32(self.scale) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        laid = scaled if self.is_last else scaled.transpose(2, 0, 1)
        return np.ascontiguousarray(laid, dtype=self.dtype)

    def _sized(self, image: Image.Image) -> tuple[Image.Image, Placement]:
        bilinear = Image.Resampling.BILINEAR
        width, height = image.size
        if self.resize == "crop":
            factor = max(self.width / width, self.height / height)
            inner = self.width / factor, self.height / factor
            left, top = (width - inner[0]) / 2, (height - inner[1]) / 2
            box = max(0.0, left), max(0.0, top), min(width, left + inner[0]), min(height, top + inner[1])  # a rounding may be outside
            placed = Placement(factor, factor, round(-left * factor), round(-top * factor))
            return image.resize((self.width, self.height), bilinear, box=box), placed
        if self.resize == "letterbox":
            return self._letterboxed(image)
        target = self._multiple(image.size) if self.resize == "multiple" else (self.width, self.height)
        return image.resize(target, bilinear), Placement(target[0] / width, target[1] / height)

    def _letterboxed(self, image: Image.Image) -> tuple[Image.Image, Placement]:
        factor = min(self.width / image.width, self.height / image.height)
        inner = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        left, top = (self.width - inner[0]) // 2, (self.height - inner[1]) // 2
        ground = Image.new("RGB", (self.width, self.height), (self.pad,) * _CHANNELS)
        ground.paste(image.resize(inner, Image.Resampling.BILINEAR), (left, top))
        return ground, Placement(inner[0] / image.width, inner[1] / image.height, left, top)

    def _multiple(self, size: tuple[int, int]) -> tuple[int, int]:
        factor = min(1.0, self.width / size[0], self.height / size[1])
        width, height = (max(32, round(side * factor / 32) * 32) for side in size)
        return width, height


def open_preparation(port: Port, options: OptionReader, resize: str, width: int = 0) -> Preparation:
    """Reads ``layout``, ``channels``, ``height``, ``width``, ``resize``, ``mean``, ``std``, ``scale``, ``pad``. ``width``: where there is
    no such option. Raises ConfigError."""
    is_last = options.choice("layout", ("nhwc", "nchw") if port.shape[1:] and port.shape[-1] == _CHANNELS else ("nchw", "nhwc")) == "nhwc"
    if len(port.shape) != 4 or port.shape[3 if is_last else 1] not in (None, _CHANNELS) or port.shape[0] not in (None, 1):
        raise ConfigError(f"the model's {port.name} has shape {port.shape_text}; a picture has one row, three channels, height and width")
    if port.dtype not in ("float32", "float16", "float64", "uint8"):
        raise ConfigError(f"the model's {port.name} is {port.dtype}; pictures go as floats or uint8")
    own = port.shape[1:3] if is_last else port.shape[2:4]
    height, width = _side(options, "height", own[0]), width or _side(options, "width", own[1])
    kinds = [resize, *(kind for kind in ("stretch", "crop", "letterbox", "multiple") if kind != resize)]
    zeros, ones = (0.0,) * _CHANNELS, (1.0,) * _CHANNELS
    std = options.numbers("std", ones, _CHANNELS)
    if min(map(abs, std)) < 1e-6:
        raise ConfigError("option std has a zero")
    return Preparation(
        height,
        width,
        options.choice("resize", kinds),
        options.numbers("mean", zeros, _CHANNELS),
        std,
        options.number("scale", 1.0 if port.dtype == "uint8" else 1 / 255, 1e-6, 1e6),
        options.choice("channels", ("rgb", "bgr")) == "bgr",
        is_last,
        port.dtype,
        options.integer("pad", 114, 0, 255),
    )


def _side(options: OptionReader, name: str, own: int | None) -> int:
    side = options.integer(name, own or 0, 0, INPUT_SIDE_MAX)
    if side < 1 or (own is not None and side != own):
        raise ConfigError(f"option {name} must be {own or 'given, since the model takes any'}")
    return side


def only_input(inputs: Mapping[str, Port]) -> Port:
    """Raises ConfigError for a model that takes more than a picture."""
    if len(inputs) != 1:
        raise ConfigError(f"the model takes {', '.join(inputs)[:200]}; a task of pictures has one input")
    return next(iter(inputs.values()))
