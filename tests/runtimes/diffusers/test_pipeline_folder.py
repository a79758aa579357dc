"""Folders of pipelines as strangers send them: what would run code or read other files is refused before any library opens it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from runtimes.diffusers.folder import PIPELINES, open_folder, read_index
from runtimes.diffusers.shapes import ENTRY, FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The model of shapes, without its ``cargo.toml``: that is no part of a Cargo."""
    return Path(shutil.copytree(FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("cargo.toml")))


def files_of(folder: Path, under: str = "") -> dict[str, str]:
    return {under + place.relative_to(folder).as_posix(): str(place) for place in folder.rglob("*") if place.is_file()}


def change(file: Path, words: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        open_folder(ENTRY, files_of(folder))
    return str(refused.value)


def test_a_sound_folder_is_found_by_its_entry(folder: Path) -> None:
    found = open_folder(ENTRY, files_of(folder))
    assert (found.folder, found.pipeline, found.left_out) == (folder, "StableDiffusionPipeline", ())
    below = open_folder("sd/model_index.json", files_of(folder, "sd/"))
    assert below.folder == folder


def test_an_optional_part_without_files_is_left_out_and_a_needed_one_is_missed(folder: Path) -> None:
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    change(folder / ENTRY, checker)
    assert open_folder(ENTRY, files_of(folder)).left_out == ("safety_checker",)
    shutil.rmtree(folder / "vae")
    assert "vae, which the Cargo has no files of" in refusal(folder)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"_class_name": "EvilPipeline"}, "names no pipeline that runs here"),
        ({"_class_name": ["pipeline", "EvilPipeline"]}, "names no pipeline that runs here"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "names no pipeline that runs here"),
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, "another class for unet"),
        ({"unet": ["diffusers", "os.system"]}, "another class for unet"),
        ({"unet": ["diffusers.utils.dynamic_modules_utils", "get_class_from_dynamic_module"]}, "another class for unet"),
        ({"unet": ["../../evil", "UNet2DConditionModel"]}, "another class for unet"),
        ({"unet": ["transformers", "CLIPTextModel"]}, "another class for unet"),
        ({"unet": ["diffusers", "UNet2DConditionModel", "more"]}, "another class for unet"),
        ({"unet": {"diffusers": "UNet2DConditionModel"}}, "another class for unet"),
        ({"unet": [None, "UNet2DConditionModel"]}, "another class for unet"),
        ({"unet": [None, None]}, "lacks unet"),
        ({"tokenizer": ["subprocess", "Popen"]}, "another class for tokenizer"),
        ({"text_encoder": ["transformers", "AutoModel"]}, "another class for text_encoder"),
        ({"safety_checker": ["stable_diffusion", "Evil"]}, "another class for safety_checker"),
        ({"helper": ["diffusers", "UNet2DConditionModel"]}, "a part 'helper'"),
        ({"../vae": ["diffusers", "AutoencoderKL"]}, "a part '../vae'"),
        ({"_module": "evil.py"}, "the word '_module'"),
    ],
)
def test_an_index_that_names_anything_else_is_refused(folder: Path, words: dict[str, Any], reason: str) -> None:
    change(folder / ENTRY, words)
    assert reason in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '"StableDiffusionPipeline"'])
def test_an_index_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / ENTRY).write_text(text)
    assert ENTRY in refusal(folder)


@pytest.mark.parametrize("name", "diffusion_pytorch_model.bin model.pt model.ckpt model.pkl pipeline.py model.onnx weights".split())
def test_other_formats_are_refused_wherever_they_lie(folder: Path, name: str) -> None:
    for place in (folder / name, folder / "unet" / name):
        place.write_bytes(b"anything")
        assert "formats that can run code are refused" in refusal(folder)
        place.unlink()


@pytest.mark.parametrize(
    "data", [pickle.dumps({"weight": [1.0]}), b"", b"{}", b"\xff" * 64, b"\x00" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{}"]
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, data: bytes) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    assert refusal(folder) == "unet/diffusion_pytorch_model.safetensors is no safetensors file"


def test_a_file_that_lies_elsewhere_than_its_path_says_is_refused(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    other = tmp_path / "config.json"
    shutil.copy(folder / "unet" / "config.json", other)
    for wrong in (str(other), str(folder / "vae" / "config.json"), str(folder / "unet" / "gone.json"), "unet/config.json"):
        with pytest.raises(ConfigError, match=r"unet/config\.json does not lie where its path says"):
            open_folder(ENTRY, files | {"unet/config.json": wrong})


@pytest.mark.parametrize("path", ["../config.json", "unet/../../config.json", "/etc/config.json"])
def test_a_path_out_of_the_folder_is_refused(folder: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="leads out of its folder"):
        open_folder(ENTRY, files_of(folder) | {path: str(folder / "unet" / "config.json")})


@pytest.mark.parametrize("entry", ["unet/config.json", "missing/model_index.json", ""])
def test_an_entry_that_is_no_index_is_refused(folder: Path, entry: str) -> None:
    with pytest.raises(ConfigError, match=ENTRY):
        open_folder(entry, files_of(folder))


def test_a_file_that_nobody_signed_is_refused_in_a_part_and_passed_over_elsewhere(folder: Path) -> None:
    files = files_of(folder)
    (folder / "cargo.toml").write_text("")
    assert open_folder(ENTRY, files).folder == folder
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="unet has a file that the Cargo's manifest does not name"):
        open_folder(ENTRY, files)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("unet/config.json", {"inner": [{"quantization_config": {}}]}),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_file": "../../key"}),
    ],
)
def test_a_config_that_leads_elsewhere_is_refused(folder: Path, file: str, words: dict[str, Any]) -> None:
    change(folder / file, words)
    assert refusal(folder).startswith(f"{file} has ")


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "part-2.safetensors"])
def test_shards_are_files_of_the_cargo(folder: Path, shard: str) -> None:
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors"}}))
    assert open_folder(ENTRY, files_of(folder)).folder == folder
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": shard}}))
    assert "names weights that the Cargo does not have" in refusal(folder)


def _real_index(pipeline: str, **parts: str) -> dict[str, Any]:
    return {"_class_name": pipeline, "_diffusers_version": "0.30.0"} | {name: named.split(".") for name, named in parts.items()}


def _sd15() -> dict[str, Any]:
    return _real_index(
        "StableDiffusionPipeline",
        feature_extractor="transformers.CLIPImageProcessor",
        safety_checker="stable_diffusion.StableDiffusionSafetyChecker",
        scheduler="diffusers.PNDMScheduler",
        text_encoder="transformers.CLIPTextModel",
        tokenizer="transformers.CLIPTokenizer",
        unet="diffusers.UNet2DConditionModel",
        vae="diffusers.AutoencoderKL",
    )


def _sdxl() -> dict[str, Any]:
    return {
        **_sd15(),
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
    }


def _flux() -> dict[str, Any]:
    return _real_index(
        "FluxPipeline",
        scheduler="diffusers.FlowMatchEulerDiscreteScheduler",
        text_encoder="transformers.CLIPTextModel",
        text_encoder_2="transformers.T5EncoderModel",
        tokenizer="transformers.CLIPTokenizer",
        tokenizer_2="transformers.T5TokenizerFast",
        transformer="diffusers.FluxTransformer2DModel",
        vae="diffusers.AutoencoderKL",
    )


@pytest.mark.parametrize("make", [_sd15, _sdxl, _flux])
def test_indexes_as_published_are_read(make: Callable[[], dict[str, Any]]) -> None:
    """Stable Diffusion 1.5, SDXL 1.0 and FLUX.1 as their repositories have them."""
    index = make()
    pipeline, parts = read_index(index)
    assert pipeline == index["_class_name"]
    assert parts.keys() <= PIPELINES[pipeline].keys()
    assert parts["vae"] == "diffusers.AutoencoderKL"
