"""The model of shapes from prompt to picture, through the engine that the worker has: pictures that show what the prompt says, seeds,
progress, cancelling, and models and inputs that cannot be used."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, encode_line
from protocol.errors import ConfigError
from runtimes.diffusers.engine import DiffusersEngine, load
from runtimes.diffusers.shapes import ENTRY, FOLDER, pins
from runtimes.diffusers.shapes.check import LocalJob, order_of, picture_of
from runtimes.diffusers.shapes.draw import ALL_SCENES, HELD_OUT, Scene, read_scene
from runtimes.diffusers.shapes.write import STEPS, file_list
from runtimes.lines.engine import BadJob, BrokenJob, JobStopped

RED_CIRCLE = Scene("red", "circle", "white")


@dataclass(slots=True)
class StoppedJob(LocalJob):
    """Has to end some checks after its ``step``-th step."""

    step: int = 0
    layers: int = 0
    checks: int = 0

    def check(self) -> None:
        if any(line == ProgressLine(self.step, 8) for line in self.lines):
            self.checks += 1
        if self.checks > self.layers:
            raise JobStopped


@pytest.fixture(scope="module")
def engine() -> DiffusersEngine:
    return load(order_of(FOLDER, threads=1))


def run(engine: DiffusersEngine, **fields: Any) -> tuple[list[ImageLine], list[ProgressLine], DoneLine]:
    job = LocalJob({"prompt": RED_CIRCLE.caption, "seed": 1, "steps": 2} | fields, seed=bytes(range(16)))
    done = engine.run(job)
    for line in (*job.lines, done):
        encode_line(line)
    return [i for i in job.lines if isinstance(i, ImageLine)], [p for p in job.lines if isinstance(p, ProgressLine)], done


def test_the_model_that_ships_is_the_one_that_is_pinned() -> None:
    assert {file["path"]: file["sha256"] for file in file_list(FOLDER)} == pins()
    assert sum(file["size_bytes"] for file in file_list(FOLDER)) < 3_000_000


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_pictures_show_what_their_captions_say(engine: DiffusersEngine, shape: str) -> None:
    """All combinations of colour and ground, among them one a shape that the model was never shown. 18 pictures of 20 steps: about 3 s."""
    for scene in (scene for scene in ALL_SCENES if scene.shape == shape):
        images, _, _ = run(engine, prompt=scene.caption, steps=STEPS, seed=0)
        seen = read_scene(picture_of(images[0]))
        assert seen.shows(scene), f"{scene.caption}: {seen}"
        assert 0.05 < seen.cover < 0.65
        assert 0.8 < seen.aspect < 1.25
    assert any(scene.shape == shape for scene in HELD_OUT)


def test_the_same_seed_gives_the_same_bytes_and_another_another_picture(engine: DiffusersEngine) -> None:
    first, second, other = (run(engine, seed=seed)[0][0].data for seed in (5, 5, 6))
    assert first == second != other


def test_without_a_seed_the_jobs_own_is_taken_and_told(engine: DiffusersEngine) -> None:
    images, _, done = run(engine, seed=None)
    assert done.seed == 0x00010203
    assert run(engine, seed=done.seed)[0] == images


def test_each_of_several_pictures_is_the_one_of_its_own_seed(engine: DiffusersEngine) -> None:
    images, _, done = run(engine, n=3, seed=7)
    assert json.loads(done.result)["seeds"] == [7, 8, 9]
    assert len({image.data for image in images}) == 3
    assert run(engine, seed=9)[0][0] == images[2]


def test_progress_counts_the_steps_of_all_pictures(engine: DiffusersEngine) -> None:
    _, progress, _ = run(engine, n=2, steps=3)
    assert progress == [ProgressLine(step, 6) for step in range(1, 7)]


def test_a_batch_makes_the_same_pictures_together() -> None:
    order = order_of(FOLDER, threads=1)
    engine = load(replace(order, options={**order.options, "batch": 2}))
    images, progress, _ = run(engine, n=3, steps=2)
    assert progress == [ProgressLine(step, 6) for step in (2, 4, 5, 6)]
    alone = [picture_of(run(engine, seed=1 + index)[0][0]).astype(int) for index in range(3)]
    for image, picture in zip(images, alone, strict=True):
        assert abs(picture_of(image).astype(int) - picture).max() <= 2


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (40, 72)])
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_sizes_and_formats(engine: DiffusersEngine, width: int, height: int, image_format: str) -> None:
    images, _, _ = run(engine, size=f"{width}x{height}", output_format=image_format, steps=1)
    assert (images[0].width, images[0].height, images[0].format) == (width, height, image_format)
    assert picture_of(images[0]).shape == (height, width, 3)


def test_a_negative_prompt_and_guidance_change_the_picture(engine: DiffusersEngine) -> None:
    plain, against, weaker = (run(engine, **fields)[0][0].data for fields in ({}, {"negative_prompt": "red circle"}, {"guidance": 1}))
    assert len({plain, against, weaker}) == 3


@pytest.mark.parametrize(("step", "layers", "images"), [(1, 0, 0), (5, 50, 1), (8, 10, 1)])
def test_a_job_that_is_stopped_ends_within_a_step(engine: DiffusersEngine, step: int, layers: int, images: int) -> None:
    """Two pictures of four steps; the third case ends while the second picture is decoded."""
    job = StoppedJob({"prompt": "a red circle", "n": 2, "steps": 4}, step=step, layers=layers)
    with pytest.raises(JobStopped):
        engine.run(job)
    assert [line.step for line in job.lines if isinstance(line, ProgressLine)] == list(range(1, step + 1))
    assert sum(isinstance(line, ImageLine) for line in job.lines) == images
    assert run(engine)[0] == run(engine)[0]  # and the next one is as if it had not been


@pytest.mark.parametrize("fields", [{"prompt": ""}, {"size": "2048x64"}, {"size": "60x64"}, {"width": 24}, {"n": 11}, {"steps": 151}])
def test_bad_input_is_refused_before_anything_is_made(engine: DiffusersEngine, fields: dict[str, Any]) -> None:
    job = LocalJob({"prompt": "a red circle"} | fields)
    with pytest.raises(BadJob):
        engine.run(job)
    assert job.lines == []


def test_who_sends_a_prompt_that_is_too_long_is_told_and_no_log_has_it(
    engine: DiffusersEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    job = LocalJob({"prompt": "a red circle " + "zzz " * 40, "steps": 1})
    logging.getLogger("diffusers").propagate = logging.getLogger("transformers").propagate = True
    engine.run(job)
    assert job.lines[0] == StatusLine("the prompt has 125 tokens; the model reads the first 24")
    output = capfd.readouterr()
    assert "zzz" not in caplog.text + output.out + output.err


def test_the_label_says_build_and_model(engine: DiffusersEngine) -> None:
    assert "StableDiffusionPipeline" in engine.label
    assert " " not in engine.label
    assert len(engine.label) <= 128


def test_a_model_whose_picture_is_no_number_is_broken(tmp_path: Path) -> None:
    """Its weights are as they were, but for one bias that is NaN."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    _spoil(folder / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias")
    with pytest.raises(BrokenJob, match="no numbers"):
        run(load(order_of(folder, threads=1)))


def _spoil(file: Path, name: str) -> None:
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    start, end = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    data[8 + size + start : 8 + size + end] = np.full((end - start) // 2, np.nan, np.float16).tobytes()
    file.write_bytes(data)


def test_parts_that_do_not_fit_are_seen_when_they_are_loaded(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
    with pytest.raises(ConfigError, match="StableDiffusionPipeline"):
        load(order_of(folder, threads=1))


def test_weights_that_are_cut_short_do_not_load(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="does not load"):
        load(order_of(folder, threads=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"side_default": 60}, "multiples of 8"), ({"side_max": 16, "side_default": 32}, "at most 16"), ({"foo": 1}, "unknown")],
)
def test_options_that_the_pipeline_cannot_meet_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(replace(order_of(FOLDER, threads=1), options=options))


def test_files_of_a_variant_are_loaded_where_the_options_say_so(engine: DiffusersEngine, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    for weights in folder.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    order = order_of(folder, threads=1)
    with pytest.raises(ConfigError, match="does not load"):
        load(order)
    assert run(load(replace(order, options={**order.options, "variant": "fp16"})))[0] == run(engine)[0]


def test_what_saves_memory_leaves_the_picture_nearly_as_it_is(engine: DiffusersEngine) -> None:
    order = order_of(FOLDER, threads=1)
    sparing = load(replace(order, options={**order.options, "attention_slicing": True, "vae_tiling": True, "offload": "model"}))
    pictures = [picture_of(run(which)[0][0]).astype(int) for which in (engine, sparing)]
    assert abs(pictures[0] - pictures[1]).max() <= 2


def test_a_folder_that_names_code_of_its_own_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "model"))
    ran = tmp_path / "ran"
    (folder / "unet" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\n")
    index = folder / ENTRY
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["evil", "Evil"]}))
    order = order_of(folder, threads=1)
    for files in (order.files, {path: place for path, place in order.files.items() if not path.endswith(".py")}):
        with pytest.raises(ConfigError):
            load(replace(order, files=files))
    assert not ran.exists()
