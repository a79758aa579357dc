"""The parts of the pipeline of shapes, untrained, and the folder they are written to: Stable Diffusion's design in small.

A picture of 32 x 32 x 3 becomes 8 x 8 x 4 in the autoencoder; the U-Net takes noise off that. It looks at the words where it is 4 x 4, and
hears of them in every block together with the time, which learns in a tenth of the steps. Written in half precision with safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtimes.diffusers.shapes.draw import SIDE_PX
from runtimes.diffusers.shapes.words import BEGIN, END, TOKENS_MAX, vocabulary

_LATENT_SIDE = SIDE_PX // 4
_WORD_WIDTH = 64
_TRAIN_STEPS = 1000  # into which the scheduler cuts the way from a picture to noise


@dataclass(slots=True)
class Parts:
    """torch modules; ``tokenizer`` and ``scheduler`` have no weights."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any


def new_parts() -> Parts:
    """With weights as torch's generator gives them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE_PX,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=_LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=_WORD_WIDTH,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return Parts(vae, unet, _text_encoder(), _tokenizer(), _scheduler())


def _text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=_WORD_WIDTH,
        intermediate_size=2 * _WORD_WIDTH,
        projection_dim=_WORD_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS_MAX,
        bos_token_id=tokens[BEGIN],
        eos_token_id=tokens[END],
        pad_token_id=tokens[END],
    )
    return CLIPTextModel(config)


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens, merges = vocabulary()
    return CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=TOKENS_MAX)


def _scheduler() -> Any:
    """Noise without a rest of the picture at its end, so that black grounds become black and white ones white (arXiv 2305.08891)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=_TRAIN_STEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
