"""Texts to arrays: tokens, windows, and batches in which little padding is computed.

Texts are sorted by length and cut into batches of few tokens: on one thread 64 texts of 6 to 62 tokens took 590 ms in batches of four,
1,238 ms padded into one (MiniLM, int8), for a small batch stays in the cache. The answers come back in the order of the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from protocol.checks import made_printable
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob
from runtimes.onnx.options import OptionReader
from runtimes.onnx.session import Array, Session

TOKENS_PER_BATCH = 256  # times threads, padding included
TOKENS_MAX = 32_768  # of one window, whatever the model
_TOKENS_DEFAULT = 512

T = TypeVar("T")
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


@dataclass(frozen=True, slots=True)
class TextModel:
    """A model of texts with its tokenizer.

    ``max_tokens``: of one row, special tokens included. ``refuses_long``: a longer text is a BadJob, else it is cut.
    """

    session: Session
    tokenizer: Tokenizer
    max_tokens: int
    refuses_long: bool
    batch_tokens: int
    pad_id: int

    def encode(self, texts: Sequence[str], fast: bool = True) -> list[Encoding]:
        """One row for each text. ``fast``: without offsets. Raises BadJob for one that is too long, where that is not to be cut."""
        encode = self.tokenizer.encode_batch_fast if fast else self.tokenizer.encode_batch
        return self._checked(_tokens(encode, list(texts)))

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoding]:
        return self._checked(_tokens(self.tokenizer.encode_batch_fast, list(pairs)))

    def _checked(self, rows: list[Encoding]) -> list[Encoding]:
        if not all(row.ids for row in rows):
            raise BadJob("a text has no token that this model knows; send one with letters")
        if self.refuses_long and any(row.overflowing for row in rows):
            raise BadJob(f"a text has more than the {self.max_tokens} tokens that this model takes; send it in parts")
        return rows

    def arrays(self, rows: Sequence[Encoding]) -> dict[str, Array]:
        """The model's inputs, padded to the longest row. int64 or int32 as the model wants."""
        shape = len(rows), max(len(row.ids) for row in rows)
        ids = np.full(shape, self.pad_id, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            ids[index, :length] = row.ids
            mask[index, :length] = 1
            if "token_type_ids" in self.session.inputs:
                types[index, :length] = row.type_ids
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        if "position_ids" in self.session.inputs:
            made["position_ids"] = np.broadcast_to(np.arange(shape[1]), shape)
        return {name: made[name].astype(port.dtype, copy=False) for name, port in self.session.inputs.items()}

    def batches(self, rows: Sequence[Encoding], check: Callable[[], None]) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """(places in ``rows``, inputs) of one batch after the other; ``check`` is called before each."""
        for places in plan_batches([len(row.ids) for row in rows], self.batch_tokens):
            check()
            yield places, self.arrays([rows[place] for place in places])


def _tokens(encode: Callable[[list[T]], list[Encoding]], texts: list[T]) -> list[Encoding]:
    try:
        return encode(texts)
    except Exception:  # the library raises no narrower one, for a tokenizer that lacks what it needs
        raise BrokenJob("the tokenizer cannot read this text") from None


def plan_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places by growing length, cut so that each batch has at most ``tokens`` with its padding, or one row."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def open_text_model(session: Session, options: OptionReader, threads: int) -> TextModel:
    """Reads options ``tokenizer``, ``max_tokens``, ``too_long``. Raises ConfigError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no threads beyond the order's
    tokenizer = _read_tokenizer(options.file("tokenizer", "tokenizer.json"))
    given = tokenizer.truncation
    own = given["max_length"] if given else _TOKENS_DEFAULT
    most = options.integer("max_tokens", min(own, TOKENS_MAX), 8, TOKENS_MAX)
    refuses = options.choice("too_long", ("truncate", "refuse")) == "refuse"
    pad_id = tokenizer.padding["pad_id"] if tokenizer.padding else 0
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    check_text_inputs(session)
    return TextModel(session, tokenizer, most, refuses, TOKENS_PER_BATCH * threads, pad_id)


def check_text_inputs(session: Session) -> None:
    if "input_ids" not in session.inputs or not set(session.inputs) <= _INPUTS:
        takes = ", ".join(session.inputs)[:200]
        raise ConfigError(f"the model takes {takes}; a task of texts needs input_ids, and at most {', '.join(sorted(_INPUTS))}")
    for port in session.inputs.values():
        if port.dtype not in ("int64", "int32") or len(port.shape) != 2 or port.shape != (None, None):
            raise ConfigError(f"the model's {port.name} is {port.dtype} {port.shape_text}; it must be int64 or int32 [any, any]")


def _read_tokenizer(place: str) -> Tokenizer:
    try:
        with open(place, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tokenizer cannot be read: {made_printable(str(error), 200)}") from error
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower one, whatever is wrong with the file
        raise ConfigError(f"the tokenizer is not one of the tokenizers library: {made_printable(str(error), 200)}") from None


def softmax(logits: Array, axis: int = -1) -> npt.NDArray[np.float32]:
    shifted = np.exp(logits.astype(np.float32) - logits.max(axis=axis, keepdims=True))
    total: npt.NDArray[np.float32] = shifted / shifted.sum(axis=axis, keepdims=True)
    return total


def sigmoid(logits: Array) -> npt.NDArray[np.float32]:
    """Without an overflow for large negative ones."""
    found: npt.NDArray[np.float32] = (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float32)))).astype(np.float32)
    return found
