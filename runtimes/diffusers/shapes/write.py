"""Writes the pipeline of shapes as a folder in diffusers' format, and lists its files as a manifest has them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from runtimes.diffusers.shapes import ENTRY
from runtimes.diffusers.shapes.parts import Parts
from runtimes.diffusers.shapes.words import vocabulary

STEPS = 20  # that the scheduler needs for a picture; what a manifest's options say
GUIDANCE = 2.0
_CARGO_FILE = "cargo.toml"
# A worker has 430 MB once it has loaded, nearly all of it torch and diffusers.
_CARGO_TOML = f"""name = "shapes"
release = "1.0.0"
runtime = "diffusers"
entry = "{ENTRY}"
licence = "Apache-2.0"
description = "Draws a circle, a square or a triangle in one of six colours on a white, black or grey ground, 32 x 32 pixels."
ask = "0.001+0+0"
trust_level = 1

[needs]
memory_mb = 1024
time_s = 120
cpu_threads = 2

[options]
steps = {STEPS}
guidance = {GUIDANCE}
side_max = 256

[input_schema]
type = "object"
required = ["prompt"]

[input_schema.properties]
prompt = {{ type = "string", examples = ["a red circle on a white ground"] }}
negative_prompt = {{ type = "string" }}
n = {{ type = "integer", minimum = 1, maximum = 10 }}
size = {{ type = "string", examples = ["32x32"] }}
steps = {{ type = "integer", minimum = 1, maximum = 150 }}
guidance = {{ type = "number", minimum = 0, maximum = 50 }}
seed = {{ type = "integer", minimum = 0 }}
output_format = {{ type = "string", enum = ["png", "jpeg", "webp"] }}

[cache]
enabled = false  # the same prompt again asks for another picture

"""


def write_folder(parts: Parts, folder: Path) -> None:
    """In half precision. The parts have half precision afterwards too."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    _write_tokenizer(folder / "tokenizer", parts.tokenizer.model_max_length)


def _write_tokenizer(folder: Path, tokens_max: int) -> None:
    """In CLIP's own files, which every release of transformers reads; what it writes itself differs from one to the next."""
    shutil.rmtree(folder)
    folder.mkdir()
    tokens, merges = vocabulary()
    _write(folder / "vocab.json", json.dumps(tokens, indent=0))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokens_max, "pad_token": "<|endoftext|>"}
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=1))


def _write(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")


def file_list(folder: Path) -> list[dict[str, Any]]:
    """``path``, ``sha256``, ``size_bytes`` of each of the pipeline's files, sorted by path."""
    files = sorted(place for place in folder.rglob("*") if place.is_file() and place.name != _CARGO_FILE)
    return [
        {
            "path": place.relative_to(folder).as_posix(),
            "sha256": hashlib.sha256(place.read_bytes()).hexdigest(),
            "size_bytes": place.stat().st_size,
        }
        for place in files
    ]


def write_cargo(folder: Path) -> None:
    """``cargo.toml``, of which ``archipelag-node cargo build`` makes the manifest."""
    files = "".join(f'[files."{file["path"]}"]\n' for file in file_list(folder))
    (folder / _CARGO_FILE).write_text(_CARGO_TOML + files, encoding="utf-8")
