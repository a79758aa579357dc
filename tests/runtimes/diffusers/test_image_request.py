"""What jobs of pictures ask for, in OpenAI's words and the original's, and what is refused with what would do."""

from __future__ import annotations

from typing import Any

import pytest

from protocol import limits
from protocol.errors import ConfigError
from runtimes.diffusers.options import DiffusersOptions, read_options
from runtimes.diffusers.request import IMAGES_MAX, PROMPT_CHARS_MAX, Bounds, ImageRequest, read_request
from runtimes.lines.engine import BadJob

BOUNDS = Bounds(side_multiple=16, side_min=64, side_max=1024, side_default=512, steps_default=28, guidance_default=3.5)
CHANCE = bytes(range(1, 17))


def read(**fields: Any) -> ImageRequest:
    return read_request({"prompt": "a cat"} | fields, BOUNDS, CHANCE)


def test_what_is_not_said_is_the_pipelines_own() -> None:
    assert read() == ImageRequest("a cat", "", 1, 512, 512, 28, 3.5, 0x01020304, "png")
    assert read(n=None, size=None, seed=None, steps=None, guidance=None, output_format=None, negative_prompt=None) == read()


def test_openais_words() -> None:
    asked = read(n=2, size="1024x768", output_format="jpeg", model="shapes", user="somebody", quality="high")
    assert (asked.count, asked.width, asked.height, asked.image_format) == (2, 1024, 768, "jpeg")
    assert read(size="auto") == read()


@pytest.mark.parametrize("steps", ["steps", "num_steps", "num_inference_steps"])
@pytest.mark.parametrize("guidance", ["guidance", "guidance_scale"])
def test_the_originals_words(steps: str, guidance: str) -> None:
    asked = read(**{steps: 20, guidance: 7, "width": 64, "height": 128, "negative_prompt": "a dog", "seed": 42})
    assert asked == ImageRequest("a cat", "a dog", 1, 64, 128, 20, 7.0, 42, "png")


def test_one_side_alone_is_meant_for_both() -> None:
    assert (read(width=64).height, read(height=80).width) == (64, 80)


def test_each_picture_has_the_next_seed_and_none_is_beyond_the_last() -> None:
    assert read(n=3, seed=7).seeds == (7, 8, 9)
    assert read(n=2, seed=limits.SEED_MAX).seeds == (limits.SEED_MAX, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "prompt is needed"),
        ({"prompt": None}, "prompt is needed"),
        ({"prompt": ["a", "b"]}, "prompt must be a text"),
        ({"prompt": "x" * (PROMPT_CHARS_MAX + 1)}, f"at most {PROMPT_CHARS_MAX} characters"),
        ({"negative_prompt": 5}, "negative_prompt must be a text"),
        ({"n": 0}, "n must be an integer from 1 to 10"),
        ({"n": IMAGES_MAX + 1}, "n must be an integer from 1 to 10"),
        ({"n": True}, "n must be an integer"),
        ({"n": "2"}, "n must be an integer"),
        ({"n": 2.0}, "n must be an integer"),
        ({"size": "1024"}, "WIDTHxHEIGHT such as 512x512"),
        ({"size": 1024}, "WIDTHxHEIGHT"),
        ({"size": "-64x64"}, "WIDTHxHEIGHT"),
        ({"size": "64x64\n"}, "WIDTHxHEIGHT"),
        ({"size": "999999999x64"}, "WIDTHxHEIGHT"),
        ({"size": "1040x64"}, "width must be from 64 to 1024 pixels, a multiple of 16"),
        ({"size": "64x2048"}, "height must be from 64 to 1024"),
        ({"size": "64x65"}, "height must be from 64 to 1024 pixels, a multiple of 16"),
        ({"size": "0x0"}, "width must be from 64"),
        ({"width": 48}, "width must be from 64"),
        ({"width": 72}, "a multiple of 16"),
        ({"height": 64.0}, "height must be"),
        ({"size": "64x64", "width": 64}, "either size or width and height"),
        ({"steps": 0}, "steps must be an integer from 1 to 150"),
        ({"num_steps": 151}, "num_steps must be an integer from 1 to 150"),
        ({"steps": 3, "num_steps": 3}, "steps and num_steps are the same"),
        ({"guidance": -1}, "guidance must be a number from 0 to 50"),
        ({"guidance_scale": 50.5}, "guidance_scale must be a number from 0 to 50"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"guidance": True}, "guidance must be a number"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**63}, "seed must be an integer from 0"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"format": "tiff"}, "format must be one of png, jpeg, webp"),
        ({"format": ["png"]}, "format must be one of"),
        ({"output_format": 3}, "output_format must be one of"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadJob) as refused:
        read(**fields)
    assert words in str(refused.value)
    assert "xxxx" not in str(refused.value)


def test_options_are_the_manifests() -> None:
    assert read_options({}) == DiffusersOptions()
    assert read_options({"steps": 4, "guidance": 0, "offload": "model", "vae_tiling": True}).guidance == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"custom_pipeline": "evil"}, "option 'custom_pipeline' is unknown"),
        ({"trust_remote_code": True}, "option 'trust_remote_code' is unknown"),
        ({"steps": 151}, "option steps must be between 0 and 150"),
        ({"steps": True}, "option steps must be int"),
        ({"guidance": "7"}, "option guidance must be int or float"),
        ({"batch": 11}, "option batch must be between 1 and 10"),
        ({"side_max": 2048}, "option side_max must be between"),
        ({"dtype": "int8"}, "option dtype must be one of float32, float16, bfloat16"),
        ({"variant": "../x"}, "option variant must be one of"),
    ],
)
def test_options_that_are_unknown_or_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_options(options)
    assert words in str(refused.value)
