"""What a Cargo's manifest may say in ``options`` to the diffusers runtime.

``steps``, ``guidance``: where a job names none; without them the pipeline's own. ``side_default``, ``side_max``: in pixels. ``batch``: so
many pictures of a job are made at once, which takes as many times the memory. ``dtype``: of the weights; half precision on a GPU and 32
bit elsewhere, unless said. ``variant``: of the files' names, as in ``diffusion_pytorch_model.fp16.safetensors``. ``offload``: parts wait
in main memory and come to the GPU one by one (``model``) or layer by layer (``sequential``). ``attention_slicing``, ``vae_tiling``: less
memory for more time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from protocol import checks
from protocol.errors import ConfigError
from runtimes.diffusers.request import GUIDANCE_MAX, IMAGES_MAX, SIDE_PX_MAX, STEPS_MAX

DTYPES = ("", "float32", "float16", "bfloat16")
OFFLOADS = ("", "model", "sequential")
VARIANTS = ("", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class DiffusersOptions:
    """Zeros, a negative guidance and empty words: as the pipeline has it."""

    steps: int = 0
    guidance: float = -1.0
    side_default: int = 0
    side_max: int = SIDE_PX_MAX
    batch: int = 1
    dtype: str = ""
    variant: str = ""
    offload: str = ""
    attention_slicing: bool = False
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        checks.in_range("steps", self.steps, 0, STEPS_MAX)
        checks.in_range("guidance", self.guidance, -1, GUIDANCE_MAX)
        checks.in_range("side_default", self.side_default, 0, SIDE_PX_MAX)
        checks.in_range("side_max", self.side_max, 8, SIDE_PX_MAX)
        checks.in_range("batch", self.batch, 1, IMAGES_MAX)
        for name, words in (("dtype", DTYPES), ("variant", VARIANTS), ("offload", OFFLOADS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words[1:])}")


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def read_options(options: Mapping[str, Any]) -> DiffusersOptions:
    """Raises ConfigError for an option that is unknown, of another kind or out of range."""
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(DiffusersOptions)}
    for name, value in options.items():
        if name not in kinds:
            raise ConfigError(f"option {name!r:.60} is unknown; a diffusers Cargo has {', '.join(kinds)}")
        if type(value) not in kinds[name]:
            raise ConfigError(f"option {name} must be {' or '.join(kind.__name__ for kind in kinds[name])}")
    try:
        return DiffusersOptions(**options)
    except ValueError as error:
        raise ConfigError(f"option {error}") from None
