"""Text to image with diffusers: a pipeline is loaded from a checked folder, offline and without code of its own, and makes pictures.

Chance comes from a generator on the CPU, one a picture, so a picture depends on its own seed alone and not on the device's generator or on
how many others are made. torch and diffusers are imported when a pipeline is loaded, not before.
"""

from __future__ import annotations

import base64
import importlib.metadata
import inspect
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import limits
from protocol.cargo_io import DoneLine, ImageLine, ProgressLine, StatusLine, done
from protocol.errors import ConfigError
from runtimes.diffusers.folder import PipelineFolder, open_folder
from runtimes.diffusers.options import DiffusersOptions, read_options
from runtimes.diffusers.request import Bounds, ImageRequest, read_request
from runtimes.lines.engine import BrokenJob, LineJob, LoadOrder

_SIDE_SMALL_PX = 64  # the smallest that is offered, where the pipeline's own size is not smaller yet
_T5_TOKENS_MAX = 512  # FluxPipeline's max_sequence_length
# FluxPipeline guides by a second pass only where it is told how strongly; 4 is what its documentation's examples have.
_FLUX_NEGATIVE_GUIDANCE = 4.0
_JPEG_QUALITY = 95
# What torch, transformers and diffusers raise where weights and configs do not fit together.
_LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def load(order: LoadOrder) -> DiffusersEngine:
    """Reads, checks and loads a Cargo's pipeline, and makes one small picture with it. Raises ConfigError."""
    options = read_options(order.options)
    folder = open_folder(order.entry, order.files)
    try:
        import diffusers  # noqa: F401
        import torch
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing; install it with: pip install 'archipelag[diffusers]'") from None

    torch.set_num_threads(order.threads)
    device = _device()
    pipe = _pipeline(folder, options, device)
    engine = DiffusersEngine(pipe, options, device, order)
    try:
        engine.try_out()
    except _LIBRARY_ERRORS as error:
        if _is_memory(error):
            raise MemoryError from None
        raise ConfigError(f"the pipeline's parts do not fit together: {_brief(error)}") from None
    return engine


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        # Convolutions are tried out and the fastest is taken otherwise: not the same one every time.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(options: DiffusersOptions, device: str, pipeline: str) -> Any:
    """FLUX overflows in float16; Stable Diffusion was trained for it. On CPUs half precision is slow."""
    import torch

    half = "bfloat16" if pipeline == "FluxPipeline" else "float16"
    return getattr(torch, options.dtype or ("float32" if device == "cpu" else half))


def _pipeline(folder: PipelineFolder, options: DiffusersOptions, device: str) -> Any:
    import diffusers
    from safetensors import SafetensorError

    _be_quiet()
    try:
        pipe = getattr(diffusers, folder.pipeline).from_pretrained(
            str(folder.folder),
            dtype=_dtype(options, device, folder.pipeline),
            variant=options.variant or None,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **dict.fromkeys(folder.left_out),
        )
    except (*_LIBRARY_ERRORS, OSError, ImportError, SafetensorError) as error:
        if _is_memory(error):
            raise MemoryError from None
        raise ConfigError(f"the {folder.pipeline} does not load: {_brief(error)}") from None
    pipe.set_progress_bar_config(disable=True)
    _place(pipe, options, device)
    return pipe


def _place(pipe: Any, options: DiffusersOptions, device: str) -> None:
    if device == "cpu" or not options.offload:
        pipe.to(device)
    elif options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    if options.attention_slicing:
        pipe.enable_attention_slicing()
    if options.vae_tiling:
        pipe.vae.enable_tiling()


def _be_quiet() -> None:
    """Both libraries log pieces of prompts that are too long, as warnings."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _brief(error: Exception) -> str:
    """The kind and the first line, of errors that came without any job."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _is_memory(error: Exception) -> bool:
    """torch has a RuntimeError of its own for a full GPU, and a plain one for a full machine."""
    return type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error) or "can't allocate memory" in str(error)


class DiffusersEngine:
    """A LineEngine over a loaded pipeline. Made by ``load``."""

    def __init__(self, pipe: Any, options: DiffusersOptions, device: str, order: LoadOrder) -> None:
        self._pipe, self._options, self._device = pipe, options, device
        self.bounds = _bounds(pipe, options)
        self._label = _label(pipe, device, order)
        self._is_flux = type(pipe).__name__ == "FluxPipeline"

    def __repr__(self) -> str:
        return f"<DiffusersEngine {self._label}>"

    @property
    def label(self) -> str:
        return self._label

    def try_out(self) -> None:
        """A step or two at the smallest size. Raises whatever the pipeline does."""
        side = self.bounds.side_min
        guidance = self.bounds.guidance_default
        self._call(ImageRequest("a", "", 1, side, side, min(2, self.bounds.steps_default), guidance, 0, "png"), (0,), None)

    def run(self, job: LineJob) -> DoneLine:
        """Raises BadJob, BrokenJob, JobStopped."""
        request = read_request(job.fields, self.bounds, job.seed)
        self._tell_of_cut(job, request)
        filtered: list[int] = []
        for first in range(0, request.count, self._options.batch):
            seeds = request.seeds[first : first + self._options.batch]
            made = self._make(request, seeds, _Progress(job, first, len(seeds), request.count))
            filtered += [first + index for index, hidden in enumerate(_hidden(made, len(seeds))) if hidden]
            for picture in _pixels(made):
                job.say(_image_line(picture, request.image_format))
        result = {"seeds": list(request.seeds), "steps": request.steps, "guidance": request.guidance}
        return done(result | ({"filtered": filtered} if filtered else {}), seed=request.seed)

    def _make(self, request: ImageRequest, seeds: tuple[int, ...], progress: _Progress) -> Any:
        """What the pipeline raises may hold the prompt: only its kind is told."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        # A step of a large model on a CPU takes many seconds; a job that has to end does so at its next layer.
        watch = register_module_forward_pre_hook(progress.layer_begins)
        try:
            return self._call(request, seeds, progress.step_done)
        except _LIBRARY_ERRORS as error:
            if _is_memory(error):
                raise MemoryError from None
            raise BrokenJob(f"the pipeline failed with {type(error).__name__}") from None
        finally:
            watch.remove()
            self._pipe.maybe_free_model_hooks()

    def _call(self, request: ImageRequest, seeds: tuple[int, ...], step_done: Any) -> Any:
        import torch

        further: dict[str, Any] = {}
        if not self._is_flux:
            further["negative_prompt"] = request.negative_prompt
        elif request.negative_prompt:
            further = {"negative_prompt": request.negative_prompt, "true_cfg_scale": _FLUX_NEGATIVE_GUIDANCE}
        return self._pipe(
            prompt=request.prompt,
            num_images_per_prompt=len(seeds),
            width=request.width,
            height=request.height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            callback_on_step_end=step_done,
            callback_on_step_end_tensor_inputs=[],
            **further,
        )

    def _tell_of_cut(self, job: LineJob, request: ImageRequest) -> None:
        """Says so where the model does not read all of the prompt."""
        tokenizer = self._pipe.tokenizer_2 if self._is_flux else self._pipe.tokenizer
        most = _T5_TOKENS_MAX if self._is_flux else tokenizer.model_max_length
        has = len(tokenizer(request.prompt).input_ids)
        if has > most:
            job.say(StatusLine(f"the prompt has {has} tokens; the model reads the first {most}"))


class _Progress:
    """Counts steps over all pictures of a job, made ``together`` at a time; ``before`` are made already."""

    def __init__(self, job: LineJob, before: int, together: int, count: int) -> None:
        self._job, self._before, self._together, self._count = job, before, together, count

    def layer_begins(self, module: Any, values: Any) -> None:
        """Called by torch. Raises JobStopped."""
        self._job.check()

    def step_done(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after each step; some schedulers take more of them than the job has asked for. Raises JobStopped."""
        self._job.check()
        each = pipe.num_timesteps
        self._job.say(ProgressLine(self._before * each + (step + 1) * self._together, self._count * each))
        return tensors


def _hidden(made: Any, count: int) -> list[bool]:
    """Which pictures a safety checker has blackened."""
    return getattr(made, "nsfw_content_detected", None) or [False] * count


def _pixels(made: Any) -> Iterator[NDArray[np.uint8]]:
    """Each [height, width, 3]. Raises BrokenJob where a picture holds NaN or infinities."""
    for picture in made.images:
        if not np.isfinite(picture).all():
            raise BrokenJob("the model's picture holds values that are no numbers; a dtype of float32 or bfloat16 may help")
        yield (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)


def _image_line(picture: NDArray[np.uint8], image_format: str) -> ImageLine:
    from PIL import Image

    data = io.BytesIO()
    further = {"quality": _JPEG_QUALITY} if image_format == "jpeg" else {"lossless": True} if image_format == "webp" else {}
    Image.fromarray(picture).save(data, image_format.upper(), **further)
    height, width, _ = picture.shape
    return ImageLine(base64.b64encode(data.getvalue()).decode(), image_format, width, height)


def _bounds(pipe: Any, options: DiffusersOptions) -> Bounds:
    """From what the loaded parts say of themselves. Raises ConfigError where the options ask for what they cannot do."""
    is_flux = type(pipe).__name__ == "FluxPipeline"
    # FLUX packs 2 x 2 latents into one; the other pipelines refuse what 8 does not divide.
    multiple = math.lcm(8, pipe.vae_scale_factor * (2 if is_flux else 1))
    own = pipe.default_sample_size * pipe.vae_scale_factor if is_flux else _unet_side(pipe)
    side_max = options.side_max - options.side_max % multiple
    default = options.side_default or min(own, side_max)
    if not 0 < default <= side_max or default % multiple:
        raise ConfigError(f"the pipeline makes pictures whose sides are multiples of {multiple} pixels, at most {side_max}, not {default}")
    usual = inspect.signature(pipe.__call__).parameters
    return Bounds(
        side_multiple=multiple,
        side_min=min(default, math.ceil(_SIDE_SMALL_PX / multiple) * multiple),
        side_max=side_max,
        side_default=default,
        steps_default=options.steps or int(usual["num_inference_steps"].default),
        guidance_default=options.guidance if options.guidance >= 0 else float(usual["guidance_scale"].default),
    )


def _unet_side(pipe: Any) -> int:
    """A U-Net's size is one number or, in some configs, height and width."""
    size = pipe.unet.config.sample_size
    return int(max(size) if isinstance(size, list | tuple) else size) * int(pipe.vae_scale_factor)


def _label(pipe: Any, device: str, order: LoadOrder) -> str:
    """Threads and the CPU's vector units are in it: sums in another order round otherwise."""
    import torch

    built = f"diffusers-{importlib.metadata.version('diffusers')}/torch-{torch.__version__}"
    where = f"cpu-{torch.backends.cpu.get_cpu_capability()}-{order.threads}" if device == "cpu" else device
    kind = str(pipe.dtype).removeprefix("torch.")
    return f"{built}/{type(pipe).__name__}/{where}/{kind}/{order.content_hash[:16]}".replace(" ", "-")[: limits.NAME_CHARS_MAX]
