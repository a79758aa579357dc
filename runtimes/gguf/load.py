"""Loads a model file into an engine: memory divided, speed and buffers measured, everything said in a ``Ready``.

Every failure is a ConfigError whose sentence says what to do.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from protocol import limits
from protocol.errors import ConfigError
from runtimes.gguf import budget, gpu
from runtimes.gguf.embed import Embedder, NoEngine
from runtimes.gguf.embed_model import TEXTS_GPU, DecoderVectors, EncoderVectors, Pooling, Text, is_encoder, pooling_of
from runtimes.gguf.engine import Engine
from runtimes.gguf.kv import KvBook
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import ContextSize, Floats, LlamaError, Model, ModelFacts, version
from runtimes.gguf.messages import Load, Ready, Room
from runtimes.gguf.prepare import Preparer
from runtimes.gguf.ring import RingLayers
from runtimes.gguf.scheduler import TimeModel
from runtimes.gguf.shard_header import read_shard_layers
from runtimes.gguf.shelf import Shelf
from runtimes.gguf.stage_worker import LoadedStage
from runtimes.gguf.template import ChatTemplate
from runtimes.gguf.tool_syntax import ToolSyntax
from runtimes.store.gguf_file import check_gguf

BATCH_ROWS = 512
# From 64 rows on, ggml's attention for CPUs takes another path, whose sums are rounded otherwise: with fewer, a prompt gives the same
# logits bit for bit however it is cut into chunks and whoever computes beside it. Larger ones gain nothing on a CPU.
MICRO_BATCH_CPU, MICRO_BATCH_GPU = 60, 512
_COMPUTE_LEAST_BYTES = 128 * 1024 * 1024
_GRAPH_BYTES = 32 * 1024 * 1024  # compute buffers beside the logits: 1 MB for SmolLM2-135M, more for wider models
_KV_ROUNDING_BYTES = 64 * 1024  # llama.cpp's log rounds each buffer to 0.01 MiB
SEQUENCES_MAX = 256  # LLAMA_MAX_SEQ
# A stage of a pipeline has the same room everywhere: its buffers are known before it is loaded, and all stages number alike.
PIPELINE_SLOTS, PIPELINE_SEQUENCES = 16, 32
STAGE_ROWS = MICRO_BATCH_CPU  # of one call: who decodes waits for at most so many rows of a prompt
_REMEMBERED_MAX = 64
_WARM_PROMPT_TOKENS = 64
_WARM_DECODE_TOKENS = 16
_SHARD_WARM_TOKENS = 12
_EMBEDDING_ROWS_GPU = 256
_TEXT_TOKENS_LEAST = 64  # a model for embeddings that cannot take so many is of no use


@dataclass(frozen=True, slots=True)
class Loaded:
    """``ring``: where the model is the last stage of a pipeline. ``embedder``: where it makes embeddings."""

    model: Model
    stage: Stage | EncoderVectors
    engine: Engine | NoEngine
    preparer: Preparer
    ready: Ready
    ring: RingLayers | None = None
    embedder: Embedder | None = None


def load(order: Load, send: Callable[[object], None]) -> Loaded:
    """A whole model, or the last stage of a pipeline; ``send`` takes what that has to say to the node. Raises ConfigError."""
    check_file(order.path)
    try:
        layers = _gpu_layers(order)
        model = Model(order.path, layers, plain=order.plain)
        facts, shape = model.facts(), kv_shape(model)
        template = _template(model)
        _check_facts(facts, shape)
        if is_encoder(model) and order.layers is None:
            return _assemble_encoder(order, model, layers)
        if order.is_driver:
            return _assemble_driver(order, model, template, layers, send)
        stage = _stage(order, model, facts, shape, layers)
        return _assemble(order, model, facts, shape, template, stage, layers)
    except LlamaError as error:
        raise ConfigError(f"{order.path} could not be loaded ({error}); it may be damaged: delete it and fetch it again") from error


def load_stage(order: Load) -> LoadedStage:
    """A stage that is not the last. Raises ConfigError."""
    check_file(order.path)
    try:
        layers = _gpu_layers(order)
        model = Model(order.path, layers, plain=order.plain)
        stage = _shard_stage(order, model)
        ready = _shard_ready(order, model, stage, layers)
    except LlamaError as error:
        raise ConfigError(f"{order.path} could not be loaded ({error}); it may be damaged: delete it and fetch it again") from error
    vocabulary = model.n_vocab if order.layers is not None and order.layers.low == 0 else 0
    return LoadedStage(stage, ready, STAGE_ROWS, vocabulary)


def stage_size(cells: int, threads: int, on_gpu: bool = False) -> ContextSize:
    """The buffers of any stage of a pipeline."""
    micro_batch = MICRO_BATCH_GPU if on_gpu else MICRO_BATCH_CPU
    return ContextSize(cells, PIPELINE_SEQUENCES, batch=STAGE_ROWS, micro_batch=micro_batch, outputs=STAGE_ROWS, threads=threads)


def _shard_stage(order: Load, model: Model) -> Stage:
    check_shard(order)
    try:
        return Stage(model, stage_size(order.cells, order.threads, gpu.supports_offload()), is_last=not order.is_stage)
    except LlamaError as error:
        raise ConfigError(f"{order.cells} KV cells for {order.name} could not be allocated ({error}); offer less memory") from error


def check_shard(order: Load) -> None:
    """Whether the file is the shard that was ordered. Raises ConfigError."""
    facts = read_shard_layers(Path(order.path))
    if order.layers is None:
        return
    expected = (order.content_hash, order.layers, order.total_layers)
    if facts is None or (facts.model_sha256, facts.layers, facts.total_layers) != expected:
        raise ConfigError(f"{order.path} does not hold layers {order.layers} of {order.name}; delete it and cut it anew")


def _shard_ready(order: Load, model: Model, stage: Stage, gpu_layers: int) -> Ready:
    facts, context = model.facts(), stage.context
    hidden = order.layers is not None and order.layers.low > 0
    # A short run: a stage is loaded while somebody waits for the rest of an answer.
    decode_s, _ = _measure(stage, _SHARD_WARM_TOKENS, stage.context.width if hidden else 0)
    per_token = _kv_bytes_per_token(kv_shape(model), context.kv_bytes, context.cells)
    words = facts.description.split()
    description = " ".join([words[0], *words[2:]])  # the second is the number of parameters, which differs by shard
    return Ready(
        engine=_engine_name(version(), gpu.backend_name() if gpu_layers else "cpu", description, order),
        context_tokens=min(context.cells, facts.context_tokens),
        kv_tokens=context.cells,
        slots=PIPELINE_SLOTS,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=per_token,
        compute_bytes=context.compute_bytes,
        tokens_per_s=1.0 / decode_s,
        gpu_layers=gpu_layers,
        width=context.width,
        process_bytes=_process_bytes(facts.weights_bytes + context.compute_bytes + per_token * context.cells),
    )


def _process_bytes(known_bytes: int) -> int:
    """What this process takes beside weights, KV cells and buffers."""
    return max(0, int(psutil.Process().memory_info().rss) - known_bytes)


def _assemble_driver(order: Load, model: Model, template: ChatTemplate | None, gpu_layers: int, send: Callable[[object], None]) -> Loaded:
    stage = _shard_stage(order, model)
    ready = replace(_shard_ready(order, model, stage, gpu_layers), tools=_tools(template))
    ring = RingLayers(stage, send, STAGE_ROWS)
    book = KvBook(ready.kv_tokens, PIPELINE_SLOTS, PIPELINE_SEQUENCES)
    times = TimeModel(1.0 / ready.tokens_per_s, 1.0 / ready.tokens_per_s)
    engine = Engine(ring, model, model.end_tokens(), book, times, STAGE_ROWS)
    return Loaded(model, stage, engine, Preparer(model, template, ready.context_tokens), ready, ring)


def _check_facts(facts: ModelFacts, shape: budget.KvShape) -> None:
    """What llama.cpp believes without a look. Raises LlamaError."""
    if facts.context_tokens < 2 or shape.bytes_per_token < 1:
        raise LlamaError(f"it says that its context has {facts.context_tokens} tokens of {shape.bytes_per_token} bytes")


def _stage(order: Load, model: Model, facts: ModelFacts, shape: budget.KvShape, layers: int) -> Stage:
    """Buffers within the limit. Their size is known only once they exist; where the guess was too low, they are made again, smaller."""
    micro_batch = MICRO_BATCH_GPU if layers else MICRO_BATCH_CPU
    compute_bytes = _compute_guess(facts.vocabulary, _sequences(order), micro_batch)
    stage = _allocate(order, model, _cells(order, facts, shape.bytes_per_token, compute_bytes), micro_batch)
    context, limit_bytes = stage.context, order.memory_limit_bytes
    per_token = _kv_bytes_per_token(shape, context.kv_bytes, context.cells)
    needed_bytes = facts.weights_bytes + context.compute_bytes + budget.PROCESS_BYTES + per_token * context.cells
    if not limit_bytes or needed_bytes <= limit_bytes:
        return stage
    stage.close()
    return _allocate(order, model, _cells(order, facts, per_token, max(compute_bytes, context.compute_bytes)), micro_batch)


def _sequences(order: Load) -> int:
    return min(order.slots + _REMEMBERED_MAX, SEQUENCES_MAX)


def _compute_guess(vocabulary: int, sequences: int, micro_batch: int) -> int:
    """Bytes of compute and output buffers: logits of all sequences to be read, and those of a micro batch while it is computed."""
    logits_bytes = 4 * vocabulary * (sequences + min(sequences, micro_batch))
    return max(_COMPUTE_LEAST_BYTES, _GRAPH_BYTES + logits_bytes)


def _cells(order: Load, facts: ModelFacts, per_token: int, compute_bytes: int) -> int:
    return budget.kv_cells(
        facts.weights_bytes,
        compute_bytes,
        per_token,
        order.memory_limit_bytes,
        free_memory_bytes(),
        facts.context_tokens,
        order.context_tokens,
    )


def _allocate(order: Load, model: Model, cells: int, micro_batch: int) -> Stage:
    size = ContextSize(
        cells=cells,
        sequences=_sequences(order),
        batch=max(BATCH_ROWS, order.slots),
        micro_batch=micro_batch,
        outputs=_sequences(order),  # llama.cpp reserves one for each sequence and asserts it
        threads=order.threads,
    )
    try:
        return Stage(model, size)
    except LlamaError as error:
        raise ConfigError(f"{cells} KV cells for {order.name} could not be allocated ({error}); offer less memory") from error


def _kv_bytes_per_token(shape: budget.KvShape, kv_bytes: int, cells: int) -> int:
    """As allocated: the log's figure, or the exact one where the log agrees with the metadata but for its rounding."""
    exact = shape.bytes_per_token
    return exact if abs(exact * cells - kv_bytes) <= _KV_ROUNDING_BYTES else -(-kv_bytes // cells)


def _assemble(
    order: Load, model: Model, facts: ModelFacts, shape: budget.KvShape, template: ChatTemplate | None, stage: Stage, layers: int
) -> Loaded:
    cells = stage.context.cells
    decode_s, prefill_s = _measure(stage, min(cells, facts.context_tokens))
    context_tokens = min(cells, facts.context_tokens, order.context_tokens or cells)
    book = KvBook(cells, order.slots, stage.context.size.sequences, remembers=not facts.recurrent)
    per_token = _kv_bytes_per_token(shape, stage.context.kv_bytes, cells)
    used_bytes = facts.weights_bytes + stage.context.compute_bytes + budget.PROCESS_BYTES + per_token * cells
    embedder, set_aside_bytes = _embedder(order, model, facts, used_bytes, per_token, prefill_s)
    shelf = _shelf(order, facts, used_bytes + set_aside_bytes, per_token * cells)
    engine = Engine(stage, model, model.end_tokens(), book, TimeModel(decode_s, prefill_s), stage.context.size.batch, shelf)
    engine.tokens_per_s = 1.0 / decode_s
    ready = Ready(
        engine=_engine_name(version(), gpu.backend_name() if layers else "cpu", facts.description, order),
        context_tokens=context_tokens,
        kv_tokens=cells,
        slots=order.slots,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=per_token,
        compute_bytes=stage.context.compute_bytes,
        tokens_per_s=engine.tokens_per_s,
        gpu_layers=layers,
        width=facts.width,
        process_bytes=_process_bytes(facts.weights_bytes + stage.context.compute_bytes + per_token * cells),
        tools=_tools(template),
        embedding_tokens=embedder.tokens_max if embedder is not None else 0,
    )
    return Loaded(model, stage, engine, Preparer(model, template, context_tokens), ready, embedder=embedder)


def _embedder(
    order: Load, model: Model, facts: ModelFacts, used_bytes: int, per_token: int, row_s: float
) -> tuple[Embedder | None, int]:
    """For a model that writes text, and the bytes that its second context will take; none where too few are left."""
    pooling = pooling_of(model)
    rows, together = (_EMBEDDING_ROWS_GPU, TEXTS_GPU) if gpu.supports_offload() else (MICRO_BATCH_CPU, 1)
    buffer_bytes = _GRAPH_BYTES + 2 * 4 * facts.vocabulary * rows
    left_bytes = budget.left_bytes(order.memory_limit_bytes, used_bytes, free_memory_bytes())
    cells = budget.embedding_cells(left_bytes, buffer_bytes, per_token, facts.context_tokens)
    if not cells or pooling is Pooling.RANK or facts.recurrent:
        return None, 0
    size = ContextSize(cells, together, batch=rows, micro_batch=rows, outputs=rows, threads=order.threads)
    embedder = Embedder(model, facts.width, cells, lambda: DecoderVectors(model, size, pooling), row_s)
    return embedder, buffer_bytes + cells * per_token


def _assemble_encoder(order: Load, model: Model, layers: int) -> Loaded:
    """A model that makes embeddings and writes no text. Raises ConfigError, LlamaError."""
    pooling, facts = pooling_of(model), model.facts()
    if pooling is Pooling.RANK:
        raise ConfigError(f"{order.name} compares texts and has no vectors of them; name a model for embeddings or for text")
    vectors = _encoder(order, model, facts, pooling)
    text = Text(np.full(min(_WARM_PROMPT_TOKENS, vectors.tokens_max), max(0, model.bos()), np.int32))
    vectors.compute([text], vectors.tokens_max)  # touches all weights
    started = time.perf_counter()
    row_s = (time.perf_counter() - started) / vectors.compute([text], vectors.tokens_max)
    embedder = Embedder(model, vectors.dimensions, vectors.tokens_max, lambda: vectors, row_s)
    compute_bytes = vectors.context.compute_bytes
    ready = Ready(
        engine=_engine_name(version(), gpu.backend_name() if layers else "cpu", facts.description, order),
        context_tokens=vectors.tokens_max,
        kv_tokens=vectors.tokens_max,
        slots=order.slots,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=0,
        compute_bytes=compute_bytes,
        tokens_per_s=1.0 / max(row_s, 1e-9),
        gpu_layers=layers,
        width=facts.width,
        process_bytes=_process_bytes(facts.weights_bytes + compute_bytes),
        embedding_tokens=vectors.tokens_max,
        writes_text=False,
    )
    engine = NoEngine(Room(ready.kv_tokens, ready.slots, 0, ready.tokens_per_s))
    return Loaded(model, vectors, engine, Preparer(model, None, vectors.tokens_max), ready, embedder=embedder)


def _encoder(order: Load, model: Model, facts: ModelFacts, pooling: Pooling) -> EncoderVectors:
    """With as long texts as the limit allows: attention looks at all pairs of tokens, so buffers grow with their square."""
    tokens = min(facts.context_tokens, budget.EMBEDDING_CELLS_MAX, order.context_tokens or facts.context_tokens)
    limit_bytes = order.memory_limit_bytes or free_memory_bytes()
    while tokens >= _TEXT_TOKENS_LEAST:
        together = TEXTS_GPU if gpu.supports_offload() else 1
        vectors = EncoderVectors(model, tokens, together, order.threads, pooling)
        needed_bytes = facts.weights_bytes + vectors.context.compute_bytes + budget.PROCESS_BYTES
        if needed_bytes <= limit_bytes:
            return vectors
        vectors.close()
        tokens //= 2
    raise ConfigError(f"{limit_bytes} bytes cannot hold {order.name}: it needs {needed_bytes}; offer more or choose a smaller model")


def _shelf(order: Load, facts: ModelFacts, used_bytes: int, kv_bytes: int) -> Shelf:
    """Room for prefixes outside the cells. A model whose state cannot be cut back to a prefix has no use for it."""
    room = budget.shelf_bytes(order.memory_limit_bytes, used_bytes, kv_bytes, free_memory_bytes())
    return Shelf(0 if facts.recurrent else room)


def check_file(path: str) -> None:
    """What can be said without native code. Raises ConfigError."""
    try:
        check_gguf(Path(path))
    except OSError as error:
        raise ConfigError(f"the model file {path} cannot be read ({error.strerror}); check the path or fetch the model again") from error


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
        shape, vocabulary = kv_shape(glance), glance.n_vocab
    finally:
        glance.close()
    weights = Path(order.path).stat().st_size  # a glance loads no tensors, so it does not know their size
    kv_bytes = budget.CELLS_DEFAULT * shape.bytes_per_token
    compute_bytes = _compute_guess(vocabulary, _sequences(order), MICRO_BATCH_GPU)
    return budget.gpu_layers(shape.layers, weights, kv_bytes, compute_bytes, gpu.vram_free_bytes())


def _template(model: Model) -> ChatTemplate | None:
    try:
        source = model.chat_template(limits.TEMPLATE_BYTES_MAX)
    except LlamaError as error:
        raise ConfigError(f"the model's chat template cannot be used ({error}); use another model file") from error
    if not source:
        return None
    return ChatTemplate(source, model.special_text(model.bos()), model.special_text(model.eos()))


def _tools(template: ChatTemplate | None) -> ToolSyntax:
    return template.tools if template is not None else ToolSyntax.NONE


def _measure(stage: Stage, room: int, width: int = 0) -> tuple[float, float]:
    """Seconds of a decoded token and of a prompt token: a short run that also touches all weights. ``width``: of the hidden states where
    those come in. Raises LlamaError."""
    prompt = min(_WARM_PROMPT_TOKENS, room // 2, stage.context.size.batch)
    _forward(stage, 0, prompt, width)
    stage.cut(0)
    started = time.perf_counter()
    _forward(stage, 0, prompt, width)
    prefill_s = (time.perf_counter() - started) / prompt
    count = min(_WARM_DECODE_TOKENS, room - prompt)
    times = []
    for position in range(prompt, prompt + count):
        started = time.perf_counter()
        out = _forward(stage, position, 1, width)
        times.append(time.perf_counter() - started)
    if np.isnan(out).any():
        raise LlamaError("what it computes are no numbers")
    stage.cut(0)
    return float(np.median(times)), prefill_s


def _forward(stage: Stage, start: int, count: int, width: int) -> Floats:
    wanted = np.zeros(count, np.int8)
    wanted[-1] = 1
    positions = np.arange(start, start + count, dtype=np.int32)
    values = np.full((count, width), 0.1, np.float32) if width else np.zeros(count, np.int32)
    return stage.forward(Rows(values, positions, np.zeros(count, np.int32), wanted))


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
