"""A thin typed shell over llama-cpp-python's low-level API. Everything foreign ends here: pointers, return codes, its log.

Rules of the library that this file keeps: a batch's arrays outlive the call; callbacks are referenced as long as the context lives;
``llama_decode`` releases the GIL (ctypes), so other threads of the worker run meanwhile; vocabulary functions are safe from any thread.

Written for llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import ArchipelagError, ConfigError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

_SEQ_CELLS_END = -1
_MIB = 1024 * 1024
_LOG_LINES_MAX = 400
_DEBUG, _ERROR = 1, 4  # enum ggml_log_level in ggml.h; the comment in llama-cpp-python is older
_BUFFER_LINE = re.compile(r"(compute|output|KV|RS|model) buffer size\s*=\s*([\d.]+) MiB")


class LlamaError(ArchipelagError):
    """llama.cpp refused; the text holds the last lines of its log."""


class NoSuchTensor(LlamaError):
    """The model's graph calls its hidden states something else."""


class LlamaFull(LlamaError):
    """No room in the KV cache for this batch: our book-keeping and the library's disagree."""


@cache
def library() -> Any:
    """The foreign module, imported on first use: it loads 10 MB of native code, which only workers need. Raises ConfigError."""
    try:
        import llama_cpp.llama_cpp as foreign
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # absent, a library missing, or of another version
        raise ConfigError(f"llama-cpp-python cannot be used ({error}); install it with `make setup`") from error

    foreign.llama_log_set(_log_callback(), ctypes.c_void_p(0))
    foreign.llama_backend_init()
    return foreign


@cache
def ggml() -> Any:
    """``libggml-base``: tensors and devices."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
        if (folder / name).exists():
            lib = ctypes.CDLL(str(folder / name))
            lib.ggml_get_name.restype = ctypes.c_char_p
            lib.ggml_get_name.argtypes = [ctypes.c_void_p]
            lib.ggml_nbytes.restype = ctypes.c_size_t
            lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
            lib.ggml_backend_tensor_get.restype = None
            lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            return lib
    raise LlamaError(f"llama-cpp-python has no ggml library in {folder}; reinstall it with `make setup`")


_log: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES_MAX)


@cache
def _log_callback() -> Any:
    import llama_cpp.llama_cpp as foreign

    def on_line(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        if line.strip(". ") and level != _DEBUG and "repack tensor" not in line:
            _log.append((level, line))

    return foreign.llama_log_callback(on_line)


def log_lines() -> list[str]:
    """The last lines that llama.cpp wrote; model and buffer facts, never prompts."""
    return [line for _, line in _log]


def buffer_bytes(lines: list[str], kind: str) -> int:
    """Sum of the buffers of one kind ("compute", "KV", "model", …) that these log lines name; llama.cpp says it nowhere else."""
    sizes = (match for line in lines if (match := _BUFFER_LINE.search(line)))
    return int(sum(float(match[2]) * _MIB for match in sizes if match[1] == kind))


def version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What stands in the model file."""

    architecture: str
    description: str  # such as "llama 134M Q4_1"
    layers: int
    width: int
    vocabulary: int
    context_tokens: int  # trained
    weights_bytes: int
    recurrent: bool  # its state cannot be cut back, so no prefix of it can be reused


class Model:
    """A loaded model file. Raises LlamaError when it cannot be loaded."""

    def __init__(self, path: str, gpu_layers: int = 0, vocabulary_only: bool = False, plain: bool = False) -> None:
        """``plain``: weights stay as they are in the file, not repacked for the CPU's matrix units."""
        c = self._c = library()
        params = c.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocabulary_only
        params.use_extra_bufts = not plain
        _log.clear()
        self.pointer = c.llama_model_load_from_file(path.encode(), params)
        if not self.pointer:
            raise LlamaError(_last_errors())
        self.vocab = c.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(c.llama_vocab_n_tokens(self.vocab))
        self._pieces: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"<Model {self.facts().description if self.pointer else 'closed'}>"

    def close(self) -> None:
        if self.pointer:
            self._c.llama_model_free(self.pointer)
            self.pointer = None

    def facts(self) -> ModelFacts:
        c, model = self._c, self.pointer
        room = ctypes.create_string_buffer(256)
        c.llama_model_desc(model, room, len(room))
        return ModelFacts(
            architecture=self.meta("general.architecture"),
            description=room.value.decode("utf-8", "replace"),
            layers=int(c.llama_model_n_layer(model)),
            width=int(c.llama_model_n_embd(model)),
            vocabulary=self.n_vocab,
            context_tokens=int(c.llama_model_n_ctx_train(model)),
            weights_bytes=int(c.llama_model_size(model)),
            recurrent=bool(c.llama_model_is_recurrent(model) or c.llama_model_is_hybrid(model)),
        )

    def meta(self, key: str, bytes_max: int = 4096) -> str:
        """A value of the file's metadata as text; empty where there is none."""
        room = ctypes.create_string_buffer(bytes_max)
        size = int(self._c.llama_model_meta_val_str(self.pointer, key.encode(), room, bytes_max))
        if size >= bytes_max:
            raise LlamaError(f"the model's metadata {key} has {size} bytes; the limit is {bytes_max}")
        return room.value.decode("utf-8", "replace") if size >= 0 else ""

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. ``add_special``: as the model wants it, such as a BOS in front."""
        data = text.encode("utf-8", "surrogatepass")
        room = len(data) + 8
        tokens = (ctypes.c_int32 * room)()
        count = int(self._c.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special))
        if count < 0:  # more tokens than bytes: says how many
            room = -count
            tokens = (ctypes.c_int32 * room)()
            count = int(self._c.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special))
        if count < 0:
            raise LlamaError("the text could not be turned into tokens")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token adds to an answer: none for control tokens; remembered, since a call costs 2 µs."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._piece(token, special=False)
        return known

    def special_text(self, token: int) -> str:
        """How a control token is written in a template, such as ``<|im_end|>``; empty for -1."""
        return self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    def _piece(self, token: int, special: bool) -> bytes:
        room = ctypes.create_string_buffer(64)
        size = int(self._c.llama_token_to_piece(self.vocab, token, room, len(room), 0, special))
        if size < 0:
            room = ctypes.create_string_buffer(-size)
            size = int(self._c.llama_token_to_piece(self.vocab, token, room, len(room), 0, special))
        return room.raw[: max(0, size)]

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(self._c.llama_vocab_is_eog(self.vocab, token))

    def end_tokens(self) -> frozenset[int]:
        return frozenset(token for token in range(self.n_vocab) if self.is_end(token))

    def bos(self) -> int:
        return int(self._c.llama_vocab_bos(self.vocab))

    def eos(self) -> int:
        return int(self._c.llama_vocab_eos(self.vocab))

    def adds_bos(self) -> bool:
        return bool(self._c.llama_vocab_get_add_bos(self.vocab))

    def chat_template(self, bytes_max: int) -> str:
        return self.meta("tokenizer.chat_template", bytes_max)


@dataclass(frozen=True, slots=True)
class ContextSize:
    """``cells``: KV cells shared by all sequences; ``batch``: most rows of one decode; ``outputs``: most rows of it that may be read."""

    cells: int
    sequences: int
    batch: int
    micro_batch: int
    outputs: int
    threads: int


class Context:
    """KV cache and compute buffers over a model, for several sequences in one pool of cells.

    With ``emits_hidden`` the graph ends behind the last layer, before the final norm: the callback sees the tensor ``l_out-<last>``,
    copies it and answers False, so the output matrix is not multiplied. Every row must then be flagged for output, else llama.cpp
    drops rows in its last layer. ``behind_norm``: it ends behind the final norm, and attention adds up in f32.

    ``pooling``: llama.cpp's number for how a model for embeddings makes one vector of a sequence.
    """

    def __init__(
        self, model: Model, size: ContextSize, emits_hidden: bool = False, behind_norm: bool = False, pooling: int | None = None
    ) -> None:
        c = self._c = library()
        self.model, self.size = model, size
        self.width, self.width_out = int(c.llama_model_n_embd(model.pointer)), int(c.llama_model_n_embd_out(model.pointer))
        self._hidden: list[Floats] = []
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = size.cells, size.sequences
        params.n_batch, params.n_ubatch, params.n_outputs_max = size.batch, size.micro_batch, size.outputs
        params.n_threads = params.n_threads_batch = size.threads
        params.kv_unified = True
        params.swa_full = True  # a window that forgets cells could not be reused by the next turn
        params.no_perf = True
        if emits_hidden:
            self._callback = c.ggml_backend_sched_eval_callback(self._on_tensor)
            params.cb_eval = self._callback
            last = int(c.llama_model_n_layer(model.pointer)) - 1
            self._wanted = b"result_norm" if behind_norm else f"l_out-{last}".encode()
        if pooling is not None:
            params.embeddings, params.pooling_type = True, pooling
        if behind_norm or pooling is not None:
            params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _log.clear()
        self.pointer = c.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise LlamaError(_last_errors())
        self.compute_bytes = buffer_bytes(log_lines(), "compute") + buffer_bytes(log_lines(), "output")
        self.kv_bytes = buffer_bytes(log_lines(), "KV") + buffer_bytes(log_lines(), "RS")
        self.cells = int(c.llama_n_ctx(self.pointer))
        self._memory = c.llama_get_memory(self.pointer)
        self._batch = _Batch(c, size.batch)

    def __repr__(self) -> str:
        return f"<Context of {self.cells} cells, {self.size.sequences} sequences>"

    def close(self) -> None:
        if self.pointer:
            self._c.llama_free(self.pointer)
            self.pointer = None

    def _on_tensor(self, tensor: int, ask: bool, _: object) -> bool:
        lib = ggml()
        if ask:
            return bool(lib.ggml_get_name(tensor) == self._wanted)
        size = lib.ggml_nbytes(tensor)
        rows = np.empty(size // 4, np.float32)
        lib.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, size)
        self._hidden.append(rows.reshape(-1, self.width))
        return False

    def decode(self, rows: Ints | Floats, positions: Ints, sequences: Ints, outputs: npt.NDArray[np.int8]) -> None:
        """Computes rows (token ids (n,) or hidden states (n, width)) and adds them to the cache. Raises LlamaFull, LlamaError."""
        self._hidden.clear()
        code = int(self._c.llama_decode(self.pointer, self._batch.fill(rows, positions, sequences, outputs)))
        if code == 1:
            raise LlamaFull(f"no KV cells for {len(rows)} rows")
        if code != 0:
            raise LlamaError(f"llama_decode answered {code}: {_last_errors()}")

    def logits(self, count: int) -> Floats:
        """Logits (count, vocabulary) of the rows flagged in the last decode: a view into llama.cpp's memory until the next one."""
        pointer = self._c.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, (count, self.model.n_vocab))

    def encode(self, tokens: Ints, positions: Ints, sequences: Ints) -> None:
        """Whole sequences through a model for embeddings; read by ``pooled``. Raises LlamaError."""
        code = int(self._c.llama_encode(self.pointer, self._batch.fill(tokens, positions, sequences, np.ones(len(tokens), np.int8))))
        if code != 0:
            raise LlamaError(f"llama_encode answered {code}: {_last_errors()}")

    def pooled(self, sequence: int) -> Floats:
        """The vector (width_out,) of a sequence of the last ``encode``. Raises LlamaError."""
        pointer = self._c.llama_get_embeddings_seq(self.pointer, sequence)
        if not pointer:
            raise LlamaError("this model gives no vector of a text")
        return np.ctypeslib.as_array(pointer, (self.width_out,)).copy()

    def hidden(self) -> Floats:
        """Hidden states (rows, width) of the last decode. Raises NoSuchTensor."""
        if not self._hidden:
            raise NoSuchTensor("the model's graph has no such states")
        return np.concatenate(self._hidden) if len(self._hidden) != 1 else self._hidden[0]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """The target sequence shares the source's first cells: no data moves."""
        self._c.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, sequence: int, length: int = 0) -> None:
        """Forgets a sequence's cells from position ``length`` on."""
        if not self._c.llama_memory_seq_rm(self._memory, sequence, length, _SEQ_CELLS_END):
            raise LlamaError(f"sequence {sequence} could not be cut back to {length}")

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """A sequence's cells as bytes; the format is llama.cpp's and of this build only."""
        size = int(self._c.llama_state_seq_get_size(self.pointer, sequence))
        state = np.empty(size, np.uint8)
        got = int(self._c.llama_state_seq_get_data(self.pointer, _bytes_pointer(state), size, sequence))
        if got != size:
            raise LlamaError(f"sequence {sequence} gave {got} bytes instead of {size}")
        return state

    def restore(self, sequence: int, state: npt.NDArray[np.uint8]) -> None:
        """Raises LlamaFull when there are not enough free cells."""
        if not self._c.llama_state_seq_set_data(self.pointer, _bytes_pointer(state), len(state), sequence):
            raise LlamaFull(f"no KV cells for a saved sequence of {len(state)} bytes")

    def length(self, sequence: int) -> int:
        """Positions that the cache holds of a sequence."""
        return int(self._c.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def clear(self) -> None:
        self._c.llama_memory_clear(self._memory, False)


def _bytes_pointer(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Batch:
    """Arrays of one ``llama_batch``, allocated once and filled by numpy: no Python loop over rows."""

    def __init__(self, c: Any, rows_max: int) -> None:
        self._positions = np.zeros(rows_max, np.int32)
        self._counts = np.ones(rows_max, np.int32)
        self._sequences = np.zeros(rows_max, np.int32)
        self._outputs = np.zeros(rows_max, np.int8)
        self._tokens = np.zeros(rows_max, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(rows_max, dtype=np.uintp)
        self._hidden: Floats | None = None  # keeps the rows alive during the call
        self._rows_max = rows_max
        batch = self._batch = c.llama_batch()
        fields = dict(c.llama_batch._fields_)
        self._token_type, self._float_type = fields["token"], fields["embd"]
        batch.pos = ctypes.cast(self._positions.ctypes.data, fields["pos"])
        batch.n_seq_id = ctypes.cast(self._counts.ctypes.data, fields["n_seq_id"])
        batch.seq_id = ctypes.cast(self._pointers.ctypes.data, fields["seq_id"])
        batch.logits = ctypes.cast(self._outputs.ctypes.data, fields["logits"])
        self._token_pointer = ctypes.cast(self._tokens.ctypes.data, self._token_type)
        self._no_tokens, self._no_floats = self._token_type(), self._float_type()

    def fill(self, rows: Ints | Floats, positions: Ints, sequences: Ints, outputs: npt.NDArray[np.int8]) -> Any:
        n, batch = len(rows), self._batch
        if not 0 < n <= self._rows_max:
            raise LlamaError(f"a batch has 1 to {self._rows_max} rows, not {n}")
        self._positions[:n], self._sequences[:n], self._outputs[:n] = positions, sequences, outputs
        batch.n_tokens = n
        if rows.dtype == np.float32:
            self._hidden = np.ascontiguousarray(rows, np.float32)
            batch.token, batch.embd = self._no_tokens, ctypes.cast(self._hidden.ctypes.data, self._float_type)
        else:
            self._tokens[:n] = rows
            batch.token, batch.embd = self._token_pointer, self._no_floats
        return batch


def _last_errors() -> str:
    """What a person needs of the log: its errors, else the last lines."""
    wrong = [line for level, line in _log if level == _ERROR]
    return "; ".join(line.strip() for line in (wrong or log_lines())[-3:])[:500] or "no reason given"
