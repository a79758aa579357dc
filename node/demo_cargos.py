"""What the demo shows beside a chat: which sentence is nearest to another, by vectors, and a picture, where torch is installed."""

from __future__ import annotations

import base64
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from node.demo_client import ask_json, say

EMBEDDER, PAINTER = "minilm-l6-v2", "shapes"
_SENTENCE = "A kitten sleeps on the rug."
_OTHERS = ("A cat is lying on the carpet.", "The stock market fell on Monday.", "Boil the potatoes for twenty minutes.")
_SCENE = "a red circle on a white ground"
PICTURE = Path("archipelag-demo.png")


def cargos() -> tuple[str, ...]:
    """Names of the Cargos that this installation can show."""
    painter = (PAINTER,) if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers") else ()
    return (EMBEDDER, *painter)


def show(url: str, key: str, offered: Sequence[str], out: TextIO) -> None:
    """Raises DemoFailed."""
    if EMBEDDER in offered:
        _show_nearest(url, key, out)
    if PAINTER in offered:
        _show_picture(url, key, out)
    else:
        say(out, "\n(`make demo-images` also paints a picture; it installs torch and diffusers)")


def _show_nearest(url: str, key: str, out: TextIO) -> None:
    answer = ask_json(url, key, "/v1/embeddings", {"model": EMBEDDER, "input": [_SENTENCE, *_OTHERS]})
    first, *others = [entry["embedding"] for entry in answer["data"]]
    say(out, f"\n> embeddings by {EMBEDDER}: what is nearest to {_SENTENCE!r}?")
    for likeness, sentence in sorted(((_cosine(first, other), text) for other, text in zip(others, _OTHERS, strict=True)), reverse=True):
        say(out, f"  {likeness:5.2f}  {sentence}")


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))


def _show_picture(url: str, key: str, out: TextIO) -> None:
    body = {"model": PAINTER, "prompt": _SCENE, "seed": 0, "response_format": "b64_json"}
    answer = ask_json(url, key, "/v1/images/generations", body)
    PICTURE.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    say(out, f"\n> {_SCENE}, by {PAINTER}: {PICTURE.resolve()}")
