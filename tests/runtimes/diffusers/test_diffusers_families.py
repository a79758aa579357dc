"""Stable Diffusion XL, FLUX and a Stable Diffusion with a safety checker: tiny, with weights by chance, written by diffusers itself and
loaded as strangers' are. What they show is noise; that all of their loading and running works is what is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protocol.cargo_io import ImageLine, ProgressLine, StatusLine
from runtimes.diffusers.engine import DiffusersEngine, load
from runtimes.diffusers.shapes import FOLDER
from runtimes.diffusers.shapes.check import LocalJob, order_of, picture_of
from runtimes.diffusers.shapes.words import BEGIN, END, vocabulary
from runtimes.lines.engine import BadJob, LoadOrder

WIDTH = 32  # of the text encoders


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What the families share."""
    import torch
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokens, merges = vocabulary()
    tokenizer = CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=77)
    return {"tokenizer": tokenizer, "vae": small_vae(), "text_encoder": clip("CLIPTextModel")}


def clip(kind: str) -> Any:
    import transformers

    tokens, _ = vocabulary()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=tokens[BEGIN], eos_token_id=tokens[END], pad_token_id=tokens[END],
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def small_vae() -> Any:
    """Half as wide and high inside. The shift is for FLUX, which has one."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 16),
        latent_channels=4, norm_num_groups=4, sample_size=64, shift_factor=0.1,
    )  # fmt: skip


def small_unet(words: int, **further: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=words, attention_head_dim=(2, 4), **further,
    )  # fmt: skip


def loaded(pipe: Any, folder: Path, **options: Any) -> DiffusersEngine:
    pipe.save_pretrained(folder, safe_serialization=True)
    order = order_of(folder, threads=1)
    return load(LoadOrder(order.name, order.content_hash, order.entry, order.files, options, 1))


@pytest.fixture(scope="module")
def sdxl(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    # The second encoder's pooled words, and six numbers of size and crop with 8 wide embeddings each.
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8}
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer_2=parts["tokenizer"],
        text_encoder_2=clip("CLIPTextModelWithProjection"),
        unet=small_unet(2 * WIDTH, use_linear_projection=True, **added),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )
    return loaded(pipe, tmp_path_factory.mktemp("sdxl"), steps=1)


@pytest.fixture(scope="module")
def flux(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> DiffusersEngine:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in ("a", "red", "circle"))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipe = FluxPipeline(
        **parts,
        tokenizer_2=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=WIDTH, d_ff=WIDTH, d_kv=8, num_layers=1, num_heads=4)),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return loaded(pipe, tmp_path_factory.mktemp("flux"), steps=1, side_default=64)


def run(engine: DiffusersEngine, **fields: Any) -> tuple[list[Any], dict[str, Any]]:
    job = LocalJob({"prompt": "a red circle", "seed": 3} | fields)
    done = engine.run(job)
    return job.lines, json.loads(done.result)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_family_loads_and_makes_pictures(family: str, request: pytest.FixtureRequest) -> None:
    engine: DiffusersEngine = request.getfixturevalue(family)
    assert {"sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}[family] in engine.label
    lines, result = run(engine, size="64x64")
    progress, image = lines
    assert progress == ProgressLine(1, 1)
    assert isinstance(image, ImageLine)
    assert picture_of(image).shape == (64, 64, 3)
    assert result["steps"] == 1
    assert run(engine, size="64x64")[0] == lines
    assert run(engine, size="64x64", seed=4)[0][1] != image
    assert run(engine, size="64x64", negative_prompt="a square")[0][1] != image


def test_bounds_are_those_of_the_family(sdxl: DiffusersEngine, flux: DiffusersEngine) -> None:
    assert (sdxl.bounds.side_multiple, sdxl.bounds.side_default, sdxl.bounds.guidance_default) == (8, 64, 5.0)
    assert (flux.bounds.side_multiple, flux.bounds.side_default, flux.bounds.guidance_default) == (8, 64, 3.5)
    for engine in (sdxl, flux):
        with pytest.raises(BadJob, match="multiple of 8"):
            run(engine, size="68x64")


def test_flux_says_when_a_prompt_is_cut(flux: DiffusersEngine) -> None:
    lines, _ = run(flux, prompt="red " * 600)
    assert lines[0] == StatusLine("the prompt has 601 tokens; the model reads the first 512")


def test_a_safety_checker_is_loaded_and_what_it_blackens_is_told(parts: dict[str, Any], tmp_path: Path) -> None:
    """As Stable Diffusion 1.5 has it, on the model of shapes. Its weights here see a concept in everything."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = small | {"image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=vision, projection_dim=WIDTH))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
    pipe = StableDiffusionPipeline.from_pretrained(
        FOLDER,
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    lines, result = run(loaded(pipe, tmp_path, steps=1), n=2)
    assert result["filtered"] == [0, 1]
    assert not picture_of(lines[-1]).any()
