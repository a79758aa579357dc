"""A pipeline's folder in diffusers' own format, checked before any library opens it.

``model_index.json`` names the pipeline and, for each part, a library and a class in it; the loaders of diffusers and transformers import
what it names, follow what the configs beside the weights say, and with other options run code that lies in the folder. So a Cargo may
name only pipelines, parts and classes that are listed here, has weights as safetensors only, and no config that points elsewhere.

Nothing here imports torch or diffusers.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError

INDEX_NAME = "model_index.json"
_JSON_BYTES_MAX = 32 * 1024 * 1024  # a tokenizer.json of T5 has 2.4 MB
_HEADER_BYTES_MAX = 100 * 1000 * 1000  # of a safetensors file, as its own library has it

_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md")  # .model: a tokenizer's pieces, as sentencepiece writes them
_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE"})

_CLIP_TEXT = ("transformers.CLIPTextModel",)
_CLIP_PROJECTED = ("transformers.CLIPTextModelWithProjection",)
_CLIP_TOKENS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
_T5_TOKENS = ("transformers.T5Tokenizer", "transformers.T5TokenizerFast")
_VAE = ("diffusers.AutoencoderKL",)
_IMAGE_PARTS = {
    "feature_extractor": ("transformers.CLIPImageProcessor", "transformers.CLIPImageProcessorPil"),
    "image_encoder": ("transformers.CLIPVisionModelWithProjection",),
}
_SCHEDULERS = tuple(
    f"diffusers.{name}Scheduler"
    for name in (
        "DDIM DDPM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete FlowMatchEulerDiscrete "
        "HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM TCD UniPCMultistep"
    ).split()
)

PIPELINES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {
        "vae": _VAE,
        "text_encoder": _CLIP_TEXT,
        "tokenizer": _CLIP_TOKENS,
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": _SCHEDULERS,
        "safety_checker": ("stable_diffusion.StableDiffusionSafetyChecker",),  # a module of diffusers' own, named so in real indexes
        **_IMAGE_PARTS,
    },
    "StableDiffusionXLPipeline": {
        "vae": _VAE,
        "text_encoder": _CLIP_TEXT,
        "text_encoder_2": _CLIP_PROJECTED,
        "tokenizer": _CLIP_TOKENS,
        "tokenizer_2": _CLIP_TOKENS,
        "unet": ("diffusers.UNet2DConditionModel",),
        "scheduler": _SCHEDULERS,
        **_IMAGE_PARTS,
    },
    "FluxPipeline": {
        "vae": _VAE,
        "text_encoder": _CLIP_TEXT,
        "text_encoder_2": ("transformers.T5EncoderModel",),
        "tokenizer": _CLIP_TOKENS,
        "tokenizer_2": _T5_TOKENS,
        "transformer": ("diffusers.FluxTransformer2DModel",),
        "scheduler": _SCHEDULERS,
        **_IMAGE_PARTS,
    },
}
"""Pipeline -> its parts -> the classes that each may have."""

_OPTIONAL_PARTS = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
_INDEX_WORDS = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_ignore_files"})
# Words of configs that have a loader import, download or read something else.
_CONFIG_WORDS_REFUSED = frozenset(
    "auto_map custom_pipelines quantization_config tokenizer_file vocab_file merges_file spm_file".split()
)


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """``left_out``: parts that the index names, that are not needed, and that have no files."""

    folder: Path
    pipeline: str
    left_out: tuple[str, ...]


def open_folder(entry: str, files: Mapping[str, str]) -> PipelineFolder:
    """Checks the files of a Cargo, as LoadOrder has them, and finds the folder they lie in. Raises ConfigError."""
    folder = _folder_of(entry, files)
    under = entry.removesuffix(INDEX_NAME)
    for path, place in files.items():
        _check_name(path)
        if path.startswith(under) and (Path(place) != folder / path.removeprefix(under) or not Path(place).is_file()):
            raise ConfigError(f"{path} does not lie where its path says, beside {INDEX_NAME}")
    inside = {path.removeprefix(under): Path(place) for path, place in files.items() if path.startswith(under)}
    pipeline, parts = read_index(_json(INDEX_NAME, inside[INDEX_NAME]))
    for part in parts:
        _check_part(folder, part, inside)
    left_out = tuple(part for part in parts if not any(path.startswith(f"{part}/") for path in inside))
    if needed := [part for part in left_out if part not in _OPTIONAL_PARTS]:
        raise ConfigError(f"{INDEX_NAME} names {', '.join(needed)}, which the Cargo has no files of")
    return PipelineFolder(folder, pipeline, left_out)


def _folder_of(entry: str, files: Mapping[str, str]) -> Path:
    if entry.rpartition("/")[2] != INDEX_NAME:
        raise ConfigError(f"the entry of a diffusers Cargo is its {INDEX_NAME}")
    place = files.get(entry)
    if place is None or not Path(place).is_absolute() or Path(place).name != INDEX_NAME:
        raise ConfigError(f"{INDEX_NAME} does not lie where its path says")
    return Path(place).parent


def _check_name(path: str) -> None:
    name = path.rpartition("/")[2]
    if ".." in path.split("/") or path.startswith("/"):
        raise ConfigError("a path of the Cargo leads out of its folder")
    if name not in _NAMES and not name.endswith(_SUFFIXES):
        raise ConfigError(f"{path}: a pipeline has weights in safetensors and configs in JSON only; formats that can run code are refused")


def read_index(index: Any) -> tuple[str, dict[str, str]]:
    """The pipeline, and ``library.Class`` of each part it has. Raises ConfigError for anything that is not listed here."""
    if not isinstance(index, dict):
        raise ConfigError(f"{INDEX_NAME} is no JSON object")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ConfigError(f"{INDEX_NAME} names no pipeline that runs here; these do: {', '.join(PIPELINES)}")
    parts: dict[str, str] = {}
    for name, value in index.items():
        if name.startswith("_"):
            if name not in _INDEX_WORDS:
                raise ConfigError(f"{INDEX_NAME} has the word {name!r:.60}, which no pipeline here needs")
        elif isinstance(value, list | dict) and value != [None, None]:
            parts[name] = _class_of(pipeline, name, value)
    if missing := PIPELINES[pipeline].keys() - parts.keys() - _OPTIONAL_PARTS:
        raise ConfigError(f"{INDEX_NAME} lacks {', '.join(sorted(missing))}, which a {pipeline} needs")
    return pipeline, parts


def _class_of(pipeline: str, part: str, value: object) -> str:
    allowed = PIPELINES[pipeline].get(part)
    if allowed is None:
        raise ConfigError(f"{INDEX_NAME} names a part {part!r:.60}, which a {pipeline} does not have")
    named = ".".join(value) if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value) else ""
    if named not in allowed:
        raise ConfigError(f"{INDEX_NAME} has another class for {part} than {', '.join(allowed)}; code of a Cargo's own is not run")
    return named


def _check_part(folder: Path, part: str, inside: Mapping[str, Path]) -> None:
    """Its files are those of the manifest and no others, and none leads elsewhere."""
    for place in (folder / part).rglob("*"):
        if not place.is_dir() and place.relative_to(folder).as_posix() not in inside:
            raise ConfigError(f"{part} has a file that the Cargo's manifest does not name")
    for path, place in inside.items():
        if not path.startswith(f"{part}/"):
            continue
        if path.endswith(".safetensors"):
            _check_weights(path, place)
        elif path.endswith(".json"):
            _check_config(path, _json(path, place), inside)


def _check_weights(path: str, place: Path) -> None:
    """Eight bytes say how long the header is, which is JSON (huggingface.co/docs/safetensors, format)."""
    with place.open("rb") as file:
        head = file.read(9)
    size = struct.unpack("<Q", head[:8])[0] if len(head) == 9 else 0
    if head[8:] != b"{" or not 0 < size <= min(_HEADER_BYTES_MAX, os.path.getsize(place) - 8):
        raise ConfigError(f"{path} is no safetensors file")


def _check_config(path: str, config: Any, inside: Mapping[str, Path]) -> None:
    if path.endswith(".safetensors.index.json"):
        parent = path.rpartition("/")[0]
        shards = config.get("weight_map") if isinstance(config, dict) else None
        if not isinstance(shards, dict) or not all(f"{parent}/{shard}" in inside for shard in shards.values()):
            raise ConfigError(f"{path} names weights that the Cargo does not have")
    elif not path.endswith(("/tokenizer.json", "/vocab.json")):  # their keys are pieces of text
        for word in _words(config):
            if word in _CONFIG_WORDS_REFUSED:
                raise ConfigError(f"{path} has {word}, which leads to code or files beyond the Cargo's own")


def _words(value: Any) -> Iterator[str]:
    """All keys, however deep."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _words(inner)


def _json(path: str, place: Path) -> Any:
    if place.stat().st_size > _JSON_BYTES_MAX:
        raise ConfigError(f"{path} has more than {_JSON_BYTES_MAX} bytes")
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is no JSON") from None
