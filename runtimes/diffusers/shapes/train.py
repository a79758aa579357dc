"""Trains the pipeline of shapes from nothing: first the autoencoder on pictures, then the U-Net and its words on noise over their latents.

Everything is drawn from one seed; on the same machine with the same number of threads the same weights come out. The U-Net learns the
velocity between picture and noise (arXiv 2202.00512); every tenth caption is left empty, for guidance without a classifier
(arXiv 2207.12598). What is kept of U-Net and words is their average over the last steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.diffusers.shapes.draw import TRAINED, Scene, draw
from runtimes.diffusers.shapes.parts import Parts, new_parts

Told = Callable[[str, int, int, float], None]
"""Stage, step, of how many, loss."""

_VAE_BATCH = 16
_VAE_RATE = 2e-3
_VAE_PRIOR_WEIGHT = 2e-5  # of the Kullback-Leibler term: just so that latents stay near a unit normal
_UNET_BATCH = 48
_UNET_RATE = 2e-3
_WARM_UP_STEPS_MAX = 50
_DECAY = 0.995  # of the average of weights
_EMPTY_SHARE = 0.1
_SHORT_SHARE = 0.3  # of captions in other words than the full ones
_GRADIENT_NORM_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train; the seed of all that is drawn; how many pictures of each scene are encoded, once, for the U-Net."""

    vae_steps: int = 1200
    unet_steps: int = 4000
    seed: int = 0
    pool_per_scene: int = 100


@dataclass(frozen=True, slots=True)
class Trained:
    """Losses: one a step."""

    parts: Parts
    vae_losses: tuple[float, ...]
    unet_losses: tuple[float, ...]


def train(plan: Plan, told: Told) -> Trained:
    """Runs in torch's threads; weights in 32 bit."""
    import torch

    torch.manual_seed(plan.seed)
    chance = np.random.default_rng(plan.seed)
    parts = new_parts()
    vae_losses = _train_vae(parts, plan.vae_steps, chance, told)
    latents, scenes = _encoded_pool(parts, plan.pool_per_scene, chance)
    unet_losses = _train_unet(parts, plan.unet_steps, latents, scenes, chance, told)
    return Trained(parts, tuple(vae_losses), tuple(unet_losses))


def caption_of(scene: Scene, chance: np.random.Generator) -> str:
    """The caption that training gives a picture: the whole one mostly, at times none, or one that says less or with other words."""
    luck = chance.random()
    if luck < _EMPTY_SHARE:
        return ""
    if luck > _EMPTY_SHARE + _SHORT_SHARE:
        return scene.caption
    other_words = (
        f"{scene.colour} {scene.shape}",
        f"a {scene.colour} {scene.shape}",
        f"{scene.colour} {scene.shape} on {scene.ground}",
        f"a picture of a {scene.colour} {scene.shape} on a {scene.ground} background",
        f"the {scene.colour} {scene.shape} on the {scene.ground} ground",
        f"{scene.shape} on {scene.ground} ground",
    )
    return other_words[chance.integers(len(other_words))]


def _pictures(scenes: list[Scene], chance: np.random.Generator) -> Any:
    """[count, 3, side, side], -1 to 1."""
    import torch

    return torch.from_numpy(2 * draw(scenes, chance).transpose(0, 3, 1, 2).copy() - 1)


def _some_scenes(count: int, chance: np.random.Generator) -> list[Scene]:
    return [TRAINED[index] for index in chance.integers(len(TRAINED), size=count)]


def _train_vae(parts: Parts, steps: int, chance: np.random.Generator, told: Told) -> list[float]:
    from torch.nn.functional import l1_loss, mse_loss

    losses: list[float] = []
    optimizer, schedule = _optimizer([parts.vae], _VAE_RATE, steps)
    for step in range(steps):
        pictures = _pictures(_some_scenes(_VAE_BATCH, chance), chance)
        spread = parts.vae.encode(pictures).latent_dist
        again = parts.vae.decode(spread.sample()).sample
        loss = l1_loss(again, pictures) + mse_loss(again, pictures) + _VAE_PRIOR_WEIGHT * spread.kl().mean()
        losses.append(_learn(loss, [parts.vae], optimizer, schedule))
        told("autoencoder", step + 1, steps, losses[-1])
    return losses


def _encoded_pool(parts: Parts, per_scene: int, chance: np.random.Generator) -> tuple[Any, list[Scene]]:
    """Latents of pictures of all scenes, of unit spread; the autoencoder's scale is set so."""
    import torch

    scenes = list(TRAINED) * per_scene
    with torch.no_grad():
        batches = [scenes[start : start + _VAE_BATCH] for start in range(0, len(scenes), _VAE_BATCH)]
        latents = torch.cat([parts.vae.encode(_pictures(batch, chance)).latent_dist.mode() for batch in batches])
    scale = 1 / float(latents.std())
    parts.vae.register_to_config(scaling_factor=scale)
    return latents * scale, scenes


def _train_unet(parts: Parts, steps: int, latents: Any, scenes: list[Scene], chance: np.random.Generator, told: Told) -> list[float]:
    import torch
    from torch.nn.functional import mse_loss

    losses: list[float] = []
    learners = [parts.unet, parts.text_encoder]
    optimizer, schedule = _optimizer(learners, _UNET_RATE, steps)
    average = torch.optim.swa_utils
    averages = [average.AveragedModel(part, multi_avg_fn=average.get_ema_multi_avg_fn(_DECAY)) for part in learners]
    for step in range(steps):
        chosen = chance.integers(len(scenes), size=_UNET_BATCH)
        captions = [caption_of(scenes[index], chance) for index in chosen]
        clean, noise = latents[torch.from_numpy(chosen)], torch.randn(_UNET_BATCH, *latents.shape[1:])
        times = torch.from_numpy(chance.integers(parts.scheduler.config.num_train_timesteps, size=_UNET_BATCH))
        noisy = parts.scheduler.add_noise(clean, noise, times)
        answer = parts.unet(noisy, times, _words(parts, captions)).sample
        loss = mse_loss(answer, parts.scheduler.get_velocity(clean, noise, times))
        losses.append(_learn(loss, learners, optimizer, schedule))
        for mean, part in zip(averages, learners, strict=True):
            mean.update_parameters(part)
        told("u-net", step + 1, steps, losses[-1])
    for mean, part in zip(averages, learners, strict=True):
        part.load_state_dict(mean.module.state_dict())
    return losses


def _words(parts: Parts, captions: list[str]) -> Any:
    """As StableDiffusionPipeline reads prompts: padded to the full length, without a mask."""
    tokenizer = parts.tokenizer
    ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    return parts.text_encoder(ids.input_ids)[0]


def _optimizer(modules: Iterable[Any], rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW; the rate rises over the first steps, then falls along half a cosine to zero."""
    import torch

    optimizer = torch.optim.AdamW([weight for module in modules for weight in module.parameters()], rate, weight_decay=1e-3)

    warm_up = min(_WARM_UP_STEPS_MAX, 1 + steps // 10)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _learn(loss: Any, modules: Iterable[Any], optimizer: Any, schedule: Any) -> float:
    import torch

    optimizer.zero_grad()
    loss.backward()
    for module in modules:
        torch.nn.utils.clip_grad_norm_(module.parameters(), _GRADIENT_NORM_MAX)
    optimizer.step()
    schedule.step()
    return float(loss.detach())
