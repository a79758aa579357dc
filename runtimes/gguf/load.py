"""Loads a model file into an engine: memory divided, speed and buffers measured, everything said in a ``Ready``.

Every failure is a ConfigError whose sentence says what to do.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol import limits
from protocol.errors import ConfigError
from runtimes.gguf import budget, gpu
from runtimes.gguf.engine import Engine
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import ContextSize, LlamaError, Model, ModelFacts, version
from runtimes.gguf.messages import Load, Ready
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.template import ChatTemplate

BATCH_ROWS = 512
MICRO_BATCH_CPU, MICRO_BATCH_GPU = 128, 512  # larger ones need larger compute buffers and gain nothing on a CPU
_COMPUTE_GUESS_BYTES = 128 * 1024 * 1024
SEQUENCES_MAX = 256  # LLAMA_MAX_SEQ
_REMEMBERED_MAX = 64
_WARM_PROMPT_TOKENS = 64
_WARM_DECODE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    model: Model
    stage: Stage
    engine: Engine
    preparer: Preparer
    ready: Ready


def load(order: Load) -> Loaded:
    """Raises ConfigError."""
    check_file(order.path)
    try:
        layers = _gpu_layers(order)
        model = Model(order.path, layers, plain=order.plain)
    except LlamaError as error:
        raise ConfigError(f"{order.path} could not be loaded ({error}); it may be damaged: delete it and fetch it again") from error
    facts, template = model.facts(), _template(model)
    per_token = kv_shape(model).bytes_per_token
    cells = budget.kv_cells(
        facts.weights_bytes,
        _COMPUTE_GUESS_BYTES,
        per_token,
        order.memory_limit_bytes,
        free_memory_bytes(),
        facts.context_tokens,
        order.context_tokens,
    )
    sequences = min(order.slots + _REMEMBERED_MAX, SEQUENCES_MAX)
    size = ContextSize(
        cells=cells,
        sequences=sequences,
        batch=max(BATCH_ROWS, order.slots),
        micro_batch=MICRO_BATCH_GPU if layers else MICRO_BATCH_CPU,
        outputs=sequences,  # llama.cpp reserves one for each sequence and asserts it
        threads=order.threads,
    )
    try:
        stage = Stage(model, size)
    except LlamaError as error:
        raise ConfigError(f"{cells} KV cells for {order.name} could not be allocated ({error}); offer less memory") from error
    return _assemble(order, model, facts, template, stage, layers)


def _assemble(order: Load, model: Model, facts: ModelFacts, template: ChatTemplate | None, stage: Stage, layers: int) -> Loaded:
    cells = stage.context.cells
    decode_s, prefill_s = _measure(stage, min(cells, facts.context_tokens))
    context_tokens = min(cells, facts.context_tokens, order.context_tokens or cells)
    book = KvBook(cells, order.slots, stage.context.size.sequences, remembers=not facts.recurrent)
    engine = Engine(stage, model, model.end_tokens(), book, TimeModel(decode_s, prefill_s), stage.context.size.batch)
    engine.tokens_per_s = 1.0 / decode_s
    ready = Ready(
        engine=_engine_name(version(), gpu.backend_name() if layers else "cpu", facts.description, order),
        context_tokens=context_tokens,
        kv_tokens=cells,
        slots=order.slots,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=-(-stage.context.kv_bytes // cells),
        compute_bytes=stage.context.compute_bytes,
        tokens_per_s=engine.tokens_per_s,
        gpu_layers=layers,
    )
    return Loaded(model, stage, engine, Preparer(model, template, context_tokens), ready)


def check_file(path: str) -> None:
    """What can be said without native code. Raises ConfigError."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise ConfigError(f"the model file {path} cannot be read ({error.strerror}); check the path or fetch the model again") from error
    if magic != b"GGUF":
        raise ConfigError(f"{path} is no GGUF file; check the model's source, or delete the file and fetch it again")


def kv_shape(model: Model) -> budget.KvShape:
    """Cells' size from the metadata; what the file does not say follows from the width and the number of heads."""
    arch = model.meta("general.architecture")
    heads = _number(model, f"{arch}.attention.head_count", 1)
    head = _number(model, f"{arch}.embedding_length", 1) // max(1, heads)
    return budget.KvShape(
        layers=_number(model, f"{arch}.block_count", 1),
        kv_heads=_number(model, f"{arch}.attention.head_count_kv", heads),
        key_length=_number(model, f"{arch}.attention.key_length", head),
        value_length=_number(model, f"{arch}.attention.value_length", head),
    )


def _number(model: Model, key: str, default: int) -> int:
    """A positive figure of the metadata; a list (one for each layer) counts as its largest."""
    numbers = [int(text) for text in re.findall(r"\d+", model.meta(key))]
    return max([n for n in numbers if n > 0], default=default)


def _gpu_layers(order: Load) -> int:
    """How many layers go to the GPU."""
    if not gpu.supports_offload():
        return 0
    if order.gpu_layers >= 0:
        return order.gpu_layers
    glance = Model(order.path, vocabulary_only=True)
    try:
        shape = kv_shape(glance)
    finally:
        glance.close()
    weights = Path(order.path).stat().st_size  # a glance loads no tensors, so it does not know their size
    kv_bytes = budget.CELLS_DEFAULT * shape.bytes_per_token
    return budget.gpu_layers(shape.layers, weights, kv_bytes, _COMPUTE_GUESS_BYTES, gpu.vram_free_bytes())


def _template(model: Model) -> ChatTemplate | None:
    try:
        source = model.chat_template(limits.TEMPLATE_BYTES_MAX)
    except LlamaError as error:
        raise ConfigError(f"the model's chat template cannot be used ({error}); use another model file") from error
    if not source:
        return None
    return ChatTemplate(source, model.special_text(model.bos()), model.special_text(model.eos()))


def _measure(stage: Stage, room: int) -> tuple[float, float]:
    """Seconds of a decoded token and of a prompt token: a short run that also touches all weights."""
    prompt = min(_WARM_PROMPT_TOKENS, room // 2)
    _forward(stage, 0, prompt)
    stage.cut(0)
    started = time.perf_counter()
    _forward(stage, 0, prompt)
    prefill_s = (time.perf_counter() - started) / prompt
    count = min(_WARM_DECODE_TOKENS, room - prompt)
    times = []
    for position in range(prompt, prompt + count):
        started = time.perf_counter()
        _forward(stage, position, 1)
        times.append(time.perf_counter() - started)
    stage.cut(0)
    return float(np.median(times)), prefill_s


def _forward(stage: Stage, start: int, count: int) -> None:
    wanted = np.zeros(count, np.int8)
    wanted[-1] = 1
    stage.forward(Rows(np.zeros(count, np.int32), np.arange(start, start + count, dtype=np.int32), np.zeros(count, np.int32), wanted))


def free_memory_bytes() -> int:
    """Memory that a new process may take: the machine's, or its control group's where that is less."""
    available = _meminfo_available()
    limit, used = _read_int("/sys/fs/cgroup/memory.max"), _read_int("/sys/fs/cgroup/memory.current")
    return min(available, limit - used) if limit is not None and used is not None else available


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such control group, or "max"
        return None


def _engine_name(build: str, backend: str, description: str, order: Load) -> str:
    """Equal names compute equal answers: build, back end, quantisation and file. A name goes into ads, so it has no spaces."""
    parts = ("llama-cpp-python", build, backend, *description.split(), *(["plain"] if order.plain else []), order.content_hash[:12])
    return "/".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", part) for part in parts)
