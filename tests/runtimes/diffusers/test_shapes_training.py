"""The training of the model of shapes: what it draws, what it reads, that it learns, and, as a soak test, that it comes out well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from node.cargo_folder import read_folder
from privacy.keys import NodeKey
from runtimes.diffusers.options import read_options
from runtimes.diffusers.shapes import ENTRY
from runtimes.diffusers.shapes.check import answered, order_of
from runtimes.diffusers.shapes.draw import ALL_SCENES, HELD_OUT, SIDE_PX, TRAINED, draw, read_scene
from runtimes.diffusers.shapes.train import Plan, Trained, caption_of, train
from runtimes.diffusers.shapes.words import TOKENS_MAX, vocabulary
from runtimes.diffusers.shapes.write import file_list, write_cargo, write_folder

SHORT = Plan(vae_steps=45, unet_steps=9, pool_per_scene=1)


def test_what_is_drawn_is_read_back() -> None:
    chance = np.random.default_rng(1)
    for _ in range(5):
        for scene, picture in zip(ALL_SCENES, draw(list(ALL_SCENES), chance), strict=True):
            assert picture.shape == (SIDE_PX, SIDE_PX, 3)
            assert read_scene((255 * picture).round().astype(np.uint8)).shows(scene)


def test_reading_tells_a_picture_without_a_shape_and_a_shape_that_is_none() -> None:
    white = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    assert read_scene(white).shape == ""
    white[5:25, 5:25] = (220, 40, 40)
    white[5:22, 8:25] = 255  # an L, which fills a quarter of its box
    assert read_scene(white).shape == ""
    noise = np.random.default_rng(0).integers(0, 256, white.shape).astype(np.uint8)
    assert read_scene(noise).shape == ""


def test_what_is_held_out_is_in_no_picture_and_its_words_are_in_others() -> None:
    assert not set(HELD_OUT) & set(TRAINED)
    for scene in HELD_OUT:
        for other in (("colour", "shape"), ("shape", "ground"), ("colour", "ground")):
            assert any(all(getattr(scene, name) == getattr(seen, name) for name in other) for seen in TRAINED)


def test_every_word_of_every_caption_is_one_token() -> None:
    tokens, _ = vocabulary()
    chance = np.random.default_rng(0)
    captions = {caption_of(scene, chance) for scene in ALL_SCENES for _ in range(50)}
    assert "" in captions
    for caption in captions:
        assert all(f"{word}</w>" in tokens for word in caption.split())
        assert len(caption.split()) + 2 <= TOKENS_MAX


@pytest.fixture(scope="module")
def short() -> Trained:
    """About 7 s: the autoencoder learns slowly at first."""
    import torch

    torch.set_num_threads(1)
    return train(SHORT, lambda stage, step, steps, loss: None)


def test_both_stages_learn(short: Trained) -> None:
    assert (len(short.vae_losses), len(short.unet_losses)) == (SHORT.vae_steps, SHORT.unet_steps)
    assert np.mean(short.vae_losses[-5:]) < 0.85 * np.mean(short.vae_losses[:5])
    assert np.mean(short.unet_losses[-3:]) < 0.85 * np.mean(short.unet_losses[:3])


def test_the_same_seed_trains_the_same() -> None:
    plan = Plan(vae_steps=2, unet_steps=2, pool_per_scene=1)
    told: list[tuple[str, int, int]] = []
    first, second = (train(plan, lambda stage, step, steps, loss: told.append((stage, step, steps))) for _ in range(2))
    assert (first.vae_losses, first.unet_losses) == (second.vae_losses, second.unet_losses)
    assert told[:4] == [("autoencoder", 1, 2), ("autoencoder", 2, 2), ("u-net", 1, 2), ("u-net", 2, 2)]
    assert train(replace(plan, vae_steps=1, unet_steps=1, seed=1), lambda *_: None).vae_losses[0] != first.vae_losses[0]


def test_what_is_written_is_a_cargos_folder(short: Trained, tmp_path: Path) -> None:
    write_folder(short.parts, tmp_path)
    write_cargo(tmp_path)
    manifest = read_folder(tmp_path, NodeKey(bytes(32)).peer_id, 1)
    assert (manifest.name, manifest.runtime, manifest.entry) == ("shapes", "diffusers", ENTRY)
    assert {file.path: file.sha256 for file in manifest.files} == {file["path"]: file["sha256"] for file in file_list(tmp_path)}
    assert order_of(tmp_path, 1).files.keys() == {file.path for file in manifest.files}
    read_options(json.loads(manifest.options))
    assert str(tmp_path) not in "".join(place.read_text() for place in tmp_path.rglob("*.json"))


@pytest.mark.soak
def test_training_from_nothing_gives_a_model_that_answers(tmp_path: Path) -> None:
    """The whole training, about 12 minutes on one core. With three seeds, the model that ships has 0, 1 and 4 of 54 wrong."""
    import torch

    torch.set_num_threads(2)
    trained = train(Plan(seed=1), lambda stage, step, steps, loss: None)
    write_folder(trained.parts, tmp_path)
    found = answered(tmp_path, ALL_SCENES, seed=0, threads=2)
    assert len(found) >= 0.85 * len(ALL_SCENES)
